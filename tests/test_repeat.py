"""A result is repeated from its own record, and what moved is said."""

import json

import pytest

from jqlib.__main__ import main
from jqlib.config import make_config
from jqlib.lab import repeat
from jqlib.store import save_results


@pytest.fixture
def result(tmp_path, monkeypatch):
    """``result(first, second)``: the record of a run with some numbers; the notebook would now give others."""

    def make(first, second):
        config = make_config({"model": "smollm2-135m", "profile": "quick", "output_dir": str(tmp_path), "seed": 3})

        def run(parameters, only):
            assert (parameters["seed"], only) == (3, "02")
            save_results(make_config(parameters), "02_joint_r1", second)
            return 0

        monkeypatch.setattr(repeat, "run", run)
        return save_results(config, "02_joint_r1", first)

    return make


def test_equal_but_for_time_and_memory(result, capsys):
    path = result(
        {"ppl": 21.5, "rows": [{"kl": 0.1, "seconds": 3}]}, {"ppl": 21.5, "rows": [{"kl": 0.1, "seconds": 9}]}
    )
    assert main(["repeat", str(path)]) == 0
    assert capsys.readouterr().out.startswith("smollm2-135m, 02_joint_r1: 3 numbers, 0 differ")  # the seed is one


def test_what_moved_is_said(result):
    same, said = repeat.repeat(result({"ppl": 20.0, "gone": 1}, {"ppl": 21.0, "came": 1}))
    assert not same
    assert "ppl: 20, now 21 (5.0e-02)" in said
    assert "gone is no more" in said
    assert "came is new" in said


@pytest.mark.parametrize("content", ["", "[]", "{}", json.dumps({"config": {"nonesuch": 1}, "notebook": "02"})])
def test_what_is_no_result(tmp_path, capsys, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    assert main(["repeat", str(path)]) == 2
    assert f"{path} is no result of a notebook" in capsys.readouterr().err
