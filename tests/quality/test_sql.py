"""No SQL is put together from values: what reaches the server as text was written as text.

The rule reads the syntax tree. It follows names to their assignments in the same function or module; module constants (ALL_CAPS) may be
interpolated, since they are written in the source as well. What it must let pass is listed with its reason.
"""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.quality.programs import ROOT

SOURCES = sorted([*(ROOT / "car_control_plane").rglob("*.py"), *(ROOT / "alembic").rglob("*.py")])

RUNS_SQL = frozenset(
    {"text", "DDL", "execute", "executemany", "exec", "exec_driver_sql", "fetch", "fetchrow", "fetchval", "prepare"}
    | {"scalar", "scalars", "stream", "literal_column", "cursor"}
)

_SCHEMA_REVISION = "alembic/versions/001_control_plane_schema.py"
_SEALING_REVISION = "alembic/versions/003_sealed_connection_strings.py"
_CONSTANTS = "names of tables, functions and types from the constants of the file; DDL takes no parameters"

ALLOWED: Mapping[tuple[str, str], str] = {
    (_SCHEMA_REVISION, "upgrade"): _CONSTANTS,
    (_SCHEMA_REVISION, "downgrade"): _CONSTANTS,
    (_SCHEMA_REVISION, "_create_function"): _CONSTANTS,
    (_SCHEMA_REVISION, "_create_rules"): _CONSTANTS,
    (_SCHEMA_REVISION, "_create_stamps"): _CONSTANTS,
    (_SCHEMA_REVISION, "_create_log"): _CONSTANTS,
    (_SEALING_REVISION, "downgrade"): _CONSTANTS,
    (_SEALING_REVISION, "_create_keys"): _CONSTANTS,
    (_SEALING_REVISION, "_create_function"): _CONSTANTS,
    (_SEALING_REVISION, "_create_rules"): _CONSTANTS,
    (_SEALING_REVISION, "_stamp_databases_with"): _CONSTANTS,
    (_SEALING_REVISION, "_create_log"): _CONSTANTS,
}
"""(file, innermost function) -> why its SQL is put together."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Scope:
    """The assignments a name may come from: the function's own, then the module's."""

    def __init__(self, body: list[ast.stmt], outer: "Scope | None" = None) -> None:
        self.outer = outer
        self.values: dict[str, list[ast.expr]] = {}
        for statement in body:
            for node in ast.walk(statement):
                if isinstance(node, ast.Assign):
                    for target in node.targets:
                        self.note(target, node.value)
                elif isinstance(node, ast.AnnAssign | ast.AugAssign | ast.NamedExpr) and node.value is not None:
                    self.note(node.target, node.value)

    def note(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Name):
            self.values.setdefault(target.id, []).append(value)

    def look_up(self, name: str) -> list[ast.expr]:
        if name in self.values:
            return self.values[name]
        return self.outer.look_up(name) if self.outer else []


def is_constant(node: ast.expr) -> bool:
    if isinstance(node, ast.IfExp):
        return is_constant(node.body) and is_constant(node.orelse)
    return isinstance(node, ast.Constant) or (isinstance(node, ast.Name) and node.id.strip("_").isupper())


def is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def is_built(node: ast.expr, scope: Scope, seen: frozenset[str] = frozenset()) -> bool:
    """Tell whether the expression is a text put together from something that is not a constant."""
    match node:
        case ast.JoinedStr(values=parts):
            return any(isinstance(part, ast.FormattedValue) and not is_constant(part.value) for part in parts)
        case ast.BinOp(left=left, op=ast.Mod()):
            return is_text(left)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            pieces = [left, right]
            if any(map(is_text, pieces)) and not all(is_text(piece) or is_constant(piece) for piece in pieces):
                return True
        case ast.Call(func=ast.Attribute(value=value, attr="format" | "format_map" | "join" | "replace")):
            pieces = [value]
            if is_text(value):
                return True
        case ast.Call(func=ast.Name(id="str" | "text" | "DDL"), args=[first, *_]):
            pieces = [first]
        case ast.IfExp(body=body, orelse=orelse):
            pieces = [body, orelse]
        case ast.Name(id=name) if name not in seen:
            pieces, seen = scope.look_up(name), seen | {name}
        case _:
            pieces = []
    return any(is_built(piece, scope, seen) for piece in pieces)


def built_statements(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield (innermost function, line) of every call that runs a text which was put together."""
    module = Scope([node for node in tree.body if not isinstance(node, Function | ast.ClassDef)])

    def visit(node: ast.AST, scope: Scope, place: str) -> Iterator[tuple[str, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                yield from visit(child, Scope(child.body, scope), child.name)
                continue
            if isinstance(child, ast.Call) and runs_sql(child) and child.args and is_built(child.args[0], scope):
                yield place, child.lineno
            yield from visit(child, scope, place)

    yield from visit(tree, module, "<module>")


def runs_sql(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return name in RUNS_SQL


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_sql_is_not_put_together(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    found = set(built_statements(ast.parse(path.read_text(encoding="utf-8"))))
    assert {(place, line) for place, line in found if (name, place) not in ALLOWED} == set()


def test_every_exemption_is_still_needed() -> None:
    for name, place in ALLOWED:
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        assert place in {found for found, _ in built_statements(tree)}, f"{name}: {place} needs no exemption any more"


@pytest.mark.parametrize(
    "code",
    [
        'def f(c, name): c.execute(f"create database {name}")',
        'def f(c, name): c.execute("drop role %s" % name)',
        'def f(c, name): c.execute("alter role " + name)',
        'def f(c, name): c.execute("alter role {}".format(name))',
        'def f(c, name):\n    sql = f"select * from {name}"\n    c.execute(text(sql))',
        'def f(c, name):\n    sql = "select 1"\n    sql += f" where {name}"\n    c.execute(sql)',
        'def f(c, names): c.execute("select " + ", ".join(names))',
        'async def f(c, name): await c.fetchrow(f"{name}", 1)',
    ],
)
def test_the_rule_sees(code: str) -> None:
    assert list(built_statements(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        'def f(c, name): c.execute("select $1", name)',
        'SCHEMA = "s"\ndef f(c): c.execute(f"create schema {SCHEMA}")',
        'def f(c): c.execute("select 1 " + "union select 2")',
        """def f(c, wait): c.execute(f"select {'lock' if wait else 'try_lock'}()")""",
        "def f(c, statement): c.execute(statement)",
    ],
)
def test_the_rule_lets_pass(code: str) -> None:
    assert not list(built_statements(ast.parse(code)))
