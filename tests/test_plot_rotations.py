"""Figures of notebooks 02 and 03 show the numbers that they are given."""

import math

import numpy as np
import pandas as pd
import pytest

from jqlib.lab import plot_rotations
from jqlib.lab.plot_rotations import lowest_so_far


def steps(*losses):
    return [{"seconds": 0.1 * i, "loss": loss} for i, loss in enumerate(losses)]


def test_curves_of_the_race_only_fall_and_the_ring_is_what_is_returned():
    """Some solvers record every step, others new lows: shown alike. What greedy returns may be above its lowest."""
    rising = steps(200.0, 120.0, 160.0)
    assert lowest_so_far(rising) == [200, 120, 120]
    axis = plot_rotations.race({"greedy": rising, "joint": steps(200.0, 100.0, 90.0)}, "whip").axes[0]
    greedy, ring, joint, _ = axis.lines
    assert list(greedy.get_ydata()) == pytest.approx([0, -40, -40])
    assert list(ring.get_ydata()) == pytest.approx([-20])
    assert list(joint.get_ydata()) == pytest.approx([0, -50, -55])
    assert axis.get_ylim()[1] > 0  # from the start down: no fall is made a cliff


@pytest.mark.parametrize("bits", [3, 4])
def test_the_law_is_that_of_uniform_noise(bits):
    sites = pd.DataFrame({"rotation": ["a", "b"], "width": [10.0, 40.0], "kurtosis": [2.0, 3.0], "error": [0.01, 0.02]})
    left, right = plot_rotations.laws(sites, bits).axes
    x, y = left.lines[-1].get_data()
    assert y[-1] / x[-1] == pytest.approx(100 / (12 * (2**bits - 1) ** 2))
    assert [line.get_ydata()[0] for line in right.lines] == [1.0, 2.0]  # per cent


def test_kurtosis_before_stands_on_the_left_alone():
    left, right = plot_rotations.kurtosis_by_layer([90.0, 80.0], {"Hadamard": [2.8, 2.7], "joint": [1.5, 1.4]}).axes
    assert [list(line.get_ydata()) for line in left.lines[:2]] == [[90, 80], [2.8, 2.7]]
    assert [line.get_label() for line in right.lines] == ["Hadamard", "joint", "a Gaussian's"]


def test_directions_are_in_units_of_an_even_spread():
    part = np.array([[0.5, 0.5, 0.5, 0.5], [0.5, -0.5, 0.5, -0.5]])
    x, y = plot_rotations.directions({"a": part}).axes[0].lines[0].get_data()
    assert list(x) == [1, 1, 1, 1]
    assert list(y) == [1, -1, 1, -1]


def test_a_difference_without_an_interval_is_drawn():
    axis = plot_rotations.differences({"nats": {"a": (0.1, math.nan, math.nan), "b": (-0.2, -0.3, -0.1)}}, "c").axes[0]
    assert [text.get_text() for text in axis.texts] == ["+0.100", "-0.200"]


def test_predicted_and_measured_share_an_axis():
    sites = pd.DataFrame({"kind": ["qkv", "ug"], "predicted": [0.001, 0.004], "measured": [0.002, 0.008]})
    totals = pd.DataFrame({"predicted": [0.2, 0.1], "measured": [0.3, 0.2]}, index=["Hadamard", "output"])
    for axis in plot_rotations.site_costs(sites, totals).axes:
        assert axis.get_xlim() == axis.get_ylim()
        (diagonal,) = [line for line in axis.lines if line.get_label() == "predicted = measured"]
        assert list(diagonal.get_xdata()) == list(diagonal.get_ydata())


def test_heads_below_the_diagonal_are_counted():
    before, after = np.array([[0.02, 0.01], [0.03, 0.04]]), np.array([[0.01, 0.02], [0.01, 0.01]])
    axis = plot_rotations.before_and_after({"R3": (before, after)}, "x", "y").axes[0]
    assert axis.get_title() == "R3\nlower in 75%"
    assert list(axis.lines[0].get_ydata()) == [1, 2, 1, 1]


def test_steps_stand_on_the_curve_of_the_first_loss():
    path = np.array([[0.0, 3.0], [90.0, 1.0]])
    top, below = plot_rotations.one_angle([0, 90, 180], {"whip": [3, 1, 3], "range": [4, 8, 4]}, {"proved": path}).axes
    assert [list(line.get_ydata()) for line in top.lines] == [[1, 1 / 3, 1], [0.5, 1, 0.5]]
    assert list(below.lines[0].get_ydata()) == [3, 1, 3]
    assert below.lines[1].get_label() == "proved: 1 steps"
