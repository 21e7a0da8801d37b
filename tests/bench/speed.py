"""`make bench`, third part: how fast the quantised model reads text, beside the plain Hugging Face model.

What runs beside the matrix products of `jointquant-best`, R4 and the rounding of every site's input, does not depend on
what was learned: the recipe without its trainings runs as fast. Models take turns window by window; medians of ratios.
Writes results/speed.json.
"""

import argparse
from dataclasses import replace
from functools import partial
from statistics import median

import pandas as pd
from cost import seconds

from jqlib import pipeline, store
from jqlib.config import get_smollm2_135m_config
from jqlib.model.data import get_evaluation_windows
from jqlib.model.evaluate import read_window
from jqlib.model.load import get_tokenizer
from jqlib.quant.quantize import quantize_model
from jqlib.recipes import RECIPES

SEQLEN = 2048
METHODS = ("jointquant-best", "jointquant-online")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=6)
    arguments = parser.parse_args()
    config = get_smollm2_135m_config()
    every = {"Hugging Face": pipeline.load_model(config)} | {name: quantised(config, name) for name in METHODS}
    windows = get_evaluation_windows(get_tokenizer(config.model), None, SEQLEN, arguments.windows + 1).ids
    taken: dict[str, list[float]] = {name: [] for name in every}
    for window in windows:
        for name, model in every.items():
            taken[name].append(seconds(partial(read_window, model, window)))
    plain = taken["Hugging Face"][1:]  # the first window warms up
    rows = [
        {
            "model": name,
            "tokens a second": SEQLEN / median(times[1:]),
            "of Hugging Face's": median(a / b for a, b in zip(plain, times[1:], strict=True)),
        }
        for name, times in taken.items()
    ]
    store.save_results(config, "speed", {"rows": rows, "seqlen": SEQLEN, "windows": arguments.windows})
    print(pd.DataFrame(rows).to_string(index=False, float_format="{:.3g}".format))


def quantised(config, name: str):
    """The model as the recipe leaves it, with Hadamard rotations and weights rounded to nearest."""
    recipe = RECIPES[name]
    recipe = replace(recipe, r1=recipe.r1 and "hadamard", r2="hadamard", smooth=(), refine=())
    model = pipeline.transformed(config, recipe)
    quantize_model(model, 4, 4, a_clip=recipe.a_clip, o_per_head=recipe.o_per_head)
    return model


if __name__ == "__main__":
    main()
