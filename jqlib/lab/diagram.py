"""One decoder layer, and where each rotation stands in it: drawn, for README and notebooks."""

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from jqlib.lab.style import styled

COLOURS = {"R1": "#0072B2", "R2": "#009E73", "R3": "#E69F00", "R4": "#D55E00"}
BOXES = {  # name -> where it stands, and the rotations merged into its weight, (in, out)
    "embed": (0.0, 0, None, "R1"), "norm": (1.55, 0, None, None), "q, k": (2.9, 0.75, "R1", None),
    "v": (2.9, -0.75, "R1", "R2"), "attention": (5.0, 0, None, None), "o": (6.4, 0, "R2", "R1"),
    "norm ": (8.35, 0, None, None), "up, gate": (9.7, 0, "R1", None), "down": (12.3, 0, "R4", "R1"),
    "head": (14.25, 0, "R1", None),
}  # fmt: skip
ARROWS = [("norm", "q, k"), ("norm", "v"), ("q, k", "attention"), ("v", "attention"), ("attention", "o"),
          ("norm ", "up, gate"), ("up, gate", "down")]  # fmt: skip
WIDTH, HEIGHT, STREAM = 1.0, 0.6, -1.75
KEY = {
    "R1": "R1 turns the residual stream: merged into weights (stripes)",
    "R2": "R2 turns each head's values: merged into weights",
    "R3": "R3 turns queries and keys, for a rounded KV cache: runs online (diamond)",
    "R4": "R4 turns down's input: runs online, undone in its weight",
}


@styled()
def layer_diagram() -> Figure:
    """Embedding, one layer and head along the residual stream. A stripe at a weight's side is a rotation merged there,
    a diamond one that runs online."""
    figure, axis = plt.subplots(figsize=(11, 3.6))
    axis.annotate("", (15.6, STREAM), (0.2, STREAM), arrowprops={"arrowstyle": "-|>", "lw": 3, "color": COLOURS["R1"]})
    axis.text(7.4, STREAM - 0.12, "residual stream", ha="center", va="top", color=COLOURS["R1"])
    for name, (x, y, into, out) in BOXES.items():
        _box(axis, name.strip(), x, y, into, out)
    for start, end in ARROWS:
        (x0, y0, *_), (x1, y1, *_) = BOXES[start], BOXES[end]
        axis.annotate("", (x1, y1), (x0 + WIDTH, y0), arrowprops={"arrowstyle": "->", "color": "0.4"})
    for name in ("norm", "norm ", "head"):  # they read the stream
        x = BOXES[name][0] + WIDTH / 2
        axis.annotate("", (x, -HEIGHT / 2), (x, STREAM), arrowprops={"arrowstyle": "->", "color": "0.4"})
    for name in ("embed", "o", "down"):  # they add to it
        x = BOXES[name][0] + WIDTH / 2
        axis.annotate("", (x, STREAM), (x, -HEIGHT / 2), arrowprops={"arrowstyle": "->", "color": "0.4"})
    for name, x, y in (("R3", 4.4, 0.42), ("R4", 11.45, 0)):
        axis.plot(x, y, "D", ms=9, color=COLOURS[name], zorder=3)
        axis.text(x, y + 0.3, name, ha="center", color=COLOURS[name], weight="bold")
    for i, (name, text) in enumerate(KEY.items()):
        axis.text(0.1 + 8.0 * (i % 2), 2.0 - 0.45 * (i // 2), text, color=COLOURS[name], fontsize=9)
    axis.set(xlim=(-0.2, 15.8), ylim=(-2.3, 2.4))
    axis.axis("off")
    return figure


def _box(axis, name: str, x: float, y: float, into: str | None, out: str | None) -> None:
    shape = FancyBboxPatch(
        (x, y - HEIGHT / 2), WIDTH, HEIGHT, boxstyle="round,pad=0.02", fc="white", ec="0.3", zorder=2
    )
    axis.add_patch(shape)
    middle = x + WIDTH / 2 + 0.05 * ((into is not None) - (out is not None))
    axis.text(middle, y, name, ha="center", va="center", zorder=4, fontsize=9)
    for rotation, at in ((into, x + 0.02), (out, x + WIDTH - 0.10)):
        if rotation:
            axis.add_patch(plt.Rectangle((at, y - HEIGHT / 2), 0.08, HEIGHT, color=COLOURS[rotation], zorder=3))
