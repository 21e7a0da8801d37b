"""What notebooks 02 and 03 measure on a few windows is what a model built for it does."""

import pytest
import torch

from jqlib import fuse_layer_norms, rotate_model, site_targets
from jqlib.lab.divergence import divergence, keys_and_values, measured, predicted, reference_of, round_cache
from jqlib.model.families import attentions_of, norms_of, sites_of
from jqlib.quant.quantize import set_grid
from jqlib.transform.build import transforms_of
from jqlib.transform.grids import quantize_activation
from jqlib.transform.hadamard import hadamard_transform, random_hadamard
from jqlib.transform.transform import Grid

HIDDEN = 48


def of_sites(model, bits: int):
    grids = dict.fromkeys(norms_of(model), Grid(bits))
    transforms = transforms_of(model, random_hadamard(HIDDEN, 1), grids=grids)
    return {name: transforms[name] for name in norms_of(model)}


def test_a_site_rounded_alone_is_that_of_a_rotated_model(tiny_model, tokens):
    model, windows = tiny_model(), tokens(2, 32)
    reference, name = reference_of(model, windows), site_targets(model, "ug")[0]
    before = model(windows).logits
    found = measured(model, {name: of_sites(model, 4)[name]}, windows, reference)
    torch.testing.assert_close(model(windows).logits, before, rtol=0, atol=0)  # it was given back as it was
    assert not hasattr(sites_of(model)[name].host, "transform")
    rotated = tiny_model()
    fuse_layer_norms(rotated)
    rotate_model(rotated, random_hadamard(HIDDEN, 1), r4=False)
    set_grid(rotated, sites_of(rotated)[name], Grid(4))
    expected = model(windows).logits[:, :-1].double().log_softmax(-1)
    logits = rotated(windows).logits[:, :-1].double().log_softmax(-1)
    assert found == pytest.approx((expected.exp() * (expected - logits)).sum(-1).mean().item(), rel=1e-3)
    assert found > 1e-4


def test_small_noise_costs_what_is_predicted(tiny_model, tokens):
    model, windows = tiny_model(), tokens(32, 64)
    transforms = of_sites(model, 7)
    table = predicted(model, {"Hadamard": transforms}, windows)
    assert list(table.site) == list(transforms)
    assert list(table.kind) == ["qkv", "ug"] * 2
    reference = reference_of(model, windows)
    found = [measured(model, {name: transforms[name]}, windows, reference) for name in transforms]
    assert list(table.predicted) == pytest.approx(found, rel=0.25)


def test_the_first_tokens_part(tiny_model, tokens):
    """Of windows of one token it is all; of longer ones what the first tokens cost, shared by all."""
    model = tiny_model()
    short = predicted(model, {"a": of_sites(model, 4)}, tokens(16, 1))
    assert list(short["first"]) == pytest.approx(list(short.predicted))
    assert list(short.first_error) == pytest.approx(list(short.error))
    longer = predicted(model, {"a": of_sites(model, 4)}, tokens(16, 8))
    assert (longer["first"] < longer.predicted).all()
    assert longer["first"].sum() == pytest.approx(longer.predicted.sum() / 8, rel=0.8)


def test_keys_and_values_are_those_of_transformers_cache(tiny_model, tokens):
    model, windows = tiny_model(), tokens(2, 16)
    cache = model(windows, use_cache=True).past_key_values
    keys, values = keys_and_values(model, windows)
    assert keys.shape == values.shape == (2, 2, 2 * 16, 8)  # layers, kv heads, tokens, head_dim
    for i, layer in enumerate(cache.layers):
        torch.testing.assert_close(keys[i], torch.cat([*layer.keys], 1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(values[i], torch.cat([*layer.values], 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("r3", [True, False])
def test_keys_are_rounded_with_r3_or_as_they_are(tiny_model, tokens, r3):
    model, windows = tiny_model(), tokens(1, 16)
    reference = reference_of(model, windows)
    round_cache(model, 4, r3=r3)
    x = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    keys, values = attentions_of(model)[0].kv_grid(x, x)
    turned = quantize_activation(hadamard_transform(x), 4)
    expected = hadamard_transform(turned, inverse=True) if r3 else quantize_activation(x, 4)
    torch.testing.assert_close(keys, expected)
    torch.testing.assert_close(values, quantize_activation(x, 4))
    assert divergence(model, windows, reference) > 0
