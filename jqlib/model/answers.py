"""Multiple-choice questions answered by a model as it is in memory, by lm-eval (the extra ``lm-eval``).

A model answers with the choice that it finds likeliest: ``acc`` goes by a choice's log-likelihood, ``acc_norm`` by that
per character. Before a question stands what the tokenizer puts there by itself (BOS or nothing), as is usual.
"""

import importlib.metadata
import importlib.util
import logging
import random

import torch
from torch import Tensor

from jqlib.model.questions import SETS, questions
from jqlib.product import fast_float32

MISSING = "zero-shot tasks need lm-eval: pip install -c constraints.txt -e '.[lm-eval]'"
KINDS = ("multiple_choice", "loglikelihood")
METRICS = ("acc", "acc_norm")
SEED = 0  # of a sample of the questions: the same one for every model
BATCH = 16


def installed() -> bool:
    return importlib.util.find_spec("lm_eval") is not None


def lm_eval_version() -> str:
    """Raises ModuleNotFoundError, with what to install, where there is none."""
    if not installed():
        raise ModuleNotFoundError(MISSING)
    return importlib.metadata.version("lm_eval")


def find_task(name: str) -> list:
    """lm-eval's tasks of a name, their questions loaded: ours of `SETS`, or its own (a group has several).

    Raises ValueError for a name that nobody knows or a task without accuracy, ConnectionError for one that can't be
    loaded, ModuleNotFoundError without lm-eval.
    """
    lm_eval_version()
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns that a model in memory has no name
    if name in SETS:
        tasks = TaskManager(include_defaults=False).load(_settings(name))["tasks"].values()
    else:
        tasks = _of_lm_eval(TaskManager(), name)
    for task in tasks:
        if task.OUTPUT_TYPE not in KINDS or "acc" not in task.aggregation():
            kind = f"{task.OUTPUT_TYPE}, by {', '.join(task.aggregation())}"
            raise ValueError(f"tasks={name!r}: {task.task_name} has no accuracy over choices (it is {kind}), which is "
                             "what is measured here")  # fmt: skip
        task.set_config(key="num_fewshot", value=0)
    return list(tasks)


def _of_lm_eval(manager, name: str) -> list:
    ours = ", ".join(SETS)
    if name not in manager.all_tasks:
        raise ValueError(f"tasks={name!r} is unknown: there are {ours}, and lm-eval's own, which need the Hugging Face "
                         "hub (lm-eval ls tasks)")  # fmt: skip
    try:
        return list(manager.load(name)["tasks"].values())
    except Exception as error:  # whatever a task's own code and data raise
        said = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise ConnectionError(f"tasks={name!r}, one of lm-eval's own, can't be loaded ({said}): is the "
                              f"Hugging Face hub within reach? {ours} need none") from error  # fmt: skip


def _settings(name: str) -> dict:
    """A set of ours as what a YAML file of lm-eval's would say."""
    return {
        "task": name, "output_type": "multiple_choice", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(questions(name))}},
        "doc_to_text": SETS[name].prompt, "doc_to_choice": "choices", "doc_to_target": "answer",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in METRICS],
        "num_fewshot": 0,
    }  # fmt: skip


def answers(model, tokenizer, tasks: list, limit: int | None, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict]:
    """Which questions the model answers right: ``acc`` and, where a task has it, ``acc_norm``, (questions,) of 0 and 1;
    and ``loglikelihood`` of every choice, one after another, in nats.

    ``limit``: at most so many questions of each task, drawn by `SEED`; None: all. ``dtype``: of products. Beside them
    ``chance``, what guessing would have right (None where a task has no choices).
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    half = torch.bfloat16 if dtype == torch.bfloat16 else None
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH, mixed_precision_dtype=half)
    drawn = {task.task_name: _sample(len(task.eval_docs), limit) for task in tasks}
    with fast_float32(model.device):
        found = evaluate(lm, {"tasks": {task.task_name: task for task in tasks}}, samples=drawn, bootstrap_iters=0)
    asked = [each for of_task in found["samples"].values() for each in of_task]
    right = {m: torch.tensor([each[m] for each in asked]).to(torch.uint8) for m in METRICS if m in asked[0]}
    likely = [float(choice[0]) for each in asked for choice in each["filtered_resps"]]
    choices = [len(each["filtered_resps"]) for each in asked]
    chance = sum(1 / n for n in choices) / len(choices) if min(choices) > 1 else None
    return right | {"loglikelihood": torch.tensor(likely)}, {"chance": chance, "questions": len(asked)}


def _sample(count: int, limit: int | None) -> list[int]:
    return sorted(random.Random(SEED).sample(range(count), min(count, limit or count)))
