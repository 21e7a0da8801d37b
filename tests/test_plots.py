"""Figures arrive where they are looked at."""

import nbformat
from nbclient import NotebookClient


def test_a_notebook_shows_every_figure():
    """Not just its first: styles must leave pyplot as interactive as the notebook's backend made it."""
    sources = ["from jqlib import plots", *(f"figure = plots.by_layer({{'a': [1, {i}]}}, 'y')" for i in (2, 3, 4))]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    NotebookClient(notebook, kernel_name="python3").execute()
    shown = [[output.data.keys() for output in cell.outputs if "data" in output] for cell in notebook.cells]
    assert [len(outputs) for outputs in shown] == [0, 1, 1, 1]
    assert all("image/png" in outputs[0] for outputs in shown[1:])
