"""How the workbook's figures look: one style file, and one colour a method in all of them."""

from contextlib import contextmanager
from functools import cache

import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

STYLE = "jqlib.lab.workbook"
COLOURS = {  # mostly Okabe and Ito's, by how a method's name begins: of several that fit, the longest
    "FP": "#000000", "none": "#7F7F7F", "as it is": "#7F7F7F", "RTN": "#7F7F7F", "SmoothQuant": "#B0B0B0",
    "Hadamard": "#0072B2", "rotated": "#0072B2", "QuaRot": "#0072B2", "Control": "#56B4E9", "DartQuant": "#E69F00",
    "SGD": "#E69F00", "sgd": "#A6761D", "adam": "#CC79A7", "SpinQuant": "#CC79A7",
    "cayley": "#8B5E9E", "OSTQuant": "#8B5E9E", "joint": "#009E73", "JointQuant": "#009E73", "whip": "#009E73",
    "range": "#999933", "joint, range": "#999933", "kurtosis": "#CC79A7", "lp": "#5F9EA0", "quant_error": "#A0522D",
    "JointQuant, best": "#D55E00", "output": "#882255", "greedy": "#44546A", "JointQuant, online": "#F0C808",
    "Hadamard online": "#1B3A57", "one grid per token": "#7F7F7F", "one grid per head": "#333333",
}  # fmt: skip

KINDS = {"qkv": "#0072B2", "o": "#009E73", "ug": "#56B4E9", "down": "#D55E00"}  # of site


@contextmanager
def styled():
    """A context, or by ``@styled()`` a function, in the workbook's style.

    A notebook's backend makes pyplot interactive when it is loaded. Loaded within the style, that would be undone
    on leaving, and the notebook would show its first figure only.
    """
    _load_backend()
    with plt.style.context(STYLE):
        yield


def colour_of(method: str) -> str | None:
    """The colour that a method has in every figure; None, the next of the style's, for one that has none."""
    known = [name for name in COLOURS if method.startswith(name)]
    return COLOURS[max(known, key=len)] if known else None


def plain_decades(axis) -> None:
    """1, 3, 10, … along a logarithmic axis on which all is drawn, and more on a short one."""
    low, high = axis.get_view_interval()
    steps = (1, 3) if high > 100 * low else (1, 2, 5) if high > 20 * low else (1, 1.5, 2, 3, 5, 7)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


@cache
def _load_backend() -> None:
    plt.switch_backend(plt.get_backend())
