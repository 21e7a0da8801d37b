"""The explorer follows its controls, shows the right numbers, and is a still picture where nobody can move it."""

import sys

import numpy as np
import pytest
import torch

from jqlib.lab import explore
from jqlib.lab.geodesic import Geodesic, film
from jqlib.learn.rotations import initial_rotation
from jqlib.transform.grids import quantize_activation, rounding_error
from jqlib.transform.hadamard import random_hadamard


@pytest.fixture
def ingredients():
    G = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 50, 16, generator=G)
    x[..., 5] *= 20
    acts = {site: dict(enumerate(layers)) for site, layers in zip(("qkv", "ug"), x, strict=True)}
    acts["down"] = dict(enumerate(torch.randn(3, 50, 32, generator=G)))
    narrow, wide = random_hadamard(16, 0), random_hadamard(32, 0)
    return acts, {"none": None, "Hadamard": narrow, "wide": wide}, [f"word{i}" for i in range(50)]


@pytest.fixture
def live(ingredients):
    return explore.Explorer(explore.Choice(*ingredients), 4)


def titles(live) -> list[str]:
    return [live.figure.layout.annotations[side].text for side in (0, 1)]


def test_the_figure_follows_the_controls(live, ingredients):
    acts, rotations, _ = ingredients
    live.site.value, live.layer.value, live.bits.value, live.token.value = "ug", 2, 3, 7
    for y, side in ((acts["ug"][2], 0), (acts["ug"][2] @ rotations["Hadamard"], 1)):
        errors = live.figure.data[side]
        assert errors.name.endswith(f"mean {100 * rounding_error(y, 3):.2f}%")
        rounded = quantize_activation(y, 3)
        error = (rounded - y).square().sum(1) / y.square().sum(1)
        np.testing.assert_allclose(errors.y, 100 * error, rtol=1e-5)
        assert titles(live)[side].endswith(f"{(rounded[7] == 0).float().mean():.0%} become 0, error {error[7]:.2%}")
        grid, zeros, kept = live.figure.data[4 + 3 * side : 7 + 3 * side]
        assert zeros.x.tolist() == (rounded[7] == 0).nonzero().flatten().tolist()
        np.testing.assert_allclose(kept.y, y[7][rounded[7] != 0])
        points = np.unique(np.asarray(grid.y))
        assert len(points) == 8
        assert np.abs(rounded[7].numpy()[:, None] - points).min(1).max() < 1e-5  # what is seen is on the grid drawn


def test_a_click_chooses_a_token(live):
    class Points:
        point_inds = (31,)

    live._click(live.figure.data[0], Points, None)
    assert live.token.value == 31
    assert list(live.figure.data[2].x) == [31]
    assert "<b>word31</b>" in live.context.value


def test_sides_share_an_axis_and_a_zoom_stays(live):
    most = live.figure.layout.yaxis2.range[1]
    assert live.figure.layout.yaxis3.matches == "y2"
    live.figure.layout.yaxis2.range = (-1, 1)
    live.bits.value = 5
    live.way.value = 10
    assert live.figure.layout.yaxis2.range == (-1, 1)
    live.token.value += 1
    assert live.figure.layout.yaxis2.range[1] != most
    assert live.figure.layout.yaxis2.range[1] > 1


def test_a_site_offers_the_rotations_of_its_width(live):
    assert live.right.options == ("none", "Hadamard")
    drawn = []
    live.context.observe(drawn.append, "value")
    live.site.value = "down"
    assert live.right.options == ("none", "wide")
    assert (live.left.value, live.right.value) == ("none", "wide")
    assert titles(live)[1].startswith("wide: ")
    live.left.value, live.site.value = "wide", "qkv"
    assert (live.left.value, live.right.value) == ("none", "Hadamard")


def test_rotations_may_be_those_of_each_site(ingredients):
    acts, rotations, words = ingredients
    each = {site: {"none": None} for site in acts} | {"ug": {"none": None, "R": rotations["Hadamard"]}}
    choice = explore.Choice(acts, each, words)
    assert [list(names) for names in choice.rotations.values()] == [["none"], ["none", "R"], ["none"]]


def test_back_is_where_it_was(live):
    start = titles(live), live.figure.data[1].y.copy(), live.figure.data[1].marker.color
    live.right.value = "none"
    assert titles(live)[0] == titles(live)[1]
    assert live.figure.data[1].marker.color == live.figure.data[0].marker.color != start[2]
    live.right.value, live.way.value = "Hadamard", 0
    assert titles(live)[1].startswith("Hadamard, 0% of the way: ")
    np.testing.assert_allclose(live.figure.data[1].y, live.figure.data[0].y, rtol=1e-3)
    live.way.value = explore.STEPS
    assert (titles(live), live.figure.data[1].marker.color) == (start[0], start[2])
    assert (live.figure.data[1].y == start[1]).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_way_to_a_rotation(sign):
    """From I, by orthogonal matrices, in equal steps, to R; one column's sign apart where no path leads."""
    R = random_hadamard(48, 3)
    R[:, 0] *= sign * torch.linalg.det(R).sign()
    path, one = Geodesic(R), torch.eye(48)
    assert path.flipped == (sign < 0)
    end = R.clone()
    end[:, -1] *= sign
    torch.testing.assert_close(path.of(one, 0.0), one, rtol=0, atol=1e-5)
    torch.testing.assert_close(path.of(one, 1.0), end, rtol=0, atol=1e-5)
    third = path.of(one, 1 / 3)
    torch.testing.assert_close(third @ third.T, one, rtol=0, atol=1e-5)
    torch.testing.assert_close(third @ third @ third, end, rtol=0, atol=1e-5)


def test_a_rotation_that_is_a_reflection_twice():
    """Eigenvalues −1 are turned in pairs."""
    R = torch.diag(torch.tensor([1.0, -1, 1, -1]))
    half = Geodesic(R).of(torch.eye(4), 0.5)
    torch.testing.assert_close(half @ half, R, rtol=0, atol=1e-6)


def test_planes_that_turn_by_the_same_angle():
    """Also by angles that differ by less than can be told from their cosines."""

    def turned(angles):
        blocks = [torch.tensor([[a.cos(), -a.sin()], [a.sin(), a.cos()]]) for a in angles]
        return Z @ torch.block_diag(*blocks) @ Z.T

    angles = torch.tensor([0.3, 0.3, 0.3, 2.0, 2.0, 1e-4, 2e-4, -0.3])
    Z = initial_rotation(2 * len(angles), "random", 0)
    path = Geodesic(turned(angles))
    torch.testing.assert_close(path.of(torch.eye(len(Z)), 0.5), turned(angles / 2), rtol=0, atol=1e-5)


def test_the_film_ends_where_it_says(tmp_path):
    from PIL import Image

    x = torch.randn(64)
    x[3] = 20
    film(x, random_hadamard(64, 0), 4, tmp_path / "film.gif", frames=5)
    with Image.open(tmp_path / "film.gif") as picture:
        assert picture.size[0] == 750
        first = np.asarray(picture.convert("L"), dtype=float)
        picture.seek(picture.n_frames - 1)
        assert np.abs(np.asarray(picture.convert("L"), dtype=float) - first).mean() > 1


def test_headless_shows_none_beside_the_last(ingredients, monkeypatch):
    shown = []
    monkeypatch.setattr(explore, "display", shown.append)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert explore.explorer(*ingredients) is None
    top, left, right = shown[-1].axes
    assert left.get_ylim() == right.get_ylim()
    y = ingredients[0]["qkv"][1]
    labels = [text.get_text() for text in top.get_legend().get_texts()]
    R = ingredients[1]["Hadamard"]
    assert labels == [f"none: mean {rounding_error(y, 4):.2%}", f"Hadamard: mean {rounding_error(y @ R, 4):.2%}"]
    monkeypatch.setenv("JPY_SESSION_NAME", "notebook.ipynb")
    live = explore.explorer(*ingredients)
    assert shown[-1] is live.controls
    assert explore.explorer(*ingredients, live=False) is None
    monkeypatch.delenv("JPY_SESSION_NAME")
    live = explore.explorer(*ingredients, live=True)
    assert shown[-1] is live.controls


def test_vscode_and_colab_are_known(monkeypatch):
    class Shell:
        user_ns = {"__vsc_ipynb_file__": "a.ipynb"}  # noqa: RUF012

    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert not explore.is_open()
    monkeypatch.setattr(explore, "get_ipython", Shell)
    assert explore.is_open()
    monkeypatch.setattr(explore, "get_ipython", lambda: None)
    monkeypatch.setitem(sys.modules, "google.colab", None)
    assert explore.is_open()


def test_words_of_any_kind(ingredients):
    """Dollars are no formula, tags are text, and long words are cut."""
    acts, rotations, _ = ingredients
    words = ["$x^$\n<b>is no formula"] * 50
    choice = explore.Choice(acts, rotations, words)
    live = explore.Explorer(choice, 4)
    assert live.figure.data[0].text[0] == "&#x27;$x^$\\n&lt;b&gt;is no formula&#x27;"
    assert "<b>is" not in live.context.value
    sides = {name: (torch.ones(50), np.arange(4.0)) for name in ("none", "Hadamard")}
    figure = explore.tokens.explored(sides, words, 3, 4)
    figure.draw_without_rendering()
    assert figure.axes[0].get_title().endswith(r"token 3, '$x^$\n<b>is …'")
