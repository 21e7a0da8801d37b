"""By `make faults`, after the kills: full disks, read-only folders, two runs at once, clocks and flipped bits.

Each case has a folder of its own, beside an undisturbed run of the same pipeline on a tiny model. A case may fail while
its fault lasts, if it says why; after it a run must end with the undisturbed row, and keep every artifact that was
whole. What can't be tried here is said.
"""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from tiny import finished, prepare, started, whole, work
from tqdm import tqdm

FLIPS, NOBODY = 6, 65534  # flips a file; a user who owns nothing
FULL = ("File too large", "No space left", "disk full")
DAY = 86_400
cases, lost, wrong, unsaid = Counter(), Counter(), Counter(), Counter()


class Bench:
    """The tiny model's files, and what an undisturbed run made of them."""

    def __init__(self, files: Path):
        self.files = files
        prepare(files)
        for path in (files, *files.rglob("*")):
            path.chmod(0o755)  # for `read_only`
        for seed in (0, 1):
            self.run(files / f"right{seed}", seed=seed)
        self.right = {seed: self.row(files / f"right{seed}") for seed in (0, 1)}
        assert self.right[0] != self.right[1]

    def start(self, out: Path, fault: Callable[[], object] = lambda: None, **more) -> int:
        def action() -> None:
            fault()
            work(self.files, out, **more)

        log = out.with_suffix(".log")
        log.touch()
        log.chmod(0o666)
        return started(action, log)

    def run(self, out: Path, fault: Callable[[], object] = lambda: None, **more) -> tuple[bool, str]:
        """Whether it ended well, and what it said."""
        done = finished(self.start(out, fault, **more))
        return done, out.with_suffix(".log").read_text()

    def row(self, out: Path) -> dict:
        return json.loads((out / "row.json").read_text())

    def copy(self, name: str) -> Path:
        """The undisturbed run's folder, times and all."""
        return Path(shutil.copytree(self.files / "right0", self.files / name))

    def judge(self, kind: str, out: Path, kept: set[str], said: bool = True) -> None:
        """A run without the fault must be right, and have what was there before."""
        cases[kind] += 1
        done, _ = self.run(out)
        lost[kind] += not done or not kept <= whole(out)
        wrong[kind] += done and self.row(out) != self.right[0]
        unsaid[kind] += not said
        shutil.rmtree(out)


def full_disk(bench: Bench) -> None:
    """No file may grow beyond a limit; then, where we may mount, a disk that is really full."""
    largest = max(path.stat().st_size for path in (bench.files / "right0").rglob("*.safetensors"))
    for i in tqdm(range(12), "full disk"):
        out, limit = bench.files / f"full{i}", round(2000 * (largest / 2000) ** (i / 12))
        done, said = bench.run(out, lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        bench.judge("full disk", out, whole(out), not done and any(word in said for word in FULL))
    for i in tqdm(range(4), "full disk"):
        out = bench.files / f"disk{i}"
        with mounted(out, "-t", "tmpfs", "-o", f"size={round(largest * (0.5 + i) / 4096) * 4}k", "tmpfs") as there:
            if not there:
                print("not tried: a small disk of its own (mounting is not allowed here)")
                return
            done, said = bench.run(out)
            after = shutil.copytree(out, bench.files / f"larger{i}")
        bench.judge("full disk", after, whole(after), done or any(word in said for word in FULL))


@contextmanager
def mounted(folder: Path, *words: str):
    folder.mkdir()
    there = subprocess.run(["mount", *words, folder], capture_output=True).returncode == 0
    try:
        yield there
    finally:
        if there:
            subprocess.run(["umount", folder], check=True)


def read_only(bench: Bench) -> None:
    """A folder that is not ours: an empty one is refused with its name, a finished one is read."""

    def become_nobody() -> None:  # root may write anywhere
        if os.getuid() == 0:
            os.setgid(NOBODY)
            os.setuid(NOBODY)

    for kept in (False, True):
        out = bench.copy("closed") if kept else bench.files / "closed"
        row = Path(tempfile.mkdtemp()) / "row.json"
        row.parent.chmod(0o777)
        out.mkdir(exist_ok=True)
        folders = [out, *(path for path in out.rglob("*") if path.is_dir())]
        for folder in folders:
            folder.chmod(0o555)
        done, said = bench.run(out, become_nobody, row=row)
        right = done and json.loads(row.read_text()) == bench.right[0] if kept else "Permission denied" in said
        for folder in folders:
            folder.chmod(0o755)
        bench.judge("read-only folder", out, whole(out), right)


def two_at_once(bench: Bench) -> None:
    """Started together or a little apart, with equal settings and with others."""
    alone = len(whole(bench.files / "right0"))
    for i in tqdm(range(8), "two at once"):
        seeds, out = (0, i % 2), bench.files / f"two{i}"
        out.mkdir()
        rows = [bench.files / f"two{i}.{n}.json" for n in (0, 1)]
        pids = [bench.start(out, lambda n=n: random.seed(n), row=rows[n], seed=seeds[n]) for n in (0, 1)]
        ends = [finished(pid) for pid in pids]
        cases["two at once"] += 1
        lost["two at once"] += not all(ends)
        wrong["two at once"] += all(ends) and any(
            json.loads(row.read_text()) != bench.right[seed] for row, seed in zip(rows, seeds, strict=True)
        )
        shared = len(whole(out))  # equal settings: nothing is made twice; others: each its own
        wrong["two at once"] += shared != alone if seeds[0] == seeds[1] else shared <= alone
        shutil.rmtree(out)


def clocks(bench: Bench) -> None:
    """Files of tomorrow, of next year and of 1970; all of them, or only those that a killed run left."""
    for days in tqdm((1, 365, -20_000), "clocks"):
        for part in ("all", "half", "locks"):
            out = bench.copy("clock")
            files = sorted(out.rglob("*.*"), key=lambda path: path.stat().st_mtime)
            for path in files[len(files) // 2 :] if part == "half" else ():
                path.unlink(missing_ok=True)
            for path in out.rglob("*.lock" if part == "locks" else "*"):
                when = max(0, path.stat().st_mtime + days * DAY)
                os.utime(path, (when, when))
            bench.judge("clock", out, whole(out))


def flips(bench: Bench) -> None:
    """One bit of each kind of file: of the header, of the values, of tensors. What was made from it is made again."""
    source = bench.files / "right0"
    files = sorted(source.glob("*/artifacts/*.safetensors"), key=lambda path: path.stat().st_mtime)
    for number, file in enumerate(tqdm(files, "flipped bits")):
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        for i in range(FLIPS):
            end = file.stat().st_size if i % 2 and file.stat().st_size > header else header
            at = random.randrange(0 if end == header else header, end)
            out = bench.copy("flip")
            for later in files[number + 1 :]:
                (out / later.relative_to(source)).unlink()
            data = bytearray(file.read_bytes())
            data[at] ^= 1 << random.randrange(8)
            (out / file.relative_to(source)).write_bytes(data)
            kept = whole(out)
            unread = file.name in kept  # what decides nothing, such as what `clean` goes by
            done, said = bench.run(out)
            found = "is damaged" in said
            wrong["flipped bit"] += done and bench.row(out) != bench.right[0]
            bench.judge("flipped bit", out, kept, done and (found or unread))


def unfinished(bench: Bench) -> None:
    """One bit of the state that an interrupted stage goes on from."""
    for i in tqdm(range(8), "flipped bits"):
        out = bench.files / f"state{i}"
        while not (left := [path for path in out.rglob("unfinished*") if path.suffix == ".safetensors"]):
            shutil.rmtree(out, ignore_errors=True)
            interrupted(bench, out)
        data = bytearray(left[0].read_bytes())
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        left[0].write_bytes(data)
        bench.judge("flipped bit of a state", out, whole(out) - {left[0].name})


def interrupted(bench: Bench, out: Path) -> None:
    """A run that ends just behind a state that it kept: one in three of them."""

    def die_there() -> None:
        replace = os.replace

        def put(source, target) -> None:
            replace(source, target)
            if Path(target).name.startswith("unfinished") and random.random() < 0.3:
                os._exit(9)

        os.replace = put
        random.seed(str(out) + str(os.getpid()))

    bench.run(out, die_there)


def main() -> int:
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for fault in (full_disk, read_only, two_at_once, clocks, flips, unfinished):
            fault(bench)
    for kind, count in cases.items():
        print(f"{count} of {kind}: {lost[kind]} lost, {wrong[kind]} wrong, {unsaid[kind]} not said")
    return bool(lost.total() or wrong.total() or unsaid.total())


if __name__ == "__main__":
    sys.exit(main())
