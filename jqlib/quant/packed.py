"""What a rounded weight is stored as: integer codes, two to a byte at 4 bits and below, and float16 scales."""

import torch
from torch import Tensor, nn

from jqlib.model.families import linears_of
from jqlib.transform.grids import spread


class WeightGrid(nn.Module):
    """The grid that a linear's weight lies on; it stands in the linear. ``scale``: (out, groups), float16."""

    def __init__(self, scale: Tensor, bits: int, groupsize: int):
        super().__init__()
        self.bits, self.groupsize = bits, groupsize
        self.register_buffer("scale", scale.half(), persistent=False)  # a Hugging Face checkpoint has no place for it
        self.packed: Tensor | None = None  # the codes, where the weight itself comes and goes (`jqlib.model.stream`)

    def put_away(self, linear: nn.Linear) -> None:
        self.packed = packed_codes(linear)

    def bring_back(self, linear: nn.Linear) -> None:
        codes = unpack(self.packed.to(self.scale.device), self.bits, linear.in_features)
        weight = codes * spread(self.scale.float(), self.groupsize, codes)
        linear.weight = nn.Parameter(weight.to(linear.weight.dtype), requires_grad=False)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, groupsize={self.groupsize}"


def set_weight(linear: nn.Linear, rounded: Tensor, scale: Tensor, bits: int, groupsize: int) -> None:
    """Give a linear a rounded weight (out, in) and the grid it lies on."""
    linear.weight.data = rounded.to(linear.weight.dtype)
    linear.grid = WeightGrid(scale, bits, groupsize).to(linear.weight.device)


def codes_of(linear: nn.Linear) -> Tensor:
    """The integer codes of a rounded weight, (out, in), float32."""
    weight = linear.weight.data.float()
    return (weight / spread(linear.grid.scale.float(), linear.grid.groupsize, weight)).round_()


def rounded_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears of rounded weights, by name."""
    return {name: linear for name, linear in linears_of(model).items() if hasattr(linear, "grid")}


def scales_of(model: nn.Module) -> dict[str, Tensor]:
    """``<linear>|scale`` of all rounded linears."""
    return {f"{name}|scale": linear.grid.scale.cpu() for name, linear in rounded_linears(model).items()}


def pack_weights(model: nn.Module) -> dict[str, Tensor]:
    """``<linear>|codes`` and ``<linear>|scale`` of all rounded linears."""
    linears = rounded_linears(model).items()
    codes = {f"{name}|codes": packed_codes(linear).cpu() for name, linear in linears}
    return codes | scales_of(model)


def packed_codes(linear: nn.Linear) -> Tensor:
    """The codes of a rounded weight as `pack` has them, whether the weight is in memory or not."""
    grid = linear.grid
    return pack(codes_of(linear), grid.bits) if grid.packed is None else grid.packed


def vectors_of(model: nn.Module) -> dict[str, Tensor]:
    """All of its state that is no matrix: gains of norms, clips, biases."""
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.ndim < 2}


def unpack_weights(model: nn.Module, tensors: dict[str, Tensor], bits: int, groupsize: int) -> None:
    """Give a model the weights of `pack_weights`, and those `vectors_of` a model that are there."""
    for name, linear in linears_of(model).items():
        if (packed := tensors.get(f"{name}|codes")) is not None:
            linear.grid = WeightGrid(tensors[f"{name}|scale"].to(model.device), bits, groupsize)
            linear.grid.packed = packed
            if not linear.weight.is_meta:
                linear.grid.bring_back(linear)
                linear.grid.packed = None
    model.load_state_dict({name: tensor for name, tensor in tensors.items() if "|" not in name}, strict=False)


def pack(codes: Tensor, bits: int) -> Tensor:
    """(out, in) whole numbers in [−2^(b−1), 2^(b−1) − 1]: uint8 pairs at 4 bits and below, else int8 or int16."""
    if bits > 4:
        return codes.to(torch.int8 if bits <= 8 else torch.int16)
    nibbles = (codes + 8).to(torch.uint8)
    nibbles = torch.nn.functional.pad(nibbles, (0, nibbles.shape[1] % 2))
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """What `pack` was given, float32."""
    if bits > 4:
        return packed.float()
    return torch.stack([packed & 15, packed >> 4], -1).flatten(1)[:, :columns].float() - 8
