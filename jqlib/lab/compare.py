"""Rows of a table beside each other, by perplexity (``"ppl"``) and by KL from the FP model (``"kl"``).

Rows are dicts as `pipeline.evaluate` gives them, all of the same windows. Every comparison is the paired one.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import pandas as pd

from jqlib.model.intervals import Interval, paired_interval, share_of_gap

BY_WINDOW = {"ppl": "nll", "kl": "kl_by_window"}

Row = Mapping


def difference(row: Row, other: Row, by: str = "ppl") -> Interval:
    """ln(PPL / other's PPL), or the difference of the two KL, in nats per token."""
    return paired_interval(row[BY_WINDOW[by]], other[BY_WINDOW[by]], row["articles"])


def share(row: Row, base: Row, fp: Row, by: str = "ppl", since: Row | None = None) -> Interval:
    """The share of base's gap to FP that a row closes, or what of it lies between the row ``since`` and this one."""
    at, to, zero, start = (r[BY_WINDOW[by]] for r in (row, base, fp, since or base))
    return share_of_gap(at, to, zero, row["articles"], start)


def in_words(name: str, row: Row, other_name: str, other: Row) -> str:
    """Two rows compared, in perplexity and in KL, as a sentence that claims nothing where an interval holds 0."""
    ppl = _verdict(difference(row, other), lambda nats: f"{math.expm1(min(nats, 700)):+.1%}")
    kl = _verdict(difference(row, other, "kl"), lambda nats: f"{nats:+.3f}")
    return f"{name} beside {other_name}: perplexity {ppl}, KL {kl}"


def _verdict(interval: Interval, form: Callable[[float], str]) -> str:
    value, low, high = interval
    if math.isnan(low):
        return f"{form(value)} (no interval from one article: nothing can be said)"
    if low <= 0 <= high:
        return f"can't be told apart ({form(low)} to {form(high)})"
    near, far = sorted((low, high), key=abs)
    return f"{form(value)[1:]} {'higher' if value > 0 else 'lower'} ({form(near)[1:]} to {form(far)[1:]})"


def percent(share: Interval) -> str:
    """``66% (60 to 71)``."""
    value, low, high = (100 * x for x in share)
    return f"{value:.0f}% (no interval)" if math.isnan(low) else f"{value:.0f}% ({low:.0f} to {high:.0f})"


def beside(rows: Sequence[Row], fp: Row) -> pd.DataFrame:
    """The rows' numbers, and ``gap``, ln(PPL/FP), with its paired interval (``gap_low``, ``gap_high``)."""
    table = pd.DataFrame([{k: v for k, v in row.items() if not isinstance(v, list)} for row in rows])
    gaps = pd.DataFrame([difference(row, fp) for row in rows], index=table.index)
    return table.assign(gap=gaps.value, gap_low=gaps.low, gap_high=gaps.high)
