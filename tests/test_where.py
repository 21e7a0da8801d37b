"""Where the loss of a rounded model arises."""

from copy import deepcopy

import pytest
import torch

from jqlib import quantize_model
from jqlib.lab.where import one_at_a_time, passage
from jqlib.model.evaluate import read_window
from jqlib.model.families import sites_of
from jqlib.transform.grids import OFF
from jqlib.transform.install import standing


def test_a_model_is_no_way_off_itself(tiny_model, tokens):
    found = passage(tiny_model(), tiny_model(), tokens())
    assert found.off.shape == (2, 2, 24)
    assert not found.off.any()
    assert torch.equal(found.nll, found.exact)


def test_a_passage_is_what_both_models_make_of_the_windows(tiny_model, tokens):
    exact, windows = tiny_model(), tokens(2, 24)
    model = deepcopy(exact)
    quantize_model(model, w_bits=4, a_bits=4, w_groupsize=16)
    found = passage(model, exact, windows)
    states = [it(windows, output_hidden_states=True).hidden_states[1] for it in (model, exact)]  # behind the first
    torch.testing.assert_close(found.off[0], (states[0] - states[1]).norm(dim=-1) / states[1].norm(dim=-1))
    torch.testing.assert_close(found.length[0], states[1].norm(dim=-1))
    for nll, it in ((found.nll, model), (found.exact, exact)):
        assert nll[1].mean().item() == pytest.approx(read_window(it, windows[1])[0], rel=1e-5)


def test_one_site_at_a_time_costs_what_that_site_costs(tiny_model, tokens):
    exact, windows = tiny_model(), tokens(2, 24)
    model = deepcopy(exact)
    quantize_model(model, w_bits=16, a_bits=3)
    table = one_at_a_time(model, windows)
    assert table.shape == (2, 4)
    assert (table > 0).all(axis=None)
    assert all(transform.grid.bits == OFF for transform in standing(model).values())
    name = next(name for name, place in sites_of(model).items() if (place.layer, place.kind) == (1, "down"))
    standing(model)[name].grid.bits = 3
    found, expected = (it(windows).logits.log_softmax(-1) for it in (model, exact))
    kl = (expected.exp() * (expected - found)).sum(-1).mean().item()
    assert table.loc[1, "down"] == pytest.approx(kl, rel=1e-3)
