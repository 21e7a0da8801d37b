"""Rows beside each other: what is said of them is what their windows bear."""

import math

import numpy as np
import pytest

from jqlib.lab import compare


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
        control_to_best = sum(compare.difference(CONTROL, BEST, by)[0:1])
        assert rest.value == pytest.approx(control_to_best / compare.difference(BASE, FP, by).value)
        assert compare.share(BASE, BASE, FP, by).value == pytest.approx(0)
        assert compare.share(FP, BASE, FP, by) == pytest.approx((1, 1, 1))
    assert compare.share(BEST, BASE, FP).value == pytest.approx(1 - 0.8 / 2.2)


def test_a_difference_that_may_be_none_is_not_claimed():
    words = compare.in_words("A", BEST, "B", BASE)
    assert words == "A beside B: perplexity 29.5% lower (22.8% to 35.7%), KL 0.250 lower (0.158 to 0.342)"
    assert compare.in_words("B", BASE, "A", BEST).startswith("B beside A: perplexity 41.9% higher (29.5% to 55.6%), KL")
    noise = row([3.6, 2.5, 3.1, 4.0], [0.5, 0.6, 0.5, 0.7])
    words = compare.in_words("A", noise, "B", BASE)
    assert words.count("can't be told apart") == 2
    assert "perplexity +171.8% (no interval from one article: nothing can be said)" in compare.in_words(
        "A", row([2.0]), "B", row([1.0])
    )
    beyond = compare.in_words("A", row([900.0, 1000.0]), "B", row([1.0, 2.0]))  # exp overflows
    assert "higher" in beyond or "apart" in beyond


def test_a_share_is_written_with_its_interval():
    assert compare.percent(compare.Interval(0.664, 0.6, 0.71)) == "66% (60 to 71)"
    assert compare.percent(compare.Interval(0.664, math.nan, math.nan)) == "66% (no interval)"


def test_rows_beside_each_other():
    table = compare.beside([FP | {"ppl": 9}, BASE | {"ppl": 11, "method": "base"}], FP)
    assert table.columns.tolist() == ["ppl", "method", "gap", "gap_low", "gap_high"]
    assert table.gap.tolist() == pytest.approx([0, 0.55])
    assert table.gap_low[1] < 0.55 < table.gap_high[1]


@pytest.mark.parametrize("n", [8, 16])
def test_what_a_step_adds_is_covered(n):
    """The share of a gap between two rows, of which the truth is known: 0.2 of 0.5 nats."""
    g, held = np.random.default_rng(0), 0
    for _ in range(1000):
        fp, gap = g.normal(3, 0.4, n), g.normal(0.5, 0.1, n)
        since = fp + 0.6 * gap + g.normal(0, 0.03, n)
        at = fp + 0.4 * gap + g.normal(0, 0.03, n)
        _, low, high = compare.share(
            *map(row, (at.tolist(), (fp + gap).tolist(), fp.tolist())), "ppl", row(since.tolist())
        )
        held += low <= 0.2 <= high
    assert held >= 930
