"""By `make faults`: the real pipeline on a tiny model, killed again and again, always ends with the same numbers.

Each round has a folder of its own. A child process evaluates our best recipe there and is killed, at a random moment or
just before or after the n-th file it puts in place; a second child finishes what it left. Its row must be that of a run
which nothing disturbed, and every file it leaves must be whole. The children are forked: imports are paid once.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parent.parent))  # conftest

import torch
from conftest import make_tiny_model, make_tiny_tokenizer
from tqdm import tqdm

from jqlib import fused, pipeline
from jqlib.config import make_config
from jqlib.store import read

MOMENTS, RECIPE = int(sys.argv[1]) if len(sys.argv) > 1 else 100, "jointquant-best"
SMALL = {"profile": "quick", "nsamples": 4, "seqlen": 64, "max_tokens": 64, "eval_seqlen": 64, "eval_windows": 4,
         "refine_steps": 24, "step_tokens": 64}  # fmt: skip
fused.LARGE = 2**62  # compiling takes longer than all else here
TOLD = "nll", "kl_by_window", "ppl", "kl", "top1"


def prepare(folder: Path) -> None:
    make_tiny_model().save_pretrained(folder / "model")
    make_tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 100)


def evaluate(files: Path, out: Path) -> dict:
    text = str(files / "text.txt")
    named = {"model": str(files / "model"), "calib_dataset": text, "eval_dataset": text, "output_dir": str(out)}
    config = make_config(SMALL | named)
    row = pipeline.evaluate(config, pipeline.recipe_of(config, RECIPE), 4, 4)
    return {name: row[name] for name in TOLD}


def child(files: Path, out: Path, at_file: int | None = None, after: bool = False) -> int:
    """Start the work in a process of its own; it kills itself at the ``at_file``-th file."""
    if pid := os.fork():
        return pid
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    torch.set_num_threads(1)
    replace, count = os.replace, 0

    def put(source, target) -> None:
        nonlocal count
        count += 1
        if count == at_file and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if count == at_file:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = put
    out.mkdir(parents=True, exist_ok=True)
    row = evaluate(files, out)
    (out / "row.json").write_text(json.dumps({"row": row, "files": count}))
    os._exit(0)


def finished(pid: int) -> bool:
    return os.waitpid(pid, 0)[1] == 0


def main() -> int:
    random.seed(0)
    with TemporaryDirectory() as folder:
        files = Path(folder)
        pid = os.fork()
        if not pid:  # nothing of torch may run here before the forks
            prepare(files)
            os._exit(0)
        finished(pid)
        start = time.monotonic()
        assert finished(child(files, files / "undisturbed"))
        took = time.monotonic() - start
        whole = json.loads((files / "undisturbed" / "row.json").read_text())
        plans = [(n, after) for n in range(1, whole["files"] + 1) for after in (False, True)]
        plans += [random.uniform(0, took) for _ in range(MOMENTS)]
        lost, wrong = 0, 0
        for i, plan in enumerate(tqdm(plans, "kills")):
            out = files / str(i)
            if isinstance(plan, tuple):
                finished(child(files, out, *plan))
            else:
                pid = child(files, out)
                time.sleep(plan)
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            whole_before = {p.name for p in out.glob("*/artifacts/*.safetensors") if read(p) is not None}
            if not finished(child(files, out)):
                lost += 1
                continue
            kept = {p.name for p in out.glob("*/artifacts/*.safetensors") if read(p) is not None}
            lost += not {name for name in whole_before if not name.startswith("unfinished")} <= kept
            wrong += json.loads((out / "row.json").read_text())["row"] != whole["row"]
    print(f"{len(plans)} kills ({MOMENTS} at random moments of {took:.1f} s, two at each of {whole['files']} files): "
          f"{lost} lost, {wrong} wrong")  # fmt: skip
    return bool(lost or wrong)


if __name__ == "__main__":
    sys.exit(main())
