"""The shape of the house: notebooks tied to config.py, imports without circles, documents that hold."""

import ast
import dis
import re
import subprocess
import sys
import tomllib

import nbformat
import papermill
import pytest
import yaml

from jqlib.code import imported
from jqlib.config import CHOICES, HELP, KINDS, NOTEBOOKS, ROOT, Config, make_config
from jqlib.inputs import WINDOWS

MODULES = sorted((ROOT / "jqlib").rglob("*.py"))
NAMES = sorted(path.name for path in NOTEBOOKS.glob("*.ipynb"))


def read(name):
    return nbformat.read(NOTEBOOKS / name, as_version=4)


def test_there_are_six():
    assert [name[:2] for name in NAMES] == ["01", "02", "03", "04", "05", "06"]


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_config_fields_with_their_help(name):
    declared = papermill.inspect_notebook(NOTEBOOKS / name)
    assert declared
    for parameter, facts in declared.items():
        assert parameter in KINDS
        assert facts["inferred_type_name"] == KINDS[parameter].__name__
        assert facts["help"] == HELP[parameter]
        value = ast.literal_eval(facts["default"])
        if parameter in ("model", "profile"):
            assert value == {"model": "smollm2-135m", "profile": "quick"}[parameter]
        else:
            assert value is None or value == getattr(Config, parameter)


def test_every_setting_is_a_parameter_of_some_notebook():
    """The runner gives each notebook what it declares: a setting that none declares would be ignored."""
    assert set(KINDS) == {name for path in NAMES for name in papermill.inspect_notebook(NOTEBOOKS / path)}


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_that_evaluates_takes_the_text_it_is_told(name):
    assert any("pipeline.evaluate(" in cell.source for cell in read(name).cells)  # all of them do
    assert {*WINDOWS} <= papermill.inspect_notebook(NOTEBOOKS / name).keys()


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_short_and_the_last_asserts(name):
    code = [cell.source for cell in read(name).cells if cell.cell_type == "code"]
    assert max(source.count("\n") + 1 for source in code if not source.startswith("model: str")) <= 25
    assert "assert " in code[-1]


@pytest.mark.parametrize("name", NAMES)
def test_no_cell_overwrites_a_parameter(name):
    """`config_of(globals())` would take it for the user's at a second run of all cells."""
    cells = [cell for cell in read(name).cells if cell.cell_type == "code"]
    others = [cell.source for cell in cells if "parameters" not in cell.metadata.get("tags", [])]
    code = dis.get_instructions(compile("\n".join(others), name, "exec"))
    assert not {step.argval for step in code if step.opname == "STORE_NAME"} & set(KINDS)


@pytest.mark.parametrize("path", sorted((ROOT / "runs").glob("*.yaml")), ids=lambda p: p.name)
def test_run_files_hold_parameters(path):
    make_config(yaml.safe_load(path.read_text()))


def imports():
    """Module -> the modules of jqlib that it imports, by their names below jqlib."""
    arrows = {}
    for path in MODULES:
        name = ".".join(path.relative_to(ROOT / "jqlib").with_suffix("").parts).removesuffix(".__init__")
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        ours = [node for node in nodes if node.module.split(".")[0] == "jqlib"]
        found = {f"{node.module}.{alias.name}".split(".", 1)[1] for node in ours for alias in node.names}
        arrows[name] = {name if (ROOT / "jqlib" / f"{name.replace('.', '/')}.py").exists() else name.rpartition(".")[0]
                        for name in found}  # fmt: skip
    return arrows


def test_imports_have_no_circle():
    arrows = imports()
    arrows.pop("__init__")
    while arrows:
        leaves = [name for name, uses in arrows.items() if not uses & arrows.keys()]
        assert leaves, f"a circle among {sorted(arrows)}"
        for leaf in leaves:
            arrows.pop(leaf)


FLOORS = ("memory", "choices", "fused", "replay", "product", "precision", "model", "transform", "quant", "learn",
          "inputs", "calibration", "pipeline", "export", "lab", "__main__")  # fmt: skip
BESIDE = {"recipes": {"choices"}, "config": {"choices", "recipes"}, "code": set(),
          "store": {"config", "memory"}}  # fmt: skip


def test_the_arrows_of_the_house():
    """Every floor uses what lies below it; settings, recipes, code and store know nothing of the method."""
    for name, uses in imports().items():
        room = name.split(".")[0]
        if room in BESIDE:
            assert uses == BESIDE[room], name
        elif room != "__init__":
            floor = FLOORS.index(room)
            for other in uses - BESIDE.keys():
                below = FLOORS.index(other.split(".")[0])
                assert below < floor or (below == floor and "." in name), f"{name} uses {other}"
            method = room in ("model", "transform", "quant", "learn")
            assert not (method and uses & BESIDE.keys()), f"{name} knows of settings"


def test_what_each_room_may_not_know():
    arrows = imports()
    assert not arrows["model.intervals"] | arrows["product"]
    assert arrows["transform.orthogonal"] == arrows["transform.hadamard"] == {"product"}
    assert arrows["lab.compare"] == {"model.intervals"}
    assert arrows["lab.plots"] == arrows["lab.sites"] == {"lab.style"}  # plain results
    assert arrows["lab.tokens"] == {"lab.style", "transform.grids"}  # and what rounding makes of them
    for name in ("objectives", "solver", "baselines", "history", "rotations"):  # tensors only, no model
        assert not [module for module in imported(f"jqlib.learn.{name}") if module.startswith("jqlib.model")]


def test_choices_are_said_once():
    """Settings and dispatch read the Literal types: no list of their names stands anywhere else."""
    for name, choices in CHOICES.items():
        if name not in ("profile", "recipe"):
            listed = ", ".join(f'"{choice}"' for choice in choices)
            assert sum(listed in path.read_text() for path in MODULES) == 1, name


def test_signatures_are_short():
    """But for the specification's own functions, and those that hand a user's wishes on to them."""
    trees = [ast.parse(path.read_text()) for path in MODULES]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    arguments = {f.name: [a.arg for a in f.args.args + f.args.kwonlyargs if a.arg != "self"] for f in functions}
    long = {name: names for name, names in arguments.items() if len(names) > 7}
    assert long.keys() <= {"train_r1_joint", "train_r2_independent", "quantize_model", "collect_activations",
                           "evaluate_perplexity"}  # fmt: skip


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT / "jqlib")))
def test_module_names_stand_only_in_the_family_table(path):
    text = re.sub(r'""".*?"""|#.*', "", path.read_text(), flags=re.S)  # prose may name them
    if path.stem != "families":
        assert not re.search(r"\b(q|k|v|o|up|gate|down)_proj\b", re.sub(r"_setting\(.*", "", text))
    assert path.read_text().count("\n") <= 300


def test_importing_has_no_side_effect():
    code = "import sys, jqlib; sys.exit(any(m in sys.modules for m in ('matplotlib', 'papermill', 'datasets')))"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], check=False).returncode == 0


def test_what_is_imported_is_declared():
    """A package that came with another one would be gone with it."""
    notebooks = [cell.source for name in NAMES for cell in read(name).cells if cell.cell_type == "code"]
    trees = [ast.parse(source) for source in [*notebooks, *(path.read_text() for path in MODULES)]]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    names = {name.split(".")[0] for name in names} - {*sys.stdlib_module_names, "jqlib"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    declared = {re.match(r"[\w-]+", each)[0].lower().replace("-", "_") for each in declared}
    assert {{"yaml": "pyyaml"}.get(name, name).lower() for name in names} <= declared


def test_environment_installs_what_pyproject_says(tmp_path):
    pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"][-1]["pip"]
    lines = tmp_path / "requirements.txt"
    lines.write_text("\n".join(line.replace(" .", f" {ROOT}").replace("-c ", f"-c {ROOT}/") for line in pip))
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "-r", str(lines)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
