"""What a row of notebook 05 will take on this machine: it is tried on random models of the same widths, a few layers.

Time and memory of a stage grow evenly with layers and with text, as a + b·layers + c·text + d·layers·text: four small
runs, of few and of more layers on little and on more text, give its four numbers. Each is a process of its own.
"""

import json
import os
import subprocess
import sys
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
from tqdm import tqdm

from jqlib.config import Config
from jqlib.memory import free_bytes

LAYERS = 1, 3
LITTLE = {"nsamples": 4, "eval_windows": 4, "refine_steps": 8}  # at most, of the larger amount; the smaller is 1
UNIT = {"fp_hidden": "eval_windows", "evaluation": "eval_windows"} | dict.fromkeys(
    ("lessons", "r1_output", "transforms", "weights", "tuned"), "refine_steps"
)  # what a stage's text is counted in; else in "nsamples", as where weights are not learned
COSTS = {"seconds": ("seconds", 1), "peak_rss_bytes": ("GB", 1e9), "peak_gpu_bytes": ("GB of the GPU", 1e9)}


def describe(config: Config) -> str:
    """`measured` of the run's recipe as text, and whether this machine has the memory."""
    costs = measured(config, config.recipe)
    memory = "peak_gpu_bytes" if "peak_gpu_bytes" in costs else "peak_rss_bytes"
    free, largest, peak = free_bytes(torch.device(config.device)), costs[memory].idxmax(), costs[memory].max()
    table = pd.DataFrame({told: costs[name] / unit for name, (told, unit) in COSTS.items() if name in costs})
    enough = "NOT ENOUGH MEMORY" if peak > free else "memory"
    return "\n".join([
        f"a row of {config.recipe}, tried here on random models of a few layers:",
        table.to_string(float_format="%.1f"),
        f"{costs['seconds'].sum() / 60:.0f} minutes; what rows have in common is made once",
        f"{enough}: {largest} takes {peak / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
    ])  # fmt: skip


def measured(config: Config, recipe: str) -> pd.DataFrame:
    """Seconds, and peaks of memory (bytes), of every stage of a recipe's row on the whole model, by stage.

    Raises RuntimeError if a small run fails, with what it said.
    """
    from jqlib.inputs import dtype_of, evaluation_windows
    from jqlib.model.load import get_tokenizer, load_config
    from jqlib.pipeline import recipe_of

    learns = recipe_of(config, recipe).layerwise and config.refine_steps > 0
    unit = UNIT if learns else UNIT | {"weights": "nsamples"}
    default, shape = get_tokenizer(config.model).default_dataset, load_config(config.model)
    whole = {name: getattr(config, name) for name in LITTLE} | {"eval_windows": len(evaluation_windows(config).ids)}
    least = -(-config.max_tokens // config.seqlen)  # windows that hold what the solvers see
    few = {"nsamples": min(least, config.nsamples), "eval_windows": 1, "refine_steps": min(1, config.refine_steps)}
    more = {name: min(whole[name], few[name] + LITTLE[name] - 1) for name in LITTLE}
    texts = {name: getattr(config, name) or default for name in ("calib_dataset", "eval_dataset")}
    small = replace(config, dtype=str(dtype_of(config)).removeprefix("torch."), **texts)
    layers = [min(count, shape.num_hidden_layers) for count in LAYERS]
    runs = [(count, text) for text in (few, more) for count in layers]
    a, b, c, d = (_tried(replace(small, **text), recipe, count) for count, text in tqdm(runs, "trying", unit="run"))

    rows = {}
    for stage in d:
        name = unit.get(stage, "nsamples")
        text = _share(whole[name], few[name], more[name])
        depth = _share(shape.num_hidden_layers, *layers)
        rows[stage] = {
            cost: max(_line(_line(a[stage][cost], b[stage][cost], depth), _line(c[stage][cost], d[stage][cost], depth),
                            text), d[stage][cost])
            for cost in COSTS if d[stage][cost] is not None
        }  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index")


def _share(whole: float, low: float, high: float) -> float:
    """Where ``whole`` lies on the line from low, 0, to high, 1."""
    return (whole - low) / (high - low) if high > low else 0.0


def _line(low: float, high: float, at: float) -> float:
    return low + (high - low) * at


def _tried(config: Config, recipe: str, layers: int) -> dict[str, dict]:
    """What the stages took in a process that has a model of so many layers, by stage."""
    command = [sys.executable, "-m", __name__, json.dumps([asdict(config), recipe, layers])]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TQDM_DISABLE": "1"})
    if done.returncode:
        said = done.stderr.strip().rpartition("\n")[2] or f"nothing (exit status {done.returncode}: out of memory?)"
        raise RuntimeError(f"{recipe} can't be tried on {layers} layers of {config.model}: it said {said}")
    return json.loads(done.stdout.strip().rpartition("\n")[2])


def _try(config: Config, recipe: str, layers: int) -> dict[str, dict]:
    """The row, with nothing to reuse, on a random model."""
    from jqlib import pipeline

    with TemporaryDirectory() as folder:
        _save_random(config, layers, Path(folder) / "model")
        small = replace(config, model=str(Path(folder) / "model"), output_dir=folder)
        row = pipeline.evaluation_step(small, pipeline.recipe_of(small, recipe), config.w_bits, config.a_bits, {})
        values = row.get()[1]
    took = {name.rpartition("-")[0]: cost for name, cost in values["took"].items()}
    return took | {"evaluation": {cost: values[cost] for cost in COSTS}}


def _save_random(config: Config, layers: int, to: Path) -> None:
    from transformers import AutoModelForCausalLM

    from jqlib.model.load import get_tokenizer, load_config

    shape = deepcopy(whole := load_config(config.model))
    for name, values in vars(whole).items():
        if isinstance(values, list) and len(values) == whole.num_hidden_layers:
            setattr(shape, name, values[:layers])
    shape.num_hidden_layers = layers
    AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, config.dtype)).save_pretrained(to)
    get_tokenizer(config.model).save_pretrained(to)


if __name__ == "__main__":
    settings, *rest = json.loads(sys.argv[1])
    print(json.dumps(_try(Config(**settings), *rest)))
