"""What is logged is what docs/reference/telemetry.md says: each record of ours names its event, and each event is documented."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from car_control_plane.telemetry import EVENTS
from tests.quality.programs import ROOT

LEVELS = {"debug": "DEBUG", "info": "INFO", "warning": "WARNING", "error": "ERROR", "exception": "ERROR"}
SOURCES = sorted((ROOT / "car_control_plane").rglob("*.py"))


def dictionaries(function: ast.AST) -> dict[str, ast.Dict]:
    """Return the dictionaries a function gives names to."""
    return {
        target.id: node.value
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def keys_of(extra: ast.expr, names: dict[str, ast.Dict]) -> Iterator[tuple[str, Any]]:
    """Yield the keys of a dictionary that can be read from the source, with their values if they are constants."""
    if isinstance(extra, ast.Name) and extra.id in names:
        extra = names[extra.id]
    if isinstance(extra, ast.Dict):
        for key, value in zip(extra.keys, extra.values, strict=True):
            if key is None:
                yield from keys_of(value, names)
            elif isinstance(key, ast.Constant):
                yield str(key.value), getattr(value, "value", None)


def records(tree: ast.AST) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield level, line and `extra` of each record that is logged."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        names = dictionaries(function)
        for node in ast.walk(function):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="_log"), attr=level)) if level in LEVELS:
                    extra = next((given.value for given in node.keywords if given.arg == "extra"), ast.Dict([], []))
                    yield LEVELS[level], node.lineno, dict(keys_of(extra, names))


LOGGED = [
    (path.relative_to(ROOT).as_posix(), *found)
    for path in SOURCES
    for found in records(ast.parse(path.read_text(encoding="utf-8")))
]


@pytest.mark.parametrize(("path", "level", "line", "extra"), LOGGED, ids=lambda value: str(value)[-40:])
def test_a_record_is_one_that_is_documented(path: str, level: str, line: int, extra: dict[str, Any]) -> None:
    known = {event.name: event for event in EVENTS}
    event = known.get(extra.get("event", ""))
    assert event is not None, f"{path}:{line} logs without a documented event"
    assert event.level == level
    assert extra.keys() <= {"event", *event.keys}
    assert f'"{event.logger}"' in Path(ROOT, path).read_text(encoding="utf-8")


def test_every_documented_event_is_logged() -> None:
    assert {event.name for event in EVENTS} == {extra.get("event") for *_, extra in LOGGED}
    assert len({event.name for event in EVENTS}) == len(EVENTS)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ('def f():\n    _log.info("x")', {}),
        ('def f():\n    _log.info("x", extra={"event": "e", "a": 1})', {"event": "e", "a": 1}),
        (
            'def f(g):\n    facts = {"a": g}\n    _log.info("x", extra={"event": "e", **facts})',
            {"event": "e", "a": None},
        ),
        ('def f():\n    facts = {"event": "e"}\n    _log.info("x", extra=facts)', {"event": "e"}),
    ],
)
def test_the_rule_sees(code: str, found: dict[str, Any]) -> None:
    assert [extra for *_, extra in records(ast.parse(code))] == [found]
