"""What a model takes on a disk, and a weight of it."""

import torch
from torch import nn

from jqlib.model.families import linears_of
from jqlib.quant.packed import pack, packed_codes, rounded_linears
from jqlib.transform.grids import OFF


def stored_bytes(model: nn.Module) -> int:
    """Of all its parameters: integer codes (`jqlib.quant.packed.pack`) and float16 scales of rounded weights, two bytes
    for each other number. A head that was tied to the embedding and is no more counts beside it.
    """
    rounded = rounded_linears(model).values()
    stored = sum(packed_codes(linear).nbytes + linear.grid.scale.nbytes for linear in rounded)
    others = sum(p.numel() for p in model.parameters()) - sum(linear.weight.numel() for linear in rounded)
    return stored + 2 * others


def bits_per_weight(model: nn.Module, w_bits: int, w_groupsize: int) -> float:
    """Stored bits per weight of the linears of a ``model`` (the meta device will do): of codes as `pack` has them (2 to
    4 bits in 4, up to 8 in 8, 9 to 12 in 16) and of each group's 16-bit scale; a row's last group may be shorter.
    """
    if w_bits == OFF:
        return float(OFF)
    shapes = [linear.weight.shape for linear in linears_of(model).values()]
    scales = sum(rows * -(-columns // w_groupsize) for rows, columns in shapes)
    held = 8 * pack(torch.zeros(1, 2), w_bits).nbytes / 2  # two codes
    return held + 16 * scales / sum(rows * columns for rows, columns in shapes)


def file_bytes(model: nn.Module, bits_per_weight: float, own_head: bool) -> float:
    """What `stored_bytes` will be, by the shapes of a ``model`` (the meta device will do): its linears at so many bits
    a weight, two bytes for each other number; ``own_head``: a head that was tied to the embedding is so no more."""
    linear = sum(linear.weight.numel() for linear in linears_of(model).values())
    others = sum(p.numel() for p in model.parameters()) - linear
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight.numel() if own_head and tied else 0
    return linear * bits_per_weight / 8 + 2 * (others + head)
