"""A GGUF file run by llama.cpp (the extra ``run``: a wheel that brings it), in a process of its own."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import torch

from jqlib.memory import PeakMemory

MISSING = "llama.cpp is not installed: pip install -c constraints.txt -e '.[run]'"


def installed() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


def run_gguf(path: Path, prompt: str, tokens: int = 64, threads: int | None = None) -> dict:
    """What llama.cpp goes on with, the likeliest token each time: ``text``, ``tokens_a_second`` while generating, and
    its ``peak_rss_bytes`` (None where that is not known).

    Raises ModuleNotFoundError without the extra, ValueError for a file that llama.cpp does not run.
    """
    if not installed():
        raise ModuleNotFoundError(MISSING)
    asked = {"path": str(path), "prompt": prompt, "tokens": tokens, "threads": threads or torch.get_num_threads()}
    command = [sys.executable, "-m", __name__, json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")  # its log cuts letters in two
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if "rror" in line]
        said = told[-1] if told else f"exit status {done.returncode}"
        raise ValueError(f"llama.cpp can't run {path}: {said}")
    return json.loads(done.stdout.strip().rpartition("\n")[2])


def _generated(path: str, prompt: str, tokens: int, threads: int) -> dict:
    import xllamacpp

    params, peak = xllamacpp.CommonParams(), PeakMemory()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = path, 1024, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    asked = {"prompt": prompt, "max_tokens": tokens, "temperature": 0.0}
    server.handle_completions(asked | {"max_tokens": 2})  # warm
    found = server.handle_completions(asked)
    text, speed = found["choices"][0]["text"], found["timings"]["predicted_per_second"]
    return {"text": text, "tokens_a_second": speed, "peak_rss_bytes": peak.measured()["peak_rss_bytes"]}


if __name__ == "__main__":
    print(json.dumps(_generated(**json.loads(sys.argv[1]))))
