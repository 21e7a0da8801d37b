"""Rows of a table beside each other, by perplexity (``"ppl"``) and by KL from the FP model (``"kl"``).

Rows are dicts as `pipeline.evaluate` gives them, all of the same windows. Every comparison is the paired one.
"""

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from jqlib.intervals import Interval, paired_interval, share_of_gap

BY_WINDOW = {"ppl": "nll", "kl": "kl_by_window"}

Row = Mapping


def difference(row: Row, other: Row, by: str = "ppl") -> Interval:
    """ln(PPL / other's PPL), or the difference of the two KL, in nats a token."""
    return paired_interval(row[BY_WINDOW[by]], other[BY_WINDOW[by]], row["articles"])


def share(row: Row, base: Row, fp: Row, by: str = "ppl", since: Row | None = None) -> Interval:
    """The share of base's gap to FP that a row closes, or what of it lies between the row ``since`` and this one."""
    at, fro, to, zero = ([*r[BY_WINDOW[by]]] for r in (row, since or base, base, fp))
    moved = [t - f + a for a, f, t in zip(at, fro, to, strict=True)]
    return share_of_gap(moved, to, zero, row["articles"])


def in_words(name: str, other: str, interval: Interval) -> str:
    """A difference of log perplexities as a sentence, which claims nothing where the interval holds 0."""
    value, low, high = (math.expm1(x) for x in interval)
    if math.isnan(low):
        return f"{name} has {abs(value):.1%} {'more' if value > 0 else 'less'} than {other}, with no interval"
    if low <= 0 <= high:
        return f"{name} can't be told from {other} ({low:+.1%} to {high:+.1%})"
    return f"{name} is {abs(value):.1%} {'above' if value > 0 else 'below'} {other} ({low:+.1%} to {high:+.1%})"


def percent(share: Interval) -> str:
    """``66% (60 to 71)``."""
    value, low, high = (100 * x for x in share)
    return f"{value:.0f}% (no interval)" if math.isnan(low) else f"{value:.0f}% ({low:.0f} to {high:.0f})"


def beside(rows: Sequence[Row], fp: Row) -> pd.DataFrame:
    """The rows' numbers, and ``gap``, ln(PPL/FP), with its paired interval (``gap_low``, ``gap_high``)."""
    table = pd.DataFrame([{k: v for k, v in row.items() if not isinstance(v, list)} for row in rows])
    gaps = pd.DataFrame([difference(row, fp) for row in rows], index=table.index)
    return table.assign(gap=gaps.value, gap_low=gaps.low, gap_high=gaps.high)
