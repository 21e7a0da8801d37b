"""Smoothing: moving the scale of an activation channel into the weights around it (SmoothQuant, eq. 4).

``o`` and ``down`` sites take their scales from the linear that produces them (v_proj, up_proj), so
smoothing is free and survives R1. At ``qkv`` and ``ug`` the scale goes into the norm's gamma: that is the
original SmoothQuant, a baseline for unrotated models. `jqlib.transform.build.rotate_model` applies them.
"""

import torch
from torch import Tensor, nn

from jqlib.choices import Measure, check_choice
from jqlib.learn.activations import Moments, collect_activations
from jqlib.model.families import head_dim_of, site_targets, sites_of
from jqlib.model.stream import each_layer

FLOOR = 1e-5


def compute_simple_smooth_scale(
    model: nn.Module,
    calib_data: Tensor,
    device: str | torch.device | None = None,
    alpha: float = 0.5,
    *,
    sites: tuple[str, ...] = ("o", "down"),
    measure: Measure = "max",
    moments: dict[str, Moments] | None = None,
) -> dict[str, Tensor]:
    """Scales s_j = max|X_j|^α / max|W_:j|^(1−α) of each site, floor 1e-5: ``{site: s}``.

    s has one entry per input channel of the site; at ``o`` one per channel of the kv heads, (kv heads · head_dim),
    taken over the query heads of a group. A channel that is always 0 keeps s = 1.
    ``measure="l2"`` has root means of squares in the place of maxima. Then α = 0.5 is best in front of a Hadamard
    transform: it spreads both roundings' noise evenly, so that either costs ‖X S⁻¹‖² ‖W S‖² (Frobenius, S = diag s),
    and by Cauchy–Schwarz no S makes this less than (Σ_j ‖X_j‖ ‖W_:j‖)², which s_j² ∝ ‖X_j‖ / ‖W_:j‖ reaches.
    ``moments``, if given, are used in place of a pass over ``calib_data``.

    Raises ValueError for α outside [0, 1] and an unknown measure.
    """
    check_choice("measure", measure, Measure)
    if not 0 <= alpha <= 1:
        raise ValueError(f"smooth_alpha={alpha}: alpha lies between 0 (weights only) and 1 (activations only)")
    if moments is None:
        moments = {}
        targets = site_targets(model, *sites)
        collect_activations(model, calib_data, targets, device, max_tokens=1, raw=True, moments=moments)
    scales, weights = {}, column_sizes(model, sites, measure)
    for name, place in sites_of(model, *sites).items():
        x, w = moments[name].absmax if measure == "max" else moments[name].rms, weights[name]
        if place.source is not None:  # o: the query heads of a group share the channels of their kv head
            x, w = (_shared(v, place.source.out_features, head_dim_of(model)) for v in (x, w))
            x, w = ((v.amax(1) if measure == "max" else v.square().mean(1).sqrt()).flatten() for v in (x, w))
        scale = (x**alpha / w ** (1 - alpha)).clamp(min=FLOOR)
        scales[name] = scale.where((x > 0) & (w > 0), 1.0)
    return scales


def column_sizes(model: nn.Module, sites: tuple[str, ...], measure: Measure = "max") -> dict[str, Tensor]:
    """How large the readers' weights of each site are, by input channel, (width,), on the CPU: the largest |w|, or by
    "l2" the root mean square.
    """
    found = {}
    for places in each_layer(model, *sites):
        for place in places:
            weight = place.weight.float().cpu()
            found[place.name] = weight.abs().amax(0) if measure == "max" else weight.square().mean(0).sqrt()
    return found


def _shared(values: Tensor, channels: int, d: int) -> Tensor:
    """(features,) as (kv heads, query heads of the group, head_dim); if nothing is shared the middle is 1."""
    return values.view(-1, 1, 1) if len(values) == channels else values.view(channels // d, -1, d)
