"""The steps in order, on a model folder and a text file that the tests write."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from jqlib import pipeline
from jqlib.config import make_config
from jqlib.learn.fisher import train_r1_output
from jqlib.learn.lessons import teach
from jqlib.learn.refine import refine, simulated
from jqlib.learn.steps import Steps
from jqlib.model import load
from jqlib.model.families import norms_of, site_targets, sites_of
from jqlib.pipeline import evaluation_step
from jqlib.quant.packed import rounded_linears
from jqlib.quant.quantize import quantize_model
from jqlib.recipes import RECIPES
from jqlib.store import read
from jqlib.transform.build import transforms_of
from jqlib.transform.hadamard import random_hadamard
from jqlib.transform.install import standing
from jqlib.transform.transform import Grid


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


def kinds_of(config) -> list[str]:
    """The artifacts of a run, by kind."""
    return [path.name.split("-")[0] for path in (config.folder / "artifacts").glob("*.safetensors")]


def test_activations_come_in_the_models_order_made_or_reused(config):
    """Files sort their names (layers.10 before layers.2); pictures by layer and R2's seeds need the model's order."""
    model = pipeline.load_model(config)
    expected = site_targets(model, "qkv", "ug")
    made = pipeline.activations(config, "qkv", "ug")
    reused = pipeline.activations(config, "qkv", "ug")
    assert list(made) == list(reused) == expected
    assert all(torch.equal(made[name], reused[name]) for name in made)


def test_deploy_is_what_engines_run(config):
    """Whole ranges of activations, to 8 bits; groups of 32; nothing online; learned all the same."""
    recipe = RECIPES["deploy"]
    model = pipeline.quantised(config, recipe, 4, 8)
    grids = [transform.grid for transform in standing(model).values()]
    assert {(grid.bits, grid.clip.item(), grid.groupsize) for grid in grids} == {(8, 1.0, None)}
    assert {linear.grid.groupsize for linear in rounded_linears(model).values()} == {32}
    row = pipeline.evaluate(config, recipe, 4, 8)
    assert row["online_operations"] == 0


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_keeps_the_model_until_it_rounds(config, name):
    ids = pipeline.load_calibration(config)[:1, :64]
    expected = pipeline.load_model(config)(ids).logits
    clips = [transform.grid.clip.item() for transform in pipeline.transforms(config, RECIPES[name]).values()]
    assert any(abs(clip - (RECIPES[name].a_clip or 1)) > 1e-6 for clip in clips) == ("clip" in RECIPES[name].refine)
    model = pipeline.transformed(config, RECIPES[name])
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "changes"), [
    ("jointquant-best", {}),
    ("spinquant-like", {"online": ()}),
    ("jointquant-online", {"online": ("down",)}),
    ("jointquant-best", {"online": ("o", "down"), "r2": None}),
    ("jointquant-best", {"r2": None, "o_per_head": False}),
    ("control", {"r1": None, "refine": ("smooth", "clip")}),
])  # fmt: skip
def test_what_is_refined_is_the_model_that_is_built(config, name, changes):
    config = replace(config, a_bits=8)  # at 4 a value that lies half-way makes waves whichever way it is rounded
    recipe = replace(RECIPES[name], **changes)
    model, found = pipeline.load_model(config), pipeline.transforms(config, recipe)
    clips = {site: transform.grid.clip.item() for site, transform in found.items()}
    built = pipeline.transformed(config, recipe)
    quantize_model(built, 16, config.a_bits, a_clip=clips, o_per_head=recipe.o_per_head)
    ids = pipeline.load_calibration(config)[:1]
    p, q = (m(ids).logits[0].double().log_softmax(-1) for m in (model, built))
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    lessons = teach(model, ids)
    with simulated(model, found):
        assert lessons.loss(model, torch.tensor([0])).item() == pytest.approx(expected, rel=0.02)


def test_a_text_that_changes_is_read_again(config, tmp_path):
    """Windows are cut once in a process; not those of a file that is another by now, or of other settings."""
    learned, read = pipeline.load_calibration(config), pipeline.evaluation_windows(config).ids
    assert torch.equal(pipeline.load_calibration(config), learned)
    assert len(pipeline.load_calibration(replace(config, nsamples=1))) == 1
    (tmp_path / "text.txt").write_text("Pack my box with five dozen liquor jugs! " * 30)
    assert not torch.equal(pipeline.load_calibration(config), learned)
    assert not torch.equal(pipeline.evaluation_windows(config).ids, read)


def test_r1_goes_by_the_loss_where_the_run_has_steps_for_it(config):
    assert pipeline.recipe_of(config, "jointquant-best").r1 == "output"
    without = pipeline.recipe_of(replace(config, refine_steps=0, solver="cayley"), "jointquant-best")
    assert (without.r1, without.r2) == ("cayley", "cayley")


def test_activations_left_alone_are_nothing_to_refine_by(config):
    start, _ = pipeline.r1(config, "hadamard")
    for bits, stays in ((16, True), (4, False)):
        found = pipeline.transforms(replace(config, a_bits=bits), RECIPES["spinquant-like"])
        assert torch.equal(found["model.layers.0.self_attn.q_proj"].rotation.matrix, start) == stays


def test_a_refinement_is_kept_whole(config, capsys):
    recipe = RECIPES["jointquant-best"]
    made, kept = (pipeline.transforms(config, recipe) for _ in range(2))
    assert "reusing transforms" in capsys.readouterr().out
    assert list(made) == list(kept)
    for name, transform in made.items():
        assert repr(transform) == repr(kept[name])
        assert all(torch.equal(p, kept[name].get_parameter(part)) for part, p in transform.named_parameters())


def test_a_refinement_is_for_the_bits_of_the_run(config):
    recipe = RECIPES["jointquant-best"]
    found = {bits: pipeline.transforms(replace(config, a_bits=bits), recipe) for bits in (3, 8)}
    assert all(transform.grid.clip != found[8][name].grid.clip for name, transform in found[3].items())


@pytest.mark.parametrize("method", ["jointquant-best", "control", "quarot-learned", "jointquant-online"])
def test_what_learns_layer_by_layer_learns_with_activations_left_alone(config, method):
    row = pipeline.evaluate(config, RECIPES[method], 4, 16)
    assert (row["w_bits"], row["a_bits"]) == (4, 16)
    assert 0 < row["kl"] < pipeline.evaluate(config, RECIPES[method], 4, 3)["kl"]


def test_what_the_loss_teaches_does_not_depend_on_the_calibration_windows(config):
    other = replace(config, nsamples=config.nsamples + 1)
    assert pipeline.lessons_step(config).path == pipeline.lessons_step(other).path
    assert pipeline.fp_hidden_step(config).path == pipeline.fp_hidden_step(other).path


def test_tuning_shares_the_refinement_and_leaves_nothing_unfinished(config, monkeypatch):
    monkeypatch.setattr("jqlib.learn.steps.KEEP_EVERY", 2)
    tuned = pipeline.evaluate(config, RECIPES["jointquant-best"], 4, 4)
    plain = pipeline.evaluate(config, replace(RECIPES["jointquant-best"], tune=False), 4, 4)
    assert tuned["ppl"] != plain["ppl"]
    kinds = kinds_of(config)
    assert "unfinished" not in kinds
    assert (kinds.count("transforms"), kinds.count("weights"), kinds.count("tuned")) == (1, 1, 1)


def test_tuned_rows_and_rows_of_a_rounded_kv_cache_share_their_weights(config):
    tuned = pipeline.evaluate(config, replace(RECIPES["quarot-best"], tune=True), 4, 4)
    rounded = pipeline.evaluate(replace(config, kv_bits=4), RECIPES["quarot-best"], 4, 4)
    assert tuned["ppl"] != rounded["ppl"]
    kinds = kinds_of(config)
    assert (kinds.count("transforms"), kinds.count("weights"), kinds.count("tuned")) == (1, 1, 1)


@pytest.mark.parametrize(("change", "moved"), [
    ({"r1_lr": 1.0}, {"dartquant"}),  # the joint solver needs none
    ({"smooth_alpha": 0.3}, {"jointquant", "smoothquant"}),
    ({"seed": 1}, {"dartquant", "jointquant", "quarot", "smoothquant"}),
    ({"kv_bits": 4}, {"dartquant", "jointquant", "quarot", "rtn", "smoothquant"}),
    ({"nsamples": 1}, {"dartquant", "jointquant", "quarot", "smoothquant"}),
    ({"refine_steps": 7}, set()),
])  # fmt: skip
def test_rows_are_made_anew_for_the_settings_that_they_depend_on(config, change, moved):
    def rows(run):
        return {name: evaluation_step(run, RECIPES[name], 4, 4, {}).path for name in names}

    names = ("dartquant", "jointquant", "quarot", "rtn", "smoothquant")
    before, after = rows(config), rows(replace(config, **change))
    assert {name for name in names if before[name] != after[name]} == moved


def test_results_within_the_models_folder_do_not_disable_reuse(config):
    inside = replace(config, output_dir=f"{config.model}/out")
    first, again = (pipeline.r1(inside, "hadamard")[1] for _ in range(2))
    assert (first["reused"], again["reused"]) == (False, True)


def test_large_models_are_loaded_as_their_checkpoints_are(config, tmp_path, tiny_model, monkeypatch):
    for name in ("small", "large"):
        tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path / name)
    small, large = (replace(config, model=str(tmp_path / name)) for name in ("small", "large"))
    assert pipeline.dtype_of(small) == torch.float32
    assert pipeline.dtype_of(replace(small, dtype="float16")) == torch.float16
    monkeypatch.setattr(load, "FLOAT32_UP_TO", 0)
    assert pipeline.dtype_of(large) == torch.bfloat16
    assert {p.dtype for p in pipeline.load_model(large).parameters()} == {torch.bfloat16}


def test_smoothing_can_be_switched_off(config):
    without = replace(config, use_smooth=False)
    for name in ("jointquant", "jointquant-best", "jointquant-online", "control"):
        assert pipeline.recipe_of(config, name).smooth
        recipe = pipeline.recipe_of(without, name)
        assert (recipe.smooth, "smooth" in recipe.refine) == ((), False)
    recipe = pipeline.recipe_of(without, "jointquant-best")
    found, behind = pipeline.transforms(without, recipe), norms_of(pipeline.load_model(without))
    assert all(transform.scale is None for name, transform in found.items() if name not in behind)
    assert all((found[name].gain != 1).any() for name in behind)  # the norms' scales are no smoothing


def test_the_control_differs_from_the_best_in_how_rotations_are_found(config):
    best, control = (vars(RECIPES[name]) for name in ("jointquant-best", "control"))
    differ = {name for name in best if best[name] != control[name]}
    assert differ == {"label", "r1", "r2", "refine"}
    assert set(best["refine"]) - set(control["refine"]) == {"R1", "R2"}


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


def test_calibration_takes_what_all_its_steps_took_each_counted_once(config):
    assert pipeline.evaluate(config, None, 16, 16)["calibration_seconds"] == 0
    row = pipeline.evaluate(config, RECIPES["jointquant-best"], 4, 4)
    made = [path for path in (config.folder / "artifacts").glob("*.safetensors")
            if not path.name.startswith(("evaluation", "fp_hidden"))]  # fmt: skip
    assert len(made) == 8  # lessons, activations, smoothing, R1, R2, transforms, weights, what was tuned
    assert row["calibration_seconds"] == pytest.approx(sum(read(path)[1]["seconds"] for path in made))


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


@pytest.fixture
def no_collector():
    """Without the collector of cycles: what is no longer named goes at once, or not at all."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_refine_lets_the_model_go(no_collector, tiny_model, tokens):
    model = tiny_model()
    gone, windows = weakref.ref(model), tokens(1, 32)
    grids = {name: Grid(4) for name in sites_of(model)}
    found = transforms_of(model, random_hadamard(model.config.hidden_size, 0), online=("down",), grids=grids)
    refine(model, teach(model, windows), found, steps=Steps(1))
    del model
    assert gone() is None


def test_train_r1_output_lets_the_model_go(no_collector, tiny_model, tokens):
    model = tiny_model()
    gone, windows = weakref.ref(model), tokens(1, 32)
    train_r1_output(model, windows, steps=Steps(1))
    del model
    assert gone() is None


def test_no_model_outlives_an_evaluation(no_collector, config, monkeypatch):
    loaded, get_model = [], load.get_model

    def watched(*args, **kwargs):
        model = get_model(*args, **kwargs)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(load, "get_model", watched)
    pipeline.evaluate(config, RECIPES["jointquant-best"], 4, 4)
    assert len(loaded) > 5
    assert not any(model() for model in loaded)


@pytest.mark.parametrize(("wrong", "message"), [
    ({"weights": "GPTQ"}, "weights='GPTQ' is unknown; there are rtn, gptq, None"),
    ({"gptq_inputs": "quantized"}, "gptq_inputs='quantized' is unknown"), ({"measure": "rms"}, "measure='rms'"),
    ({"objective": "loss"}, "objective='loss'"), ({"r1": "newton"}, "r1='newton'"), ({"r2": "output"}, "r2='output'"),
    ({"online": ("mlp",)}, "online='mlp' is unknown; there are qkv, o, ug, down"), ({"smooth": ("v",)}, "smooth='v'"),
    ({"a_clip": 1.5}, "a_clip=1.5: expected a share"), ({"a_clip": 0.0}, "a_clip=0.0"), ({"a_clip": -0.9}, "-0.9"),
])  # fmt: skip
def test_a_recipe_of_ones_own_is_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        replace(RECIPES["jointquant"], **wrong)


@pytest.mark.parametrize(("bits", "message"), [
    ((13, 4), "w_bits=13: weights have 2 to 12 bits"), ((0, 4), "w_bits=0"), ((4, 1), "a_bits=1"),
    ((4, 17), "a_bits=17"),
])  # fmt: skip
def test_bits_that_there_are_not(bits, message):
    config = make_config({"model": "smollm2-135m", "profile": "quick"})
    with pytest.raises(ValueError, match=message):
        pipeline.evaluate(config, RECIPES["rtn"], *bits)
    with pytest.raises(ValueError, match="recipe='nope' is unknown; there are rtn"):
        pipeline.recipe_of(config, "nope")
