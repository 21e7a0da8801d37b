"""What a run leaves on disk: artifacts that a rerun reuses, and results.

An artifact is one safetensors file, its plain values and all that it depends on in the metadata. It is written to a
temporary file and renamed, under a lock, so that processes neither mix nor repeat each other's work; a damaged one is
reported and made anew.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryFile

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, uint8

from jqlib.config import ROOT, Config
from jqlib.memory import PeakMemory, release

PACKAGES = ("torch", "transformers", "datasets", "numpy", "pandas", "matplotlib", "papermill")
DECIDING = ("torch", "transformers")  # their versions decide what an artifact holds

DPI = 200  # of figures: sharp on a dense screen
UNREADABLE = (OSError, ValueError, KeyError, TypeError, SafetensorError)  # what a damaged file may raise

Made = tuple[dict[str, Tensor], dict]  # tensors, and plain values about them


def check_place(folder: Path, name: str) -> None:
    """Raises OSError, with the parameter's ``name``, where a run could not write to a folder, or could not make it."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        TemporaryFile(dir=there).close()
    except OSError as error:
        raise OSError(f"{name}: nothing can be written in {folder} ({error.strerror}). Name another folder") from error


@dataclass(frozen=True)
class Artifact:
    """Something that is made once. Its key is a hash of ``kind``, ``settings``, ``code``, the keys of its inputs
    and the versions of `DECIDING`.

    ``make(*inputs)`` gives it, inputs as they are (tensors, values); a ``resumable`` one is also given ``resume``, the
    state that an unfinished making left behind (None: none), and ``keep``, which keeps one.
    """

    folder: Path
    kind: str
    settings: dict
    code: str
    make: Callable[..., Made]
    inputs: tuple["Artifact", ...] = ()
    resumable: bool = False
    model: str | None = None  # whose it is, by name

    @cached_property
    def depends(self) -> dict:
        """All that it depends on, its inputs' likewise."""
        about = {"kind": self.kind, "settings": self.settings, "code": self.code, "versions": decisive_versions()}
        return about | {"inputs": [artifact.depends for artifact in self.inputs]}

    @cached_property
    def path(self) -> Path:
        key = hashlib.sha256(json.dumps(self.depends, sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / "artifacts" / f"{self.kind}-{key}.safetensors"

    def get(self) -> Made:
        """Its tensors and values, made if they are not there yet.

        Values get what making took: ``seconds``, ``peak_rss_bytes`` and ``peak_gpu_bytes`` (the most memory meanwhile);
        ``took``, the same for each artifact that it is made from, by name; and ``reused``.
        """
        if (found := self._reused()) is not None:
            return found
        inputs = [artifact.get() for artifact in self.inputs]
        with alone(self.path.with_name(f".{self.path.name}.lock"), f"making {self.path.name}"):
            return self._reused() or self._made(inputs)

    def _reused(self) -> Made | None:
        if (found := read(self.path)) is None:
            return None
        with suppress(OSError):  # another's folder, or read-only
            os.utime(self.path)  # when it was last of use
        print(f"reusing {self.kind} ({self.path.name}, made in {found[1]['seconds']:.1f} s)")
        return found[0], found[1] | {"reused": True}

    def _made(self, inputs: list[Made]) -> Made:
        unfinished = self.path.with_name(f"unfinished-{self.path.name}")
        more = {}
        if self.resumable:
            state = read(unfinished)
            if state:
                print(f"resuming from {unfinished.name}")
            more = {"resume": state and state[0], "keep": lambda tensors: _write(unfinished, self, tensors, {})}
        release()
        start, peak = time.perf_counter(), PeakMemory()
        tensors, values = self.make(*inputs, **more)
        cost = {"seconds": time.perf_counter() - start} | peak.measured()
        took = {
            artifact.path.stem: {name: known[name] for name in cost}
            for artifact, (_, known) in zip(self.inputs, inputs, strict=True)
        }
        for _, known in inputs:
            took |= known["took"]
        values = values | cost | {"took": took}
        _write(self.path, self, tensors, values)
        unfinished.unlink(missing_ok=True)
        return tensors, values | {"reused": False}


def alone(path: Path, doing: str):
    """A lock in this file, which one process at a time holds; what another is ``doing`` is said and waited for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=1)
    except Timeout:
        print(f"another process is {doing}: waiting for it", flush=True)
        return lock.acquire()


def read(path: Path) -> Made | None:
    """The tensors and values of an artifact; None if there is none, or (said so) if it is damaged.

    PermissionError if it is another user's, who lets nobody read it.
    """
    if not path.exists():
        return None
    if not os.access(path, os.R_OK):
        raise PermissionError(f"{path} is another user's and can't be read: give another --output_dir")
    try:
        with safe_open(path, "pt") as file:
            about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about["sha256"] != _digest(tensors, about["values"]):
            raise ValueError("it does not have the SHA-256 that it was written with")
        return tensors, json.loads(about["values"])
    except UNREADABLE as error:
        print(f"{path.name} is damaged ({error}): making it anew")
        return None


def said_of(path: Path) -> tuple[dict, str | None] | None:
    """What an artifact says that it depends on, and its model's name; None if it can't be read."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata()
            return json.loads(about["depends"]), json.loads(about.get("model", "null"))
    except UNREADABLE:
        return None


def _write(path: Path, of: Artifact, tensors: dict[str, Tensor], values: dict) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    said = json.dumps(values, default=float)
    about = {"depends": json.dumps(of.depends), "model": json.dumps(of.model), "values": said}
    about["sha256"] = _digest(tensors, said)
    try:
        write(path, lambda to: save_file(tensors, to, metadata=about))
    except SafetensorError as error:
        raise OSError(f"{path} can't be written: {error}. Is the disk full?") from error


def _digest(tensors: dict[str, Tensor], values: str) -> str:
    digest = hashlib.sha256(values.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(uint8).numpy())
    return digest.hexdigest()


def save_results(config: Config, notebook: str, metrics: dict) -> Path:
    """Write ``results/<notebook>.json``: the metrics with the config, versions and git commit they came from.

    Says so where it replaces results of other settings: those of a run that was at work in the same folder, perhaps.
    """
    path = config.folder / "results" / f"{notebook}.json"
    if changed := differences(path, config):
        print(f"replaces results made with {', '.join(changed)}; another --output_dir keeps both")
    content = {
        "notebook": notebook,
        "config": asdict(config),
        "seed": config.seed,
        "versions": versions(),
        "git_commit": git_commit(),
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **json.loads(json.dumps(metrics, default=float), parse_constant=lambda _: None),  # JSON knows no NaN
    }
    write_json(path, content | {"sha256": _digest({}, json.dumps(content))})
    return path


def read_results(path: Path) -> dict:
    """What `save_results` wrote. ValueError if it is damaged, was changed by hand, or is another kind of file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content["config"], dict):
            raise TypeError("its config is none")
        if not all(isinstance(row, dict) for row in content.get("rows", [])):
            raise TypeError("its rows are none")
        digest = content.pop("sha256", None)  # none before there was one
        if digest is not None and digest != _digest({}, json.dumps(content)):
            raise ValueError("it does not have the SHA-256 that it was written with")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no results file as a notebook leaves it: {error}") from error
    return content


def differences(path: Path, config: Config) -> list[str]:
    """The settings in which a results file was made otherwise, as ``seed=1``; none if there is no such file."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["config"]
        return [f"{name}={before[name]!r}" for name, value in asdict(config).items()
                if name != "output_dir" and name in before and before[name] != value]  # fmt: skip
    except UNREADABLE:
        return []


def save_figure(config: Config, figure, name: str, note: str | None = None) -> None:
    """Write a matplotlib figure to ``figures/<name>.png``; ``note`` stands below it in grey: where its numbers are from
    (None: `where_from` the config; "": nothing)."""
    figure.text(0.005, 0, where_from(config) if note is None else note, va="top", fontsize=7, color="0.45")
    figure.draw_without_rendering()  # lays it out; to be cut to what is drawn moves a figure, and its legends with it
    figure.set_layout_engine("none")
    for legend in figure.legends:
        if legend.get_bbox_to_anchor() is figure.bbox:
            legend.set_bbox_to_anchor((0, 0, 1, 1), figure.transFigure)
    options = {"format": "png", "dpi": DPI, "bbox_inches": "tight"}  # the style's are gone by now
    write(config.folder / "figures" / f"{name}.png", lambda to: figure.savefig(to, **options))


def where_from(config: Config, read: str | None = None) -> str:
    """Model, profile and what was ``read`` (None: the run's windows), in a line."""
    windows = f"{config.eval_windows} × {config.eval_seqlen}" if config.eval_windows else "all"
    read = read or f"calibrated on {config.nsamples} × {config.seqlen} tokens, evaluated on {windows}"
    return f"{config.folder.name} · {config.profile} · {read}"


def write_json(path: Path, content: dict) -> None:
    write(path, lambda to: to.write_text(json.dumps(content, indent=1, default=float) + "\n"))


def write(path: Path, writer: Callable[[Path], object]) -> None:
    """Call ``writer`` with a temporary sibling of ``path`` and rename it: readers see all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}")
    try:
        writer(temporary)
        temporary.chmod(path.parent.stat().st_mode & 0o666)  # safetensors' writer lets nobody else read its files
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@cache
def decisive_versions() -> dict[str, str]:
    """Those that an artifact depends on."""
    return {name: importlib.metadata.version(name) for name in DECIDING}


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def git_commit() -> str | None:
    """The commit of this checkout, with ``+changes`` if files differ from it; None outside a checkout."""

    def git(*words):
        command = ["git", "-C", ROOT, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "jqlib", "notebooks") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
