"""By `make mutants`: the numerical core, changed in one small place at a time: do its tests notice?

Each change is made to a copy of the project, in which the tests of its module run until one fails (or takes far longer
than it should). What no test notices is judged in judged.json: why it makes no difference to a result. A survivor
without a judgement fails the run. What was tried is kept in .mutants.json: the same command goes on from there.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ["TQDM_DISABLE"] = "1"  # for the tests, whose processes have tqdm from here

import pytest
import torch
from changes import Change, changes
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401  once: each mutant is a fork

import jqlib.pipeline  # noqa: F401  for the libraries that it imports

for name in [name for name in sys.modules if name.partition(".")[0] == "jqlib"]:
    del sys.modules[name]  # each mutant's tests import their own

ROOT = Path(__file__).parents[2]
KEPT, JUDGED = ROOT / ".mutants.json", Path(__file__).parent / "judged.json"
COPIED = ("jqlib", "tests", "notebooks", "runs", "pyproject.toml", "README.md")
QUIET = ("-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning")
TESTS = {  # what must notice a change, the quickest first
    "transform/transform.py": ["transform", "properties", "build"],
    "transform/grids.py": ["quant", "objectives", "properties"],
    "transform/hadamard.py": ["hadamard"],
    "transform/orthogonal.py": ["properties", "joint"],
    "quant/gptq.py": ["gptq", "properties"],
    "learn/solver.py": ["solver", "r2", "joint"],
    "model/walk.py": ["walk", "properties", "activations"],
}


def key_of(file: str, change: Change) -> str:
    return f"{file} {change.place}: {change.old}  ⇒  {change.new}"


def sample(count: int, seed: int) -> dict[str, tuple[str, Change]]:
    """So many of all changes, by key: those of the smallest hashes, so that code elsewhere moves nothing."""
    every = {key_of(file, x): (file, x) for file in TESTS for x in changes((ROOT / "jqlib" / file).read_text())}
    chosen = sorted(every, key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest())
    return {key: every[key] for key in chosen[:count]}


def _test_here(folder: Path, tests: list[str]) -> int:
    """Pytest's exit code; 99 if it imported another jqlib."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = str(folder)
    out = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    try:
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", *QUIET, *tests])
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return 98
    theirs = sys.modules.get("jqlib")
    return int(code) if theirs is None or str(folder) in theirs.__file__ else 99


class Trial:
    """Tests that run on a copy of the project, in a process of their own."""

    def __init__(self, folder: Path, tests: list[str], limit: float):
        self.folder, self.start, self.limit = folder, time.monotonic(), limit
        self.pid = os.fork()
        if not self.pid:
            try:
                os.setsid()
                os._exit(_test_here(folder, tests))
            finally:
                os._exit(98)

    def ended(self) -> str | None:
        """ "passed", "failed", or "endless"; None as long as they run. RuntimeError if they were not of this copy."""
        pid, code = os.waitpid(self.pid, os.WNOHANG)
        if not pid:
            if time.monotonic() - self.start < self.limit:
                return None
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            return "endless"
        if code in (98 << 8, 99 << 8):
            raise RuntimeError(f"the tests did not run, or not on the copy: {(self.folder / 'output.txt').read_text()}")
        return "failed" if code else "passed"

    def wait(self) -> str:
        while (end := self.ended()) is None:
            time.sleep(0.05)
        return end


def _copy(folder: Path) -> Path:
    """A copy of the project."""
    folder.mkdir()
    for part in COPIED:
        (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, folder / part)
    return folder


def tests_of(file: str) -> list[str]:
    return [f"tests/test_{test}.py" for test in TESTS[file]]


def limit_of(folder: Path, file: str, took: dict[str, float]) -> float:
    """How long its tests may take, in seconds; ``took``: what they take without any change, measured here at first."""
    name = f"{file}: {' '.join(TESTS[file])}"
    if name not in took:
        trial = Trial(folder, tests_of(file), 600)
        if trial.wait() != "passed":
            raise RuntimeError(f"{name} fail as it is: {(folder / 'output.txt').read_text()}")
        took[name] = time.monotonic() - trial.start
    return 60 + 5 * took[name]


def main() -> int:
    parser = argparse.ArgumentParser(description="Do the tests notice small changes to the numerical core?")
    parser.add_argument("count", type=int, nargs="?", default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no mutant after so many")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {"took": {}, "ends": {}}
    chosen, stop = sample(arguments.count, arguments.seed), time.monotonic() + 60 * arguments.minutes
    with TemporaryDirectory() as name:
        copies = [_copy(Path(name) / str(i)) for i in range(arguments.jobs)]
        left = [key for key in chosen if key not in kept["ends"]]
        try_all(left, chosen, copies, kept, stop)
    return report(chosen, kept["ends"])


def try_all(
    left: list[str], chosen: dict[str, tuple[str, Change]], copies: list[Path], kept: dict, stop: float
) -> None:
    """So many mutants at a time as there are copies. What is known is kept after each."""
    running: dict[str, Trial] = {}
    with tqdm(total=len(left), desc="mutants", disable=False) as bar:
        while running or (left and time.monotonic() < stop):
            while left and copies and time.monotonic() < stop:
                key, folder = left.pop(0), copies.pop()
                file, change = chosen[key]
                limit = limit_of(folder, file, kept["took"])
                (folder / "jqlib" / file).write_text(change.source)
                running[key] = Trial(folder, tests_of(file), limit)
            for key, end in [(key, trial.ended()) for key, trial in running.items()]:
                if end:
                    folder, file = running.pop(key).folder, chosen[key][0]
                    shutil.copy(ROOT / "jqlib" / file, folder / "jqlib" / file)
                    copies.append(folder)
                    kept["ends"][key] = end
                    KEPT.write_text(json.dumps(kept, indent=1, ensure_ascii=False))
                    bar.update()
            time.sleep(0.05)


def report(chosen: dict[str, tuple[str, Change]], ends: dict[str, str]) -> int:
    judged = json.loads(JUDGED.read_text()) if JUDGED.exists() else {}
    tried = [key for key in chosen if key in ends]
    survived = [key for key in tried if ends[key] == "passed"]
    for key in survived:
        print(f"survived, line {chosen[key][1].line}: {key}\n    {judged.get(key, 'NOT JUDGED')}")
    if tried:
        share = 1 - len(survived) / len(tried)
        endless = sum(ends[key] == "endless" for key in tried)
        print(f"{len(tried)} mutants of {len(chosen)}: {share:.0%} noticed ({endless} of them by their time), "
              f"{len(survived)} survived, {sum(key not in judged for key in survived)} of them not judged")  # fmt: skip
    return any(key not in judged for key in survived)


if __name__ == "__main__":
    sys.exit(main())
