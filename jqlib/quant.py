"""INT4 and its neighbours: weight and activation quantisers (pure functions), and a model quantised by them.

Quantisation is simulated: values are rounded to the integer grid and multiplied back, matmuls stay in
floating point. Embeddings and the head are not quantised.
"""

from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from jqlib.models import done, head_dim_of, sites_of

OFF = 16  # bits that mean "leave in floating point"
BLOCK = 2**17  # weights rounded at a time: the clip search stays in the processor's cache
CLIPS = [1 - 0.025 * i for i in range(29)]  # clip ratios 1.00 … 0.30 searched for a weight group


def quantize_weight(weight: Tensor, bits: int = 4, groupsize: int = 128) -> Tensor:
    """Round-to-nearest (RTN): symmetric, groups of ``groupsize`` along the input; returns the dequantised weight.

    ``weight``: (out, in). Integers use the full range [−2^(b−1), 2^(b−1) − 1]; each group's scale is
    the one of least squared error among clip ratios 1.00 … 0.30. The last group of a row is shorter where
    ``groupsize`` does not divide ``in``.
    """
    rounded = []
    for rows in weight.float().split(max(1, BLOCK // weight.shape[1])):
        groups = _grouped(rows, groupsize)  # (rows, groups, groupsize)
        rounded.append(_ungrouped(round_symmetric(groups, weight_scale(groups, bits), bits), rows))
    return torch.cat(rounded)


def weight_scale(groups: Tensor, bits: int) -> Tensor:
    """The scale of least squared error for each group: (..., size) to (..., 1), float32, never 0."""
    top = 2 ** (bits - 1) - 1
    full = groups.abs().amax(-1, keepdim=True) / top
    full = full.where(full > 0, 1.0)
    best, least = full, torch.full_like(full, torch.inf)
    for clip in CLIPS:
        error = (round_symmetric(groups, full * clip, bits) - groups).square_().sum(-1, keepdim=True)
        best = torch.where(error < least, full * clip, best)
        least = torch.minimum(error, least)
    return best


def round_symmetric(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """``x`` on the grid scale · {−2^(b−1), …, 2^(b−1) − 1}."""
    top = 2 ** (bits - 1)
    return (x / scale).round_().clamp_(-top, top - 1).mul_(scale)


def quantize_activation(x: Tensor, bits: int = 4, clip: float = 1.0, groupsize: int | None = None) -> Tensor:
    """Dynamic per-token asymmetric rounding: (..., features), dequantised.

    Each token (or each ``groupsize`` channels of it) has its own grid of 2^b points over [clip · min, clip · max],
    0 always among them.
    """
    groups = x if groupsize is None else x.unflatten(-1, (-1, groupsize))
    codes, scale = asymmetric_codes(groups, bits, clip)
    return codes.mul_(scale).view(x.shape)


def asymmetric_codes(x: Tensor, bits: int, clip: float = 1.0) -> tuple[Tensor, Tensor]:
    """Integer codes of (..., features), the zero point taken off, and their scales (..., 1)."""
    low = x.amin(-1, keepdim=True).clamp_(max=0).mul_(clip)
    high = x.amax(-1, keepdim=True).clamp_(min=0).mul_(clip)
    top = 2**bits - 1
    scale = (high - low) / top
    scale = scale.where(scale > 0, 1.0)
    zero = (-low / scale).round_()
    return (x / scale).round_().add_(zero).clamp_(0, top).sub_(zero), scale


def rounding_error(x: Tensor, bits: int = 4, clip: float = 1.0, groupsize: int | None = None) -> float:
    """Mean over tokens of ‖Q(x) − x‖² / ‖x‖² for `quantize_activation`; ``x``: (tokens, features)."""
    error = (quantize_activation(x, bits, clip, groupsize) - x).square().sum(-1)
    return (error / x.square().sum(-1).clamp(min=1e-20)).mean().item()


def quantize_model(
    model: nn.Module,
    w_bits: int = 4,
    a_bits: int = 4,
    w_groupsize: int = 128,
    *,
    a_clip: float = 1.0,
    o_per_head: bool = False,
) -> None:
    """Quantise all linears of the decoder layers and the activations they read, in place. 16 bits: left alone.

    ``a_clip`` shrinks every token's range; ``o_per_head`` gives o_proj's input a grid a head.

    Raises ValueError for bits outside 2..16, a group size below 1 or a clip outside (0, 1]; RuntimeError for a
    model quantised already.
    """
    check_bits(w_bits=w_bits, a_bits=a_bits)
    if w_groupsize < 1:
        raise ValueError(f"w_groupsize={w_groupsize}: a group holds at least 1 weight (128 is usual)")
    if not 0 < a_clip <= 1:
        raise ValueError(f"a_clip={a_clip}: a clip ratio lies in (0, 1]")
    if "quantized" in done(model):
        raise RuntimeError("this model is quantised already: load it again to quantise it another way")
    for layer, site in tqdm(sites_of(model), "quantising", unit="site"):
        for reader in site.readers if w_bits < OFF else ():
            weight = model.get_submodule(f"{layer}.{reader}").weight
            weight.data = quantize_weight(weight, w_bits, w_groupsize).to(weight.dtype)
        if a_bits < OFF:
            groupsize = head_dim_of(model) if site.name == "o" and o_per_head else None
            _quantize_site(
                model, layer, site, partial(quantize_activation, bits=a_bits, clip=a_clip, groupsize=groupsize)
            )
    done(model).add("quantized")


def check_bits(**bits: int) -> None:
    """ValueError unless every given number of bits is a whole number from 2 to 16."""
    for name, value in bits.items():
        if not isinstance(value, int) or not 2 <= value <= OFF:
            raise ValueError(f"{name}={value}: bits are whole numbers from 2 to 16, and 16 means not quantised")


def bits_per_weight(w_bits: int, w_groupsize: int) -> float:
    """Stored bits a weight of a quantised linear, its group's 16-bit scale included."""
    return w_bits + 16 / w_groupsize if w_bits < OFF else float(OFF)


def _quantize_site(model: nn.Module, layer: str, site, quantizer) -> None:
    """Quantise a site's input once, where it is made: behind its norm, or before its only reader."""
    if site.norm:
        norm = model.get_submodule(f"{layer}.{site.norm}")
        norm.register_forward_hook(lambda module, args, output: quantizer(output))
    else:
        for reader in site.readers:
            linear = model.get_submodule(f"{layer}.{reader}")
            linear.register_forward_pre_hook(lambda module, args: (quantizer(args[0]), *args[1:]))


def _grouped(weight: Tensor, groupsize: int) -> Tensor:
    """(out, in) to (out, groups, size), zeros filling a ragged last group: they change neither scale nor error."""
    size = min(groupsize, weight.shape[1])
    return nn.functional.pad(weight, (0, -weight.shape[1] % size)).unflatten(1, (-1, size))


def _ungrouped(groups: Tensor, like: Tensor) -> Tensor:
    return groups.flatten(1)[:, : like.shape[1]]
