"""Intervals hold what they promise: simulated, on values whose truth is known."""

import math

import numpy as np
import pytest
from scipy import stats

from jqlib.model.intervals import mean_interval, paired_interval, share_of_gap

TRIALS = 2000


def coverage(make) -> float:
    """How often the interval of ``make(generator)`` holds the truth it comes with."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(TRIALS):
        (_, low, high), truth = make(generator)
        held += low <= truth <= high
    return held / TRIALS


@pytest.mark.parametrize("n", [4, 8, 16, 50])
def test_95_percent_are_95_percent(n):
    assert 0.93 <= coverage(lambda g: (mean_interval(g.normal(3, 1, n)), 3)) <= 0.97


@pytest.mark.parametrize("n", [8, 16])
def test_windows_of_one_article_count_as_one(n):
    """Two windows an article, alike in most of what makes them hard."""

    def make(g):
        hard = np.repeat(g.normal(3, 1, n), 2) + g.normal(0, 0.3, 2 * n)
        return mean_interval(hard, np.repeat(range(n), 2)), 3

    assert coverage(make) >= 0.93
    assert coverage(lambda g: (make(g)[0][:1] + mean_interval(np.repeat(g.normal(3, 1, n), 2))[1:], 3)) < 0.9


@pytest.mark.parametrize("n", [8, 16])
def test_the_share_of_a_gap_is_covered_too(n):
    """As ours are: gaps of 0.5 and 0.2 nats that move together from article to article."""

    def make(g):
        fp = g.normal(3, 0.4, n)
        gap = g.normal(0.5, 0.1, n)
        return share_of_gap(fp + 0.4 * gap + g.normal(0, 0.03, n), fp + gap, fp), 0.6

    assert coverage(make) >= 0.93


LENGTHS = [8, 6, 6, 4, 8, 5, 7, 2, 7, 1, 10, 2, 12, 10, 18]  # windows of 1024 in test articles of `wiki`, about


@pytest.mark.parametrize("alike", [0.2, 0.5, 0.8])
def test_articles_of_unlike_length(alike):
    """As in profile `full`: the windows of an article are correlated, and some articles have many."""

    def make(g):
        hard = np.concatenate([alike**0.5 * g.normal() + (1 - alike) ** 0.5 * g.normal(size=n) for n in LENGTHS])
        return mean_interval(hard, np.repeat(range(len(LENGTHS)), LENGTHS)), 0

    assert coverage(make) >= 0.93


def test_equals_the_textbook():
    values = np.random.default_rng(0).normal(3, 1, 12)
    expected = stats.t.interval(0.95, 11, values.mean(), stats.sem(values))
    value, low, high = mean_interval(values)
    assert (value, low, high) == pytest.approx((values.mean(), *expected))
    again = mean_interval(values, range(5, 17))
    assert again == pytest.approx((value, low, high))


def test_pairs_take_out_what_both_share():
    g = np.random.default_rng(0)
    a = g.random(50)
    b = a - 0.1 + 0.01 * np.sin(range(50))
    value, low, high = paired_interval(a, b)
    assert value == pytest.approx(a.mean() - b.mean())
    assert 0.09 < low < value < high < 0.11  # though a and b themselves spread over a whole nat
    assert paired_interval(b, a) == pytest.approx((-value, -high, -low))
    assert paired_interval(a, a) == (0, 0, 0)


def test_pairs_need_the_same_windows():
    with pytest.raises(ValueError, match="2 and 1 windows: a paired interval needs the same windows for both"):
        paired_interval([1.0, 2.0], [1.0])


def test_shares():
    fp, base = [1.0, 2.0, 3.0], [2.0, 3.0, 4.5]
    assert share_of_gap(base, base, fp) == pytest.approx((0, 0, 0), abs=1e-12)
    assert share_of_gap(fp, base, fp) == (1, 1, 1)
    assert share_of_gap([1.5, 2.5, 3.75], base, fp).value == pytest.approx(0.5)


def test_no_share_of_a_gap_that_may_not_be():
    share = share_of_gap([1.0, 2.0], [1.1, 1.9], [1.0, 2.0])
    assert math.isnan(share.low)
    assert math.isnan(share.high)


@pytest.mark.parametrize(("values", "articles"), [([2.0], None), ([2.0, 3.0], [7, 7])])
def test_one_article_gives_no_interval(values, articles):
    found = mean_interval(values, articles)
    assert found.value == sum(values) / len(values)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
