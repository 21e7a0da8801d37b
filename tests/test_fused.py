"""Passes made one: the same numbers, and the same without a compiler."""

import logging

import pytest
import torch
from torch._dynamo.utils import counters

from jqlib.fused import LARGE, fused
from jqlib.transform.grids import _errors, _rounded, _slopes


def arguments(function):
    generator = torch.Generator().manual_seed(0)
    x, slope = (torch.randn(LARGE // 64, 64, generator=generator) for _ in range(2))
    if function is _errors:
        return x, torch.rand(5, len(x), 1, generator=generator) + 0.1, torch.rand(64, generator=generator), 4
    return (x, torch.tensor(0.9), 4) if function is _rounded else (x, torch.tensor(0.9), slope, 4)


@pytest.mark.parametrize("function", [_rounded, _slopes, _errors], ids=lambda f: f.__name__)
def test_compiled_functions_give_what_is_written(function):
    given = arguments(function)
    found, expected = function(*given), function.__wrapped__(*given)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)  # the slope by clip is a sum over all tokens


def test_parameters_of_other_shapes_are_not_compiled_anew():
    once = fused(lambda x: 2 * x)
    for rows in (2, 3, 5, 7):
        once(torch.nn.Parameter(torch.ones(rows, LARGE)))
    before = counters["stats"]["unique_graphs"]
    once(torch.nn.Parameter(torch.ones(11, LARGE)))
    assert counters["stats"]["unique_graphs"] == before > 0


def test_it_is_compiled_once_with_autocast_and_without_with_gradients_and_without():
    times = fused(lambda x, y: x * y)
    x, y = torch.ones(4, LARGE), torch.nn.Parameter(torch.ones(4, LARGE))
    times(x, y)
    before = counters["stats"]["unique_graphs"]
    with torch.autocast("cpu", torch.bfloat16):
        assert times(x, y).dtype == torch.float32
        with torch.no_grad():
            times(y, x)
    assert counters["stats"]["unique_graphs"] == before > 0


def test_where_nothing_compiles_it_runs_as_it_is_written(monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", fail)
    twice = fused(lambda x: 2 * x)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert torch.equal(twice(torch.ones(LARGE)), torch.full((LARGE,), 2.0))
    assert len(caplog.records) == 1
    assert "torch.compile said no compiler" in caplog.text


def test_what_is_small_is_not_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    assert fused(lambda x: x + 1)(torch.zeros(LARGE - 1)).sum() == LARGE - 1
