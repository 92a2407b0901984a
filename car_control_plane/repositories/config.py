"""System configuration: JSON values by key, with compare-and-set."""

import functools
from collections.abc import Iterable
from typing import Any, Final

from pydantic import JsonValue
from sqlalchemy import BindParameter, bindparam, delete, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import FromStatement
from sqlmodel import col, select

from car_control_plane.errors import ConfigKeyNotFoundError, ControlPlaneError
from car_control_plane.execution import Statement
from car_control_plane.models import SystemConfig, SystemConfigCreate
from car_control_plane.repositories.base import (
    Page,
    Repository,
    begins_with,
    check_limit,
    check_version,
    decode_key_cursor,
    encode_key_cursor,
    normal_text,
    stale,
    validated,
)

ABSENT: Final = 0
"""As `expected_version`: the key must not exist yet. Versions of rows begin at 1."""


class SystemConfigRepository(Repository):
    """The configuration of the system: JSON values by key.

    Every verb is one round trip; a change that is refused costs one more, to find out why. Refused changes write nothing and leave the session
    usable.
    """

    async def get(self, key: str) -> JsonValue:
        """Return the value of a key.

        Raises:
            ConfigKeyNotFoundError: There is no such key.
        """
        return (await self.get_entry(key)).value

    async def get_or_default(self, key: str, default: JsonValue = None) -> JsonValue:
        """Return the value of a key, or `default` when there is no such key. A stored null is a value, not an absence.

        Raises:
            InvalidDataError: No key can be spelt like that.
        """
        entry = await self._find(key)
        return default if entry is None else entry.value

    async def get_entry(self, key: str) -> SystemConfig:
        """Return the row of a key: its value with its version, for a compare-and-set.

        Raises:
            ConfigKeyNotFoundError: There is no such key.
        """
        entry = await self._find(key)
        if entry is None:
            error = _not_found(key)
            raise error
        return entry

    async def get_many(self, keys: Iterable[str]) -> dict[str, JsonValue]:
        """Return the values of these keys by key; keys that there are not are left out. One query however many keys.

        Raises:
            InvalidDataError: No key can be spelt like one of them.
        """
        entries = await self._many(SystemConfig, "key", {normal_text(key, "the key") for key in keys})
        return {key: entry.value for key, entry in entries.items()}

    async def list(self, *, prefix: str = "", limit: int = 50, after: str | None = None) -> Page[SystemConfig]:
        """Return one page of the keys that begin with `prefix`, in byte order of the key.

        Args:
            prefix: What the key begins with; upper and lower case differ.
            limit: Rows of the page, 1 to 500.
            after: `next_cursor` of the previous page.

        Raises:
            InvalidDataError: `limit` is out of range or `after` is not a cursor.
        """
        size = check_limit(limit)
        order = col(SystemConfig.key).collate("C")
        statement = select(SystemConfig).where(*begins_with(col(SystemConfig.key), prefix))
        if after is not None:
            statement = statement.where(order > decode_key_cursor(after))
        rows = await self._executor.all(statement.order_by(order).limit(size + 1))
        items = tuple(rows[:size])
        return Page(items, encode_key_cursor(items[-1].key) if len(rows) > size else None)

    async def set(self, key: str, value: JsonValue, *, expected_version: int | None = None) -> SystemConfig:
        """Store a value and return its row. Storing the value a key already has changes nothing, not even the version.

        JSONB keeps numbers as decimals: 1e300 comes back as the integer with 301 digits.

        Args:
            key: 1 to 255 characters.
            value: Any JSON value up to 1 MiB and 200 levels of nesting.
            expected_version: Store only if the key is at this version; 0 only if it does not exist yet.

        Raises:
            StaleWriteError: The key is not at `expected_version`.
            InvalidDataError: The key or the value is not acceptable.
        """
        new = validated(SystemConfigCreate, {"key": key, "value": value})
        expected = check_version(expected_version)
        statement = _set_statement(expected if expected is None else min(expected, 1))
        params = {"wanted": new.key, "new_value": new.value} | ({"expected_version": expected} if expected else {})
        entry: SystemConfig | None = await self._executor.one_or_none(statement, params)
        if entry is None:
            raise await self._refusal(new.key, expected or ABSENT)
        return entry

    async def delete(self, key: str, *, expected_version: int | None = None) -> None:
        """Remove a key.

        Raises:
            ConfigKeyNotFoundError: There is no such key.
            StaleWriteError: The key is not at `expected_version`.
        """
        wanted = normal_text(key, "the key")
        versioned = check_version(expected_version) is not None
        params: dict[str, Any] = {"wanted": wanted} | ({"expected_version": expected_version} if versioned else {})
        if await self._executor.one_or_none(_delete_statement(versioned=versioned), params) is None:
            version = await self._version(wanted)
            raise _not_found(key) if version is None else stale(f"key {key!r}", expected_version or ABSENT, version)
        self._executor.forget(SystemConfig, wanted)

    async def _find(self, key: str) -> SystemConfig | None:
        return await self._executor.get(SystemConfig, col(SystemConfig.key), normal_text(key, "the key"))

    async def _version(self, key: str) -> int | None:
        version: int | None = await self._executor.one_or_none(_VERSION, {"wanted": key})
        return version

    async def _refusal(self, key: str, expected: int) -> ControlPlaneError:
        version = await self._version(key)
        return stale(f"key {key!r}", expected, version or ABSENT)


@functools.cache  # building a statement costs more than running it
def _set_statement(expected: int | None) -> FromStatement[Any]:
    """Build what stores a value: whatever there is (None), if there is nothing (0), or over a version (1)."""
    columns: Any = SystemConfig
    key: BindParameter[str] = bindparam("wanted", type_=columns.key.type)
    value: BindParameter[Any] = bindparam("new_value", type_=columns.value.type)
    statement: Any
    if expected:
        statement = update(SystemConfig).where(
            col(SystemConfig.key) == key, col(SystemConfig.version) == bindparam("expected_version")
        )
        statement = statement.values(value=value)
    else:
        statement = insert(SystemConfig).values(key=key, value=value)
        if expected == ABSENT and expected is not None:
            statement = statement.on_conflict_do_nothing()
        else:
            statement = statement.on_conflict_do_update(
                index_elements=[col(SystemConfig.key)], set_={"value": statement.excluded.value}
            )
    return FromStatement([SystemConfig], statement.returning(SystemConfig))


@functools.cache
def _delete_statement(*, versioned: bool) -> Statement:
    statement = delete(SystemConfig).where(col(SystemConfig.key) == bindparam("wanted"))
    if versioned:
        statement = statement.where(col(SystemConfig.version) == bindparam("expected_version"))
    return statement.returning(col(SystemConfig.key))


_VERSION = select(SystemConfig.version).where(SystemConfig.key == bindparam("wanted"))


def _not_found(key: str) -> ConfigKeyNotFoundError:
    return ConfigKeyNotFoundError(f"there is no configuration key {key!r}", details={"key": key})
