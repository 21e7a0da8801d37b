"""Every setting of the workbook in one place: parameters, presets, recipes and profiles.

A notebook's ``parameters`` cell, a run file and a command-line flag all use the names of `Config`'s fields.
Where several give a value, a flag beats the profile, the profile beats the model's preset, the preset beats
the field's default.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"


def _setting(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """One run. Values are checked when it is made; every error names the value and what is allowed."""

    model: str = _setting("meta-llama/Llama-3.2-1B", "hub id, local folder, .gguf file or smollm2-135m")
    profile: str = _setting("full", "how much work: quick, standard or full")
    recipe: str = _setting("jointquant", "a method that notebook 05 shows besides those it always has")
    nsamples: int = _setting(128, "calibration windows")
    seqlen: int = _setting(2048, "tokens of a calibration window")
    max_tokens: int = _setting(2048, "tokens a site that the solvers see")
    eval_seqlen: int = _setting(2048, "tokens of an evaluation window")
    eval_windows: int = _setting(0, "evaluation windows; 0 is all of the text")
    eval_split: str = _setting("test", "text that is evaluated on: test, or validation to choose by")
    eval_draw: str = _setting("spread", "which windows, if not all: spread over the text, or its first")
    r1_lr: float = _setting(1e-3, "learning rate for R1 of sgd, adam and cayley; the joint solver needs none")
    r1_epochs: int = _setting(10, "epochs for R1 of sgd, adam and cayley")
    r2_lr: float = _setting(1e-3, "learning rate for R2 of sgd, adam and cayley")
    r2_epochs: int = _setting(5, "epochs for R2 of sgd, adam and cayley")
    solver: str = _setting("mm", "R1's and R2's solver: mm (joint), sgd (DartQuant's), adam, cayley, greedy")
    objective: str = _setting("whip", "what a solver minimises: whip, range, kurtosis, lp or quant_error (4 bits)")
    init_mode: str = _setting("hadamard", "a solver's start: hadamard, random or identity")
    refine_steps: int = _setting(200, "steps of an end-to-end stage, in recipes with one; 0 leaves them out")
    use_smooth: bool = _setting(True, "smooth the inputs of o_proj and down_proj")
    smooth_alpha: float = _setting(0.5, "smoothing strength: 0 follows the weights, 1 the activations")
    w_bits: int = _setting(4, "bits of weights, 2 to 16; 16 leaves them alone")
    a_bits: int = _setting(4, "bits of activations, 2 to 16; 16 leaves them alone")
    kv_bits: int = _setting(16, "bits of the KV cache, 2 to 16; 16 leaves it alone")
    weights: str = _setting("rtn", "how weights are rounded: rtn or gptq")
    w_groupsize: int = _setting(128, "weights that share a scale, along the input")
    calib_dataset: str | None = _setting(None, "wiki, wikitext2, c4, a folder or a text file; None: the model's own")
    eval_dataset: str | None = _setting(None, "wiki, wikitext2, c4, a folder or a text file; None: the model's own")
    seed: int = _setting(0, "seed of windows, token samples and starts")
    device: str = _setting("cpu", "torch device, such as cpu or cuda")
    dtype: str = _setting("float32", "of the model: float32, bfloat16 or float16")
    output_dir: str = _setting("./jointquant_output", "where results go; in a notebook, relative to the repository")

    def __post_init__(self):
        for name, kind in KINDS.items():
            value = getattr(self, name)
            if kind is float and type(value) is int:
                object.__setattr__(self, name, float(value))
            elif type(value) is not kind and not (value is None and name in OPTIONAL):
                raise ValueError(f"{name}={value!r}: expected {kind.__name__}")
        for name, low, high in LIMITS:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name}={value}: expected a value from {low:g} to {high:g}")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; there are {', '.join(allowed)}")

    @property
    def folder(self) -> Path:
        """Where this model's results go: ``<output_dir>/<model slug>``."""
        return output_folder(self.output_dir) / slug(self.model)


@dataclass(frozen=True)
class Recipe:
    """A method: what is done to a model before its weights and activations are rounded.

    Raises ValueError for a recipe that would be refined as another model than the one that is built.
    """

    label: str
    r1: str | None = None  # None, "hadamard", a solver, or "output": with the norms' scales
    r2: str | None = None
    online: tuple[str, ...] = ()  # sites with a Hadamard transform that runs online
    smooth: tuple[str, ...] = ()  # sites
    a_clip: float = 1.0
    o_per_head: bool = False
    objective: str | None = None  # None: the run's
    weights: str | None = None
    measure: str = "max"  # what smoothing goes by: max or l2
    gptq_inputs: str = "fp"  # or quantised, or corrected
    refine: tuple[str, ...] = ()  # what is learned end to end before the weights are rounded
    tune: bool = False  # end to end, after

    def __post_init__(self):
        kinds = {"R2", "smooth", "clip"} | ({"R1", "scale"} if self.r1 else set())
        if not {*self.refine} <= kinds or (self.refine and self.r1 and {"qkv", "ug"} & {*self.smooth}):
            raise ValueError(
                f"recipe {self.label!r}: refine={self.refine}, smooth={self.smooth}: with R1 {self.r1} there are "
                f"{', '.join(sorted(kinds))} to refine, and behind R1 qkv and ug have a scale of the norm, no smoothing"
            )
        simulated = {"down"} if self.r1 else {"qkv", "ug", "down"}  # what `refine` has Hadamard transforms at
        if self.refine and (not self.r2 or {*self.online} != simulated):
            raise ValueError(
                f"recipe {self.label!r}: refine={self.refine} needs R2 (here {self.r2}) and Hadamard transforms online "
                f"at {', '.join(sorted(simulated))} (here {', '.join(sorted(self.online)) or 'nowhere'})"
            )


R4, EVERYWHERE = ("down",), ("qkv", "o", "ug", "down")
QUAROT = Recipe("QuaRot (Hadamard)", "hadamard", "hadamard", R4, a_clip=0.9)
QUAROT_BEST = replace(QUAROT, label="QuaRot, best", o_per_head=True, weights="gptq")
DARTQUANT = Recipe(
    "DartQuant (R2 as published: never steps)", "sgd", "hadamard", R4, a_clip=0.9, o_per_head=True, objective="whip"
)
JOINTQUANT = Recipe("JointQuant", "mm", "mm", R4, smooth=("o", "down"), a_clip=0.9, o_per_head=True)
BEST = replace(
    JOINTQUANT, label="JointQuant, best", r1="output", objective="range", weights="gptq", measure="l2",
    gptq_inputs="quantised", refine=("R1", "R2", "scale", "smooth", "clip"), tune=True,
)  # fmt: skip
RECIPES = {
    "rtn": Recipe("RTN"),
    "smoothquant": Recipe("SmoothQuant", smooth=("qkv", "ug")),
    "quarot": QUAROT,
    "quarot-best": QUAROT_BEST,
    "quarot-tuned": replace(QUAROT_BEST, label="QuaRot, best, tuned", tune=True),
    "hadamard-online": Recipe("Hadamard online everywhere", online=EVERYWHERE, a_clip=0.9),
    "dartquant": DARTQUANT,
    "dartquant-r2": replace(DARTQUANT, label="DartQuant (R2 as meant)", r2="sgd"),
    "spinquant-like": replace(QUAROT_BEST, label="SpinQuant-like: R1, R2 by KL", refine=("R1", "R2")),
    "ostquant-like": replace(
        QUAROT_BEST, label="OSTQuant-like: R1, R2, scales by KL", refine=("R1", "R2", "scale", "smooth")
    ),
    "control": replace(
        BEST, label="Control: Hadamard, all else as best", r1="hadamard", r2="hadamard",
        refine=("scale", "smooth", "clip"),
    ),
    "jointquant": JOINTQUANT,
    "jointquant-best": BEST,
    "jointquant-online": replace(
        BEST, label="JointQuant, online", r1=None, online=("qkv", "ug", "down"), smooth=EVERYWHERE,
        refine=("R2", "smooth", "clip"),
    ),
}  # fmt: skip
SMOOTHED_BY_CHOICE = ("jointquant", "jointquant-best", "jointquant-online", "control")  # what `use_smooth` switches

PROFILES = {
    "quick": {
        "nsamples": 4, "seqlen": 512, "max_tokens": 256, "eval_seqlen": 512, "eval_windows": 8, "refine_steps": 20,
    },
    "standard": {
        "nsamples": 8, "seqlen": 2048, "max_tokens": 1536, "eval_seqlen": 1024, "eval_windows": 16, "refine_steps": 60,
    },
    "full": {"nsamples": 128, "seqlen": 2048, "max_tokens": 2048, "eval_windows": 0},
}  # fmt: skip

PRESETS = {"meta-llama/Meta-Llama-3-8B": {"dtype": "bfloat16"}}

HELP = {f.name: f.metadata["help"] for f in fields(Config)}
KINDS = {f.name: f.type if isinstance(f.type, type) else f.type.__args__[0] for f in fields(Config)}
OPTIONAL = {f.name for f in fields(Config) if not isinstance(f.type, type)}
LIMITS = [
    ("nsamples", 1, 1e6), ("seqlen", 2, 1e6), ("max_tokens", 1, 1e9), ("eval_seqlen", 2, 1e6),
    ("eval_windows", 0, 1e9),
    ("r1_lr", 0, 1e9), ("r2_lr", 0, 1e9), ("r1_epochs", 1, 1e6), ("r2_epochs", 1, 1e6), ("smooth_alpha", 0, 1),
    ("refine_steps", 0, 1e6), ("w_bits", 2, 16), ("a_bits", 2, 16), ("kv_bits", 2, 16), ("w_groupsize", 1, 1e9),
    ("seed", 0, 2**31),
]  # fmt: skip
CHOICES = {
    "profile": tuple(PROFILES),
    "recipe": tuple(RECIPES),
    "solver": ("mm", "sgd", "adam", "cayley", "greedy"),
    "objective": ("whip", "range", "kurtosis", "lp", "quant_error"),
    "init_mode": ("hadamard", "random", "identity"),
    "eval_split": ("test", "validation"),
    "eval_draw": ("spread", "first"),
    "weights": ("rtn", "gptq"),
    "dtype": ("float32", "bfloat16", "float16"),
}


def make_config(parameters: Mapping[str, Any]) -> Config:
    """A Config from parameters, None standing for "not given". Unknown names are refused.

    The profile, then the model's preset, fill in what the parameters leave open.
    """
    if unknown := [name for name in parameters if name not in KINDS]:
        raise ValueError(f"unknown parameter {unknown[0]!r}; there are {', '.join(KINDS)}")
    given = {name: value for name, value in parameters.items() if value is not None}
    profile = given.get("profile", Config.profile)
    if profile not in PROFILES:
        raise ValueError(f"profile={profile!r} is unknown; there are {', '.join(PROFILES)}")
    return Config(**(PRESETS.get(given.get("model", Config.model), {}) | PROFILES[profile] | given))


def config_of(namespace: Mapping[str, Any]) -> Config:
    """The Config of a notebook's ``globals()``: the variables of its parameters cell, the rest by default."""
    return make_config({name: namespace[name] for name in KINDS if name in namespace})


def get_llama_1b_config(**parameters) -> Config:
    """Llama-3.2-1B, profile ``full`` unless another is named."""
    return make_config({"model": "meta-llama/Llama-3.2-1B"} | parameters)


def get_llama_8b_config(**parameters) -> Config:
    """Llama-3-8B in bfloat16, profile ``full`` unless another is named."""
    return make_config({"model": "meta-llama/Meta-Llama-3-8B"} | parameters)


def get_smollm2_135m_config(**parameters) -> Config:
    """The embedded model, profile ``quick`` unless another is named."""
    return make_config({"model": "smollm2-135m", "profile": "quick"} | parameters)


def slug(model: str) -> str:
    """A model's name as a folder's: ``meta-llama/Llama-3.2-1B`` gives ``meta-llama--Llama-3.2-1B``."""
    path = Path(model).expanduser()
    name = path.absolute().name if path.exists() or model.startswith((".", "/", "~")) else model.replace("/", "--")
    return re.sub(r"[^\w.\-]+", "-", name)


def output_folder(output_dir: str = Config.output_dir) -> Path:
    """Where all results go; a relative path is relative to ROOT. ``JOINTQUANT_OUTPUT`` moves the default."""
    moved = os.environ.get("JOINTQUANT_OUTPUT", output_dir) if output_dir == Config.output_dir else output_dir
    return ROOT / Path(moved).expanduser()
