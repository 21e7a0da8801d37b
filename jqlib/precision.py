"""The dtype of matrix products, where it may differ from the model's; norms, transforms, grids, losses keep theirs.

And which library multiplies float32 on a processor: torch takes MKL, which uses AVX-512 on Intel's alone. oneDNN, which
is in torch too, uses it everywhere: a core of AMD's Zen 5 makes 240 GFLOP/s of 108.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from jqlib.choices import ComputeDtype


def products_dtype(choice: ComputeDtype, device: str | torch.device) -> torch.dtype:
    """What ``choice`` means on a device; "auto": bfloat16 on GPUs and on processors that multiply it (AMX, AVX512)."""
    if choice != "auto":
        return getattr(torch, choice)
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    can = torch.cpu.get_capabilities()
    return torch.bfloat16 if can.get("amx_bf16") or can.get("avx512_bf16") else torch.float32


def products_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager:
    """Within it products are in bfloat16, if that is the dtype; else as the model has them, and fast."""
    return torch.autocast(device.type, torch.bfloat16) if dtype == torch.bfloat16 else fast_float32(device)


def fast_float32(device: torch.device) -> AbstractContextManager:
    """Within it linears without gradients multiply float32 by oneDNN, on a processor with AVX-512; else as always."""
    if device.type != "cpu" or torch.is_autocast_enabled("cpu") or not torch.cpu.get_capabilities().get("avx512_f"):
        return nullcontext()
    return _OneDNN() if hasattr(torch.ops.mkldnn, "_linear_pointwise") else nullcontext()


class _OneDNN(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is linear and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")):
            x, weight, bias = (*args, None)[:3]
            if x.dtype == weight.dtype == torch.float32 and not kwargs:
                return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return function(*args, **(kwargs or {}))


def dtype_of_products(x: torch.Tensor) -> torch.dtype:
    """What linears cast x to before they multiply: autocast's dtype, or x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
