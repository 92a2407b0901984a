"""The dialect of our engines: asyncpg's, with values and start as asyncpg has them.

JSON leaves and reaches the driver as text, for a connection is shared by sessions and by single statements that read rows without SQLAlchemy: what
one of them sees must not depend on who opened it. Columns with a JSON type are decoded by SQLAlchemy; a statement that is plain text gets text.
What SQLAlchemy asks each new server and asyncpg was told when it connected, is not asked again: four round trips fewer per engine.

Source: SQLAlchemy 2.1, "Setting up the JSON codec" in `PGDialect_asyncpg`, for third-party dialects to override; PostgreSQL manual, "Reporting
of parameter changes".
"""

import importlib
import json
import re
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg

from car_control_plane.errors import InvalidDataError

URL = "postgresql+car_control_plane://"
"""What `create_async_engine` takes; the way to the server is the creator's."""


def _json_reader() -> Callable[[str], Any]:
    """Return what reads JSON: orjson when it is installed (extra `speed`), else the standard library. Both give the same values."""
    try:
        orjson = importlib.import_module("orjson")
    except ImportError:
        return _read_plainly
    loads, problem = orjson.loads, orjson.JSONDecodeError

    def read(text: str) -> Any:
        if len(text) < _MANY or not _MANY_DIGITS(text):
            try:
                return loads(text)
            except problem:
                pass  # nested deeper than it likes
        return _read_plainly(text)

    return read


def _read_plainly(text: str) -> Any:
    """Read JSON by the standard library.

    Raises:
        InvalidDataError: It is more than Python reads. Nothing of ours stores that, but PostgreSQL can.
        JSONDecodeError: It is no JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError):
        pass
    raise InvalidDataError("a JSON value in the database has a number too long, or is nested too deeply, to be read")


_MANY = 18
_MANY_DIGITS = re.compile("[0-9]{18}").search
"""Whole numbers beyond 64 bits are floats to orjson."""

read_json = _json_reader()


class ControlPlaneDialect(PGDialect_asyncpg):
    """PostgreSQL by asyncpg; JSON is text in the driver."""

    supports_statement_cache = True
    supports_native_json_deserialization = False
    dialect_injects_custom_json_deserializer = False

    def __init__(self, json_deserializer: Callable[[str], Any] = read_json, **options: Any) -> None:
        super().__init__(json_deserializer=json_deserializer, **options)  # type: ignore[no-untyped-call]  # SQLAlchemy leaves its types out here

    def do_execute(self, cursor: Any, statement: Any, parameters: Any, context: Any = None) -> None:
        """Execute a statement; one that begins a transaction is prepared again when the schema has changed, for nothing was done yet."""
        dbapi: Any = self.dbapi
        begins = cursor._adapt_connection._transaction is None
        try:
            cursor.execute(statement, parameters)
        except dbapi.InvalidCachedStatementError:
            if not begins:
                raise
            cursor._adapt_connection.rollback()
            self._invalidate_schema_cache()  # type: ignore[no-untyped-call]  # SQLAlchemy leaves its types out here
            cursor._invalidate_schema_cache_asof = self._invalidate_schema_cache_asof
            cursor.execute(statement, parameters)

    async def setup_asyncpg_json_codec(self, conn: Any) -> None:
        """Leave asyncpg's own, which is text."""

    async def setup_asyncpg_jsonb_codec(self, conn: Any) -> None:
        """Leave asyncpg's own, which is text."""

    def _get_server_version_info(self, connection: Connection) -> tuple[int, ...]:
        version = _driver(connection).get_server_version()
        return version.major, version.micro  # since PostgreSQL 10 asyncpg puts 0 between them

    def _set_backslash_escapes(self, connection: Connection) -> None:
        self._backslash_escapes = _driver(connection).get_settings().standard_conforming_strings == "off"


def _driver(connection: Connection) -> Any:
    driver: Any = connection.connection.driver_connection
    return driver


registry.register("postgresql.car_control_plane", __name__, ControlPlaneDialect.__name__)
