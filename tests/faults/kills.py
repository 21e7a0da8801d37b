"""By `make faults`: the real pipeline on a tiny model, killed again and again, always ends with the same numbers.

Each round has a folder of its own. A child process evaluates our best recipe there and is killed, at a random moment or
just before or after the n-th file it puts in place; a second child finishes what it left. Its row must be that of a run
which nothing disturbed, and every file it leaves must be whole.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from tiny import finished, prepare, started, whole, work
from tqdm import tqdm


def killed_at(files: Path, out: Path, at_file: int | None = None, after: bool = False) -> None:
    """Do the work; this very process is killed at the ``at_file``-th file that it puts in place."""
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
    work(files, out)
    (out / "count").write_text(str(count))


def main(moments: int) -> int:
    random.seed(0)
    with TemporaryDirectory() as folder:
        files = Path(folder)
        prepare(files)
        start = time.monotonic()
        assert finished(started(lambda: killed_at(files, files / "undisturbed")))
        took = time.monotonic() - start
        right, count = (json.loads((files / "undisturbed" / name).read_text()) for name in ("row.json", "count"))
        plans = [(n, after) for n in range(1, count + 1) for after in (False, True)]
        plans += [random.uniform(0, took) for _ in range(moments)]
        lost, wrong = 0, 0
        for i, plan in enumerate(tqdm(plans, "kills")):
            out = files / str(i)
            if isinstance(plan, tuple):
                finished(started(lambda out=out, plan=plan: killed_at(files, out, *plan)))
            else:
                pid = started(lambda out=out: work(files, out))
                time.sleep(plan)
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            before = {name for name in whole(out) if not name.startswith("unfinished")}
            if not finished(started(lambda out=out: work(files, out))):
                lost += 1
                continue
            lost += not before <= whole(out)
            wrong += json.loads((out / "row.json").read_text()) != right
    print(f"{len(plans)} kills ({moments} at random moments of {took:.1f} s, two at each of {count} files): "
          f"{lost} lost, {wrong} wrong")  # fmt: skip
    return bool(lost or wrong)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 100))
