"""System configuration: JSON values by key, with compare-and-set."""

from collections.abc import Iterator
from typing import Any, Final

from pydantic import JsonValue
from sqlalchemy import ColumnElement, delete, update
from sqlalchemy.dialects.postgresql import insert
from sqlmodel import col, select

from car_control_plane.errors import ConfigKeyNotFoundError, ControlPlaneError
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
        statement: Any
        if expected:
            statement = update(SystemConfig).where(*_identity(new.key, expected)).values(value=new.value)
        else:
            statement = insert(SystemConfig).values(key=new.key, value=new.value)
            if expected == ABSENT and expected is not None:
                statement = statement.on_conflict_do_nothing()
            else:
                statement = statement.on_conflict_do_update(
                    index_elements=[col(SystemConfig.key)], set_={"value": statement.excluded.value}
                )
        entry: SystemConfig | None = await self._executor.one_or_none(statement.returning(SystemConfig))
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
        statement = delete(SystemConfig).where(*_identity(wanted, check_version(expected_version)))
        if await self._executor.one_or_none(statement.returning(col(SystemConfig.key))) is None:
            version = await self._version(wanted)
            raise _not_found(key) if version is None else stale(f"key {key!r}", expected_version or ABSENT, version)
        self._executor.forget(SystemConfig, wanted)

    async def _find(self, key: str) -> SystemConfig | None:
        return await self._executor.get(SystemConfig, col(SystemConfig.key), normal_text(key, "the key"))

    async def _version(self, key: str) -> int | None:
        version: int | None = await self._executor.one_or_none(
            select(SystemConfig.version).where(SystemConfig.key == key)
        )
        return version

    async def _refusal(self, key: str, expected: int) -> ControlPlaneError:
        version = await self._version(key)
        return stale(f"key {key!r}", expected, version or ABSENT)


def _identity(key: str, expected_version: int | None) -> Iterator[ColumnElement[bool]]:
    yield col(SystemConfig.key) == key
    if expected_version is not None:
        yield col(SystemConfig.version) == expected_version


def _not_found(key: str) -> ConfigKeyNotFoundError:
    return ConfigKeyNotFoundError(f"there is no configuration key {key!r}", details={"key": key})
