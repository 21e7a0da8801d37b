"""Figures of single tokens: the grid that rounding lays over their numbers, before and after a rotation."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from jqlib.lab.style import colour_of, styled
from jqlib.transform.grids import quantize_activation, rounding_errors

KEPT, ZEROED, GRID = "#0072B2", "#D55E00", "0.82"
DOTS = (ZEROED, "becomes 0"), (KEPT, "keeps a value")
TALLEST = 8  # entries of a token that are not counted as ordinary
MOST_LINES = 6  # bits: a finer grid is not drawn


def levels(token: np.ndarray, bits: int) -> np.ndarray:
    """The points of a token's grid, (2 ** bits,); none for a grid too fine to draw."""
    low, high = min(token.min(), 0), max(token.max(), 0)
    step = (high - low) / (2**bits - 1)
    return step * (np.arange(2**bits) + np.round(low / step)) if bits <= MOST_LINES and step > 0 else np.empty(0)


def zeroed(token: np.ndarray, bits: int) -> np.ndarray:
    """Which entries of a token become 0, (n,), bool."""
    return quantize_activation(torch.from_numpy(token.copy())[None], bits)[0].numpy() == 0


def ordinary_loss(x: Tensor, R: Tensor | None, bits: int) -> Tensor:
    """What rounding behind ``R``, turned back, takes from the energy of each token's channels but its `TALLEST`: 1 is
    all of it. ``x``: (tokens, n); (tokens,)."""
    y = x if R is None else x @ R
    lost = quantize_activation(y, bits) - y
    lost = lost if R is None else lost @ R.T
    ordinary = x.abs().argsort(1)[:, : x.shape[1] - TALLEST]
    return lost.gather(1, ordinary).square().sum(1) / x.gather(1, ordinary).square().sum(1)


@styled()
def one_token(x: Tensor, R: Tensor, bits: int = 4) -> Figure:
    """A token, (n,), as it is and rotated by ``R``: all of it on one axis, and the same enlarged to the rotated one's
    range; lines are the grid, colours say what becomes 0."""
    turned = x @ R
    losses = {"as it is": ordinary_loss(x[None], None, bits), "rotated": ordinary_loss(x[None], R, bits)}
    near = 1.15 * turned.abs().max().item()
    figure, axes = plt.subplots(2, 2, figsize=(7.5, 5.6), sharex=True, sharey="row", height_ratios=(3, 2))
    for (far_axis, near_axis), (name, lost), y in zip(axes.T, losses.items(), (x, turned), strict=True):
        y = y.numpy()
        zeros = zeroed(y, bits)
        _draw(far_axis, y, bits, zeros)
        _draw(near_axis, y, bits, zeros)
        error = rounding_errors(torch.from_numpy(y)[None], bits).item()
        far_axis.set_title(f"{name}: {zeros.sum()} of {len(y)} numbers become 0 ({zeros.mean():.0%})\n"
                           f"error {error:.1%}; ordinary channels lose {lost.item():.0%}",
                           fontsize=9.5)  # fmt: skip
        near_axis.set(xlabel="channel", ylim=(-near, near))
    axes[0, 0].set_ylabel("value")
    axes[1, 0].set_ylabel("value, enlarged")
    handles = [plt.Line2D([], [], color=c, ls="", marker="o", ms=4, label=what) for c, what in reversed(DOTS)]
    handles += [plt.Line2D([], [], color=GRID, label=f"the {2**bits} points of the grid")] if bits <= MOST_LINES else []
    figure.legend(handles=handles, loc="outside lower center", ncol=3)
    return figure


def _draw(axis, y: np.ndarray, bits: int, zeros: np.ndarray) -> None:
    for level in levels(y, bits):
        axis.axhline(level, color=GRID, lw=0.8, zorder=0)
    for mask, (colour, what) in zip((zeros, ~zeros), DOTS, strict=True):
        axis.plot(np.flatnonzero(mask), y[mask], ".", ms=3, color=colour, label=what)
    axis.grid(False)


class Turning:
    """The frames of `jqlib.lab.geodesic.film`: a token at some t, on the axis of its start and on that of its end."""

    def __init__(self, start: np.ndarray, end: np.ndarray, bits: int):
        self.bits, self.limits = bits, (1.06 * np.abs(start).max(), 1.2 * np.abs(end).max())
        with styled():
            self.figure, self.axes = plt.subplots(1, 2, figsize=(7.5, 3.6), layout="none")
            self.figure.subplots_adjust(0.09, 0.14, 0.985, 0.8, wspace=0.17)
            self.head = self.figure.suptitle("", fontsize=11.5, y=0.97)
        plt.close(self.figure)

    @styled()
    def show(self, y: np.ndarray, t: float) -> None:
        """The frame of a token, (n,), that is the share ``t`` of the way."""
        zeros = zeroed(y, self.bits)
        error = rounding_errors(torch.from_numpy(y)[None], self.bits).item()
        ends = {0.0: "as it is", 1.0: "rotated"}
        self.head.set_text(f"{ends.get(t, f'{t:.0%} of the way to R')}:  {zeros.mean():.0%} of its {len(y)} numbers "
                           f"become 0 (orange),  error {error:.1%}")  # fmt: skip
        for axis, limit, title in zip(self.axes, self.limits, ("all of it", "enlarged"), strict=True):
            axis.clear()
            _draw(axis, y, self.bits, zeros)
            axis.set(xlabel="channel", ylim=(-limit, limit), xlim=(-8, len(y) + 7))
            axis.set_title(title, fontsize=10)
        self.axes[0].set_ylabel("value")


@styled()
def explored(sides: Mapping[str, tuple[Tensor, np.ndarray]], words: Sequence[str], token: int, bits: int) -> Figure:
    """The explorer's still: each token's error, and one token, under two rotations. ``sides``: by name, the errors of
    all tokens, (tokens,), and the chosen token's numbers, (n,)."""
    figure, axes = plt.subplot_mosaic("AA;BC", figsize=(9, 5.4), height_ratios=(2, 3))
    for (name, (error, _)), marker in zip(sides.items(), ("o", "s"), strict=True):
        shown = 100 * error.numpy()
        axes["A"].plot(shown, marker, ms=2.5, color=colour_of(name), label=f"{name}: mean {error.mean():.2%}")
        axes["A"].plot(token, shown[token], marker, ms=8, mfc="none", color=colour_of(name) or "k")
    axes["A"].set(xlabel="token", ylabel=f"{bits}-bit error (%)", ylim=(0, None))
    axes["A"].set_title(f"chosen: token {token}, {shortened(words[token])}", parse_math=False)
    axes["A"].set_ylim(0, 1.3 * axes["A"].get_ylim()[1])
    axes["A"].legend(loc="upper right", ncol=2, markerscale=3)
    most = 1.06 * max(np.abs(y).max() for _, y in sides.values())
    for key, (name, (error, y)) in zip("BC", sides.items(), strict=True):
        zeros = zeroed(y, bits)
        _draw(axes[key], y, bits, zeros)
        axes[key].set_title(f"{name}: {zeros.mean():.0%} become 0, error {error[token]:.2%}", fontsize=10)
        axes[key].set(xlabel="channel", ylim=(-most, most))
    axes["B"].set_ylabel("value")
    figure.legend(*axes["C"].get_legend_handles_labels(), loc="outside lower center", ncol=2, markerscale=3)
    return figure


def shortened(word: str) -> str:
    """A token's text in quotes, as far as it fits beside a bar."""
    return repr(word if len(word) <= 12 else word[:11] + "…")
