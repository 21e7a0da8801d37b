"""The explorer follows its controls, shows the right numbers, and is a still picture where nobody can move it."""

import pytest
import torch

from jqlib.lab import explore
from jqlib.transform.grids import quantize_activation, rounding_error
from jqlib.transform.hadamard import random_hadamard


@pytest.fixture
def ingredients():
    x = torch.randn(2, 3, 50, 16)
    x[..., 5] *= 20
    acts = {site: dict(enumerate(layers)) for site, layers in zip(("qkv", "ug"), x, strict=True)}
    return acts, {"none": None, "Hadamard": random_hadamard(16, 0)}, [f"word{i}" for i in range(50)]


def title(explorer) -> str:
    return explorer.picture().get_suptitle()


def test_the_picture_follows_the_controls(ingredients):
    acts, rotations, words = ingredients
    live = explore.Explorer(acts, rotations, words, 4)
    live.site.value, live.layer.value, live.bits.value, live.rotation.value = "ug", 2, 3, "none"
    assert f"mean 3-bit rounding error {rounding_error(acts['ug'][2], 3):.3%}" in title(live)
    live.rotation.value = "Hadamard"
    y = acts["ug"][2] @ rotations["Hadamard"]
    assert f"rounding error {rounding_error(y, 3):.3%}" in title(live)
    (*_, worst) = [label.get_text() for label in live.picture().axes[2].get_yticklabels()]
    error = (quantize_activation(y, 3) - y).square().sum(1) / y.square().sum(1)
    assert worst == f"{error.argmax()}: 'word{error.argmax()}'"


def test_every_move_draws_once(ingredients):
    live, drawn = explore.Explorer(*ingredients, 4), []
    first = bytes(live.image.value)
    assert first.startswith(b"\x89PNG")
    live.image.observe(lambda change: drawn.append(bytes(change.new)), "value")
    live.bits.value = 5
    live.layer.value = 0
    assert len({first, *drawn}) == 3
    live.bits.value = 4
    live.layer.value = 1
    assert len(drawn) == 4
    assert drawn[-1] == first


def test_words_of_any_kind_fit_beside_their_bars(ingredients):
    """Dollars are no formula, a line break no new line, and long words are cut."""
    acts, rotations, _ = ingredients
    figure = explore.Explorer(acts, rotations, ["$x^$\n is no formula"] * 50, 4).picture()
    figure.draw_without_rendering()
    for label in figure.axes[2].get_yticklabels():
        assert label.get_text().endswith(r": '$x^$\n is no…'")
        assert label.get_window_extent().x0 > figure.axes[1].get_window_extent().x1


def test_headless_shows_one_still_picture(ingredients, monkeypatch):
    shown = []
    monkeypatch.setattr(explore, "display", shown.append)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    live = explore.explorer(*ingredients)
    assert shown[-1].get_suptitle() == title(live)
    monkeypatch.setenv("JPY_SESSION_NAME", "notebook.ipynb")
    live = explore.explorer(*ingredients)
    assert shown[-1] is live.controls
