"""The live explorer: choose a layer, a site, a rotation and bits, and see what rounding makes of the tokens."""

import os
from collections.abc import Mapping, Sequence
from io import BytesIO

import matplotlib.pyplot as plt
from IPython.display import display
from torch import Tensor

from jqlib.lab import plots


def explorer(acts: Mapping[str, Mapping[int, Tensor]], rotations: Mapping[str, Tensor | None], words: Sequence[str],
             bits: int = 4) -> "Explorer":  # fmt: skip
    """Show the explorer where somebody can use it (a notebook opened in Jupyter); elsewhere one picture of its default.

    ``acts``: by site, then by layer, (tokens, n) each; ``rotations``: (n, n) by name, None for none; ``words``: what
    each token says.
    """
    explorer = Explorer(acts, rotations, words, bits)
    if "JPY_SESSION_NAME" in os.environ:  # set by Jupyter's server, not by papermill, nbval or nbconvert
        display(explorer.controls)
    else:
        display(explorer.picture())
    return explorer


class Explorer:
    """Four controls and the picture that follows them: ``site``, ``layer``, ``rotation``, ``bits`` are widgets."""

    def __init__(self, acts, rotations, words, bits):
        import ipywidgets as widgets

        self.acts, self.rotations, self.words = acts, rotations, words
        layers = next(iter(acts.values()))
        self.site = widgets.ToggleButtons(options=list(acts), description="site")
        self.layer = widgets.SelectionSlider(
            options=list(layers), value=list(layers)[len(layers) // 2], description="layer"
        )
        self.rotation = widgets.Dropdown(options=list(rotations), value=list(rotations)[-1], description="rotation")
        self.bits = widgets.IntSlider(bits, 2, 8, description="bits")
        self.image = widgets.Image(format="png")
        choices = (self.site, self.layer, self.rotation, self.bits)
        for choice in choices:
            choice.observe(self.redraw, "value")
        self.controls = widgets.VBox([*choices, self.image])
        self.redraw()

    def redraw(self, _=None) -> None:
        """The picture of what is chosen now, in the place of the last one."""
        png = BytesIO()
        self.picture().savefig(png, format="png")
        self.image.value = png.getvalue()

    def picture(self) -> plt.Figure:
        x, R = self.acts[self.site.value][self.layer.value], self.rotations[self.rotation.value]
        figure = plots.explored(x if R is None else x @ R, self.words, self.bits.value)
        plt.close(figure)  # it is displayed where we say
        return figure
