"""Small changes to a Python source, each of which a good test should notice."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

COMPARED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
            ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}  # fmt: skip
COMPUTED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
            ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}  # fmt: skip
NAMES = {"min": "max", "amin": "amax", "argmin": "argmax", "any": "all", "sum": "mean", "zeros_like": "ones_like"}
NAMES |= {other: name for name, other in NAMES.items()}
SILENT = {"annotation", "returns", "decorator_list"}  # parts of a node that decide nothing here


@dataclass(frozen=True)
class Change:
    """``source`` with one thing changed. ``place``: the function it is in; ``old`` and ``new``: the lines it is on."""

    line: int
    place: str
    old: str
    new: str
    source: str


def changes(source: str) -> Iterator[Change]:
    """All of them, in the order of the source."""
    data = source.encode()
    starts = [0]
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node, place in _nodes(ast.parse(source), ""):
        for text in _variants(node):
            begin, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
            first, last = starts[node.lineno - 1], starts[node.end_lineno]
            old, new = data[first:last], data[first:begin] + text.encode() + data[end:last]
            whole = (data[:first] + new + data[last:]).decode()
            yield Change(node.lineno, place or "module", *(" ".join(x.decode().split()) for x in (old, new)), whole)


def _nodes(node: ast.AST, place: str) -> Iterator[tuple[ast.AST, str]]:
    if isinstance(node, ast.JoinedStr) or getattr(node, "name", "") == "extra_repr":
        return  # what is only shown
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        place = f"{place}.{node.name}".lstrip(".")
    yield node, place
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and name not in SILENT:
                yield from _nodes(child, place)


def _variants(node: ast.AST) -> list[str]:
    """What to write in a node's place."""

    def with_(**fields) -> str:
        values = {name: getattr(node, name, None) for name in node._fields}
        return ast.unparse(type(node)(**(values | fields)))

    match node:
        case ast.Compare(ops=[op]):
            return [with_(ops=[COMPARED[type(op)]()])]
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in COMPUTED:
            return [with_(op=COMPUTED[type(op)]())] + ["pass"] * isinstance(node, ast.AugAssign)
        case ast.BoolOp(op=op):
            return [with_(op=ast.Or() if isinstance(op, ast.And) else ast.And())]
        case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand):
            return [f"({ast.unparse(operand)})"]
        case ast.Constant(value=bool(value)):
            return [str(not value)]
        case ast.Constant(value=int(value) | float(value)):
            return [f"({value - 1})", f"{value + 1}"]
        case ast.Expr(value=ast.Call()) | ast.Raise() | ast.Break() | ast.Continue():
            return ["pass"]
        case ast.Attribute(attr="mT" | "T", value=value):
            return [ast.unparse(value)]
        case ast.Attribute(attr=name) if name in NAMES:
            return [with_(attr=NAMES[name])]
        case ast.Name(id=name) if name in NAMES:
            return [NAMES[name]]
        case ast.Call(keywords=[ast.keyword("min" | "max" as name, value), *more]):
            return [with_(keywords=[ast.keyword("max" if name == "min" else "min", value), *more])]
    return []
