"""What a model takes on a disk."""

from torch import nn

from jqlib.quant.packed import packed_codes, rounded_linears


def stored_bytes(model: nn.Module) -> int:
    """Of all its parameters: integer codes (`jqlib.quant.packed.pack`) and float16 scales of rounded weights, two bytes
    for each other number. A head that was tied to the embedding and is no more counts beside it.
    """
    rounded = rounded_linears(model).values()
    stored = sum(packed_codes(linear).nbytes + linear.grid.scale.nbytes for linear in rounded)
    others = sum(p.numel() for p in model.parameters()) - sum(linear.weight.numel() for linear in rounded)
    return stored + 2 * others
