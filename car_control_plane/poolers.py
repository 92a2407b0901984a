"""Connections through a pooler in transaction mode, PgBouncer first of all: told apart, and made safe.

Such a pooler gives every transaction whichever server connection is free. A client that prepares a statement by name, and runs it in the next
transaction, runs what another client prepared under that name, and is given its rows: wrong answers, without an error. Whatever else lasts longer
than a transaction, such as settings, session locks and LISTEN, ends up with somebody else.

What this module hides is how a connection lives with that. `Poolers` knows which addresses lead through one. `FramedConnection` prepares nothing by
name, begins every transaction with its settings (SET LOCAL, in the round trip of BEGIN), puts a transaction around every statement that comes without
one, and refuses what cannot work.

It does not read SQL: what it refuses are the words people use, as a help. It does not tell session mode from transaction mode, and it uses no
prepared statements through poolers that would follow them (PgBouncer from 1.21 on), because nothing on the wire says that one does.

Sources: `docs/adr/0020-poolers-are-told-apart-when-connecting.md`; asyncpg 0.32, `Connection._get_statement` (an unnamed statement is parsed again
with each use when the cache is off); PgBouncer's manual, "SQL feature map for pooling modes".
"""

import asyncio
import math
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial
from typing import Any, Final, Literal, TypeVar

import asyncpg
from sqlalchemy import event
from sqlalchemy.engine import Engine

from car_control_plane.dsn import Host
from car_control_plane.errors import ConfigurationError, DirectConnectionRequiredError

__all__ = [
    "UNSUPPORTED",
    "FramedConnection",
    "PoolerMode",
    "Poolers",
    "keep_no_statements",
    "leads_through_pooler",
    "startup_settings",
]

PoolerMode = Literal["detect", "none", "transaction"]

T = TypeVar("T")

UNSUPPORTED: Final = "08P01"
"""What a pooler refuses a run-time parameter with, and a good deal else."""

_UNDO_SECONDS: Final = 2.0


# --- telling them apart -----------------------------------------------------------------------------------------------


class Poolers:
    """What is known about the addresses one connection string names.

    Args:
        mode: `detect` asks; `none` takes no address to lead through a pooler, `transaction` all.
    """

    def __init__(self, mode: PoolerMode) -> None:
        self._mode = mode
        self._found: set[Host] = set()
        self._asked: dict[Host, float] = {}

    def expect(self, host: Host) -> bool:
        """Tell whether the address is known to lead through a pooler."""
        return self._mode == "transaction" or host in self._found

    def remember(self, host: Host) -> None:
        """Note that the address leads through a pooler; it stays so, for what is safe through a pooler is safe without one."""
        self._found.add(host)

    @property
    def may_exist(self) -> bool:
        """Whether an address may lead through a pooler without anybody having said so."""
        return self._mode == "detect"

    async def find(self, host: Host, connection: asyncpg.Connection) -> bool:
        """Tell of a new connection whether a pooler is in between; at most one round trip, and none when the address was asked a minute ago.

        The process id a pooler gives its clients is its own invention: PgBouncer's is a random number of 32 bits, so that one look at it tells of
        999 in 1,000 without asking.
        """
        given, now = int(connection.get_server_pid()), time.monotonic()
        if 0 < given <= _HIGHEST_PID and now - self._asked.get(host, -math.inf) < _ASK_AGAIN_SECONDS:
            return False
        # Without parameters, for a statement that takes some is prepared: the answer is in the number of rows.
        answer = await connection.execute(_SAME_PROCESS.replace("0", str(given)))
        if answer != "SELECT 1":
            return True
        self._asked[host] = now
        return False


_HIGHEST_PID: Final = 1 << 22
"""Of Linux; another system's are asked about."""

_ASK_AGAIN_SECONDS: Final = 60.0
_SAME_PROCESS: Final = "SELECT WHERE pg_catalog.pg_backend_pid() = 0"


def leads_through_pooler(connection: Any) -> bool:
    """Tell whether an asyncpg connection was found to lead through a pooler."""
    return issubclass(
        type(connection), FramedConnection
    )  # isinstance is true of every connection: asyncpg redefines it


def startup_settings(settings: Mapping[str, str]) -> dict[str, str]:
    """Return the run-time parameters that every pooler takes from its clients when they connect."""
    return {name: value for name, value in settings.items() if name == "application_name"}


def keep_no_statements(engine: Engine) -> None:
    """Have SQLAlchemy keep no prepared statements of connections that lead through a pooler."""
    event.listen(engine, "connect", _keep_no_statements, insert=True)  # before its dialect runs its first statements


def _keep_no_statements(connection: Any, _: Any) -> None:
    if leads_through_pooler(connection.driver_connection):
        connection._prepared_statement_cache = None  # a setting of the engine otherwise, and engines have both kinds


# --- a connection through one -----------------------------------------------------------------------------------------


class FramedConnection(asyncpg.Connection):  # type: ignore[misc]  # asyncpg has no types
    """An asyncpg connection every statement of which is in a transaction that has our settings.

    Opened with `statement_cache_size=0`. Costs up to three round trips more for a statement on its own, none in a transaction. A statement on its own
    takes the command's time limit and `_UNDO_SECONDS` at most.
    """

    _settings = ""
    _seconds: float | None = None

    async def frame_with(self, settings: Mapping[str, str], seconds: float | None) -> bool:
        """State the settings of every transaction, and the seconds a statement of its own may take; one round trip shows whether they are good.

        Raises:
            PostgresError: The server does not take one of them.
            ConfigurationError: `options` has more than settings.
        """
        # The order is the server's: what stands in `options` gives way.
        pairs = [*_read_options(settings.get("options", "")), *settings.items()]
        self._settings = "".join(f"; {_set_local(name, value)}" for name, value in pairs if name != "options")
        self._seconds = seconds
        return bool(await self._begin("BEGIN", then="; ROLLBACK"))

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:  # noqa: ASYNC109 -- asyncpg's
        """Run a statement, or without arguments several, and return the server's last answer.

        What begins a transaction brings its settings along. Statements without arguments, outside of a transaction, have the server's settings.

        Raises:
            DirectConnectionRequiredError: The statement leaves something with the session.
        """
        if query.startswith("BEGIN"):
            return await self._begin(query, timeout=timeout)
        _refuse(query)
        run = partial(super().execute, query, *args, timeout=timeout)
        return await (self._framed(run, timeout) if args else run())

    async def executemany(self, command: str, args: Any, **how: Any) -> None:
        """As asyncpg's, in one transaction."""
        _refuse(command)
        await self._framed(partial(super().executemany, command, args, **how), how.get("timeout"))

    async def fetch(self, query: str, *args: Any, **how: Any) -> Any:
        """As asyncpg's, in a transaction."""
        _refuse(query)
        return await self._framed(partial(super().fetch, query, *args, **how), how.get("timeout"))

    async def fetchval(self, query: str, *args: Any, **how: Any) -> Any:
        """As asyncpg's, in a transaction."""
        _refuse(query)
        return await self._framed(partial(super().fetchval, query, *args, **how), how.get("timeout"))

    async def fetchrow(self, query: str, *args: Any, **how: Any) -> Any:
        """As asyncpg's, in a transaction."""
        _refuse(query)
        return await self._framed(partial(super().fetchrow, query, *args, **how), how.get("timeout"))

    async def fetchmany(self, query: str, args: Any, **how: Any) -> Any:
        """As asyncpg's, in one transaction."""
        _refuse(query)
        return await self._framed(partial(super().fetchmany, query, args, **how), how.get("timeout"))

    async def copy_from_query(self, query: str, *args: Any, **how: Any) -> str:
        """As asyncpg's, in a transaction."""
        return str(await self._framed(partial(super().copy_from_query, query, *args, **how), how.get("timeout")))

    async def copy_records_to_table(self, table_name: str, **how: Any) -> str:
        """As asyncpg's, in a transaction."""
        return str(await self._framed(partial(super().copy_records_to_table, table_name, **how), how.get("timeout")))

    async def prepare(self, query: str, *, name: str | None = None, **how: Any) -> Any:
        """As asyncpg's, without a name: the statement is sent again with every use."""
        del name
        _refuse(query)
        return await self._framed(partial(super().prepare, query, name="", **how), how.get("timeout"))

    def get_reset_query(self) -> str:
        """Nothing outlives a transaction here, so that there is nothing to reset."""
        return ""

    async def add_listener(self, channel: str, callback: Any) -> None:
        """Refuse: notifications would arrive at another client, or nowhere.

        Raises:
            DirectConnectionRequiredError: Always.
        """
        del callback
        raise DirectConnectionRequiredError("LISTEN does not work through a connection pooler")

    async def _framed(self, call: Callable[[], Awaitable[T]], seconds: float | None = None) -> T:
        """Run a call in the transaction that is open, or in one of its own.

        When it fails the caller learns of the first error, whatever the rollback does. Whoever is cancelled stays cancelled; the connection, whose
        state nobody knows then, is cut.
        """
        if self.is_in_transaction():
            return await call()
        async with asyncio.timeout(self._seconds if seconds is None else seconds):
            await self._begin("BEGIN")
            try:
                result = await call()
                await super().execute("COMMIT")
            except Exception as problem:
                first = problem
            except BaseException:
                self.terminate()
                raise
            else:
                return result
        await self._undo(first)
        try:
            raise first
        finally:
            del first  # it holds this frame, and the frame it: only the collector would find them

    async def _begin(self, query: str, *, then: str = "", timeout: float | None = None) -> str:  # noqa: ASYNC109 -- asyncpg's
        """Begin a transaction; leave none behind when a setting is refused."""
        try:
            return str(await super().execute(query.rstrip("; ") + self._settings + then, timeout=timeout))
        except asyncpg.PostgresError as problem:
            first = problem
        except asyncpg.InterfaceError:  # nothing was sent: the connection is closed, or somebody else's now
            raise
        except BaseException:
            self.terminate()
            raise
        await self._undo(first)
        try:
            raise first
        finally:
            del first

    async def _undo(self, problem: Exception) -> None:
        """Roll back after an error, or cut the connection when it is not fit for that."""
        if self.is_closed() or not self.is_in_transaction():
            return
        if not isinstance(problem, asyncpg.PostgresError | asyncpg.InterfaceError):
            self.terminate()
            return
        try:
            await super().execute("ROLLBACK", timeout=_UNDO_SECONDS)
        except Exception:  # the error before this one says what went wrong
            self.terminate()
        except BaseException:
            self.terminate()
            raise


def _read_options(options: str) -> Iterator[tuple[str, str]]:
    """Take the settings out of a command line: `-c name=value` or `--name=value`, with a backslash before a blank that is part of a value.

    Yields:
        Name and value.

    Raises:
        ConfigurationError: There is something else on it.
    """
    words = iter(re.findall(r"(?:\\.|[^\s\\])+", options))
    for word in words:
        text = next(words, "") if word == "-c" else word[2:]
        name, equals, value = (re.sub(r"\\(.)", r"\1", part) for part in text.partition("="))
        if not word.startswith(("-c", "--")) or not equals or _NAME.fullmatch(name) is None:
            raise ConfigurationError(
                "through a connection pooler, `options` of the connection string can have settings only: -c name=value"
            )
        yield name.replace("-", "_"), value


_NAME: Final = re.compile(r"[A-Za-z_][\w$-]*(?:\.[A-Za-z_][\w$-]*)*", re.ASCII)


def _set_local(name: str, value: str) -> str:
    """Write a setting for one transaction; no parameters are taken there."""
    if name.lower() in _LISTS and re.fullmatch(r"\w+", value) is None:  # SET would take a list for one name
        return f"SELECT pg_catalog.set_config({_literal(name)}, {_literal(value)}, true)"
    identifier = ".".join('"' + part.replace('"', '""') + '"' for part in name.split("."))
    return f"SET LOCAL {identifier} = {_literal(value)}"


_LISTS: Final = frozenset({"search_path", "temp_tablespaces"})


def _literal(text: str) -> str:
    escaped = text.replace("'", "''")
    return f"'{escaped}'" if "\\" not in text else "E'" + escaped.replace("\\", "\\\\") + "'"


def _refuse(query: str) -> None:
    """Refuse what leaves something with a session, as far as the usual words tell."""
    if (found := _LASTING.search(query)) is not None:
        what = " ".join(found[0].removesuffix("(").split())
        raise DirectConnectionRequiredError(
            f"{what} does not work through a connection pooler: it would stay with the server connection, for whoever comes next"
        )


_LASTING: Final = re.compile(
    r"\bpg_(?:try_)?advisory_lock(?:_shared)?\s*\("
    r"|\A\s*(?:LISTEN|UNLISTEN|PREPARE(?!\s+TRANSACTION)|DEALLOCATE|DISCARD|LOAD)\b"
    r"|\A\s*SET\s+(?!LOCAL\b|TRANSACTION\b|CONSTRAINTS\b)[\w\".]+",
    re.IGNORECASE,
)
