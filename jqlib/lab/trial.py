"""What a row of notebook 05 will take on this machine: it is tried on random models of the same widths, a few layers.

Time and memory of a stage grow evenly with layers and with text, as a + b·layers + c·text + d·layers·text: four small
runs, of few and of more layers on little and on more text, give its four numbers. Each is a process of its own. A small
model has all of its layers, for there the chance that memory has in it, some 0.1 GB, would be multiplied.
"""

import json
import os
import subprocess
import sys
from copy import deepcopy
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from jqlib import pipeline
from jqlib.config import Config
from jqlib.inputs import dtype_of, evaluation_windows
from jqlib.lab.rows import is_large
from jqlib.memory import free_bytes
from jqlib.model.families import by_layer
from jqlib.model.load import get_tokenizer, load_config
from jqlib.model.walk import tokens_at_once

LAYERS = 2, 8  # of a large model; with fewer, what does not grow with them hides what does: memory was half off
STEPS = 1, 8
UNIT = {"fp_hidden": "eval_windows", "evaluation": "eval_windows"} | dict.fromkeys(
    ("lessons", "r1_output", "transforms", "weights", "tuned"), "refine_steps"
)  # what a stage's text is counted in; else in "nsamples", as where weights are not learned
COSTS = {"seconds": ("seconds", 1), "peak_rss_bytes": ("GB", 1e9), "peak_gpu_bytes": ("GB of the GPU", 1e9)}


def describe(config: Config) -> str:
    """`measured` of the run's recipe as text, and whether this machine has the memory."""
    costs = measured(config)
    memory = "peak_gpu_bytes" if "peak_gpu_bytes" in costs else "peak_rss_bytes"
    free, largest, peak = free_bytes(torch.device(config.device)), costs[memory].idxmax(), costs[memory].max()
    table = pd.DataFrame({told: costs[name] / unit for name, (told, unit) in COSTS.items() if name in costs})
    enough = "NOT ENOUGH MEMORY" if peak > free else "memory"
    return "\n".join([
        f"a row of {config.recipe}, tried here on random models:",
        table.to_string(float_format="%.1f"),
        f"{costs['seconds'].sum() / 60:.0f} minutes; what rows have in common is made once",
        f"{enough}: {largest} takes {peak / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
    ])  # fmt: skip


def measured(config: Config) -> pd.DataFrame:
    """Seconds, and peaks of memory (bytes), of every stage of the run's recipe on the whole model, by stage.

    Raises ValueError if a small run fails, with what it said.
    """
    layers, (whole, few, more) = load_config(config.model).num_hidden_layers, _amounts(config)
    small = [min(count, layers) for count in LAYERS] if is_large(config.model) else [layers, layers]
    free = free_bytes(torch.device(config.device)) / layers  # for each: where memory is short, it is here too
    apart = _apart(config)
    runs = [(replace(apart, **text), count, free * count) for text in (few, more) for count in small]
    tried = cache(_tried)
    corners = [tried(*run) for run in tqdm(runs, "trying", unit="run")]
    learns = pipeline.recipe_of(config).layerwise and config.refine_steps > 0
    unit, rows = UNIT if learns else UNIT | {"weights": "nsamples"}, {}
    for stage, largest in corners[-1].items():
        name = unit.get(stage, "nsamples")
        deep, long = _share(layers, *small), _share(whole[name], few[name], more[name])
        for cost in (cost for cost in COSTS if largest[cost] is not None):
            a, b, c, d = (corner[stage][cost] for corner in corners)
            little, much = _line(a, b, deep), _line(c, d, deep)
            # what luck makes of small differences: less for more text, or for more layers
            rows.setdefault(stage, {})[cost] = max(little, much, _line(little, much, long), d)
    return pd.DataFrame.from_dict(rows, orient="index")


def _amounts(config: Config) -> list[dict[str, int]]:
    """Windows and steps of the run, and of the small runs, fewer and more."""
    whole = {"nsamples": config.nsamples, "eval_windows": len(evaluation_windows(config).ids)}
    whole["refine_steps"] = config.refine_steps
    together = tokens_at_once(config.device)  # on fewer, time and memory are not in proportion
    few = {"nsamples": -(-max(together, config.max_tokens) // config.seqlen)}
    few |= {"eval_windows": -(-together // config.eval_seqlen), "refine_steps": STEPS[0]}
    more = {name: 2 * count for name, count in few.items()} | {"refine_steps": STEPS[1]}
    return [whole, *({name: min(count, whole[name]) for name, count in text.items()} for text in (few, more))]


def _apart(config: Config) -> Config:
    """Settings that do not depend on the model's name."""
    default, dtype = get_tokenizer(config.model).default_dataset, str(dtype_of(config)).removeprefix("torch.")
    texts = {name: getattr(config, name) or default for name in ("calib_dataset", "eval_dataset")}
    return replace(config, dtype=dtype, **texts)


def _share(whole: float, low: float, high: float) -> float:
    """Where ``whole`` lies on the line from low, 0, to high, 1."""
    return (whole - low) / (high - low) if high > low else 0.0


def _line(low: float, high: float, at: float) -> float:
    return low + (high - low) * at


def _tried(config: Config, layers: int, free: float) -> dict[str, dict]:
    """What the stages took in a process that has a model of so many layers, and so many bytes, by stage."""
    command = [sys.executable, "-m", __name__, json.dumps([asdict(config), layers])]
    environment = os.environ | {"TQDM_DISABLE": "1", "JOINTQUANT_MEMORY": str(free)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        said = done.stderr.strip().rpartition("\n")[2] or f"nothing (exit status {done.returncode}: out of memory?)"
        raise ValueError(f"{config.recipe} can't be tried on {layers} layers of {config.model}: it said {said}")
    return json.loads(done.stdout.strip().rpartition("\n")[2])


def _try(config: Config, layers: int) -> dict[str, dict]:
    """The row, with nothing to reuse, on a random model."""
    with TemporaryDirectory() as folder:
        _save_random(config, layers, Path(folder) / "model")
        small = replace(config, model=str(Path(folder) / "model"), output_dir=folder)
        recipe = pipeline.recipe_of(small)
        small = pipeline.settled(small, recipe)
        row = pipeline.evaluation_step(small, recipe, small.w_bits, small.a_bits, {})
        values = row.get()[1]
    took = {name.rpartition("-")[0]: cost for name, cost in values["took"].items()}
    return took | {"evaluation": {cost: values[cost] for cost in COSTS}}


def _save_random(config: Config, layers: int, to: Path) -> None:
    shape = deepcopy(load_config(config.model))
    for name, values in by_layer(shape).items():
        setattr(shape, name, values[:layers])
    shape.num_hidden_layers = layers
    stored = shape.dtype or torch.float32  # as its checkpoint is: reading it takes memory too
    AutoModelForCausalLM.from_config(shape, dtype=stored).save_pretrained(to)
    get_tokenizer(config.model).save_pretrained(to)


if __name__ == "__main__":
    settings, count = json.loads(sys.argv[1])
    print(json.dumps(_try(Config(**settings), count)))
