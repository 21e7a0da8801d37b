"""What takes hours, once, on the embedded model: ``make study`` writes figures/study.json.

The file is written after every row: a run that stops goes on where it was, on another machine too.
"""

import json
import time
from dataclasses import asdict, dataclass, replace

import pandas as pd

from jqlib import pipeline
from jqlib.config import PROFILES, ROOT, Config, make_config
from jqlib.lab import compare
from jqlib.lab.zero_shot import row_of, table
from jqlib.model import answers
from jqlib.model.questions import SETS
from jqlib.recipes import RECIPES, Recipe
from jqlib.store import git_commit, versions, write_json
from jqlib.transform.grids import OFF

PATH = ROOT / "figures" / "study.json"
CONFIG = {"model": "smollm2-135m", "profile": "standard", "nsamples": 16, "step_tokens": 2048}  # and the device
READ = PROFILES[CONFIG["profile"]]
NOTE = (
    f"{CONFIG['model']} · make study · {READ['eval_windows']} windows of {READ['eval_seqlen']} tokens of test articles"
)
SEEDS = range(3)
BEST = RECIPES["jointquant-best"]
LEARNED = {name: replace(RECIPES[name], label=f"{RECIPES[name].label}, learned", layerwise=True, tune=True)
           for name in ("spinquant-like", "ostquant-like")}  # fmt: skip
DECIDING = {name: RECIPES[name] for name in ("quarot-best", "jointquant-best", "control")}
PLAIN = {name: RECIPES[name] for name in ("rtn", "smoothquant", "quarot", "dartquant", "jointquant", "hadamard-online")}
PEERS = {name: RECIPES[name] for name in ("quarot-learned", "spinquant-like", "ostquant-like")}
PEERS |= {f"{name}-learned": recipe for name, recipe in LEARNED.items()}
WITHOUT = {
    "R1 and norms' scales by the loss (Hadamard instead)": replace(BEST, r1="hadamard"),
    "R1 by the loss (by range instead)": replace(BEST, r1="mm"),
    "R2 by range (Hadamard instead)": replace(BEST, r2="hadamard"),
    "smoothing of o and down": replace(BEST, smooth=(), refine=("R1", "R2", "scale", "clip")),
    "refinement": replace(BEST, refine=()),
    "learning layer by layer": replace(BEST, layerwise=False),
    "one grid per head at o_proj": replace(BEST, o_per_head=False),
    "tuning": replace(BEST, tune=False),
}
LONGEST = "refinement", "learning layer by layer"  # left out of all tokens too: are they worth their time?
QUARTER = {"step_tokens": 512}  # of the tokens
SIXTEENTH = QUARTER | {"refine_steps": READ["refine_steps"] // 4}
ASKED = {name: RECIPES[name] for name in ("rtn", "quarot-best", "jointquant-best", "jointquant-online")}  # and FP
QUESTIONS = 1000  # of each set, at most: the same for all
KINDS = "rows", "questions"  # as the file has them
SHOWN = ("group", "method", "label", "seed", "text", "w_bits", "a_bits", "kv_bits", "refine_steps", "step_tokens",
         "ppl", "kl", "top1")  # fmt: skip
NAME = ("group", "method", "task", "text", "seed", "w_bits", "a_bits")  # what a row is told by from any other


@dataclass(frozen=True)
class Row:
    """One that the study makes: of a text, or with a ``task`` of questions."""

    group: str
    method: str
    label: str
    config: Config
    recipe: Recipe | None
    w_bits: int = 4
    a_bits: int = 4
    task: str | None = None

    @property
    def name(self) -> tuple:
        text = None if self.task else self.config.eval_dataset or "wiki"
        return self.group, self.method, self.task, text, self.config.seed, self.w_bits, self.a_bits

    def key(self) -> str:
        """That of its artifact: what other code, settings or libraries would change."""
        of = self.config, self.recipe, self.w_bits, self.a_bits
        step = pipeline.zero_shot_step(*of, self.task, QUESTIONS) if self.task else pipeline.evaluation_step(*of, {})
        return step.path.stem

    def make(self) -> dict:
        of = self.config, self.recipe, self.w_bits, self.a_bits
        row = row_of(*of, self.task, QUESTIONS) if self.task else pipeline.evaluate(*of)
        about = dict(zip(NAME, self.name, strict=True)) | {"label": self.label}
        about |= {name: getattr(self.config, name) for name in ("refine_steps", "step_tokens", "device")}
        return about | row | {"key": self.key(), "git_commit": git_commit()}


def plan(device: str = "cpu") -> list[Row]:
    """The rows, the deciding ones first, on both texts; beside those of `ASKED` their answers, if there is lm-eval."""
    config = make_config(CONFIG | {"device": device})
    rows = [Row("FP", "fp", "FP", config, None, OFF, OFF)]

    def add(group: str, recipes: dict[str, Recipe], w_bits: int = 4, a_bits: int = 4, **changes) -> None:
        for name, recipe in recipes.items():
            label = name if group == "without" else recipe.label
            row = Row(group, name, label, replace(config, **changes), recipe, w_bits, a_bits)
            if row not in rows:
                rows.append(row)

    add("methods", ASKED)
    asked = len(rows)
    for seed in SEEDS:
        add("methods", DECIDING, seed=seed)
    best = {"jointquant-best": BEST}
    for bits in ((OFF, 4), (4, OFF)):
        add("halves", best, *bits)
    add("KV4", best, kv_bits=4)
    add("effort: quarter", best | PEERS, **QUARTER)
    add("effort: sixteenth", best, **SIXTEENTH)
    add("without", WITHOUT, **QUARTER)
    add("without", {name: WITHOUT[name] for name in LONGEST}, seed=1)
    add("methods", PLAIN)
    add("methods", {"quarot-learned": PEERS["quarot-learned"]})
    planned, tasks = [], SETS if answers.installed() else ()
    for i, row in enumerate(rows):
        planned.append(row)
        if row.group != "without":  # and on text of another kind
            planned.append(replace(row, config=replace(row.config, eval_dataset="news")))
        planned += [replace(row, group="zero-shot", task=task) for task in tasks if i < asked]
    return planned


def study(minutes: float | None = None, device: str = "cpu") -> int:
    """Make the rows that are missing, and begin none after so many ``minutes``. Returns how many are left.

    A row that the file has as this code would make it is not made again, on whatever machine it was made. One of other
    code stays, with its commit, until its turn comes: after those that the file lacks. So do all answers to questions
    without lm-eval, and it says so.
    """
    start, planned = time.monotonic(), plan(device)
    if not answers.installed():
        print(f"no zero-shot rows: {answers.MISSING}")
    found = kept() if PATH.exists() else {}
    told = {tuple(row.get(name) for name in NAME): row for kind in KINDS for row in found.get(kind, [])}
    missing = [row for row in planned if told.get(row.name, {}).get("key") != row.key()]
    missing.sort(key=lambda row: row.name in told)
    about = {"config": asdict(planned[0].config), "protocol": pipeline.protocol(planned[0].config)}
    about |= {"versions": versions(), "git_commit": git_commit()}
    for i, row in enumerate(missing):
        if minutes is not None and time.monotonic() - start > 60 * minutes:
            return len(missing) - i
        told[row.name] = made = row.make()
        about_it = ", ".join(map(str, filter(None, row.name)))
        result = f"{made['acc']:.1%} right" if row.task else f"PPL {made['ppl']:.2f}, KL {made['kl']:.3f}"
        print(f"{i + 1}/{len(missing)} {row.label} ({about_it}): {result}", flush=True)
        of_text, of_task = ([row for row in told.values() if bool(row["task"]) == asked] for asked in (False, True))
        write_json(PATH, about | dict(zip(KINDS, (of_text, of_task), strict=True)) | {"left": len(missing) - i - 1})
    return 0


def kept() -> dict:
    """What `study` has written: its ``rows``, ``questions`` (zero-shot rows), config, versions and commit."""
    return json.loads(PATH.read_text(encoding="utf-8"))


def zero_shot() -> pd.DataFrame:
    """What the study has of zero-shot questions, as `jqlib.lab.zero_shot.table` has it; empty, and said, if nothing."""
    rows = kept()["questions"]
    if not any(row["method"] == "fp" for row in rows):
        print("not made yet: make study")
        return pd.DataFrame()
    return table(rows)


def shares(rows: list[dict]) -> pd.DataFrame:
    """The rows with ``gap``, ln(PPL/FP), and the share of QuaRot's gap that each closes: "share, PPL", "share, KL".

    QuaRot's is that of the same seed and text, of the study's own effort.
    """
    fp = {row["text"]: row for row in rows if row["method"] == "fp"}
    base = {
        (row["text"], row["seed"]): row for row in rows if (row["method"], row["group"]) == ("quarot-best", "methods")
    }
    found = []
    for row in rows:
        zero, start = fp[row["text"]], base.get((row["text"], row["seed"]))
        about = {name: row[name] for name in SHOWN} | {"commit": row["git_commit"][:7]}
        about["gap"] = compare.difference(row, zero).value
        for by, name in (("ppl", "share, PPL"), ("kl", "share, KL")) if start and row is not zero else ():
            about[name], about[f"{name}, low"], about[f"{name}, high"] = compare.share(row, start, zero, by)
        found.append(about | {"minutes": row["calibration_seconds"] / 60})
    return pd.DataFrame(found)
