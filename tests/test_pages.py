"""Pages of executed notebooks: all that can be read in them and nothing else; and when they are out of date."""

import base64
import json

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from jqlib.config import NOTEBOOKS
from jqlib.lab import info, pages
from jqlib.lab.captions import CAPTIONS

GIF = base64.b64encode(b"a film").decode()
TABLE = """<style type="text/css">#T_1 {color: red}</style>
<table id="T_1" border="1">

  <tr><td id="T_1_row0" class="data row0 col0" >957.5</td></tr>
</table>"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A folder of notebooks, and that of a run of the one that is in it."""
    sources, folder = tmp_path / "notebooks", tmp_path / "run"
    (folder / "results").mkdir(parents=True)
    sources.mkdir()
    monkeypatch.setattr(pages, "NOTEBOOKS", sources)
    parameters = new_code_cell("model: str = 'x'", metadata={"tags": ["parameters"]})
    plain = new_code_cell("print(1)")
    saves = new_code_cell('store.save_figure(config, figure, "01_bound")')
    notebook = new_notebook(
        cells=[new_markdown_cell("\n# 01 · A title\n\n**Why?**"), parameters, plain, saves],
        metadata={"language_info": {"name": "python"}},
    )
    nbformat.write(notebook, sources / "01_one.ipynb")
    plain.outputs = [
        new_output("stream", name="stderr", text="rotation: 2step"),
        new_output(
            "stream", text=f"reusing r1 (r1-1.safetensors, made in 3.4 s)\na number: 7\n{folder}/results/01_one.json\n"
        ),
        new_output("display_data", {"text/html": TABLE, "text/plain": "a table"}),
        new_output("display_data", {"image/png": base64.b64encode(b"a picture").decode()}),
        new_output("display_data", {"text/html": f'<img alt="film" src="data:image/gif;base64,{GIF}">'}),
    ]
    saves.outputs = [new_output("display_data", {"image/png": base64.b64encode(b"coarse").decode()})]
    (folder / "figures").mkdir()
    (folder / "figures" / "01_bound.png").write_bytes(b"fine")
    injected = new_code_cell("profile = 'quick'", metadata={"tags": ["injected-parameters"]})
    notebook.cells.insert(2, injected)
    nbformat.write(notebook, folder / "01_one.ipynb")
    about = {"config": {"model": "x", "profile": "quick"}, "git_commit": "abcdef123+changes", "written": "2026-01-02T"}
    (folder / "results" / "01_one.json").write_text(json.dumps(about))
    return folder


def test_a_page_is_what_there_is_to_read(run, tmp_path):
    to = tmp_path / "pages"
    assert pages.pages(run, to).startswith("1 pages, 0.0 MB")
    text = (to / "01_one.md").read_text()
    assert (
        "# 01 · A title\n\n*Executed on 2026-01-02: model `x`, profile `quick`, commit `abcdef1` with changes." in text
    )
    for shown in (
        "**Why?**",
        "a number: 7\n    run/results/01_one.json",
        "<td>957.5</td>",
        "<summary>code</summary>\n\n```python\nprint(1)\n```",
    ):
        assert shown in text
    for hidden in (
        "2step",
        "reusing",
        "profile = 'quick'",
        "model: str",
        "<style",
        "T_1",
        "base64",
        "a table",
        str(tmp_path),
    ):
        assert hidden not in text
    assert {file.name: file.read_bytes() for file in (to / "01_one_files").iterdir()} == {
        "film_0.gif": b"a film", "figure_1_2.png": b"a picture", "01_bound.png": b"fine",
    }  # fmt: skip
    told = CAPTIONS["01_bound"]
    assert f"![{told}](01_one_files/01_bound.png)\n\n*{told}*" in text
    for name in ("film_0.gif", "figure_1_2.png"):
        assert f"01_one_files/{name}" in text
    assert "* [01 · A title](01_one.md)" in (to / "README.md").read_text()


def test_pages_age_with_their_notebooks(run, tmp_path, monkeypatch):
    to, source = tmp_path / "pages", pages.NOTEBOOKS / "01_one.ipynb"
    assert pages.outdated(to) == []  # no pages, as in an installed package: nothing to say
    pages.pages(run, to)
    assert pages.outdated(to) == []
    notebook = nbformat.read(source, as_version=4)
    notebook.cells[0].source += " Because."
    nbformat.write(notebook, source)
    assert pages.outdated(to) == ["01_one"]
    monkeypatch.setattr(info, "outdated", lambda: pages.outdated(to))
    assert info._old_pages("smollm2-135m") == ["figures/pages: not of today's notebooks: 01_one (make workbook pages)"]
    assert info._old_pages("another") == []  # they are the embedded model's
    source.rename(source.with_name("02_two.ipynb"))
    assert pages.outdated(to) == ["01_one", "02_two"]


def test_what_can_be_no_page_leaves_the_old_ones(run, tmp_path, monkeypatch):
    to = tmp_path / "pages"
    pages.pages(run, to)
    monkeypatch.setattr(pages, "MOST", 10)
    with pytest.raises(ValueError, match=r"the pages are 0\.0 MB, of at most"):
        pages.pages(run, to)
    (run / "results" / "01_one.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"01_one\.json is missing: 01_one did not come to its end"):
        pages.pages(run, to)
    with pytest.raises(FileNotFoundError, match="no executed notebook in"):
        pages.pages(tmp_path, to)
    assert (to / "01_one.md").exists()


def test_every_figure_has_a_caption_and_every_caption_a_figure():
    cells = [cell for path in NOTEBOOKS.glob("*.ipynb") for cell in nbformat.read(path, as_version=4).cells]
    saved = [name for cell in cells if cell.cell_type == "code" for name in pages.SAVED.findall(cell.source)]
    assert sorted(saved) == sorted(CAPTIONS)
