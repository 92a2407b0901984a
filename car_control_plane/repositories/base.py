"""What all repositories share: pages, cursors, and the words for a write that found no row."""

import base64
import struct
import uuid
from collections.abc import AsyncIterator, Collection, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Generic, TypeVar, cast

from pydantic import BaseModel, ValidationError
from sqlalchemy import ColumnElement, DateTime, Uuid, literal, tuple_
from sqlmodel import SQLModel
from sqlmodel.ext.asyncio.session import AsyncSession
from sqlmodel.sql.expression import SelectOfScalar

from car_control_plane.errors import ConfigurationError, InvalidDataError, StaleWriteError
from car_control_plane.execution import AsyncReadSession, DirectExecutor, Door, Executor, SessionExecutor, many_by
from car_control_plane.models.base import check_text

T = TypeVar("T")
B = TypeVar("B", bound=BaseModel)
R = TypeVar("R")
E = TypeVar("E", bound=StrEnum)
K = TypeVar("K")
M = TypeVar("M", bound=SQLModel)

MAX_PAGE = 500
"""The largest page; `stream` is for more."""

STREAM_ROWS = 1_000
"""Rows `stream` reads at a time."""


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """Some rows in order, and where to go on.

    Attributes:
        items: The rows; empty when nothing matched.
        next_cursor: Pass it as `after` to get the next page; None on the last one. Opaque.
    """

    items: tuple[T, ...]
    next_cursor: str | None

    def __iter__(self) -> Iterator[T]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


class Repository:
    """Runs its verbs in a session, or on a manager.

    In a session they run in its transaction, see its rows and use its identity map; none of them commits. Not for use by two tasks at once, as the
    session is not.

    On a manager each verb is a transaction of its own, stored when it returns, and rows are detached instances. For any number of tasks. Reads are
    repeated when their connection is lost; a write whose connection is lost may have been done, as its error says.

    Args:
        where: A session, or a manager.

    Raises:
        ConfigurationError: It is neither.
    """

    def __init__(self, where: AsyncSession | AsyncReadSession | Door) -> None:
        self._executor: Executor
        if isinstance(where, AsyncSession):
            self._executor = SessionExecutor(where)
        elif hasattr(where, "fetch") and hasattr(where, "coalescers"):
            self._executor = DirectExecutor(cast("Door", where))
        else:
            raise ConfigurationError(f"a repository needs a session or a manager, and not {type(where).__name__}")

    async def _many(self, model: type[M], column: str, keys: Collection[K]) -> dict[K, M]:
        """Return the rows with these keys by key; one query however many."""
        if not keys:
            return {}
        place: Any = model, column
        rows: list[M] = await self._executor.all(many_by(*place), {"keys": list(keys)})
        return {getattr(row, column): row for row in rows}

    async def _page(
        self, statement: SelectOfScalar[R], order: tuple[Any, Any], *, limit: int, after: str | None
    ) -> Page[R]:
        """Return one page of the rows a statement selects, in an order of a time and an id: one range scan of their index, however deep."""
        size = check_limit(limit)
        rows: list[R] = await self._executor.all(_following(statement, order, after, size + 1))
        items = tuple(rows[:size])
        return Page(items, _position(items[-1], order) if len(rows) > size else None)

    async def _stream(self, statement: SelectOfScalar[R], order: tuple[Any, Any]) -> AsyncIterator[R]:
        """Yield all rows a statement selects, in the order `_page` has; one query for every 1,000 of them."""
        after: str | None = None
        while True:
            rows: list[R] = await self._executor.all(_following(statement, order, after, STREAM_ROWS))
            after = _position(rows[-1], order) if len(rows) == STREAM_ROWS else None
            rows.reverse()
            while rows:
                yield rows.pop()  # let go of each row before the next
            if after is None:
                return


def _following(statement: SelectOfScalar[R], order: tuple[Any, Any], after: str | None, size: int) -> SelectOfScalar[R]:
    if after is not None:
        moment, key = decode_cursor(after)
        position = tuple_(literal(moment, DateTime(timezone=True)), literal(key, Uuid()))
        statement = statement.where(tuple_(*order) > position)
    return statement.order_by(*order).limit(size)


def _position(row: Any, order: tuple[Any, Any]) -> str:
    return encode_cursor(*(getattr(row, column.key) for column in order))


def members(kind: type[E], given: E | Iterable[E], name: str) -> list[E]:
    """Return one or several enum members, given as members or as their values.

    Raises:
        InvalidDataError: There is no such member.
    """
    try:
        return [kind(one) for one in ([given] if isinstance(given, str) else given)]
    except (ValueError, TypeError):
        pass
    raise InvalidDataError(f"{name} must be {' or '.join(repr(str(member)) for member in kind)}, or several of them")


def check_limit(limit: object) -> int:
    """Return the size of a page.

    Raises:
        InvalidDataError: It is not a whole number from 1 to 500.
    """
    if not isinstance(limit, int) or isinstance(limit, bool) or not 1 <= limit <= MAX_PAGE:
        raise InvalidDataError(
            f"limit must be a whole number from 1 to {MAX_PAGE}", hint="To read everything, use stream()."
        )
    return limit


def as_uuid(value: object, what: str) -> uuid.UUID:
    """Return an id given as `UUID` or as text.

    Raises:
        InvalidDataError: It is neither.
    """
    if isinstance(value, uuid.UUID):
        return value
    if isinstance(value, str):
        try:
            return uuid.UUID(value)
        except ValueError:
            pass
    raise InvalidDataError(f"{what} must be a UUID", hint="To find a tenant by its name, use get_by_name().")


def check_version(version: object) -> int | None:
    """Return the version a caller expects.

    Raises:
        InvalidDataError: It is not a whole number that a `version` column can hold.
    """
    if version is None:
        return None
    if not isinstance(version, int) or isinstance(version, bool) or not 0 <= version < 2**63:
        raise InvalidDataError("expected_version must be a row's version, a whole number")
    return version


def validated(schema: type[B], data: Any, *, index: int | None = None) -> B:
    """Return `data`, the item at `index` of a longer input, as an instance of the schema.

    Raises:
        InvalidDataError: It does not fit. The message names fields and reasons, never values.
    """
    if isinstance(data, schema):
        return data
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        problems = error.errors(include_input=False, include_url=False, include_context=False)
    said = "; ".join(
        f"{'.'.join(map(str, p['loc'])) or schema.__name__}: {p['msg'].removeprefix('Value error, ')}" for p in problems
    )
    details: dict[str, Any] = {"fields": [".".join(map(str, p["loc"])) for p in problems]}
    if index is not None:
        said, details["index"] = f"item {index}: {said}", index
    raise InvalidDataError(said, details=details)


def stale(what: str, expected: int, found: int) -> StaleWriteError:
    """Build the error for a row that has moved on."""
    return StaleWriteError(
        f"{what} has changed: version {expected} was expected, it is at {found}",
        details={"expected_version": expected, "version": found},
    )


def normal_text(text: str, what: str) -> str:
    """Return text to look for in the form names are stored in.

    Raises:
        InvalidDataError: It holds what no name can hold, and PostgreSQL would choke on.
    """
    try:
        return check_text(text)
    except (ValueError, TypeError) as problem:
        reason = str(problem)
    raise InvalidDataError(f"{what} {reason}")


def begins_with(column: Any, prefix: str) -> Iterator[ColumnElement[bool]]:
    """Write a prefix as a range in byte order: unlike LIKE with a parameter, it uses the index in a generic plan too."""
    first = normal_text(prefix, "the prefix")
    if not first:
        return
    yield column.op("~>=~", is_comparison=True)(first)
    end = first.rstrip("\U0010ffff")
    if end:
        following = ord(end[-1]) + 1
        after = end[:-1] + chr(0xE000 if following == 0xD800 else following)  # noqa: PLR2004 -- surrogates are no characters
        yield column.op("~<~", is_comparison=True)(after)


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_CURSOR = struct.Struct(">Bq16s")
_CURSOR_FORM = 1
_CURSOR_HINT = "Pass next_cursor of the previous page, unchanged."


def encode_cursor(created_at: datetime, key: uuid.UUID) -> str:
    """Write the position of a row in the order (created_at, key) as URL-safe text of 34 characters."""
    microseconds = (created_at - _EPOCH) // timedelta(microseconds=1)
    return base64.urlsafe_b64encode(_CURSOR.pack(_CURSOR_FORM, microseconds, key.bytes)).decode().rstrip("=")


def decode_cursor(cursor: str) -> tuple[datetime, uuid.UUID]:
    """Read a position back.

    Raises:
        InvalidDataError: This is not a cursor `encode_cursor` wrote.
    """
    position: tuple[datetime, uuid.UUID] | None = None
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        form, microseconds, key = _CURSOR.unpack(raw)
        if form == _CURSOR_FORM:
            position = _EPOCH + timedelta(microseconds=microseconds), uuid.UUID(bytes=key)
    except (TypeError, ValueError, struct.error, OverflowError):
        pass
    # Written again and compared: so each position has exactly one cursor, and a cut or padded one is refused.
    if position is None or encode_cursor(*position) != cursor:
        raise InvalidDataError("this is not a cursor", hint=_CURSOR_HINT)
    return position


def encode_key_cursor(key: str) -> str:
    """Write the position of a key in byte order as URL-safe text."""
    return base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")


def decode_key_cursor(cursor: str) -> str:
    """Read a position back.

    Raises:
        InvalidDataError: This is not a cursor `encode_key_cursor` wrote.
    """
    try:
        key = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode()
    except (TypeError, ValueError):
        key = None
    if key is None or encode_key_cursor(key) != cursor:
        raise InvalidDataError("this is not a cursor", hint=_CURSOR_HINT)
    return normal_text(key, "the cursor")
