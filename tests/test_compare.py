"""Rows beside each other: what is said of them is what their windows bear."""

import math

import pytest

from jqlib import compare


def row(nll, kl=None, **values):
    return {"nll": nll, "kl_by_window": kl or [0.0] * len(nll), "articles": list(range(len(nll)))} | values


FP = row([3.0, 2.0, 2.5, 3.5])
BASE = row([3.5, 2.6, 3.0, 4.1], [0.5, 0.6, 0.5, 0.6])
CONTROL = row([3.3, 2.35, 2.8, 3.85], [0.4, 0.45, 0.4, 0.45])
BEST = row([3.2, 2.2, 2.7, 3.7], [0.3, 0.3, 0.3, 0.3])


def test_shares_add_up():
    for by in compare.BY_WINDOW:
        best, control = (compare.share(r, BASE, FP, by) for r in (BEST, CONTROL))
        rest = compare.share(BEST, BASE, FP, by, since=CONTROL)
        assert rest.value == pytest.approx(best.value - control.value)
        assert rest.low < rest.value < rest.high
        assert compare.share(BASE, BASE, FP, by).value == pytest.approx(0)
        assert compare.share(FP, BASE, FP, by) == pytest.approx((1, 1, 1))
    assert compare.share(BEST, BASE, FP).value == pytest.approx(1 - 0.8 / 2.2)


def test_a_difference_that_may_be_none_is_not_claimed():
    assert compare.in_words("A", "B", compare.difference(BEST, BASE)).startswith("A is 29.5% below B (")
    assert compare.in_words("B", "A", compare.difference(BASE, BEST)).startswith("B is 41.9% above A (")
    noise = row([3.6, 2.5, 3.1, 4.0])
    assert compare.in_words("A", "B", compare.difference(noise, BASE)).startswith("A can't be told from B (")
    one = [row([2.0]), row([1.0])]
    assert compare.in_words("A", "B", compare.difference(*one)) == "A has 171.8% more than B, with no interval"


def test_a_share_is_written_with_its_interval():
    assert compare.percent(compare.Interval(0.664, 0.6, 0.71)) == "66% (60 to 71)"
    assert compare.percent(compare.Interval(0.664, math.nan, math.nan)) == "66% (no interval)"


def test_rows_beside_each_other():
    table = compare.beside([FP | {"ppl": 9}, BASE | {"ppl": 11, "method": "base"}], FP)
    assert table.columns.tolist() == ["ppl", "method", "gap", "gap_low", "gap_high"]
    assert table.gap.tolist() == pytest.approx([0, 0.55])
    assert table.gap_low[1] < 0.55 < table.gap_high[1]
