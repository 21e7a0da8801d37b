"""The workbook's figures, in one style. Each function takes plain numbers and returns the figure."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jqlib.lab.style import KINDS, colour_of, plain_decades, styled

TOKENS = 96  # of a surface
FEWEST = 5  # values of a bin


@styled()
def surfaces(tables: Mapping[str, np.ndarray]) -> Figure:
    """|activation| over token × channel, (tokens, channels) each, of the first TOKENS, on one shared height; of 4
    neighbouring channels the largest is drawn."""
    height = max(np.abs(t[:TOKENS]).max() for t in tables.values())
    figure = plt.figure(figsize=(4.6 * len(tables), 3.9), layout="none")
    for i, (title, table) in enumerate(tables.items()):
        axis = figure.add_axes((0.02 + i / len(tables), 0.08, 0.88 / len(tables), 0.84), projection="3d")
        z = np.abs(table[:TOKENS, : table.shape[1] // 4 * 4])
        z = z.reshape(len(z), -1, 4).max(2)
        channel, token = np.meshgrid(4 * np.arange(z.shape[1]), np.arange(z.shape[0]))
        axis.plot_surface(channel, token, z, cmap="viridis", vmin=0, vmax=height, rcount=len(z), ccount=200)
        axis.set_title(f"{title}\n(of 4 neighbouring channels the largest)", fontsize=10)
        axis.set(zlim=(0, height), xticks=range(0, table.shape[1], 200))
        axis.set_xlabel("channel", labelpad=7)
        axis.set_ylabel("token", labelpad=7)
        axis.set_zlabel("|activation|", labelpad=5)
        axis.set_box_aspect(None, zoom=1.05)
    return figure


@styled()
def against_gaussian(samples: Mapping[str, np.ndarray]) -> Figure:
    """Densities of samples, each scaled to unit variance, beside the Gaussian's, on a log axis; bins that hold less
    than FEWEST values are left out."""
    most = max(np.abs(x / x.std()).max() for x in samples.values())
    edges = np.arange(-np.ceil(most), np.ceil(most) + 0.1, 0.4)
    middle = (edges[1:] + edges[:-1]) / 2
    figure, axis = plt.subplots(figsize=(7.5, 4))
    for name, x in samples.items():
        count, _ = np.histogram(x / x.std(), edges)
        density = count / (len(x) * (edges[1] - edges[0]))
        axis.semilogy(middle, np.where(count >= FEWEST, density, np.nan), label=name, color=colour_of(name))
    axis.semilogy(middle, np.exp(-(middle**2) / 2) / np.sqrt(2 * np.pi), "k--", lw=1, label="Gaussian")
    axis.set(xlabel="value / standard deviation", ylabel="density", xlim=(-most, most), ylim=(1e-5, 5))
    axis.legend()
    return figure


@styled()
def signs(matrices: Mapping[str, np.ndarray]) -> Figure:
    """Matrices of ±1, by their order: dark +1, light −1."""
    figure, axes = plt.subplots(1, len(matrices), figsize=(3 * len(matrices), 3), squeeze=False)
    for axis, (order, H) in zip(axes[0], matrices.items(), strict=True):
        axis.imshow(H, cmap="cividis_r", vmin=-1.4, vmax=1.4)
        axis.set(title=f"order {order}", xticks=[], yticks=[], xlabel="dark +1, light −1")
        axis.grid(False)
    return figure


@styled()
def bound(before: Sequence[float], after: Sequence[float], line: float, bits: int) -> Figure:
    """Each token's relative rounding error, before and after a rotation, in per cent, and a bound on the second."""
    figure, axis = plt.subplots(figsize=(7.5, 4.3))
    axis.plot(100 * np.asarray(before), 100 * np.asarray(after), ".", ms=2, alpha=0.3, rasterized=True)
    axis.axhline(100 * line, color="k", ls="--", lw=1, label=f"8 ln n / (12 · {2**bits - 1}²) = {line:.2%}")
    top = 1.05 * 100 * max(*before, *after)
    axis.plot([0, top], [0, top], color="0.6", lw=1, label="as large as before")
    axis.set(xlabel=f"{bits}-bit error of a token as it is (%)", ylabel="its error, rotated (%)", xlim=(0, top))
    axis.set(ylim=(0, 100 * max(line * 1.5, max(after) * 1.05)))
    axis.legend(loc="upper right")
    return figure


@styled()
def by_layer(columns: Mapping[str, Sequence[float]], ylabel: str) -> Figure:
    """One line a name over the layers, log axis."""
    figure, axis = plt.subplots(figsize=(7.5, 4.3))
    for name, values in columns.items():
        colour = KINDS.get(name) or colour_of(name)
        axis.plot(range(len(values)), values, marker="o", ms=3, label=name, color=colour)
    axis.set(xlabel="layer", ylabel=ylabel, yscale="log")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    plain_decades(axis.yaxis)
    figure.legend(loc="outside lower center", ncol=2)
    return figure


@styled()
def bands(curves: Mapping[str, list[list[dict]]], ylabel: str) -> Figure:
    """The lowest loss so far against seconds since the call, log axis, of several seeds: a method's median, and a band
    of all."""
    figure, axis = plt.subplots(figsize=(7.5, 4))
    for name, runs in curves.items():
        ends = [(run[0]["seconds"], run[-1]["seconds"]) for run in runs]
        grid = np.geomspace(max(e[0] for e in ends), min(e[1] for e in ends), 60)  # where all runs are under way
        lowest = [np.minimum.accumulate([h["loss"] for h in run]) for run in runs]
        lines = [np.interp(grid, [h["seconds"] for h in run], y) for run, y in zip(runs, lowest, strict=True)]
        axis.semilogx(grid, np.median(lines, 0), label=name, color=colour_of(name))
        axis.fill_between(grid, np.min(lines, 0), np.max(lines, 0), alpha=0.25, color=colour_of(name))
    axis.set(xlabel="seconds since the call (log)", ylabel=f"{ylabel} (axis cut)")
    plain_decades(axis.xaxis)
    figure.legend(loc="outside lower center", ncol=2)
    return figure


def forest(
    axis, rows: Mapping[int, tuple], form: str = "{:+z.2f}", *, far: float = math.inf, least: float = 0.0,
    band: float | None = None, beyond: Callable[[float], str] = "{:.2f}".format,
) -> None:  # fmt: skip
    """A method's (value, low, high) in each row, written behind its interval; an end that is NaN is not known.

    Values ``far`` times further out than the one before them, and than ``least``, are written at the edge, as
    ``beyond`` says. Hollow: within ``band`` of 0, or the interval holds 0 (None: none is).
    """
    found = np.array([row[1:] for row in rows.values()], dtype=float)
    sizes = np.abs(found[:, 0])
    end = next((low for low, high in pairwise(sorted(sizes)) if high > far * max(low, least)), max(sizes))
    shown = [*found[sizes <= end].flat, band or 1e-3, -(band or 1e-3)]
    left, right = np.nanmin(shown), np.nanmax(shown)
    left, right = left - 0.05 * (right - left), right + 0.2 * (right - left)  # room for the last one's number
    near = {"textcoords": "offset points", "va": "center", "fontsize": 9}
    for (y, (name, *_)), (value, low, high) in zip(rows.items(), found, strict=True):
        colour = colour_of(name) or "#333333"
        if abs(value) > end:
            edge, mark, side, off = (right, ">", "right", -7) if value > 0 else (left, "<", "left", 7)
            axis.plot(edge, y, mark, color=colour, clip_on=False)
            axis.annotate(beyond(value), (edge, y), (off, 0), ha=side, **near)
            continue
        hollow = band is not None and (abs(value) <= band or low <= 0 <= high)
        axis.errorbar(value, y, xerr=[[value - low], [high - value]], fmt="o", capsize=3, color=colour,
                      mfc="white" if hollow else colour)  # fmt: skip
        box = {"fc": "white", "ec": "none", "pad": 0.5}
        axis.annotate(form.format(value), (np.nanmax([value, high]), y), (7, 0), bbox=box, **near)
    axis.axvline(0, color="k", ls="--", lw=1, zorder=0.9)
    axis.set(xlim=(left, right))
    axis.xaxis.set_major_locator(MaxNLocator(5))
