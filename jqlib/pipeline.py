"""The method's steps in order, for a Config and a Recipe: what notebooks and the runner call.

Each step is an artifact (`jqlib.store`): notebooks share it and a rerun reuses it.
"""

import hashlib
import time
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from jqlib import models
from jqlib.activations import Moments, collect_activations
from jqlib.config import RECIPES, SMOOTHED_BY_CHOICE, Config, Recipe
from jqlib.data import Windows, get_calibration_data, get_evaluation_windows, path_fingerprint
from jqlib.distill import TOKENS
from jqlib.evaluate import Reference, evaluate_windows, last_hidden
from jqlib.joint import train_r1_joint, train_r2_independent
from jqlib.models import site_targets
from jqlib.output import train_r1_output
from jqlib.quant import OFF
from jqlib.quantize import quantize_model
from jqlib.refine import Refined, refine
from jqlib.rotation import fuse_layer_norms, online_operations, rotate_model
from jqlib.smooth import compute_simple_smooth_scale
from jqlib.store import artifact, checkpoint, peak_rss_bytes
from jqlib.tune import tune

FOR_OUTPUT = ("a_bits", "w_bits", "w_groupsize", "refine_steps")  # settings that the objective `output` goes by


def load_model(config: Config):
    """The FP model of a run, fresh."""
    return models.get_model(config.model, config.device, getattr(torch, config.dtype))


def load_calibration(config: Config) -> Tensor:
    """The run's calibration windows, (nsamples, seqlen)."""
    tokenizer = models.get_tokenizer(config.model)
    return get_calibration_data(tokenizer, config.nsamples, config.seqlen, config.calib_dataset, config.seed)


def evaluation_windows(config: Config) -> Windows:
    """The run's evaluation windows."""
    return get_evaluation_windows(
        models.get_tokenizer(config.model), config.eval_dataset, config.eval_seqlen, config.eval_windows or None,
        split=config.eval_split, windows=config.eval_draw,
    )  # fmt: skip


def activations(config: Config, *names: str) -> tuple[dict[str, Tensor], float]:
    """Token samples of sites of all layers, ``{module name: (max_tokens, features)}``, and the seconds they took."""
    sites = (*models.R1_SITES, "o")  # one pass gives them all

    def make():
        model = load_model(config)
        targets = site_targets(model, *sites)
        acts = collect_activations(
            model, load_calibration(config), targets, config.device, config.max_tokens, seed=config.seed
        )
        return acts, {"sites": {name: site_targets(model, name) for name in sites}}

    acts, values = artifact(config.folder, "activations", _depends(config, "max_tokens"), make)
    layers = zip(*(values["sites"][name] for name in names), strict=True)  # a file forgets the model's order
    return {target: acts[target] for layer in layers for target in layer}, values["seconds"]


def r1(config: Config, solver: str, restart: int = 0) -> tuple[Tensor, dict]:
    """R1, (hidden, hidden), by ``"hadamard"`` (no training) or a solver; ``restart`` counts starts on the same tokens.

    Beside it the ``history`` of its training, and the seconds of it (``train_seconds``, ``collect_seconds``).
    """
    training = solver != "hadamard"

    def make():
        acts, collect_seconds = activations(config, *models.R1_SITES)
        hidden, layers = next(iter(acts.values())).shape[-1], len(acts) // len(models.R1_SITES)
        history: list[dict] = []
        R = train_r1_joint(
            acts, hidden, layers, config.device, config.r1_lr, config.r1_epochs,
            config.init_mode if training else "hadamard", solver=solver if training else "mm",
            objective=config.objective, max_steps=None if training else 0, seed=config.seed + restart, history=history,
        )  # fmt: skip
        return {"R1": R}, _training(history, collect_seconds if training else 0.0)

    names = ("max_tokens", "objective", *(("init_mode", "r1_lr", "r1_epochs") if training else ()))
    depends = _depends(config, *names) | {"solver": solver, "restart": restart}
    tensors, values = artifact(config.folder, f"r1-{solver}", depends, make)
    return tensors["R1"], values


def r1_output(config: Config, recipe: Recipe) -> tuple[Tensor, dict[str, Tensor], dict]:
    """R1 and the norms' scales by what rounding costs the loss (`jqlib.output`); an interrupted one goes on."""
    depends = _depends(config, *FOR_OUTPUT) | {"a_clip": recipe.a_clip}
    steps = 5 * config.refine_steps // 2  # one takes less than half the time of one of refinement's

    def make():
        state, keep = checkpoint(config.folder, "r1-output", depends)
        R1, scales = train_r1_output(
            load_model(config), _text_for(config, steps), a_bits=config.a_bits, w_bits=config.w_bits,
            clip=recipe.a_clip, groupsize=config.w_groupsize, steps=steps, seed=config.seed, keep=keep, resume=state,
        )  # fmt: skip
        return {"R1": R1} | scales, {}

    tensors, values = artifact(config.folder, "r1-output", depends, make)
    return tensors.pop("R1"), tensors, {"train_seconds": values["seconds"]}


def r2(config: Config, solver: str, smooth_scale: dict[str, Tensor] | None = None) -> tuple[dict[str, Tensor], dict]:
    """R2 of every layer, ``{o_proj name: (kv heads, d, d)}``, on smoothed inputs where scales are given; see `r1`."""
    training = solver != "hadamard"

    def make():
        acts, collect_seconds = activations(config, "o")
        shape = models.load_config(config.model)
        history: list[dict] = []
        R = train_r2_independent(
            acts, shape.hidden_size, shape.num_attention_heads, shape.num_key_value_heads,
            config.device, config.r2_lr, config.r2_epochs, config.init_mode if training else "hadamard",
            smooth_scale=smooth_scale, solver=solver if training else "mm", objective=config.objective,
            max_steps=None if training else 0, seed=config.seed, history=history,
        )  # fmt: skip
        return R, _training(history, collect_seconds if training else 0.0)

    names = ("max_tokens", "objective", *(("init_mode", "r2_lr", "r2_epochs") if training else ()))
    depends = _depends(config, *names) | {"solver": solver, "smooth_scale": _fingerprint(smooth_scale or {})}
    return artifact(config.folder, f"r2-{solver}", depends, make)


def smooth_scales(config: Config, sites: tuple[str, ...], measure: str = "max") -> tuple[dict[str, Tensor], dict]:
    """Smoothing scales of these sites at the run's α, and the seconds they took."""

    def make():
        return compute_simple_smooth_scale(
            load_model(config), load_calibration(config), config.device, config.smooth_alpha,
            sites=sites, measure=measure,
        ), {}  # fmt: skip

    return artifact(
        config.folder, "smooth", _depends(config, "smooth_alpha") | {"sites": sites, "measure": measure}, make
    )


def recipe_of(config: Config, name: str | None = None) -> Recipe:
    """The named recipe (default: the run's own); JointQuant takes its solver and smoothing from the run.

    R1 by ``"output"`` needs steps by the loss: without any (``refine_steps=0``) the solver finds it.
    """
    name = name or config.recipe
    recipe = RECIPES[name]
    if name.startswith("jointquant"):
        by_loss = recipe.r1 == "output" and config.refine_steps
        recipe = replace(recipe, r1="output" if by_loss else recipe.r1 and config.solver, r2=config.solver)
    if name in SMOOTHED_BY_CHOICE and not config.use_smooth:
        recipe = replace(recipe, smooth=(), refine=tuple(kind for kind in recipe.refine if kind != "smooth"))
    return recipe


def refined(config: Config, recipe: Recipe, start: Refined) -> tuple[Refined, dict]:
    """`start` refined end to end, on as much calibration text as its steps need; an interrupted one goes on."""
    depends = _recipe_depends(config, recipe)

    def make():
        state, keep = checkpoint(config.folder, "refined", depends)
        found = refine(
            load_model(config), _text_for(config, config.refine_steps), start.R1, start.R2, start.smooth_scale,
            a_bits=config.a_bits, a_clip=recipe.a_clip, o_per_head=recipe.o_per_head, norm_scale=start.norm_scale,
            learn=recipe.refine, steps=config.refine_steps, seed=config.seed, keep=keep, resume=state,
        )  # fmt: skip
        tensors = {} if found.R1 is None else {"R1 of": found.R1}
        for field in ("R2", "norm_scale", "smooth_scale"):
            tensors |= {f"{field} {name}": tensor for name, tensor in getattr(found, field).items()}
        return tensors, {"clips": found.clips}

    tensors, values = artifact(config.folder, "refined", depends, make)
    fields = {
        field: {name.split()[1]: tensor for name, tensor in tensors.items() if name.startswith(f"{field} ")}
        for field in ("R2", "norm_scale", "smooth_scale")
    }
    return Refined(tensors.get("R1 of"), **fields, clips=values["clips"]), values


def _text_for(config: Config, steps: int) -> Tensor:
    """As many calibration windows as so many steps on TOKENS of text need, or as there are."""
    tokenizer, a_window = models.get_tokenizer(config.model), max(1, config.seqlen // TOKENS)
    wanted = max(1, -(-steps // a_window))
    return get_calibration_data(tokenizer, wanted, config.seqlen, config.calib_dataset, config.seed, least=1)


def transform(config: Config, recipe: Recipe):
    """A fresh model, smoothed and rotated by the recipe, still computing what it did before.

    Returns it with its activations' clip ratios and the seconds that its calibration took when it was made.
    """
    config = replace(config, objective=recipe.objective or config.objective)
    r2_solver = "mm" if recipe.r2 == "greedy" else recipe.r2  # R2 is per layer by nature
    scales, smoothing = smooth_scales(config, recipe.smooth, recipe.measure) if recipe.smooth else ({}, {})
    R1, norm_scale, for_r1 = None, {}, {}
    if recipe.r1 == "output":
        R1, norm_scale, for_r1 = r1_output(config, recipe)
    elif recipe.r1:
        R1, for_r1 = r1(config, recipe.r1)
    R2, for_r2 = r2(config, r2_solver, scales) if recipe.r2 else ({}, {})
    seconds = smoothing.get("seconds", 0.0) + sum(part.get("train_seconds", 0.0) for part in (for_r1, for_r2))
    seconds += max(part.get("collect_seconds", 0.0) for part in (for_r1, for_r2))  # one pass serves both
    found = Refined(R1, R2, norm_scale, scales, {})
    if recipe.refine and config.refine_steps and config.a_bits < OFF:  # it learns by their rounding
        found, refinement = refined(config, recipe, found)
        seconds += refinement["seconds"]
    model = load_model(config)
    if recipe.r1:
        fuse_layer_norms(model)
    rotate_model(
        model, found.R1, found.R2, found.smooth_scale,
        norm_scale=found.norm_scale, r4=False, online=recipe.online,
    )  # fmt: skip
    return model, found.clips or dict.fromkeys(site_targets(model), recipe.a_clip), seconds


@lru_cache(maxsize=1)
def _transformed(config: Config, recipe: Recipe | None):
    """`transform`, kept for the next row of the same recipe: copy it before changing it."""
    return transform(config, recipe) if recipe else (load_model(config), {}, 0.0)


def evaluate(config: Config, recipe: Recipe | None, w_bits: int, a_bits: int) -> dict:
    """One row of a table: perplexity, KL from FP and top-1 agreement of a recipe at these bits; None is FP untouched.

    Weights are rounded as the recipe says, else as the run does (``config.weights``), the KV cache as the run says.
    """
    kv_bits = config.kv_bits if recipe else OFF
    weights = (recipe.weights or config.weights) if recipe and w_bits < OFF else "none"
    bits = {"weights": weights, "w_bits": w_bits, "a_bits": a_bits, "kv_bits": kv_bits}
    tune_steps = config.refine_steps if recipe and recipe.tune and w_bits < OFF else 0

    def make():
        reference = Reference(fp_hidden(config), _head(config.model, config.device, config.dtype))
        model, clips, seconds = _transformed(config, recipe)
        if recipe:
            teacher, model = model, deepcopy(model)  # rotated, it still computes what it did
            calib_data = load_calibration(config) if weights == "gptq" else None
            start = time.perf_counter()
            clips = _quantise(config, recipe, model, clips, calib_data, **bits)
            if tune_steps:
                state, keep = checkpoint(config.folder, "evaluation", depends)
                tune(
                    model, teacher, _text_for(config, tune_steps), clips if a_bits < OFF else {},
                    groupsize=config.w_groupsize, steps=tune_steps, seed=config.seed + 1, keep=keep, resume=state,
                )  # fmt: skip
            seconds += time.perf_counter() - start
        ppl = evaluate_windows(model, evaluation_windows(config), config.device, reference)
        return {}, ppl.row() | {
            "tokens_a_second": len(ppl.nll) * config.eval_seqlen / ppl.seconds, "calibration_seconds": seconds,
            "online_operations": online_operations(model, recipe.online if recipe else ()),
            "peak_rss_bytes": peak_rss_bytes(),
        }  # fmt: skip

    depends = _recipe_depends(config, recipe) | _evaluation_depends(config) | {"w_groupsize": config.w_groupsize}
    depends |= bits | {"tune_steps": tune_steps, "gptq_inputs": recipe.gptq_inputs if weights == "gptq" else None}
    values = artifact(config.folder, "evaluation", depends, make)[1]
    return bits | {name: value for name, value in values.items() if name != "reused"}


def fp_hidden(config: Config) -> Tensor:
    """The FP model's last hidden states on the evaluation windows, (windows, eval_seqlen, hidden)."""

    def make():
        return {"hidden": last_hidden(load_model(config), evaluation_windows(config).ids)}, {}

    return artifact(config.folder, "fp-hidden", _fp_depends(config) | _evaluation_depends(config), make)[0]["hidden"]


@lru_cache(maxsize=1)
def _head(model: str, device: str, dtype: str):
    return models.get_model(model, device, getattr(torch, dtype)).get_output_embeddings()


def _quantise(config: Config, recipe: Recipe, model, clips, calib_data, *, weights: str, w_bits: int, **bits: int):
    """`quantize_model` as recipe and run have it; returns the clips of its sites, tensors that `tune` changes."""
    clips = {name: torch.tensor(clip, device=model.device) for name, clip in clips.items()}
    quantize_model(
        model, w_bits, w_groupsize=config.w_groupsize, weights="rtn" if weights == "none" else weights,
        calib_data=calib_data, gptq_inputs=recipe.gptq_inputs, a_clip=clips, o_per_head=recipe.o_per_head, **bits,
    )  # fmt: skip
    return clips


def kurtosis_of(config: Config, recipe: Recipe | None) -> dict[str, float]:
    """Of what each site reads under a recipe (None: in the model as it is): ``{first reader: kurtosis}``."""

    def make():
        model, *_ = _transformed(config, recipe)
        moments: dict[str, Moments] = {}
        windows = load_calibration(config)[:2]  # moments settle fast: thousands of tokens times hundreds of channels
        collect_activations(model, windows, site_targets(model), config.device, 1, raw=True, moments=moments)
        return {}, {"kurtosis": {name: m.kurtosis for name, m in moments.items()}}

    return artifact(config.folder, "kurtosis", _depends(config) | _recipe_depends(config, recipe), make)[1]["kurtosis"]


def protocol(config: Config) -> dict:
    """How a run was measured: goes beside every table."""
    default, windows = models.get_tokenizer(config.model).default_dataset, evaluation_windows(config)
    return {
        "dataset": config.eval_dataset or default, "split": config.eval_split, "seqlen": config.eval_seqlen,
        "windows": len(windows.ids), "drawn": windows.drawn, "articles_or_blocks": len({*windows.articles}),
        "bos": False, "calibration": config.calib_dataset or default, "calibration_windows": config.nsamples,
        "calibration_seqlen": config.seqlen,
        "not_quantised": "embeddings, lm_head" + (", KV cache" if config.kv_bits == OFF else ""),
    }  # fmt: skip


def _recipe_depends(config: Config, recipe: Recipe | None) -> dict:
    """What `transform` depends on (recipe None: the FP model): what the recipe does, whatever it is called."""
    if recipe is None:
        return _fp_depends(config)
    names = ("objective", "init_mode", "r1_lr", "r1_epochs", "r2_lr", "r2_epochs", "smooth_alpha", "max_tokens")
    names += ("refine_steps", "a_bits") if recipe.refine else ()
    names += FOR_OUTPUT if recipe.r1 == "output" else ()
    later = ("label", "weights", "gptq_inputs", "tune")
    does = {name: value for name, value in vars(recipe).items() if name not in later}
    return _depends(config, *names) | {"recipe": does, "objective": recipe.objective or config.objective}


def _fingerprint(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()


def _training(history: list[dict], collect_seconds: float) -> dict:
    return {"history": history, "train_seconds": history[-1]["seconds"], "collect_seconds": collect_seconds}


def _evaluation_depends(config: Config) -> dict:
    depends = {name: getattr(config, name) for name in ("eval_seqlen", "eval_windows", "eval_split", "eval_draw")}
    return depends | {"eval_dataset": path_fingerprint(config.eval_dataset or "default")}


def _fp_depends(config: Config) -> dict:
    return {"model": models.fingerprint(config.model), "dtype": config.dtype, "device": config.device, "recipe": None}


def _depends(config: Config, *names: str) -> dict:
    """What every artifact depends on, and the named settings besides."""
    common = ("nsamples", "seqlen", "calib_dataset", "seed", "dtype", "device")
    depends = {name: getattr(config, name) for name in (*common, *names)}
    depends["calib_dataset"] = path_fingerprint(config.calib_dataset or "default")
    return depends | {"model": models.fingerprint(config.model)}
