"""``python -m jqlib clean`` removes what would never be reused, and nothing else."""

import os
import platform
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from jqlib import pipeline, store
from jqlib.__main__ import main
from jqlib.calibration import activations_step, r1_step
from jqlib.config import make_config
from jqlib.recipes import RECIPES


@pytest.fixture
def config(tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    monkeypatch.delenv("JOINTQUANT_OUTPUT", raising=False)
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    small = {"nsamples": 2, "seqlen": 64, "max_tokens": 64, "eval_seqlen": 64, "eval_windows": 2, "refine_steps": 2}
    names = {"model": "model", "calib_dataset": "text.txt", "eval_dataset": "text.txt", "output_dir": "out"}
    return make_config({name: str(tmp_path / at) for name, at in names.items()} | small | {"profile": "quick"})


def test_what_can_be_reused_is_kept(config, tmp_path, capsys):
    pipeline.evaluate(config, RECIPES["jointquant-best"], 4, 4)
    before = set(tmp_path.rglob("artifacts/*.safetensors"))
    assert main(["clean", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"removed 0 files, 0.00 GB; kept {len(before)}, ")
    assert set(tmp_path.rglob("artifacts/*.safetensors")) == before


def test_other_code_versions_models_and_damaged_files_go(config, tmp_path, capsys):
    good = activations_step(config)
    good.get()
    store.save_results(config, "02_joint_r1", {})
    make = lambda *inputs: ({"x": torch.zeros(3)}, {})  # noqa: E731
    stale = [
        replace(good, code="another", make=make),
        replace(good, kind="nonesuch", make=make),
        replace(good, settings=good.settings | {"model": "another model's content"}, make=make),
        replace(r1_step(config, "mm"), inputs=(replace(good, code="another"),), make=make),  # by its input's code
    ]
    for artifact in stale:
        if artifact.inputs:
            replace(artifact.inputs[0], make=make).get()
        artifact.get()
    folder = good.path.parent
    (folder / "r1-mm-0123456789abcdef.json").write_text("{}")  # as earlier versions wrote them
    (folder / "r1-00000000000000aa.safetensors").write_bytes(b"cut off")
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    (folder / f".{good.path.name}.{platform.node()}.{process.pid}").touch()  # killed while it wrote
    strangers = [folder / "thesis.pdf", folder / "model.safetensors", folder / "inside" / good.path.name]
    strangers += [folder / f".{good.path.name}.{at}" for at in (f"{platform.node()}.{os.getpid()}", "other.7")]
    for file in strangers:
        file.parent.mkdir(exist_ok=True)
        file.touch()
    capsys.readouterr()
    assert main(["info", config.model, "--profile", "quick"]) == 0  # of another folder
    assert main(["clean", str(tmp_path / "out")]) == 0
    assert "removed 7 files" in capsys.readouterr().out
    assert {*folder.glob("[!.]*")} == {good.path, *strangers[:2], folder / "inside"}
    assert all(file.exists() for file in strangers)


def test_another_model_of_the_same_name_keeps_its_own(config, tmp_path, tiny_model, tiny_tokenizer):
    """Both write to the same folder, and only one has results of a notebook."""
    other = tmp_path / "v2" / "model"
    tiny_model(seed=1).save_pretrained(other)
    tiny_tokenizer.save_pretrained(other)
    ones = [activations_step(config), activations_step(replace(config, model=str(other)))]
    for artifact in ones:
        artifact.get()
    store.save_results(config, "02_joint_r1", {})
    assert main(["clean", str(tmp_path / "out")]) == 0
    assert ones[0].path != ones[1].path
    assert all(artifact.path.exists() for artifact in ones)
    tiny_model(seed=2).save_pretrained(other)
    assert main(["clean", str(tmp_path / "out")]) == 0
    assert [artifact.path.exists() for artifact in ones] == [True, False]
