"""Which rows notebook 05 makes: methods at the run's bits, and of some of them both halves."""

from dataclasses import replace

from jqlib.config import Config, named
from jqlib.model.load import parameters_of
from jqlib.recipes import RECIPES
from jqlib.transform.grids import OFF

BASE = ("rtn", "quarot", "quarot-best")  # what all others are set beside: always there
FEW = (*BASE, "dartquant", "jointquant", "jointquant-best")
LARGE = 5e8  # parameters: from here on only BASE, the run's recipe and our best, unless others are named
GAINS_STAY = "hadamard-online"  # the norms' gains are not moved into the weights
ELSEWHERE = "deploy"  # at other bits: it has a section of its own
GPTQ_TOO = ("hadamard-online", "dartquant", "jointquant")  # rounded to nearest by default: once more with GPTQ

Row = tuple[Config, str, int, int]  # settings, method, bits of weights and of activations


def methods(config: Config) -> list[str]:
    """By the run's ``recipes``, else by its profile and the model's size; ``recipe`` is among them."""
    own = (config.recipe,)
    if config.recipes:
        asked = named(config.recipes)
        own = () if config.recipe == Config.recipe else own  # the default: nobody asked for it
    elif is_large(config.model):
        asked = ["jointquant-best"]
    elif config.profile == "quick":
        asked = FEW
    else:
        left_out = () if config.profile == "full" else ("quarot-learned", "dartquant-r2")
        asked = [name for name in RECIPES if name not in (*left_out, ELSEWHERE)]
    return [name for name in RECIPES if name in (*BASE, *asked, *own)]


def is_large(model: str) -> bool:
    return parameters_of(model) > LARGE


def plan(config: Config) -> list[Row]:
    """The rows beside FP, those of one method together: they share its rotations."""
    every, w, a = methods(config), config.w_bits, config.a_bits
    full = config.profile == "full" and not config.recipes and not is_large(config.model)
    quick = config.profile == "quick"
    activations = [m for m in FEW if not (quick and m.endswith("best"))]
    weights = FEW[:2] if quick else (*BASE, GAINS_STAY)
    at = {m: RECIPES[m].a_bits or a for m in every}
    rows: list[Row] = [(config, m, w, at[m]) for m in every]
    rows += [(config, m, OFF, at[m]) for m in every if full or m in (*activations, config.recipe)]
    rows += [(config, m, w, OFF) for m in every if full or m in weights]
    rows = list(dict.fromkeys(rows))  # 16 bits asked for: some are the same
    if not quick and config.weights == "rtn" and w < OFF:
        rows += [(replace(config, weights="gptq"), m, w, a) for m in every if m in GPTQ_TOO]
    if full and config.kv_bits != 4:
        rows.append((replace(config, kv_bits=4), "jointquant-best", w, a))  # keys (behind R3) and values in 4 bits too
    return sorted(rows, key=lambda row: every.index(row[1]))
