"""Figures of notebook 01 about the kinds of site: by layer, before and after a rotation."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jqlib.lab.style import KINDS, colour_of, plain_decades, styled


@styled()
def outlier_lines(tables: Mapping[str, pd.DataFrame], gaussian: str) -> Figure:
    """Tables of layers × kinds of site, a line per kind on a log axis, one panel each; in that named ``gaussian`` the
    dashed line is 3. The layers of ``down``'s two highest values are marked."""
    figure, axes = plt.subplots(1, len(tables), figsize=(7.5, 4), squeeze=False)
    for axis, (name, table) in zip(axes[0], tables.items(), strict=True):
        for kind in table:
            look = {"ls": "--", "mfc": "white"} if kind == "ug" else {}  # qkv is seen through it
            axis.semilogy(table.index, table[kind], "o-", ms=3, lw=1.3, color=KINDS[kind], label=kind, **look)
        for layer in table["down"].nlargest(2).index:
            axis.annotate(f"layer {layer} ", (layer, table["down"][layer]), ha="right", va="center", fontsize=9)
        if name == gaussian:
            axis.axhline(3, color="k", ls="--", lw=1)
            axis.text(table.index[-1], 3.2, "a Gaussian's 3", va="bottom", ha="right", fontsize=9)
            axis.set_ylim(2, None)
        axis.set(title=f"{name} (log axis)", xlabel="layer")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncol=4)
    return figure


@styled()
def dumbbells(before: pd.DataFrame, after: pd.DataFrame, gaussian: float, xlabel: str) -> Figure:
    """Errors of layers × kinds of site, before and after a rotation, as shares: small dots are layers, large ones their
    means; a dotted line at a ``gaussian``'s."""
    both = {"as it is": 100 * before, "rotated (Hadamard)": 100 * after}
    figure, axis = plt.subplots(figsize=(7.5, 3.2))
    for y, kind in enumerate(before):
        axis.plot([of[kind].mean() for of in both.values()], (y, y), color="0.75", lw=2, zorder=1)
        for name, of in both.items():
            colour, mean = colour_of(name), of[kind].mean()
            axis.plot(of[kind], np.full(len(of), y + 0.22), ".", ms=4, alpha=0.4, color=colour)
            axis.plot(mean, y, "o", ms=8, color=colour, label=name if y == 0 else None)
            axis.annotate(f"{mean:.2g}%", (mean, y), (0, 7), textcoords="offset points", ha="center", fontsize=9)
    axis.axvline(100 * gaussian, color="k", ls=":", lw=1, label=f"a Gaussian: {gaussian:.1%}")
    axis.set(xscale="log", xlabel=f"{xlabel}, log axis", ylim=(before.shape[1] - 0.5, -0.6))
    axis.set_yticks(range(before.shape[1]), before.columns)
    plain_decades(axis.xaxis)
    figure.legend(loc="outside lower center", ncol=3)
    return figure
