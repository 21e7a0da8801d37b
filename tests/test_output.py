"""R1 and norm scales by what rounding costs the loss: the cost predicts what rounding does, the stage lowers it."""

import pytest
import torch

from jqlib import collect_activations, fuse_layer_norms, rotate_model, site_targets
from jqlib.learn import steps
from jqlib.learn.fisher import _labels, cost, gathered_start, inputs_and_gradients, train_r1_output
from jqlib.learn.steps import Steps
from jqlib.transform.build import transforms_of
from jqlib.transform.grids import quantize_activation
from jqlib.transform.hadamard import random_hadamard
from jqlib.transform.orthogonal import orthogonality_error
from jqlib.transform.transform import Grid, Rotation, Transform

HIDDEN = 48


def test_the_cost_is_what_the_loss_feels_of_rounding():
    """½ E (hδ)² measured with the real quantiser; tokens whose grid is wide have large gradients here."""
    generator = torch.Generator().manual_seed(0)
    size = torch.linspace(0.2, 3, 20_000)[:, None]
    x = size * torch.randn(20_000, HIDDEN, generator=generator)
    h = size * torch.randn(20_000, HIDDEN, generator=generator)
    R, scale = random_hadamard(HIDDEN, 1), torch.linspace(0.5, 2, HIDDEN)
    z = x @ R * scale
    delta = (quantize_activation(z, 6) - z) / scale @ R.T
    measured = (h * delta).sum(1).square().mean() / 2
    transform = Transform(rotation=Rotation(R), gain=scale, grid=Grid(6))
    assert cost(transform, x, h, 16, 16).item() == pytest.approx(measured.item(), rel=0.05)


def test_weights_cost_what_noise_of_a_groups_energy_costs():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(20_000, HIDDEN, generator=generator), torch.randn(96, HIDDEN, generator=generator)
    g = torch.rand(96, generator=generator) * torch.randn(20_000, 96, generator=generator)
    R, scale = random_hadamard(HIDDEN, 1), torch.linspace(0.5, 2, HIDDEN)
    groups = (weight @ R / scale).view(96, -1, 16)
    size = (0.006 * groups.square().mean(-1, keepdim=True)).sqrt().expand_as(groups).reshape(96, HIDDEN)
    delta = x @ R * scale @ (size * torch.randn(96, HIDDEN, generator=generator)).T
    measured = (g * delta).sum(1).square().mean() / 2
    transform = Transform(rotation=Rotation(R), gain=scale, grid=Grid(16))
    assert cost(transform, x, g @ weight, 4, 16).item() == pytest.approx(measured.item(), rel=0.1)


def test_logits_that_are_not_finite_are_named(tiny_model, tokens):
    model = tiny_model()
    model.model.norm.weight.data[0] = torch.inf
    with pytest.raises(FloatingPointError, match="NaN or Inf in the model's logits: try --dtype float32"):
        train_r1_output(model, tokens(1, 64), steps=Steps(1))


def test_gradients_predict_the_divergence_that_small_noise_makes(tiny_model, tokens):
    """KL after noise of known size on what a site reads, against ½ size² E ‖h‖²."""
    model, windows = tiny_model(), tokens(16, 64)
    fuse_layer_norms(model)
    x, h = inputs_and_gradients(model, windows, torch.rand(windows.shape))[site_targets(model, "qkv")[1]]
    assert x.shape == h.shape == (16 * 64, HIDDEN)
    norm = model.model.layers[1].input_layernorm
    generator, size = torch.Generator().manual_seed(0), 1e-2
    reference = model(windows).logits.double().log_softmax(-1)
    handle = norm.register_forward_hook(lambda m, a, y: y + size * torch.randn(y.shape, generator=generator))
    noisy = torch.stack([model(windows).logits.double().log_softmax(-1) for _ in range(8)])
    handle.remove()
    measured = (reference.exp() * (reference - noisy)).sum(-1).mean().item()
    assert measured == pytest.approx(size**2 * h.square().sum(1).mean().item() / 2, rel=0.15)


def test_labels_are_drawn_by_their_probabilities():
    p = torch.tensor([0.5, 0.0, 0.25, 0.1, 0.15])
    draw = lambda seed: _labels(p.expand(50_000, 5), torch.rand(50_000, generator=torch.Generator().manual_seed(seed)))  # noqa: E731
    drawn = draw(3)
    torch.testing.assert_close(drawn.bincount(minlength=5) / 50_000, p, rtol=0, atol=0.01)
    assert not torch.equal(drawn, draw(4))


def test_a_distribution_of_nan_breaks_nothing():
    assert _labels(torch.full((3, 5), torch.nan), torch.rand(3)).max() < 5


def test_inputs_are_what_is_collected(tiny_model, tokens):
    model, ids = tiny_model(), tokens(1, 32)
    wanted = collect_activations(model, ids, site_targets(model, "qkv", "ug"), max_tokens=None)
    fuse_layer_norms(model)
    for name, (x, _) in inputs_and_gradients(model, ids, torch.rand(ids.shape)).items():
        torch.testing.assert_close(x, wanted.pop(name), rtol=1e-4, atol=1e-5)
    assert not wanted


def test_the_start_gathers_channels_of_like_gain(tiny_model):
    model = tiny_model()
    small = torch.arange(0, HIDDEN, 2)
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data.fill_(2.0)[small] = 0.5
    R, scales = gathered_start(model)
    assert orthogonality_error(R) < 1e-5
    assert set(scales) == set(site_targets(model, "qkv", "ug"))
    for scale in scales.values():  # one block of 48: one scale, the geometric mean
        torch.testing.assert_close(scale, torch.ones(HIDDEN))


def total(model, windows, R, scales) -> float:
    transforms = transforms_of(model, R, norm_scale=scales, grids=dict.fromkeys(scales, Grid(4, 0.9)))
    found = inputs_and_gradients(model, windows, torch.rand(windows.shape, generator=torch.Generator().manual_seed(0)))
    return sum(cost(transforms[name], *xh, 4, 128).item() for name, xh in found.items())


def test_it_lowers_the_cost_and_the_model_computes_what_it_did(tiny_model, tokens):
    model, windows = tiny_model(), tokens(8, 64)
    R, scales = train_r1_output(model, windows, steps=Steps(60))
    assert total(model, windows, R, scales) < 0.9 * total(model, windows, *gathered_start(model))
    assert orthogonality_error(R) < 1e-5
    before = model(windows[:1]).logits
    fuse_layer_norms(model)
    rotate_model(model, R, norm_scale=scales)
    torch.testing.assert_close(model(windows[:1]).logits, before, rtol=1e-3, atol=1e-3)


def test_an_interrupted_one_goes_on_as_if_nothing_had_been(tiny_model, tokens, monkeypatch):
    monkeypatch.setattr(steps, "KEEP_EVERY", 2)
    arguments, kept = (tiny_model(), tokens(4, 64)), []
    keep = lambda state: kept.append({k: v.clone() for k, v in state.items()})  # noqa: E731
    whole = train_r1_output(*arguments, steps=Steps(5, keep=keep))
    resumed = train_r1_output(*arguments, steps=Steps(5, keep=keep, resume=kept[0]))
    assert [int(state["step"]) for state in kept] == [2, 4, 4]  # the second time from step 2 on
    torch.testing.assert_close(resumed[0], whole[0], rtol=0, atol=0)
    assert all(torch.equal(scale, resumed[1][name]) for name, scale in whole[1].items())


def test_the_model_is_left_as_it_was(tiny_model, tokens):
    model, windows = tiny_model(), tokens(2, 64)
    weights, expected = {name: p.clone() for name, p in model.state_dict().items()}, model(windows).logits
    train_r1_output(model, windows, steps=Steps(2))
    assert torch.equal(model(windows).logits, expected)
    assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())
