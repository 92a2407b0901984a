"""Which JSON values a configuration key can hold, and where exactly the line runs.

That PostgreSQL gives every accepted value back is shown in `tests/integration/test_models_in_database.py`.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from pydantic import JsonValue, ValidationError

from car_control_plane.models import SystemConfig, SystemConfigCreate, SystemConfigUpdate
from car_control_plane.models.config import MAX_INTEGER_DIGITS, MAX_VALUE_BYTES, MAX_VALUE_DEPTH, check_json

WAYS_IN: dict[str, Callable[[Any], Any]] = {
    "check_json": check_json,
    "table": lambda value: SystemConfig(key="k", value=value).value,
    "create": lambda value: SystemConfigCreate(key="k", value=value).value,
    "update": lambda value: SystemConfigUpdate(value=value).value,
}
each_way_in = pytest.mark.parametrize("way", WAYS_IN)


def in_lists(depth: int, leaf: Any = None) -> Any:
    """Return a value inside as many lists."""
    for _ in range(depth):
        leaf = [leaf]
    return leaf


def in_objects(depth: int, leaf: Any = None) -> Any:
    for _ in range(depth):
        leaf = {"k": leaf}
    return leaf


def of_size(size: int) -> list[str]:
    """Return a value that has this many bytes as compact JSON."""
    return ["x" * (size - 4)]


GOOD: dict[str, Any] = {
    "null": None,
    "true": True,
    "zero": 0,
    "text": "",
    "a quotation mark": '"',
    "the last character": "\U0010ffff",
    "other control characters": "\x01\x1f\x7f\u2028\u202e",
    "an integer over 64 bits": 2**64,
    "the largest integer": 10**MAX_INTEGER_DIGITS - 1,
    "the smallest integer": 1 - 10**MAX_INTEGER_DIGITS,
    "the largest float": sys.float_info.max,
    "the smallest float": 5e-324,
    "an empty list": [],
    "an empty object": {},
    "an empty key": {"": None},
    "the same part twice": [[1], [1]],
    "lists to the limit": in_lists(MAX_VALUE_DEPTH),
    "lists to the limit, the last one empty": in_lists(MAX_VALUE_DEPTH - 1, []),
    "objects to the limit": in_objects(MAX_VALUE_DEPTH, 1),
    "both to the limit": in_lists(MAX_VALUE_DEPTH // 2, in_objects(MAX_VALUE_DEPTH // 2, "x")),
    "the limit in one branch of several": [1, [2], in_lists(MAX_VALUE_DEPTH - 1), {"k": 3}],
    "1 MiB": of_size(MAX_VALUE_BYTES),
    "1 MiB of two-byte characters": "\u00e9" * (MAX_VALUE_BYTES // 2 - 1),
}

endless: list[Any] = []
endless.append(endless)
branching: list[Any] = []
branching += [branching, branching]

BAD: dict[str, tuple[Any, str]] = {
    "NaN": (float("nan"), "NaN or infinity"),
    "infinity": (float("inf"), "NaN or infinity"),
    "negative infinity in an object": ({"a": {"b": [-float("inf")]}}, "NaN or infinity"),
    "a NUL character": ("a\x00b", "NUL characters"),
    "a NUL character in a key": ({"a\x00": 1}, "NUL characters"),
    "a NUL character in a key below": ([{"k": {"\x00": 1}}], "NUL characters"),
    "a lone surrogate": ("\ud800", "lone surrogates"),
    "the last surrogate in a key": ({"\udfff": 1}, "lone surrogates"),
    "an integer that is too long": (10**MAX_INTEGER_DIGITS, "4300 digits"),
    "a negative integer that is too long": ([-(10**MAX_INTEGER_DIGITS)], "4300 digits"),
    "lists beyond the limit": (in_lists(MAX_VALUE_DEPTH + 1), "200 levels deep"),
    "lists beyond the limit, the last one empty": (in_lists(MAX_VALUE_DEPTH, []), "200 levels deep"),
    "objects beyond the limit": (in_objects(MAX_VALUE_DEPTH + 1), "200 levels deep"),
    "beyond the limit in one branch": ([1, in_objects(MAX_VALUE_DEPTH), 2], "200 levels deep"),
    "beyond what pydantic walks": (in_lists(300), "200 levels deep"),
    "beyond what Python recurses": (in_lists(100_000), "200 levels deep"),
    "itself": (endless, "200 levels deep"),
    "1 MiB and a byte": (of_size(MAX_VALUE_BYTES + 1), r"1 MiB as JSON \(it has 1048577 bytes\)"),
    "1 MiB and a character": ("\u00e9" * (MAX_VALUE_BYTES // 2), "1 MiB"),
    "1 MiB of quotation marks": ('"' * (MAX_VALUE_BYTES // 2), "1 MiB"),
    "more nodes than bytes": ([0] * (MAX_VALUE_BYTES + 1), "1 MiB"),
}


@each_way_in
@pytest.mark.parametrize("name", GOOD)
def test_a_json_value_passes_unchanged(way: str, name: str) -> None:
    value = WAYS_IN[way](GOOD[name])
    assert value == GOOD[name]
    assert type(value) is type(GOOD[name])


@each_way_in
@pytest.mark.parametrize("name", BAD)
def test_what_postgresql_cannot_store_is_refused(way: str, name: str) -> None:
    value, reason = BAD[name]
    with pytest.raises(ValueError, match=reason) as caught:
        WAYS_IN[way](value)
    assert isinstance(caught.value, ValidationError) is (way != "check_json")


def test_a_value_that_holds_itself_twice_is_refused_before_it_fills_the_memory() -> None:
    """Walked level by level it doubles 200 times."""
    with pytest.raises(ValueError, match="1 MiB"):
        check_json(branching)
    with pytest.raises(ValidationError, match="200 levels deep"):
        SystemConfigUpdate(value=branching)


@pytest.mark.parametrize("value", [(1, 2), {1, 2}, b"x", object(), 1j, {1: 2}, {None: 2}, [{"k": (1,)}]], ids=repr)
def test_what_is_not_json_is_refused(value: Any) -> None:
    with pytest.raises(ValidationError):
        SystemConfigUpdate(value=value)
    row = SystemConfig(key="k", value=1)
    with pytest.raises(ValidationError):
        row.value = value
    assert row.value == 1


def test_a_refusal_of_depth_does_not_list_the_way_down() -> None:
    with pytest.raises(ValidationError) as caught:
        SystemConfigUpdate(value=in_lists(1000))
    (problem,) = caught.value.errors()
    assert problem["loc"] == ("value",)


def test_a_value_can_be_null_and_not_left_out() -> None:
    assert SystemConfigUpdate(value=None).model_dump() == {"value": None}
    assert SystemConfig(key="k", value=None).value is None
    for attempt in (
        lambda: SystemConfigUpdate.model_validate({}),
        lambda: SystemConfigCreate.model_validate({"key": "k"}),
    ):
        with pytest.raises(ValidationError, match="Field required"):
            attempt()


def test_the_schema_of_a_value_is_any_json() -> None:
    assert SystemConfigUpdate.model_json_schema()["$defs"] == {"JsonValue": {}}


relaxed = settings(deadline=None)
json_values: st.SearchStrategy[JsonValue] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00")),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00")), inner)
    ),
    max_leaves=30,
)


@relaxed
@given(json_values)
def test_every_json_value_passes_and_serialises_as_itself(value: JsonValue) -> None:
    schema = SystemConfigUpdate(value=value)
    assert schema.value == value
    assert json.loads(schema.model_dump_json()) == {"value": value}
    assert SystemConfigUpdate.model_validate_json(schema.model_dump_json()) == schema


@relaxed
@given(json_values, st.sampled_from([float("nan"), float("inf"), "\x00", "\udabc"]), st.integers(0, 9))
def test_one_bad_leaf_spoils_any_value(value: JsonValue, leaf: Any, depth: int) -> None:
    with pytest.raises(ValidationError):
        SystemConfigUpdate(value=[value, in_objects(depth, leaf), value])
