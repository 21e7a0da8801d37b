"""A sweep: many runs, each in a process and a folder of its own (`jqlib.lab.job`), handed out by Dask distributed.

What is on disk decides what a rerun does: finished runs are skipped, failed ones wait for ``retry``, all others run.
"""

import itertools
import signal
import sys
import time
import uuid
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import psutil

from jqlib.config import KINDS, Config, make_config, slug
from jqlib.lab.job import end, execute, log_of, state_of


def plan(run_files: dict[Path, dict], values: list[str], output_dir: Path) -> dict[str, dict]:
    """Every run file with every combination of the listed values: run name -> parameters, all of them checked.

    ``values`` are texts such as ``"seed=0,1,2"``; the run of ``a.yaml`` with seed 1 is ``a,seed=1``.
    """
    grid, runs = read_values(values), {}
    for path, parameters in run_files.items():
        if "output_dir" in parameters:
            raise ValueError(f"{path} sets output_dir, but a sweep gives each run a folder: use --output_dir")
        for combination in itertools.product(*grid.values()):
            changed = dict(zip(grid, combination, strict=True))
            name = ",".join([path.stem, *(f"{key}={slug(str(value))}" for key, value in changed.items())])
            if name in runs:
                raise ValueError(f"two runs would be called {name}: rename a run file or a value")
            runs[name] = parameters | changed | {"output_dir": str(output_dir / name)}
            try:
                make_config(runs[name])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    return runs


def read_values(texts: list[str]) -> dict[str, list]:
    """``["seed=0,1"]`` gives ``{"seed": [0, 1]}``, names in the order of Config's fields."""
    grid = {}
    for text in texts:
        name, _, listed = text.partition("=")
        if not listed:
            raise ValueError(f"-p {text}: expected name=value or name=value,value")
        if name not in KINDS or name == "output_dir":
            names = ", ".join(known for known in KINDS if known != "output_dir")
            raise ValueError(f"-p {text}: unknown parameter {name!r}; there are {names}")
        if name in grid:
            raise ValueError(f"-p {text}: {name} was given before; list all its values once: {name}=value,value")
        grid[name] = [_value(name, value) for value in listed.split(",")]
        if len(set(grid[name])) < len(grid[name]):
            raise ValueError(f"-p {text}: a value is listed twice")
    return {name: grid[name] for name in KINDS if name in grid}


def _value(name: str, text: str):
    kind = KINDS[name]
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise ValueError(f"-p {name}={text}: expected {kind.__name__}") from None


def require_dask() -> None:
    try:
        import distributed  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(
            "a sweep needs Dask distributed, which is not installed: in your clone of JointQuant, "
            "pip install -c constraints.txt -e '.[sweep]'"
        ) from error


def slots_here(configs: list[Config]) -> int:
    """How many of these runs this machine does at a time: as many as it has cores, and memory for the largest."""
    from dask.system import CPU_COUNT
    from distributed.system import MEMORY_LIMIT

    from jqlib.lab.info import peak_bytes, streamed_bytes

    if any(config.device != "cpu" for config in configs):
        return 1
    memory = min(psutil.virtual_memory().available, MEMORY_LIMIT)
    return max(1, min(CPU_COUNT, memory // max((streamed_bytes if c.stream else peak_bytes)(c) for c in configs)))


def sweep(runs: dict[str, dict], only: str, scheduler: str | None = None, slots: int = 1, retry: bool = False) -> int:
    """Do every run that is not finished, on a Dask scheduler or ``slots`` at a time here.

    The exit code: 0 when all are finished, 1 when one is not, 130 after Ctrl-C.
    """
    jobs = {name: {"parameters": parameters, "only": only} for name, parameters in runs.items()}
    before = {name: state_of(job) for name, job in jobs.items()}
    skip = ("finished",) if retry else ("finished", "failed")
    ends = {name: state for name, state in before.items() if state.get("state") in skip}
    for name, state in ends.items():
        again = "finished before, with these parameters: to do it again, remove its folder"
        _say("skipped", name, again if state["state"] == "finished" else "failed before: --retry runs it")
    stopped = False
    if waiting := {name: job for name, job in jobs.items() if name not in ends}:
        with _connect(scheduler, min(slots, len(waiting))) as client:
            stopped = not _work(client, waiting, ends)
    _summary(jobs, ends)
    return 130 if stopped else int(any(name not in ends or ends[name]["state"] != "finished" for name in jobs))


@contextmanager
def _connect(scheduler: str | None, slots: int):
    """A Dask client. Here its one worker is threads of this process: all they do is wait for a run's own process."""
    from distributed import Client

    if scheduler is None:
        options = {"n_workers": 1, "threads_per_worker": slots, "processes": False, "memory_limit": 0}
        any_port = {"dashboard_address": "127.0.0.1:0"}  # or two sweeps at once meet at Dask's own, 8787
        with Client(dashboard_address=None, scheduler_kwargs=any_port, **options) as client:
            yield client
        return
    try:
        client = Client(scheduler, timeout=10)
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"--scheduler {scheduler}: {error}. Give the address that `dask scheduler` prints, such as tcp://host:8786"
        ) from error
    with client:
        if not client.ncores():
            print(f"no worker has joined {scheduler} yet: the runs wait for one", flush=True)
        yield client


def _work(client, waiting: dict[str, dict], ends: dict[str, dict]) -> bool:
    """Do the jobs and put their last states into ``ends``; False when Ctrl-C (or a TERM signal) cut them short."""
    from distributed import as_completed

    topic = f"jointquant-{uuid.uuid4().hex}"
    client.subscribe_topic(topic, lambda event: _say("started", event[1]))
    workers = client.scheduler_info(n_workers=-1)["workers"]
    hosts = Counter()
    for worker in workers.values():
        hosts[worker["host"]] += worker["nthreads"]
    slots = {address: hosts[worker["host"]] for address, worker in workers.items()}
    print(f"{len(waiting)} runs to do, {sum(hosts.values())} at a time", flush=True)
    names, futures = {}, []
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for name, job in waiting.items():
            _say("queued", name)
            key = f"{topic}/{name}"
            names[key] = name
            futures.append(client.submit(execute, name, job, topic, slots, key=key, pure=False))
        for future in as_completed(futures):
            name = names[future.key]
            ends[name] = future.result() if future.status == "finished" else _lost(future)
            _say(ends[name]["state"], name, f"{ends[name]['seconds']:.0f} s")
        return True
    except KeyboardInterrupt:
        print("stopping: the queue is dropped, running ones are ended", flush=True)
        client.cancel(futures)
        jobs = {key: waiting[name] for key, name in names.items()}
        while any(client.run(end, jobs).values()):
            time.sleep(0.2)
        return False
    finally:
        signal.signal(signal.SIGTERM, previous)


def _lost(future) -> dict:
    """The state of a job whose Dask worker, or the scheduler, went away."""
    why = future.exception() or "the scheduler went away"
    more = "was a worker killed, because memory ran out? The same command does the run again"
    return {"state": "killed", "seconds": 0, "error": f"Dask lost it ({why}): {more}"}


def _say(state: str, name: str, more: str = "") -> None:
    print(f"{time.strftime('%H:%M:%S')} {state:8s} {name} {more}".rstrip(), flush=True)


def _summary(jobs: dict[str, dict], ends: dict[str, dict]) -> None:
    counts = Counter(ends[name]["state"] if name in ends else "not done" for name in jobs)
    print(", ".join(f"{count} {state}" for state, count in counts.items()), flush=True)
    for name, end_state in ends.items():
        if end_state["state"] != "finished":
            print(f"{end_state['state']}: {name}: {end_state['error']}\n  log: {log_of(jobs[name])}", file=sys.stderr)
