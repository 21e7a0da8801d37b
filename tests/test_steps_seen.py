"""GPTQ on one layer, and what tuning learns and moves, from near."""

from copy import deepcopy

import pytest
import torch

from jqlib import quantize_model
from jqlib.lab.steps_seen import Watched, moved, rounded_two_ways, same_codes
from jqlib.learn.lessons import teach
from jqlib.learn.steps import Steps
from jqlib.learn.tune import tune
from jqlib.model.families import norms_of
from jqlib.quant.packed import rounded_linears


def test_gptq_moves_weights_further_and_outputs_less(tiny_model, tokens):
    model, windows = tiny_model(), tokens(4, 48)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    table = rounded_two_ways(model, windows, 1, bits=3, groupsize=16).set_index(["site", "rounded by"])
    assert list(table.index.levels[0]) == ["down", "o", "qkv", "ug"]
    nearest, gptq = table.xs("RTN", level=1), table.xs("GPTQ", level=1)
    assert (gptq.output < nearest.output).all()
    assert (gptq.weights > nearest.weights).all()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_the_output_error_is_that_of_the_outputs(tiny_model, tokens):
    from jqlib.model.families import sites_of
    from jqlib.model.walk import walk
    from jqlib.transform.grids import quantize_weight

    model, windows = tiny_model(), tokens(2, 24)
    table = rounded_two_ways(model, windows, 0, bits=3, groupsize=16)
    place = next(iter(sites_of(model).values()))
    step = next(walk(model, windows))
    x = step.inputs(step.hidden, {place.name.removeprefix(f"{step.name}."): "x"})["x"]
    W = place.weight
    relative = (x @ (quantize_weight(W, 3, 16) - W).T).norm() / (x @ W.T).norm()
    assert table.output[0] == pytest.approx(relative.item(), rel=1e-4)


@pytest.fixture
def tuned(tiny_model, tokens):
    """A rounded model, the same tuned, and the lessons that it was watched at."""
    windows = tokens(6, 16)
    watched = Watched(teach(tiny_model(), windows))
    before = tiny_model()
    quantize_model(before, w_bits=4, a_bits=4, w_groupsize=16)
    after = deepcopy(before)
    tune(after, watched, Steps(count=6, tokens=32))
    return before, after, watched


def test_every_loss_of_tuning_is_seen(tuned):
    before, after, watched = tuned
    assert len(watched.losses) == 6
    first, loss = watched.losses[0]
    with torch.inference_mode():
        assert watched.lessons.loss(before, first).item() == pytest.approx(loss, rel=1e-5)
        assert watched.lessons.loss(after, first).item() < loss


def test_tuning_leaves_the_integers(tuned):
    before, after, _ = tuned
    assert same_codes(before, after)
    rounded_linears(after)["model.layers.1.mlp.up_proj"].weight.data[3, 5] += 1
    assert not same_codes(before, after)


def test_what_moved_is_told_kind_by_kind(tuned):
    before, _, _ = tuned
    other = deepcopy(before)
    next(iter(norms_of(other).values())).weight.data *= 1.5
    table = moved(before, other)
    assert table.loc["scales of weight groups", "largest"] == table.loc["clips", "largest"] == 0
    assert table.loc["gains of norms", "largest"] == pytest.approx(0.5, rel=1e-5)
    assert table.numbers.tolist() == [
        sum(linear.grid.scale.numel() for linear in rounded_linears(before).values()), 5 * 48, 8]  # fmt: skip
