"""What a model takes on a disk."""

from torch import nn

from jqlib.quant.packed import rounded_linears


def stored_bytes(model: nn.Module) -> int:
    """Of all its parameters: integer codes (`jqlib.quant.packed.pack`) and float16 scales of rounded weights, two bytes
    for each other number. A head that was tied to the embedding and is no more counts beside it.
    """
    rounded = rounded_linears(model).values()
    codes = sum(linear.weight.numel() * _stored_bits(linear.grid.bits) // 8 for linear in rounded)
    scales = sum(linear.grid.scale.nbytes for linear in rounded)
    others = sum(p.numel() for p in model.parameters()) - sum(linear.weight.numel() for linear in rounded)
    return codes + scales + 2 * others


def _stored_bits(bits: int) -> int:
    return next(size for size in (4, 8, 16) if bits <= size)
