"""A cursor is a position and nothing else: it comes back as it was, and nothing else is taken for one."""

import uuid
from datetime import UTC, datetime
from typing import Any
from unicodedata import normalize

import pytest
from hypothesis import given, strategies as st

from car_control_plane.errors import InvalidDataError
from car_control_plane.repositories.base import decode_cursor, decode_key_cursor, encode_cursor, encode_key_cursor

moments = st.datetimes(min_value=datetime(1, 1, 2), max_value=datetime(9999, 12, 30), timezones=st.just(UTC))  # noqa: DTZ001 -- bounds are naive
keys = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp", "Cf")), min_size=1, max_size=255)


@given(moments, st.uuids())
def test_a_position_comes_back_exactly(moment: datetime, key: uuid.UUID) -> None:
    assert decode_cursor(encode_cursor(moment, key)) == (moment, key)


@given(moments, st.uuids(), moments, st.uuids())
def test_two_positions_have_two_cursors(m1: datetime, k1: uuid.UUID, m2: datetime, k2: uuid.UUID) -> None:
    assert (encode_cursor(m1, k1) == encode_cursor(m2, k2)) == ((m1, k1) == (m2, k2))


@given(st.text() | st.from_regex(r"[A-Za-z0-9_-]{34}", fullmatch=True))
def test_whatever_is_accepted_is_what_we_write(text: str) -> None:
    try:
        position = decode_cursor(text)
    except InvalidDataError:
        return
    assert encode_cursor(*position) == text


@given(keys)
def test_a_key_comes_back_exactly(key: str) -> None:
    name = normalize("NFC", key)
    assert decode_key_cursor(encode_key_cursor(name)) == name


@given(st.text())
def test_a_key_cursor_is_refused_or_ours(text: str) -> None:
    try:
        key = decode_key_cursor(text)
    except InvalidDataError:
        return
    assert encode_key_cursor(key) == text


@pytest.mark.parametrize("value", [None, 5, b"x", [], "é"])
def test_what_is_no_text_is_refused(value: Any) -> None:
    for decode in (decode_cursor, decode_key_cursor):
        with pytest.raises(InvalidDataError):
            decode(value)
