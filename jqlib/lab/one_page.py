"""All executed notebooks as one page that needs no other file: figures in it, formulas as MathML, no code."""

from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from jqlib.lab.outputs import to_read
from jqlib.store import write

# without the scripts that it would fetch
TEMPLATE = "{% extends 'lab/index.html.j2' %}" + "".join(
    f"{{% block {name} %}}{{% endblock %}}"
    for name in ("html_head_js", "html_head_js_mathjax", "html_head_js_mermaidjs", "jupyter_widgets")
)


def write_html(notebooks: list[Path], to: Path) -> None:
    """Write the page. Browsers show MathML themselves."""
    merged = nbformat.read(notebooks[0], as_version=4)
    merged.cells = [cell for path in notebooks for cell in nbformat.read(path, as_version=4).cells]
    for i, cell in enumerate(merged.cells):
        cell.id = f"cell-{i}"  # each notebook counts from 0
        if cell.cell_type == "code":
            cell.outputs = to_read(cell.outputs)
    merged.metadata["title"] = "JointQuant"
    exporter = HTMLExporter(raw_template=TEMPLATE, exclude_input=True, exclude_input_prompt=True,
                            exclude_output_prompt=True, filters={"markdown2html": _with_formulas})  # fmt: skip
    body, _ = exporter.from_notebook_node(merged)
    write(to, lambda path: path.write_text(body, encoding="utf-8"))


class _Renderer(IPythonRenderer):
    def inline_math(self, body: str) -> str:
        return convert(body)

    def block_math(self, body: str) -> str:
        return convert(body, display="block")


def _with_formulas(markdown: str) -> str:
    return MarkdownWithMath(renderer=_Renderer(escape=False)).render(markdown)
