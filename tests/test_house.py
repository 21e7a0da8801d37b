"""The shape of the house: notebooks tied to config.py, imports without circles, documents that hold."""

import ast
import dis
import re
import subprocess
import sys

import nbformat
import papermill
import pytest
import yaml

from jqlib.config import HELP, KINDS, NOTEBOOKS, ROOT, Config, make_config
from jqlib.store import METHOD

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
    arrows = {}
    for path in (ROOT / "jqlib").glob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        ours = [node for node in nodes if node.module.split(".")[0] == "jqlib"]
        arrows[path.stem] = {node.module.partition(".")[2] or alias.name for node in ours for alias in node.names}
    return arrows


def test_imports_have_no_circle():
    arrows = imports()
    arrows.pop("__init__")
    while arrows:
        leaves = [name for name, uses in arrows.items() if not uses & arrows.keys()]
        assert leaves, f"a circle among {sorted(arrows)}"
        for leaf in leaves:
            arrows.pop(leaf)


def test_the_arrows_of_the_house():
    arrows = imports()
    assert not arrows["config"] | arrows["hadamard"]
    assert arrows["objectives"] == {"quant"}
    assert not arrows["intervals"]  # plain numbers
    assert arrows["compare"] == {"intervals"}
    assert arrows["solver"] == {"objectives"}
    assert arrows["joint"] <= {"hadamard", "objectives", "baselines", "solver"}  # tensors only, no model
    assert not {"pipeline", "store", "plots"} & set().union(
        *(arrows[n] for n in ("rotation", "quant", "smooth", "joint"))
    )


def test_artifacts_know_all_code_they_depend_on():
    """A module that the pipeline reaches and METHOD forgets would leave stale results looking valid."""
    arrows, reached, new = imports(), set(), {"pipeline"}
    while new:
        reached |= new
        new = set().union(*(arrows[name] for name in new)) - reached
    assert reached - {"config", "store"} == set(METHOD)


@pytest.mark.parametrize("path", sorted((ROOT / "jqlib").glob("*.py")), ids=lambda p: p.name)
def test_module_names_stand_only_in_the_family_table(path):
    text = re.sub(r'""".*?"""|#.*', "", path.read_text(), flags=re.S)  # prose may name them
    if path.stem not in ("models", "activations"):  # activations' error message shows one as an example
        assert not re.search(r"\b(q|k|v|o|up|gate|down)_proj\b", re.sub(r"_setting\(.*", "", text))
    assert path.read_text().count("\n") <= 350


def test_importing_has_no_side_effect():
    code = "import sys, jqlib; sys.exit(any(m in sys.modules for m in ('matplotlib', 'papermill', 'datasets')))"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], check=False).returncode == 0


def test_environment_installs_what_pyproject_says(tmp_path):
    pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"][-1]["pip"]
    lines = tmp_path / "requirements.txt"
    lines.write_text("\n".join(line.replace(" .", f" {ROOT}").replace("-c ", f"-c {ROOT}/") for line in pip))
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "-r", str(lines)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
