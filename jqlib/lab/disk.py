"""What a run's artifacts take on disk, and which of them no current code or setting would reuse."""

import platform
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import psutil

from jqlib import calibration, pipeline
from jqlib.code import code_of
from jqlib.model.load import fingerprint
from jqlib.store import decisive_versions, said_of

NAME = re.compile(r"(unfinished-)?[\w-]+-[0-9a-f]{16}\.(safetensors|json)")  # of ours: other files are let alone
CUT_OFF = re.compile(rf"\.{NAME.pattern}\.[^.]+.*\.\d+")  # what a killed run was writing


def clean(folder: Path) -> str:
    """Remove what lies in ``artifacts`` below a folder and would never be reused; what was removed, in words."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder.absolute()}: nothing was removed")
    kept, stale = artifacts(folder)
    freed = _size(stale)
    for file in stale:
        file.unlink()
        file.with_name(f".{file.name}.lock").unlink(missing_ok=True)
    return f"removed {len(stale)} files, {freed}; kept {len(kept)}, {_size(kept)}, in {folder}"


def on_disk(folder: Path) -> str:
    """What `clean` would keep and remove, in words."""
    kept, stale = artifacts(folder)
    text = f"on disk: {len(kept)} artifacts, {_size(kept)}, in {folder}"
    return text + (f"; {len(stale)} more, {_size(stale)}, are of no use: python -m jqlib clean" if stale else "")


def artifacts(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files in ``artifacts`` below a folder: those that can be reused, and the others."""
    kept: list[Path] = []
    stale: list[Path] = []
    now = cache(_content)  # a model on the hub is asked for once, not for every file
    for place in sorted(folder.rglob("artifacts")):
        files = [file for file in sorted(place.iterdir()) if file.is_file()]
        for file in files:
            if NAME.fullmatch(file.name):
                said = said_of(file)
                (kept if said and _current(said[0]) and _same_model(*said, now) else stale).append(file)
        stale += [file for file in files if CUT_OFF.fullmatch(file.name) and _process_is_gone(file)]
    return kept, stale


def _current(depends: dict) -> bool:
    """Whether code and versions are what they were, its inputs' likewise."""
    name = f"{depends['kind']}_step"
    step = getattr(calibration, name, None) or getattr(pipeline, name, None)
    same = step is not None and code_of(step) == depends["code"] and depends["versions"] == decisive_versions()
    return same and all(_current(inner) for inner in depends["inputs"])


def _same_model(depends: dict, name: str | None, now: Callable[[str], str | None]) -> bool:
    """Whether the model of this name is what it was; true where that can't be said."""
    before = depends["settings"].get("model")
    return before is None or name is None or now(name) in (before, None)


def _content(name: str) -> str | None:
    """What a model of this name is now; None where that can't be said."""
    try:
        return fingerprint(name)
    except (OSError, ValueError):
        return None


def _process_is_gone(file: Path) -> bool:
    """Of this machine's: the name ends in whose file it is, machine and process."""
    *_, process = file.name.split(".")
    return f".{platform.node()}." in file.name and not psutil.pid_exists(int(process))


def _size(files: list[Path]) -> str:
    return f"{sum(file.stat().st_size for file in files) / 1e9:.2f} GB"
