"""Notebook 05's figures show what they are given."""

import pandas as pd
from matplotlib.colors import to_rgba

from jqlib.lab import plot_results
from jqlib.lab.style import colour_of


def test_rows_without_an_interval_or_below_fp_are_drawn():
    table = pd.DataFrame({"name": ["a", "b", "c (long)"], "kind": ["x", "x", "y"]}).assign(
        gap=[0.5, -0.01, 4.0], gap_low=[None, -0.02, 3.0], gap_high=[None, 0.01, 5.0],
        kl=[0.4, 0.02, 0.3], kl_low=[None, 0.01, 0.2], kl_high=[None, 0.03, 0.4],
    )  # fmt: skip
    left, right = plot_results.fidelity(table, "name", "kind").axes
    assert [text.get_text() for text in left.texts] == ["-0.01", "0.50", "4.00", " x", " y"]  # the best at the top
    assert [text.get_text() for text in right.texts] == ["0.02", "0.40", "0.30"]
    assert [text.get_text() for text in left.get_yticklabels()] == ["b", "a", "c"]
    assert left.get_xlim()[1] < 1  # 4.00 is broken off: it doesn't squeeze the others
    assert left.get_xscale() == right.get_xscale() == "linear"


def test_a_road_says_every_step_and_what_is_left():
    costs = {"RTN": 4.0, "QuaRot": 1.2, "GPTQ": 0.6, "worse": 0.62, "best": 0.2}
    figure = plot_results.road(costs, "x", luck=0.03, closed="66%", since="GPTQ", beside={"Control": 0.3})
    said = [text.get_text().strip() for text in figure.axes[0].texts]
    assert said == ["4.00", "1.20", "−2.800", "0.60", "−0.600", "0.62", "+0.020", "0.20", "−0.420", "0.30", "", "66%"]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [*costs, "Control"]
    assert figure.axes[0].get_xscale() == "linear"
    bars = {round(bar.get_width(), 2): bar.get_alpha() for bar in figure.axes[0].patches if bar.get_alpha()}
    assert bars[-0.02] < bars[0.6]  # within luck: pale


def test_a_road_may_go_below_fp():
    figure = plot_results.road({"RTN": 0.001, "best": -0.01}, "x")
    assert figure.axes[0].get_xlim()[0] < -0.01


def test_lines_have_their_methods_colours():
    figure = plot_results.over_depth({"first": {"RTN": [0.1, 0.2]}, "others": {"RTN": [0.3, 0.4]}})
    assert [axis.lines[0].get_color() for axis in figure.axes] == [colour_of("RTN")] * 2


def test_words_have_the_colour_of_what_they_cost_and_stand_in_lines():
    words = ["$x$", " a\n", " 中", *["word "] * 60]
    figure = plot_results.coloured_text(words, {"RTN": [9.0, -2.0, 0.0, *[1.0] * 60]})
    texts = {text.get_text(): text for text in figure.axes[0].texts}
    assert {"$x$", " a⏎ ", " □", "RTN"} <= texts.keys()  # letters that the font has not are boxes, formulas are text
    dearer, cheaper, same = figure.axes[0].patches[:3]
    assert dearer.get_facecolor() == to_rgba(plot_results.DEARER, 0.85)  # beyond the scale: its end
    assert cheaper.get_facecolor() == to_rgba(plot_results.CHEAPER, 0.425)
    assert same.get_alpha() == 0
    ends = [patch.get_x() + patch.get_width() for patch in figure.axes[0].patches]
    assert max(ends) <= plot_results.COLUMNS
    assert len({patch.get_y() for patch in figure.axes[0].patches}) == 4
