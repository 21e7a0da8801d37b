"""``python -m jqlib``: ``run`` the six notebooks by papermill, checked before anything runs; ``sweep``; ``info``;
``report``."""

import argparse
import json
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import yaml

from jqlib.config import HELP, KINDS, NOTEBOOKS, RECIPES, Config, make_config, output_folder

PATHS = ("model", "calib_dataset", "eval_dataset", "output_dir")
# what check_inputs and the estimate of memory depend on
INPUTS = ("model", "profile", "nsamples", "seqlen", "max_tokens", "eval_seqlen", "eval_windows", "eval_split",
          "eval_draw", "calib_dataset", "eval_dataset", "device", "dtype")  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jqlib", description="JointQuant: a W4A4 workbook.")
    commands = parser.add_subparsers(dest="command", required=True)
    run_parser = commands.add_parser("run", help="run the notebooks on a model", allow_abbrev=False)
    run_parser.add_argument("-f", "--file", type=Path, help="run file: YAML with any of the parameters below")
    run_parser.add_argument("--only", help="notebooks to run, by number: 02,05")
    for name in KINDS:
        _add_flag(run_parser, name)
    _add_sweep(commands)
    info_parser = commands.add_parser("info", help="sites, sizes, memory and time of a model, before anything runs")
    info_parser.add_argument("model", help=HELP["model"])
    info_parser.add_argument("--profile", default=Config.profile, help=HELP["profile"])
    report_parser = commands.add_parser("report", help="the rows of notebook 05 of all models and runs under a folder")
    report_parser.add_argument("output_dir", type=Path, nargs="?", help="(jointquant_output of this project)")
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        commands.choices[arguments.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        if arguments.command == "report":
            return report(arguments.output_dir or output_folder())
        if arguments.command == "sweep":
            return sweep(arguments)
        if arguments.command == "info":
            return info(make_config({"model": arguments.model, "profile": arguments.profile}))
        flags = {name: getattr(arguments, name) for name in KINDS if hasattr(arguments, name)}
        return run({**read_run_file(arguments.file), **flags}, arguments.only)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(parameters: dict, only: str | None = None) -> int:
    """Execute the notebooks with these parameters (None: not given); outputs land in the config's folder."""
    import papermill
    from papermill.exceptions import PapermillExecutionError

    parameters = with_absolute_paths(parameters)
    config = make_config(parameters)
    notebooks = select_notebooks(only)
    declared = {path: set(papermill.inspect_notebook(path)) for path in notebooks}
    check_inputs(config)
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")
    config.folder.mkdir(parents=True, exist_ok=True)
    given = {"profile": config.profile, "model": config.model} | parameters
    executed = []
    for path in notebooks:
        print(f"{path.stem} -> {config.folder / path.name}", flush=True)
        _say_what_is_replaced(config, path.stem, declared[path])
        there = {file.name for file in config.folder.glob("artifacts/*.json")}
        start = time.perf_counter()
        try:
            notebook = papermill.execute_notebook(
                path, config.folder / path.name, {k: v for k, v in given.items() if k in declared[path]},
                kernel_name="python3", cwd=NOTEBOOKS, progress_bar=sys.stderr.isatty(),
                extra_arguments=["--IPKernelApp.log_level=ERROR"],  # else each warns that local TCP is not encrypted
            )  # fmt: skip
        except PapermillExecutionError as error:
            print(f"error: {path.stem}: {error.ename}: {error.evalue}", file=sys.stderr)
            print(f"The notebook as far as it came: {config.folder / path.name}", file=sys.stderr)
            return 1
        except RuntimeError as error:  # nbclient's and jupyter_client's, where the kernel's process is gone
            if "Kernel died" not in str(error):
                raise
            print(f"error: {path.stem}: its kernel died: it was killed, or memory ran out", file=sys.stderr)
            return 3
        text = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
        reused = there.intersection(re.findall(r"reusing \S+ \((\S+),", text))
        print(f"{path.stem} took {time.perf_counter() - start:.0f} s, {len(reused)} artifacts reused", flush=True)
        executed.append(config.folder / path.name)
    write_html(executed, config.folder / "report.html")
    print(f"report: {config.folder / 'report.html'}")
    return 0


def _say_what_is_replaced(config: Config, notebook: str, names: set[str]) -> None:
    """Results of other settings would be gone without a word."""
    try:
        before = json.loads((config.folder / "results" / f"{notebook}.json").read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError):
        return
    names = names & before.keys() - {"output_dir"}
    changed = [f"{n}={before[n]!r}" for n in KINDS if n in names and before[n] != getattr(config, n)]
    if changed:
        print(f"warning: replaces its results made with {', '.join(changed)}; another --output_dir keeps both")


def with_absolute_paths(parameters: dict) -> dict:
    """Relative paths are relative to where the user stands; a notebook's kernel stands in ``notebooks/``."""
    from jqlib.data import HUB
    from jqlib.embedded import CORPUS, MODEL

    given = {name: value for name, value in parameters.items() if isinstance(value, str)}
    paths = {name: Path(given[name]).expanduser().absolute() for name in PATHS if name in given}
    names = (MODEL, CORPUS, *HUB)
    return parameters | {
        name: str(path)
        for name, path in paths.items()
        if name == "output_dir" or (path.exists() and given[name] not in names)
    }


def check_inputs(config: Config) -> None:
    """A device or model that is missing or not supported, or a text too short, fails here and not after an hour."""
    import torch

    from jqlib.models import load_config
    from jqlib.pipeline import evaluation_windows, load_calibration

    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(f"device={config.device!r} can't be used here: {str(error).splitlines()[0]}") from error
    shape, folder = load_config(config.model), Path(config.model).expanduser()
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise FileNotFoundError(f"{folder} has no weights: expected *.safetensors or *.bin")
    longest = max(config.seqlen, config.eval_seqlen)
    if longest > shape.max_position_embeddings:
        print(f"warning: windows of {longest} tokens: the model is for {shape.max_position_embeddings} at most")
    load_calibration(config)
    if len({*evaluation_windows(config).articles}) < 2:
        print("warning: all evaluation windows are from one article: no interval. Ask for more by --eval_windows")
    text = config.eval_dataset
    if text == config.calib_dataset and Path(text or "").is_file():
        print(f"warning: {text} is both calibrated on and evaluated on: expect perplexities that are too good")


def select_notebooks(only: str | None) -> list[Path]:
    """All notebooks, or those whose numbers ``only`` lists (``02,05``)."""
    every = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    numbers = [n.strip().zfill(2) for n in only.split(",")] if only else [path.name[:2] for path in every]
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
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"run file {path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"run file {path} does not hold parameters: expected lines such as 'model: smollm2-135m'")
    return content


def write_html(notebooks: list[Path], to: Path) -> None:
    """All executed notebooks as one self-contained page, code folded away."""
    import nbformat
    from nbconvert import HTMLExporter

    from jqlib.store import write

    merged = nbformat.read(notebooks[0], as_version=4)
    merged.cells = [cell for path in notebooks for cell in nbformat.read(path, as_version=4).cells]
    for i, cell in enumerate(merged.cells):
        cell.id = f"cell-{i}"  # each notebook counts from 0
    merged.metadata["title"] = "JointQuant"
    exporter = HTMLExporter(exclude_input=True, exclude_input_prompt=True, exclude_output_prompt=True)
    body, _ = exporter.from_notebook_node(merged)
    write(to, lambda path: path.write_text(body, encoding="utf-8"))


def info(config: Config) -> int:
    from jqlib.info import describe

    print(describe(config))
    return 0


def sweep(arguments: argparse.Namespace) -> int:
    """Check every run of the sweep, and only then start it."""
    from jqlib import sweep

    sweep.require_dask()
    folder = arguments.output_dir or output_folder() / "sweep"
    run_files = {path: read_run_file(path) for path in arguments.files}
    runs = sweep.plan(run_files, arguments.values, folder.expanduser().absolute())
    runs = {name: with_absolute_paths(parameters) for name, parameters in runs.items()}
    only = ",".join(path.name[:2] for path in select_notebooks(arguments.only))
    configs = {}
    for name, parameters in runs.items():
        config = make_config(parameters)
        configs.setdefault(tuple(getattr(config, field) for field in INPUTS), (name, config))
    for name, config in configs.values():
        try:
            check_inputs(replace(config, device="cpu") if arguments.scheduler else config)  # its workers' devices
        except (ValueError, OSError) as error:
            raise ValueError(f"{name}: {error}") from error
    slots = arguments.workers or (1 if arguments.scheduler else sweep.slots_here([c for _, c in configs.values()]))
    return sweep.sweep(runs, only, arguments.scheduler, slots, arguments.retry)


def report(output_dir: Path) -> int:
    from jqlib.report import report

    print(report(output_dir).to_string(index=False, float_format="%.2f"))
    return 0


def _add_sweep(commands) -> None:
    parser = commands.add_parser(
        "sweep", allow_abbrev=False, help="run many models and settings, in parallel up to memory and cores",
        description="Every run file with every combination of the values of -p, each a run of its own. Finished runs "
        "are skipped, runs that were cut off are done again.",
    )  # fmt: skip
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="run files: runs/*.yaml")
    parser.add_argument("-p", dest="values", action="append", default=[], metavar="NAME=VALUE[,VALUE]",
                        help="a parameter of all runs, or a list of values: one run for each")  # fmt: skip
    parser.add_argument("--only", help="notebooks to run, by number: 02,05")
    parser.add_argument("--output_dir", type=Path, help="one folder a run goes here (jointquant_output/sweep)")
    parser.add_argument("--retry", action="store_true", help="also do again what failed before")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--workers", type=_count, help="runs at a time on this machine (what cores and memory allow)")
    where.add_argument("--scheduler", metavar="ADDRESS",
                       help="a running Dask scheduler, tcp://host:8786, instead of this machine. Its workers need this "
                       "environment and must see this folder of the file system under the same path; a worker does as "
                       "many runs at a time as it has threads (dask worker --nthreads 1)")  # fmt: skip


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of runs, 1 or more, got {text!r}")
    return int(text)


def _add_flag(parser: argparse.ArgumentParser, name: str) -> None:
    default = getattr(Config, name)
    told = HELP[name] if name != "recipe" else f"{HELP[name]}: {', '.join(RECIPES)}"
    options = {"dest": name, "default": argparse.SUPPRESS, "help": f"{told} ({default})".replace("%", "%%")}
    if KINDS[name] is bool:  # --use_smooth, --use_smooth False, --no-use_smooth
        parser.add_argument(f"--{name}", nargs="?", const=True, type=_boolean, **options)
        parser.add_argument(f"--no-{name}", action="store_false", dest=name, default=argparse.SUPPRESS)
    else:
        parser.add_argument(f"--{name}", type=KINDS[name], **options)


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return text.lower() == "true"


if __name__ == "__main__":
    sys.exit(main())
