"""`make bench`, fourth part: tokens a second of the stages that go by the loss, beside a plain Hugging Face step.

The plain step is forward and backward of the FP model through all of its weights, by the text's own loss, in float32 on
512 tokens. Stages take turns, step by step; medians. Writes results/stages.json.
"""

import argparse
from functools import partial
from statistics import median

import pandas as pd
import torch
from cost import seconds
from torch import nn

from jqlib import pipeline, store
from jqlib.config import get_smollm2_135m_config
from jqlib.learn.fisher import train_r1_output
from jqlib.learn.lessons import teach
from jqlib.learn.refine import refine
from jqlib.learn.steps import Steps
from jqlib.learn.tune import tune
from jqlib.model.families import head_dim_of, linears_of, sites_of
from jqlib.precision import products_dtype
from jqlib.quant.quantize import quantize_model
from jqlib.transform.build import fuse_layer_norms, rotate_model, transforms_of
from jqlib.transform.hadamard import random_hadamard
from jqlib.transform.transform import Grid

SIZES = (512, 4096)  # tokens of a step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    config = get_smollm2_135m_config()
    model = pipeline.load_model(config)
    windows = pipeline.load_calibration(config)[:, :512].repeat(2, 1)
    R1, R2, d = random_hadamard(model.config.hidden_size, 0), {}, head_dim_of(model)
    for name in sites_of(model, "o"):
        R2[name] = random_hadamard(d, 0).expand(model.config.num_key_value_heads, -1, -1).clone()
    grids = {name: Grid(4, 0.9) for name in sites_of(model)}
    transforms = transforms_of(model, R1, R2, online=("down",), grids=grids)
    rounded = pipeline.load_model(config)
    fuse_layer_norms(rounded)
    rotate_model(rounded, R1, R2)
    quantize_model(rounded, a_clip=0.9)
    lessons = teach(model, windows)
    runs = {
        "output": lambda steps: train_r1_output(model, windows, steps=steps),
        "refine": lambda steps: refine(model, lessons, transforms, steps=steps),
        "tune": lambda steps: tune(rounded, lessons, steps),
    }
    fast = products_dtype("auto", config.device)
    cases = [(name, size, dtype) for name in runs for size in SIZES for dtype in {torch.float32, fast}]
    taken: dict[tuple, list[float]] = {case: [] for case in [("plain", 512, torch.float32), *cases]}
    for _ in range(arguments.repeats + 1):  # the first warms up
        taken["plain", 512, torch.float32].append(seconds(partial(plain_step, model, windows[:1])))
        for name, size, dtype in cases:
            taken[name, size, dtype].append(seconds(partial(runs[name], Steps(1, tokens=size, dtype=dtype))))
    speed = {case: case[1] / median(times[1:]) for case, times in taken.items()}
    plain = speed["plain", 512, torch.float32]
    rows = [
        {"stage": name, "tokens": size, "products": str(dtype), "tokens a second": rate, "plain steps": rate / plain}
        for (name, size, dtype), rate in speed.items()
    ]  # fmt: skip
    store.save_results(config, "stages", {"rows": rows})
    print(pd.DataFrame(rows).to_string(index=False, float_format="{:.3g}".format))


def plain_step(model: nn.Module, ids: torch.Tensor) -> None:
    """What one step of full fine-tuning computes."""
    weights = [linear.weight.requires_grad_() for linear in linears_of(model).values()]
    model(ids, labels=ids, use_cache=False).loss.backward()
    for weight in weights:
        weight.requires_grad_(False).grad = None


if __name__ == "__main__":
    main()
