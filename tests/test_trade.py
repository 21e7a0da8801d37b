"""Both roundings' errors at a site's output: against plain matrices, and by the law of a Hadamard transform."""

import pytest
import torch

from jqlib import collect_activations, site_targets
from jqlib.quant.trade import site_errors, trade
from jqlib.transform.build import transforms_of
from jqlib.transform.grids import quantize_activation, quantize_weight
from jqlib.transform.transform import Grid, Hadamard, Transform

G = torch.Generator().manual_seed(0)


def test_against_plain_matrices():
    x, W, s = torch.randn(20, 32, generator=G), torch.randn(12, 32, generator=G), torch.rand(32, generator=G) + 0.5
    errors = site_errors(x, W, Transform(s, grid=Grid(4)), 4, 16)
    z, V = x / s, W * s
    whole = (x @ W.T).square().sum()
    off_z, off_v = quantize_activation(z) - z, quantize_weight(V, 4, 16) - V
    assert errors["activations"] == pytest.approx(((off_z @ V.T).square().sum() / whole).item(), rel=1e-4)
    assert errors["weights"] == pytest.approx(((z @ off_v.T).square().sum() / whole).item(), rel=1e-4)
    assert errors["weights themselves"] == pytest.approx((off_v.norm() / V.norm()).item() ** 2, rel=1e-4)


def test_behind_a_hadamard_transform_both_go_as_one_product():
    """‖X S⁻¹‖² ‖W S‖², least for s² = ‖X_j‖ / ‖W_j‖."""
    n = 512
    x = torch.randn(400, n, generator=G) * torch.logspace(-1, 1, n)
    W = torch.randn(64, n, generator=G) * torch.rand(n, generator=G)
    a, b = x.norm(dim=0), W.norm(dim=0)
    plain = torch.ones(n)
    whole = (a.square().sum() * b.square().sum()).sqrt() / (a @ b)
    settings = {"none": plain, "best": (a / b).sqrt(), "too much": a / b}
    errors = {k: site_errors(x, W, Transform(s, Hadamard(n), grid=Grid(4)), 4, n) for k, s in settings.items()}
    for side in ("activations", "weights"):
        for name, s in settings.items():
            product = ((a / s).square().sum() * (b * s).square().sum() / (a.square().sum() * b.square().sum())).item()
            assert errors[name][side] / errors["none"][side] == pytest.approx(product, rel=0.15)
        assert errors["best"][side] == min(found[side] for found in errors.values())
    assert whole > 1.2  # there was something to gain


def test_every_site_that_was_seen_under_every_setting(tiny_model, tokens):
    model = tiny_model()
    names = site_targets(model, "o", "down")
    inputs = collect_activations(model, tokens(), names, raw=True)
    grids = {name: Grid(4) for name in names}
    settings = {"off": transforms_of(model, grids=grids), "again": transforms_of(model, grids=grids)}
    found = trade(model, {name: inputs[name] for name in names[:3]}, settings, 4, 16)
    assert [(row["kind"], row["layer"], row["setting"]) for row in found] == [
        (kind, layer, setting) for kind, layer in (("o", 0), ("down", 0), ("o", 1)) for setting in settings
    ]
    assert all(0 < row["activations"] < 1 and 0 < row["weights"] < 1 for row in found)
