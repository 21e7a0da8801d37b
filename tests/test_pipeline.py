"""The steps in order, on a model folder and a text file that the tests write."""

from dataclasses import replace

import pytest
import torch

from jqlib import pipeline
from jqlib.config import RECIPES, make_config
from jqlib.models import site_targets


@pytest.fixture
def config(tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    """A model of 12 layers and a text in files, and few tokens of it."""
    monkeypatch.delenv("JOINTQUANT_OUTPUT", raising=False)
    tiny_model(layers=12).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    names = {"model": "model", "calib_dataset": "text.txt", "eval_dataset": "text.txt", "output_dir": "out"}
    small = {
        "profile": "quick",
        "nsamples": 2,
        "seqlen": 64,
        "max_tokens": 64,
        "eval_seqlen": 64,
        "eval_windows": 2,
        "refine_steps": 3,
    }
    return make_config({name: str(tmp_path / file) for name, file in names.items()} | small)


def test_activations_come_in_the_models_order_made_or_reused(config):
    """Files sort their names (layers.10 before layers.2); pictures by layer and R2's seeds need the model's order."""
    model = pipeline.load_model(config)
    expected = site_targets(model, "qkv", "ug")
    made, _ = pipeline.activations(config, "qkv", "ug")
    reused, _ = pipeline.activations(config, "qkv", "ug")
    assert list(made) == list(reused) == expected
    assert all(torch.equal(made[name], reused[name]) for name in made)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_keeps_the_model_until_it_rounds(config, name):
    ids = pipeline.load_calibration(config)[:1, :64]
    expected = pipeline.load_model(config)(ids).logits
    model, clips, seconds = pipeline.transform(config, RECIPES[name])
    assert any(abs(clip - RECIPES[name].a_clip) > 1e-6 for clip in clips.values()) == ("clip" in RECIPES[name].refine)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-4)
    assert seconds >= 0


def test_r1_goes_by_the_loss_where_the_run_has_steps_for_it(config):
    assert pipeline.recipe_of(config, "jointquant-best").r1 == "output"
    without = pipeline.recipe_of(replace(config, refine_steps=0, solver="cayley"), "jointquant-best")
    assert (without.r1, without.r2) == ("cayley", "cayley")


def test_activations_left_alone_are_nothing_to_refine_by(config, capsys):
    pipeline.transform(replace(config, a_bits=16), RECIPES["spinquant-like"])
    assert "refining" not in capsys.readouterr().err


def test_a_refinement_is_kept_whole(config, capsys):
    recipe = RECIPES["jointquant-best"]
    (first, clips, _), (again, kept, _) = (pipeline.transform(config, recipe) for _ in range(2))
    assert "reusing refined" in capsys.readouterr().out
    assert clips == kept
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in first.named_parameters())


def test_a_refinement_is_for_the_bits_of_the_run(config):
    recipe = RECIPES["jointquant-best"]
    clips = {bits: pipeline.transform(replace(config, a_bits=bits), recipe)[1] for bits in (3, 8)}
    assert clips[3] != clips[8]


def test_tuning_shares_the_refinement_and_leaves_nothing_unfinished(config, monkeypatch):
    monkeypatch.setattr("jqlib.distill.KEEP_EVERY", 2)
    tuned = pipeline.evaluate(config, RECIPES["jointquant-best"], 4, 4)
    plain = pipeline.evaluate(config, replace(RECIPES["jointquant-best"], tune=False), 4, 4)
    assert tuned["ppl"] != plain["ppl"]
    kinds = [path.name.split("-")[0] for path in (config.folder / "artifacts").iterdir()]
    assert "unfinished" not in kinds
    assert kinds.count("refined") == 2  # .json and .safetensors: one refinement served both


def test_evaluations_are_kept(config, capsys):
    first = pipeline.evaluate(config, RECIPES["quarot"], 4, 4)
    again = pipeline.evaluate(config, RECIPES["quarot"], 4, 4)
    assert first == again
    assert "reusing evaluation" in capsys.readouterr().out
    assert first["ppl"] != pipeline.evaluate(config, None, 16, 16)["ppl"]
