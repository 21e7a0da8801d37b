import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jqlib.choices import FINEST
from jqlib.transform.grids import quantize_activation, quantize_weight, weight_scales

BITS = st.integers(2, 8)
SEEDS = st.integers(0, 2**31)


def random(*shape, seed: int = 0, heavy: bool = True):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x**3 if heavy else x


def unclipped(group, bits: int):
    scale = -group[group.abs().argmax()] / 2 ** (bits - 1)
    scale = scale.half().float()
    return (group / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale if scale != 0 else group


@settings(max_examples=60, deadline=None)
@given(bits=BITS, groupsize=st.integers(1, 40), columns=st.integers(1, 70), seed=SEEDS)
def test_weights_lie_on_a_grid_and_clipping_helps(bits, groupsize, columns, seed):
    weight = random(3, columns, seed=seed)
    result = quantize_weight(weight, bits, groupsize)
    assert result.shape == weight.shape
    for group, rounded in zip(weight.split(groupsize, 1), result.split(groupsize, 1), strict=True):
        for w, q in zip(group, rounded, strict=True):
            assert len(q.unique()) <= 2**bits
            assert (q - w).square().sum() <= (unclipped(w, bits) - w).square().sum() * (1 + 1e-5) + 1e-12
            top, clips = 2 ** (bits - 1) - 1, 1 - 0.025 * torch.arange(29)  # the clip ratios 1.00 … 0.30
            scales = torch.cat([w.abs().max() / top * clips, -w[w.abs().argmax()] / (top + 1) * clips]).half().float()
            codes = q / scales[:, None].where(scales[:, None] != 0, 1.0)
            on_grid = ((codes - codes.round()).abs() < 1e-3).all(1) & (codes > -top - 1.01).all(1)
            assert torch.any(on_grid & (codes < top + 0.01).all(1))


def reference_weight(weight: np.ndarray, bits: int, groupsize: int) -> np.ndarray:
    """RTN with a clip search, in loops: round half to even, full range [−2^(b−1), 2^(b−1) − 1]."""
    result = np.zeros_like(weight)
    top = 2 ** (bits - 1) - 1
    for i in range(weight.shape[0]):
        for start in range(0, weight.shape[1], groupsize):
            group = weight[i, start : start + groupsize]
            best = math.inf
            largest = float(max(group, key=abs))
            for step, full in itertools.product(range(29), (abs(largest) / top, -largest / (top + 1))):
                scale = float(np.float16(full * (1 - 0.025 * step)))
                rounded = [scale * min(max(round(float(w) / scale), -top - 1), top) for w in group]
                error = sum((float(w) - r) ** 2 for w, r in zip(group, rounded, strict=True))
                if error < best:
                    best, result[i, start : start + groupsize] = error, rounded
    return result


@pytest.mark.parametrize(("bits", "groupsize"), [(2, 8), (3, 7), (4, 16), (4, 128), (8, 5)])
def test_weights_against_a_slow_reference(bits, groupsize):
    weight = random(6, 30)
    expected = torch.from_numpy(reference_weight(weight.double().numpy(), bits, groupsize)).float()
    torch.testing.assert_close(quantize_weight(weight, bits, groupsize), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("columns", "groupsize"), [(576, 128), (100, 33), (5, 128)])
def test_ragged_last_group_is_that_part_alone(columns, groupsize):
    weight = random(4, columns)
    cut = columns // groupsize * groupsize
    result = quantize_weight(weight, 4, groupsize)
    torch.testing.assert_close(result[:, cut:], quantize_weight(weight[:, cut:], 4, groupsize))
    if cut:
        torch.testing.assert_close(result[:, :cut], quantize_weight(weight[:, :cut], 4, groupsize))


def test_all_sixteen_codes_are_used():
    """−8 is a code: {−8, …, 7} is represented exactly, and turned round too; a symmetric grid would not."""
    codes = torch.arange(-8.0, 8.0)[None]
    for weight in (codes, -codes, codes[:, 1:], -codes[:, 1:]):
        assert torch.equal(quantize_weight(weight, 4, 16), weight)


def test_scales_are_float16_numbers():
    scales = weight_scales(random(8, 300), 4, 128)
    assert scales.shape == (8, 3)
    assert torch.equal(scales, scales.half().float())
    assert (scales < 0).any()
    assert (scales > 0).any()


@pytest.mark.parametrize("weight", [torch.zeros(3, 20), torch.full((3, 20), 2.5), torch.full((3, 20), -(2.0**-10))])
def test_constant_weights_are_exact(weight):
    torch.testing.assert_close(quantize_weight(weight, 4, 8), weight, rtol=1e-5, atol=0)


def reference_activation(x: np.ndarray, bits: int, clip: float) -> np.ndarray:
    low, high = clip * min(x.min(), 0.0), clip * max(x.max(), 0.0)
    if high == low:
        return np.zeros_like(x)
    scale = (high - low) / (2**bits - 1)
    zero = round(-low / scale)
    return np.array([(min(max(round(v / scale) + zero, 0), 2**bits - 1) - zero) * scale for v in x])


@settings(max_examples=60, deadline=None)
@given(bits=BITS, clip=st.sampled_from([1.0, 0.9, 0.5]), n=st.integers(1, 40), seed=SEEDS, shift=st.floats(-3, 3))
def test_activations_against_a_slow_reference(bits, clip, n, seed, shift):
    x = (random(4, n, seed=seed) + shift).double()
    expected = np.stack([reference_activation(row, bits, clip) for row in x.numpy()])
    torch.testing.assert_close(quantize_activation(x, bits, clip), torch.from_numpy(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bits", range(2, 9))
def test_activations_against_torch(bits):
    x = random(50, 64, heavy=False)
    low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round().int()
    expected = torch.fake_quantize_per_channel_affine(x, scale, zero, axis=0, quant_min=0, quant_max=2**bits - 1)
    off = (quantize_activation(x, bits) - expected).abs() > 1e-5
    assert off.float().mean() < 1e-3  # torch multiplies by 1/scale: a tie may fall to the other side


@settings(max_examples=60, deadline=None)
@given(bits=BITS, n=st.integers(1, 60), seed=SEEDS, shift=st.floats(-10, 10))
def test_activation_error_is_at_most_half_a_step(bits, n, seed, shift):
    x = random(5, n, seed=seed) + shift
    result = quantize_activation(x, bits)
    scale = (x.amax(-1).clamp(min=0) - x.amin(-1).clamp(max=0)) / (2**bits - 1)
    assert torch.all((result - x).abs() <= scale[:, None] * 0.5001 + 1e-6)
    assert all(len(row.unique()) <= 2**bits for row in result)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("value", [0.0, 7.3, -1e-6, 1e6, 1e-40])
def test_constant_activations_are_exact(bits, value):
    x = torch.full((3, 20), value)
    torch.testing.assert_close(quantize_activation(x, bits), x, rtol=1e-5, atol=1e-40)


@pytest.mark.parametrize("value", [-0.7, 1e-3, 1e5, 1e-6, -1e-20])
def test_constant_weights_are_as_near_as_a_float16_scale_allows(value):
    weight = torch.full((3, 20), value)
    torch.testing.assert_close(quantize_weight(weight, 4, 8), weight, rtol=2**-11, atol=8 * 2**-25)


def test_more_bits_are_never_worse():
    """Up to the finest that are allowed: beyond, float16 has too few numbers for the scales."""
    weight = 0.02 * random(64, 128, heavy=False)
    errors = [(quantize_weight(weight, bits, 128) - weight).norm().item() for bits in range(2, FINEST + 1)]
    assert all(more < 0.6 * fewer for fewer, more in itertools.pairwise(errors))


def test_importance_chooses_scales_that_cost_less_by_it():
    weight, importance = random(6, 64), torch.logspace(0, 3, 64)

    def cost(scales):
        spread = scales.repeat_interleave(16, 1)
        return (((weight / spread).round().clamp(-8, 7) * spread - weight).square() * importance).sum()

    assert cost(weight_scales(weight, 4, 16, importance)) < cost(weight_scales(weight, 4, 16))


def test_zero_is_always_exact():
    x = random(20, 30) + 5
    x[:, 3] = 0
    assert torch.all(quantize_activation(x)[:, 3] == 0)


@pytest.mark.parametrize("groupsize", [1, 8, 16, 64])
def test_activation_groups_are_independent(groupsize):
    x = random(2, 3, 64)
    before = x.clone()
    expected = torch.cat([quantize_activation(part) for part in x.split(groupsize, -1)], -1)
    assert torch.equal(quantize_activation(x, groupsize=groupsize), expected)
    assert torch.equal(x, before)


def test_clip_shrinks_the_range():
    x = random(20, 64)
    y = quantize_activation(x, clip=0.5)
    assert torch.all(y.abs().amax(-1) < 0.6 * x.abs().amax(-1))


@pytest.mark.parametrize("x", [random(64, 5).T, random(5, 128)[:, ::2], random(5, 2, 64).transpose(0, 1)])
def test_activations_need_not_be_contiguous(x):
    for groupsize in (None, 16):
        expected = quantize_activation(x.contiguous(), groupsize=groupsize)
        torch.testing.assert_close(quantize_activation(x, groupsize=groupsize), expected)


def test_rounding_and_its_slopes():
    """A clip that learns rounds as a number does; slopes are those of a surrogate in which no code flips."""
    generator = torch.Generator().manual_seed(0)
    x, slope = (torch.randn(7, 16, generator=generator, dtype=torch.double) for _ in range(2))
    x, clip = x.requires_grad_(), torch.tensor(0.85, dtype=torch.double, requires_grad=True)
    rounded = quantize_activation(x, 4, clip)
    torch.testing.assert_close(rounded, quantize_activation(x.detach(), 4, 0.85))
    low, high = x.amin(-1, keepdim=True) * clip, x.amax(-1, keepdim=True) * clip
    scale = (high - low) / 15
    code = (x / scale).round() + (-low / scale).round()
    within = x + scale * ((rounded - x) / scale).detach()
    surrogate = torch.where(code < 0, low, torch.where(code > 15, high, within))
    assert (code < 0).any()
    assert (code > 15).any()
    expected = torch.autograd.grad(surrogate, (x, clip), slope)
    torch.testing.assert_close(torch.autograd.grad(rounded, (x, clip), slope), expected)


@pytest.mark.parametrize("sign", [-1, 1])
def test_slopes_of_tokens_of_one_sign(sign):
    """0 is an end of their grid, which moves with no entry: as if a 0 stood among them. That 0 passes its slope on."""
    x = sign * torch.linspace(0.1, 0.9, 9, dtype=torch.double)[None]
    slope = torch.linspace(-1, 1, 10, dtype=torch.double)[None]
    found = []
    for entries in (x, torch.nn.functional.pad(x, (0, 1))):
        entries = entries.clone().requires_grad_()
        found.append(torch.autograd.grad(quantize_activation(entries), entries, slope[:, : entries.shape[1]])[0])
    alone, beside_zero = found
    torch.testing.assert_close(alone, beside_zero[:, :-1])
    assert beside_zero[0, -1] == slope[0, -1]


def test_slopes_of_groups_are_each_groups_own():
    x, slope = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.double).requires_grad_()
    together = torch.autograd.grad(quantize_activation(x, groupsize=4), x, slope)[0]
    for part in (slice(0, 4), slice(4, 8), slice(8, 12)):
        alone = x[:, part].detach().requires_grad_()
        expected = torch.autograd.grad(quantize_activation(alone), alone, slope[:, part])[0]
        torch.testing.assert_close(together[:, part], expected)
