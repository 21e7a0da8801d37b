"""The KV cache on its grid: scores by hand, generation token by token, fewer bits more error."""

import inspect

import pytest
import torch
from transformers import DynamicCache

from jqlib.model.families import head_dim_of
from jqlib.quant.kv_cache import KVGrid, RoundingCache
from jqlib.quant.quantize import quantize_model
from jqlib.transform.hadamard import hadamard_matrix


@pytest.mark.parametrize("d", [8, 12, 64])
def test_scores_are_those_of_rotated_queries_and_rounded_rotated_keys(d):
    """q · R3 Q(k R3)ᵀ … is (q R3) · Q(k R3), R3 being any Hadamard matrix, symmetric or not (d = 12 is not)."""
    R3, generator = hadamard_matrix(d) / d**0.5, torch.Generator().manual_seed(d)
    q, k, v = torch.randn(3, 1, 2, 5, d, generator=generator)
    k[..., 0] *= 30  # an outlier channel
    keys, values = RoundingCache(None, KVGrid(d, 4)).update(k, v, 0)

    def by_hand(x):
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / 15
        zero = torch.round(-low / scale)
        return (torch.clamp(torch.round(x / scale) + zero, 0, 15) - zero) * scale

    torch.testing.assert_close(q @ keys.mT, (q @ R3) @ by_hand(k @ R3).mT, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(values, by_hand(v))


def test_token_by_token_is_the_whole_at_once(tiny_model, tokens):
    model, batch = tiny_model(), tokens()[:1]
    quantize_model(model, 16, 16, kv_bits=4)
    with torch.inference_mode():
        whole = model(batch, use_cache=False).logits
        cache = DynamicCache()
        name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        parts = [model(batch[:, [i]], **{name: cache}).logits for i in range(batch.shape[1])]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-3, atol=1e-4)
    for layer in cache.layers:  # what is kept is on the grid: 16 values a token and head
        assert max(len(row.unique()) for row in layer.values.view(-1, head_dim_of(model))) <= 16


def test_fewer_bits_are_further_away(tiny_model, tokens):
    batch = tokens()
    with torch.inference_mode():
        expected = tiny_model()(batch).logits
        errors = {}
        for bits in (2, 4, 8, 16):
            model = tiny_model()
            quantize_model(model, 16, 16, kv_bits=bits)
            errors[bits] = (model(batch).logits - expected).norm().item()
    assert errors[16] == 0
    assert 0 < errors[8] < errors[4] < errors[2]


def test_bad_bits_are_refused(tiny_model):
    with pytest.raises(ValueError, match="kv_bits=1: bits are whole numbers from 2 to 16"):
        quantize_model(tiny_model(), kv_bits=1)
