"""What the READMEs say is so: each command that can run here does, up to the work itself; links lead somewhere."""

import glob
import itertools
import json
import math
import re
import shlex
import subprocess

import pandas as pd
import papermill
import pytest
import yaml

from jqlib.__main__ import COMMANDS, main
from jqlib.config import KINDS, ROOT, make_config
from jqlib.export.can import check_form
from jqlib.lab import compare
from jqlib.lab.checks import check_inputs
from jqlib.lab.run import select_notebooks
from jqlib.model.questions import SETS
from jqlib.pipeline import recipe_of, settled
from jqlib.recipes import RECIPES

FOLDERS = (".", "jqlib", "jqlib/export", "runs", "figures", "figures/pages", "tests")
READMES = {folder: (ROOT / folder / "README.md").read_text(encoding="utf-8") for folder in FOLDERS}
README, TEXT = READMES["."], "\n".join(READMES.values())
LINES = [
    shlex.split(part, comments=True)
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines()
    for part in line.split("&&")
]
INSIDE = [words[3:] for words in LINES if words[:3] == ["python", "-m", "jqlib"]]
RUNS, SWEEPS, EXPORTS, INFOS, QUESTIONS = (
    [words[1:] for words in INSIDE if words[0] == command]
    for command in ("run", "sweep", "export", "info", "zero-shot")
)
HERE = {"./my-model": "smollm2-135m", "./my-text.txt": "wiki"}  # what the reader has, we stand in for


def test_every_readme_is_read_here():
    tracked = subprocess.run(["git", "ls-files", "*README.md"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode == 0:  # in a clone
        assert {(ROOT / path).parent for path in tracked.stdout.split()} == {(ROOT / of).resolve() for of in FOLDERS}


@pytest.mark.parametrize("folder", FOLDERS)
def test_links_lead_somewhere(folder):
    for link in re.findall(r"\]\(([^)]+)\)", READMES[folder]):
        path, _, anchor = link.partition("#")
        if not link.startswith("https://"):
            target = ROOT / folder / path if path else ROOT / folder / "README.md"
            target = target / "README.md" if target.is_dir() else target
            assert target.exists(), link
            heads = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE) if anchor else []
            assert not anchor or anchor in {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}


def test_every_readme_is_reached_from_the_first():
    linked = {
        link.partition("#")[0].removesuffix("README.md").rstrip("/") for link in re.findall(r"\]\((.*?)\)", README)
    }
    assert {*FOLDERS} - {"."} <= linked


def test_files_that_are_named_are_there():
    """As code: paths below the repository, or below jqlib."""
    named = {name for name in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|json|yaml|ipynb))`", TEXT) if "output" not in name}
    assert len(named) > 10
    assert not [name for name in named if not any((ROOT / top / name).exists() for top in (".", "jqlib"))]


def test_every_command_is_known():
    known = {"make", "conda", "python", "python3", ".venv/bin/pip", "papermill"}
    assert {words[0] for words in LINES if words} == known
    assert {words[0] for words in INSIDE} <= COMMANDS.keys()
    targets = re.search(r"\.PHONY: (.*)", (ROOT / "Makefile").read_text())[1].split()
    said = {words[1] for words in LINES if words and words[0] == "make"} | {*re.findall(r"`make ([\w-]+)`", TEXT)}
    assert said == set(targets)
    torch = re.search(r"^torch==.*", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[0]
    assert [".venv/bin/pip", "install", torch] in [words[:3] for words in LINES]
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert ["conda", "activate", environment["name"]] in LINES


@pytest.mark.parametrize("words", RUNS, ids=" ".join)
def test_runs_are_accepted(words, monkeypatch):
    seen = []
    monkeypatch.setattr("jqlib.__main__.run", lambda parameters, only: seen.append((parameters, only)) or 0)
    monkeypatch.chdir(ROOT)
    assert main(["run", *(HERE.get(word, word) for word in words)]) == 0
    ((parameters, only),) = seen
    config = make_config(parameters)
    assert select_notebooks(only)
    if config.model == "smollm2-135m" and config.calib_dataset != "c4":
        check_inputs(config)


@pytest.mark.parametrize("words", EXPORTS, ids=" ".join)
def test_exports_are_accepted(words, monkeypatch):
    seen = []
    monkeypatch.setattr("jqlib.export.export.export", lambda *given, **more: seen.append(given))
    assert main(["export", *words]) == 0
    ((config, form, _),) = seen
    check_form(form, settled(config, recipe_of(config)), recipe_of(config))


@pytest.mark.parametrize("words", INFOS, ids=" ".join)
def test_infos_are_accepted(words, monkeypatch):
    seen = []
    monkeypatch.setattr("jqlib.lab.info.describe", lambda config: seen.append(config) or "")
    monkeypatch.setattr("jqlib.lab.trial.describe", lambda config: seen.append(config) or "")
    assert main(["info", *words]) == 0
    assert len(seen) == 1 + ("--measure" in words)
    assert seen[0].model == words[0]
    recipe_of(seen[0])


@pytest.mark.parametrize("words", QUESTIONS, ids=" ".join)
def test_zero_shots_are_accepted(words, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "jqlib.lab.zero_shot.zero_shot", lambda config, *more: seen.append((config, *more)) or pd.DataFrame()
    )
    assert main(["zero-shot", *words]) == 0
    ((config, _, limit),) = seen
    check_inputs(config)
    assert limit == 200


def test_inline_commands_are_commands():
    """`python -m jqlib …` and flags within sentences: each is one that the command line has."""
    said = re.findall(r"`python -m jqlib (?!--)([\w-]+)[ `]", TEXT)
    assert {*said} <= COMMANDS.keys()
    others = {
        f"--{name}"
        for name in ["format", "to", "measure", "only", "limit", "tasks", "retry", "scheduler", "help", "debug"]
    }
    flags = {*re.findall(r"(?<![\w-])--[a-z][\w-]*", TEXT)} - {"--index-url"}
    assert {flag.removeprefix("--") for flag in flags.difference(others)} <= KINDS.keys()


@pytest.mark.parametrize("words", SWEEPS, ids=" ".join)
def test_sweeps_are_accepted(words, monkeypatch):
    seen = []
    monkeypatch.setattr("jqlib.lab.sweep.sweep", lambda runs, only, *_: seen.append((runs, only)) or 0)
    monkeypatch.setattr(
        "jqlib.__main__.check_inputs", lambda config: config.model == "smollm2-135m" and check_inputs(config)
    )
    monkeypatch.chdir(ROOT)
    files = [sorted(glob.glob(word)) if "*" in word else [word] for word in words]  # a shell does it
    assert main(["sweep", *itertools.chain(*files)]) == 0
    ((runs, only),) = seen
    assert len(runs) > 1
    assert select_notebooks(only)


def test_papermill_knows_the_parameters():
    ((notebook, _, _, file),) = [words[1:] for words in LINES if words and words[0] == "papermill"]
    assert set(yaml.safe_load((ROOT / file).read_text())) <= set(papermill.inspect_notebook(ROOT / notebook))


def test_every_recipe_is_named():
    assert all(f"`{name}`" in READMES["runs"] for name in RECIPES)


def test_the_first_table_is_the_studys():
    """Every number of it but the intervals, as `figures/study.json` has them."""
    rows = json.loads((ROOT / "figures/study.json").read_text())["rows"]
    study = {
        (r["method"], f"W{r['w_bits']}A{r['a_bits']}", r["kv_bits"], r["step_tokens"], r["text"]): r
        for r in rows if r["seed"] == 0 and r["group"] not in ("without", "effort: sixteenth")
    }  # fmt: skip
    table = [
        [cell.strip(" *") for cell in line.split("|")[1:-1]] for line in README.splitlines() if line.count("|") == 9
    ]
    said = {(cells[0].partition(":")[0], cells[1]): cells[2:] for cells in table[2:]}
    labels = {
        "FP": ("fp", "W16A16", 16, 2048), "QuaRot, best": ("quarot-best", "W4A4", 16, 2048),
        "QuaRot, best, learned": ("quarot-learned", "W4A4", 16, 2048),
        "Control": ("control", "W4A4", 16, 2048), "JointQuant, best": ("jointquant-best", "W4A4", 16, 2048),
        "best, + KV4": ("jointquant-best", "W4A4", 4, 2048), "best ¼": ("jointquant-best", "W4A4", 16, 512),
        "best, weights left alone (W16A4)": ("jointquant-best", "W16A4", 16, 2048),
        "best, activations left alone (W4A16)": ("jointquant-best", "W4A16", 16, 2048),
        "JointQuant, online": ("jointquant-online", "W4A4", 16, 2048),
    }  # fmt: skip
    assert said.keys() == {(label, text) for label in labels for text in ("wiki", "news")}
    for (label, text), cells in said.items():
        row, fp, quarot = (study[*labels[of], text] for of in (label, "FP", "QuaRot, best"))
        assert cells[0] == f"{row['ppl']:.2f}"
        if label != "FP":
            lost = [math.log(of["ppl"] / fp["ppl"]) for of in (row, quarot)]
            minutes = f"{row['calibration_seconds'] / 60:.0f}"
            assert [cells[1], cells[2], cells[5]] == [f"{lost[0]:.3f}", f"{row['kl']:.3f}", minutes]
            gaps = [f"{1 - lost[0] / lost[1]:.0%}", f"{1 - row['kl'] / quarot['kl']:.0%}"]
            assert label == "QuaRot, best" or [cell.split()[0].strip("*") for cell in cells[3:5]] == gaps
    ours, alone = (
        [study["jointquant-best", setting, 16, 2048, text] for text in ("wiki", "news")]
        for setting in ("W4A4", "W16A4")
    )
    fp = [study[*labels["FP"], text]["ppl"] for text in ("wiki", "news")]
    shares = [y["kl"] / x["kl"] for x, y in zip(ours, alone, strict=True)]
    shares += [math.log(y["ppl"] / f) / math.log(x["ppl"] / f) for x, y, f in zip(ours, alone, fp, strict=True)]
    weights = [study["jointquant-best", "W4A16", 16, 2048, text] for text in ("wiki", "news")]
    others = [y["kl"] / x["kl"] for x, y in zip(ours, weights, strict=True)]
    others += [math.log(y["ppl"] / f) / math.log(x["ppl"] / f) for x, y, f in zip(ours, weights, fp, strict=True)]
    assert f"{100 * min(shares):.0f} to {max(shares):.0%} of the loss stays, with" in README
    assert f"activations left alone {100 * min(others):.0f} to {max(others):.0%}." in README


def test_other_seeds_are_the_studys():
    rows = json.loads((ROOT / "figures/study.json").read_text())["rows"]
    rows = {(r["method"], r["text"], r["seed"]): r for r in rows if r["group"] in ("FP", "methods")}
    told = []
    for text in ("wiki", "news"):
        shares = []
        for seed in (1, 2):
            quarot, ours = (rows[name, text, seed] for name in ("quarot-best", "jointquant-best"))
            both = (compare.share(ours, quarot, rows["fp", text, 0], by) for by in ("ppl", "kl"))
            by_ppl, by_kl = map(compare.percent, both)
            shares.append(f"{by_ppl} and {by_kl.split()[0]}")
        told.append(f"on {text} {', '.join(shares)}")
    assert "; ".join(told) in README


def test_the_answers_are_the_studys():
    """The table of zero-shot accuracies, each with its interval, in per cent."""
    rows = json.loads((ROOT / "figures/study.json").read_text())["questions"]
    study = {(row["task"], row["label"]): row for row in rows}
    lines = [
        line for line in README.splitlines() if line.startswith(("| questions |", *(f"| `{name}`" for name in SETS)))
    ]
    (_, *labels), *table = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in lines]
    assert len(table) == len(SETS)
    for name, *cells in table:
        task = name.split("`")[1]
        for label, cell in zip(labels, cells, strict=True):
            row = study[task, label]
            value, low, high = (f"{100 * row[metric]:.1f}" for metric in ("acc", "acc_low", "acc_high"))
            assert cell == f"{value} ({low} to {high})"
        assert f"({study[task, labels[0]]['chance']:.0%})" in name


def test_the_readme_can_be_read_at_a_sitting():
    assert len(README.split()) < 3000


def test_the_snippet(capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    for word, small in (
        ("max_windows=8", "max_windows=1"),
        ("max_tokens=256", "max_tokens=32"),
        ("nsamples=8", "nsamples=2"),
    ):
        assert word in snippet
        snippet = snippet.replace(word, small)
    exec(snippet, {})
    perplexity = float(capsys.readouterr().out.splitlines()[-1].split()[0])
    assert 20 < perplexity < 200  # FP has about 25
