"""What happens to the input of a site: z = ((x ⊘ s) R) ∘ g, and then a grid. One object says it all.

Before a model is built, all sites have a `Transform`; `jqlib.transform.build` merges into the weights what can be
merged, and what is left (a Hadamard transform that runs online, a grid) stays in the model as a module.
"""

from functools import wraps

import torch
from torch import Tensor, nn

from jqlib.precision import dtype_of_products
from jqlib.product import product
from jqlib.transform.grids import OFF, quantize_activation
from jqlib.transform.hadamard import hadamard_transform, transform_operations


class Rotation(nn.Module):
    """x R for an R (n, n), or one for every kv head, (kv, d, d), which the query heads of its group share."""

    def __init__(self, matrix: Tensor):
        super().__init__()
        self.matrix = nn.Parameter(matrix, requires_grad=False)

    def forward(self, x: Tensor, inverse: bool = False) -> Tensor:
        R = self.matrix.to(x)
        R = R.mT if inverse else R
        if R.ndim == 2:
            return product(x, R)
        return torch.einsum("...kgd,kde->...kge", x.unflatten(-1, (len(R), -1, R.shape[-1])), R).flatten(-3)

    def extra_repr(self) -> str:
        return "×".join(map(str, self.matrix.shape))


class Hadamard(nn.Module):
    """x H/√n by a fast transform, for any n that has an H (else ValueError). It has no parameters."""

    def __init__(self, n: int):
        super().__init__()
        self.n, self.operations = n, transform_operations(n)  # multiply-adds per token

    def forward(self, x: Tensor, inverse: bool = False) -> Tensor:
        return hadamard_transform(x, inverse)

    def extra_repr(self) -> str:
        return str(self.n)


class Grid(nn.Module):
    """The grid that each token, or each ``groupsize`` channels of it, is rounded to: `quantize_activation`."""

    def __init__(self, bits: int, clip: float = 1.0, groupsize: int | None = None):
        super().__init__()
        self.bits, self.groupsize = bits, groupsize
        self.clip = nn.Parameter(torch.tensor(float(clip)), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return quantize_activation(x, self.bits, self.clip, self.groupsize) if self.bits < OFF else x

    def extra_repr(self) -> str:
        return f"bits={self.bits}, groupsize={self.groupsize}"


def exact(method):
    """In float32 at least, whatever autocast says: in bfloat16 a massive channel drowns the others."""

    @wraps(method)
    def run(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return method(self, x.to(torch.promote_types(x.dtype, torch.float32)))

    return run


class Transform(nn.Module):
    """z = xA, A = diag(1/s) R diag(g), for x (..., features). A part that is None is left out.

    ``scale``: s, (features,), or for ``heads`` kv heads (kv · d,), which the query heads of a group share.
    ``rotation``: a `Rotation` or a `Hadamard`. ``gain``: g, (features,). ``grid``: what z is rounded to. ``online``:
    rotation and gain run with the model; else they are merged into what writes x, as the scale always is.
    """

    def __init__(
        self, scale: Tensor | None = None, rotation: nn.Module | None = None, gain: Tensor | None = None,
        grid: Grid | None = None, *, online: bool = False, heads: int = 1,
    ):  # fmt: skip
        super().__init__()
        for name, value in {"scale": scale, "gain": gain}.items():
            self.register_parameter(name, None if value is None else nn.Parameter(value, requires_grad=False))
        self.rotation, self.grid, self.online, self.heads = rotation, grid, online, heads

    def apply(self, x: Tensor) -> Tensor:
        """xA. (nn.Module has a method of this name too: given a function, it is that.)"""
        return self._forwards(x) if isinstance(x, Tensor) else super().apply(x)

    @exact
    def _forwards(self, x: Tensor) -> Tensor:
        if self.scale is not None:
            scale = self._spread(x)
            x = x / scale.where(scale != 0, 1.0)
        x = x if self.rotation is None else self.rotation(x)
        return x if self.gain is None else x * self.gain.to(x)

    @exact
    def undo(self, z: Tensor) -> Tensor:
        """zA⁻¹."""
        z = z if self.gain is None else z / self.gain.to(z)
        z = z if self.rotation is None else self.rotation(z, inverse=True)
        return z if self.scale is None else z * self._spread(z)

    @exact
    def dual(self, h: Tensor) -> Tensor:
        """hA⁻ᵀ: what becomes of a gradient at x, and of the rows of the weights that read x."""
        h = h if self.scale is None else h * self._spread(h)
        h = h if self.rotation is None else self.rotation(h)
        return h if self.gain is None else h / self.gain.to(h)

    def simulate(self, x: Tensor) -> Tensor:
        """x with the error that rounding z makes, in x's own basis: what a built model computes, nothing merged.
        (But where a gain is exactly 0: x has lost that channel, which a built model rounds among the others.)"""
        return self.undo(self.grid(self.apply(x))).to(dtype_of_products(x))

    def forward(self, x: Tensor) -> Tensor:
        z = self.apply(x)
        return (z if self.grid is None else self.grid(z)).to(dtype_of_products(x))

    def split(self) -> tuple["Transform", "Transform"]:
        """What is merged into the weights that write x, and what is left to run."""
        if self.online:
            left = Transform(None, self.rotation, self.gain, self.grid, online=True)
            return Transform(self.scale, heads=self.heads), left
        return Transform(self.scale, self.rotation, self.gain, heads=self.heads), Transform(grid=self.grid)

    @property
    def turns(self) -> bool:
        """Whether z differs from x."""
        return any(part is not None for part in (self.scale, self.rotation, self.gain))

    @property
    def runs(self) -> bool:
        """Whether there is anything to do at all: to turn, or to round."""
        return self.turns or self.rounds

    @property
    def rounds(self) -> bool:
        return self.grid is not None and self.grid.bits < OFF

    def _spread(self, x: Tensor) -> Tensor:
        """The scale of every feature of x, (features,)."""
        scale = self.scale.to(x).view(self.heads, 1, -1)
        return scale.expand(-1, x.shape[-1] // self.scale.numel(), -1).flatten()

    def extra_repr(self) -> str:
        parts = [name for name in ("scale", "gain") if getattr(self, name) is not None]
        return ", ".join(parts + ["online"] * self.online)


def packed(transforms: dict[str, Transform]) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """Transforms as tensors, and how they are put together, which JSON can hold. Shared rotations are kept once."""
    tensors, layouts, names = {}, {}, {}
    for name, transform in transforms.items():
        layout = layouts[name] = {"online": transform.online, "heads": transform.heads, "rotation": None, "grid": None}
        for part in ("scale", "gain"):
            if (value := getattr(transform, part)) is not None:
                tensors[f"{name}|{part}"] = value.detach().cpu()
        if isinstance(transform.rotation, Hadamard):
            layout["rotation"] = transform.rotation.n
        elif transform.rotation is not None:
            layout["rotation"] = names.setdefault(transform.rotation, f"{name}|rotation")
            tensors[layout["rotation"]] = transform.rotation.matrix.detach().cpu()
        if (grid := transform.grid) is not None:
            layout["grid"] = [grid.bits, grid.groupsize]
            tensors[f"{name}|clip"] = grid.clip.detach().cpu()
    return tensors, layouts


def unpacked(tensors: dict[str, Tensor], layouts: dict[str, dict]) -> dict[str, Transform]:
    """The transforms that `packed` took apart."""
    rotations: dict = {None: None}
    transforms = {}
    for name, layout in layouts.items():
        key = layout["rotation"]
        if key not in rotations:
            rotations[key] = Hadamard(key) if isinstance(key, int) else Rotation(tensors[key])
        grid = layout["grid"] and Grid(layout["grid"][0], tensors[f"{name}|clip"].item(), layout["grid"][1])
        scale, gain = (tensors.get(f"{name}|{part}") for part in ("scale", "gain"))
        transforms[name] = Transform(
            scale, rotations[key], gain, grid, online=layout["online"], heads=layout["heads"]
        )  # fmt: skip
    return transforms
