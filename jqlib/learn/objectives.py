"""The table of losses a rotation can minimise. Each is a value per token and its derivative.

``y`` is a rotated activation (…, tokens, n). An objective returns the value of each token (…, tokens)
and the derivative of that value with respect to y (…, tokens, n).
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, distributed

from jqlib.choices import Objective
from jqlib.product import product
from jqlib.transform.grids import asymmetric_codes

P = 8  # of the objective lp
BITS = 4  # of the objective quant_error
CHUNK = 1024  # tokens that are rotated at a time: a processor's cache holds what is made of them


def whip(y: Tensor) -> tuple[Tensor, Tensor]:
    """Σ exp(−|y_j|) (DartQuant, eq. 5): small values are pushed outwards, so the large ones must give way."""
    e = torch.exp(-y.abs())
    return e.sum(-1), -torch.copysign(e, y)


def range_(y: Tensor) -> tuple[Tensor, Tensor]:
    """(max − min)²: what the error of per-token asymmetric rounding is proportional to."""
    high, low = y.max(-1, keepdim=True), y.min(-1, keepdim=True)
    width = high.values - low.values
    slope = torch.zeros_like(y).scatter_(-1, high.indices, 2 * width)
    return (width * width).squeeze(-1), slope.scatter_add_(-1, low.indices, -2 * width)


def kurtosis(y: Tensor) -> tuple[Tensor, Tensor]:
    """Σ y⁴; for a given norm it orders tokens as their kurtosis does."""
    cube = y**3
    return (cube * y).sum(-1), 4 * cube


def lp(y: Tensor) -> tuple[Tensor, Tensor]:
    """‖y‖_p² with p = 8: a smooth stand-in for the largest entry."""
    top = y.abs().amax(-1, keepdim=True)
    share = y / top.where(top > 0, 1.0)
    power = share ** (P - 2)
    total = (power * share * share).sum(-1, keepdim=True)
    norm = total.where(total > 0, 1.0) ** (2 / P)  # of y / top, in [1, n^(2/p)]
    return (top * top * norm).squeeze(-1), 2 * norm / total.where(total > 0, 1.0) * power * y


def quant_error(y: Tensor) -> tuple[Tensor, Tensor]:
    """‖Q(y) − y‖² at 4 bits, per token and asymmetric; the derivative holds the integer codes fixed."""
    codes, scale = asymmetric_codes(y, BITS)
    error = codes * scale - y
    per_scale = 2 * (error * codes).sum(-1, keepdim=True) / (2**BITS - 1)  # by the width of the token's range
    high, low = y.max(-1, keepdim=True), y.min(-1, keepdim=True)  # 0 is on the grid: it bounds one-signed tokens
    slope = (-2 * error).scatter_add_(-1, high.indices, per_scale * (high.values > 0))
    return error.square().sum(-1), slope.scatter_add_(-1, low.indices, -per_scale * (low.values < 0))


Loss = Callable[[Tensor], tuple[Tensor, Tensor]]
OBJECTIVES: dict[Objective, Loss] = {
    "whip": whip, "range": range_, "kurtosis": kurtosis, "lp": lp, "quant_error": quant_error,
}  # fmt: skip


def mean_loss(batches: Iterable[Tensor], R: Tensor, objective: Loss, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """Mean over tokens of an objective of XR, (B,) float64, and its gradient in R, (B, n, n).

    ``batches``: the tokens X in pieces (B, tokens, n); ``R``: (B, n, n): B independent problems (one for R1,
    a head each for R2). Under torch.distributed each rank gives its own tokens, and gets the mean over all.
    """
    loss = torch.zeros(len(R), dtype=torch.float64, device=R.device)
    gradient, count = torch.zeros_like(R), torch.zeros_like(loss)
    for x in _chunks(batches, chunk):
        value, slope = objective(product(x, R))
        loss += value.sum(-1).double()
        gradient += product(x.mT, slope)
        count += x.shape[1]
    over_ranks(loss, gradient, count)
    return loss / count, gradient / count[:, None, None].to(R.dtype)


def mean_value(batches: Iterable[Tensor], R: Tensor, objective: Loss, chunk: int = CHUNK) -> Tensor:
    """`mean_loss` without the gradient: (B,) float64."""
    loss = torch.zeros(len(R), dtype=torch.float64, device=R.device)
    count = torch.zeros_like(loss)
    for x in _chunks(batches, chunk):
        loss += objective(product(x, R))[0].sum(-1).double()
        count += x.shape[1]
    over_ranks(loss, count)
    return loss / count


def second_moment(batches: Iterable[Tensor], like: Tensor) -> Tensor:
    """XᵀX / tokens, shaped as ``like``: (B, n, n)."""
    gram, count = torch.zeros_like(like), torch.zeros(1, device=like.device)
    for x in batches:
        gram += product(x.mT, x)
        count += x.shape[1]
    over_ranks(gram, count)
    return gram / count


def over_ranks(*tensors: Tensor) -> None:
    """Sum in place over the processes of torch.distributed, if there are several."""
    if distributed.is_available() and distributed.is_initialized():
        for tensor in tensors:
            distributed.all_reduce(tensor)


def _chunks(batches, chunk: int):
    return (x for batch in batches for x in batch.tensor_split(max(1, -(-batch.shape[1] // chunk)), dim=1))
