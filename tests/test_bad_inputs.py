"""Users' files as they really are: each that can't be right is refused in one sentence that names it, at once."""

import json
import os
import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
from conftest import make_tiny_model
from safetensors.torch import load_file, save_file

from jqlib.__main__ import main
from jqlib.config import NOTEBOOKS, make_config
from jqlib.lab.checks import check_inputs, check_kernel, shared
from jqlib.lab.run import _plain, declared_in, read_run_file
from jqlib.model.data import Windows
from jqlib.model.evaluate import evaluate_windows
from jqlib.model.load import get_model, get_tokenizer
from jqlib.model.text import load_articles
from jqlib.store import save_results

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
LINE = "All happy families are alike; every unhappy family is unhappy in its own way. "


@pytest.fixture
def model(tmp_path, tiny_tokenizer):
    folder = tmp_path / "model"
    make_tiny_model().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def truncate(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/no/such/blob")


WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"


@pytest.mark.parametrize(("file", "spoil", "message"), [
    (WEIGHTS, lambda p: p.write_text(POINTER), "is a Git LFS pointer, not the file itself: run git lfs pull"),
    (TOKENIZER, lambda p: p.write_text(POINTER), "is a Git LFS pointer"),
    (CONFIG, lambda p: p.write_text(POINTER), "is a Git LFS pointer"),
    (WEIGHTS, lambda p: p.write_bytes(b""), r"is empty\. Is the download whole\?"),
    (CONFIG, lambda p: p.write_bytes(b""), "is empty"),
    (TOKENIZER, lambda p: p.write_bytes(b""), "is empty"),
    (WEIGHTS, lambda p: truncate(p, 0.5), "is no safetensors file, or not all of it"),
    (WEIGHTS, lambda p: truncate(p, 0.01), "is no safetensors file, or not all of it"),
    (WEIGHTS, lambda p: p.write_bytes(b"<html>404 Not Found</html>"), "is no safetensors file"),
    (WEIGHTS, lambda p: p.write_bytes(os.urandom(100)), "is no safetensors file"),
    (CONFIG, lambda p: truncate(p, 0.7), "is not JSON"),
    (TOKENIZER, lambda p: truncate(p, 0.7), "is not JSON"),
    (TOKENIZER, lambda p: p.write_text("<html>"), "is not JSON"),
    (CONFIG, lambda p: p.write_text("[]"), "holds no names and values"),
    (WEIGHTS, link, "is a link to /no/such/blob, which does not exist"),
    (TOKENIZER, link, "is a link to /no/such/blob"),
    (CONFIG, lambda p: change(p, quantization_config={"quant_method": "gptq"}), "is quantised already, by gptq"),
    (CONFIG, lambda p: change(p, quantization_config={"bits": 4}), "by a method that it does not name"),
    (CONFIG, lambda p: change(p, jointquant={"w_bits": 4}), "is quantised already, by jointquant"),
    (CONFIG, lambda p: change(p, model_type="mixtral"), "mixture of experts"),
    (CONFIG, lambda p: change(p, model_type="nonesuch"), "nonesuch"),
    (CONFIG, lambda p: change(p, vocab_size=100), "other shapes than its config says: model.embed_tokens.weight"),
    (CONFIG, lambda p: change(p, intermediate_size=64), "other shapes than its config says"),
    (CONFIG, lambda p: change(p, num_hidden_layers=9), "weights that its config needs are not in its files"),
    (CONFIG, lambda p: change(p, num_attention_heads=5), "hidden size .48. is not a multiple of the number of"),
    (CONFIG, lambda p: change(p, hidden_size="48"), "can't be read by transformers: .*hidden_size"),
    (CONFIG, lambda p: p.unlink(), "has no config.json"),
    (WEIGHTS, lambda p: p.unlink(), "no file named model.safetensors|has no weights"),
    (WEIGHTS, lambda p: save_file(load_file(p) | {"stray": torch.ones(1)}, p, {"format": "pt"}), "not used by its"),
])  # fmt: skip
def test_models(model, file, spoil, message):
    spoil(model / file)
    with pytest.raises((ValueError, OSError), match=message) as error:
        get_model(str(model))
    assert str(model) in str(error.value)


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda p: p.write_text(POINTER), "pytorch_model.bin is a Git LFS pointer"),
    (lambda p: p.write_bytes(b""), "pytorch_model.bin is empty"),
    (lambda p: truncate(p, 0.5), "can't be read by transformers"),
    (lambda p: p.write_bytes(b"<html>404</html>"), "can't be read by transformers"),
])  # fmt: skip
def test_weights_of_another_kind(model, spoil, message):
    torch.save(load_file(model / WEIGHTS), model / "pytorch_model.bin")
    (model / WEIGHTS).unlink()
    assert get_model(str(model)).config.hidden_size == 48
    spoil(model / "pytorch_model.bin")
    with pytest.raises(ValueError, match=message):
        get_model(str(model))


def test_weights_that_nobody_reads(model):
    """Beside safetensors, as many repositories have them and most people leave them out."""
    (model / "pytorch_model.bin").write_text(POINTER)
    (model / "training_args.bin").write_bytes(b"")
    (model / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model-1-of-2.bin"}}))
    assert get_model(str(model)).config.hidden_size == 48


def test_a_shard_that_is_missing(model):
    (model / WEIGHTS).unlink()
    make_tiny_model().save_pretrained(model, max_shard_size="20KB")
    get_model(str(model))
    shard = sorted(model.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=rf"has no {shard.name}, which model\.safetensors\.index\.json names\. Is the"):
        check_inputs(make_config({"model": str(model), "profile": "quick"}))


def test_a_file_that_is_not_the_models(model):
    (model / "notes.json").write_text("[1, 2]")
    assert get_model(str(model)).config.hidden_size == 48


def test_no_tokenizer(model):
    for path in model.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="has no tokenizer: save it there"):
        get_tokenizer(str(model))


def parquet(folder: Path, rows, column: str = "text") -> Path:
    folder.mkdir(exist_ok=True)
    pd.DataFrame({column: rows}).to_parquet(folder / "test.parquet")
    return folder


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.jsonl", json.dumps({"text": LINE}), r"is a \.jsonl file: its braces and quotes would be read as text"),
    ("a.json", "{}", r"is a \.json file"),
    ("a.csv", "id,text\n1,x", r"is a \.csv file: its commas"),
    ("A.CSV", "id,text\n1,x", r"is a \.CSV file: its commas"),
    ("a.tsv", "id\ttext", r"is a \.tsv file"),
    ("a.html", "<p>x</p>", r"is a \.html file: its tags"),
    ("a.xml", "<p>x</p>", r"is a \.xml file"),
    ("a.gz", "x", r"is a \.gz file: its bytes"),
    ("a.zip", "x", r"is a \.zip file"),
    ("a.parquet", "x", r"is a \.parquet file: its bytes .* a folder of parquet files"),
    ("a.pdf", "x", r"is a \.pdf file"),
    ("a.txt", '{"text": "one"}\n{"text": "two"}', "begins with a line of JSON"),
    ("a.txt", '\n  ["one", "two"]', "begins with a line of JSON"),
    ("a.txt", LINE.encode("utf-16-le"), "has zero bytes: it is not UTF-8 text"),
    ("a.txt", LINE.encode("utf-16"), "is not a UTF-8 text file"),
    ("a.txt", "café".encode("latin-1"), r"is not a UTF-8 text file .* Convert it first"),
    ("a.txt", b"\x1f\x8b\x08\x00", "is not a UTF-8 text file"),
])  # fmt: skip
def test_text_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        load_articles(str(path), "test")
    assert str(path) in str(error.value)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(LINE.encode("utf-8-sig"))
    assert load_articles(str(tmp_path / "a.txt"), "test") == [LINE]
    (tmp_path / "b.txt").write_text("[not JSON, only a bracket")
    assert load_articles(str(tmp_path / "b.txt"), "test") == ["[not JSON, only a bracket"]
    (tmp_path / "c.txt").write_text("[1]\nThe first chapter.")
    assert load_articles(str(tmp_path / "c.txt"), "test") == ["[1]\nThe first chapter."]


@pytest.mark.parametrize(("rows", "column", "message"), [
    (["x", None], "text", "row 1 of column 'text' is 'None', a NoneType, not text"),
    ([["a"], ["b"]], "text", r"row 0 of column 'text' is .*, a list, not text"),
    ([b"bytes"], "text", "a bytes, not text"),
    ([1.5], "text", "a float, not text"),
    (["x"], "content", "no column 'text': its columns are content"),
])  # fmt: skip
def test_parquet_rows(tmp_path, rows, column, message):
    with pytest.raises(ValueError, match=message):
        load_articles(str(parquet(tmp_path / "data", rows, column)), "test")


def test_parquet_files_that_are_none(tmp_path):
    (tmp_path / "test.parquet").write_text("no")
    with pytest.raises(ValueError, match=r"test\.parquet can't be read as parquet"):
        load_articles(str(tmp_path), "test")


def test_a_folder_is_its_own_and_not_a_pattern(tmp_path):
    parquet(tmp_path / "data v", ["the sibling"])
    assert load_articles(str(parquet(tmp_path / "data [v1]", ["its own"])), "test") == ["its own"]


@pytest.mark.parametrize(("content", "message"), [
    ("seed: 1\nw_bits: 4\nseed: 2", "has seed twice: which is meant"),
    ("seed: 010", "seed: 010 is 8 in YAML: write the number that is meant"),
    ("seed: 0x10", "seed: 0x10 is 16 in YAML"),
    ("nsamples: 1:30", "nsamples: 1:30 is 90 in YAML"),
    ("nsamples: 1_000", "nsamples: 1_000 is 1000 in YAML"),
    ("r1_lr: 1:30.5", "r1_lr: 1:30.5 is 90.5 in YAML"),
    ("smooth_alpha: 0_0.5", "smooth_alpha: 0_0.5 is 0.5 in YAML"),
    ("r1_lr: 2e-3", "r1_lr: 2e-3 is text in YAML: write 0.002"),
    ("r1_lr: -1E5", "r1_lr: -1E5 is text in YAML: write -100000.0"),
    ("model: !here a", "is not YAML: could not determine a constructor"),
    ("model: 2001-99-99", "is not YAML: month must be in"),
    ("? [a]\n: b", "is not YAML: while constructing a mapping"),
    ("model: " + "[" * 3000, "is not YAML: it is nested too deeply|is not YAML: maximum recursion"),
    ("", "does not hold parameters"),
    ("# only a remark", "does not hold parameters"),
    ("smollm2-135m", "does not hold parameters"),
    ("- model", "does not hold parameters"),
    ("model: [a", "is not YAML"),
    ("\tmodel: a", "is not YAML"),
])  # fmt: skip
def test_run_files(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_run_file(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("old", "new", "message"), [
    ('"ppl": 9.5', '"ppl": 8.5', "it does not have the SHA-256 that it was written with"),
    ('"seed": 0', '"seed": 1', "it does not have the SHA-256"), ("{", "", "Expecting|Extra data"),
    ('"config": {', '"config": 1, "x": {', "its config is none"), ('"rows": [', '"rows": [1,', "its rows are none"),
])  # fmt: skip
def test_results_that_were_changed(tmp_path, capsys, old, new, message):
    config = make_config({"model": "smollm2-135m", "profile": "quick", "output_dir": str(tmp_path)})
    path = save_results(config, "05_w4a4_eval", {"rows": [{"ppl": 9.5}]})
    assert main(["report", str(tmp_path)]) == 0
    path.write_text(path.read_text().replace(old, new, 1))
    for words in (["report", str(tmp_path)], ["repeat", str(path)]):
        capsys.readouterr()
        assert main(words) == 2
        told = capsys.readouterr().err
        assert str(path) in told
        assert re.search(message, told)


@pytest.mark.parametrize(("values", "message"), [
    ({"seed": "1"}, "seed='1': expected int"), ({"w_bits": 4.0}, "w_bits=4.0: expected int"),
    ({"w_bits": 1}, "w_bits=1: bits are whole numbers from 2 to 16"), ({"a_bits": 17}, "a_bits=17"),
    ({"smooth_alpha": 1.5}, "smooth_alpha=1.5"), ({"smooth_alpha": float("nan")}, "smooth_alpha=nan"),
    ({"seqlen": 1}, "seqlen=1"), ({"nsamples": 0}, "nsamples=0"), ({"seed": -1}, "seed=-1"),
    ({"r1_lr": float("inf")}, "r1_lr=inf"), ({"use_smooth": "yes"}, "use_smooth='yes': expected bool"),
    ({"solver": "newton"}, "solver='newton'"), ({"recipe": "best"}, "recipe='best'"), ({"profile": "fast"}, "'fast'"),
    ({"recipes": "control,best"}, "recipes='best'"), ({"dtype": "int8"}, "dtype='int8'"),
    ({"nonesuch": 1}, "unknown parameter 'nonesuch'"), ({"model": None, "profile": 3}, "profile=3"),
])  # fmt: skip
def test_values(values, message):
    with pytest.raises(ValueError, match=message):
        make_config(values)


def test_tokens_that_the_model_does_not_know(model, tmp_path):
    get_tokenizer("smollm2-135m").save_pretrained(model)
    (tmp_path / "text.txt").write_text(LINE * 300)
    text = str(tmp_path / "text.txt")
    small = {"profile": "quick", "nsamples": 1, "seqlen": 32, "eval_windows": 2, "calib_dataset": text}
    small |= {"output_dir": str(tmp_path / "out"), "eval_dataset": text, "model": str(model)}
    with pytest.raises(
        ValueError, match=r"its tokenizer gives the token \d+, but the model knows 128: is the tokenizer"
    ):
        check_inputs(make_config(small))


def test_a_size_that_no_hadamard_matrix_has(model):
    change(model / CONFIG, intermediate_size=171)
    with pytest.raises(ValueError, match=r"R4 can't be a rotation of 171 channels: no Hadamard matrix of order 171"):
        check_inputs(make_config({"model": str(model), "profile": "quick"}))


@pytest.mark.parametrize("place", [".", "model", "model/out"])
def test_results_inside_the_model(model, tmp_path, place, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = make_config({"model": str(model), "profile": "quick", "output_dir": str((tmp_path / place).absolute())})
    with pytest.raises(ValueError, match="results would go into the model's own folder"):
        check_inputs(config)


def test_a_parameter_that_papermill_cannot_read(tmp_path):
    notebook = nbformat.read(NOTEBOOKS / "01_activations_and_outliers.ipynb", 4)
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    assert declared_in(NOTEBOOKS / "01_activations_and_outliers.ipynb") >= {"model", "calib_dataset"}
    cell.source += '\nlost: str = "a=b"'
    nbformat.write(notebook, tmp_path / "01.ipynb")
    with pytest.raises(ValueError, match=r"01\.ipynb: papermill can't read the default of lost"):
        declared_in(tmp_path / "01.ipynb")


def test_another_pythons_kernel(tmp_path, monkeypatch):
    check_kernel()
    folder = tmp_path / "kernels" / "python3"
    folder.mkdir(parents=True)
    spec = {"argv": ["/usr/bin/env", "-m", "ipykernel_launcher"], "display_name": "x", "language": "python"}
    (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"is another Python, /usr/bin/env, .* unset JUPYTER_PATH"):
        check_kernel()


def test_braces_are_no_places_to_fill_in():
    assert _plain(Path("/a/{b}/c")).format(b="wrong") == "/a/{b}/c"


def test_predictions_that_are_not_numbers(tiny_model, tokens):
    model = tiny_model()
    model.lm_head.weight.data[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"predictions on window 0 are not numbers: its weights are damaged$"):
        evaluate_windows(model, Windows(tokens(), [0, 1]))
    with pytest.raises(FloatingPointError, match=r"damaged, or torch\.bfloat16 is too narrow for it \(try float32\)"):
        evaluate_windows(model.bfloat16(), Windows(tokens(), [0, 1]))


def test_text_that_comes_twice_is_counted():
    a, b = torch.arange(200).view(2, 100), torch.arange(1000, 1200).view(2, 100)
    assert shared(a, a) == 1
    assert shared(a, b) == 0
    assert shared(a, torch.cat([a[:1], b[:1]])) == 0.5
    assert shared(a, a[:, :12]) == 0  # shorter than a run


def test_commands_end_with_one_sentence(tmp_path, capsys, monkeypatch):
    path = tmp_path / "run.yaml"
    path.write_text("seed: 1\nseed: 2")
    assert main(["run", "-f", str(path)]) == 2
    assert capsys.readouterr().err == f"error: run file {path} has seed twice: which is meant?\n"
    with pytest.raises(ValueError, match="twice"):
        main(["--debug", "run", "-f", str(path)])
    monkeypatch.setattr("jqlib.__main__.run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    path.write_text("seed: 1")
    assert main(["run", "-f", str(path)]) == 130
    assert capsys.readouterr().err.startswith("interrupted: what was finished is kept")
