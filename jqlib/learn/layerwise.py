"""GPTQ layer by layer, and after each layer's rounding all that can be learned of it, towards the FP layer's output.

Codes, scales, gains and clips of one layer learn at a time (BRECQ, Li et al. 2021; EfficientQAT's first phase, Chen et
al. 2024, §3.2), with the rounding of activations in the loop: from what the layers before it make, rounded and learned
as they are, towards what the FP layer makes of FP inputs. Each token's squared error counts by the token's own energy:
a few tokens of massive activations would drown all others.
"""

from copy import deepcopy
from dataclasses import replace

from torch import Tensor, nn

from jqlib.learn.rounded import RATES, learnable_weights
from jqlib.learn.steps import Steps, minimise_by_steps
from jqlib.model.families import Place, sites_of
from jqlib.model.walk import Step, walk
from jqlib.precision import products_in
from jqlib.quant.gptq import hessians_of, round_site
from jqlib.quant.packed import pack_weights, unpack_weights, vectors_of
from jqlib.quant.quantize import set_grid
from jqlib.transform.install import standing_grids
from jqlib.transform.transform import Grid

EVERY = 4  # one piece of text in so many goes into GPTQ's Hessians


def round_layer_by_layer(
    model: nn.Module, pieces: Tensor, bits: int, groupsize: int, grids: dict[str, Grid], steps: Steps = Steps(),
    *, clips: bool = True,
) -> None:  # fmt: skip
    """Round the weights of all decoder layers, and their inputs by ``grids``, in place; each layer takes ``steps``.

    ``model``: built, with nothing rounded. ``pieces``: calibration text, (pieces, tokens). ``steps.keep`` receives what
    was learned after every layer. ``clips=False``: those of the grids stay as they are.

    Raises FloatingPointError if a layer's loss is not finite.
    """
    sites, finished = list(sites_of(model).values()), steps.resume or {}
    exact = walk(deepcopy(model), pieces)
    for i, step in enumerate(walk(model, pieces, "layer by layer")):
        plain, places = next(exact), [place for place in sites if place.layer == i]
        for place in places:
            set_grid(model, place, grids[place.name])
        with products_in(steps.dtype, model.device):
            plain.forward()
        known = {name: tensor for name, tensor in finished.items() if name.startswith(f"{step.name}.")}
        if any(name.endswith("|codes") for name in known):
            unpack_weights(model, known, bits, groupsize)
        else:
            aims = _round(step, places, bits, groupsize)
            _learn(step, places, aims, pieces, plain.hidden, steps, clips)
            if steps.keep:
                steps.keep(pack_weights(model) | vectors_of(model))
        with products_in(steps.dtype, model.device):
            step.forward()


def _round(step: Step, places: list[Place], bits: int, groupsize: int) -> dict[str, Tensor]:
    """Round a layer's weights by GPTQ; their aims, by linear."""
    hessians, aims = hessians_of(replace(step, hidden=step.hidden[::EVERY]), places), {}
    for place in places:
        aims |= round_site(place, place.weight, hessians[place.name], bits, groupsize)
    return aims


def _learn(
    step: Step, places: list[Place], aims: dict[str, Tensor], pieces: Tensor, targets: Tensor, steps: Steps, clips: bool
) -> None:
    """Learn a rounded layer, towards ``targets``, its outputs in FP for all pieces."""
    linears = {name: linear for place in places for name, linear in place.linears.items()}
    norms = {place.name: place.norm for place in places if place.norm is not None}
    grids = standing_grids(places) if clips else {}

    def loss(chosen: Tensor) -> Tensor:
        x, y = step.hidden[chosen], targets[chosen].float()  # squares of float16 numbers overflow
        with products_in(steps.dtype, x.device):
            found = step.run(x)
        return ((found - y).square().sum(-1) / y.square().sum(-1)).mean()

    alone = replace(steps, keep=None, resume=None, quiet=True)
    with learnable_weights(linears, norms, grids, aims) as knobs:
        minimise_by_steps(knobs, loss, pieces, RATES, alone, step.name)
