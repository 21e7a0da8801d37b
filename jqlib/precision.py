"""The dtype of matrix products, where it may differ from the model's; norms, transforms, grids, losses keep theirs."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from jqlib.choices import ComputeDtype
from jqlib.product import fast_float32


def products_dtype(choice: ComputeDtype, device: str | torch.device) -> torch.dtype:
    """What ``choice`` means on a device; "auto": bfloat16 on GPUs and on processors that multiply it (AMX, AVX512)."""
    if choice != "auto":
        return getattr(torch, choice)
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    can = torch.cpu.get_capabilities()
    return torch.bfloat16 if can.get("amx_bf16") or can.get("avx512_bf16") else torch.float32


@contextmanager
def products_in(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Within it products are in bfloat16, if that is the dtype; else as the model has them, and fast."""
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16), fast_float32(device):
        yield


def dtype_of_products(x: torch.Tensor) -> torch.dtype:
    """What linears cast x to before they multiply: autocast's dtype, or x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
