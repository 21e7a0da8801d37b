"""Parts of transforms that don't fit a model are named, with what was expected, before anything is merged."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from jqlib.model.families import head_dim_of, norms_of, site_targets, sites_of
from jqlib.transform.orthogonal import orthogonality_error
from jqlib.transform.transform import Transform


def check_rotations(model: nn.Module, R1: Tensor | None, R2: dict[str, Tensor]) -> None:
    config, d = model.config, head_dim_of(model)
    expected = {"R1": (R1, (config.hidden_size, config.hidden_size))} if R1 is not None else {}
    names = site_targets(model, "o")
    for name, heads in R2.items():
        if name not in names:
            raise ValueError(f"R2 names {name!r}; expected names such as {names[0]!r}")
        expected[f"R2 of {name}"] = (heads, (config.num_key_value_heads, d, d))
    for what, (matrix, shape) in expected.items():
        if tuple(matrix.shape) != shape:
            raise ValueError(f"{what} has shape {tuple(matrix.shape)}, expected {shape}")
        if not (error := orthogonality_error(matrix.double())) < 1e-4:
            raise ValueError(f"{what} is not orthogonal: the largest entry of |RᵀR − I| is {error:.2g}")


def check_norm_scale(model: nn.Module, R1: Tensor | None, norm_scale: dict[str, Tensor]) -> None:
    if norm_scale and R1 is None:
        raise ValueError("norm_scale acts behind R1: give R1 too")
    names = list(norms_of(model))
    for name, scale in norm_scale.items():
        if name not in names:
            raise ValueError(f"norm_scale names {name!r}; expected names such as {names[0]!r}")
        _check_positive(f"norm_scale of {name}", scale, model.config.hidden_size)


def check_smooth_scale(model: nn.Module, scales: dict[str, Tensor], fused: bool) -> None:
    sites = sites_of(model)
    for name, scale in scales.items():
        if name not in sites:
            raise ValueError(f"smoothing scales name {name!r}; expected names such as {next(iter(sites))!r}")
        place = sites[name]
        if place.norm is not None and fused:
            raise ValueError(f"scales of {name} belong into a norm, and this model's norms are fused")
        _check_positive(f"scales of {name}", scale, len((place.norm or place.source).weight))


def check_choice_of_sites(model: nn.Module, R1: Tensor | None, R2: dict[str, Tensor], online: tuple[str, ...]) -> None:
    """A site has one rotation: a Hadamard transform online, or one that is merged."""
    for name, place in sites_of(model, *online).items() if online else ():
        if name in R2 or (place.norm is not None and R1 is not None):
            merged = "R2" if name in R2 else "R1"
            raise ValueError(f"site {place.kind!r} would have two rotations: {merged} and a Hadamard transform online")


def check_stream(behind_norms: Sequence[Transform]) -> None:
    """The residual stream is turned for all its readers or for none."""
    merged = {None if transform.online else transform.rotation for transform in behind_norms}
    if len(merged) > 1:
        raise ValueError(
            "the sites behind norms read one residual stream: all of them need the same R1, or none has one"
        )


def _check_positive(what: str, scale: Tensor, channels: int) -> None:
    if scale.shape != (channels,) or not (torch.isfinite(scale) & (scale > 0)).all():
        got = f"shape {tuple(scale.shape)}, values from {scale.min():.3g} to {scale.max():.3g}"
        raise ValueError(f"{what}: expected {channels} positive numbers, got {got}")
