"""Figures of notebooks 02 and 03: what rotations do, and how one is found. Plain numbers in, a figure out."""

from collections.abc import Mapping, Sequence
from itertools import accumulate

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jqlib.lab.diagram import COLOURS
from jqlib.lab.plots import forest
from jqlib.lab.style import KINDS, colour_of, plain_decades, styled

GAUSSIAN = 3  # its kurtosis
STEPS = {"color": "#000000", "marker": "o"}, {"color": "#707070", "marker": "s"}


@styled()
def kurtosis_by_layer(before: Sequence[float], after: Mapping[str, Sequence[float]]) -> Figure:
    """Left: as it is beside the first of the rotations, on a log axis. Right: all rotations, on a linear one."""
    first = next(iter(after))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for axis, lines in ((left, {"as it is": before, first: after[first]}), (right, after)):
        for name, values in lines.items():
            axis.plot(values, marker="o", ms=3, label=name, color=colour_of(name))
        axis.axhline(GAUSSIAN, color="k", ls="--", lw=1, label="a Gaussian's")
        axis.set(xlabel="layer", ylabel="kurtosis")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set(yscale="log", title="before and after")
    plain_decades(left.yaxis)
    right.set(ylim=(0, None), title="after")
    known = {line.get_label(): line for axis in (left, right) for line in axis.lines}
    figure.legend(known.values(), known, loc="outside lower center", ncol=3)
    return figure


@styled()
def laws(sites: pd.DataFrame, bits: int) -> Figure:
    """A dot for each site and rotation: rounding error (%) against (range/rms)², beside the law of uniform noise, and
    against kurtosis. Columns ``rotation``, ``width``, ``kurtosis``, ``error``."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    for axis, column in zip(axes, ("width", "kurtosis"), strict=True):
        for name, of in sites.groupby("rotation", sort=False):
            axis.plot(of[column], 100 * of.error, ".", ms=6, alpha=0.7, label=name, color=colour_of(name))
        axis.set(xlim=(0, None), ylim=(0, None))
    end = np.array([0, sites.width.max()])
    steps = 2**bits - 1
    axes[0].plot(end, 100 * end / (12 * steps**2), "k--", lw=1, label=f"(range / rms)² / {12 * steps**2}")
    axes[0].set(xlabel="(range / rms)², mean over tokens", ylabel=f"{bits}-bit rounding error (%)")
    axes[1].set(xlabel="kurtosis")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=5)
    return figure


@styled()
def directions(parts: Mapping[str, np.ndarray]) -> Figure:
    """Where rotations send two unit vectors, (2, n) each: a dot for each channel, in units of 1/√n."""
    figure, axes = plt.subplots(1, len(parts), figsize=(3.3 * len(parts), 3.7), sharey=True, squeeze=False)
    reach = 1.1 * max(np.abs(part).max() * part.shape[1] ** 0.5 for part in parts.values())
    for axis, (name, part) in zip(axes[0], parts.items(), strict=True):
        axis.plot(*(part * part.shape[1] ** 0.5), ".", ms=3, color=colour_of(name))
        axis.axhline(0, color="0.7", lw=0.8, zorder=0)
        axis.axvline(0, color="0.7", lw=0.8, zorder=0)
        axis.set(title=name, xlabel="main direction (1/√n)", xlim=(-reach, reach), ylim=(-reach, reach))
        axis.set_aspect("equal")
    axes[0, 0].set_ylabel("second direction (1/√n)")
    return figure


@styled()
def differences(panels: Mapping[str, Mapping[str, Sequence[float]]], base: str) -> Figure:
    """Paired differences from ``base`` in nats per token, (value, low, high) by panel and name; NaN: an unknown end."""
    names = list(next(iter(panels.values())))
    figure, axes = plt.subplots(1, len(panels), figsize=(10, 1.3 + 0.45 * len(names)), sharey=True, squeeze=False)
    for axis, (xlabel, found) in zip(axes[0], panels.items(), strict=True):
        forest(axis, {y: (name, *found[name]) for y, name in enumerate(names)}, "{:+.3f}")
        axis.set(xlabel=xlabel)
    axes[0, 0].set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5), ylabel=f"against {base}")
    return figure


@styled()
def one_angle(
    angles: Sequence[float], losses: Mapping[str, Sequence[float]], paths: Mapping[str, np.ndarray]
) -> Figure:
    """Losses of a rotation in the plane over its angle (degrees), each by its largest value; below, steps on the first.

    ``paths``: (steps, 2) by name, the angle and the first loss, in its own units.
    """
    figure, (top, below) = plt.subplots(2, 1, figsize=(7.5, 6.2), sharex=True)
    for name, values in losses.items():
        top.plot(angles, np.asarray(values) / max(values), label=name, color=colour_of(name))
    top.set(ylabel="loss / its largest", ylim=(0, 1.05))
    top.legend(loc="lower left", bbox_to_anchor=(0, 1), ncol=len(losses))
    first = next(iter(losses))
    below.plot(angles, losses[first], color="0.75", lw=4, zorder=0)
    for (name, path), look in zip(paths.items(), STEPS, strict=False):
        below.plot(*path.T, ls=":", ms=5, lw=1, label=f"{name}: {len(path) - 1} steps", **look)
    below.set(xlabel="angle (degrees)", ylabel=first, ylim=(0, None), xticks=range(0, 181, 45))
    below.legend(loc="best")
    return figure


def lowest_so_far(history: Sequence[Mapping]) -> list[float]:
    """The lowest loss that a training had reached at each entry of its history."""
    return list(accumulate((entry["loss"] for entry in history), min))


@styled()
def race(histories: Mapping[str, Sequence[Mapping]], loss: str) -> Figure:
    """The lowest loss so far, as its change from the start (%), against seconds (log). A ring: the end."""
    first = min(history[1]["seconds"] for history in histories.values())
    figure, axis = plt.subplots(figsize=(7.5, 4.2))
    for name, history in histories.items():
        start, end = history[0]["loss"], history[-1]
        seconds = [first / 2, *(h["seconds"] for h in history[1:])]
        lowest = [100 * (value / start - 1) for value in lowest_so_far(history)]
        axis.step(seconds, lowest, where="post", label=name, color=colour_of(name))
        axis.plot(end["seconds"], 100 * (end["loss"] / start - 1), "o", ms=10, mfc="none", color=colour_of(name))
    axis.set(xlabel="seconds of training (log); a ring: what is returned", xscale="log")
    axis.set(ylabel=f"{loss} over all tokens, change (%)")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.legend(loc="lower left")
    return figure


@styled()
def site_costs(sites: pd.DataFrame, totals: pd.DataFrame) -> Figure:
    """Nats per token, predicted and measured: left one site rounded at a time (``kind``), right all, by rotation.

    ``sites``: columns ``kind``, ``predicted``, ``measured``, thousandths are drawn. ``totals``: by rotation.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6))
    for kind, of in sites.groupby("kind", sort=False):
        left.plot(1e3 * of.predicted, 1e3 * of.measured, "o", ms=5, alpha=0.7, label=kind, color=KINDS[kind])
    left.set(title="one site rounded at a time", xlabel="predicted (thousandths of a nat per token)")
    left.set(ylabel="measured KL (thousandths of a nat per token)")
    for name, row in totals.sort_values("measured", ascending=False).iterrows():
        right.plot(row.predicted, row.measured, "o", ms=8, label=name, color=colour_of(name))
    right.set(title="all of them at once", xlabel="predicted (nats per token)", ylabel="measured KL (nats per token)")
    for axis, table, unit in ((left, sites, 1e3), (right, totals, 1)):
        top = 1.25 * unit * table[["predicted", "measured"]].to_numpy().max()
        axis.plot([0, top], [0, top], color="0.6", lw=1, label="predicted = measured", zorder=0)
        axis.set(xlim=(0, top), ylim=(0, top))
    left.legend()
    right.legend(loc="lower right")
    return figure


@styled()
def before_and_after(pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], xlabel: str, ylabel: str) -> Figure:
    """One dot for each head: its error (%) before, across, and after, up. Below the diagonal it is the lower for it."""
    figure, axes = plt.subplots(1, len(pairs), figsize=(3.4 * len(pairs), 3.9), squeeze=False)
    for axis, (name, (before, after)) in zip(axes[0], pairs.items(), strict=True):
        top = 105 * max(before.max(), after.max())
        colour = next((colour for part, colour in COLOURS.items() if part in name), colour_of(name))
        axis.plot(100 * before.ravel(), 100 * after.ravel(), ".", ms=5, alpha=0.7, color=colour)
        axis.plot([0, top], [0, top], color="0.6", lw=1, zorder=0)
        axis.set(title=f"{name}\nlower in {(after < before).mean():.0%}", xlim=(0, top), ylim=(0, top))
        axis.set(xlabel=xlabel)
        axis.set_aspect("equal")
    axes[0, 0].set_ylabel(ylabel)
    return figure
