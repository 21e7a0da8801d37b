"""The executed workbook as pages that can be read where they lie: Markdown with its figures, code folded away."""

import base64
import hashlib
import json
import re
import shutil
from pathlib import Path

from jqlib.config import NOTEBOOKS, ROOT
from jqlib.lab.captions import CAPTIONS
from jqlib.lab.outputs import to_read
from jqlib.store import write

PAGES = ROOT / "figures" / "pages"
MOST = 15e6  # bytes of all pages
FILM = re.compile(r"data:image/gif;base64,([\w+/=]+)")
MARK = "<!-- of a notebook with SHA-256 {} -->"
PICTURE = re.compile(r"!\[png\]\(([^)]*)\)")  # as nbconvert writes it
SAVED = re.compile(r"save_figure\(.*?\"(\d\d_\w+)\"", re.DOTALL)
CHANGES = (
    "A page names the commit whose code made its numbers; *with changes*: text, captions and pictures are later ones."
)
NOT_SHOWN = {"parameters", "injected-parameters"}


def pages(folder: Path, to: Path = PAGES) -> str:
    """Write a page for each executed notebook in a run's folder, and a list of them; what was written, in words.

    Raises FileNotFoundError if there is none, ValueError if the pages are larger than `MOST`.
    """
    import nbformat

    executed = [path for path in sorted(folder.glob("[0-9][0-9]_*.ipynb")) if (NOTEBOOKS / path.name).exists()]
    if not executed:
        raise FileNotFoundError(f"no executed notebook in {folder}: run `python -m jqlib run` first")
    made, titles = to.with_name(f".{to.name}"), {}
    shutil.rmtree(made, ignore_errors=True)
    for path in executed:
        notebook = nbformat.read(path, as_version=4)
        titles[path.stem] = re.search(r"^# (.*)", notebook.cells[0].source, re.MULTILINE)[1]
        _page(notebook, folder, made / f"{path.stem}.md")
    lines = [f"* [{title}]({stem}.md)" for stem, title in titles.items()]
    text = "# The workbook, executed\n\n" + "\n".join(lines) + f"\n\n{CHANGES}\n"
    write(made / "README.md", lambda path: path.write_text(text, encoding="utf-8"))
    size = sum(file.stat().st_size for file in made.rglob("*") if file.is_file())
    if size > MOST:
        raise ValueError(
            f"the pages are {size / 1e6:.1f} MB, of at most {MOST / 1e6:.0f}: look for a large figure in {made}"
        )
    shutil.rmtree(to, ignore_errors=True)
    made.rename(to)
    return f"{len(executed)} pages, {size / 1e6:.1f} MB, in {to}"


def outdated(to: Path = PAGES) -> list[str]:
    """The names of the pages whose notebook is another by now, or gone; notebooks without a page are among them."""
    import nbformat

    if not to.is_dir():
        return []
    old = []
    for stem in sorted({path.stem for path in [*NOTEBOOKS.glob("[0-9]*.ipynb"), *to.glob("[0-9]*.md")]}):
        page, notebook = to / f"{stem}.md", NOTEBOOKS / f"{stem}.ipynb"
        both = page.exists() and notebook.exists()
        if not both or _mark(nbformat.read(notebook, as_version=4)) not in page.read_text(encoding="utf-8"):
            old.append(stem)
    return old


def _mark(notebook) -> str:
    """A line that tells a notebook's text and code from any other's; parameters that a run gave it do not count."""
    said = [cell.source for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    return MARK.format(hashlib.sha256("\n\n".join(said).encode()).hexdigest()[:16])


def _record(folder: Path, stem: str) -> str:
    """Where a page's numbers are from, as its notebook's results say."""
    results = folder / "results" / f"{stem}.json"
    if not results.exists():
        raise FileNotFoundError(f"{results} is missing: {stem} did not come to its end there; run it again")
    result = json.loads(results.read_text(encoding="utf-8"))
    commit = (result["git_commit"] or "unknown").partition("+")
    return (f"*Executed on {result['written'][:10]}: model `{result['config']['model']}`, profile "
            f"`{result['config']['profile']}`, commit `{commit[0][:7]}`{' with changes' if commit[1] else ''}. Made by "
            f"`make pages` from `notebooks/{stem}.ipynb`; [all pages](README.md).*")  # fmt: skip


def _page(notebook, folder: Path, to: Path) -> None:
    """The page of a notebook that was executed in the run's ``folder``; that one's path is left out of it."""
    from nbconvert import MarkdownExporter

    mark = _mark(notebook)
    notebook.cells = [cell for cell in notebook.cells if not NOT_SHOWN & {*cell.metadata.get("tags", [])}]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [_plain(output) for output in to_read(cell.outputs)]
            _take_saved(cell, folder / "figures")
    resources = {"output_files_dir": f"{to.stem}_files", "unique_key": "figure"}
    body, made = MarkdownExporter().from_notebook_node(notebook, resources)
    record, body = _record(folder, to.stem), PICTURE.sub(_with_caption, _folded(body))
    body = re.sub(r"^# .*$", lambda title: f"{title[0]}\n\n{record}", body, count=1, flags=re.MULTILINE)
    text = f"{mark}\n\n{body}".replace(f"{folder.resolve().parent}/", "")
    for i, data in enumerate(FILM.findall(text)):  # a host of Markdown shows no picture that is written into the page
        made["outputs"][name := f"{to.stem}_files/film_{i}.gif"] = base64.b64decode(data)
        text = text.replace(f"data:image/gif;base64,{data}", name)
    write(to, lambda path: path.write_text(text, encoding="utf-8"))
    for name, data in made["outputs"].items():
        write(to.parent / name, lambda path, data=data: path.write_bytes(data))


def _take_saved(cell, figures: Path) -> None:
    """The figures that a cell saved in the place of those it shows: twice as fine, each with its name."""
    saved = [figures / f"{name}.png" for name in SAVED.findall(cell.source)]
    shown = [output for output in cell.outputs if "image/png" in output.get("data", {})]
    saved = [path for path in saved if path.exists()]
    for path, output in zip(saved, shown, strict=True) if len(saved) == len(shown) else ():
        output.data["image/png"] = base64.b64encode(path.read_bytes()).decode()
        output.metadata["filename"] = path.stem


def _with_caption(picture: re.Match) -> str:
    """A picture of Markdown with what it shows, if it has a name."""
    told = CAPTIONS.get(Path(picture[1]).stem)
    return f"![{told}]({picture[1]})\n\n*{told}*" if told else f"![a figure]({picture[1]})"


def _plain(output):
    """A table without its style sheet, which a host of Markdown would show as text; all else as it is."""
    html = output.get("data", {}).get("text/html")
    if html:
        html = re.sub(r"<style.*?</style>", "", html, flags=re.DOTALL)
        html = re.sub(r' (?:id|class|style|border)="[^"]*"', "", html).replace(" >", ">")
        output.data["text/html"] = re.sub(r"\s*\n\s*", "\n", html).strip()
    return output


def _folded(markdown: str) -> str:
    """Code cells closed until somebody asks."""
    opened = "<details><summary>code</summary>\n\n```python\n"
    return re.sub(r"^```python\n(.*?)^```$", lambda m: f"{opened}{m[1]}```\n\n</details>", markdown,
                  flags=re.MULTILINE | re.DOTALL)  # fmt: skip
