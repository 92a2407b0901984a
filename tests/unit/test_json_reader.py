"""JSON is read the same with and without orjson."""

import json
import math
import sys
from typing import Any

import pytest
from hypothesis import given, strategies

from car_control_plane import dialect
from car_control_plane.errors import InvalidDataError

TEXTS = (
    "null",
    "0",
    "-0",
    "-0.0",
    "1.5",
    "1e2",
    "1E-7",
    "0.1",
    "9007199254740993",
    "123456789012345678",
    "-9223372036854775808",
    "18446744073709551616",
    "1208925819614629174706176",
    "1" + "0" * 300,
    "0." + "1" * 40,
    "5e-324",
    '"a\\u0000b"',
    '"\\ud83d\\ude00"',
    '"\U0001f600"',
    '"123456789012345678901234"',
    '{"a": 1, "a": 2}',
    "[" * 400 + "]" * 400,
    '[1, [2, {"b": [true, false, null]}]]',
)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(map(same, one.values(), other.values()))
    if isinstance(one, float):
        return isinstance(other, float) and math.copysign(1, one) == math.copysign(1, other) and one == other
    return type(one) is type(other) and one == other


def test_orjson_is_what_reads_here() -> None:
    assert dialect.read_json is not dialect._read_plainly


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:30])
def test_both_read_the_same(text: str) -> None:
    if text.startswith("[[["):
        assert repr(dialect.read_json(text)) == repr(json.loads(text))
    else:
        assert same(dialect.read_json(text), json.loads(text))


@given(
    strategies.recursive(
        strategies.none()
        | strategies.booleans()
        | strategies.integers()
        | strategies.floats(allow_nan=False, allow_infinity=False)
        | strategies.text(strategies.characters(exclude_categories=["Cs"])),
        lambda inner: strategies.lists(inner) | strategies.dictionaries(strategies.text("abü\x01"), inner),
    )
)
def test_whatever_is_stored_is_read_the_same(value: Any) -> None:
    for ascii_only in (True, False):
        text = json.dumps(value, ensure_ascii=ascii_only)
        assert same(dialect.read_json(text), json.loads(text))


@pytest.mark.parametrize("text", ["", "nul", "[1,]", "NaN?", '"\n"'])
def test_what_is_no_json_is_refused_by_both(text: str) -> None:
    with pytest.raises(json.JSONDecodeError):
        dialect.read_json(text)


def test_without_orjson_the_standard_library_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "orjson", None)
    assert dialect._json_reader() is dialect._read_plainly


@pytest.mark.parametrize("text", ["1" * 5000, "[" * 100_000 + "]" * 100_000], ids=["digits", "levels"])
def test_what_python_does_not_read_is_refused_in_our_words(text: str) -> None:
    for read in (dialect.read_json, dialect._read_plainly):
        with pytest.raises(InvalidDataError, match="too long, or is nested too deeply") as caught:
            read(text)
        assert caught.value.__context__ is None
