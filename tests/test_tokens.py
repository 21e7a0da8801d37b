"""Figures of single tokens tell the truth about them, wherever they are saved to."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from jqlib import store
from jqlib.config import make_config
from jqlib.lab import sites
from jqlib.lab import tokens as figures
from jqlib.transform.grids import quantize_activation
from jqlib.transform.hadamard import random_hadamard


def test_what_ordinary_channels_lose():
    """All of it beside eight giants, as those of one token are; nothing where all numbers are on the grid."""
    x = torch.full((2, 64), 0.1)
    x[0, :8] = 100.0
    x[1] = torch.arange(64) % 16
    assert figures.ordinary_loss(x, None, 4).tolist() == [1, 0]
    R = random_hadamard(64, 0)
    y = x @ R
    back = quantize_activation(y, 4) @ R.T
    expected = ((back - x)[0, 8:].square().sum() / x[0, 8:].square().sum()).item()
    assert figures.ordinary_loss(x, R, 4)[0].item() == pytest.approx(expected, rel=1e-3)


def test_the_grid_that_is_drawn_is_the_quantisers():
    token = torch.randn(200, generator=torch.Generator().manual_seed(0))
    token[3] = 9
    points = figures.levels(token.numpy(), 4)
    rounded = quantize_activation(token[None], 4)[0].numpy()
    assert len(points) == 16
    assert np.abs(rounded[:, None] - points).min(1).max() < 1e-6
    assert (figures.zeroed(token.numpy(), 4) == (rounded == 0)).all()
    assert len(figures.levels(token.numpy(), 8)) == len(figures.levels(np.zeros(4), 4)) == 0  # too fine, none


def test_the_hero_counts_zeros_on_one_axis():
    token = torch.linspace(-0.3, 0.3, 64)
    token[5] = 30
    figure = figures.one_token(token, random_hadamard(64, 0))
    far, far_rotated, near, near_rotated = figure.axes
    assert far.get_title().startswith("as it is: 63 of 64 numbers become 0 (98%)")
    assert far.get_ylim() == far_rotated.get_ylim()
    assert near.get_ylim() == near_rotated.get_ylim()


def test_a_figure_is_saved_whole_with_where_it_is_from(tmp_path):
    """At 200 dpi, its legend still below its axes, and not over the note."""
    config = make_config({"model": "smollm2-135m", "profile": "quick", "output_dir": str(tmp_path)})
    table = pd.DataFrame({"qkv": [0.1, 0.2], "down": [0.3, 0.1]})
    figure = sites.dumbbells(table, table / 9, 0.015, "error (%)")
    store.save_figure(config, figure, "a")
    with Image.open(config.folder / "figures" / "a.png") as picture:
        assert picture.size[0] > 1400
    (note,), (legend,), (axis,) = figure.texts, figure.legends, figure.axes
    assert note.get_text() == "smollm2-135m · quick · calibrated on 4 × 512 tokens, evaluated on 8 × 512"
    boxes = [part.get_tightbbox() for part in (axis, legend, note)]
    assert all(upper.y0 >= lower.y1 - 1 for upper, lower in pairwise(boxes))
    store.save_figure(config, other := sites.dumbbells(table, table, 0.015, "error (%)"), "b", note="one token")
    assert [text.get_text() for text in other.texts] == ["one token"]


def test_errors_of_nothing_are_drawn():
    """At 16 bits nothing is rounded."""
    table = pd.DataFrame({"qkv": [0.0, 0.0]})
    sites.dumbbells(table, table, 1e-9, "error (%)").draw_without_rendering()
