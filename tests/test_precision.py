"""In which dtype products are made, and by which library."""

import pytest
import torch
from torch.nn.functional import linear

from jqlib.model.walk import walk
from jqlib.precision import dtype_of_products, products_dtype, products_in
from jqlib.product import fast_float32, product

CPU = torch.device("cpu")


@pytest.fixture
def wide(monkeypatch):
    """A processor that has AVX-512, as far as torch knows."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True})


@pytest.mark.parametrize(("has", "dtype"), [
    ({"amx_bf16": True}, torch.bfloat16), ({"avx512_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32),
])  # fmt: skip
def test_auto_asks_the_processor_what_it_has(monkeypatch, has, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert products_dtype("auto", "cpu") == dtype
    assert products_dtype("auto", "cuda") == torch.bfloat16
    assert products_dtype("float32", "cuda") == torch.float32


def test_products_alone_are_in_bfloat16(tiny_model, tokens):
    model, ids = tiny_model(), tokens(1, 32)
    x = torch.ones(1)
    with products_in(torch.bfloat16, model.device):
        found, inside = model(ids).logits, dtype_of_products(x)
    assert (inside, dtype_of_products(x)) == (torch.bfloat16, torch.float32)
    exact = model(ids).logits
    assert 0 < (found - exact).abs().max() < 0.1 * exact.abs().max()
    with products_in(torch.float32, model.device):
        assert torch.equal(model(ids).logits, exact)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 48), (2, 5, 48), (1, 48), (0, 48)])
def test_fast_products_are_float32s(wide, shape, bias):
    generator = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(size, generator=generator) for size in (shape, (96, 48), (96,)))
    b = b if bias else None
    expected = linear(x.double(), W.double(), None if b is None else b.double())
    with fast_float32(CPU), torch.no_grad():
        found = linear(x, W, b)
        strided = linear(x.mT.contiguous().mT, W.T.contiguous().T, bias=b)
    for y in (found, strided):
        assert y.dtype == torch.float32  # and as exact: products in bfloat16 are off by 1e-2
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_fast_products_leave_gradients_and_other_dtypes_alone(wide):
    x, W = torch.ones(3, 8), torch.ones(4, 8, requires_grad=True)
    with products_in(torch.float32, CPU):
        linear(x, W).sum().backward()
        with torch.no_grad():
            assert linear(x.double(), W.double()).dtype == torch.double
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x, W).dtype == torch.bfloat16
            with products_in(torch.float32, CPU):  # whatever stands around it
                assert linear(x, W).dtype == torch.float32
    torch.testing.assert_close(W.grad, torch.full((4, 8), 3.0))


def test_a_walk_is_what_the_model_computes(wide, tiny_model, tokens):
    model, windows = tiny_model(), tokens(3, 64)
    for step in walk(model, windows):
        step.forward()
    with torch.no_grad():
        expected = model.base_model(windows, output_hidden_states=True, use_cache=False).last_hidden_state
        found = model.base_model.norm(step.hidden)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "shapes", [((7, 16), (16, 9)), ((2, 3, 16), (16, 9)), ((1, 7, 16), (1, 16, 9)), ((4, 7, 16), (4, 16, 9))]
)
def test_a_product_and_its_gradients_are_matmuls(wide, shapes):
    generator = torch.Generator().manual_seed(0)
    x, R = (torch.randn(shape, generator=generator).mT.contiguous().mT.requires_grad_() for shape in shapes)
    slope = torch.randn((x @ R).shape, generator=generator)
    found = product(x, R)
    expected = x.double() @ R.double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    for y, wanted in zip(
        torch.autograd.grad(found, (x, R), slope), torch.autograd.grad(expected, (x, R), slope.double()), strict=True
    ):
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
