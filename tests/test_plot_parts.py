"""Figures of notebooks 04 and 06: what is drawn is what was given, and what lies far out is written."""

import math

import numpy as np
import pandas as pd
import pytest

from jqlib.lab import plot_parts


def rows(*values):
    return pd.DataFrame(values, columns=["group", "label", "value", "low", "high"])


def drawn(axis):
    """The points of a forest by row, and what is written beside each row."""
    points = {line.get_ydata()[0]: line for line in axis.lines if line.get_marker() == "o"}
    return points, {text.xy[1]: text.get_text() for text in axis.texts}


def test_a_change_far_out_is_written_and_does_not_stretch_the_axis():
    table = rows(("a", "small", 0.05, 0.02, 0.08), ("a", "middle", -0.1, -0.12, -0.08), ("b", "huge", 4.0, 3.5, 4.5))
    axis = plot_parts.changes(table, "the reference").axes[0]
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["a", "small", "middle", "b", "huge"]
    points, texts = drawn(axis)
    assert {y: line.get_xdata()[0] for y, line in points.items()} == {1: 0.05, 2: -0.1}
    assert texts == {1: "+0.050", 2: "-0.100", 4: f"+4.00 (PPL × {math.exp(4):.3g})"}
    left, right = axis.get_xlim()
    assert left < -0.12 < 0.08 < right < 1


def test_a_change_far_out_to_the_left():
    table = rows(("a", "small", 0.05, 0.02, 0.08), ("a", "middle", -0.1, -0.12, -0.08), ("b", "huge", -4.0, -5, -3))
    axis = plot_parts.changes(table, "the reference").axes[0]
    assert "-4.00" in drawn(axis)[1][4]
    assert next(line for line in axis.lines if line.get_marker() == "<").get_xdata()[0] == axis.get_xlim()[0]


def test_a_change_within_luck_or_its_own_interval_is_hollow():
    table = rows(("a", "clear", 0.2, 0.1, 0.3), ("a", "within luck", 0.04, 0.03, 0.05), ("a", "unsure", 0.2, -0.1, 0.5))
    points, _ = drawn(plot_parts.changes(table, "the reference", 0.06).axes[0])
    assert [points[y].get_markerfacecolor() == "white" for y in (1, 2, 3)] == [False, True, True]


def test_a_change_without_an_interval_is_drawn():
    points, texts = drawn(plot_parts.changes(rows(("a", "alone", 0.2, math.nan, math.nan)), "FP").axes[0])
    assert points[1].get_xdata()[0] == 0.2
    assert texts == {1: "+0.200"}


def test_one_tall_weight_leaves_its_group_no_steps():
    even = np.linspace(-1, 1, 16, dtype=np.float32)
    tall = even.copy()
    tall[3] = 40
    left, right = plot_parts.weight_group({"before": even, "after": tall}, 4).axes
    assert "12% of its 16" in left.get_title()
    assert "94% of its 16" in right.get_title()  # all but the tall one
    lost, kept = (line for line in right.lines if line.get_marker() == "o")
    assert list(kept.get_xdata()) == [3]
    assert np.abs(lost.get_ydata()).max() < 0.5
    assert left.get_ylim() == right.get_ylim()


def test_both_errors_are_drawn_in_per_cent():
    table = pd.DataFrame({"activations": [0.2, 0.1], "weights": [0.01, 0.02]}, index=[0.0, 1.0])
    axis = plot_parts.over_alpha({"down": table}, {"down": {"activations": 0.15, "weights": 0.01}}).axes[0]
    by_name = {line.get_label(): line for line in axis.lines}
    assert list(by_name["activations"].get_ydata()) == pytest.approx([20, 10])
    assert list(by_name["weights"].get_ydata()) == pytest.approx([1, 2])
    assert [line.get_ydata()[0] for line in axis.lines if line.get_marker() == "D"] == pytest.approx([15, 1])


def test_bits_and_seeds_are_where_they_belong():
    lines = {"activations": {8: 0.01, 4: 0.4}, "weights": {4: 0.6, 2: 9.0}}
    axis = plot_parts.bits_curve(lines, "y", 7.7).axes[0]
    assert [list(line.get_xdata()) for line in axis.lines if line.get_marker() == "o"] == [[4, 8], [2, 4]]
    assert {text.get_text() for text in axis.texts} == {"0.01", "0.40", "0.60", "9.00"}
    assert axis.get_ylim()[1] == pytest.approx(1.15 * 0.6)  # what is worse than guessing does not stretch the axis
    (mark,) = (line for line in axis.lines if line.get_marker() == "^")
    assert mark.get_xdata() == pytest.approx([2], abs=0.1)  # another part's mark stands beside it
    below = plot_parts.bits_curve({"weights": {4: -0.1, 2: 0.1}}, "y", -0.2).axes[0]  # FP is worse than guessing
    assert below.get_ylim()[0] < -0.1 < 0.1 < below.get_ylim()[1]
    dots, mean, *_ = plot_parts.strip({"JointQuant": [0.4, 0.6]}, "x").axes[0].lines
    assert list(dots.get_xdata()) == [0.4, 0.6]
    assert mean.get_xdata()[0] == pytest.approx(0.5)


def test_efforts_are_a_line_per_method_with_its_minutes_at_each_point():
    table = pd.DataFrame({"label": ["best", "best", "peer"], "tokens": [100, 400, 100], "value": [0.6, 0.7, 0.2],
                          "low": [0.5, 0.6, 0.1], "high": [0.7, 0.8, 0.3], "minutes": [5.2, 21.0, 3.0]})  # fmt: skip
    figure = plot_parts.efforts(table.iloc[::-1])
    axis = figure.axes[0]
    shares = [list(container.lines[0].get_ydata()) for container in axis.containers]
    assert shares == [pytest.approx([20.0]), pytest.approx([60.0, 70.0])]
    peer, best = (container.lines[0].get_xdata() for container in axis.containers)
    assert peer[0] == best[0] == 100  # where they are
    assert [text.get_text() for text in axis.texts] == ["3 min", "5 min", "21 min"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["100", "400"]
