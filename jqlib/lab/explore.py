"""The live explorer: choose a site, a layer, a token, two rotations and bits, and see what rounding makes of them."""

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from html import escape

import matplotlib.pyplot as plt
import numpy as np
from IPython import get_ipython
from IPython.display import display
from torch import Tensor

from jqlib.lab import tokens
from jqlib.lab.geodesic import Geodesic
from jqlib.lab.style import colour_of
from jqlib.product import product
from jqlib.transform.grids import rounding_errors

STEPS = 20  # of the slider from no rotation to the right side's
WIDTH, HEIGHT = 860, 640  # of the figure, pixels
AROUND = 12  # tokens of context on either side of the chosen one
Rotations = Mapping[str, Tensor | None]


def explorer(acts: Mapping[str, Mapping[int, Tensor]], rotations: Rotations | Mapping[str, Rotations],
             words: Sequence[str], bits: int = 4, live: bool | None = None) -> "Explorer | None":  # fmt: skip
    """Show the explorer where somebody can use it, and return it; elsewhere show one still picture.

    ``acts``: by site, then by layer, (tokens, n) each; ``rotations``: by name, (n, n), None for none, at all sites of
    their width; or such a mapping for each site; ``words``: what each token says. ``live``: None finds out whether
    a notebook is open in JupyterLab, VS Code or Colab; True and False decide.
    """
    choice = Choice(acts, rotations, words)
    if not (is_open() if live is None else live):
        site, layer, token, (left, right) = choice.default()
        sides = {name: choice.seen(site, layer, name, 1.0, bits) for name in (left, right)}
        chosen = {name: (error, y[token].numpy()) for name, (y, error) in sides.items()}
        figure = tokens.explored(chosen, words, token, bits)
        figure.suptitle(f"layer {layer}, {site}", x=0.99, ha="right", fontsize=10)
        plt.close(figure)  # it is displayed here
        display(figure)
        return None
    if "google.colab" in sys.modules:
        # there alone: Colab shows widgets of others' making only when asked
        importlib.import_module("google.colab.output").enable_custom_widget_manager()
    explorer = Explorer(choice, bits)
    display(explorer.controls)
    return explorer


def is_open() -> bool:
    """Whether this kernel's notebook is open before somebody: Jupyter's server names it, VS Code and Colab leave marks
    of their own; papermill, nbval and nbconvert leave none."""
    shell = get_ipython()
    in_vscode = shell is not None and "__vsc_ipynb_file__" in shell.user_ns
    return "JPY_SESSION_NAME" in os.environ or in_vscode or "google.colab" in sys.modules


class Choice:
    """What there is to choose from, and the numbers of each choice."""

    def __init__(self, acts, rotations, words):
        self.acts, self.words = acts, words
        for_each = rotations if rotations.keys() >= acts.keys() else dict.fromkeys(acts, rotations)
        widths = {site: next(iter(layers.values())).shape[1] for site, layers in acts.items()}
        self.rotations = {
            site: {name: R for name, R in for_each[site].items() if R is None or len(R) == width}
            for site, width in widths.items()
        }
        self.path = lru_cache(8)(lambda site, name: Geodesic(self.rotations[site][name]))
        self.rotated = lru_cache(2 * STEPS)(self._rotated)  # the way back costs nothing

    def default(self) -> tuple[str, int, int, tuple[str, str]]:
        """Site, layer, token, and the rotations of both sides: a layer in the middle, a token of median error there."""
        site = next(iter(self.acts))
        layers, names = list(self.acts[site]), list(self.rotations[site])
        layer = layers[len(layers) // 2]
        _, error = self.seen(site, layer, names[0], 1.0, 4)
        return site, layer, int(error.argsort()[len(error) // 2]), (names[0], names[-1])

    def _rotated(self, site: str, layer: int, name: str, t: float) -> Tensor:
        x, R = self.acts[site][layer], self.rotations[site][name]
        if R is None:
            return x
        return product(x, R) if t == 1 else self.path(site, name).of(x, t)

    def seen(self, site: str, layer: int, name: str, t: float, bits: int) -> tuple[Tensor, Tensor]:
        """A site's tokens behind the share ``t`` of a rotation, (tokens, n), and the rounding error of each."""
        y = self.rotated(site, layer, name, t)
        return y, rounding_errors(y, bits)


class Explorer:
    """The controls, which are widgets (``site``, ``layer``, ``token``, ``left``, ``right``, ``bits``, ``way``), and the
    Plotly ``figure`` that follows them: each token's error, where a click chooses one, and that token on both sides."""

    def __init__(self, choice: Choice, bits: int):
        import ipywidgets as widgets

        self.choice, self.waiting = choice, False
        site, layer, token, (left, right) = choice.default()
        names, later = list(choice.rotations[site]), {"continuous_update": False}
        self.site = widgets.ToggleButtons(options=list(choice.acts), value=site, description="site")
        self.layer = widgets.SelectionSlider(options=list(choice.acts[site]), value=layer, description="layer", **later)
        self.token = widgets.IntSlider(token, 0, len(choice.words) - 1, description="token", **later)
        self.left = widgets.Dropdown(options=names, value=left, description="left")
        self.right = widgets.Dropdown(options=names, value=right, description="right")
        self.bits = widgets.IntSlider(bits, 2, 8, description="bits", **later)
        self.way = widgets.IntSlider(STEPS, 0, STEPS, description="way to R", readout=False)
        self.play = widgets.Play(value=STEPS, min=0, max=STEPS, interval=200)
        self.linked = widgets.jslink((self.play, "value"), (self.way, "value"))
        self.context = widgets.HTML()
        self.figure = _empty_figure()
        for errors in self.figure.data[:2]:
            errors.on_click(self._click)
        self.site.observe(self._offer, "value")
        for control in (self.layer, self.token, self.left, self.right, self.bits, self.way):
            control.observe(self.redraw, "value")
        rows = ((self.site,), (self.layer, self.token, self.bits), (self.left, self.right, self.play, self.way))
        self.controls = widgets.VBox([*map(widgets.HBox, rows), self.context, self.figure])
        self.redraw()

    def _click(self, trace, points, state) -> None:
        if points.point_inds:
            self.token.value = points.point_inds[0]

    def _offer(self, _) -> None:
        """The rotations of the new site, and one drawing; those that were chosen stay so where they can."""
        names = list(self.choice.rotations[self.site.value])
        self.waiting = True
        for control, otherwise in ((self.left, names[0]), (self.right, names[-1])):
            kept = control.value if control.value in names else otherwise
            control.options, control.value = names, kept
        self.waiting = False
        self.redraw()

    def redraw(self, change=None) -> None:
        """Put what is chosen now into the figure; axes move only if the numbers are others, so that a zoom stays."""
        if self.waiting:
            return
        site, layer, token, bits = self.site.value, self.layer.value, self.token.value, self.bits.value
        share = self.way.value / STEPS
        names = (self.left.value, self.right.value)
        labels = (names[0], names[1] + (f", {share:.0%} of the way" if share < 1 else ""))
        seen = [self.choice.seen(site, layer, name, t, bits) for name, t in zip(names, (1.0, share), strict=True)]
        moved = change is None or change["owner"] not in (self.bits, self.way)
        with self.figure.batch_update():
            for i, (label, name, (y, error)) in enumerate(zip(labels, names, seen, strict=True)):
                self._fill(i, label, colour_of(name) or tokens.KEPT, 100 * error.numpy(), y[token].numpy())
            if moved:
                most = 1.06 * max(y[token].abs().max().item() for y, _ in seen)
                self.figure.layout.yaxis2.range = (-most, most)
                self.figure.layout.xaxis2.range = self.figure.layout.xaxis3.range = (-8, y.shape[1] + 7)
        self.context.value = in_context(self.choice.words, token)

    def _fill(self, side: int, label: str, colour: str, error: np.ndarray, y: np.ndarray) -> None:
        """One side's traces. What a batch of updates gives to some traces (names, colours), it takes from the others:
        so all that have any get them here."""
        bits, token, figure = self.bits.value, self.token.value, self.figure
        of_all, mark = figure.data[side], figure.data[2 + side]
        of_all.x, of_all.y, of_all.name = np.arange(len(error)), error, f"{label}: mean {error.mean():.2f}%"
        of_all.text = [escape(repr(word)) for word in self.choice.words]
        mark.x, mark.y = [token], error[[token]]
        of_all.marker.color = mark.marker.color = colour
        grid, *dots = figure.data[4 + 3 * side : 7 + 3 * side]
        zeros, points = tokens.zeroed(y, bits), tokens.levels(y, bits)
        grid.x, grid.y = np.tile([-8, len(y) + 7, np.nan], len(points)), np.repeat(points, 3)
        for of, mask, (colour, name) in zip(dots, (zeros, ~zeros), tokens.DOTS, strict=True):
            of.x, of.y, of.name, of.marker.color = np.flatnonzero(mask), y[mask], name, colour
        title = figure.layout.annotations[side]
        title.text = f"{escape(label)}: {zeros.mean():.0%} become 0, error {error[token]:.2f}%"


def _empty_figure():
    """The figure without numbers. Traces: each side's errors; each side's chosen token; a side's grid, zeros, rest."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = go.FigureWidget(make_subplots(
        2, 2, specs=[[{"colspan": 2}, None], [{}, {}]], row_heights=(0.35, 0.65), vertical_spacing=0.16,
        horizontal_spacing=0.06, subplot_titles=("", " ", " "),
    ))  # fmt: skip
    told = "token %{x}: %{text}<br>%{y:.2f}%<extra></extra>"
    for symbol in ("circle", "square"):
        figure.add_scatter(mode="markers", marker={"size": 4, "symbol": symbol}, hovertemplate=told, row=1, col=1)
    for symbol in ("circle-open", "square-open"):
        figure.add_scatter(mode="markers", marker={"size": 13, "symbol": symbol, "line": {"width": 2}},
                           hoverinfo="skip", showlegend=False, row=1, col=1)  # fmt: skip
    for side in (1, 2):
        figure.add_scatter(mode="lines", line={"color": "#d0d0d0", "width": 1}, hoverinfo="skip", showlegend=False,
                           row=2, col=side)  # fmt: skip
        for _ in tokens.DOTS:
            figure.add_scatter(mode="markers", marker={"size": 4}, showlegend=side == 1,
                               hovertemplate="channel %{x}: %{y:.3f}<extra></extra>", row=2, col=side)  # fmt: skip
    figure.update_annotations(font_size=12)
    figure.update_layout(width=WIDTH, height=HEIGHT, template="simple_white",
                         margin={"l": 60, "r": 20, "t": 50, "b": 50},
                         legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"})  # fmt: skip
    figure.update_xaxes(title="token: click one", row=1, col=1)
    figure.update_yaxes(title="error (%)", rangemode="tozero", row=1, col=1)
    figure.update_xaxes(title="channel", row=2)
    figure.update_yaxes(title="value", row=2, col=1)
    figure.update_yaxes(matches="y2", row=2, col=2)
    return figure


def in_context(words: Sequence[str], token: int) -> str:
    """A token among its neighbours, as HTML."""
    before, after = words[max(0, token - AROUND) : token], words[token + 1 : token + 1 + AROUND]
    said = (escape("".join(part)) for part in (before, words[token : token + 1], after))
    return "… {}<mark><b>{}</b></mark>{} …".format(*said)
