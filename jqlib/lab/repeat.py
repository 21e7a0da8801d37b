"""A result made once more from its own record, and held against it."""

import math
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from jqlib.config import make_config
from jqlib.lab.run import run, select_notebooks
from jqlib.store import git_commit, read_results, versions

MEASURED = ("second", "bytes", "minutes", "took", "speed", "reused", "written", "engine")  # another each time


def repeat(path: Path) -> tuple[bool, str]:
    """Run the notebook of a ``results/*.json`` with the settings it records, apart from all that is there.

    Whether every number came out the same (those of time and memory left out), and what differs, in words. Raises
    ValueError for a file that is no result, or if the notebook fails.
    """
    try:
        before = read_results(path)
        config, notebook = make_config(before["config"]), before["notebook"]
        if notebook not in {path.stem for path in select_notebooks(None)}:
            raise ValueError(f"there is no notebook {notebook}")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no result of a notebook, such as results/05_w4a4_eval.json: {error}") from error
    with TemporaryDirectory() as folder:
        if run(before["config"] | {"output_dir": folder}, notebook[:2]):
            raise ValueError(f"{notebook} failed: it can't be compared")
        (found,) = Path(folder).glob(f"*/results/{notebook}.json")
        after = read_results(found)
    here = {"git_commit": git_commit(), "versions": versions()}
    said = [f"{name} {before.get(name)}, now {value}" for name, value in here.items() if before.get(name) != value]
    old, new = (dict(_numbers(result)) for result in (before, after))
    said += [f"{name} is {'no more' if name in old else 'new'}" for name in sorted(old.keys() ^ new.keys())]
    apart = {name: abs(new[name] - old[name]) / max(abs(old[name]), 1e-12) for name in old.keys() & new.keys()}
    moved = sorted((name for name, share in apart.items() if share != 0), key=lambda name: -apart[name])
    said += [f"{name}: {old[name]:.6g}, now {new[name]:.6g} ({apart[name]:.1e})" for name in moved[:10]]
    same = not moved and old.keys() == new.keys()
    head = f"{config.model}, {notebook}: {len(apart)} numbers, {len(moved)} differ"
    return same, "\n".join([head, *said])


def _numbers(value, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a result by its place in it."""
    if isinstance(value, dict):
        for key, part in value.items():
            if not any(word in key for word in (*MEASURED, "config", "versions")):
                yield from _numbers(part, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from _numbers(part, f"{name}[{i}]")
    elif isinstance(value, int | float) and math.isfinite(value):
        yield name, float(value)
