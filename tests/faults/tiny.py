"""The real pipeline on a tiny model, each time in a process of its own. It is forked: imports are paid once."""

import json
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # conftest

import torch
from conftest import make_tiny_model, make_tiny_tokenizer

from jqlib import fused, pipeline
from jqlib.config import make_config
from jqlib.store import read

RECIPE = "jointquant-best"
SMALL = {"profile": "quick", "nsamples": 4, "seqlen": 64, "max_tokens": 64, "eval_seqlen": 64, "eval_windows": 4,
         "refine_steps": 24, "step_tokens": 64}  # fmt: skip
fused.LARGE = 2**62  # compiling takes longer than all else here
TOLD = "nll", "kl_by_window", "ppl", "kl", "top1"


def prepare(folder: Path) -> None:
    """Its model and text; in a child, for nothing of torch may run before the forks."""

    def make() -> None:
        make_tiny_model().save_pretrained(folder / "model")
        make_tiny_tokenizer().save_pretrained(folder / "model")
        (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 100)

    assert finished(started(make))


def evaluate(files: Path, out: Path, **more) -> dict:
    text = str(files / "text.txt")
    named = {"model": str(files / "model"), "calib_dataset": text, "eval_dataset": text, "output_dir": str(out)}
    config = make_config(SMALL | named | more)
    row = pipeline.evaluate(config, pipeline.recipe_of(config, RECIPE), 4, 4)
    return {name: row[name] for name in TOLD}


def work(files: Path, out: Path, row: Path | None = None, **more) -> None:
    """Evaluate, and leave the row in a file."""
    out.mkdir(parents=True, exist_ok=True)
    (row or out / "row.json").write_text(json.dumps(evaluate(files, out, **more)))


def started(action: Callable[[], object], log: Path | None = None) -> int:
    """A process that does this, its output in a log; it ends with 1 and its error on the last line."""
    if pid := os.fork():
        return pid
    code = 0
    try:
        sys.stdout = sys.stderr = open(log or os.devnull, "w", buffering=1)  # noqa: SIM115
        torch.set_num_threads(1)
        action()
    except Exception as error:
        code = 1
        print(f"{type(error).__name__}: {error}")
    finally:
        os._exit(code)


def finished(pid: int) -> bool:
    return os.waitpid(pid, 0)[1] == 0


def whole(out: Path) -> set[str]:
    """The names of the artifacts that can be read; of others it says nothing."""
    with redirect_stdout(None):
        return {path.name for path in out.glob("*/artifacts/*.safetensors") if read(path) is not None}
