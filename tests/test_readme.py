"""The README's commands and snippet are what they say: each command that can run here does, up to the work itself."""

import glob
import itertools
import re
import shlex

import papermill
import pytest
import yaml

from jqlib.__main__ import main
from jqlib.config import ROOT, make_config
from jqlib.export.can import check_form
from jqlib.lab.checks import check_inputs
from jqlib.lab.run import select_notebooks
from jqlib.pipeline import recipe_of, settled
from jqlib.recipes import RECIPES

README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = [
    shlex.split(part, comments=True)
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    for part in line.split("&&")
]
RUNS, SWEEPS, EXPORTS = (
    [words[4:] for words in LINES if words[:4] == ["python", "-m", "jqlib", c]] for c in ("run", "sweep", "export")
)
HERE = {"./my-model": "smollm2-135m", "./my-text.txt": "wiki"}  # what the reader has, we stand in for


def test_every_command_is_known():
    known = {"make", "conda", "python", "papermill"}
    assert {words[0] for words in LINES if words} == known
    targets = re.search(r"\.PHONY: (.*)", (ROOT / "Makefile").read_text())[1].split()
    assert {words[1] for words in LINES if words and words[0] == "make"} <= set(targets)
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
    assert all(f"`{name}`" in README for name in RECIPES)


def test_the_snippet(capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for word, small in (("max_windows=8", "max_windows=1"), ("max_tokens=256", "max_tokens=32")):
        assert word in snippet
        snippet = snippet.replace(word, small)
    exec(snippet, {})
    perplexity = float(capsys.readouterr().out.splitlines()[-1].split()[0])
    assert 20 < perplexity < 200  # FP has about 25
