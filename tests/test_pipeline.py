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


def test_smoothing_can_be_switched_off(config):
    without = replace(config, use_smooth=False)
    for name in ("jointquant", "jointquant-best", "jointquant-online", "control"):
        assert pipeline.recipe_of(config, name).smooth
        recipe = pipeline.recipe_of(without, name)
        assert (recipe.smooth, "smooth" in recipe.refine) == ((), False)
    recipe = pipeline.recipe_of(without, "jointquant-best")
    start = pipeline.Refined(*pipeline.r1_output(without, recipe)[:1], pipeline.r2(without, "mm")[0], {}, {}, {})
    found, _ = pipeline.refined(without, recipe, start)
    assert not found.smooth_scale
    assert all((scale != 1).any() for scale in found.norm_scale.values())  # the norms' scales are no smoothing


def test_the_control_differs_from_the_best_in_how_rotations_are_found(config):
    best, control = (vars(RECIPES[name]) for name in ("jointquant-best", "control"))
    differ = {name for name in best if best[name] != control[name]}
    assert differ == {"label", "r1", "r2", "refine"}
    assert set(best["refine"]) - set(control["refine"]) == {"R1", "R2"}


@pytest.mark.parametrize(("name", "changes"), [
    ("spinquant-like", {"online": ()}),
    ("jointquant-online", {"online": ("down",)}),
    ("jointquant-best", {"online": ("o", "down")}),
    ("jointquant-best", {"r2": None}),
    ("control", {"r1": None, "refine": ("smooth", "clip")}),
])  # fmt: skip
def test_a_recipe_refined_as_another_model_than_is_built_is_refused(name, changes):
    with pytest.raises(ValueError, match=r"recipe .*: refine=.* needs R2 .* and Hadamard transforms online at"):
        replace(RECIPES[name], **changes)


@pytest.mark.parametrize(("name", "changes"), [
    ("jointquant-best", {"smooth": ("qkv", "o", "ug", "down")}),
    ("jointquant-online", {"refine": ("R1",)}),
    ("jointquant-online", {"refine": ("scale",)}),
    ("control", {"refine": ("clips",)}),
])  # fmt: skip
def test_what_a_recipe_has_not_cannot_be_refined(name, changes):
    with pytest.raises(ValueError, match=r"recipe .*: refine=.*, smooth=.*: with R1 .* there are .* to refine"):
        replace(RECIPES[name], **changes)


def test_rows_tell_how_faithful_they_are(config):
    fp, row = pipeline.evaluate(config, None, 16, 16), pipeline.evaluate(config, RECIPES["quarot"], 4, 4)
    assert fp["kl"] == pytest.approx(0, abs=1e-6)
    assert fp["top1"] == 1
    assert row["kl_low"] < row["kl"] < row["kl_high"]
    assert row["top1"] < 1
    assert len(row["nll"]) == len(row["kl_by_window"]) == len(row["articles"]) == 2


def test_another_seed_does_not_evaluate_fp_again(config, capsys):
    pipeline.evaluate(config, None, 16, 16)
    pipeline.evaluate(replace(config, seed=1, nsamples=1), None, 16, 16)
    assert "reusing evaluation" in capsys.readouterr().out


def test_evaluation_is_of_the_split_and_windows_that_are_asked_for(config):
    """By perplexity, and by FP's KL from itself: 0 only if its kept states are of the same windows."""
    wiki = replace(config, eval_dataset="wiki")
    asked = (config, replace(config, eval_draw="first"), wiki, replace(wiki, eval_split="validation"),
             replace(wiki, eval_windows=3), replace(wiki, eval_seqlen=32))  # fmt: skip
    rows = [pipeline.evaluate(c, None, 16, 16) for c in asked]
    assert len({row["ppl"] for row in rows}) == len(asked)
    assert all(row["kl"] == pytest.approx(0, abs=1e-6) for row in rows)
    assert [pipeline.protocol(c)["drawn"] for c in asked[:3]] == [
        "evenly spaced over the text", "the first of the text", "from 2 articles, seed 0",
    ]  # fmt: skip
    assert pipeline.protocol(replace(config, eval_windows=0))["drawn"] == "the whole text"


def test_evaluations_are_kept(config, capsys):
    first = pipeline.evaluate(config, RECIPES["quarot"], 4, 4)
    again = pipeline.evaluate(config, RECIPES["quarot"], 4, 4)
    assert first == again
    assert "reusing evaluation" in capsys.readouterr().out
    assert first["ppl"] != pipeline.evaluate(config, None, 16, 16)["ppl"]
