"""Notebook 05's rows of every model and every run of a sweep, side by side: text, CSV, LaTeX, one HTML page."""

import base64
from pathlib import Path

import pandas as pd

from jqlib.config import KINDS
from jqlib.store import read_results, write

RESULTS = "05_w4a4_eval.json"
COLUMNS = ["method", "weights", "w_bits", "a_bits", "kv_bits", "ppl", "ppl_low", "ppl_high", "kl", "kl_low", "kl_high",
           "top1", "seconds"]  # fmt: skip
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>JointQuant: report</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em }}
table {{ border-collapse: collapse }} th, td {{ padding: .2em .8em; text-align: right; border-bottom: 1px solid #ccc }}
img {{ max-width: 100% }}
</style></head><body>
<h1>Perplexity, side by side</h1>
<p>ppl_low and ppl_high bound a 95% interval over articles (or blocks) of the test text, kl_low and kl_high that of the
mean KL from the FP model (nats per token); top1 is the share of tokens with the FP model's first choice.</p>
{table}
{figures}
</body></html>
"""


def report(output_dir: Path) -> pd.DataFrame:
    """The table of all ``results/05_w4a4_eval.json`` below a folder; written there as ``report.csv``, .tex and .html.

    A row has the model, the run (its folder below ``output_dir``), and each parameter in which the runs differ.
    ValueError for a results file that is damaged.
    """
    table = side_by_side(output_dir)
    if table.empty:
        raise FileNotFoundError(f"no results/{RESULTS} under {output_dir}: run `python -m jqlib run` first")
    style = table.style.format(precision=2, escape="latex").format_index(escape="latex", axis="columns").hide()
    figures = [file.parents[1] / "figures" / "05_table.png" for file in _files(output_dir)]
    html = PAGE.format(
        table=table.to_html(index=False, float_format="%.2f", border=0),
        figures="\n".join(_figure(path, output_dir) for path in figures if path.exists()),
    )
    for suffix, text in {"csv": table.to_csv(index=False), "tex": style.to_latex(hrules=True), "html": html}.items():
        write(output_dir / f"report.{suffix}", lambda path, text=text: path.write_text(text, encoding="utf-8"))
    return table


def side_by_side(output_dir: Path) -> pd.DataFrame:
    """The table of `report`, empty where notebook 05 has left nothing below the folder."""
    return _table({file.parents[1].relative_to(output_dir): read_results(file) for file in _files(output_dir)})


def _files(output_dir: Path) -> list[Path]:
    return sorted(output_dir.rglob(f"results/{RESULTS}"))


def _table(results: dict[Path, dict]) -> pd.DataFrame:
    """``<run>/<model>`` -> what notebook 05 saved there; the table of all their rows."""
    configs = [result["config"] for result in results.values()]
    candidates = [name for name in KINDS if name not in ("model", "output_dir", *COLUMNS)]
    changed = [name for name in candidates if len({str(config.get(name)) for config in configs}) > 1]
    rows = []
    for folder, result in results.items():
        about = {"model": folder.name, "run": "" if folder.parent == Path() else folder.parent.as_posix()}
        about |= {name: result["config"].get(name) for name in changed}
        rows += [about | {column: row.get(column) for column in COLUMNS} for row in result.get("rows", [])]
    return pd.DataFrame(rows)


def _figure(path: Path, output_dir: Path) -> str:
    title = path.parent.parent.relative_to(output_dir).as_posix()
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<h2>{title}</h2>\n<img alt="{title}: the table as a figure" src="data:image/png;base64,{data}">'
