"""`make bench`, second part: what calibration costs by model width, and what the solver holds in memory.

Synthetic activations with planted outliers. Measured where channels · tokens ≤ 10⁸; beyond that extrapolated, and
labelled so. Writes results/cost.json for notebook 02.
"""

import argparse
import json
import subprocess
import sys
import time

import pandas as pd
import torch
from solvers import EPOCHS, reached, run

from jqlib import store
from jqlib.config import get_smollm2_135m_config
from jqlib.learn import baselines
from jqlib.learn.baselines import Training
from jqlib.learn.objectives import OBJECTIVES, mean_loss, second_moment
from jqlib.learn.rotations import train_r1_joint
from jqlib.learn.solver import Minibatches, minimise
from jqlib.memory import PeakMemory
from jqlib.transform.hadamard import random_hadamard
from jqlib.transform.orthogonal import polar

WIDTHS = (576, 1024, 2048, 4096)
TOKENS = (10_000, 100_000, 1_000_000)
LARGEST = 1e8  # channels · tokens that are measured
SGD_WIDEST = 1024  # channels of a whole SGD training: 120 QR factors and their derivatives
TRAINED = 20_000  # tokens of the full trainings
SGD_STEPS = 120  # of a training as published: 10 epochs of 12 batches
WHIP = OBJECTIVES["whip"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--hold", type=int, help="print the peak memory of one step on so many batches, and exit")
    arguments = parser.parse_args()
    if arguments.hold:
        print(json.dumps(hold(arguments.widths[0], arguments.hold)))
        return
    config = get_smollm2_135m_config()
    content: dict = {"steps": [], "trainings": [], "memory": []}
    for n in arguments.widths:
        content["steps"] += step_costs(n)
        content["trainings"].append(training(n))
        content["memory"] += [memory(n, batches) for batches in (2, 8)]
        store.save_results(config, "cost", content)
        for name, rows in content.items():
            print(f"\n{name}\n{pd.DataFrame(rows).to_string(index=False, float_format='{:.3g}'.format)}", flush=True)


def planted(tokens: int, n: int, seed: int = 0) -> torch.Tensor:
    """Gaussian tokens of unit scale; one channel in a hundred is 20 times larger, a few tokens are giants in one."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, generator=generator)
    x[:, :: n // max(1, n // 100)] *= 20
    x[:: max(1, tokens // 8), 0] *= 20
    return x / x.square().mean(1, keepdim=True).sqrt()  # as behind a norm


def published(epochs: int, max_steps: int | None, seed: int = 0) -> Training:
    return Training("sgd", "whip", 1e-3, epochs, max_steps, seed, None)


def step_costs(n: int) -> list[dict]:
    """A step of either method, by tokens: ours on all of them, DartQuant's on one of its 12 batches."""
    rows, R, slopes = [], random_hadamard(n, 0)[None], {}
    for tokens in TOKENS:
        if measured := n * tokens <= LARGEST:
            X = planted(tokens, n)[None]
            gradient = seconds(lambda X=X: mean_loss([X], R, WHIP))
            gram = second_moment([X], R)
            M = 0.3 * gram @ R - mean_loss([X], R, WHIP)[1]
            factor = seconds(lambda M=M: polar(M))
            sgd = seconds(lambda X=X: baselines.sgd([X], R, WHIP, published(1, 2), lambda *_: None)) / 2
            slopes = {"gradient": gradient / tokens, "tokens": tokens, "sgd": sgd}
        else:
            gradient = slopes["gradient"] * tokens
            sgd = slopes["sgd"] + slopes["gradient"] * (tokens - slopes["tokens"]) / 12
        rows.append({
            "channels": n, "tokens": tokens, "": "measured" if measured else "extrapolated",
            "joint: step (s)": gradient + factor, "of which polar (s)": factor, "SGD: step (s)": sgd,
            "joint: MB beside the data": 8 * 4 * n * n / 1e6,  # the gram, the gradient, R and what a step needs
        })  # fmt: skip
    return rows


def training(n: int) -> dict:
    """Both to their end, on the same tokens; SGD's time is extrapolated where it would take hours."""
    data = {"all": planted(TRAINED, n)[None]}
    start = random_hadamard(n, 0)[None]
    ours = run(lambda R, seed, record: minimise(Minibatches(data, seed), R, WHIP, record=record), data, 0, points=60)
    row = {"channels": n, "tokens": TRAINED, "joint: Whip": ours[-1]["loss"], "joint: s": ours[-1]["seconds"]}
    if n <= SGD_WIDEST:
        layers = list(data.values())
        sgd = run(lambda R, seed, record: baselines.sgd(layers, R, WHIP, published(EPOCHS, None, seed), record),
                  data, 0, points=2)  # fmt: skip
        sooner = reached(ours, sgd[-1]["loss"])
        more = {"SGD: Whip": sgd[-1]["loss"], "SGD: s": sgd[-1]["seconds"], "joint: s to SGD's Whip": sooner}
    else:
        few = seconds(lambda: baselines.sgd(list(data.values()), start, WHIP, published(1, 3), lambda *_: None)) / 3
        more = {"SGD: s": few * SGD_STEPS}
    whole = mean_loss(data.values(), start, WHIP)[0].item()
    return row | {"Hadamard: Whip": whole} | more | {"": "measured" if n <= SGD_WIDEST else "SGD extrapolated"}


class Generated:
    """Batches that exist only while they are read."""

    def __init__(self, n: int, batches: int):
        self.n, self.batches = n, batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self):
        return (planted(1024, self.n, seed) for seed in range(self.batches))


def hold(n: int, batches: int) -> dict:
    peak = PeakMemory()
    train_r1_joint(Generated(n, batches), n, 1, max_steps=1)
    held = peak.measured()["peak_rss_bytes"]
    return {"channels": n, "tokens streamed": 1024 * batches, "peak memory (MB)": held and held / 1e6}


def memory(n: int, batches: int) -> dict:
    """In a process of its own: a peak never falls."""
    command = [sys.executable, __file__, "--widths", str(n), "--hold", str(batches)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
