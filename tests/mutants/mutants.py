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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from tempfile import TemporaryDirectory

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
    "transform/grids.py": ["properties", "quant"],
    "transform/hadamard.py": ["hadamard"],
    "transform/orthogonal.py": ["properties", "joint"],
    "quant/gptq.py": ["gptq", "properties"],
    "learn/solver.py": ["r2", "joint"],
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


def tested(folder: Path, tests: list[str], limit: float) -> str:
    """How the tests end in this copy: "passed", "failed", or "endless"; RuntimeError if they were not of this copy."""
    if not (pid := os.fork()):
        try:
            os.setsid()
            os._exit(_test_here(folder, tests))
        finally:
            os._exit(98)
    end = time.monotonic() + limit
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "endless"
        time.sleep(0.05)
    if done[1] in (98 << 8, 99 << 8):
        raise RuntimeError(f"the tests did not run, or not on {folder}: {(folder / 'output.txt').read_text()}")
    return "passed" if done[1] == 0 else "failed"


def _copy(folder: Path) -> Path:
    """A copy of the project."""
    folder.mkdir()
    for part in COPIED:
        (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, folder / part)
    return folder


def _noticed(folder: Path, file: str, change: Change, took: dict[str, float]) -> str:
    """How its tests end with this change; ``took``: the seconds they take without any, by file."""
    tests = [f"tests/test_{test}.py" for test in TESTS[file]]
    if file not in took:
        start = time.monotonic()
        if tested(folder, tests, 600) != "passed":
            raise RuntimeError(f"{file}: its tests fail as it is: {(folder / 'output.txt').read_text()}")
        took[file] = time.monotonic() - start
    (folder / "jqlib" / file).write_text(change.source)
    end = tested(folder, tests, 20 + 3 * took[file])
    shutil.copy(ROOT / "jqlib" / file, folder / "jqlib" / file)
    return end


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
    with TemporaryDirectory() as name, ThreadPoolExecutor(arguments.jobs) as pool:
        copies = Queue()
        for i in range(arguments.jobs):
            copies.put(_copy(Path(name) / str(i)))

        def try_one(key: str) -> None:
            if key in kept["ends"] or time.monotonic() > stop:
                return
            folder, (file, change) = copies.get(), chosen[key]
            kept["ends"][key] = _noticed(folder, file, change, kept["took"])
            copies.put(folder)

        for _ in tqdm(pool.map(try_one, chosen), "mutants", len(chosen)):
            KEPT.write_text(json.dumps(kept, indent=1, ensure_ascii=False))
    return report(chosen, kept["ends"])


def report(chosen: dict[str, tuple[str, Change]], ends: dict[str, str]) -> int:
    judged = json.loads(JUDGED.read_text()) if JUDGED.exists() else {}
    tried = [key for key in chosen if key in ends]
    survived = [key for key in tried if ends[key] == "passed"]
    for key in survived:
        print(f"survived, line {chosen[key][1].line}: {key}\n    {judged.get(key, 'NOT JUDGED')}")
    if tried:
        share = 1 - len(survived) / len(tried)
        print(f"{len(tried)} mutants of {len(chosen)}: {share:.0%} noticed, {len(survived)} survived, "
              f"{sum(key not in judged for key in survived)} of them not judged")  # fmt: skip
    return any(key not in judged for key in survived)


if __name__ == "__main__":
    sys.exit(main())
