"""95% intervals of what is measured on evaluation windows: means, differences, shares.

Windows of one article are alike, so articles are what chance has drawn (Cameron & Miller 2015, cluster-robust errors):
deviations are summed within an article before they are squared. With few articles the error itself is uncertain, hence
Student's t, not a percentile of resamples: those of 8 windows cover 90% where 95 is said. Articles of unlike length
count as fewer: as many of one length as would have the same sum of squares.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Values = Sequence[float]  # one per window


class Interval(NamedTuple):
    """A value and its 95% interval; both ends are NaN if one article gives none."""

    value: float
    low: float
    high: float


def mean_interval(values: Values, articles: Sequence[int] | None = None) -> Interval:
    """The mean over windows. ``articles``: which article each window is from (default: each from its own)."""
    return _ratio(torch.tensor(values, dtype=torch.double), torch.ones(len(values), dtype=torch.double), articles)


def paired_interval(a: Values, b: Values, articles: Sequence[int] | None = None) -> Interval:
    """The mean of a − b on the same windows: of negative log-likelihoods it is ln(PPL_a / PPL_b)."""
    return mean_interval(_difference(a, b).tolist(), articles)


def share_of_gap(
    a: Values, b: Values, fp: Values, articles: Sequence[int] | None = None, since: Values | None = None
) -> Interval:
    """The share of b's gap to FP that lies between ``since`` (default: b) and a: mean(since − a) / mean(b − fp).

    The interval is to first order; there is none where b's own gap can't be told from 0.
    """
    gap = _difference(b, fp)
    share = _ratio(_difference(b if since is None else since, a), gap, articles)
    known = mean_interval(gap.tolist(), articles).low > 0
    return share if known else Interval(share.value, math.nan, math.nan)


def _ratio(over: Tensor, under: Tensor, articles: Sequence[int] | None) -> Interval:
    """Σ over / Σ under: the mean where ``under`` is 1 everywhere."""
    from scipy.stats import t

    value = (over.sum() / under.sum()).item()
    names, of = torch.tensor(range(len(over)) if articles is None else articles).unique(return_inverse=True)
    if len(names) < 2:
        return Interval(value, math.nan, math.nan)
    off = torch.zeros(len(names), dtype=torch.double).index_add(0, of, over - value * under)
    error = (off.square().sum() * len(names) / (len(names) - 1)).sqrt() / under.sum().abs()
    sizes = of.bincount().double()
    as_many = (sizes.sum().square() / sizes.square().sum()).item()
    half = float(t.ppf(0.975, max(as_many - 1, 1))) * error.item()
    return Interval(value, value - half, value + half)


def _difference(a: Values, b: Values) -> Tensor:
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} windows: a paired interval needs the same windows for both")
    return torch.tensor(a, dtype=torch.double) - torch.tensor(b, dtype=torch.double)
