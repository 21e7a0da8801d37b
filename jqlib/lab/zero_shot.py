"""Zero-shot questions: what share a model answers right, FP and quantised, on the same ones."""

from collections.abc import Sequence

import pandas as pd

from jqlib import pipeline
from jqlib.config import Config, named
from jqlib.lab.checks import check_inputs
from jqlib.model.answers import METRICS, find_task, lm_eval_version
from jqlib.model.intervals import Interval, paired_interval
from jqlib.model.questions import SETS
from jqlib.recipes import Recipe
from jqlib.store import save_results
from jqlib.transform.grids import OFF


def zero_shot(config: Config, tasks: str, limit: int | None = None) -> pd.DataFrame:
    """FP and the run's recipe at the run's bits on ``tasks`` (``a,b``); also in ``results/zero_shot.json``.

    ``limit``: so many questions of each, the same for every model. Whatever can be known to be wrong is said before
    any work: raises ValueError, and as `jqlib.model.answers.find_task` does.
    """
    if limit is not None and limit < 2:
        raise ValueError(f"limit={limit}: expected 2 questions or more, or none for all")
    if config.stream:
        raise ValueError("stream=True: lm-eval calls the whole model: leave it out, or use a model that fits in memory")
    names = list(dict.fromkeys(named(tasks)))
    if not names:
        raise ValueError(f"tasks={tasks!r} names none: there are {', '.join(SETS)}")
    for name in names:
        find_task(name)
    check_inputs(config)
    recipe = pipeline.recipe_of(config)
    settled = pipeline.settled(config, recipe)
    rows = [
        {"method": method} | row_of(config, *made, task, limit)
        for method, made in {"fp": (None, OFF, OFF), config.recipe: (recipe, settled.w_bits, settled.a_bits)}.items()
        for task in names
    ]
    save_results(config, "zero_shot", {"rows": rows})
    return table(rows)


def row_of(
    config: Config, recipe: Recipe | None, w_bits: int, a_bits: int, task: str, limit: int | None = None
) -> dict:  # fmt: skip
    """A recipe's (None: FP's) accuracy on a task, ``acc`` and ``acc_norm`` (None where the task has none), each with
    its 95% interval, and which questions it has right, as a text of 0 and 1.
    """
    config = pipeline.settled(config, recipe)
    tensors, values = pipeline.zero_shot_step(config, recipe, w_bits, a_bits, task, limit).get()
    row = {"label": recipe.label if recipe else "FP", "task": task, "w_bits": w_bits, "a_bits": a_bits}
    row |= {"kv_bits": config.kv_bits if recipe else OFF, "seed": config.seed, "limit": limit}
    row |= {name: values[name] for name in ("questions", "chance", "seconds")} | {"lm_eval": lm_eval_version()}
    for metric in METRICS:
        right = tensors[metric].tolist() if metric in tensors else []
        names = metric, f"{metric}_low", f"{metric}_high"
        row |= dict(zip(names, share_right(right) if right else (None, None, None), strict=True))
        row[f"{metric}_right"] = "".join(map(str, right))
    return row


def share_right(right: Sequence[int]) -> Interval:
    """The share of 1 among 0 and 1, with Wilson's 95% interval, which stays between 0 and 1."""
    from scipy.stats import binomtest

    low, high = binomtest(sum(right), len(right)).proportion_ci(method="wilson")
    return Interval(sum(right) / len(right), low, high)


def table(rows: list[dict]) -> pd.DataFrame:
    """The rows in per cent, each task's together: accuracies, and the difference from FP on the same questions."""
    fp = {row["task"]: row for row in rows if row["method"] == "fp"}
    found = []
    for row in sorted(rows, key=lambda row: list(fp).index(row["task"])):
        chance = "" if row["chance"] is None else f"{row['chance']:.1%}"
        line = {"task": row["task"], "questions": row["questions"], "guessing": chance, "method": row["label"]}
        for metric in METRICS:
            right, beside = (list(map(int, each[f"{metric}_right"])) for each in (row, fp[row["task"]]))
            line[metric] = _percent(share_right(right)) if right else ""
            apart = right and row["method"] != "fp"
            line[f"{metric} − FP"] = _percent(paired_interval(right, beside), "+") if apart else ""
        found.append(line)
    return pd.DataFrame(found)


def _percent(interval: Interval, sign: str = "") -> str:
    value, low, high = (100 * x for x in interval)
    return f"{value:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"
