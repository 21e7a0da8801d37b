from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jqlib.transform.hadamard import (
    block_order,
    factors,
    hadamard_matrix,
    hadamard_transform,
    random_hadamard,
    transform_operations,
)

DENSE = [576, 896, 960, 1536, 2048, 2560, 3072, 3584, 4096, 4864, 5120]
HUGE = [8192, 8960, 9728, 11008, 12288, 13824, 14336, 17408, 18944, 25600, 28672, 29568]
PALEY_1 = [12, 20, 60, 108, 140]
PALEY_2 = [28, 36, 76, 148]
WILLIAMSON = [52, 156, 172]


def random(*shape, seed: int, dtype: torch.dtype = torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("n", [1, 2, 4, 8, *PALEY_1, *PALEY_2, *WILLIAMSON, *DENSE])
def test_matrix_is_hadamard_exactly(n):
    H = hadamard_matrix(n)
    assert H.shape == (n, n)
    assert H.dtype == torch.float32
    assert torch.all(H.abs() == 1)
    assert torch.equal(H @ H.T, n * torch.eye(n))  # sums of ±1 are exact in float32


@pytest.mark.parametrize("n", HUGE)
def test_transform_of_a_huge_size_is_hadamard(n):
    """The whole matrix would take gigabytes: 64 of its rows, and the norm of random vectors."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n))[:64]
    rows = hadamard_transform(torch.eye(n)[order] if n < 10_000 else one_hot(order, n))
    torch.testing.assert_close(rows.abs(), torch.full_like(rows, n**-0.5), rtol=1e-4, atol=0)
    assert (rows @ rows.T - torch.eye(64)).abs().max() < 1e-5
    x = random(4, n, seed=n)
    torch.testing.assert_close(hadamard_transform(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=0)


def one_hot(order, n):
    rows = torch.zeros(len(order), n)
    rows[torch.arange(len(order)), order] = 1
    return rows


@settings(max_examples=40, deadline=None)
@given(
    n=st.sampled_from([1, 2, 12, 28, 36, 52, 64, 96, 156, 172, 256, 576, 896, 960]),
    shape=st.lists(st.integers(1, 4), max_size=3),
    seed=st.integers(0, 2**31),
)
def test_transform_equals_dense_product(n, shape, seed):
    x = random(*shape, n, seed=seed, dtype=torch.float64)
    expected = x @ hadamard_matrix(n).double() / n**0.5
    assert hadamard_transform(x).shape == x.shape
    torch.testing.assert_close(hadamard_transform(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_transform_keeps_dtype_and_input(dtype, tolerance):
    x = random(3, 576, seed=0).to(dtype)
    before = x.clone()
    y = hadamard_transform(x)
    assert y.dtype == dtype
    assert torch.equal(x, before)
    expected = before.double() @ hadamard_matrix(576).double() / 24
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=tolerance * 5)


def test_transform_of_a_view_that_is_not_contiguous():
    x = random(96, 5, seed=0).T
    torch.testing.assert_close(hadamard_transform(x), hadamard_transform(x.contiguous()))


@pytest.mark.parametrize("n", [3, 6, 18, 30, 100, 576 + 4, 2 * 577])
def test_impossible_or_unknown_sizes(n):
    for call in (factors, hadamard_matrix):
        with pytest.raises(ValueError, match=f"order {n}"):
            call(n)


@pytest.mark.parametrize(("n", "order"), [(576, 576), (100, 20), (18, 2), (13696, 128), (428, 4), (1, 1)])
def test_sizes_without_a_matrix_have_blocks_of_the_largest_that_divides(n, order):
    assert block_order(n) == order
    x = random(3, n, seed=0, dtype=torch.float64)
    blocks = x.view(3, -1, order) @ hadamard_matrix(order).double() / order**0.5
    torch.testing.assert_close(hadamard_transform(x), blocks.view(3, n), rtol=0, atol=1e-12)
    torch.testing.assert_close(hadamard_transform(hadamard_transform(x), inverse=True), x, rtol=0, atol=1e-12)
    assert transform_operations(n) == n * sum(factors(order))
    if n < 10_000:
        R = random_hadamard(n, seed=0)
        assert (R @ R.T - torch.eye(n)).abs().max() < 1e-5
        assert all(R[i : i + order, i : i + order].all() for i in range(0, n, order))
        assert (R != 0).sum() == n * order


@pytest.mark.parametrize(
    "call", [block_order, partial(random_hadamard, seed=0), lambda n: hadamard_transform(torch.ones(n))]
)
@pytest.mark.parametrize("n", [3, 107, 577 * 3])
def test_an_odd_size_has_no_blocks(call, n):
    with pytest.raises(ValueError, match=f"order {n}"):
        call(n)


@pytest.mark.parametrize("n", [0, -4])
def test_order_below_one(n):
    with pytest.raises(ValueError, match=f"order 1 or more, got {n}"):
        hadamard_matrix(n)


@pytest.mark.parametrize("n", [1, 8, 576, 960])
def test_random_hadamard(n):
    R = random_hadamard(n, seed=1)
    assert (R @ R.T - torch.eye(n)).abs().max() < 1e-5
    torch.testing.assert_close(R.abs(), torch.full((n, n), n**-0.5))
    assert torch.equal(R, random_hadamard(n, seed=1))
    assert n == 1 or not torch.equal(R, random_hadamard(n, seed=2))


def test_first_used_without_gradients_it_has_them_later():
    with torch.inference_mode():
        hadamard_transform(torch.ones(1, 20))
    x = torch.ones(1, 20, requires_grad=True)
    hadamard_transform(x)[0, 0].backward()
    torch.testing.assert_close(x.grad[0], hadamard_matrix(20)[:, 0] / 20**0.5)
