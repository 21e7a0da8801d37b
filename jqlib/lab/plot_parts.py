"""Figures of notebooks 04 and 06: which part pays, and which part buys what. Plain numbers in, the figure out."""

import math
from collections.abc import Mapping, Sequence
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import from_numpy

from jqlib.lab.plots import forest
from jqlib.lab.style import colour_of, plain_decades, styled
from jqlib.transform.grids import round_to_nearest

Pair = tuple[Sequence[float], Sequence[float]]  # before and after

PARTS = {"activations": "#CC79A7", "weights": "#56B4E9", "both": "#333333"}
FAR = 3  # so many times further out than the rest, and a value is written instead of drawn


@styled()
def over_alpha(panels: Mapping[str, pd.DataFrame], none: Mapping[str, Mapping[str, float]]) -> Figure:
    """Relative errors over α, in per cent, log axis: a panel per name, a line per column ("weights", "weights, rms").

    What follows a comma in a column's name is drawn dashed. ``none``: the same errors without smoothing, at the left.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(3.9 * len(panels), 3.9), sharey=True, squeeze=False)
    for axis, (name, table) in zip(axes[0], panels.items(), strict=True):
        for column, errors in table.items():
            part, _, how = column.partition(", ")
            look = {"color": PARTS[part], "ls": "--" if how else "-", "marker": "o", "ms": 3}
            axis.plot(table.index, 100 * errors, **look, label=column)
        for part, error in none[name].items():
            axis.plot(-0.15, 100 * error, "D", ms=5, color=PARTS[part])
        axis.axvline(-0.07, color="0.8", lw=0.8)
        axis.set(title=name, xlabel="α", yscale="log", xlim=(-0.24, 1.05))
        axis.set_xticks([-0.15, 0, 0.25, 0.5, 0.75, 1], ["none", "0", "0.25", "0.5", "0.75", "1"])
        plain_decades(axis.yaxis)
    axes[0, 0].set_ylabel("error at the output (%)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=2)
    return figure


@styled()
def weight_group(groups: Mapping[str, np.ndarray], bits: int) -> Figure:
    """Weights that share a scale, each divided by it: one shared axis in steps of the grid. Those in the grey band
    become 0; dashed, the ends of the grid."""
    figure, axes = plt.subplots(1, len(groups), figsize=(4.2 * len(groups), 3.6), sharey=True, squeeze=False)
    for axis, (name, group) in zip(axes[0], groups.items(), strict=True):
        rounded, scale = round_to_nearest(from_numpy(group)[None], bits, len(group))
        zero, steps = rounded[0].numpy() == 0, group / abs(scale.item())
        axis.axhspan(-0.5, 0.5, color="0.9", lw=0)
        for end in (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1):
            axis.axhline(end, color="0.4", ls="--", lw=0.8)
        for lost, colour in ((True, "0.55"), (False, PARTS["weights"])):
            axis.plot(np.flatnonzero(zero == lost), steps[zero == lost], "o", ms=4, color=colour)
        axis.set(title=f"{name}\n{zero.mean():.0%} of its {len(group)} weights become 0")
        axis.set(xlabel="channel of the group (dashed: ends of the grid)")
        axis.grid(False)
    axes[0, 0].set_ylabel("weight / step of its grid")
    return figure


@styled()
def before_and_after(panels: Mapping[str, Mapping[str, Pair]], ylabel: str) -> Figure:
    """By layer, log axis: a panel per name, a colour per part ("activations", "weights"), before (dashed) and after."""
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.9), sharey=True, squeeze=False)
    for axis, (name, parts) in zip(axes[0], panels.items(), strict=True):
        for part, pair in parts.items():
            for when, values, dash in zip(("before", "after"), pair, ("--", "-"), strict=True):
                axis.plot(values, dash, marker="o", ms=3, color=PARTS[part], label=f"{part}, {when}")
        axis.set(title=name, xlabel="layer", yscale="log")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        plain_decades(axis.yaxis)
    axes[0, 0].set_ylabel(ylabel)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncol=4)
    return figure


@styled()
def changes(table: pd.DataFrame, reference: str, band: float = 0.0) -> Figure:
    """ln(PPL/reference's), ``value`` with [``low``, ``high``], one row per ``label`` below its ``group``.

    ``band``: what chance does, nats to either side. Hollow: inside it, or the interval holds 0. Values that lie far
    out are written at the edge.
    """
    rows = []  # a group's name alone, then a tuple for each of its changes
    for group, of in table.groupby("group", sort=False):
        rows += [(group,), *of[["label", "value", "low", "high"]].itertuples(index=False)]
    figure, axis = plt.subplots(figsize=(7.5, 1.2 + 0.32 * len(rows)))
    if band:
        axis.axvspan(-band, band, color="0.88", lw=0, label=f"luck: ±{band:.2g}")
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1))
    least = max(2 * band, table.value.abs().quantile(interpolation="lower"))
    forest(axis, {y: row for y, row in enumerate(rows) if len(row) > 1}, "{:+.3f}", far=FAR, least=least, band=band,
           beyond=lambda value: f"{value:+.2f} (PPL × {math.exp(min(value, 700)):.3g})")  # fmt: skip
    axis.set(xlabel=f"ln(PPL / {reference}'s), nats per token\n← better", ylim=(len(rows) - 0.4, -0.6))
    axis.set_yticks(range(len(rows)), [fill(row[0], 36) for row in rows])
    for tick, row in zip(axis.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("normal" if len(row) > 1 else "bold")
    axis.yaxis.grid(False)
    return figure


@styled()
def bits_curve(lines: Mapping[str, Mapping[int, float]], ylabel: str, guessing: float) -> Figure:
    """Nats over bits, linear axis, a line per part, every value written: the largest of a place above its point.

    ``guessing``: what a model loses that takes all tokens for equally likely. Beyond it values are written at the top.
    """
    every = [value for values in lines.values() for value in values.values()]
    guessing = guessing if min(every) <= guessing else math.inf  # this model is worse itself
    top = max(0.05, 1.15 * max(value for value in every if value <= guessing))
    figure, axis = plt.subplots(figsize=(7.5, 4))
    for part, values in lines.items():
        bits = sorted(values)
        axis.plot(bits, [values[b] for b in bits], marker="o", color=PARTS[part], label=part)
        for b in bits:
            above = part == max(lines, key=lambda name: lines[name].get(b, -math.inf))
            place = {"xytext": (4, 6), "ha": "left"} if above else {"xytext": (-4, -14), "ha": "right"}
            if values[b] > guessing:
                axis.plot(b + (0.05 if above else -0.05), top, "^", color=PARTS[part], clip_on=False)
                place = {"xytext": (8, -6 if above else -20), "ha": "left"}
            place |= {"textcoords": "offset points", "color": PARTS[part]}
            axis.annotate(f"{values[b]:z.2f}", (b, min(values[b], top)), **place)
    axis.set(xlabel="bits (▲: worse than guessing)", ylabel=ylabel, ylim=(min(0, *every) - 0.1 * top, top))
    axis.set_xticks(sorted({b for values in lines.values() for b in values}))
    axis.axhline(0, color="k", ls="--", lw=1)
    axis.margins(0.08)
    axis.legend()
    return figure


@styled()
def strip(values: Mapping[str, Sequence[float]], xlabel: str) -> Figure:
    """A row per name, a dot per seed, a bar at their mean; ``xlabel``: of what."""
    figure, axis = plt.subplots(figsize=(7.5, 1.2 + 0.42 * len(values)))
    for y, (name, of) in enumerate(values.items()):
        axis.plot(of, [y] * len(of), "o", ms=7, alpha=0.7, color=colour_of(name))
        axis.plot(np.mean(of), y, "|", ms=18, mew=2, color="k")
    axis.set(xlabel=f"{xlabel}\na dot per seed, a bar at their mean", ylim=(len(values) - 0.5, -0.5))
    axis.set_yticks(range(len(values)), values)
    return figure


@styled()
def efforts(table: pd.DataFrame) -> Figure:
    """Share of a gap closed (``value`` [``low``, ``high``]) over ``tokens`` (log axis): a line per ``label``, at each
    point its ``minutes``."""
    figure, axis = plt.subplots(figsize=(7.5, 4.4))
    for i, label in enumerate(dict.fromkeys(table.label)):
        of, colour = table[table.label == label].sort_values("tokens"), colour_of(label)
        bars = 100 * np.stack([of.value - of.low, of.high - of.value])
        axis.errorbar(of.tokens, 100 * of.value, bars, marker="os^Dv*"[i % 6], capsize=3, color=colour, label=label)
        for at, value, minutes in zip(of.tokens, of.value, of.minutes, strict=True):
            side = {"xytext": (-6, 4), "ha": "right"} if i % 2 else {"xytext": (6, -12), "ha": "left"}
            axis.annotate(f"{minutes:.0f} min", (at, 100 * value), textcoords="offset points", fontsize=8, **side)
    axis.set(xscale="log", xlabel="tokens that each stage learns from", ylabel="share of the gap closed (%)")
    axis.set_xticks(sorted(set(table.tokens)), [f"{tokens:,}" for tokens in sorted(set(table.tokens))])
    axis.minorticks_off()
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncol=2)
    return figure
