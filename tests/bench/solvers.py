"""`make bench`: the joint solver against its baselines on one machine, in one run, in alternating order.

Same activations, same starts, same clock. The clock runs through the training alone: rotations are kept as they come,
and their loss over all tokens is measured afterwards. Prints a table and writes results/bench.json for notebook 02.
"""

import argparse
import time
from functools import partial
from statistics import median

import numpy as np
import pandas as pd
from tqdm import tqdm

from jqlib import pipeline, store
from jqlib.config import get_smollm2_135m_config
from jqlib.learn import baselines
from jqlib.learn.baselines import Training
from jqlib.learn.objectives import OBJECTIVES, mean_value
from jqlib.learn.rotations import initial_rotation
from jqlib.learn.solver import Minibatches, minimise
from jqlib.model.families import R1_SITES

RATES = {"sgd": (0.01, 0.03, 0.1, 0.3, 1.0), "adam": (1e-3, 1e-2), "cayley": (1e-3, 1e-2, 0.1)}
EPOCHS = 10
POINTS = 16  # of a curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="standard", help="how many tokens: quick or standard")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    config = get_smollm2_135m_config(profile=arguments.profile)
    acts = pipeline.activations(config, *R1_SITES)
    data = {name: x[None] for name, x in acts.items()}
    curves = measure(methods(data), data, arguments.repeats)
    table = compare(curves)
    print(table.to_string(float_format=lambda x: f"{x:.2f}"))
    tokens = sum(map(len, acts.values()))
    store.save_results(
        config, "bench", {"curves": curves, "rows": table.reset_index().to_dict("records"), "tokens": tokens}
    )


def methods(data) -> dict:
    """``{name: run(start, seed, record)}``; each baseline with the best of its learning rates, and SGD as published."""
    whip, layers = OBJECTIVES["whip"], list(data.values())

    def joint(start, seed, record):
        return minimise(Minibatches(data, seed), start, whip, record=record)

    def baseline(solver, lr, start, seed, record):
        training = Training(solver, "whip", lr, EPOCHS, None, seed, None)
        return getattr(baselines, solver)(layers, start, whip, training, record)

    found = {"joint (mm)": joint, "SGD, published (lr 0.001)": partial(baseline, "sgd", 1e-3)}
    for solver, rates in RATES.items():
        losses = {lr: run(partial(baseline, solver, lr), data, seed=0, points=1)[-1]["loss"] for lr in rates}
        lr = min(losses, key=losses.get)
        print(f"{solver}: loss by learning rate {losses}", flush=True)
        found[f"{solver}, tuned (lr {lr:g})"] = partial(baseline, solver, lr)
    return found


def measure(found: dict, data, repeats: int) -> dict[str, list[list[dict]]]:
    """Curves of every method, one a seed."""
    curves: dict[str, list[list[dict]]] = {name: [] for name in found}
    for seed in tqdm(range(repeats), "repeats"):
        for name in list(found)[:: 1 if seed % 2 == 0 else -1]:
            curves[name].append(run(found[name], data, seed))
            print(f"seed {seed}  {name:28s} {curves[name][-1][-1]}", flush=True)
    return curves


def run(method, data, seed: int, points: int = POINTS) -> list[dict]:
    """``seconds`` and ``loss`` at up to ``points`` moments of one training, evenly spread in log time, and its end."""
    start = initial_rotation(next(iter(data.values())).shape[-1], "hadamard", seed)[None]
    begin, kept = time.perf_counter(), []
    end = method(start, seed, lambda R, loss=None: kept.append((time.perf_counter() - begin, R.clone())))
    kept.append((time.perf_counter() - begin, end))
    moments = np.log([seconds for seconds, _ in kept])
    chosen = {int(np.abs(moments - m).argmin()) for m in np.linspace(moments[0], moments[-1], points)} | {len(kept) - 1}
    whip = OBJECTIVES["whip"]
    return [{"seconds": kept[i][0], "loss": mean_value(data.values(), kept[i][1], whip).item()} for i in sorted(chosen)]


def compare(curves) -> pd.DataFrame:
    """Medians over seeds; ``times sooner``: how much sooner the joint solver has the method's final loss."""
    ours, rows = curves["joint (mm)"], {}
    for name, theirs in curves.items():
        ratios = [
            their[-1]["seconds"] / reached(our, their[-1]["loss"]) for our, their in zip(ours, theirs, strict=True)
        ]
        below = [1 - our[-1]["loss"] / their[-1]["loss"] for our, their in zip(ours, theirs, strict=True)]
        rows[name] = {
            "loss": median(c[-1]["loss"] for c in theirs), "seconds": median(c[-1]["seconds"] for c in theirs),
            "joint: times sooner": median(ratios), "joint ends lower by %": 100 * median(below),
        }  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")


def reached(curve: list[dict], loss: float) -> float:
    """When a curve first stood at or below this loss, at one of its measured points; infinite if never."""
    return next((point["seconds"] for point in curve if point["loss"] <= loss), float("inf"))


if __name__ == "__main__":
    main()
