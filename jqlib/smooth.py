"""Smoothing: moving the scale of an activation channel into the weights around it (SmoothQuant, eq. 4).

``o`` and ``down`` sites take their scales from the linear that produces them (v_proj, up_proj), so
smoothing is free and survives R1. At ``qkv`` and ``ug`` the scale goes into the norm's gamma: that is the
original SmoothQuant, a baseline for unrotated models.
"""

import torch
from torch import Tensor, nn

from jqlib.activations import Moments, collect_activations
from jqlib.models import begin, done, head_dim_of, site_targets, sites_of

FLOOR = 1e-5
MEASURES = ("max", "l2")


def compute_simple_smooth_scale(
    model: nn.Module,
    calib_data: Tensor,
    device: str | torch.device | None = None,
    alpha: float = 0.5,
    *,
    sites: tuple[str, ...] = ("o", "down"),
    measure: str = "max",
    moments: dict[str, Moments] | None = None,
) -> dict[str, Tensor]:
    """Scales s_j = max|X_j|^α / max|W_:j|^(1−α) of each site, floor 1e-5: ``{first reader's name: s}``.

    s has one entry an input channel of the site; at ``o`` one a channel of the kv heads, (kv heads · head_dim),
    taken over the query heads of a group. A channel that is always 0 keeps s = 1.
    ``measure="l2"`` has root sums of squares in the place of maxima. Then α = 0.5 is best in front of a Hadamard
    transform: it spreads both roundings' noise evenly, so that either costs ‖X S⁻¹‖² ‖W S‖² (Frobenius, S = diag s),
    and by Cauchy–Schwarz no S makes this less than (Σ_j ‖X_j‖ ‖W_:j‖)², which s_j² = ‖X_j‖ / ‖W_:j‖ reaches.
    ``moments``, when given, are used in place of a pass over ``calib_data``.

    Raises ValueError for α outside [0, 1] and an unknown measure.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure={measure!r} is unknown; there are {', '.join(MEASURES)}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"smooth_alpha={alpha}: alpha lies between 0 (weights only) and 1 (activations only)")
    if moments is None:
        moments = {}
        collect_activations(
            model, calib_data, site_targets(model, *sites), device, max_tokens=1, raw=True, moments=moments
        )
    scales = {}
    for name, (layer, site) in sites_of(model, *sites).items():
        readers = [model.get_submodule(f"{layer}.{reader}") for reader in site.readers]
        seen, weight = moments[name], torch.cat([r.weight.data for r in readers]).float().cpu()
        x, w = (seen.absmax, weight.abs().amax(0)) if measure == "max" else (seen.rms, weight.square().mean(0).sqrt())
        if site.source:  # o: the query heads of a group share the channels of their kv head
            channels = model.get_submodule(f"{layer}.{site.source}").out_features
            x, w = (_share(model, v, channels) for v in (x, w))
            x, w = ((v.amax(1) if measure == "max" else v.square().mean(1).sqrt()).flatten() for v in (x, w))
        scale = (x**alpha / w ** (1 - alpha)).clamp(min=FLOOR)
        scales[name] = scale.where((x > 0) & (w > 0), 1.0)
    return scales


def apply_smoothing(model: nn.Module, scales: dict[str, Tensor]) -> None:
    """Divide the producers of each site by its scales, multiply the readers' columns: logits stay what they were."""
    begin(model, "smoothed")
    _check_scales(model, scales)
    for name, (layer, site) in sites_of(model).items():
        if name not in scales:
            continue
        producer = model.get_submodule(f"{layer}.{site.norm or site.source}")
        scale = scales[name].double().to(producer.weight.device)
        rows = scale if producer.weight.ndim == 1 else scale[:, None]
        producer.weight.data = (producer.weight.double() / rows).to(producer.weight.dtype)
        if getattr(producer, "bias", None) is not None:
            producer.bias.data = (producer.bias.double() / scale).to(producer.bias.dtype)
        for reader in site.readers:
            linear = model.get_submodule(f"{layer}.{reader}")
            columns = expand_to_heads(model, scale, linear.in_features)
            linear.weight.data = (linear.weight.double() * columns).to(linear.weight.dtype)
    done(model).add("smoothed")


def _check_scales(model: nn.Module, scales: dict[str, Tensor]) -> None:
    sites = sites_of(model)
    for name, scale in scales.items():
        if name not in sites:
            raise ValueError(f"smoothing scales name {name!r}; expected names such as {next(iter(sites))!r}")
        layer, site = sites[name]
        if site.norm and "fused" in done(model):
            raise ValueError(f"scales of {name} belong into a norm, and this model's norms are fused: smooth it before")
        channels = len(model.get_submodule(f"{layer}.{site.norm or site.source}").weight)
        check_positive(f"scales of {name}", scale, channels)


def check_positive(what: str, scale: Tensor, channels: int) -> None:
    """Raise ValueError unless ``scale`` is (channels,) of finite positive numbers."""
    if scale.shape != (channels,) or not (torch.isfinite(scale) & (scale > 0)).all():
        got = f"shape {tuple(scale.shape)}, values from {scale.min():.3g} to {scale.max():.3g}"
        raise ValueError(f"{what}: expected {channels} positive numbers, got {got}")


def _share(model: nn.Module, values: Tensor, channels: int) -> Tensor:
    """(features,) as (kv heads, query heads of the group, head_dim); where nothing is shared the middle is 1."""
    if len(values) == channels:
        return values.view(-1, 1, 1)
    d = head_dim_of(model)
    return values.view(channels // d, -1, d)


def expand_to_heads(model: nn.Module, scale: Tensor, features: int) -> Tensor:
    """Scales of the kv channels repeated for the query heads of each group: (features,)."""
    d = head_dim_of(model)
    if len(scale) == features:
        return scale
    return scale.view(-1, 1, d).expand(-1, features // len(scale), d).flatten()
