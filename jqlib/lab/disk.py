"""What a run's artifacts take on disk, and which of them no current code or setting would reuse."""

import json
from pathlib import Path

from jqlib import calibration, pipeline
from jqlib.code import code_of
from jqlib.model.load import fingerprint
from jqlib.store import decisive_versions, depends_of


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
    for place in sorted(folder.rglob("artifacts")):
        models = _models(place.parent)
        for file in sorted(place.glob("[!.]*")):
            depends = depends_of(file)
            (kept if depends and _current(depends, models) else stale).append(file)
    return kept, stale


def _current(depends: dict, models: set[str]) -> bool:
    """Whether code, versions and model are what they were, its inputs' likewise."""
    name = f"{depends['kind']}_step"
    step = getattr(calibration, name, None) or getattr(pipeline, name, None)
    same = step is not None and code_of(step) == depends["code"] and depends["versions"] == decisive_versions()
    model = depends["settings"].get("model")
    known = not models or model is None or model in models
    return same and known and all(_current(inner, models) for inner in depends["inputs"])


def _models(folder: Path) -> set[str]:
    """What the models of a folder's results are now; empty if that can't be said of one."""
    try:
        names = {json.loads(file.read_text())["config"]["model"] for file in folder.glob("results/[0-9]*.json")}
        return {fingerprint(name) for name in names}
    except (OSError, ValueError, KeyError):
        return set()


def _size(files: list[Path]) -> str:
    return f"{sum(file.stat().st_size for file in files) / 1e9:.2f} GB"
