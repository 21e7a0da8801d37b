"""The report of a run: one page, whole without a network, of what there is to read."""

import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from jqlib.config import NOTEBOOKS
from jqlib.lab.one_page import write_html


@pytest.fixture
def page(tmp_path):
    """``page(cells, …)``: the report of one notebook for each list of cells."""

    def made(*notebooks):
        for i, cells in enumerate(notebooks):
            nbformat.write(new_notebook(cells=list(cells)), tmp_path / f"{i}.ipynb")
        write_html([tmp_path / f"{i}.ipynb" for i in range(len(notebooks))], tmp_path / "page.html")
        return (tmp_path / "page.html").read_text()

    return made


def test_notebooks_follow_each_other(page):
    """They count their cells from 0 each: merged without a warning."""
    text = page([new_markdown_cell("essay a", id="0")], [new_markdown_cell("essay b", id="0")])
    assert text.index("essay a") < text.index("essay b")


def test_it_asks_no_other_place_for_anything(page):
    formulas = [cell for path in NOTEBOOKS.glob("*.ipynb") for cell in nbformat.read(path, as_version=4).cells
                if cell.cell_type == "markdown" and "$" in cell.source]  # fmt: skip
    assert formulas
    text = page([cell for i, cell in enumerate(formulas) if not cell.update(id=f"f{i}")])
    assert "<script" not in text
    assert not re.search(r"""(?:src=|url\(|@import\s+)["']?(?:https?:)?//""", text)
    assert not re.search(r"\$|\\[a-z]", re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL))  # no LaTeX is left
    assert text.count("<math") > 100


def test_formulas_stand_in_the_text_and_in_a_line_of_their_own(page):
    text = page([new_markdown_cell("so $x^2$, and\n\n$$y_1 < 2$$")])
    inline, block = re.findall(r"<math.*?</math>", text, flags=re.DOTALL)
    assert "<msup><mi>x</mi><mn>2</mn></msup>" in inline
    assert 'display="inline"' in inline
    assert 'display="block"' in block
    assert "&#x0003C;" in block or "&lt;" in block


def test_progress_is_left_out_and_prints_are_one_piece(page):
    outputs = [
        new_output("stream", name="stdout", text="reusing r1 (r1-1.safetensors, made in 3.4 s)\nrow 1\n"),
        new_output("stream", name="stderr", text="rotation: 2step"),
        new_output("stream", name="stdout", text="another process is making r2-1.safetensors: waiting for it\n"),
        new_output("stream", name="stdout", text="resuming from unfinished-r3\nrow 2\n"),
        new_output("display_data", {"text/plain": "a result"}),
        new_output("stream", name="stdout", text="reusing r4 (r4-1.safetensors, made in 1.0 s)\n"),
    ]
    text = page([new_code_cell("1", outputs=outputs)])
    assert "row 1\nrow 2\n" in text
    assert "a result" in text
    for word in ("reusing", "resuming", "waiting", "2step"):
        assert word not in text
    assert text.count("<pre") == 2
