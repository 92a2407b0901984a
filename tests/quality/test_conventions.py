"""House rules that no linter knows, read from the syntax tree."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from car_control_plane import errors
from tests.quality.programs import ROOT

SOURCES = sorted((ROOT / "car_control_plane").rglob("*.py"))
SCRIPTS = sorted((ROOT / "alembic").rglob("*.py"))

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def public_functions(tree: ast.Module) -> Iterator[tuple[str, Function]]:
    """Yield what a user may call: functions of the module, and methods of its classes, without an underscore in front."""
    for node in tree.body:
        if isinstance(node, Function) and not node.name.startswith("_"):
            yield node.name, node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for part in node.body:
                if isinstance(part, Function) and not part.name.startswith("_") and not is_overload(part):
                    yield f"{node.name}.{part.name}", part


def is_overload(function: Function) -> bool:
    return any(ast.unparse(decorator) in {"overload", "typing.overload"} for decorator in function.decorator_list)


def own_nodes(function: Function) -> Iterator[ast.AST]:
    """Walk the function without the functions inside it."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, Function | ast.Lambda | ast.ClassDef):
            waiting += ast.iter_child_nodes(node)


def raised(function: Function) -> set[str]:
    """Return the errors of ours that the function raises itself."""
    names = set()
    for node in own_nodes(function):
        if isinstance(node, ast.Raise) and node.exc is not None:
            kind = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            names.add(ast.unparse(kind).rpartition(".")[2])
    return names & set(errors.__all__)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_public_function_says_what_it_does_and_which_errors_it_raises(path: Path) -> None:
    missing = []
    for name, function in public_functions(ast.parse(path.read_text(encoding="utf-8"))):
        text = ast.get_docstring(function)
        if not text:
            missing.append(f"{name}: no docstring")
            continue
        if "cli" in path.parts:  # there the docstring is the text of --help
            continue
        documented = text.partition("Raises:")[2]
        missing += [f"{name}: {error} is not under Raises" for error in raised(function) if error not in documented]
    assert missing == []


EXEMPTION = re.compile(
    r"# (?:noqa|type: ignore|pyright: ignore)(?P<codes>: [A-Z]+[0-9]+(?:, [A-Z]+[0-9]+)*|\[[\w, -]+\])?(?P<reason>.*)"
)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_an_exemption_names_its_rule_and_its_reason(path: Path) -> None:
    """The reason stands behind it, or on a line of its own above."""
    before = ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if found := EXEMPTION.search(line):
            assert found["codes"], f"{name_of(path)}:{number}: names no rule"
            assert found["reason"].strip(" #-") or before.lstrip().startswith("# "), f"{name_of(path)}:{number}: why?"
        before = line


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.parent.name == "versions"], ids=name_of)
def test_a_revision_imports_nothing_of_ours(path: Path) -> None:
    """Revisions are frozen history: they must not change when a model does."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    assert imported <= {"alembic", "sqlalchemy"}
