"""The steps from the FP model to the transforms of its sites, for a Config and a Recipe.

Each function ``<kind>_step`` says what one artifact (`jqlib.store`) depends on and how it is made: ``make`` sees only
the settings that its key is made of.
"""

from dataclasses import replace

from torch import Tensor

from jqlib.config import Config
from jqlib.inputs import LESSONS, MODEL, TEXT, artifact_of, load_calibration, load_model, steps_of, text_for
from jqlib.learn.activations import collect_activations
from jqlib.learn.fisher import train_r1_output
from jqlib.learn.lessons import Lessons, teach
from jqlib.learn.refine import refine
from jqlib.learn.rotations import train_r1_joint, train_r2_independent
from jqlib.learn.smooth import compute_simple_smooth_scale
from jqlib.model.families import R1_SITES, head_dim_of, site_targets, sites_of
from jqlib.model.load import load_config
from jqlib.precision import products_dtype
from jqlib.recipes import Recipe
from jqlib.store import Artifact, Made
from jqlib.transform.build import transforms_of
from jqlib.transform.grids import OFF
from jqlib.transform.transform import Grid, Transform, packed, unpacked

BY_RATE = ("sgd", "adam", "cayley")  # solvers with a learning rate and epochs


def activations_step(config: Config) -> Artifact:
    sites = (*R1_SITES, "o")  # one pass gives them all

    def make(s) -> Made:
        model = load_model(s)
        targets = site_targets(model, *sites)
        acts = collect_activations(model, load_calibration(s), targets, s.device, s.max_tokens, seed=s.seed)
        return acts, {"sites": {kind: site_targets(model, kind) for kind in sites}}

    return artifact_of(activations_step, config, (*MODEL, *TEXT, "max_tokens"), make)


def activations(config: Config, *kinds: str) -> dict[str, Tensor]:
    """Token samples of sites of all layers, ``{site: (max_tokens, features)}``, in the model's order."""
    return _of_kinds(activations_step(config).get(), kinds)


def _of_kinds(made: Made, kinds: tuple[str, ...]) -> dict[str, Tensor]:
    acts, values = made
    layers = zip(*(values["sites"][kind] for kind in kinds), strict=True)  # a file forgets the model's order
    return {name: acts[name] for layer in layers for name in layer}


def r1_step(config: Config, solver: str, restart: int = 0) -> Artifact:
    def make(s, acts: Made) -> Made:
        samples, history = _of_kinds(acts, R1_SITES), []
        hidden, layers = next(iter(samples.values())).shape[-1], len(samples) // len(R1_SITES)
        how = _training(s, solver) | {"seed": s.seed + restart}
        R = train_r1_joint(samples, hidden, layers, s.device, **how, history=history)
        return {"R1": R}, {"history": history}

    names = ("device", *_settings("r1", solver))
    return artifact_of(r1_step, config, names, make, activations_step(config), solver=solver, restart=restart)


def _settings(rotation: str, solver: str) -> tuple[str, ...]:
    """The settings that a solver goes by: ``"hadamard"`` trains nothing, some have no learning rate."""
    rates = (f"{rotation}_lr", f"{rotation}_epochs") if solver in BY_RATE else ()
    return ("seed", "objective", *(("init_mode",) if solver != "hadamard" else ()), *rates)


def _training(s, solver: str) -> dict:
    """The same as keywords of `train_r1_joint` and `train_r2_independent`."""
    trained = ("seed", "objective", "init_mode", "r1_lr", "r1_epochs", "r2_lr", "r2_epochs")
    how = {name.removeprefix("r1_").removeprefix("r2_"): value for name, value in vars(s).items() if name in trained}
    return how | ({"max_steps": 0} if solver == "hadamard" else {"solver": solver})


def r1(config: Config, solver: str, restart: int = 0) -> tuple[Tensor, dict]:
    """R1, (hidden, hidden), by ``"hadamard"`` (no training) or a solver; ``restart`` counts starts on the same tokens.

    Beside it the ``history`` of its training.
    """
    tensors, values = r1_step(config, solver, restart).get()
    return tensors["R1"], values


def lessons_step(config: Config) -> Artifact:
    """The FP model's predictions on the text that all stages by the loss learn from."""

    def make(s) -> Made:
        text = text_for(s, s.refine_steps * s.step_tokens)
        lessons = teach(load_model(s), text, products_dtype(s.compute_dtype, s.device))
        return lessons._replace(hidden=lessons.hidden.half())._asdict(), {}

    return artifact_of(lessons_step, config, LESSONS, make)


def r1_output_step(config: Config, a_clip: float) -> Artifact:
    def make(s, *, resume, keep) -> Made:
        R1, gains = train_r1_output(
            load_model(s), text_for(s, s.refine_steps * s.step_tokens), grid=Grid(s.a_bits, a_clip), w_bits=s.w_bits,
            groupsize=s.w_groupsize, steps=steps_of(s, keep=keep, resume=resume),
        )  # fmt: skip
        return {"R1": R1} | gains, {}

    names = (*LESSONS, "a_bits", "w_bits", "w_groupsize")
    return artifact_of(r1_output_step, config, names, make, resumable=True, a_clip=a_clip)


def r2_step(config: Config, solver: str, smoothing: Artifact | None = None) -> Artifact:
    def make(s, acts: Made, scales: Made | None = None) -> Made:
        shape, history = load_config(s.model), []
        heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
        how = _training(s, solver) | {"smooth_scale": scales and scales[0]}
        inputs = _of_kinds(acts, ("o",))
        R = train_r2_independent(inputs, shape.hidden_size, heads, kv_heads, s.device, **how, history=history)
        return R, {"history": history}

    inputs = (activations_step(config), *([smoothing] if smoothing else []))
    names = ("model", "device", *_settings("r2", solver))
    return artifact_of(r2_step, config, names, make, *inputs, solver=solver)


def r2(config: Config, solver: str) -> tuple[dict[str, Tensor], dict]:
    """R2 of every layer, ``{o_proj name: (kv heads, d, d)}``, on inputs that are not smoothed; see `r1`."""
    return r2_step(config, solver).get()


def smooth_step(config: Config, sites: tuple[str, ...], measure: str) -> Artifact:
    def make(s) -> Made:
        model, windows = load_model(s), load_calibration(s)
        alpha, more = s.smooth_alpha, {"sites": sites, "measure": measure}
        return compute_simple_smooth_scale(model, windows, s.device, alpha, **more), {}

    names = (*MODEL, *TEXT, "smooth_alpha")
    return artifact_of(smooth_step, config, names, make, sites=sites, measure=measure)


def smooth_scales(config: Config, sites: tuple[str, ...], measure: str = "max") -> dict[str, Tensor]:
    """Smoothing scales of these sites at the run's α."""
    return smooth_step(config, sites, measure).get()[0]


def transforms_step(config: Config, recipe: Recipe) -> Artifact:
    """The transform of every site, by the solvers and then, if the recipe says so, refined."""
    config = replace(config, objective=recipe.objective or config.objective)
    refines = bool(recipe.refine and config.refine_steps and config.a_bits < OFF)  # it learns by their rounding
    parts: dict[str, Artifact] = {}
    if recipe.smooth:
        parts["smooth"] = smooth_step(config, recipe.smooth, recipe.measure)
    if recipe.r1:
        by_loss = recipe.r1 == "output"
        parts["r1"] = r1_output_step(config, recipe.a_clip or 1.0) if by_loss else r1_step(config, recipe.r1)
    if recipe.r2:  # per layer by nature: greedy is the joint solver
        parts["r2"] = r2_step(config, "mm" if recipe.r2 == "greedy" else recipe.r2, parts.get("smooth"))

    if refines:
        parts["lessons"] = lessons_step(config)

    def make(s, *found: Made, resume, keep) -> Made:
        tensors = {part: made[0] for part, made in zip(parts, found, strict=True)}
        model, gains = load_model(s), dict(tensors.get("r1", {}))
        R1, d = gains.pop("R1", None), head_dim_of(model)
        bits, clip = s.a_bits if refines else OFF, recipe.a_clip or 1.0
        grids = {
            name: Grid(bits, clip, d if p.kind == "o" and recipe.o_per_head else None)
            for name, p in sites_of(model).items()
        }
        scales, R2 = tensors.get("smooth"), tensors.get("r2")
        transforms = transforms_of(model, R1, R2, scales, gains, recipe.online, grids)
        if refines:
            steps = steps_of(s, keep=keep, resume=resume)
            refine(model, Lessons(**tensors["lessons"]), transforms, learn=recipe.refine, steps=steps)
        tensors, layouts = packed(transforms)
        return tensors, {"layouts": layouts}

    names = (*LESSONS, "a_bits") if refines else MODEL
    does = {"online": recipe.online, "a_clip": recipe.a_clip, "o_per_head": recipe.o_per_head}
    does |= {"refine": recipe.refine} if refines else {}
    return artifact_of(transforms_step, config, names, make, *parts.values(), resumable=True, **does)


def transforms(config: Config, recipe: Recipe) -> dict[str, Transform]:
    """The transform of every site under a recipe: what `jqlib.transform.build.build` merges."""
    tensors, values = transforms_step(config, recipe).get()
    return unpacked(tensors, values["layouts"])
