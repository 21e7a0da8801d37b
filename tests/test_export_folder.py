"""The folder that an export writes, and its card: whole or not at all, refused before the work, true."""

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import test_export

from jqlib import pipeline
from jqlib.config import KINDS, make_config
from jqlib.export.card import _command
from jqlib.export.export import export
from jqlib.recipes import RECIPES

small = test_export.small  # the fixture


def test_a_folder_is_written_whole_or_not_at_all(small, tmp_path, monkeypatch):
    config = small(recipe="rtn", a_bits=16)
    monkeypatch.setattr("jqlib.export.export.card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(config, "compressed-tensors", tmp_path / "to")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out", "text.txt"}
    (tmp_path / "to").mkdir()
    with pytest.raises(FileExistsError, match="is there already: export writes a new folder, or overwrites one of its"):
        export(config, "compressed-tensors", tmp_path / "to", overwrite=True)  # not an export


def test_an_export_can_be_overwritten(small, tmp_path):
    config = small(recipe="rtn", a_bits=16)
    export(config, "compressed-tensors", tmp_path / "to")
    with pytest.raises(FileExistsError):
        export(config, "hf", tmp_path / "to")
    export(config, "hf", tmp_path / "to", overwrite=True)
    assert json.loads((tmp_path / "to" / "jointquant.json").read_text())["format"] == "hf"


@pytest.mark.parametrize(("to", "message"), [
    ("/proc/to", r"to: nothing can be written in /proc \(No such file"),
    ("text.txt/to", r"to: nothing can be written in .*text\.txt \(Not a directory\). Name another folder"),
    (".", "is there already"), ("out", "out holds results: name another folder"),
])  # fmt: skip
def test_a_folder_that_cannot_be_had_is_said_before_the_work(small, tmp_path, to, message):
    config = small(recipe="rtn", a_bits=16)
    with pytest.raises(OSError, match=message):
        export(config, "hf", tmp_path / to)
    assert not (tmp_path / "out").exists()


def test_an_export_does_not_replace_its_own_source(small, tmp_path):
    config = small(recipe="rtn", a_bits=16)
    export(config, "hf", tmp_path / "to")
    with pytest.raises(FileExistsError, match="to holds the model that is exported: name another folder"):
        export(replace(config, model=str(tmp_path / "to")), "hf", tmp_path / "to", overwrite=True)


def test_a_card_that_is_no_yaml(small, tmp_path):
    config = small(recipe="rtn", a_bits=16)
    (Path(config.model) / "README.md").write_text("---\nlicense: [\n---\n")
    card = (export(config, "jointquant", tmp_path / "to") / "README.md").read_text()
    assert "license: other" in card
    assert "Weights as codes of 4 bits, activations rounded to 16 bits" in card


def test_the_cards_command_says_what_its_profile_does_not(small):
    config = small(recipe="rtn", nsamples=128, refine_steps=20, model="a model/with spaces")
    words = shlex.split(_command(config, pipeline.recipe_of(config), "hf"))
    given = dict(zip(words[4:-4:2], words[5:-4:2], strict=True))
    assert {"--model": "a model/with spaces", "--profile": "quick", "--nsamples": "128"}.items() <= given.items()
    assert "--refine_steps" not in given
    flags = {name.removeprefix("--"): KINDS[name.removeprefix("--")](value) for name, value in given.items()}
    assert make_config(flags) == config
    streamed = replace(config, stream=True, refine_steps=0)
    assert "--stream True" in _command(streamed, pipeline.recipe_of(streamed), "hf")
    own = replace(pipeline.recipe_of(config), a_clip=0.8)
    assert "with a recipe of its own: its settings are in jointquant.json" in _command(config, own, "hf")


def test_the_command_and_the_card(small, tmp_path):
    config = small()
    flags = [f"--{name}={value}" for name, value in test_export.QUICK.items()]
    command = [sys.executable, "-m", "jqlib", "export", "--model", config.model, "--recipe", "deploy", *flags,
               "--output_dir", config.output_dir, "--calib_dataset", config.calib_dataset, "--eval_dataset",
               config.eval_dataset, "--format", "compressed-tensors", "--to", tmp_path / "to"]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    card = (tmp_path / "to" / "README.md").read_text()
    row = pipeline.evaluate(replace(config, recipe="deploy"), RECIPES["deploy"], 4, 8)
    assert f"| W4A8 | {row['ppl']:.3f} |" in card
    assert "--recipe deploy" in card
    assert "license: " in card
    assert json.loads((tmp_path / "to" / "jointquant.json").read_text())["bits_per_weight"] == pytest.approx(4.5, 0.2)
    about = json.loads((tmp_path / "to" / "config.json").read_text())
    assert about["quantization_config"]["quant_method"] == "compressed-tensors"
    assert (tmp_path / "to" / "rotations" / "transforms.safetensors").is_file()
