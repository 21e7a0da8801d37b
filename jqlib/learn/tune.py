"""After the weights are rounded: codes, the scales of their groups, the norms' gains and the clips, tuned end to end.

The scales, gains and clips are stored beside the codes in floating point anyway: EfficientQAT's second phase (Chen et
al. 2024, §3.3), here with the activations' rounding in the loop, norms and clips besides, and KL to the FP model's
predictions for a loss. Codes stay what GPTQ left, or learn too, from where in its cell each weight lay before it was
rounded (straight-through; those near a border flip first). Scales end as float16 numbers again.
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

RATES = {"code": 3e-3, "scale": 3e-3, "gain": 4e-3, "clip": 3e-3}  # of Adam: of a cell; factors near 1; ratios
INSIDE = 0.49  # of a cell: the farthest from its code that a weight starts


def tune(model: nn.Module, lessons: Lessons, steps: Steps = Steps(), exact: dict[str, Tensor] | None = None) -> None:
    """Tune a ``model`` of rounded weights in place, towards the FP model's predictions (`lessons.teach`).

    ``exact``: the weights before they were rounded, by linear: given, codes learn too.

    Raises RuntimeError when the model is not quantised, FloatingPointError if the loss is not finite.
    """
    if "quantised" not in done(model):
        raise RuntimeError("tune needs a model whose weights are rounded: call quantize_model(model) before it")
    linears = rounded_linears(model)
    norms = norms_of(model) | {"final": model.get_submodule(family_of(model).final_norm)}
    grids = {name: transform.grid for name, transform in standing(model).items() if transform.rounds}
    knobs = {f"clip {name}": grid.clip.requires_grad_() for name, grid in grids.items()}
    forms = {name: OnGrid(linear, exact and exact[name]) for name, linear in linears.items()}
    for name, form in forms.items():
        parametrize.register_parametrization(linears[name], "weight", form, unsafe=True)
        knobs |= {f"code {name}": form.place} if exact else {}
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
        for module in (*norms.values(), *linears.values()):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=module not in linears.values())
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
    """A rounded weight as its codes and scales say, in the products' dtype at once.

    ``place``: where in the grid each weight lies, in cells; its code is the nearest whole number. ``factor``: of the
    scale of each group.
    """

    def __init__(self, linear: nn.Linear, exact: Tensor | None = None):
        super().__init__()
        self.scale, self.top, self.groupsize = (
            linear.grid.scale.float(),
            2 ** (linear.grid.bits - 1),
            linear.grid.groupsize,
        )
        place = codes_of(linear)
        if exact is not None:
            cells = exact.float() / spread(self.scale, self.groupsize, place)
            place += (cells - place).clamp_(-INSIDE, INSIDE)
        self.place = nn.Parameter(place, requires_grad=exact is not None)
        self.factor = nn.Parameter(torch.ones_like(self.scale))

    def forward(self, weight: Tensor) -> Tensor:
        scale = self.scale * self.factor
        return Placed.apply(self.place, scale, self.top, self.groupsize, dtype_of_products(weight))

    def ends(self) -> tuple[Tensor, Tensor]:
        """The weight and its scales, float16 numbers."""
        scale = (self.scale * self.factor.detach()).half()
        return _placed(self.place.detach(), scale.float(), self.top, self.groupsize, torch.float32), scale


class Placed(torch.autograd.Function):
    """The weight (out, in) of places and scales (out, groups), and the slopes of both, straight through."""

    @staticmethod
    def forward(ctx, place: Tensor, scale: Tensor, top: int, groupsize: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(place, scale)
        ctx.grid = top, groupsize
        return _placed(place, scale, top, groupsize, dtype)

    @staticmethod
    def backward(ctx, slope: Tensor):
        place, scale = ctx.saved_tensors
        by_place = _by_place(place, scale, slope, *ctx.grid) if ctx.needs_input_grad[0] else None
        return by_place, _by_scale(place, slope, *ctx.grid).to(scale.dtype), None, None, None


@fused
def _placed(place: Tensor, scale: Tensor, top: int, groupsize: int, dtype: torch.dtype) -> Tensor:
    return (place.round().clamp(-top, top - 1) * spread(scale, groupsize, place)).to(dtype)


@fused
def _by_place(place: Tensor, scale: Tensor, slope: Tensor, top: int, groupsize: int) -> Tensor:
    inside = (place > -top - 0.5) & (place < top - 0.5)
    return (slope * spread(scale, groupsize, place)).where(inside, 0).to(place.dtype)


@fused
def _by_scale(place: Tensor, slope: Tensor, top: int, groupsize: int) -> Tensor:
    return grouped(slope * place.round().clamp(-top, top - 1), groupsize).sum(-1)
