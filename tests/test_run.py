"""The runner: flags, run files, and what it refuses before anything runs."""

from dataclasses import replace

import pytest

from jqlib.__main__ import main
from jqlib.config import make_config
from jqlib.lab.checks import check_inputs
from jqlib.lab.run import (
    _say_what_is_replaced,
    read_run_file,
    select_notebooks,
    with_absolute_paths,
)
from jqlib.model.load import load_config
from jqlib.store import save_results


@pytest.fixture
def calls(monkeypatch):
    """What `run` would have been called with."""
    seen = []
    monkeypatch.setattr("jqlib.__main__.run", lambda parameters, only: seen.append((parameters, only)) or 0)
    return seen


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model", "a/b", "--w_bits", "4"], {"model": "a/b", "w_bits": 4}),
        (["--use_smooth"], {"use_smooth": True}),
        (["--use_smooth", "False"], {"use_smooth": False}),
        (["--no-use_smooth"], {"use_smooth": False}),
        (["--eval_windows", "0"], {"eval_windows": 0}),
        (["--r1_lr", "1e-2", "--smooth_alpha", "1"], {"r1_lr": 0.01, "smooth_alpha": 1.0}),
    ],
)
def test_flags(calls, flags, expected):
    assert main(["run", *flags]) == 0
    assert calls == [(expected, None)]


def test_a_misspelt_flag_is_refused(calls, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["run", "--w_bit", "4"])
    err = capsys.readouterr().err
    assert "usage: python -m jqlib run" in err
    assert "unrecognized arguments: --w_bit 4" in err
    assert not calls


def test_a_flag_beats_the_run_file(calls, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: smollm2-135m\nprofile: quick\n")
    main(["run", "-f", str(file), "--profile", "standard", "--only", "2,05"])
    assert calls == [({"model": "smollm2-135m", "profile": "standard"}, "2,05")]


BAD = [
    (["--w_bits", "1"], None, "error: w_bits=1: bits are whole numbers from 2 to 16, and 16 means not quantised"),
    (["--model", "./nowhere"], None, "error: model path ./nowhere does not exist"),
    (
        ["--model", "smollm2-135m", "--only", "07"],
        None,
        "error: --only 07: there is no notebook 07; there are 01 to 06",
    ),
    (
        ["--model", "smollm2-135m", "--eval_windows", "9999"],
        None,
        "error: the test text of 'wiki' has 122,667 tokens: ",
    ),
    (["--model", "smollm2-135m", "--device", "banana"], None, "error: device='banana' can't be used here: "),
    (["--model", "smollm2-135m", "--device", "meta"], None, "error: device='meta' can't be used here: "),
    (["--only", ","], None, "error: --only ,: it names no notebook: give numbers, such as 02,05"),
    (["--model", "smollm2-135m", "--calib_dataset", "nope.txt"], None, "error: data set 'nope.txt' is unknown"),
    ([], "modle: smollm2-135m", "error: unknown parameter 'modle'; there are model"),
    ([], "- a list", "error: run file "),
    ([], "model: ~/x: y", "error: run file "),
    (["-f", "."], None, "error: run file . is a folder: give a model's by --model"),
]


@pytest.mark.parametrize(("flags", "file", "message"), BAD)
def test_refused_before_anything_runs(flags, file, message, tmp_path, capsys):
    if file:
        (tmp_path / "run.yaml").write_text(file)
        flags = [*flags, "-f", str(tmp_path / "run.yaml")]
    assert main(["run", *flags, "--output_dir", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("command", "message"), [
    (["info", "smollm2-135m", "--device", "banana"], "error: device='banana' can't be used here: "),
    (["study", "--device", "meta"], "error: device='meta' can't be used here: "),
    (["clean", "nowhere"], "error: there is no folder "),
    (["run", "--model", "smollm2-135m", "--profile", "quick", "--output_dir", "/proc/no"],
     "error: output_dir: nothing can be written in /proc/no/smollm2-135m (No such file or directory). Name another"),
    (["export", "--model", "smollm2-135m", "--profile", "quick", "--format", "gguf", "--to", "x", "--recipe", "deploy",
      "--a_bits", "4"], "error: a_bits=4: recipe 'deploy' has a_bits=8 of its own: leave it out"),
])  # fmt: skip
def test_other_commands_refuse_too(command, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    assert capsys.readouterr().err.startswith(message)
    assert not [*tmp_path.iterdir()]


def test_info_looks_where_run_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["info", "smollm2-135m", "--output_dir", "out"]) == 0
    assert f"in {tmp_path / 'out' / 'smollm2-135m'}" in capsys.readouterr().out


def test_calibrating_on_the_test_text_is_said(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("All happy families are alike. " * 200)
    small = {"model": "smollm2-135m", "profile": "quick", "nsamples": 1, "seqlen": 32, "eval_windows": 2}
    check_inputs(make_config(small | {"calib_dataset": str(text)}))
    assert "warning" not in capsys.readouterr().out
    check_inputs(make_config(small | {"calib_dataset": str(text), "eval_dataset": str(text)}))
    said = (
        "of the evaluation text's runs of 13 tokens are in the calibration text too: expect perplexities that are too"
    )
    assert said in capsys.readouterr().out


def test_one_article_is_said_to_give_no_interval(capsys):
    check_inputs(make_config({"model": "smollm2-135m", "profile": "quick", "eval_windows": 1}))
    assert capsys.readouterr().out.startswith("warning: all evaluation windows are from one article: no interval.")


def test_a_folder_without_weights_and_windows_too_long_are_said(tmp_path, capsys):
    small = {"model": "smollm2-135m", "profile": "quick", "nsamples": 1, "eval_windows": 2}
    check_inputs(make_config(small | {"seqlen": 8193}))
    assert capsys.readouterr().out.startswith("warning: windows of 8193 tokens: the model is for 8192 at most")
    load_config("smollm2-135m").save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no weights: expected \*\.safetensors or \*\.bin"):
        check_inputs(make_config(small | {"model": str(tmp_path), "seqlen": 32}))


def test_results_that_would_be_replaced_are_said(tmp_path, capsys):
    config = make_config({"model": "smollm2-135m", "output_dir": str(tmp_path)})
    _say_what_is_replaced(config, "05", {"seed", "w_bits"})
    assert capsys.readouterr().out == ""
    save_results(config, "05", {})
    _say_what_is_replaced(replace(config, a_bits=8), "05", {"seed", "w_bits"})  # it knows no a_bits
    assert capsys.readouterr().out == ""
    _say_what_is_replaced(replace(config, w_bits=3), "05", {"seed", "w_bits"})
    assert capsys.readouterr().out.startswith("warning: replaces its results made with w_bits=4; another --output_dir")


def test_a_missing_run_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run file .*nope\.yaml does not exist"):
        read_run_file(tmp_path / "nope.yaml")


def test_paths_stand_where_the_user_does(tmp_path, monkeypatch):
    """A kernel stands in ``notebooks/``. Names of hub models and known data sets are no paths, whatever lies here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wiki").mkdir()
    (tmp_path / "text.txt").touch()
    given = {"model": "a/b", "calib_dataset": "wiki", "eval_dataset": "text.txt", "output_dir": "out", "seed": 1}
    moved = {"eval_dataset": str(tmp_path / "text.txt"), "output_dir": str(tmp_path / "out")}
    assert with_absolute_paths(given) == given | moved


def test_only_chooses_by_number():
    assert [path.name[:2] for path in select_notebooks("5, 02")] == ["02", "05"]
