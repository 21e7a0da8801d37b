"""What must hold for any sizes, bits and numbers, tried on many of them: the same ones each time."""

import math

import pytest
import torch
from conftest import make_tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_families import KINDS, config_of

from jqlib.model.data import Windows
from jqlib.model.evaluate import Reference, evaluate_windows, last_hidden
from jqlib.model.walk import Step
from jqlib.quant.gptq import gptq
from jqlib.transform.grids import (
    quantize_activation,
    quantize_weight,
    round_symmetric,
    rounding_error,
    spread,
    weight_scales,
)
from jqlib.transform.hadamard import block_order, random_hadamard, transform_operations
from jqlib.transform.orthogonal import by_inverses, by_svd, nearby_polar, orthogonality_error, polar, turned
from jqlib.transform.selfcheck import change_of_logits
from jqlib.transform.transform import Transform

SEEDS = st.integers(0, 2**31)
tried = settings(max_examples=60, deadline=None, derandomize=True)


def drawn(*shape: int, seed: int, power: int = 3) -> torch.Tensor:
    """Heavy tails, as activations have them, at power 3."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) ** power


@tried
@given(bits=st.integers(2, 8), n=st.integers(1, 70), seed=SEEDS, clip=st.sampled_from([1.0, 0.9, 0.5]))
def test_an_activation_inside_its_clipped_range_is_half_a_step_off_at_most(bits, n, seed, clip):
    x = drawn(4, n, seed=seed)
    low, high = x.amin(-1, keepdim=True).clamp(max=0) * clip, x.amax(-1, keepdim=True).clamp(min=0) * clip
    step = (high - low) / (2**bits - 1)
    rounded = quantize_activation(x, bits, clip)
    # the zero point is a whole number of steps: an end of the range may be half a step off it
    assert ((rounded - x.clamp(low, high)).abs() <= step * 1.0001 + 1e-6).all()
    inside = (x >= low + step / 2) & (x <= high - step / 2)
    assert ((rounded - x).abs()[inside] <= (step.expand_as(x)[inside] / 2) * 1.001 + 1e-6).all()


@tried
@given(bits=st.integers(2, 8), n=st.integers(1, 70), seed=SEEDS, clip=st.sampled_from([1.0, 0.9]))
def test_activations_know_neither_order_nor_unit_nor_their_neighbours(bits, n, seed, clip):
    x = drawn(4, n, seed=seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    rounded = quantize_activation(x, bits, clip)
    assert torch.equal(quantize_activation(x[:, order], bits, clip), rounded[:, order])
    assert torch.equal(quantize_activation(x * 8, bits, clip), rounded * 8)
    assert torch.equal(quantize_activation(x[1:2], bits, clip), rounded[1:2])


@tried
@given(bits=st.integers(2, 8), n=st.integers(1, 70), groupsize=st.integers(1, 40), seed=SEEDS)
def test_a_weight_on_its_grid_stays_there(bits, n, groupsize, seed):
    weight = drawn(3, n, seed=seed)
    scales = spread(weight_scales(weight, bits, groupsize), groupsize, weight)
    once = round_symmetric(weight, scales, bits)
    assert torch.equal(round_symmetric(once, scales, bits), once)
    top = 2 ** (bits - 1)
    inside = (weight / scales >= -top) & (weight / scales <= top - 1)
    assert ((once - weight).abs()[inside] <= scales.abs()[inside] / 2 * 1.0001).all()


@tried
@given(bits=st.integers(2, 8), n=st.integers(1, 70), groupsize=st.integers(1, 40), seed=SEEDS)
def test_weights_know_neither_their_rows_nor_their_unit(bits, n, groupsize, seed):
    weight = drawn(3, n, seed=seed, power=1)
    rounded = quantize_weight(weight, bits, groupsize)
    assert torch.equal(quantize_weight(weight.flip(0), bits, groupsize), rounded.flip(0))
    bound = 1e-2 * weight.abs().max()  # of a scale's own rounding to float16
    assert (quantize_weight(weight * 4, bits, groupsize) - 4 * rounded).abs().max() <= 4 * bound


@tried
@given(bits=st.integers(2, 8), rows=st.integers(1, 6), n=st.integers(1, 80), tokens=st.integers(1, 120),
       groupsize=st.integers(1, 48), seed=SEEDS, dead=st.booleans())  # fmt: skip
def test_gptq_is_never_worse_than_rtn_in_its_own_metric(bits, rows, n, tokens, groupsize, seed, dead):
    """Fewer tokens than channels, channels never seen, and sizes that no group or block divides, all alike."""
    weight, x = drawn(rows, n, seed=seed, power=1), drawn(tokens, n, seed=seed + 1)
    if dead:
        x[:, n // 2 :] = 0
    hessian = x.T @ x
    rounded = gptq(weight, hessian, bits, groupsize)[0]
    ours, rtn = (((q - weight).double() @ x.double().T).square().sum(1) for q in (
        rounded, quantize_weight(weight, bits, groupsize)))  # fmt: skip
    assert (ours <= rtn * 1.001 + 1e-6 * hessian.diagonal().amax()).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)), kv=st.integers(1, 3), group=st.integers(1, 4),
       layers=st.integers(1, 3), tied=st.booleans(), d=st.sampled_from([4, 8, 12, 16]))  # fmt: skip
def test_a_tiny_model_of_any_family_keeps_its_logits(data, kind, kv, group, layers, tied, d):
    wide = kind in ("llama", "mistral", "qwen3")  # heads that are not hidden / heads
    hidden = kv * group * (data.draw(st.sampled_from([4, 8, 12, 16])) if wide else d)
    sizes = {"hidden_size": hidden, "num_attention_heads": kv * group, "num_key_value_heads": kv, "vocab_size": 64,
             "num_hidden_layers": layers, "tie_word_embeddings": tied, "head_dim": d,
             "intermediate_size": data.draw(st.sampled_from([24, 40, 64, 96, 112]))}  # fmt: skip
    assert change_of_logits(config_of(kind, **sizes)) < 1e-4  # wrongly merged: above 1e-1


@settings(max_examples=8, deadline=None, derandomize=True)
@given(windows=st.integers(2, 5), seqlen=st.integers(2, 40), seed=SEEDS, cut=st.integers(1, 4))
def test_perplexity_adds_up_over_windows(tiny, tiny_other, windows, seqlen, seed, cut):
    ids = torch.randint(128, (windows, seqlen), generator=torch.Generator().manual_seed(seed))
    cut = min(cut, windows - 1)

    def of(part: slice):
        reference = Reference(last_hidden(tiny_other, ids[part]), tiny_other.lm_head.weight)
        return evaluate_windows(tiny, Windows(ids[part], list(range(len(ids[part])))), reference=reference)

    whole, first, last = of(slice(None)), of(slice(cut)), of(slice(cut, None))
    for name in ("nll", "kl", "top1"):
        parts = getattr(first, name) + getattr(last, name)
        torch.testing.assert_close(getattr(whole, name), parts, rtol=1e-5, atol=1e-6)
    nats = cut / windows * math.log(first) + (1 - cut / windows) * math.log(last)
    assert math.log(whole) == pytest.approx(nats, rel=1e-5)


@pytest.fixture(scope="module")
def tiny():
    return make_tiny_model()


@pytest.fixture(scope="module")
def tiny_other():
    return make_tiny_model(seed=1)


@tried
@given(n=st.integers(1, 24), seed=SEEDS, size=st.sampled_from([1e-3, 1.0, 1e3]))
def test_the_polar_factor_is_the_nearest_rotation(n, seed, size):
    M = size * torch.randn(2, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    R = polar(M)
    assert orthogonality_error(R) < 1e-9
    stretched = R.mT @ M  # symmetric and positive: what is left is no rotation
    torch.testing.assert_close(stretched, stretched.mT, rtol=1e-6, atol=1e-8 * size)
    assert (torch.linalg.eigvalsh(stretched) > -1e-8 * size).all()


@tried
@given(n=st.integers(1, 24), seed=SEEDS)
def test_turned_rotations_are_rotations_and_near_ones_are_found(n, seed):
    generator = torch.Generator().manual_seed(seed)
    R = polar(torch.randn(n, n, generator=generator))
    other = turned(R, 0.3 * torch.randn(n, n, generator=generator))
    assert orthogonality_error(other) < 1e-5
    moved = other + 0.05 * torch.randn(n, n, generator=generator) / n**0.5
    torch.testing.assert_close(nearby_polar(moved), polar(moved), rtol=1e-3, atol=1e-3)


@tried
@given(n=st.integers(1, 200), seed=SEEDS)
def test_a_random_hadamard_rotation_spreads_every_channel_evenly(n, seed):
    try:
        order = block_order(n)
    except ValueError:
        assert n % 2 == 1
        return
    R = random_hadamard(n, seed)
    assert orthogonality_error(R) < 1e-5
    assert torch.allclose(R.abs().amax(1), torch.full((n,), order**-0.5))


@tried
@given(n=st.integers(1, 24), seed=SEEDS, size=st.sampled_from([1e-3, 1.0, 1e3]))
def test_both_ways_to_the_polar_factor_agree(n, seed, size):
    """One is for a GPU. Singular values of 1 to 30."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(2, n, n, generator=generator, dtype=torch.double))[0] for _ in "UV")
    M = size * U * (1 + 29 * torch.rand(2, 1, n, generator=generator, dtype=torch.double)) @ V
    for found in (by_inverses(M), by_svd(M)):
        torch.testing.assert_close(found, U @ V, rtol=0, atol=1e-8)


@tried
@given(n=st.integers(2, 40), seed=SEEDS)
def test_a_channel_of_scale_zero_is_left_alone(n, seed):
    """It is one that is always zero; nothing may become infinite by it."""
    x, scale = drawn(3, n, seed=seed).double(), drawn(n, seed=seed + 1, power=1).double().exp()
    dead = torch.arange(n) % 2 == 1
    scale[dead] = 0
    transform = Transform(scale)
    z = transform.apply(x)
    assert torch.equal(z[:, dead], x[:, dead])
    torch.testing.assert_close(z[:, ~dead] * scale[~dead], x[:, ~dead])
    torch.testing.assert_close(transform.undo(z), x * ~dead)


@tried
@given(bits=st.integers(2, 8), n=st.integers(1, 40), seed=SEEDS)
def test_the_rounding_error_is_the_share_of_each_tokens_energy(bits, n, seed):
    x = drawn(5, n, seed=seed)
    lost = (quantize_activation(x, bits, 0.9) - x).double().square().sum(1) / x.double().square().sum(1)
    assert rounding_error(x, bits, 0.9) == pytest.approx(lost.mean().item(), rel=1e-4)
    assert rounding_error(x) == rounding_error(x, 4, 1.0)
    assert torch.equal(quantize_activation(x), quantize_activation(x, 4, 1.0))
    assert torch.equal(quantize_weight(x), quantize_weight(x, 4, 128))


@pytest.mark.parametrize(("n", "cost"), [(1, 1), (2, 2), (128, 128), (256, 130), (1024, 136), (96, 20), (576, 28)])
def test_what_a_fast_transform_costs(n, cost):
    """The sum of the orders of its factors, for each channel: 96 = 12 · 8, 576 = 12 · 12 · 4."""
    assert transform_operations(n) == n * cost


@pytest.mark.parametrize(("windows", "seqlen", "parts"), [(5, 1000, [2, 2, 1]), (3, 4000, [1, 1, 1]), (4, 100, [4])])
def test_windows_are_taken_so_many_together_as_are_about_2048_tokens(windows, seqlen, parts):
    step = Step("layer", torch.nn.Identity(), torch.arange(windows)[:, None, None].expand(-1, seqlen, 3).clone(), {})
    taken = [step.hidden[part][:, 0, 0].tolist() for part in step.parts()]
    assert [len(part) for part in taken] == parts
    assert [window for part in taken for window in part] == list(range(windows))
