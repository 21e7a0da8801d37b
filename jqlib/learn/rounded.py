"""A model of rounded weights as a function of what can be learned of it: codes, scales, the norms' gains, the clips.

Scales, gains and clips are stored beside the codes in floating point anyway, so nothing is added to the model.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from jqlib.fused import fused
from jqlib.precision import dtype_of_products
from jqlib.quant.packed import codes_of, set_weight
from jqlib.transform.grids import grouped, spread
from jqlib.transform.transform import Grid

RATES = {"code": 5e-3, "scale": 3e-3, "gain": 4e-3, "clip": 3e-3}  # of Adam: of a cell; factors near 1; ratios
INSIDE = 0.49  # of a cell: the farthest from its code that a weight starts


@contextmanager
def learnable_weights(
    linears: Mapping[str, nn.Linear], norms: Mapping[str, nn.Module], grids: Mapping[str, Grid],
    aims: Mapping[str, Tensor] | None = None,
) -> Iterator[dict[str, Tensor]]:  # fmt: skip
    """Within it weights and gains are functions of what is learned: ``{"<kind> <name>": parameter}``, kinds
    of RATES.

    ``aims``: where weights stood before they were rounded, (out, in), by linear: given, codes learn too, straight
    through, and those near the border of their cell flip first. Scales end as float16 numbers again.
    """
    knobs = {f"clip {name}": grid.clip.requires_grad_() for name, grid in grids.items()}
    forms = {name: OnGrid(linear, aims and aims[name]) for name, linear in linears.items()}
    for name, form in forms.items():
        parametrize.register_parametrization(linears[name], "weight", form, unsafe=True)
        knobs |= {f"code {name}": form.place} if aims else {}
        knobs[f"scale {name}"] = form.factor
    for name, norm in norms.items():
        factor = Factor(norm.weight)
        parametrize.register_parametrization(norm, "weight", factor)
        knobs[f"gain {name}"] = factor.factor
    try:
        yield knobs
    finally:
        for norm in norms.values():
            parametrize.remove_parametrizations(norm, "weight")
        for linear in linears.values():
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
        for part in (*norms.values(), *linears.values(), *grids.values()):
            part.requires_grad_(False)
        for name, linear in linears.items():  # here too, or an interruption would leave norms that these don't suit
            set_weight(linear, *forms[name].ends(), linear.grid.bits, linear.grid.groupsize)


class Factor(nn.Module):
    """A vector times a factor for each of its numbers, in float32: a step of Adam is less than bfloat16 adds to 1."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.factor = nn.Parameter(torch.ones_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)))

    def forward(self, weight: Tensor) -> Tensor:
        return (weight * self.factor).to(weight.dtype)


class OnGrid(nn.Module):
    """A rounded weight as its codes and scales say, in the products' dtype at once.

    ``place``: where in the grid each weight lies, in cells; its code is the nearest whole number. ``factor``: of the
    scale of each group.
    """

    def __init__(self, linear: nn.Linear, aim: Tensor | None = None):
        super().__init__()
        grid = linear.grid
        self.scale, self.top, self.groupsize = grid.scale.float(), 2 ** (grid.bits - 1), grid.groupsize
        place = codes_of(linear)
        if aim is None:
            place = place.to(torch.int8 if grid.bits <= 8 else torch.int16)
        else:
            cells = aim.float() / spread(self.scale, self.groupsize, place)
            place += (cells - place).clamp_(-INSIDE, INSIDE)
        self.place = nn.Parameter(place, requires_grad=aim is not None)
        self.factor = nn.Parameter(torch.ones_like(self.scale))

    def forward(self, weight: Tensor) -> Tensor:
        scale = self.scale * self.factor
        return Placed.apply(self.place, scale, self.top, self.groupsize, dtype_of_products(weight))

    def ends(self) -> tuple[Tensor, Tensor]:
        """The weight and its scales, float16 numbers."""
        scale = (self.scale * self.factor.detach()).half()
        place = self.place.detach()
        return _placed(place, spread(scale.float(), self.groupsize, place), self.top, torch.float32), scale


class Placed(torch.autograd.Function):
    """The weight (out, in) of places and scales (out, groups), and the slopes of both, straight through."""

    @staticmethod
    def forward(ctx, place: Tensor, scale: Tensor, top: int, groupsize: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(place, scale)
        ctx.grid = top, groupsize
        return _placed(place, spread(scale, groupsize, place), top, dtype)

    @staticmethod
    def backward(ctx, slope: Tensor):
        (place, scale), (top, groupsize) = ctx.saved_tensors, ctx.grid
        needed = ctx.needs_input_grad[0]
        by_place = _by_place(place, spread(scale, groupsize, place), slope, top) if needed else None
        return by_place, _by_scale(place, slope, top, groupsize).to(scale.dtype), None, None, None


# scales are spread before these: compiled with them, that takes fifteen times as long as the rest
@fused
def _placed(place: Tensor, scale: Tensor, top: int, dtype: torch.dtype) -> Tensor:
    return (place.round().clamp(-top, top - 1) * scale).to(dtype)


@fused
def _by_place(place: Tensor, scale: Tensor, slope: Tensor, top: int) -> Tensor:
    inside = (place > -top - 0.5) & (place < top - 0.5)
    return (slope * scale).where(inside, 0).to(place.dtype)


@fused
def _by_scale(place: Tensor, slope: Tensor, top: int, groupsize: int) -> Tensor:
    return grouped(slope * place.round().clamp(-top, top - 1), groupsize).sum(-1)
