"""INT4 and its neighbours: weight and activation quantisers, pure functions.

Quantisation is simulated: values are rounded to the integer grid and multiplied back. The scales of weights are float16
numbers from the start, so that what is measured is what a file can hold.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from jqlib.fused import fused

OFF = 16  # bits that mean "leave in floating point"
BLOCK = 2**17  # weights whose scales are searched at a time
CLIPS = [1 - 0.025 * i for i in range(29)]  # clip ratios 1.00 … 0.30 searched for a weight group


def quantize_weight(weight: Tensor, bits: int = 4, groupsize: int = 128) -> Tensor:
    """Round-to-nearest (RTN): no zero point, groups of ``groupsize`` along the input; returns the dequantised weight.

    ``weight``: (out, in). Integers use the full range [−2^(b−1), 2^(b−1) − 1]; each group's scale is
    the one of least squared error among `group_scale`'s. The last group of a row is shorter if
    ``groupsize`` does not divide ``in``.
    """
    return round_to_nearest(weight, bits, groupsize)[0]


def round_to_nearest(weight: Tensor, bits: int, groupsize: int) -> tuple[Tensor, Tensor]:
    """`quantize_weight`, and the scales it went by, (out, groups)."""
    scales = weight_scales(weight, bits, groupsize)
    return round_symmetric(weight.float(), spread(scales, groupsize, weight), bits), scales


def weight_scales(weight: Tensor, bits: int, groupsize: int, importance: Tensor | None = None) -> Tensor:
    """The scale of every group of a weight (out, in): (out, groups), float32 holding float16 numbers.

    ``importance``: (in,), weighs the squared error of each column.
    """
    weight, scales = weight.float(), []
    importance = 1.0 if importance is None else grouped(importance[None], groupsize)
    for rows in weight.split(max(1, BLOCK // weight.shape[1])):
        scales.append(group_scale(grouped(rows, groupsize), bits, importance)[..., 0])
    return torch.cat(scales)


def group_scale(groups: Tensor, bits: int, importance: Tensor | float = 1.0) -> Tensor:
    """The scale of least squared error for each group: (..., size) to (..., 1), a float16 number, never 0.

    Of CLIPS times two scales: the one that puts the largest weight on the code ±(2^(b−1) − 1), and the signed one that
    puts it on −2^(b−1), the code that has no counterpart. ``importance`` weighs the squared error of each weight; it
    broadcasts against ``groups``.
    """
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    full = torch.stack([largest.abs() / (2 ** (bits - 1) - 1), -largest / 2 ** (bits - 1)])
    clips = torch.tensor(CLIPS, device=groups.device).view(-1, *[1] * groups.ndim)
    scales = _storable(full.where(full != 0, 1.0)[:, None] * clips).flatten(0, 1)
    errors = _errors(groups, scales, torch.as_tensor(importance, dtype=groups.dtype, device=groups.device), bits)
    return scales.gather(0, errors.argmin(0, keepdim=True))[0]


@fused
def _errors(groups: Tensor, scales: Tensor, importance: Tensor, bits: int) -> Tensor:
    """The squared error of groups (..., size) by each of so many scales, (scales, ..., 1): shaped as those."""
    error = round_symmetric(groups, scales, bits) - groups
    return (error * error * importance).sum(-1, keepdim=True)


def _storable(scale: Tensor) -> Tensor:
    """The nearest float16 numbers that are not 0."""
    return scale.abs().clamp(2.0**-24, torch.finfo(torch.float16).max).copysign(scale).half().float()


def round_symmetric(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """``x`` on the grid scale · {−2^(b−1), …, 2^(b−1) − 1}."""
    top = 2 ** (bits - 1)
    return (x / scale).round_().clamp_(-top, top - 1) * scale


def spread(scales: Tensor, groupsize: int, like: Tensor) -> Tensor:
    """A value per group, (..., groups), as one per weight, shaped as ``like`` (..., in)."""
    size = min(groupsize, like.shape[-1])
    return scales.repeat_interleave(size, -1)[..., : like.shape[-1]]


def grouped(weight: Tensor, groupsize: int) -> Tensor:
    """(out, in) to (out, groups, size), zeros filling a ragged last group: they change neither scale nor error."""
    size = min(groupsize, weight.shape[1])
    return pad(weight, (0, -weight.shape[1] % size)).unflatten(1, (-1, size))


def quantize_activation(x: Tensor, bits: int = 4, clip: float | Tensor = 1.0, groupsize: int | None = None) -> Tensor:
    """Dynamic per-token asymmetric rounding: (..., features), dequantised.

    Each token (or each ``groupsize`` channels of it) has its own grid of 2^b points over [clip · min, clip · max],
    0 always among them. Gradients reach ``x``, and ``clip`` if it is a tensor (0-dim).
    """
    groups = x if groupsize is None else x.unflatten(-1, (-1, groupsize))
    wide = groups.to(torch.promote_types(x.dtype, torch.float32))
    clip = torch.as_tensor(clip, dtype=wide.dtype, device=x.device)
    return Rounding.apply(wide, clip, bits).view(x.shape).to(x.dtype)


class Rounding(torch.autograd.Function):
    """(..., n) by `asymmetric_codes`, with straight-through gradients for x and clip (LSQ; Esser et al. 2020)."""

    @staticmethod
    def forward(ctx, x: Tensor, clip: Tensor, bits: int) -> Tensor:
        ctx.bits = bits
        ctx.save_for_backward(x, clip)
        return _rounded(x, clip, bits)

    @staticmethod
    def backward(ctx, slope: Tensor):
        x, clip = ctx.saved_tensors
        return *_slopes(x, clip, slope, ctx.bits), None


@fused
def _rounded(x: Tensor, clip: Tensor, bits: int) -> Tensor:
    codes, scale = asymmetric_codes(x, bits, clip)
    return codes * scale


@fused
def _slopes(x: Tensor, clip: Tensor, slope: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The loss's slope by x and by clip, from its slope by what x was rounded to. Equal extremes share theirs."""
    codes, scale = asymmetric_codes(x, bits, clip)
    error = codes * scale - x
    below, above = error > 0.5001 * scale, error < -0.5001 * scale  # off the grid's ends
    inside = slope.where(~(below | above), 0)
    width = (inside * error).sum(-1, keepdim=True) / (scale * (2**bits - 1))
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    at_low = ((slope * below).sum(-1, keepdim=True) - width) * (low < 0)
    at_high = ((slope * above).sum(-1, keepdim=True) + width) * (high > 0)
    is_low, is_high = x == low, x == high
    by_x = inside + is_low * (clip * at_low / is_low.sum(-1, keepdim=True))
    by_x = by_x + is_high * (clip * at_high / is_high.sum(-1, keepdim=True))
    return by_x, (at_low * low + at_high * high).sum()


def asymmetric_codes(x: Tensor, bits: int, clip: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """Integer codes of (..., features), the zero point taken off, and their scales (..., 1)."""
    low = x.amin(-1, keepdim=True).clamp_(max=0).mul_(clip)
    high = x.amax(-1, keepdim=True).clamp_(min=0).mul_(clip)
    top = 2**bits - 1
    scale = (high - low) / top
    scale = scale.where(scale > 0, 1.0)
    zero = (-low / scale).round_()
    return (x / scale).round_().add_(zero).clamp_(0, top).sub_(zero), scale


def rounding_errors(x: Tensor, bits: int, clip: float = 1.0, groupsize: int | None = None) -> Tensor:
    """‖Q(x) − x‖² / ‖x‖² of each token for `quantize_activation`, (tokens,); ``x``: (tokens, features)."""
    error = (quantize_activation(x, bits, clip, groupsize) - x).square().sum(-1)
    return error / x.square().sum(-1).clamp(min=1e-20)


def rounding_error(x: Tensor, bits: int = 4, clip: float = 1.0, groupsize: int | None = None) -> float:
    """The mean of `rounding_errors` over tokens."""
    return rounding_errors(x, bits, clip, groupsize).mean().item()
