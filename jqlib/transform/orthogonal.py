"""Orthogonal matrices: the nearest one, a turned one, and how far one is from it. All take (..., n, n)."""

import torch
from torch import Tensor

from jqlib.product import product


def polar(M: Tensor) -> Tensor:
    """The orthogonal polar factor of M: the rotation nearest to it."""
    R = by_inverses(M) if M.is_cuda else by_svd(M)
    if not orthogonality_error(R) < 1e-3:  # both can fail on ill-conditioned data
        R = by_svd(M.double()).to(M)
    return 1.5 * R - 0.5 * product(R, product(R.mT, R))  # one Newton–Schulz step takes what rounding left


def by_svd(M: Tensor) -> Tensor:
    """`polar`; NaN where the decomposition fails."""
    try:
        U, _, Vh = torch.linalg.svd(M)
    except torch.linalg.LinAlgError:
        return torch.full_like(M, torch.nan)
    return product(U, Vh)


def by_inverses(M: Tensor) -> Tensor:
    """`polar` by Newton's iteration in float64 (Higham 1986), scaled by norms: on a GPU far faster than an SVD.

    NaN, or no rotation, where M is singular.
    """
    R = M.double()
    for _ in range(12):
        dual = torch.linalg.inv_ex(R).inverse.mT
        scale = (dual.norm(dim=(-2, -1), keepdim=True) / R.norm(dim=(-2, -1), keepdim=True)).sqrt()
        R = (R * scale + dual / scale) / 2
    return R.to(M)


def nearby_polar(M: Tensor) -> Tensor:
    """`polar` for an M that is not far from a rotation, by Newton–Schulz: products only. Scaling keeps the factor."""
    bound = product(M.mT, M).abs().sum(-1).amax(-1).sqrt()  # of the largest singular value
    R, eye = M / bound[..., None, None], torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    for _ in range(15):
        gram = product(R.mT, R)
        R = 1.5 * R - 0.5 * product(R, gram)
        if (gram - eye).abs().max() < 1e-4:  # the step just taken squares it
            return R
    return polar(M)


def turned(R: Tensor, generator: Tensor) -> Tensor:
    """R turned by the Cayley transform of a generator's skew part: a rotation again."""
    skew, eye = (generator - generator.mT) / 2, torch.eye(R.shape[-1], device=R.device)
    return torch.linalg.solve_ex(eye + skew, (eye - skew) @ R).result  # never singular


def orthogonality_error(R: Tensor) -> float:
    """The largest entry of \\|RᵀR − I\\|."""
    return (product(R.mT, R) - torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)).abs().max().item()
