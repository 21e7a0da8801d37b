"""What a row will take: exact where costs grow evenly, tried on models of the real kind, by the stages of a run."""

from dataclasses import replace
from pathlib import Path

import pytest
from test_families import random_model
from transformers import AutoConfig

from jqlib import pipeline
from jqlib.__main__ import main
from jqlib.config import make_config
from jqlib.lab import trial


@pytest.fixture
def config(tmp_path, tiny_tokenizer):
    """Of a run on a random model of five layers, two of them with a sliding window."""
    kinds = ["full_attention"] * 3 + ["sliding_attention"] * 2
    random_model("qwen2", num_hidden_layers=5, layer_types=kinds).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    text = str(tmp_path / "text.txt")
    return make_config({
        "model": str(tmp_path / "model"), "calib_dataset": text, "eval_dataset": text, "profile": "quick",
        "nsamples": 7, "seqlen": 32, "max_tokens": 64, "eval_seqlen": 32, "eval_windows": 9, "refine_steps": 30,
        "step_tokens": 32, "output_dir": str(tmp_path / "out"),
    })  # fmt: skip


@pytest.mark.parametrize("large", [True, False])
def test_costs_that_grow_evenly_are_extrapolated_exactly(config, monkeypatch, large):
    text = {"activations": "nsamples", "weights": "refine_steps", "evaluation": "eval_windows"}
    Path(config.eval_dataset).write_text("The quick brown fox jumps over the lazy dog. " * 1000)
    config = replace(config, recipe="jointquant-best", seqlen=1024, eval_seqlen=1024)  # more than the small runs have

    def cost(config, layers: int, free: float = 0) -> dict:
        amounts = {stage: getattr(config, name) for stage, name in text.items()}
        seconds = {stage: 3 + 5 * layers + 7 * n + 0.5 * layers * n for stage, n in amounts.items()}
        return {
            stage: {"seconds": s, "peak_rss_bytes": 1e6 * s, "peak_gpu_bytes": None} for stage, s in seconds.items()
        }

    monkeypatch.setattr(trial, "_tried", cost)
    monkeypatch.setattr(trial, "is_large", lambda model: large)
    found, whole = trial.measured(config), cost(config, 5)
    assert found["seconds"].to_dict() == pytest.approx({stage: whole[stage]["seconds"] for stage in text})
    assert found["peak_rss_bytes"].to_dict() == pytest.approx({stage: whole[stage]["peak_rss_bytes"] for stage in text})
    assert "peak_gpu_bytes" not in found


@pytest.mark.parametrize("recipe", ["jointquant-best", "rtn"])
def test_stages_are_those_of_a_run(config, recipe):
    small = replace(config, recipe=recipe, refine_steps=2, nsamples=2, eval_windows=2, dtype="float32")
    row = pipeline.evaluation_step(small, pipeline.recipe_of(small), 4, 4, {})
    took = {name.rpartition("-")[0] for name in row.get()[1]["took"]} | {"evaluation"}
    assert trial._try(small, 1).keys() == took
    assert took <= trial.UNIT.keys() | {"activations", "smooth", "r1", "r2"}


def test_the_small_model_is_of_the_same_kind(config, tmp_path):
    trial._save_random(config, 4, tmp_path / "small")
    small, whole = (AutoConfig.from_pretrained(path) for path in (tmp_path / "small", config.model))
    assert small.layer_types == whole.layer_types[:4]
    assert (small.num_hidden_layers, small.dtype) == (4, whole.dtype)  # files as the checkpoint's
    for name in ("hidden_size", "intermediate_size", "num_key_value_heads", "vocab_size", "tie_word_embeddings"):
        assert getattr(small, name) == getattr(whole, name)


def test_a_run_that_fails_is_told(config, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(ValueError, match=r"quarot can't be tried on 1 layers of .*: it said ValueError: .*tokens"):
        trial._tried(replace(config, dtype="float32", recipe="quarot", seqlen=10**6, max_tokens=1), 1, 1e9)


def test_memory_that_is_short_is_told(config, monkeypatch, capsys):
    def cost(config, layers: int, free: float = 0) -> dict:
        costs = {"seconds": 60.0, "peak_rss_bytes": 1e9, "peak_gpu_bytes": None}
        return {"tuned": costs | {"peak_rss_bytes": 8e9 * layers}, "evaluation": costs}

    monkeypatch.setattr(trial, "_tried", cost)
    monkeypatch.setattr(trial, "free_bytes", lambda device: 20e9)
    given = ("calib_dataset", "eval_dataset", "nsamples", "seqlen", "max_tokens", "eval_seqlen", "eval_windows")
    flags = [f"--{name}={getattr(config, name)}" for name in given]
    assert main(["info", config.model, "--measure", "--profile", "quick", "--recipe", "jointquant-best", *flags]) == 0
    told = capsys.readouterr().out
    assert "NOT ENOUGH MEMORY: tuned takes 40.0 GB, 20.0 GB are free" in told
    assert "2 minutes" in told
