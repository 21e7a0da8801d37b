"""Orthogonal matrices: the nearest one, a turned one, and how far one is from it. All take (..., n, n)."""

import contextlib

import torch
from torch import Tensor


def polar(M: Tensor) -> Tensor:
    """The orthogonal polar factor of M: the rotation nearest to it."""
    R = torch.full_like(M, torch.nan)
    with contextlib.suppress(torch.linalg.LinAlgError):
        U, _, Vh = torch.linalg.svd(M)
        R = U @ Vh
    if not orthogonality_error(R) < 1e-3:  # float32 can fail on ill-conditioned data
        U, _, Vh = torch.linalg.svd(M.double())
        R = (U @ Vh).to(M)
    return 1.5 * R - 0.5 * R @ (R.mT @ R)  # one Newton–Schulz step takes what rounding left


def nearby_polar(M: Tensor) -> Tensor:
    """`polar` for an M that is not far from a rotation, by Newton–Schulz: products only."""
    bound = (M.mT @ M).abs().sum(-1).amax(-1).sqrt()  # of the largest singular value; scaling keeps the polar factor
    R, eye = M / bound[..., None, None], torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    for _ in range(15):
        gram = R.mT @ R
        R = 1.5 * R - 0.5 * R @ gram
        if (gram - eye).abs().max() < 1e-4:  # the step just taken squares it
            return R
    return polar(M)


def turned(R: Tensor, generator: Tensor) -> Tensor:
    """R turned by the Cayley transform of a generator's skew part: a rotation again."""
    skew, eye = (generator - generator.mT) / 2, torch.eye(R.shape[-1], device=R.device)
    return torch.linalg.solve(eye + skew, (eye - skew) @ R)


def orthogonality_error(R: Tensor) -> float:
    """The largest entry of \\|RᵀR − I\\|."""
    return (R.mT @ R - torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)).abs().max().item()
