"""The workbook's figures, in one style. Each function takes plain numbers and returns the figure."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator
from torch import Tensor

from jqlib.lab.style import colour_of, styled
from jqlib.transform.grids import quantize_activation


def heatmaps(tables: Mapping[str, pd.DataFrame], bar: str, rows: str = "layer") -> Figure:
    """Tables side by side (rows down, columns across) on one logarithmic colour scale, which ``bar`` names."""
    high = max(float(t.to_numpy().max()) for t in tables.values()) or 1.0
    low = max(min(float(t.to_numpy().min()) for t in tables.values()), 1e-6 * high)
    with styled():
        figure, axes = plt.subplots(1, len(tables), figsize=(3.2 * len(tables) + 1, 5), sharey=True, squeeze=False)
        for axis, (title, table) in zip(axes[0], tables.items(), strict=True):
            image = axis.imshow(table, aspect="auto", norm=LogNorm(low, high))
            axis.set(title=title, xticks=range(table.shape[1]), xticklabels=table.columns, xlabel=table.columns.name)
            axis.yaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(False)
        axes[0, 0].set_ylabel(rows)
        figure.colorbar(image, ax=axes, label=bar)
        return figure


def surfaces(tables: Mapping[str, np.ndarray], tokens: int = 96) -> Figure:
    """|activation| over token × channel, (tokens, channels) each, on one shared height; of 4 channels the largest."""
    height = max(np.abs(t[:tokens]).max() for t in tables.values())
    with styled():
        figure = plt.figure(figsize=(4.6 * len(tables), 4.4))
        for i, (title, table) in enumerate(tables.items()):
            axis = figure.add_subplot(1, len(tables), i + 1, projection="3d")
            z = np.abs(table[:tokens, : table.shape[1] // 4 * 4])
            z = z.reshape(len(z), -1, 4).max(2)
            channel, token = np.meshgrid(4 * np.arange(z.shape[1]), np.arange(z.shape[0]))
            axis.plot_surface(channel, token, z, cmap="viridis", vmin=0, vmax=height / 3, rcount=len(z), ccount=200)
            axis.set(title=title, xlabel="channel", ylabel="token", zlim=(0, height))
            axis.set_zlabel("|activation|", labelpad=2)
            axis.set_box_aspect(None, zoom=0.86)
        return figure


def against_gaussian(samples: Mapping[str, np.ndarray]) -> Figure:
    """Densities of samples, each scaled to unit variance, beside the Gaussian's, on a log axis."""
    edges = np.linspace(-12, 12, 161)
    middle = (edges[1:] + edges[:-1]) / 2
    with styled():
        figure, axis = plt.subplots(figsize=(7.5, 4))
        for name, x in samples.items():
            density, _ = np.histogram(np.clip(x / x.std(), -12, 12), edges, density=True)
            axis.semilogy(middle, np.where(density > 0, density, np.nan), label=name)
        axis.semilogy(middle, np.exp(-(middle**2) / 2) / np.sqrt(2 * np.pi), "k--", lw=1, label="Gaussian")
        axis.set(xlabel="value / standard deviation (ends gather what lies beyond)", ylabel="density", ylim=(1e-7, 2))
        axis.legend()
        return figure


def what_4_bits_sees(tokens: Mapping[str, np.ndarray], bits: int = 4) -> Figure:
    """One token before and after: its values by channel, and the grid that per-token rounding lays over them."""
    import torch

    with styled():
        figure, axes = plt.subplots(1, len(tokens), figsize=(5.2 * len(tokens), 3.8), squeeze=False)
        for axis, (name, token) in zip(axes[0], tokens.items(), strict=True):
            rounded = quantize_activation(torch.from_numpy(token.copy())[None], bits)[0].numpy()
            step = (max(token.max(), 0) - min(token.min(), 0)) / (2**bits - 1)
            for level in [] if bits > 6 else step * (np.arange(2**bits) + np.round(min(token.min(), 0) / step)):
                axis.axhline(level, color="0.85", lw=0.8, zorder=0)
            error = ((rounded - token) ** 2).sum() / (token**2).sum()
            axis.plot(token, ".", ms=3, label="activation")
            axis.plot(rounded, ".", ms=3, label=f"what {bits} bits see")
            zeros = (rounded == 0).mean()
            axis.set(title=f"{name}\n{zeros:.0%} of its values become 0, error {error:.2%}")
            axis.set(xlabel="channel", ylabel="value")
            axis.grid(False)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncol=2, markerscale=3)
        return figure


def signs(matrices: Mapping[str, np.ndarray]) -> Figure:
    """Matrices of ±1, by their order: dark +1, light −1."""
    with styled():
        figure, axes = plt.subplots(1, len(matrices), figsize=(3 * len(matrices), 3), squeeze=False)
        for axis, (order, H) in zip(axes[0], matrices.items(), strict=True):
            axis.imshow(H, cmap="cividis_r", vmin=-1.4, vmax=1.4)
            axis.set(title=f"order {order}", xticks=[], yticks=[], xlabel="dark +1, light −1")
            axis.grid(False)
        return figure


def bound(before: Sequence[float], after: Sequence[float], line: float, bits: int) -> Figure:
    """Each token's relative rounding error, before and after a rotation, in per cent, and a bound on the second."""
    with styled():
        figure, axis = plt.subplots(figsize=(7.5, 4.3))
        axis.plot(100 * np.asarray(before), 100 * np.asarray(after), ".", ms=2, alpha=0.3, rasterized=True)
        axis.axhline(100 * line, color="k", ls="--", lw=1, label=f"8 ln n / (12 · {2**bits - 1}²) = {line:.2%}")
        top = 1.05 * 100 * max(*before, *after)
        axis.plot([0, top], [0, top], color="0.6", lw=1, label="no gain")
        axis.set(xlabel=f"{bits}-bit error of a token as it is (%)", ylabel="rotated (%)", xlim=(0, top))
        axis.set(ylim=(0, 100 * max(line * 1.5, max(after) * 1.05)))
        axis.legend(loc="upper right")
        return figure


def explored(y: Tensor, words: Sequence[str], bits: int, worst: int = 8) -> Figure:
    """One site's tokens, (tokens, n): their values, the range of each, and the tokens that ``bits`` hurt most.

    Somebody waits for it: axes at fixed places and labels of plain text draw in a third of the time.
    """
    error = (quantize_activation(y, bits) - y).square().sum(1) / y.square().sum(1).clamp(min=1e-20)
    hurt = error.argsort(descending=True)[:worst].flip(0).tolist()
    values, widths = (y / y.std()).flatten().numpy(), (y.amax(1) - y.amin(1)) / y.std()
    with styled():
        figure = plt.figure(figsize=(11, 3.4), layout="none")
        left, middle, right = (figure.add_axes((x, 0.17, 0.22, 0.7)) for x in (0.07, 0.36, 0.77))
        left.stairs(*np.histogram(np.clip(values, -12, 12), 121, (-12, 12), density=True), fill=True)
        left.set(xlabel="value / standard deviation", ylabel="density", yscale="log", ylim=(1e-6, 3))
        left.set_yticks([1, 1e-2, 1e-4, 1e-6], ["1", "1e-2", "1e-4", "1e-6"])
        left.yaxis.set_minor_locator(NullLocator())
        middle.stairs(*np.histogram(widths.numpy(), 40), fill=True)
        middle.set(xlabel="range of a token / standard deviation", ylabel="tokens")
        right.barh(range(len(hurt)), 100 * error[hurt].numpy())
        right.set_yticks(range(len(hurt)), [f"{i}: {shortened(words[i])}" for i in hurt], parse_math=False)
        right.set(xlabel=f"worst tokens' {bits}-bit error (%)")
        right.xaxis.set_major_locator(MaxNLocator(4))
        figure.suptitle(f"mean range {widths.mean():.1f} σ, mean {bits}-bit rounding error {error.mean():.3%}")
        return figure


def shortened(word: str, most: int = 12) -> str:
    """A token's text in quotes, as far as it fits beside a bar."""
    return repr(word if len(word) <= most else word[: most - 1] + "…")


def by_layer(columns: Mapping[str, Sequence[float]], ylabel: str, log: bool = True) -> Figure:
    """One line a name over the layers."""
    with styled():
        figure, axis = plt.subplots(figsize=(7.5, 4.3))
        for name, values in columns.items():
            axis.plot(range(len(values)), values, marker="o", ms=3, label=name, color=colour_of(name))
        axis.set(xlabel="layer", ylabel=ylabel, yscale="log" if log else "linear")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if log:
            _plain_decades(axis.yaxis, (1, 2, 3, 5))
        figure.legend(loc="outside lower center", ncol=2)
        return figure


def convergence(histories: Mapping[str, list[dict]], ylabel: str) -> Figure:
    """Loss against seconds since the call, log time axis, one line a method."""
    with styled():
        figure, axis = plt.subplots(figsize=(7.5, 4))
        for name, history in histories.items():
            seconds = [max(h["seconds"], 0.02) for h in history]
            axis.semilogx(seconds, [h["loss"] for h in history], label=name, color=colour_of(name), marker="o", ms=2.5)
        axis.set(xlabel="seconds since the call (log)", ylabel=ylabel)
        axis.legend()
        return figure


def bands(curves: Mapping[str, list[list[dict]]], ylabel: str) -> Figure:
    """As `convergence`, for several seeds a method: the median, and a band from the lowest to the highest."""
    with styled():
        figure, axis = plt.subplots(figsize=(7.5, 4))
        for name, runs in curves.items():
            ends = [(run[0]["seconds"], run[-1]["seconds"]) for run in runs]
            grid = np.geomspace(max(e[0] for e in ends), min(e[1] for e in ends), 60)  # where all runs are under way
            lines = [np.interp(grid, [h["seconds"] for h in run], [h["loss"] for h in run]) for run in runs]
            axis.semilogx(grid, np.median(lines, 0), label=name, color=colour_of(name))
            axis.fill_between(grid, np.min(lines, 0), np.max(lines, 0), alpha=0.25, color=colour_of(name))
        axis.set(xlabel="seconds since the call (log)", ylabel=ylabel)
        figure.legend(loc="outside lower center", ncol=2)
        return figure


def intervals(table: pd.DataFrame, label: str, groups: str, xlabel: str, line: float, line_name: str = "FP") -> Figure:
    """``ppl`` with [``ppl_low``, ``ppl_high``], one row per ``label``, one colour per ``groups``; a dashed line."""
    names = list(dict.fromkeys(table[label]))
    kinds = list(dict.fromkeys(table[groups]))
    apart = 0.22 if table[label].duplicated().any() else 0
    with styled():
        figure, axis = plt.subplots(figsize=(8, 0.55 + 0.42 * len(names) + 0.3 * len(kinds)))
        for i, (kind, rows) in enumerate((k, table[table[groups] == k]) for k in kinds):
            y = np.array([names.index(n) for n in rows[label]]) + apart * (i - (len(kinds) - 1) / 2)
            error = [rows.ppl - rows.ppl_low.astype(float), rows.ppl_high.astype(float) - rows.ppl]
            axis.errorbar(rows.ppl, y, xerr=error, fmt="o", capsize=3, label=kind)
        axis.axvline(line, color="k", ls="--", lw=1)
        axis.text(line, -0.75, f" {line_name}", va="center")
        axis.set(
            xscale="log",
            xlabel=xlabel,
            yticks=range(len(names)),
            yticklabels=names,
            ylabel=label,
            ylim=(len(names) - 0.4, -1),
        )
        _plain_decades(axis.xaxis)
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncol=min(len(kinds), 4))
        return figure


def _plain_decades(axis, steps: tuple[int, ...] = (1, 2, 5)) -> None:
    """1, 2, 5, 10, … along a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
