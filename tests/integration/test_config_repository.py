"""`SystemConfigRepository` against real PostgreSQL: every value comes back as it went in, every compare-and-set has one winner."""

import asyncio
from typing import Any

import pytest
from sqlmodel.ext.asyncio.session import AsyncSession

from car_control_plane.connection import AsyncConnectionManager
from car_control_plane.errors import ConfigKeyNotFoundError, InvalidDataError, StaleWriteError
from car_control_plane.repositories import SystemConfigRepository
from tests.fixtures.doors import on_both


@pytest.fixture
def config(where: Any) -> SystemConfigRepository:
    return SystemConfigRepository(where)


def nested(depth: int) -> Any:
    value: Any = "bottom"
    for i in range(depth):
        value = [value] if i % 2 else {"k": value}
    return value


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        False,
        0,
        -1,
        2**64,
        -(10**400),
        1.5,
        1e-300,
        "",
        "text",
        "ünï😀",
        [],
        {},
        [None],
        {"": None},
        {"a": [1, {"b": None}]},
    ],
    ids=repr,
)
async def test_values_come_back_as_they_went_in(
    session: AsyncSession, config: SystemConfigRepository, value: Any
) -> None:
    await config.set("key", value)
    session.expunge_all()
    stored = await config.get("key")
    assert stored == value
    assert type(stored) is type(value)


async def test_whole_numbers_lose_their_exponent(session: AsyncSession, config: SystemConfigRepository) -> None:
    await config.set("key", 1e22)
    session.expunge_all()
    assert await config.get("key") == 10**22  # an int now: JSONB keeps decimals


async def test_deep_and_large_values_are_stored_up_to_the_limit(
    session: AsyncSession, config: SystemConfigRepository
) -> None:
    await config.set("deep", nested(199))
    large = "x" * (1024 * 1024 - 2)  # with its quotes exactly 1 MiB
    await config.set("large", large)
    session.expunge_all()
    assert await config.get("deep") == nested(199)
    assert await config.get("large") == large


@on_both
@pytest.mark.parametrize(
    ("value", "says"),
    [
        (float("nan"), "NaN"),
        ([float("inf")], "NaN or infinity"),
        ({"a": {"b": float("-inf")}}, "NaN or infinity"),
        ("a\x00b", "NUL"),
        ({"a\x00": 1}, "NUL"),
        (["\ud800"], "surrogate|Unicode|utf|string"),
        (nested(201), "200 levels"),
        ("x" * (1024 * 1024 - 1), "1 MiB"),
        (object(), "value"),
        ({1: "key is no text"}, "value"),
        (b"bytes", "value"),
        ({1, 2}, "value"),
    ],
    ids=lambda value: str(value)[:20],
)
async def test_what_is_no_json_is_refused_and_the_old_value_stays(
    config: SystemConfigRepository, value: Any, says: str
) -> None:
    entry = await config.set("key", "old")
    with pytest.raises(InvalidDataError, match=says):
        await config.set("key", value)
    assert (await config.get_entry("key")).version == entry.version


@on_both
@pytest.mark.parametrize("key", ["", " a", "a ", "a\nb", "a\x00", "k" * 256, 5, None])
async def test_bad_keys_are_refused(config: SystemConfigRepository, key: Any) -> None:
    with pytest.raises(InvalidDataError):
        await config.set(key, 1)


@on_both
async def test_absence_and_null_differ(config: SystemConfigRepository) -> None:
    assert await config.get_or_default("key", "fallback") == "fallback"
    with pytest.raises(ConfigKeyNotFoundError, match="'key'"):
        await config.get("key")
    await config.set("key", None)
    assert await config.get("key") is None
    assert await config.get_or_default("key", "fallback") is None


@on_both
async def test_set_stores_replaces_and_counts(config: SystemConfigRepository) -> None:
    first = (await config.set("key", {"a": 1})).version
    same = (await config.set("key", {"a": 1})).version
    second = await config.set("key", {"a": 2})
    assert same == first
    assert second.version > first
    assert await config.get("key") == {"a": 2}


@on_both
async def test_compare_and_set(config: SystemConfigRepository) -> None:
    made = await config.set("key", 1, expected_version=0)
    first = made.version
    with pytest.raises(StaleWriteError):
        await config.set("key", 2, expected_version=0)
    second = (await config.set("key", 2, expected_version=first)).version
    with pytest.raises(StaleWriteError) as caught:
        await config.set("key", 3, expected_version=first)
    assert caught.value.details == {"expected_version": first, "version": second}
    with pytest.raises(StaleWriteError) as absent:
        await config.set("other", 3, expected_version=first)
    assert absent.value.details == {"expected_version": first, "version": 0}
    assert await config.get("key") == 2


@on_both
async def test_delete(config: SystemConfigRepository) -> None:
    version = (await config.set("key", 1)).version
    with pytest.raises(StaleWriteError):
        await config.delete("key", expected_version=version + 1)
    await config.delete("key", expected_version=version)
    assert await config.get_or_default("key", "gone") == "gone"
    for expected in (None, version):
        with pytest.raises(ConfigKeyNotFoundError):
            await config.delete("key", expected_version=expected)
    assert await config.get_or_default("key") is None


@on_both
async def test_list_pages_in_byte_order(config: SystemConfigRepository) -> None:
    keys = ["B", "a.1", "a.2", "a.10", "b", "é", "ä"]
    for key in keys:
        await config.set(key, key)
    seen: list[str] = []
    after: str | None = None
    while True:
        page = await config.list(limit=2, after=after)
        seen += [entry.key for entry in page]
        if (after := page.next_cursor) is None:
            break
    assert seen == sorted(keys, key=str.encode)
    assert [entry.key for entry in await config.list(prefix="a.")] == ["a.1", "a.10", "a.2"]
    assert [entry.key for entry in await config.list(prefix="nothing")] == []


@on_both
@pytest.mark.parametrize(
    "arguments", [{"limit": 0}, {"after": "?"}, {"after": "é"}, {"after": "AA=="}, {"prefix": "\x00"}]
)
async def test_bad_listing_arguments_are_refused(config: SystemConfigRepository, arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidDataError):
        await config.list(**arguments)


async def test_of_concurrent_compare_and_sets_exactly_one_wins(shared_manager: AsyncConnectionManager) -> None:
    async def swap(value: int, expected: int) -> bool:
        try:
            async with shared_manager.get_session() as session:
                await SystemConfigRepository(session).set("key", value, expected_version=expected)
        except StaleWriteError:
            return False
        return True

    assert sum(await asyncio.gather(*(swap(i, 0) for i in range(8)))) == 1
    async with shared_manager.get_session() as session:
        version = (await SystemConfigRepository(session).get_entry("key")).version
    assert sum(await asyncio.gather(*(swap(100 + i, version) for i in range(8)))) == 1
