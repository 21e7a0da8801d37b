"""Every setting of the workbook in one place: parameters, presets and profiles.

A notebook's ``parameters`` cell, a run file and a command-line flag all use the names of `Config`'s fields.
A value that is given beats the profile's, the profile's beats the field's default.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from jqlib.choices import (
    ComputeDtype,
    Draw,
    Dtype,
    InitMode,
    Objective,
    Solver,
    Split,
    Weights,
    check_bits,
    check_choice,
)
from jqlib.recipes import RECIPES

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"


def _setting(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """One run. Values are checked when it is made; every error names the value and what is allowed."""

    model: str = _setting("meta-llama/Llama-3.2-1B", "hub id, local folder, .gguf file or smollm2-135m")
    profile: Literal["quick", "standard", "full"] = _setting("full", "how much work: quick, standard or full")
    recipe: str = _setting("jointquant", "a method that notebook 05 shows besides those it always has")
    recipes: str | None = _setting(None, "notebook 05's methods: a,b; None: by profile, few for a model above 0.5B")
    nsamples: int = _setting(128, "calibration windows")
    seqlen: int = _setting(2048, "tokens of a calibration window")
    max_tokens: int = _setting(2048, "tokens per site that the solvers see")
    eval_seqlen: int = _setting(2048, "tokens of an evaluation window")
    eval_windows: int = _setting(0, "evaluation windows; 0 is all of the text")
    eval_split: Split = _setting("test", "text that is evaluated on: test, or validation to choose by")
    eval_draw: Draw = _setting("spread", "which windows, if not all: spread over the text, or its first")
    bos: bool = _setting(False, "put the tokenizer's BOS before every evaluation window")
    r1_lr: float = _setting(1e-3, "learning rate for R1 of sgd, adam and cayley; the joint solver needs none")
    r1_epochs: int = _setting(10, "epochs for R1 of sgd, adam and cayley")
    r2_lr: float = _setting(1e-3, "learning rate for R2 of sgd, adam and cayley")
    r2_epochs: int = _setting(5, "epochs for R2 of sgd, adam and cayley")
    solver: Solver = _setting("mm", "R1's and R2's solver: mm (joint), sgd (DartQuant's), adam, cayley, greedy")
    objective: Objective = _setting(
        "whip", "what a solver minimises: whip, range, kurtosis, lp or quant_error (4 bits)"
    )
    init_mode: InitMode = _setting("hadamard", "a solver's start: hadamard, random or identity")
    refine_steps: int = _setting(200, "steps of an end-to-end stage, in recipes with one; 0 leaves them out")
    step_tokens: int = _setting(4096, "tokens of such a step")
    use_smooth: bool = _setting(True, "smooth the inputs of o_proj and down_proj")
    smooth_alpha: float = _setting(0.5, "smoothing strength: 0 follows the weights, 1 the activations")
    w_bits: int = _setting(4, "bits of weights, 2 to 12; 16 leaves them alone")
    a_bits: int = _setting(4, "bits of activations, 2 to 16; 16 leaves them alone")
    kv_bits: int = _setting(16, "bits of the KV cache, 2 to 16; 16 leaves it alone")
    weights: Weights = _setting("rtn", "how weights are rounded: rtn or gptq")
    w_groupsize: int = _setting(128, "weights that share a scale, along the input")
    calib_dataset: str | None = _setting(None, "wiki, wikitext2, c4, a folder or a text file; None: the model's own")
    eval_dataset: str | None = _setting(None, "as calib_dataset, or news: reports, text of another kind")
    seed: int = _setting(0, "seed of windows, token samples and starts")
    device: str = _setting("cpu", "torch device, such as cpu or cuda")
    dtype: Dtype = _setting("auto", "of the model; auto: float32 up to 2B parameters, else as its checkpoint")
    stream: bool = _setting(False, "read each layer from disk when its turn comes, and learn nothing by the loss")
    compute_dtype: ComputeDtype = _setting("auto", "of products in those stages; auto: bfloat16 where it is faster")
    eval_compute_dtype: ComputeDtype = _setting("float32", "of products in evaluation; auto as in compute_dtype")
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
        check_bits(self.w_bits, self.a_bits, self.kv_bits)
        for name, allowed in CHOICES.items():
            check_choice(name, getattr(self, name), allowed)
        if self.stream and self.refine_steps:
            raise ValueError(
                f"stream=True, refine_steps={self.refine_steps}: the stages by the loss need the whole model in "
                "memory: leave out the one or the other"
            )
        for name in named(self.recipes):
            check_choice("recipes", name, RECIPES)

    @property
    def folder(self) -> Path:
        """Where this model's results go: ``<output_dir>/<model slug>``."""
        return output_folder(self.output_dir) / slug(self.model)


PROFILES = {
    "quick": {
        "nsamples": 4, "seqlen": 512, "max_tokens": 256, "eval_seqlen": 512, "eval_windows": 8, "refine_steps": 20,
        "step_tokens": 512,
    },
    "standard": {
        "nsamples": 8, "seqlen": 2048, "max_tokens": 1536, "eval_seqlen": 1024, "eval_windows": 16, "refine_steps": 60,
        "step_tokens": 1024,
    },
    "full": {"nsamples": 128, "seqlen": 2048, "max_tokens": 2048, "eval_windows": 0},
}  # fmt: skip

MIDDLE = {"recipes": "hadamard-online,jointquant,control,jointquant-best"}  # of 0.5B to 2B
BIG = {"recipes": "control,jointquant-best", "dtype": "bfloat16"}
PRESETS = {  # model -> what suits its size; the profile says how much work it gets, and a parameter given beats both
    "HuggingFaceTB/SmolLM2-360M": {"dtype": "float32"}, "HuggingFaceTB/SmolLM2-1.7B": MIDDLE,
    "Qwen/Qwen2.5-0.5B": MIDDLE, "Qwen/Qwen2.5-7B": BIG, "Qwen/Qwen3-0.6B": MIDDLE, "Qwen/Qwen3-8B": BIG,
    "meta-llama/Llama-3.2-1B": MIDDLE, "meta-llama/Llama-3.2-3B": BIG, "meta-llama/Llama-3.1-8B": BIG,
    "meta-llama/Meta-Llama-3-8B": BIG, "mistralai/Mistral-7B-v0.1": BIG,
}  # fmt: skip

HELP = {f.name: f.metadata["help"] for f in fields(Config)}
CHOICES = {f.name: get_args(f.type) for f in fields(Config) if getattr(f.type, "__origin__", None) is Literal}
CHOICES["recipe"] = tuple(RECIPES)
KINDS = {f.name: str if f.name in CHOICES else (get_args(f.type) or (f.type,))[0] for f in fields(Config)}
OPTIONAL = {f.name for f in fields(Config) if type(None) in get_args(f.type)}
LIMITS = [
    ("nsamples", 1, 1e6), ("seqlen", 2, 1e6), ("max_tokens", 1, 1e9), ("eval_seqlen", 2, 1e6),
    ("eval_windows", 0, 1e9),
    ("r1_lr", 0, 1e9), ("r2_lr", 0, 1e9), ("r1_epochs", 1, 1e6), ("r2_epochs", 1, 1e6), ("smooth_alpha", 0, 1),
    ("refine_steps", 0, 1e6), ("step_tokens", 1, 1e9), ("w_groupsize", 1, 1e9), ("seed", 0, 2**31),
]  # fmt: skip


def make_config(parameters: Mapping[str, Any]) -> Config:
    """A Config from parameters, None standing for "not given": those are the profile's. Unknown names are refused."""
    if unknown := [name for name in parameters if name not in KINDS]:
        raise ValueError(f"unknown parameter {unknown[0]!r}; there are {', '.join(KINDS)}")
    given = {name: value for name, value in parameters.items() if value is not None}
    profile = given.get("profile", Config.profile)
    check_choice("profile", profile, PROFILES)
    preset = PRESETS.get(given.get("model", Config.model), {}) | ({"refine_steps": 0} if given.get("stream") else {})
    return Config(**(PROFILES[profile] | preset | given))


def config_of(namespace: Mapping[str, Any]) -> Config:
    """The Config of a notebook's ``globals()``: the variables of its parameters cell, the rest by default."""
    return make_config({name: namespace[name] for name in KINDS if name in namespace})


def get_llama_1b_config(**parameters) -> Config:
    """Llama-3.2-1B, profile ``full`` unless another is named."""
    return make_config({"model": "meta-llama/Llama-3.2-1B"} | parameters)


def get_llama_8b_config(**parameters) -> Config:
    """Llama-3-8B (loaded in bfloat16, as its checkpoint is), profile ``full`` unless another is named."""
    return make_config({"model": "meta-llama/Meta-Llama-3-8B"} | parameters)


def get_smollm2_135m_config(**parameters) -> Config:
    """The embedded model, profile ``quick`` unless another is named."""
    return make_config({"model": "smollm2-135m", "profile": "quick"} | parameters)


def named(recipes: str | None) -> list[str]:
    """The names in ``"a, b"``."""
    return [name.strip() for name in recipes.split(",")] if recipes else []


def slug(model: str) -> str:
    """A model's name as a folder's: ``meta-llama/Llama-3.2-1B`` gives ``meta-llama--Llama-3.2-1B``."""
    path = Path(model).expanduser()
    local = path.exists() or model.startswith((".", "/", "~"))
    name = Path(os.path.abspath(path)).name if local else model.replace("/", "--")
    return re.sub(r"[^\w.\-]+", "-", name)


def output_folder(output_dir: str = Config.output_dir) -> Path:
    """Where all results go; a relative path is relative to ROOT. ``JOINTQUANT_OUTPUT`` moves the default."""
    moved = os.environ.get("JOINTQUANT_OUTPUT", output_dir) if output_dir == Config.output_dir else output_dir
    return ROOT / Path(moved).expanduser()
