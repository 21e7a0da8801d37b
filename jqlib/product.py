"""Which library multiplies float32 on a processor.

torch takes MKL, which uses AVX-512 on Intel's processors alone; oneDNN, which is in torch too, uses it everywhere: a
core of AMD's Zen 5 makes 240 GFLOP/s of 108. Other dtypes, devices and processors multiply as ever.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode


def fast_float32(device: torch.device) -> AbstractContextManager:
    """Within it linears without gradients multiply float32 by oneDNN, on a processor with AVX-512; else as always."""
    return _OneDNN() if not torch.is_autocast_enabled("cpu") and _wide(device) else nullcontext()


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """``x @ matrix``, (..., k) and (k, n), float32 by oneDNN on a processor with AVX-512; gradients pass.

    ``matrix`` may be (1, k, n), with an x (1, tokens, k), too; where there are several, it is ``x @ matrix``.
    """
    few = matrix.ndim == 2 or len(matrix) == 1
    if few and x.dtype == matrix.dtype == torch.float32 and _wide(x.device):
        return _Product.apply(x, matrix.view(matrix.shape[-2:]))
    return x @ matrix


def _wide(device: torch.device) -> bool:
    """Whether it is a processor with AVX-512, and torch one with oneDNN."""
    can = device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_f")
    return can and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDNN(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        plain = function is linear and not (kwargs or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
        if plain and args[0].dtype == args[1].dtype == torch.float32:
            return _by_onednn(*args)
        return function(*args, **(kwargs or {}))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, matrix: Tensor) -> Tensor:
        ctx.save_for_backward(x, matrix)
        return _by_onednn(x, matrix.mT)

    @staticmethod
    def backward(ctx, slope: Tensor):
        x, matrix = ctx.saved_tensors
        by_x = _by_onednn(slope, matrix) if ctx.needs_input_grad[0] else None
        return by_x, _by_onednn(x.flatten(0, -2).mT, slope.flatten(0, -2).mT) if ctx.needs_input_grad[1] else None
