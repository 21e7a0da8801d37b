"""Which rows notebook 05 makes, by profile, by size, by name."""

import pytest

from jqlib.config import PROFILES, make_config
from jqlib.lab import rows
from jqlib.recipes import RECIPES


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setattr(rows, "is_large", lambda model: model == "large")
    return lambda model="smollm2-135m", **more: make_config({"model": model, "profile": "quick"} | more)


def test_by_profile(config):
    assert rows.methods(config()) == [m for m in RECIPES if m in rows.FEW]
    assert rows.methods(config(profile="full")) == [name for name in RECIPES if name != "deploy"]
    assert {*RECIPES} - {*rows.methods(config(profile="standard"))} == {"quarot-learned", "dartquant-r2", "deploy"}
    assert (config(recipe="deploy"), "deploy", 4, 8) in rows.plan(config(recipe="deploy"))


def test_a_large_model_gets_few_unless_more_are_named(config):
    assert rows.methods(config("large", profile="full")) == [
        "rtn",
        "quarot",
        "quarot-best",
        "jointquant",
        "jointquant-best",
    ]
    found = rows.methods(config("large", recipes="control, dartquant"))
    assert found == ["rtn", "quarot", "quarot-best", "dartquant", "control"]
    assert "smoothquant" in rows.methods(config("large", recipe="smoothquant"))


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("bits", [(4, 4), (16, 4), (4, 16)])
def test_no_row_comes_twice_and_those_of_a_method_stand_together(config, profile, bits):
    found = rows.plan(config(profile=profile, w_bits=bits[0], a_bits=bits[1]))
    assert len({*found}) == len(found)
    order = [row[1] for row in found]
    assert order == sorted(order, key=list(RECIPES).index)
    assert {row[1] for row in found if row[2:] == bits} == {*rows.methods(config(profile=profile))}


def test_what_the_notebook_compares_is_there(config):
    for more in ({}, {"profile": "full"}, {"recipes": "rtn"}):
        found = {row[1:] for row in rows.plan(config(**more))}
        assert {(m, 4, 4) for m in rows.BASE} <= found
        assert {(m, 16, 4) for m in ("rtn", "quarot")} | {(m, 4, 16) for m in ("rtn", "quarot")} <= found


def test_size_is_that_of_the_model():
    assert not rows.is_large("smollm2-135m")
