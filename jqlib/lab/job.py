"""One run of a sweep, on the machine that does it: ``python -m jqlib run`` in a process of its own.

A run's folder holds ``run.yaml`` (its parameters), ``run.log``, ``state.json`` and what the run makes. The state names
the process and its machine, which tells a run that still works from one that was cut off.
"""

import json
import os
import platform
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import yaml

from jqlib.store import write, write_json

ENDS = {0: "finished", 1: "failed", 2: "failed"}  # exit codes of `run`; after any other the run was cut off: killed

KILLED_WORKER = (
    "its Dask worker, {worker} on {host}, was killed: did memory run out there? The same command does the run again; "
    "fewer workers on a machine (or a larger one) leave each more memory"
)


def folder_of(job: dict) -> Path:
    return Path(job["parameters"]["output_dir"])


def state_of(job: dict) -> dict:
    """What is on disk about a job: empty if it never ran, ran with other parameters, or the file is damaged."""
    try:
        state = json.loads((folder_of(job) / "state.json").read_text(encoding="utf-8"))
        return state if job.items() <= state.items() else {}
    except (OSError, ValueError, AttributeError):
        return {}


def log_of(job: dict) -> Path:
    return folder_of(job) / "run.log"


def execute(name: str, job: dict, topic: str, slots: dict[str, int]) -> dict:
    """On a Dask worker: do the run and return its state. ``slots``: runs at a time on the host of each worker.

    ``topic`` names the sweep. Dask calls this again, elsewhere, for a run whose worker is gone: what is left of it is
    ended and it counts as killed, for whatever killed that worker may well kill the next.
    """
    from dask.system import CPU_COUNT
    from distributed import get_worker

    before = state_of(job)
    process = process_of(before)
    if before.get("state") == "running" and before.get("sweep") == topic:
        _kill(process)
        return _save(before | {"state": "killed", "error": KILLED_WORKER.format(**before)})
    if process:
        return job | {"state": "busy", "seconds": 0, "error": f"process {process.pid} of another sweep is at it"}
    worker = get_worker()
    threads = str(max(1, CPU_COUNT // slots.get(worker.address, worker.state.nthreads)))
    if worker.address.startswith("inproc"):  # the user's own setting; on a cluster it is Dask's, always 1
        threads = os.environ.get("OMP_NUM_THREADS", threads)
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
    file = folder_of(job) / "run.yaml"
    write(file, lambda path: path.write_text(yaml.safe_dump(job["parameters"], sort_keys=False), encoding="utf-8"))
    command = [sys.executable, "-m", "jqlib", "run", "-f", str(file), "--only", job["only"]]
    job |= {"sweep": topic, "host": platform.node(), "worker": worker.address}
    start = time.perf_counter()
    with (
        open(log_of(job), "w", encoding="utf-8") as log,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
                         start_new_session=True) as child,  # a Ctrl-C in the terminal is the sweep's to handle
    ):  # fmt: skip
        _save(job | {"state": "running", "seconds": 0} | _identity(child.pid))
        worker.log_event(topic, name)
        code = child.wait()
    state = ENDS.get(code, "killed")
    error = None if state == "finished" else _last_error(log_of(job)) if code > 0 else f"killed by signal {-code}"
    return _save(job | {"state": state, "seconds": time.perf_counter() - start, "error": error})


def end(jobs: dict[str, dict], dask_worker) -> list[str]:
    """On each Dask worker: end the processes of these jobs (key -> job); the keys that still keep this worker busy."""
    keys = [key for key in dask_worker.active_threads.values() if key in jobs]
    for key in keys:
        _kill(process_of(state_of(jobs[key])))
    return keys


def _kill(process: psutil.Process | None) -> None:
    """The runner and its notebook's kernel, if they live."""
    with suppress(psutil.NoSuchProcess):
        for each in [process, *process.children(recursive=True)] if process else ():
            with suppress(psutil.NoSuchProcess):
                each.kill()


def process_of(state: dict) -> psutil.Process | None:
    """The process that does the run, if this is its machine and it lives."""
    try:
        if state.get("state") == "running" and state["host"] == platform.node():
            process = psutil.Process(state["pid"])
            return process if process.create_time() == state["born"] else None  # a pid may be given again
    except psutil.NoSuchProcess:
        pass
    return None


def _identity(pid: int) -> dict:
    return {"pid": pid, "born": psutil.Process(pid).create_time()}


def _save(state: dict) -> dict:
    write_json(folder_of(state) / "state.json", state)
    return state


def _last_error(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "no output")
