"""A hash of the code that makes an artifact: a change of it makes the artifact anew, a change of prose does not."""

import ast
import dis
import hashlib
import importlib.util
import inspect
import textwrap
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

# settings and recipes are in the key by value; the others keep and measure what is made
NOT_CODE = {f"jqlib.{name}" for name in ("choices", "code", "config", "memory", "recipes", "store")}
PLAIN = (int, float, str, tuple, type(None))


@cache
def code_of(function: FunctionType) -> str:
    """The hash of a function, of those of its module that it names (but other steps, which have hashes of their own),
    and of all modules of jqlib that any of them imports from, without comments and docstrings."""
    parts: dict[str, str] = {}
    _add_function(function, parts)
    return hashlib.sha256("\n".join(f"{k}: {parts[k]}" for k in sorted(parts)).encode()).hexdigest()[:16]


def _add_function(function: FunctionType, parts: dict[str, str]) -> None:
    if function.__qualname__ in parts:
        return
    parts[function.__qualname__] = _plain(textwrap.dedent(inspect.getsource(function)))
    for name in _names(function.__code__):
        if name.endswith("_step"):
            continue
        value = inspect.unwrap(function.__globals__.get(name))
        home = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None) or ""
        if isinstance(value, PLAIN):
            parts[name] = repr(value)
        elif home == function.__module__ and isinstance(value, FunctionType):
            _add_function(value, parts)
        elif home.startswith("jqlib.") and home != function.__module__:
            for module in imported(home) - NOT_CODE:
                parts[module] = _plain_module(module)


def _names(code: CodeType) -> set[str]:
    """The global names that a function and the functions within it use."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    named = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    return named.union(*map(_names, inner))


@cache
def imported(module: str) -> frozenset[str]:
    """A module of jqlib and all that it imports from jqlib."""
    found, waiting = set(), {module}
    while waiting:
        found |= waiting
        trees = [ast.walk(ast.parse(_source(name))) for name in waiting]
        froms = [node for tree in trees for node in tree if isinstance(node, ast.ImportFrom)]
        froms = [node for node in froms if (node.module or "").split(".")[0] == "jqlib"]
        waiting = {_home(node.module, alias.name) for node in froms for alias in node.names} - found
    return frozenset(found)


def _home(package: str, name: str) -> str:
    """The module that ``from package import name`` reads: ``package.name`` if that is one."""
    spec = importlib.util.find_spec(package)
    if spec.submodule_search_locations and importlib.util.find_spec(f"{package}.{name}"):
        return f"{package}.{name}"
    return package


def _source(module: str) -> str:
    return Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")


@cache
def _plain_module(module: str) -> str:
    return hashlib.sha256(_plain(_source(module)).encode()).hexdigest()


def _plain(source: str) -> str:
    """The syntax tree as text, docstrings left out."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)
