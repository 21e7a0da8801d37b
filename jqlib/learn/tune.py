"""After the weights are rounded: the scales of their groups, the norms' gains and the clips, tuned end to end.

The integer codes stay what GPTQ left. What moves is stored beside them in floating point anyway, so nothing is added to
the model: EfficientQAT's second phase (Chen et al. 2024, §3.3), here with the activations' rounding in the loop, norms
and clips besides, and KL to the FP model's predictions for a loss. Scales end as float16 numbers again.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from jqlib.fused import fused
from jqlib.learn.lessons import Lessons
from jqlib.learn.steps import Steps, minimise_by_steps
from jqlib.model.families import family_of, norms_of
from jqlib.precision import dtype_of_products, products_in
from jqlib.quant.packed import codes_of, rounded_linears, set_weight
from jqlib.transform.build import done, standing
from jqlib.transform.grids import grouped, spread

RATES = {"scale": 3e-3, "gain": 4e-3, "clip": 3e-3}  # of Adam; scales and gains are factors near 1


def tune(model: nn.Module, lessons: Lessons, steps: Steps = Steps()) -> None:
    """Tune a ``model`` of rounded weights in place, towards the FP model's predictions (`lessons.teach`).

    Raises RuntimeError when the model is not quantised, FloatingPointError if the loss is not finite.
    """
    if "quantised" not in done(model):
        raise RuntimeError("tune needs a model whose weights are rounded: call quantize_model(model) before it")
    linears = rounded_linears(model)
    norms = norms_of(model) | {"final": model.get_submodule(family_of(model).final_norm)}
    grids = {name: transform.grid for name, transform in standing(model).items() if transform.rounds}
    knobs = {f"clip {name}": grid.clip.requires_grad_() for name, grid in grids.items()}
    forms = {name: OnGrid(linear) for name, linear in linears.items()}
    for name, form in forms.items():
        parametrize.register_parametrization(linears[name], "weight", form, unsafe=True)
        knobs[f"scale {name}"] = form.factor
    for name, norm in norms.items():
        factor = Factor(norm.weight)
        parametrize.register_parametrization(norm, "weight", factor)
        knobs[f"gain {name}"] = factor.factor

    def loss(pieces: Tensor) -> Tensor:
        with products_in(steps.dtype, model.device):
            return lessons.loss(model, pieces)

    try:
        minimise_by_steps(knobs, loss, lessons.ids, RATES, steps, "tuning")
    finally:
        for norm in norms.values():
            parametrize.remove_parametrizations(norm, "weight")
        for linear in linears.values():
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
        model.requires_grad_(False)
    for name, linear in linears.items():
        set_weight(linear, *forms[name].ends(), linear.grid.bits, linear.grid.groupsize)


class Factor(nn.Module):
    """A vector times a factor for each of its numbers."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.factor = nn.Parameter(torch.ones_like(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor


class OnGrid(nn.Module):
    """A rounded weight as its codes and scales say, in the products' dtype at once; each group's scale has a factor."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.codes, self.scale, self.groupsize = codes_of(linear), linear.grid.scale.float(), linear.grid.groupsize
        self.factor = nn.Parameter(torch.ones_like(self.scale))

    def forward(self, weight: Tensor) -> Tensor:
        return Scaled.apply(self.codes, self.scale * self.factor, self.groupsize, dtype_of_products(weight))

    def ends(self) -> tuple[Tensor, Tensor]:
        """The weight and its scales, float16 numbers."""
        scale = (self.scale * self.factor.detach()).half()
        return _scaled(self.codes, scale.float(), self.groupsize, torch.float32), scale


class Scaled(torch.autograd.Function):
    """The weight of codes (out, in) and scales (out, groups); only the scales have a slope."""

    @staticmethod
    def forward(ctx, codes: Tensor, scale: Tensor, groupsize: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.groupsize, ctx.dtype = groupsize, scale.dtype
        return _scaled(codes, scale, groupsize, dtype)

    @staticmethod
    def backward(ctx, slope: Tensor):
        (codes,) = ctx.saved_tensors
        return None, _by_scale(slope, codes, ctx.groupsize).to(ctx.dtype), None, None


@fused
def _scaled(codes: Tensor, scale: Tensor, groupsize: int, dtype: torch.dtype) -> Tensor:
    return (codes * spread(scale, groupsize, codes)).to(dtype)


@fused
def _by_scale(slope: Tensor, codes: Tensor, groupsize: int) -> Tensor:
    return grouped(slope * codes, groupsize).sum(-1)
