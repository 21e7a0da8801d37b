"""What takes hours, once, on the embedded model: ``make study`` writes figures/study.json.

Every row is an artifact, and the file is written after each: a run that stops goes on where it was.
"""

import json
import time
from dataclasses import asdict, replace

import pandas as pd

from jqlib import pipeline
from jqlib.config import ROOT, Config, make_config
from jqlib.lab import compare
from jqlib.lab.zero_shot import row_of, table
from jqlib.model import answers
from jqlib.model.questions import SETS
from jqlib.recipes import RECIPES, Recipe
from jqlib.store import git_commit, versions, write_json
from jqlib.transform.grids import OFF

PATH = ROOT / "figures" / "study.json"
CONFIG = {"model": "smollm2-135m", "profile": "standard", "nsamples": 16, "step_tokens": 2048}  # and the device
SEEDS = range(3)
BEST = RECIPES["jointquant-best"]
LEARNED = {name: replace(RECIPES[name], label=f"{RECIPES[name].label}, learned", layerwise=True, tune=True)
           for name in ("spinquant-like", "ostquant-like")}  # fmt: skip
DECIDING = {name: RECIPES[name] for name in ("quarot-best", "jointquant-best", "control")}
PLAIN = {name: RECIPES[name] for name in ("rtn", "smoothquant", "quarot", "dartquant", "jointquant", "hadamard-online")}
PEERS = {name: RECIPES[name] for name in ("quarot-learned", "spinquant-like", "ostquant-like", "jointquant-online")}
PEERS |= {f"{name}-learned": recipe for name, recipe in LEARNED.items()}
WITHOUT = {
    "R1 and norms' scales by the loss (Hadamard instead)": replace(BEST, r1="hadamard"),
    "R2 by range (Hadamard instead)": replace(BEST, r2="hadamard"),
    "smoothing of o and down": replace(BEST, smooth=(), refine=("R1", "R2", "scale", "clip")),
    "refinement": replace(BEST, refine=()),
    "learning layer by layer": replace(BEST, layerwise=False),
    "one grid per head at o_proj": replace(BEST, o_per_head=False),
    "tuning": replace(BEST, tune=False),
}
EFFORTS = {"quarter": {"step_tokens": 512}, "fourfold": {"step_tokens": 8192}}  # beside the study's own

ASKED = {name: RECIPES[name] for name in ("rtn", "quarot-best", "jointquant-best", "jointquant-online")}

Plan = list[tuple[dict, Config, Recipe | None, int, int]]


def plan(device: str = "cpu") -> Plan:
    """The rows: what each is about, and what `pipeline.evaluate` needs for it; the deciding ones first."""
    config = make_config(CONFIG | {"device": device})
    rows: Plan = [({"group": "FP", "method": "fp", "label": "FP"}, config, None, OFF, OFF)]

    def add(group: str, recipes: dict[str, Recipe], w_bits: int = 4, a_bits: int = 4, **changes) -> None:
        for name, recipe in recipes.items():
            about = {"group": group, "method": name, "label": name if group == "without" else recipe.label}
            rows.append((about, replace(config, **changes), recipe, w_bits, a_bits))

    for seed in SEEDS:
        add("methods", DECIDING, seed=seed)
    add("halves", {"jointquant-best": BEST}, OFF, 4)
    add("halves", {"jointquant-best": BEST}, 4, OFF)
    add("KV4", {"jointquant-best": BEST}, kv_bits=4)
    add("methods", PEERS)
    for effort, changes in EFFORTS.items():
        add(f"effort: {effort}", {name: RECIPES[name] for name in ("quarot-learned", "jointquant-best")}, **changes)
    add("without", WITHOUT)
    add("methods", PLAIN)
    everywhere = []
    for about, config, *rest in rows:
        everywhere.append((about, config, *rest))
        if about["group"] != "without":  # and on text of another kind
            everywhere.append((about, replace(config, eval_dataset="news"), *rest))
    return everywhere


def questions_plan(device: str = "cpu") -> list[tuple[str, Config, Recipe | None, int, int, str]]:
    """The zero-shot rows: method, and what `row_of` needs, all questions of each task; none without lm-eval."""
    config = make_config(CONFIG | {"device": device})
    methods = [("fp", config, None, OFF, OFF), *((name, config, recipe, 4, 4) for name, recipe in ASKED.items())]
    return [(*method, task) for task in SETS for method in methods] if answers.installed() else []


def study(minutes: float | None = None, device: str = "cpu") -> int:
    """Make the rows that are missing, zero-shot ones last, and begin none after so many ``minutes``.

    Returns how many are left. Without lm-eval it says so, and the zero-shot rows stay as they are.
    """
    start, rows, planned, asked = time.monotonic(), [], plan(device), questions_plan(device)
    told = {(row["method"], row["task"]): row for row in kept().get("zero_shot", [])} if PATH.exists() else {}
    about_all = {"config": asdict(planned[0][1]), "protocol": pipeline.protocol(planned[0][1])}
    about_all |= {"versions": versions(), "git_commit": git_commit()}

    def late() -> bool:
        return minutes is not None and time.monotonic() - start > 60 * minutes

    def write() -> None:
        left = len(planned) - len(rows)
        write_json(PATH, about_all | {"rows": rows, "left": left, "zero_shot": list(told.values())})

    for i, (about, config, recipe, w_bits, a_bits) in enumerate(planned):
        if late():
            return len(planned) - i + len(asked)
        row = pipeline.evaluate(config, recipe, w_bits, a_bits)
        under = {"seed": config.seed, "text": config.eval_dataset or "wiki"}
        under |= {"step_tokens": config.step_tokens, "device": config.device}
        rows.append(about | under | row)
        print(f"{i + 1}/{len(planned)} {about['label']} ({about['group']}, {under['text']}, seed {config.seed}): "
              f"PPL {row['ppl']:.2f}, KL {row['kl']:.3f}", flush=True)  # fmt: skip
        write()
    if not asked:
        print(f"no zero-shot rows: {answers.MISSING}")
    for i, (method, *which, task) in enumerate(asked):
        if late():
            return len(asked) - i
        row = row_of(*which, task)
        told[method, task] = {"method": method, "git_commit": about_all["git_commit"]} | row
        print(f"{i + 1}/{len(asked)} {row['label']} ({task}): {row['acc']:.1%} right", flush=True)
        write()
    return 0


def kept() -> dict:
    """What `study` has written: its ``rows``, config, versions and commit."""
    return json.loads(PATH.read_text(encoding="utf-8"))


def zero_shot() -> pd.DataFrame:
    """What the study has of zero-shot questions, as `jqlib.lab.zero_shot.table` has it; empty, and said, if nothing."""
    rows = kept().get("zero_shot", [])
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
        about = {
            name: row[name] for name in ("group", "method", "label", "seed", "text", "w_bits", "a_bits", "kv_bits")
        }
        about |= {name: row[name] for name in ("ppl", "kl", "top1")} | {"gap": compare.difference(row, zero).value}
        for by, name in (("ppl", "share, PPL"), ("kl", "share, KL")) if start and row is not zero else ():
            about[name], about[f"{name}, low"], about[f"{name}, high"] = compare.share(row, start, zero, by)
        found.append(about | {"minutes": row["calibration_seconds"] / 60, "step_tokens": row["step_tokens"]})
    return pd.DataFrame(found)
