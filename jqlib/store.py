"""What a run leaves on disk: artifacts that a rerun reuses, and results.

Everything is written to a temporary file and renamed. An artifact is a safetensors file with a JSON
beside it, keyed by a hash of exactly what it depends on; a damaged one is reported and made anew.
"""

import ast
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from jqlib.config import ROOT, Config

PACKAGES = ("torch", "transformers", "datasets", "numpy", "pandas", "matplotlib", "papermill")
# the modules that decide what an artifact holds; a change of their code makes it anew
METHOD = ("embedded", "models", "data", "activations", "hadamard", "rotation", "objectives", "solver", "joint",
          "baselines", "smooth", "quant", "gptq", "kv_cache", "quantize", "distill", "refine", "output",
          "tune", "intervals", "evaluate", "pipeline")  # fmt: skip

Made = tuple[dict[str, Tensor], dict]  # tensors, and plain values about them


def artifact(folder: Path, kind: str, depends: dict, make: Callable[[], Made]) -> Made:
    """``make()``, or what it gave when it was last called with the same ``depends`` and the same code.

    The plain values get ``"seconds"``, how long making it took, and ``"reused"``.
    """
    depends = depends | {"code": code_hash()}
    path = _path(folder, kind, depends)
    if (found := _read(path)) is not None:
        print(f"reusing {kind} ({path.name}, made in {found[1]['seconds']:.1f} s)")
        return found
    start = time.perf_counter()
    tensors, values = make()
    values |= {"seconds": time.perf_counter() - start}
    _write(path, depends, tensors, values)
    unfinished = _path(folder, f"unfinished-{kind}", depends)
    for leftover in (unfinished, unfinished.with_suffix(".safetensors")):
        leftover.unlink(missing_ok=True)
    return tensors, values | {"reused": False}


def checkpoint(folder: Path, kind: str, depends: dict) -> tuple[dict[str, Tensor] | None, Callable[[dict], None]]:
    """The state that the unfinished making of an artifact left behind (None: none), and a function that keeps one."""
    path = _path(folder, f"unfinished-{kind}", depends | {"code": code_hash()})
    found = _read(path)
    if found:
        print(f"going on from {path.name}")

    def keep(tensors: dict[str, Tensor]) -> None:
        _write(path, depends, tensors, {})

    return found and found[0], keep


def _path(folder: Path, kind: str, depends: dict) -> Path:
    key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]
    return folder / "artifacts" / f"{kind}-{key}.json"


def _write(path: Path, depends: dict, tensors: dict[str, Tensor], values: dict) -> None:
    tensors_path = path.with_suffix(".safetensors")
    if tensors:
        write(tensors_path, lambda to: save_file({k: v.contiguous() for k, v in tensors.items()}, to))
    digest = _sha256(tensors_path) if tensors else None
    write_json(path, {"depends": depends, "values": values, "sha256": digest})


def _read(path: Path) -> Made | None:
    if not path.exists():
        return None
    tensors = path.with_suffix(".safetensors")
    try:
        record = json.loads(path.read_text())
        if record["sha256"] and record["sha256"] != _sha256(tensors):
            raise ValueError(f"{tensors.name} does not have the SHA-256 it was written with")
        return (load_file(tensors) if record["sha256"] else {}), record["values"] | {"reused": True}
    except (OSError, ValueError, KeyError) as error:
        print(f"{path.name} is damaged ({error}): making it anew")
        return None


def save_results(config: Config, notebook: str, metrics: dict) -> Path:
    """Write ``results/<notebook>.json``: the metrics with the config, versions and git commit they came from."""
    path = config.folder / "results" / f"{notebook}.json"
    write_json(path, {
        "notebook": notebook,
        "config": asdict(config),
        "seed": config.seed,
        "versions": versions(),
        "git_commit": git_commit(),
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **json.loads(json.dumps(metrics, default=float), parse_constant=lambda _: None),  # JSON knows no NaN
    })  # fmt: skip
    return path


def save_figure(config: Config, figure, name: str) -> None:
    """Write a matplotlib figure to ``figures/<name>.png``."""
    write(config.folder / "figures" / f"{name}.png", lambda to: figure.savefig(to, format="png"))


def write_json(path: Path, content: dict) -> None:
    write(path, lambda to: to.write_text(json.dumps(content, indent=1, default=float) + "\n"))


def write(path: Path, writer: Callable[[Path], object]) -> None:
    """Call ``writer`` with a temporary sibling of ``path`` and rename it: readers see all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        writer(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def git_commit() -> str | None:
    """The commit of this checkout, with ``+changes`` where files differ from it; None outside a checkout."""

    def git(*words):
        command = ["git", "-C", ROOT, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "jqlib", "notebooks") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def peak_rss_bytes() -> int | None:
    """The most memory this process has held so far; None where the system doesn't say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@cache
def code_hash() -> str:
    """A hash of the method's modules without comments and docstrings: prose may change, artifacts stay."""
    digest = hashlib.sha256()
    for name in METHOD:
        tree = ast.parse((ROOT / "jqlib" / f"{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:16]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
