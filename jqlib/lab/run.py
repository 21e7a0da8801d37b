"""The runner: the notebooks by papermill, their inputs checked before anything runs, one page of what they found."""

import ast
import os
import re
import sys
import time
from pathlib import Path

import yaml

from jqlib.config import NOTEBOOKS, Config, make_config
from jqlib.lab.checks import check_inputs, check_kernel
from jqlib.store import alone, differences

PLAIN = {"int": r"-?(0|[1-9]\d*)", "float": r"[-+.\deE]+|[-+]?\.inf|\.nan"}  # YAML also has 010, 1:30 and 1_000
PATHS = ("model", "calib_dataset", "eval_dataset", "output_dir")


def run(parameters: dict, only: str | None = None) -> int:
    """Execute the notebooks with these parameters (None: not given); outputs land in the config's folder.

    Another run that is at the same notebook in the same folder is waited for: neither replaces the other's in silence.
    """
    parameters = with_absolute_paths(parameters)
    config = make_config(parameters)
    notebooks = select_notebooks(only)
    declared = {path: declared_in(path) for path in notebooks}
    check_inputs(config)
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")
    check_kernel()
    given = {"profile": config.profile, "model": config.model} | parameters
    for path in notebooks:
        with alone(config.folder / f".{path.stem}.lock", f"at {path.stem} in {config.folder}"):
            print(f"{path.stem} -> {config.folder / path.name}", flush=True)
            _say_what_is_replaced(config, path.stem, declared[path])
            code = _execute(path, config.folder, {k: v for k, v in given.items() if k in declared[path]})
        if code:
            return code
    from jqlib.lab.one_page import write_html

    write_html([config.folder / path.name for path in notebooks], config.folder / "report.html")
    print(f"report: {config.folder / 'report.html'}")
    return 0


def _execute(path: Path, folder: Path, parameters: dict) -> int:
    """Run a notebook, its executed copy going to the folder; 1 if a cell failed, 3 if its kernel died."""
    import papermill
    from papermill.exceptions import PapermillExecutionError

    there, start = set(folder.glob("artifacts/*")), time.time()
    try:
        papermill.execute_notebook(
            _plain(path), _plain(folder / path.name), parameters, kernel_name="python3", cwd=NOTEBOOKS,
            progress_bar=sys.stderr.isatty(), start_timeout=600,
            extra_arguments=["--IPKernelApp.log_level=ERROR"],  # else each warns that local TCP is not encrypted
        )  # fmt: skip
    except PapermillExecutionError as error:
        print(f"error: {path.stem}: {error.ename}: {error.evalue}", file=sys.stderr)
        print(f"The notebook as far as it came: {folder / path.name}", file=sys.stderr)
        return 1
    except RuntimeError as error:  # nbclient's and jupyter_client's, where the kernel's process is gone
        if "Kernel died" not in str(error):
            raise
        print(f"error: {path.stem}: its kernel died: it was killed, or memory ran out", file=sys.stderr)
        return 3
    reused = sum(file.exists() and file.stat().st_mtime >= start for file in there)  # reusing one touches it
    print(f"{path.stem} took {time.time() - start:.0f} s, {reused} artifacts reused", flush=True)
    return 0


def _plain(path: Path) -> str:
    """A path for papermill, which takes braces for places to fill in."""
    return str(path).replace("{", "{{").replace("}", "}}")


def declared_in(notebook: Path) -> set[str]:
    """The names of a notebook's parameters. ValueError for one that papermill can't read and would not set."""
    import nbformat
    import papermill

    found = {*papermill.inspect_notebook(_plain(notebook))}
    cells = nbformat.read(notebook, as_version=4).cells
    cell = next(cell for cell in cells if "parameters" in cell.metadata.get("tags", []))
    names = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Name)]
    written = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    if lost := sorted(written - found):
        raise ValueError(f"{notebook.name}: papermill can't read the default of {lost[0]} in the parameters cell, and "
                         "would not set it: write a plain value, such as \"text.txt\"")  # fmt: skip
    return found


def _say_what_is_replaced(config: Config, notebook: str, names: set[str]) -> None:
    """Results of other settings would be gone without a word."""
    results = config.folder / "results" / f"{notebook}.json"
    if changed := [said for said in differences(results, config) if said.partition("=")[0] in names]:
        print(f"warning: replaces its results made with {', '.join(changed)}; another --output_dir keeps both")


def with_absolute_paths(parameters: dict) -> dict:
    """Relative paths are relative to where the user stands; a notebook's kernel stands in ``notebooks/``."""
    from jqlib.model.embedded import CORPUS, MODEL
    from jqlib.model.text import HUB

    given = {name: value for name, value in parameters.items() if isinstance(value, str)}
    paths = {name: Path(given[name]).expanduser().absolute() for name in PATHS if name in given}
    names = (MODEL, CORPUS, *HUB)
    return parameters | {
        name: str(path)
        for name, path in paths.items()
        if name == "output_dir" or (path.exists() and given[name] not in names)
    }


def select_notebooks(only: str | None) -> list[Path]:
    """All notebooks, or those whose numbers ``only`` lists (``02,05``)."""
    every = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    numbers = [n.strip().zfill(2) for n in only.split(",") if n.strip()] if only else [path.name[:2] for path in every]
    if not numbers:
        raise ValueError(f"--only {only}: it names no notebook: give numbers, such as 02,05")
    if unknown := set(numbers) - {path.name[:2] for path in every}:
        raise ValueError(f"--only {only}: there is no notebook {min(unknown)}; there are {every[0].name[:2]} to "
                         f"{every[-1].name[:2]}")  # fmt: skip
    return [path for path in every if path.name[:2] in numbers]


def read_run_file(path: Path | None) -> dict:
    """The parameters of a run file; names are checked by make_config."""
    if path is None:
        return {}
    if not path.is_file():
        problem = "is a folder: give a model's by --model" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"run file {path} {problem}")
    try:
        root = yaml.compose(text := path.read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
        parameters = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"run file {path} is not YAML: {str(error) or 'it is nested too deeply'}") from error
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"run file {path} does not hold parameters: expected lines such as 'model: smollm2-135m'")
    names = [name.value for name, _ in root.value]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"run file {path} has {twice[0]} twice: which is meant?")
    for name, value in root.value:
        if value.tag.endswith(":str") and value.style is None and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", value.value):
            raise ValueError(
                f"run file {path}: {name.value}: {value.value} is text in YAML: write {float(value.value)}"
            )
        plain = PLAIN.get(value.tag.rpartition(":")[2])
        if plain and not re.fullmatch(plain, value.value):
            raise ValueError(f"run file {path}: {name.value}: {value.value} is {yaml.safe_load(value.value)} in YAML: "
                             "write the number that is meant")  # fmt: skip
    return parameters
