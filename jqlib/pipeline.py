"""A recipe's steps in order, from its transforms to a row of a table: what notebooks and the runner call.

Every step is an artifact (`jqlib.store`): notebooks share it and a rerun reuses it. The steps up to the transforms are
those of `jqlib.calibration`.
"""

from dataclasses import replace

from torch import nn

from jqlib.calibration import (
    activations,
    lessons_step,
    r1,
    r2,
    smooth_scales,
    transforms,
    transforms_step,
)
from jqlib.choices import check_bits, check_choice
from jqlib.config import Config
from jqlib.inputs import (
    LESSONS,
    MODEL,
    TEXT,
    WINDOWS,
    artifact_of,
    dtype_of,
    evaluation_windows,
    load_calibration,
    load_model,
    steps_of,
    text_for,
)
from jqlib.learn.layerwise import round_layer_by_layer
from jqlib.learn.lessons import Lessons, cut
from jqlib.learn.tune import tune
from jqlib.model import questions
from jqlib.model.answers import answers, find_task, lm_eval_version
from jqlib.model.evaluate import Reference, evaluate_windows, last_hidden
from jqlib.model.families import linears_of, rotated_sizes
from jqlib.model.load import get_tokenizer, load_config
from jqlib.precision import products_dtype
from jqlib.quant.kv_cache import quantize_kv_cache
from jqlib.quant.packed import pack_weights, scales_of, unpack_weights, vectors_of
from jqlib.quant.quantize import round_inputs, round_weights
from jqlib.quant.spare import spare
from jqlib.recipes import RECIPES, SMOOTHED_BY_CHOICE, Recipe
from jqlib.store import Artifact, Made
from jqlib.transform.build import build, done
from jqlib.transform.grids import OFF
from jqlib.transform.hadamard import in_blocks
from jqlib.transform.install import online_operations
from jqlib.transform.transform import Grid, unpacked

__all__ = [
    "activations", "dtype_of", "evaluate", "evaluation_windows", "load_calibration", "load_model",
    "protocol", "r1", "r2", "recipe_of", "smooth_scales", "transformed", "transforms",
]  # fmt: skip


def recipe_of(config: Config, name: str | None = None) -> Recipe:
    """The named recipe (default: the run's own); JointQuant's take their solver and smoothing from the run.

    R1 by ``"output"`` needs steps by the loss: without any (``refine_steps=0``) the solver finds it.
    """
    name = name or config.recipe
    check_choice("recipe", name, RECIPES)
    recipe = RECIPES[name]
    if recipe.r2 == "mm":
        by_loss = recipe.r1 == "output" and config.refine_steps
        recipe = replace(recipe, r1="output" if by_loss else recipe.r1 and config.solver, r2=config.solver)
    if name in SMOOTHED_BY_CHOICE and not config.use_smooth:
        recipe = replace(recipe, smooth=(), refine=tuple(kind for kind in recipe.refine if kind != "smooth"))
    return recipe


def settled(config: Config, recipe: Recipe | None) -> Config:
    """The settings, with what the recipe has of its own."""
    return replace(config, **(recipe.own if recipe else {}))


def transformed(config: Config, recipe: Recipe | None):
    """A fresh model, smoothed and rotated by the recipe (None: as it is), which still computes what it did before."""
    if recipe is None:
        return load_model(config)
    config = settled(config, recipe)
    return _built(config, transforms_step(config, recipe).get())[0]


def _built(s, made: Made, a_bits: int = OFF, weights: Made | None = None) -> tuple[nn.Module, dict[str, Grid]]:
    """The fresh model with these transforms merged, and the grids that they end in, at these bits.

    Those of its linears that have rounded ``weights`` wait for them.
    """
    model, found = load_model(s), unpacked(made[0], made[1]["layouts"])
    grids = {name: transform.grid for name, transform in found.items()}
    for transform in found.values():
        transform.grid.bits = a_bits
        transform.grid = None  # it waits in `grids`
    replaced = {linear for name, linear in linears_of(model).items() if weights and f"{name}|codes" in weights[0]}
    build(model, {name: transform.to(model.device) for name, transform in found.items()}, replaced)
    return model, grids


def weights_step(config: Config, recipe: Recipe, w_bits: int, a_bits: int) -> Artifact:
    """The rounded weights: integer codes and scales; learned layer by layer, the norms' gains and the clips too."""
    kind = recipe.weights or config.weights
    learns = recipe.layerwise and config.refine_steps > 0
    inputs_as, clips = recipe.gptq_inputs if kind == "gptq" and a_bits < OFF else "fp", recipe.a_clip is not None

    def make(s, found: Made, *, resume, keep) -> Made:
        model, grids = _built(s, found, a_bits)
        if learns:
            pieces = cut(text_for(s, s.refine_steps * s.step_tokens))
            steps = steps_of(s, 2, keep=keep, resume=resume)
            round_layer_by_layer(model, pieces, w_bits, s.w_groupsize, grids, steps, clips=clips)
            return pack_weights(model) | vectors_of(model), {}
        calib_data = load_calibration(s) if kind == "gptq" else None
        round_weights(model, w_bits, s.w_groupsize, kind, calib_data, inputs_as, grids)
        return pack_weights(model), {}

    names = (*(LESSONS if learns else (*MODEL, *(TEXT if kind == "gptq" else ()))), "w_groupsize")
    does = {"weights": kind, "w_bits": w_bits, "a_bits": a_bits if learns or inputs_as != "fp" else OFF}
    does |= {"layerwise": True, "clips": clips} if learns else {"gptq_inputs": inputs_as}
    return artifact_of(weights_step, config, names, make, transforms_step(config, recipe), resumable=True, **does)


def _quantised(s, found: list[Made], w_bits: int, a_bits: int, kv_bits: int) -> nn.Module:
    """The model of a row of the table, of its transforms, its rounded weights and what tuning moved, if any."""
    found, weights, tuned = (*found, None, None)[:3]
    model, grids = _built(s, found, a_bits, weights)
    round_inputs(model, grids)
    if kv_bits < OFF:
        quantize_kv_cache(model, kv_bits)
    if weights:
        unpack_weights(model, weights[0] | (tuned[0] if tuned else {}), w_bits, s.w_groupsize)
    done(model).add("quantised")
    return model


def tuned_step(config: Config, recipe: Recipe, w_bits: int, a_bits: int) -> Artifact:
    """What tuning moves: the scales of weight groups, the norms' gains, the clips."""
    kv_bits, clips = config.kv_bits, recipe.a_clip is not None

    def make(s, found: Made, weights: Made, lessons: Made, *, resume, keep) -> Made:
        model = _quantised(s, [found, weights], w_bits, a_bits, kv_bits)
        tune(model, Lessons(**lessons[0]), steps_of(s, 1, keep=keep, resume=resume), clips=clips)
        return scales_of(model) | vectors_of(model), {}

    names = (*LESSONS, "w_groupsize", "kv_bits")
    inputs = transforms_step(config, recipe), weights_step(config, recipe, w_bits, a_bits), lessons_step(config)
    does = {"w_bits": w_bits, "a_bits": a_bits, "clips": clips}
    return artifact_of(tuned_step, config, names, make, *inputs, resumable=True, **does)


def _parts(config: Config, recipe: Recipe, w_bits: int, a_bits: int) -> list[Artifact]:
    """What `_quantised` puts together. ValueError for bits that there are not."""
    check_bits(w_bits, a_bits, config.kv_bits)
    parts = [transforms_step(config, recipe)]
    if w_bits < OFF:
        parts.append(weights_step(config, recipe, w_bits, a_bits))
        if recipe.tune and config.refine_steps:
            parts.append(tuned_step(config, recipe, w_bits, a_bits))
    return parts


def quantised(config: Config, recipe: Recipe, w_bits: int, a_bits: int) -> nn.Module:
    """The model that `evaluate` measures."""
    config = settled(config, recipe)
    found = [part.get() for part in _parts(config, recipe, w_bits, a_bits)]
    return _quantised(config, found, w_bits, a_bits, config.kv_bits)


def evaluation_step(config: Config, recipe: Recipe | None, w_bits: int, a_bits: int, spared: dict) -> Artifact:
    kv_bits, parts = config.kv_bits, _parts(config, recipe, w_bits, a_bits) if recipe else []

    def make(s, *found: Made) -> Made:
        *found, fp = found  # FP last: its head is large, and the others are made without it in memory
        model = _quantised(s, found, w_bits, a_bits, kv_bits) if recipe else load_model(s)
        if spared:
            spare(model, **spared)
        dtype = products_dtype(s.eval_compute_dtype, s.device)
        ppl = evaluate_windows(model, evaluation_windows(s), s.device, Reference(**fp[0]), dtype)
        return {}, ppl.row() | {"online_operations": online_operations(model)}

    names = (*MODEL, *WINDOWS, "eval_compute_dtype", *(("w_groupsize", "kv_bits") if recipe else ()))
    does = {"w_bits": w_bits, "a_bits": a_bits, "spared": spared}
    return artifact_of(evaluation_step, config, names, make, *parts, fp_hidden_step(config), **does)


def evaluate(config: Config, recipe: Recipe | None, w_bits: int, a_bits: int, **spared) -> dict:
    """One row of a table: perplexity, KL from FP and top-1 agreement of a recipe at these bits; None is FP untouched.

    Weights are rounded as the recipe says, else as the run does (``config.weights``), the KV cache as the run says.
    ``spared``: a part whose activations are left unrounded (`jqlib.quant.spare.spare`).
    """
    config = settled(config, recipe)
    values = evaluation_step(config, recipe, w_bits, a_bits, spared).get()[1]
    calibration = [cost for step, cost in values["took"].items() if not step.startswith("fp_hidden")]
    weights = (recipe.weights or config.weights) if recipe and w_bits < OFF else "none"
    row = {"weights": weights, "w_bits": w_bits, "a_bits": a_bits, "kv_bits": config.kv_bits if recipe else OFF}
    row |= {name: value for name, value in values.items() if name not in ("reused", "took")}
    peaks = [cost["peak_rss_bytes"] or 0 for cost in calibration]
    seconds = sum(cost["seconds"] for cost in calibration)
    return row | {"calibration_seconds": seconds, "calibration_peak_rss_bytes": max(peaks, default=0)}


def zero_shot_step(
    config: Config, recipe: Recipe | None, w_bits: int, a_bits: int, task: str, limit: int | None
) -> Artifact:
    """Which questions of a task the model of a row answers right (`jqlib.model.answers`)."""
    kv_bits, parts = config.kv_bits, _parts(config, recipe, w_bits, a_bits) if recipe else []

    def make(s, *found: Made) -> Made:
        asked = find_task(task)
        model = _quantised(s, found, w_bits, a_bits, kv_bits) if recipe else load_model(s)
        return answers(model, get_tokenizer(s.model), asked, limit, products_dtype(s.eval_compute_dtype, s.device))

    names = (*MODEL, "eval_compute_dtype", *(("w_groupsize", "kv_bits") if recipe else ()))
    does = {"w_bits": w_bits, "a_bits": a_bits, "task": task, "limit": limit, "lm_eval": lm_eval_version()}
    does["questions"] = questions.fingerprint(task) if task in questions.SETS else None
    return artifact_of(zero_shot_step, config, names, make, *parts, **does)


def fp_hidden_step(config: Config) -> Artifact:
    """What FP's predictions are made of: its last hidden states on the evaluation windows, and its head."""

    def make(s) -> Made:
        model = load_model(s)
        hidden = last_hidden(model, evaluation_windows(s).ids, "FP's predictions").cpu()
        return {"hidden": hidden, "head": model.get_output_embeddings().weight.detach()}, {}

    return artifact_of(fp_hidden_step, config, (*MODEL, *WINDOWS), make)


def protocol(config: Config) -> dict:
    """How a run was measured: goes beside every table."""
    default, windows = get_tokenizer(config.model).default_dataset, evaluation_windows(config)
    return {
        "dataset": config.eval_dataset or default, "split": config.eval_split, "seqlen": config.eval_seqlen,
        "windows": len(windows.ids), "drawn": windows.drawn, "articles_or_blocks": len({*windows.articles}),
        "bos": config.bos, "calibration": config.calib_dataset or default, "calibration_windows": config.nsamples,
        "calibration_seqlen": config.seqlen,
        "products": str(products_dtype(config.eval_compute_dtype, config.device)),
        "products_in_calibration": str(products_dtype(config.compute_dtype, config.device)),
        "learned_on": f"{config.refine_steps} × {config.step_tokens} tokens, in stages by the loss",
        "not_quantised": "embeddings, lm_head" + (", KV cache" if config.kv_bits == OFF else ""),
        "hadamard": {name: in_blocks(size) for name, size in rotated_sizes(load_config(config.model)).items()},
    }  # fmt: skip
