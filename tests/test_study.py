"""The study: its rows are what it says, it stops when told and goes on, and its shares are the tables'."""

from dataclasses import replace

import pytest

from jqlib import pipeline
from jqlib.lab import compare, study
from jqlib.model.questions import SETS
from jqlib.recipes import RECIPES


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Four rows, and four of questions, of numbers that are made up at once, and a file of its own."""
    made = []

    def evaluate(config, recipe, w_bits, a_bits):
        made.append((config.seed, recipe))
        level = 0.0 if recipe is None else 1.0 if recipe.label == RECIPES["quarot-best"].label else 0.25
        nll = [3.0 + level, 3.2 + level, 2.9 + level]
        return {"nll": nll, "kl_by_window": [level] * 3, "articles": [0, 1, 2], "ppl": 20.0, "kl": level, "top1": 0.7,
                "calibration_seconds": 60.0, "w_bits": w_bits, "a_bits": a_bits, "kv_bits": 16}  # fmt: skip

    def row_of(config, recipe, w_bits, a_bits, task, limit):
        made.append((task, recipe))
        right = "1101" if recipe is None else "1001"
        return {"task": task, "questions": 4, "chance": 0.25, "acc": 0.75, "acc_right": right, "acc_norm_right": right}

    whole = study.plan()

    def plan(device):
        task = next(iter(SETS)) if study.answers.installed() else None
        mine = [row for row in whole if row.method in ("fp", *study.DECIDING)]
        rows = [row for row in mine if row.config.eval_dataset is None and not row.task][:4]
        return rows + [replace(row, group="zero-shot", task=task) for row in rows if task]

    monkeypatch.setattr(study, "row_of", row_of)
    monkeypatch.setattr(study, "plan", plan)
    monkeypatch.setattr(study.Row, "key", lambda row: f"{row.label} {row.task}")
    monkeypatch.setattr(study, "PATH", tmp_path / "study.json")
    monkeypatch.setattr(pipeline, "evaluate", evaluate)
    monkeypatch.setattr(pipeline, "protocol", lambda config: {})
    return made


def test_the_plan_has_every_row_once_and_the_deciding_ones_for_every_seed():
    rows = study.plan()
    assert len({row.name for row in rows}) == len({row.key() for row in rows}) == len(rows)
    seeds = {(row.method, row.config.seed, row.config.eval_dataset) for row in rows}
    assert {(name, seed, text) for name in study.DECIDING for seed in range(3) for text in (None, "news")} <= seeds


def test_a_row_is_compared_with_one_of_its_seed_that_learned_from_as_many_tokens():
    def like(rows):
        return {(row.config.refine_steps * row.config.step_tokens, row.config.seed) for row in rows}

    best = like(row for row in study.plan() if row.method == "jointquant-best")
    assert like(row for row in study.plan() if row.group == "without") <= best
    assert len({tokens for tokens, _ in best}) == 3  # a curve


def test_leaving_one_part_out_changes_one_part():
    for label, recipe in study.WITHOUT.items():
        changed = {name for name in vars(recipe) if vars(recipe)[name] != vars(study.BEST)[name]}
        assert len(changed - {"refine"}) + ("refine" in changed and "smooth" not in changed) == 1, label


def test_peers_get_our_last_stages_in_rows_of_their_own():
    for name, recipe in study.LEARNED.items():
        assert replace(recipe, label=RECIPES[name].label, layerwise=False, tune=False) == RECIPES[name]


def test_it_stops_when_told_and_goes_on(small, monkeypatch):
    monkeypatch.setattr(study.answers, "installed", lambda: False)
    assert study.study(minutes=0) == 4
    assert study.study() == 0
    assert [row["method"] for row in study.kept()["rows"]] == ["fp", "quarot-best", "jointquant-best", "control"]
    assert study.kept()["left"] == 0


def test_another_machine_goes_on_and_other_code_makes_its_rows_again(small, monkeypatch):
    """The file is all that it needs: artifacts are not asked for."""
    monkeypatch.setattr(study.answers, "installed", lambda: False)
    study.study()
    rows, before = study.kept()["rows"], len(small)
    study.write_json(study.PATH, study.kept() | {"rows": [row | {"git_commit": "older"} for row in rows]})
    study.study()
    assert len(small) == before
    key = study.Row.key
    monkeypatch.setattr(study.Row, "key", lambda row: key(row) + " by new code" * (row.method == "control"))
    assert study.study(minutes=0) == 1
    assert [row["method"] for row in study.kept()["rows"]] == [row["method"] for row in rows]  # stays until then
    study.study()
    assert len(small) == before + 1
    assert [row["method"] for row in study.kept()["rows"] if row["git_commit"] != "older"] == ["control"]


def test_rows_that_the_file_lacks_come_before_those_of_other_code(small, monkeypatch):
    monkeypatch.setattr(study.answers, "installed", lambda: False)
    study.study()
    study.write_json(study.PATH, study.kept() | {"rows": study.kept()["rows"][:3]})  # without the last
    key = study.Row.key
    monkeypatch.setattr(study.Row, "key", lambda row: key(row) + " by new code" * (row.method == "quarot-best"))
    small.clear()
    assert study.study() == 0
    assert [recipe.label for _, recipe in small] == [RECIPES[name].label for name in ("control", "quarot-best")]


def test_questions_are_asked_of_five_fp_first(monkeypatch):
    monkeypatch.setattr(study.answers, "installed", lambda: True)
    asked = [(row.method, row.task) for row in study.plan() if row.task]
    assert asked == [(method, task) for method in ("fp", *study.ASKED) for task in SETS]
    monkeypatch.setattr(study.answers, "installed", lambda: False)
    assert not any(row.task for row in study.plan())


def test_answers_stay_where_lm_eval_is_missing_and_rows_are_as_before(small, monkeypatch, capsys):
    monkeypatch.setattr(study.answers, "installed", lambda: False)
    study.study()
    assert study.answers.MISSING in capsys.readouterr().out
    assert study.zero_shot().empty
    assert capsys.readouterr().out == "not made yet: make study\n"
    rows = study.kept()["rows"]
    monkeypatch.setattr(study.answers, "installed", lambda: True)
    assert study.study(minutes=0) == 4
    assert study.study() == 0
    told = study.zero_shot()
    assert told["method"].tolist() == ["FP", "QuaRot, best", "JointQuant, best", RECIPES["control"].label]
    assert told["acc − FP"].str.startswith("-25.0 (").tolist() == [False, True, True, True]
    assert study.kept()["rows"] == rows  # what notebook 06 reads
    monkeypatch.setattr(study.answers, "installed", lambda: False)
    assert study.study() == 0
    assert study.zero_shot().equals(told)


def test_shares_are_those_of_the_tables(small):
    study.study()
    rows = study.kept()["rows"]
    table = study.shares(rows).set_index("method")
    assert table.loc["jointquant-best", "share, PPL"] == pytest.approx(compare.share(rows[2], rows[1], rows[0]).value)
    assert table.loc["jointquant-best", "share, KL"] == pytest.approx(0.75)
    assert table.loc["quarot-best", "share, PPL"] == pytest.approx(0)
