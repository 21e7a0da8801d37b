"""Two of the road's steps from near: GPTQ on one layer's weights, and what `tune` learns and moves."""

from dataclasses import replace
from functools import partial

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from jqlib import pipeline
from jqlib.calibration import lessons_step
from jqlib.config import Config
from jqlib.inputs import steps_of
from jqlib.learn.lessons import Lessons
from jqlib.learn.tune import tune
from jqlib.model.families import family_of, norms_of, sites_of
from jqlib.model.walk import walk
from jqlib.quant.gptq import gptq, hessians_of
from jqlib.quant.packed import packed_codes, rounded_linears, scales_of
from jqlib.recipes import Recipe
from jqlib.transform.grids import quantize_weight
from jqlib.transform.install import standing_grids


class Watched:
    """`Lessons` that keep every loss they give: ``losses``, pairs of the pieces asked about and the mean KL."""

    def __init__(self, lessons: Lessons):
        self.lessons, self.losses = lessons, []

    @property
    def ids(self) -> Tensor:
        return self.lessons.ids

    def to(self, device: torch.device) -> "Watched":
        self.lessons = self.lessons.to(device)
        return self

    def loss(self, model: nn.Module, pieces: Tensor) -> Tensor:
        found = self.lessons.loss(model, pieces)
        self.losses.append((pieces, found.item()))
        return found


def tuned_again(config: Config, recipe: Recipe, w_bits: int, a_bits: int) -> tuple[dict[str, list[float]], nn.Module]:
    """`tune` of a row of the table once more, watched: the mean KL (nats per token) at every step, by the model as it
    was before tuning and as it becomes, on the same text; and the model that comes out.
    """
    made = partial(pipeline.quantised, config, replace(recipe, tune=False), w_bits, a_bits)
    model, watched = made(), Watched(Lessons(**lessons_step(config).get()[0]))
    tune(model, watched, steps_of(config, 1), clips=recipe.a_clip is not None)
    untuned = made()
    with torch.inference_mode():
        before = [watched.lessons.loss(untuned, pieces).item() for pieces, _ in tqdm(watched.losses, "untuned")]
    return {"before tuning": before, "while tuning": [loss for _, loss in watched.losses]}, model


@torch.inference_mode()
def rounded_two_ways(model: nn.Module, windows: Tensor, layer: int, bits: int, groupsize: int) -> pd.DataFrame:
    """One layer's weights by RTN and by GPTQ: the relative error of the weights, ‖ΔW‖/‖W‖, and of what the linears of
    a site put out on these token windows, ‖XΔWᵀ‖/‖XWᵀ‖; one row per site and rounding. The model stays as it is.
    """
    places = [place for place in sites_of(model).values() if place.layer == layer]
    for i, step in enumerate(walk(model, windows)):
        if i == layer:
            hessians = hessians_of(step, places)
            break
    rows = []
    for place in places:
        W, H = place.weight.float(), hessians[place.name]
        ways = {"RTN": quantize_weight(W, bits, groupsize), "GPTQ": gptq(W, H, bits, groupsize, name=place.name)[0]}
        for way, rounded in ways.items():
            error = rounded - W
            output = (_energy(error, H) / _energy(W, H)).sqrt().item()
            rows.append({"site": place.kind, "rounded by": way, "weights": (error.norm() / W.norm()).item(),
                         "output": output})  # fmt: skip
    return pd.DataFrame(rows)


def moved(before: nn.Module, after: nn.Module) -> pd.DataFrame:
    """By how much two rounded models differ in what is stored beside the integers: per kind of number, how many there
    are, and the median, the 99th percentile and the largest of their relative changes.
    """
    old, new = _numbers(before), _numbers(after)
    ratios = {kind: ((new[kind] - old[kind]) / old[kind]).abs() for kind in old}
    return pd.DataFrame({
        kind: {"numbers": len(ratio), "median": ratio.median().item(), "99%": ratio.quantile(0.99).item(),
               "largest": ratio.max().item()} for kind, ratio in ratios.items()
    }).T  # fmt: skip


def same_codes(one: nn.Module, other: nn.Module) -> bool:
    """Whether all integers of two rounded models are the same."""
    pairs = zip(rounded_linears(one).values(), rounded_linears(other).values(), strict=True)
    return all(torch.equal(packed_codes(a), packed_codes(b)) for a, b in pairs)


def _energy(W: Tensor, H: Tensor) -> Tensor:
    """tr(W H Wᵀ) = ‖XWᵀ‖², H = XᵀX."""
    return ((W @ H) * W).sum()


def _numbers(model: nn.Module) -> dict[str, Tensor]:
    """What is stored beside the integers, by kind, each in one row."""
    norms = (*norms_of(model).values(), model.get_submodule(family_of(model).final_norm))
    found = {
        "scales of weight groups": scales_of(model).values(), "gains of norms": [norm.weight for norm in norms],
        "clips": [grid.clip for grid in standing_grids(sites_of(model).values()).values()],
    }  # fmt: skip
    return {kind: torch.cat([x.detach().flatten().double() for x in of]) for kind, of in found.items() if of}
