"""The table of losses a rotation can minimise. Each is a value per token and its derivative.

``y`` is a rotated activation (…, tokens, n). An objective returns the value of each token (…, tokens)
and the derivative of that value with respect to y (…, tokens, n).
"""

from collections.abc import Callable

import torch
from torch import Tensor


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


Objective = Callable[[Tensor], tuple[Tensor, Tensor]]
OBJECTIVES: dict[str, Objective] = {"whip": whip, "range": range_, "kurtosis": kurtosis}


def get_objective(name: str) -> Objective:
    """The objective of that name. Raises ValueError, listing those there are."""
    if name not in OBJECTIVES:
        raise ValueError(f"objective {name!r} is unknown; there are {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def mean_loss(X: Tensor, R: Tensor, objective: Objective, chunk: int = 4096) -> tuple[Tensor, Tensor]:
    """Mean over tokens of an objective of XR, (B,) float64, and its gradient in R, (B, n, n).

    ``X``: (B, tokens, n); ``R``: (B, n, n): B independent problems (one for R1, a head each for R2).
    """
    loss = torch.zeros(len(X), dtype=torch.float64, device=X.device)
    gradient = torch.zeros_like(R)
    for x in X.split(chunk, dim=1):
        value, slope = objective(x @ R)
        loss += value.sum(-1).double()
        gradient.baddbmm_(x.mT, slope)
    return loss / X.shape[1], gradient / X.shape[1]
