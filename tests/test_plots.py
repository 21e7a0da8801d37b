"""Figures arrive where they are looked at, and show what they are given."""

import math

import nbformat
import pytest
from matplotlib import pyplot as plt
from nbclient import NotebookClient

from jqlib.lab import diagram, plots


def test_a_notebook_shows_every_figure():
    """Not just its first: styles must leave pyplot as interactive as the notebook's backend made it."""
    sources = ["from jqlib.lab import plots", *(f"figure = plots.by_layer({{'a': [1, {i}]}}, 'y')" for i in (2, 3, 4))]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    NotebookClient(notebook, kernel_name="python3").execute()
    shown = [[output.data.keys() for output in cell.outputs if "data" in output] for cell in notebook.cells]
    assert [len(outputs) for outputs in shown] == [0, 1, 1, 1]
    assert all("image/png" in outputs[0] for outputs in shown[1:])


def test_the_diagram_undoes_what_it_turns():
    """What a stripe puts on an output, a stripe or a diamond takes off the input that reads it."""
    for start, end in diagram.ARROWS:
        out, into = diagram.BOXES[start][3], diagram.BOXES[end][2]
        assert out is None or end == "attention"  # V's R2 passes attention, which mixes tokens, not channels
        assert into in (None, "R1", "R2", "R4")
    assert diagram.BOXES["v"][3] == diagram.BOXES["o"][2] == "R2"
    for name in ("embed", "o", "down"):
        assert diagram.BOXES[name][3] == "R1"
    for name in ("q, k", "v", "up, gate", "head"):
        assert diagram.BOXES[name][2] == "R1"
    diagram.layer_diagram()


@pytest.mark.parametrize(("values", "far", "least", "kept"), [
    ([0.1, 0.2, 0.3], 4, 0, 3), ([0.1, 0.2, 0.3, 2.0, 9.0], 4, 0, 3), ([0.03, 0.13, 0.67, 1.9], 4, 0.13, 2),
    ([0.001, 0.02, 0.04], 4, 0.02, 3), ([-0.1, 0.2, -2.0], 4, 0.2, 2), ([2.0], 4, 0, 1), ([0.1, 9.0], math.inf, 0, 2),
    ([0.2, 0.5, 1.2, 4.0], 2, 0.5, 2), ([0.6, 1.2, 1.3, 3.4, 4.0], 2, 0.5, 3), ([0.1, 0.5], 2, 0.5, 2),
])  # fmt: skip
def test_what_is_far_beyond_the_others_is_written_at_the_edge(values, far, least, kept):
    axis = plt.figure().subplots()
    plots.forest(axis, {y: ("a", value, math.nan, math.nan) for y, value in enumerate(values)}, far=far, least=least)
    dots, arrows = ([line.get_ydata()[0] for line in axis.lines if line.get_marker() in marks] for marks in ("o", "<>"))
    assert (dots, arrows) == (list(range(kept)), list(range(kept, len(values))))
    assert len(axis.texts) == len(values)
