"""After the weights are rounded: the scales of their groups, the norms' gains and the clips, tuned end to end.

The integer codes stay what GPTQ left. What moves is stored beside them in floating point anyway, so nothing is added to
the model: EfficientQAT's second phase (Chen et al. 2024, §3.3), here with the activations' rounding in the loop, norms
and clips besides, and KL to the FP model's predictions for a loss. Scales end as float16 numbers again.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from jqlib.learn.steps import Steps, divergence, low_precision, minimise_by_steps, predictions
from jqlib.model.families import family_of, norms_of
from jqlib.quant.packed import codes_of, rounded_linears, set_weight
from jqlib.transform.build import done, standing
from jqlib.transform.grids import spread

RATES = {"scale": 3e-3, "gain": 4e-3, "clip": 3e-3}  # of Adam; scales and gains are factors near 1


def tune(model: nn.Module, teacher: nn.Module, windows: Tensor, steps: Steps = Steps()) -> None:
    """Tune a ``model`` of rounded weights in place, towards the predictions of ``teacher``, the FP model.

    Raises RuntimeError when the model is not quantised, FloatingPointError if the loss is not finite.
    """
    if "quantised" not in done(model):
        raise RuntimeError("tune needs a model whose weights are rounded: call quantize_model(model) before it")
    linears = rounded_linears(model)
    norms = norms_of(model) | {"final": model.get_submodule(family_of(model).final_norm)}
    grids = {name: transform.grid for name, transform in standing(model).items() if transform.rounds}
    knobs = {f"clip {name}": grid.clip.requires_grad_() for name, grid in grids.items()}
    for kind, modules in {"scale": linears, "gain": norms}.items():
        for name, module in modules.items():
            factor = Factor(module.weight, module.grid.groupsize if kind == "scale" else 1)
            parametrize.register_parametrization(module, "weight", factor)
            knobs[f"{kind} {name}"] = factor.factor

    def loss(ids: Tensor) -> Tensor:
        ids = ids.to(model.device)
        with low_precision(model.device):
            return divergence(model, ids, predictions(teacher, ids))

    try:
        minimise_by_steps(knobs, loss, windows, RATES, steps, "tuning")
    finally:
        for module in norms.values():
            parametrize.remove_parametrizations(module, "weight")
        for linear in linears.values():
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
        model.requires_grad_(False)
    for name, linear in linears.items():
        scale = (linear.grid.scale.float() * knobs[f"scale {name}"].detach()).half()
        rounded = codes_of(linear) * spread(scale.float(), linear.grid.groupsize, linear.weight)
        set_weight(linear, rounded, scale, linear.grid.bits, linear.grid.groupsize)


class Factor(nn.Module):
    """A weight times a factor for every ``width`` values along its last dimension, the last of them maybe fewer."""

    def __init__(self, weight: Tensor, width: int):
        super().__init__()
        self.width = min(width, weight.shape[-1])
        shape = (*weight.shape[:-1], -(-weight.shape[-1] // self.width))
        self.factor = nn.Parameter(torch.ones(shape, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return (weight * spread(self.factor, self.width, weight)).to(weight.dtype)
