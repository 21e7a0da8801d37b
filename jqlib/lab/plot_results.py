"""Notebook 05's figures: what is left of the model, and where the loss arises. Plain numbers in, figures out."""

import re
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

from jqlib.lab.plots import forest
from jqlib.lab.style import colour_of, styled

COLUMNS = 96  # letters of a line of text
FULL = 4.0  # nats: from here on a token has the whole colour
DEARER, CHEAPER = "#D55E00", "#0072B2"

PANELS = {  # column -> what it is
    "gap": "ln(PPL / FP), nats per token",
    "kl": "KL from FP, nats per token",
    "paired": "ln(PPL / QuaRot, best),\nnats per token",
}


@styled()
def fidelity(table: pd.DataFrame, label: str, groups: str) -> Figure:
    """A panel per column of PANELS in the table, with its interval (``gap_low`` …): one row per line, those of a group
    together, the best at the top. Values far beyond the others are broken off and written at the edge.
    """
    table = table.sort_values([groups, "gap"]).reset_index(drop=True)
    first = table[groups] != table[groups].shift()
    lines = np.arange(len(table)) + first.cumsum() - 1  # one free above each group
    panels = [name for name in PANELS if name in table and table[name].notna().any()]
    size = (2.2 + 2.5 * len(panels), 1.4 + 0.34 * (lines.max() + 1))
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for axis, name in zip(axes[0], panels, strict=True):
        found = table[[label, name, f"{name}_low", f"{name}_high"]].set_index(lines).dropna(subset=name)
        forest(axis, dict(zip(found.index, found.itertuples(index=False), strict=True)), "{:.2f}", far=2, least=0.5)
        axis.set(xlabel=PANELS[name])
    axes[0, 0].set(yticks=lines, yticklabels=table[label].map(short), ylim=(lines.max() + 0.6, -1.3))
    for y, kind in zip(lines[first], table[groups][first], strict=True):
        axes[0, 0].text(0, y - 0.8, f" {kind}", fontsize=9, style="italic", va="center")
    return figure


def _beside(axis, x: float, y: float, value: float) -> None:
    axis.annotate(f"{value:.2f}", (x, y), (7, 0), textcoords="offset points", va="center", fontsize=9)


def short(name: str) -> str:
    """A method's name without what explains it: ``QuaRot (Hadamard) + GPTQ`` is QuaRot."""
    return re.sub(r" \(.*?\)| \+ GPTQ|:.*", "", name)


@styled()
def road(
    costs: Mapping[str, float], xlabel: str, *, luck: float = 0.0, closed: str = "", since: str = "",
    beside: Mapping[str, float] | None = None,
) -> Figure:  # fmt: skip
    """From the first cost to the last: a bar per step, from what was left before it to what is left after it.

    A first cost far beyond the others is broken off; steps after ``since`` have the colour of our best. ``luck``: a
    change of so much either way may be chance: a grey band around what was left before, and paler bars within it.
    ``closed``: what is written at an arrow from the step ``since`` to the last. ``beside``: costs that are no steps of
    this road, below it.
    """
    names, values = list(costs), np.array(list(costs.values()))
    others = dict(beside or {})
    edge = 1.1 * max(*values[1:], *others.values(), 1e-3)
    figure, axis = plt.subplots(figsize=(7.5, 1.3 + 0.48 * (len(names) + len(others) + bool(closed))))
    _start(axis, values[0], edge)
    for y in range(1, len(values)):
        ours = since in names and y > names.index(since)
        _step(axis, y, values, edge, luck, colour_of("JointQuant, best" if ours else "QuaRot"))
    for y, (name, value) in enumerate(others.items(), len(names)):
        axis.plot([value], [y], "D", color=colour_of(name))
        _beside(axis, value, y, value)
    if closed:
        y, start = len(names) + len(others) - 0.1, costs[since]
        axis.annotate("", (values[-1], y), (start, y), arrowprops={"arrowstyle": "->", "lw": 2})
        axis.text(start + 0.03 * edge, y, closed, va="center")
    if luck:
        axis.fill_between([], [], color="k", alpha=0.13, lw=0, label=f"luck: ±{luck:g}")
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1))
    axis.axvline(0, color="k", lw=1.5)
    rows = [*names, *others]
    axis.set(xlabel=xlabel, xlim=(min(0, 1.1 * values.min()), edge * 1.12), yticks=range(len(rows)),
             yticklabels=rows, ylim=(len(rows) - 0.3 + 0.7 * bool(closed), -0.6))  # fmt: skip
    return figure


def _start(axis, value: float, edge: float) -> None:
    """The road's first bar, from 0; broken off at the edge if it goes beyond."""
    end = min(value, edge)
    axis.barh(0, end, height=0.6, color=colour_of("RTN"), alpha=0.5)
    for x in (0.95, 0.97) if value > edge else ():
        axis.plot([edge * (x - 0.01), edge * (x + 0.01)], [0.33, -0.33], color="w", lw=3)
    axis.text(end, 0, f" {value:.2f}", va="center")


def _step(axis, y: int, values: Sequence[float], edge: float, luck: float, colour: str) -> None:
    """The y-th bar of the road: what was left before it and what is left, and the band of luck around the former."""
    value, change, was = values[y], values[y] - values[y - 1], min(values[y - 1], edge)
    if was < edge:
        axis.barh(y, 2 * luck, left=was - luck, height=0.98, color="k", alpha=0.13, lw=0)
    axis.barh(y, was - value, left=value, height=0.6, color=colour, alpha=0.3 if abs(change) <= luck else 0.75)
    axis.plot([value, value], [y - 0.38, y + 0.38], "k", lw=2)
    axis.text(min(value, was), y, f"{value:.2f} ", va="center", ha="right")
    axis.text(max(was, value) + luck, y, f" {change:+.3f}".replace("-", "−"), va="center", fontsize=9)


@styled()
def coloured_text(words: Sequence[str], extra: Mapping[str, Sequence[float]]) -> Figure:
    """The same words once per method, each the more orange, the more nats it costs beyond FP, the bluer, the fewer.

    ``extra``: by method, one number per word.
    """
    font = get_font(findfont("monospace"))
    words = ["".join(c if font.get_char_index(ord(c)) else "□" for c in w.replace("\n", "⏎ ")) for w in words]
    places, line, column = [], 0, 0
    for word in words:
        if column + len(word) > COLUMNS:
            line, column = line + 1, 0
        places.append((column, line))
        column += len(word)
    rows, width, row = (line + 2.6) * len(extra) + 1, 9.0, 0.2  # inches
    figure = plt.figure(figsize=(width, row * rows), layout="none")
    axis = figure.add_axes((0, 0, 1, 1), xlim=(-1, COLUMNS + 1), ylim=(rows, 0), frame_on=False, xticks=[], yticks=[])
    like = {
        "va": "center",
        "family": "monospace",
        "fontsize": 72 * width / ((COLUMNS + 2) * 0.602),
        "parse_math": False,
    }
    for x, sign, colour in ((0, 1, DEARER), (34, -1, CHEAPER)):
        of = f" {FULL:g} nats {'dearer' if sign > 0 else 'cheaper'} than in FP, or more "
        axis.text(x, 0.7, of, bbox={"fc": colour, "alpha": 0.85, "ec": "none", "pad": 1}, fontsize=9, va="center")
    for i, (name, values) in enumerate(extra.items()):
        top = 2 + i * (line + 2.6)
        axis.text(0, top, name, fontsize=10, fontweight="bold", va="center")
        for word, (x, y), nats in zip(words, places, values, strict=True):
            colour, alpha = DEARER if nats > 0 else CHEAPER, 0.85 * min(abs(nats) / FULL, 1)
            axis.add_patch(Rectangle((x, top + y + 0.6), len(word), 0.9, color=colour, alpha=alpha, lw=0))
            axis.text(x, top + y + 1.05, word, **like)
    return figure


@styled()
def by_position(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """What a token costs beyond FP by where it stands in its window: `told.by_position`'s table of each method, a bar
    for one standard error over windows.
    """
    figure, axis = plt.subplots(figsize=(7.5, 3.6))
    for name, table in tables.items():
        middle = np.sqrt(table["first"] * table["last"])
        axis.errorbar(middle, table.extra, yerr=table.error, fmt="o-", capsize=3, label=name, color=colour_of(name))
    axis.axhline(0, color="k", lw=1)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel="position in the window, tokens (log)", ylabel="loss beyond FP's,\nnats per token")
    axis.legend(loc="best")
    return figure


@styled()
def over_depth(panels: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """How far hidden states are off behind every layer, in per cent: a panel per kind of token, a line per method."""
    figure, axes = plt.subplots(1, len(panels), figsize=(8, 3.4), squeeze=False, sharey=True)
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for name, values in lines.items():
            axis.plot(values, label=name, color=colour_of(name))
        axis.set(title=title, xlabel="behind layer", ylim=(0, None))
        axis.yaxis.set_major_formatter(PercentFormatter(1))
    axes[0, 0].set_ylabel("‖h − h of FP‖ / ‖h of FP‖")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncol=4)
    return figure


@styled()
def sites(table: pd.DataFrame) -> Figure:
    """The KL that one rounded site costs: layers across, kinds of site down; each cell's number is in millinats."""
    figure, axis = plt.subplots(figsize=(8, 2.6))
    image = axis.imshow(1e3 * table.T, aspect="auto", norm=PowerNorm(0.5, 0))
    axis.set(xlabel="layer", yticks=range(table.shape[1]), yticklabels=table.columns, ylabel="site")
    axis.grid(False)
    figure.colorbar(image, label="KL, 1/1000 nats\nper token (square root)")
    return figure


@styled()
def attention_maps(maps: Mapping[str, np.ndarray]) -> Figure:
    """Who looks at whom, (tokens, tokens) each: rows look, columns are looked at."""
    figure, axes = plt.subplots(1, len(maps), figsize=(1.9 * len(maps) + 0.9, 2.7), squeeze=False, sharey=True)
    for axis, (name, table) in zip(axes[0], maps.items(), strict=True):
        image = axis.imshow(np.where(np.tri(len(table)) > 0, table, np.nan), norm=PowerNorm(0.5, 0, 1))
        axis.set(title=name, xlabel="token looked at")
        axis.grid(False)
    axes[0, 0].set_ylabel("token that looks")
    bar = figure.colorbar(image, ax=axes, label="attention (square-root scale)")
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    return figure


@styled()
def learning(curves: Mapping[str, Sequence[float]]) -> Figure:
    """A loss per step of learning, a line each: `before`, of the same text by the model as it was, and after."""
    figure, axis = plt.subplots(figsize=(7.5, 3.2))
    for (name, values), look, like in zip(curves.items(), ("o--", "o-"), ("RTN", "JointQuant, best"), strict=True):
        axis.plot(range(1, len(values) + 1), values, look, ms=4, label=name, color=colour_of(like))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel="step (each on other text)", ylabel="KL from FP,\nnats per token", ylim=(0, None))
    axis.legend()
    return figure
