"""``python -m jqlib``: ``run`` the six notebooks, and what goes with them: see `COMMANDS`."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from jqlib.config import CHOICES, HELP, KINDS, Config, make_config, output_folder
from jqlib.export.can import FORMS
from jqlib.lab.checks import check_device, check_inputs
from jqlib.lab.run import read_run_file, run, select_notebooks, with_absolute_paths
from jqlib.model.questions import SETS
from jqlib.recipes import RECIPES

# what check_inputs and the estimate of memory depend on
INPUTS = ("model", "profile", "nsamples", "seqlen", "max_tokens", "eval_seqlen", "eval_windows", "eval_split",
          "eval_draw", "bos", "calib_dataset", "eval_dataset", "device", "dtype", "stream", "step_tokens",
          "w_bits")  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jqlib", description="JointQuant: a W4A4 workbook.")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(dest="command", required=True)
    run_parser = commands.add_parser("run", help="run the notebooks on a model", allow_abbrev=False)
    run_parser.add_argument("--only", help="notebooks to run, by number: 02,05")
    _add_parameters(run_parser)
    _add_sweep(commands)
    info_parser = commands.add_parser(
        "info", help="sites, sizes, memory and time of a model, and what is on disk", allow_abbrev=False
    )
    info_parser.add_argument("model", help=HELP["model"])
    info_parser.add_argument("--measure", action="store_true", help="what a row of --recipe will take, stage by stage: "
                             "it is tried here on random models of its widths (large: a few layers)")  # fmt: skip
    _add_flags(info_parser, but="model")
    _add_zero_shot(commands)
    export_parser = commands.add_parser(
        "export", help="write a recipe's model as a folder that other programs load", allow_abbrev=False
    )
    forms = "hf: rotated FP model; gguf: llama.cpp; compressed-tensors: transformers, vLLM; jointquant: all of it"
    export_parser.add_argument("--format", required=True, choices=FORMS, help=forms)
    export_parser.add_argument("--to", required=True, type=Path, metavar="FOLDER", help="a new folder")
    export_parser.add_argument("--overwrite", action="store_true", help="FOLDER may be an earlier export")
    _add_parameters(export_parser)
    study_parser = commands.add_parser("study", help="what takes hours on the embedded model: figures/study.json")
    study_parser.add_argument("--minutes", type=float, help="begin no row after so many minutes (all rows)")
    study_parser.add_argument("--device", default=Config.device, help=HELP["device"])
    repeat_parser = commands.add_parser("repeat", help="make a result once more from its own record, and compare")
    repeat_parser.add_argument(
        "result", type=Path, help="such as jointquant_output/smollm2-135m/results/02_joint_r1.json"
    )
    for name, text in {
        "report": "the rows of notebook 05 of all models and runs under a folder",
        "pages": "figures/pages: the embedded model's executed notebooks under a folder, to be read without running",
        "clean": "remove artifacts under a folder that no current code or setting would reuse",
    }.items():
        folder_parser = commands.add_parser(name, help=text)
        folder_parser.add_argument("output_dir", type=Path, nargs="?", help="(jointquant_output of this project)")
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        commands.choices[arguments.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return COMMANDS[arguments.command](arguments)
    except KeyboardInterrupt:
        print("interrupted: what was finished is kept, and the same command goes on from there", file=sys.stderr)
        return 130
    except (ValueError, OSError, ModuleNotFoundError, ArithmeticError) as error:
        if arguments.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace) -> int:
    return run(_parameters(arguments), arguments.only)


def _export(arguments: argparse.Namespace) -> int:
    from jqlib.export.export import export

    parameters = with_absolute_paths(_parameters(arguments))
    config = make_config(parameters)
    for name, own in RECIPES[config.recipe].own.items():
        if (given := parameters.get(name, own)) != own:
            raise ValueError(f"{name}={given}: recipe {config.recipe!r} has {name}={own} of its own: leave it out")
    check_inputs(config)
    print(export(config, arguments.format, arguments.to, overwrite=arguments.overwrite))
    return 0


def _parameters(arguments: argparse.Namespace) -> dict:
    """Those of the run file, and of the flags, which win."""
    return {**read_run_file(arguments.file), **_given(arguments)}


def _given(arguments: argparse.Namespace) -> dict:
    """The parameters among the flags."""
    return {name: getattr(arguments, name) for name in KINDS if hasattr(arguments, name)}


def _info(arguments: argparse.Namespace) -> int:
    from jqlib.lab import info

    config = make_config(with_absolute_paths(_given(arguments)))
    check_device(config.device)
    print(info.describe(config))
    if arguments.measure:
        from jqlib.lab import trial

        print(trial.describe(config))
    return 0


def _study(arguments: argparse.Namespace) -> int:
    from jqlib.lab.study import study

    check_device(arguments.device)
    left = study(arguments.minutes, arguments.device)
    print(f"{left} rows are left: run it again" if left else "the study is whole")
    return 0


def _zero_shot(arguments: argparse.Namespace) -> int:
    from jqlib.lab.zero_shot import zero_shot

    config = make_config(with_absolute_paths(_given(arguments)))
    print(zero_shot(config, arguments.tasks, arguments.limit).to_string(index=False))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from jqlib.lab.report import report

    print(report(arguments.output_dir or output_folder()).to_string(index=False, float_format="%.2f"))
    return 0


def _pages(arguments: argparse.Namespace) -> int:
    from jqlib.lab.pages import pages
    from jqlib.model.embedded import MODEL

    print(pages((arguments.output_dir or output_folder()) / MODEL))
    return 0


def _repeat(arguments: argparse.Namespace) -> int:
    from jqlib.lab.repeat import repeat

    same, said = repeat(arguments.result)
    print(said)
    return 0 if same else 1


def _clean(arguments: argparse.Namespace) -> int:
    from jqlib.lab.disk import clean

    print(clean(arguments.output_dir or output_folder()))
    return 0


def _sweep(arguments: argparse.Namespace) -> int:
    """Check every run of the sweep, and only then start it."""
    from jqlib.lab import sweep

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


def _add_zero_shot(commands) -> None:
    parser = commands.add_parser(
        "zero-shot", help="questions with choices that a model is asked: FP beside --recipe", allow_abbrev=False
    )
    parser.add_argument("model", help=HELP["model"])
    ours = ",".join(SETS)
    parser.add_argument("--tasks", default=ours, help=f"any of lm-eval's by name, a,b, or ({ours}), which need no hub")
    parser.add_argument("--limit", type=int, help="so many questions of each task, drawn once (all)")
    _add_flags(parser, but="model")


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of runs, 1 or more, got {text!r}")
    return int(text)


def _add_parameters(parser: argparse.ArgumentParser) -> None:
    """A run file, and all parameters as flags: what `_parameters` reads."""
    parser.add_argument("-f", "--file", type=Path, help="run file: YAML with any of the parameters below")
    _add_flags(parser)


def _add_flags(parser: argparse.ArgumentParser, but: str | None = None) -> None:
    """All parameters, ``but`` one that is given otherwise."""
    for name in KINDS:
        if name != but:
            _add_flag(parser, name)


def _add_flag(parser: argparse.ArgumentParser, name: str) -> None:
    default = getattr(Config, name)
    help_text = HELP[name] if name not in CHOICES else f"{HELP[name]}: {', '.join(CHOICES[name])}"
    options = {"dest": name, "default": argparse.SUPPRESS, "help": f"{help_text} ({default})".replace("%", "%%")}
    if KINDS[name] is bool:  # --use_smooth, --use_smooth False, --no-use_smooth
        parser.add_argument(f"--{name}", nargs="?", const=True, type=_boolean, **options)
        parser.add_argument(f"--no-{name}", action="store_false", dest=name, default=argparse.SUPPRESS)
    else:
        parser.add_argument(f"--{name}", type=KINDS[name], **options)


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return text.lower() == "true"


COMMANDS = {"run": _run, "sweep": _sweep, "export": _export, "info": _info, "zero-shot": _zero_shot, "study": _study,
            "report": _report, "repeat": _repeat, "pages": _pages, "clean": _clean}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
