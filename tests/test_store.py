import json

import pytest
import torch

from jqlib import store
from jqlib.config import get_smollm2_135m_config


def maker(calls):
    def make():
        calls.append(1)
        return {"x": torch.arange(3.0)}, {"note": "made"}

    return make


def test_an_artifact_is_made_once_and_reuse_is_said(tmp_path, capsys):
    calls = []
    first = store.artifact(tmp_path, "thing", {"a": 1}, maker(calls))
    again = store.artifact(tmp_path, "thing", {"a": 1}, maker(calls))
    assert len(calls) == 1
    assert torch.equal(first[0]["x"], again[0]["x"])
    assert (first[1]["reused"], again[1]["reused"], again[1]["note"]) == (False, True, "made")
    assert "reusing thing" in capsys.readouterr().out


def test_what_it_depends_on_makes_it_anew(tmp_path):
    calls = []
    store.artifact(tmp_path, "thing", {"a": 1}, maker(calls))
    store.artifact(tmp_path, "thing", {"a": 2}, maker(calls))
    assert len(calls) == 2


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_damaged_file_is_said_and_made_anew(tmp_path, capsys, suffix):
    calls = []
    store.artifact(tmp_path, "thing", {"a": 1}, maker(calls))
    damaged = next((tmp_path / "artifacts").glob(f"*{suffix}"))
    damaged.write_bytes(damaged.read_bytes()[:-5])
    tensors, _ = store.artifact(tmp_path, "thing", {"a": 1}, maker(calls))
    assert len(calls) == 2
    assert torch.equal(tensors["x"], torch.arange(3.0))
    assert "is damaged" in capsys.readouterr().out


def test_a_checkpoint_is_found_again_by_what_it_depends_on(tmp_path, capsys):
    state, keep = store.checkpoint(tmp_path, "training", {"seed": 0})
    assert state is None
    keep({"step": torch.tensor(3)})
    keep({"step": torch.tensor(4)})
    assert store.checkpoint(tmp_path, "training", {"seed": 1})[0] is None
    state, _ = store.checkpoint(tmp_path, "training", {"seed": 0})
    assert state["step"] == 4
    assert "going on from unfinished-training" in capsys.readouterr().out
    next(tmp_path.rglob("*.safetensors")).write_bytes(b"cut off")
    assert store.checkpoint(tmp_path, "training", {"seed": 0})[0] is None
    assert "is damaged" in capsys.readouterr().out


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    store.write_json(path, {"a": 1})

    def fail(to):
        to.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write(path, fail)
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_results_carry_where_they_came_from(tmp_path, monkeypatch):
    monkeypatch.delenv("JOINTQUANT_OUTPUT", raising=False)
    config = get_smollm2_135m_config(output_dir=str(tmp_path), seed=7)
    content = json.loads(store.save_results(config, "05_w4a4_eval", {"rows": []}).read_text())
    assert content["seed"] == 7
    assert content["config"]["profile"] == "quick"
    assert content["versions"]["torch"] == torch.__version__
    assert content["git_commit"] is None or len(content["git_commit"].removesuffix("+changes")) == 40


def test_code_hash_ignores_docstrings_and_comments(tmp_path, monkeypatch):
    (tmp_path / "jqlib").mkdir()
    monkeypatch.setattr(store, "ROOT", tmp_path)
    monkeypatch.setattr(store, "METHOD", ("m",))
    module = tmp_path / "jqlib" / "m.py"
    hashes = []
    for text in (
        '"""A."""\ndef f():\n    return 1',
        '"""B."""\ndef f():\n    "doc"\n    return 1  # c',
        "def f(): return 2",
    ):
        module.write_text(text)
        hashes.append(store.code_hash.__wrapped__())  # not the cached one
    assert hashes[0] == hashes[1] != hashes[2]
