"""The hash of the code that makes an artifact: what changes it, and what does not."""

import importlib
import linecache
import sys

import pytest

import jqlib
from jqlib import code
from jqlib.calibration import activations_step, r1_output_step, r1_step, r2_step, smooth_step, transforms_step
from jqlib.code import code_of, imported
from jqlib.pipeline import evaluation_step, fp_hidden_step, tuned_step, weights_step

STEPS = '''"""A module of steps."""
from jqlib.made_up_tools import tool

LIMIT = 3


def other_step(config):
    return "one"


def unused(x):
    return x


def helper(x):
    """Doc."""
    return x + LIMIT


def a_step(config):
    """Doc."""

    def make(s):
        return helper(tool(s.unused)), other_step(s)

    return make
'''
TOOLS = '"""Tools."""\n\n\nclass Tool:\n    """Doc."""\n\n    size = 2\n\n\ndef tool(x):\n    return Tool.size * x\n'


@pytest.fixture
def hash_of(tmp_path, monkeypatch):
    """``hash_of(steps, tools)``: of `a_step`, in a module of jqlib that imports from another."""
    names = ("made_up_steps", "made_up_tools")
    monkeypatch.setattr(jqlib, "__path__", [*jqlib.__path__, str(tmp_path)])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def forget():
        for name in names:
            sys.modules.pop(f"jqlib.{name}", None)
            vars(jqlib).pop(name, None)
        importlib.invalidate_caches()
        linecache.clearcache()
        imported.cache_clear()
        code._plain_module.cache_clear()

    def of(*sources: str) -> str:
        forget()
        for name, source in zip(names, sources, strict=True):
            (tmp_path / f"{name}.py").write_text(source)
        return code_of(importlib.import_module("jqlib.made_up_steps").a_step)

    yield of
    forget()


@pytest.mark.parametrize(("old", "new"), [
    ('"""A module of steps."""', '"""Another text."""'),
    ('"""Doc."""', '"""Another text."""'),
    ('    """Doc."""\n', ""),
    ("LIMIT = 3", "LIMIT = 3  # a comment"),
    ("helper(tool(s.unused)), other_step(s)", "(\n            helper(tool(s.unused)), other_step(s)\n        )"),
    ('return "one"', 'return "two"'),  # of another step
    ("    return x\n\n\ndef helper", "    return -x\n\n\ndef helper"),  # an attribute's name is no use of it
])  # fmt: skip
def test_what_does_not_change_the_hash(hash_of, old, new):
    assert old in STEPS
    assert hash_of(STEPS.replace(old, new), TOOLS) == hash_of(STEPS, TOOLS)
    assert hash_of(STEPS, TOOLS.replace('"""Doc."""', '"""Text."""  # a comment')) == hash_of(STEPS, TOOLS)


@pytest.mark.parametrize(("old", "new"), [
    ("helper(tool(s.unused))", "helper(tool(-s.unused))"),
    ("x + LIMIT", "x - LIMIT"),  # of a function of its module that it uses
    ("LIMIT = 3", "LIMIT = 4"),
])  # fmt: skip
def test_what_changes_the_hash(hash_of, old, new):
    assert old in STEPS
    assert hash_of(STEPS.replace(old, new), TOOLS) != hash_of(STEPS, TOOLS)


def test_what_is_imported_changes_the_hash(hash_of):
    assert hash_of(STEPS, TOOLS.replace("size = 2", "size = 3")) != hash_of(STEPS, TOOLS)


def test_modules_are_found_through_others():
    found = imported("jqlib.learn.activations")
    assert {"jqlib.learn.activations", "jqlib.model.walk", "jqlib.model.families"} <= found
    assert "jqlib.learn.solver" not in found
    assert {"jqlib.learn.solver", "jqlib.learn.objectives"} <= imported("jqlib.learn.rotations")
    assert "jqlib.learn.baselines" in imported("jqlib.learn.rotations")  # by ``from jqlib.learn import baselines``


STEPS_OF_A_RUN = (activations_step, r1_step, r1_output_step, r2_step, smooth_step, transforms_step, weights_step,
                  tuned_step, evaluation_step, fp_hidden_step)  # fmt: skip


@pytest.mark.parametrize(("module", "whose"), [
    ("jqlib.learn.solver", {r1_step, r2_step}),
    ("jqlib.learn.fisher", {r1_output_step}),
    ("jqlib.learn.refine", {r1_output_step, transforms_step}),
    ("jqlib.quant.gptq", {weights_step, tuned_step, evaluation_step}),  # the last two round too, by quant.quantize
    ("jqlib.learn.layerwise", {weights_step}),
    ("jqlib.learn.tune", {tuned_step}),
    ("jqlib.model.evaluate", {evaluation_step, fp_hidden_step}),
    ("jqlib.model.families", set(STEPS_OF_A_RUN)),
    ("jqlib.lab.plots", set()),
])  # fmt: skip
def test_a_module_belongs_to_the_steps_that_import_from_it(monkeypatch, module, whose):
    before = {step: code_of.__wrapped__(step) for step in STEPS_OF_A_RUN}
    plain = code._plain_module
    monkeypatch.setattr(code, "_plain_module", lambda name: plain(name) + " and more" * (name == module))
    moved = {step.__name__ for step in STEPS_OF_A_RUN if code_of.__wrapped__(step) != before[step]}
    assert moved == {step.__name__ for step in whose}
