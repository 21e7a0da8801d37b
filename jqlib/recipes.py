"""What each method does to a model. Each is a `Recipe`; a new one is a line here, or `dataclasses.replace` of one."""

from dataclasses import dataclass, replace
from typing import get_args

from jqlib.choices import GptqInputs, Measure, Objective, Solver, Weights, check_choice

SITES = "qkv", "o", "ug", "down"


@dataclass(frozen=True)
class Recipe:
    """A method: how the transform of every site is made, and how weights are rounded. Sites are named by kind.

    Raises ValueError for a recipe that would refine what it has not got.
    """

    label: str
    r1: str | None = None  # None, "hadamard", a solver, or "output": with the norms' scales
    r2: str | None = None  # None, "hadamard" or a solver
    online: tuple[str, ...] = ()  # sites with a Hadamard transform that runs online
    smooth: tuple[str, ...] = ()  # sites whose channels are scaled
    a_clip: float | None = 1.0  # None: a token's whole range, and nothing learns another
    o_per_head: bool = False  # one grid per head at o
    objective: Objective | None = None  # None: the run's
    weights: Weights | None = None  # None: the run's
    w_groupsize: int | None = None  # None: the run's
    a_bits: int | None = None  # None: the run's
    measure: Measure = "max"  # what smoothing goes by
    gptq_inputs: GptqInputs = "fp"
    refine: tuple[str, ...] = ()  # what is learned end to end before the weights are rounded
    layerwise: bool = False  # by GPTQ, and each layer learns when it is rounded
    tune: bool = False  # end to end, after

    def __post_init__(self):
        named = {"weights": Weights, "gptq_inputs": GptqInputs, "objective": Objective, "measure": Measure}
        for name, allowed in named.items():
            check_choice(name, getattr(self, name), [*get_args(allowed), None])
        check_choice("r1", self.r1, [None, "hadamard", "output", *get_args(Solver)])
        check_choice("r2", self.r2, [None, "hadamard", *get_args(Solver)])
        for name in ("online", "smooth"):
            for site in getattr(self, name):
                check_choice(name, site, SITES)
        if self.a_clip is not None and not 0 < self.a_clip <= 1:
            raise ValueError(
                f"a_clip={self.a_clip}: expected a share of a token's range, above 0 and at most 1, or None"
            )
        if self.layerwise and self.weights != "gptq":
            raise ValueError(f"recipe {self.label!r}: layerwise learning begins where GPTQ ends: weights='gptq'")
        kinds = {"R2", "smooth"} | ({"R1", "scale"} if self.r1 else set()) | ({"clip"} if self.a_clip else set())
        if not {*self.refine} <= kinds or (self.refine and self.r1 and {"qkv", "ug"} & {*self.smooth}):
            raise ValueError(
                f"recipe {self.label!r}: refine={self.refine}, smooth={self.smooth}: with R1 {self.r1} there are "
                f"{', '.join(sorted(kinds))} to refine, and behind R1 qkv and ug have a scale of the norm, no smoothing"
            )

    @property
    def own(self) -> dict[str, int]:
        """The run's settings that it has of its own."""
        own = {"w_groupsize": self.w_groupsize, "a_bits": self.a_bits}
        return {name: value for name, value in own.items() if value}


R4, EVERYWHERE = ("down",), SITES
QUAROT = Recipe("QuaRot (Hadamard)", "hadamard", "hadamard", R4, a_clip=0.9)
QUAROT_BEST = replace(QUAROT, label="QuaRot, best", o_per_head=True, weights="gptq")
DARTQUANT = Recipe(
    "DartQuant (R2 as published: never steps)", "sgd", "hadamard", R4, a_clip=0.9, o_per_head=True, objective="whip"
)
JOINTQUANT = Recipe("JointQuant", "mm", "mm", R4, smooth=("o", "down"), a_clip=0.9, o_per_head=True)
BEST = replace(
    JOINTQUANT, label="JointQuant, best", r1="output", objective="range", weights="gptq", measure="l2",
    gptq_inputs="quantised", refine=("R1", "R2", "scale", "smooth", "clip"), layerwise=True, tune=True,
)  # fmt: skip
RECIPES = {
    "rtn": Recipe("RTN"),
    "smoothquant": Recipe("SmoothQuant", smooth=("qkv", "ug")),
    "quarot": QUAROT,
    "quarot-best": QUAROT_BEST,
    "quarot-learned": replace(QUAROT_BEST, label="QuaRot, best, learned", layerwise=True, tune=True),
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
    "deploy": replace(
        BEST, label="Deploy: for engines, W4 in groups of 32, A8", online=(), a_clip=None, o_per_head=False,
        w_groupsize=32, a_bits=8, refine=(),
    ),
}  # fmt: skip
SMOOTHED_BY_CHOICE = ("jointquant", "jointquant-best", "jointquant-online", "control", "deploy")  # by `use_smooth`
