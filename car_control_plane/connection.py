"""Connects to the control plane's database: `AsyncConnectionManager`, its sessions, and its health.

A manager owns one SQLAlchemy engine and opens connections by a creator of its own: host after host, each dialed within its own time limit. Constructors do no I/O; the first session connects. `embedded:` and `embedded:PATH`
stand where a connection string does: the manager then starts the server and, in `close()`, stops it.

One `async with` is one transaction: committed once at the end, rolled back on any exception, cancellation included. Repositories never commit.

Sources: `docs/adr/0006-dsn-goes-to-asyncpg.md`; asyncpg and SQLAlchemy 2.1 as pinned in `pyproject.toml`.
"""

import asyncio
import logging
import math
import os
import random
import time
import warnings
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, cast
from uuid import UUID

import asyncpg
from pydantic import SecretStr
from sqlalchemy import MetaData, NullPool, Table, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlmodel.ext.asyncio.session import AsyncSession

from car_control_plane import dsn as dsns
from car_control_plane.dialect import URL
from car_control_plane.dialing import attempts, dial, none_accepted
from car_control_plane.dsn import Dsn
from car_control_plane.embedded import EmbeddedPostgres
from car_control_plane.errors import (
    AccessDeniedError,
    ClosedError,
    ConfigurationError,
    ConnectionUnavailableError,
    ControlPlaneError,
    DirectConnectionRequiredError,
    OutcomeUnknownError,
    PermissionDeniedError,
    SchemaMissingError,
    SchemaOutdatedError,
    refusal,
    translate,
)
from car_control_plane.execution import ENDED, AsyncReadSession, Coalescer, ReadSession, grants_for
from car_control_plane.models import REVISIONS, SCHEMA
from car_control_plane.pool import DirectPool, PoolStatus, recognise_lost_connections
from car_control_plane.poolers import Poolers, keep_no_statements, leads_through_pooler
from car_control_plane.settings import SECRETS, ControlPlaneSettings, conceal, load_settings
from car_control_plane.telemetry import Activity, Telemetry
from car_control_plane.units import IsolationLevel, Unit, UnitSession, run_unit

__all__ = [
    "AsyncConnectionManager",
    "AsyncReadSession",
    "HealthStatus",
    "PoolStatus",
    "get_connection_manager",
    "init_db",
]

_log = logging.getLogger("car_control_plane.connection")

DATABASE_NAME = "control_plane"

SchemaState = Literal["current", "behind", "ahead", "missing", "unknown"]


@dataclass(frozen=True, slots=True)
class HealthStatus:
    """What a health check found; true when the control plane can be used.

    A schema *ahead* of the code counts as usable: during a rolling deploy the new version has migrated while the old one still serves.

    Attributes:
        healthy: The server answers and the schema is not missing or behind.
        latency_seconds: How long the check took, a connect included when one was needed.
        server_version: As the server reports it, `18.4` for example; None when it was not reached.
        revision: The schema's Alembic revision, if it has one.
        head: The revision this version of the library needs.
        schema: Where `revision` stands against `head`; `unknown` when the server could not be asked.
        pool: The pool's figures at the end of the check.
        error: Why it is not healthy.
        through_pooler: Whether the connection leads through a connection pooler; None when there was none.
    """

    healthy: bool
    latency_seconds: float
    server_version: str | None
    revision: str | None
    head: str
    schema: SchemaState
    pool: PoolStatus
    error: ControlPlaneError | None
    through_pooler: bool | None = None

    def __bool__(self) -> bool:
        return self.healthy


S = TypeVar("S", bound=AsyncSession)
T = TypeVar("T")


class _DirectSession(AsyncSession):
    """A session its caller must close; says so when that was forgotten."""

    def __del__(self) -> None:
        if self.sync_session.in_transaction():
            warnings.warn(
                "a session of get_session_direct() was never closed: its connection stayed out of the pool until now",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )


class AsyncConnectionManager:
    """The way into the control plane's database: sessions, single connections, health.

    Share one manager per process and event loop. All methods may be called concurrently and may be cancelled.

    Args:
        target: A connection string in any form libpq takes, `embedded:`, `embedded:PATH`, or settings; None reads `DATABASE_URL`.
        **overrides: Single settings (see `ControlPlaneSettings`) that win over the environment.

    Raises:
        ConfigurationError: There is no connection string, it is malformed, or a setting is not acceptable.
    """

    def __init__(self, target: str | SecretStr | ControlPlaneSettings | None = None, **overrides: Any) -> None:
        target, overrides = _concealed(target, overrides)
        if isinstance(target, ControlPlaneSettings):
            if overrides:
                raise ConfigurationError("pass either settings or single overrides, not both")
            self.settings = target
        elif target is None:
            self.settings = load_settings(**overrides)
        elif "database_url" in overrides:
            raise ConfigurationError("the connection string is given twice")
        else:
            self.settings = load_settings(database_url=target, **overrides)
        text = self.settings.require_database_url()
        secret = self.settings.direct_database_url
        direct = secret.get_secret_value().strip() if secret is not None else ""
        try:
            self._embedded = EmbeddedPostgres(dsns.embedded_path(text)) if dsns.is_embedded(text) else None
            self._dsn = None if self._embedded else dsns.parse(text)
            self._direct_dsn = _direct(direct, text) if direct else None
        except ConfigurationError as problem:
            raise problem.with_traceback(None) from None
        finally:
            del text, direct  # error trackers print the variables of every frame an error passes
        self._poolers = Poolers("none" if self._embedded else self.settings.pooler)
        self._direct_poolers = Poolers("detect") if self._direct_dsn else self._poolers
        self.coalescers: dict[tuple[type[Any], str], Coalescer] = {}
        self._pruned_at = time.monotonic()
        self._starting = asyncio.Lock()
        self._ending: set[asyncio.Future[None]] = set()
        self._engine: AsyncEngine | None = None
        self._read_engine: AsyncEngine | None = None
        self._closed = False
        places = (
            [(host.name or "localhost", host.port) for host in self._dsn.hosts] if self._dsn else [("embedded:", 0)]
        )
        self.telemetry = Telemetry(places, self._dsn.database if self._dsn else DATABASE_NAME)

    def __repr__(self) -> str:
        where = self._dsn.redacted() if self._dsn else "embedded:"
        return f"<{type(self).__name__} {where}{' (closed)' if self._closed else ''}>"

    # --- life ---------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Start the embedded server, if this manager has one; otherwise nothing: connections are opened when needed. Idempotent.

        Raises:
            ClosedError: The manager was closed.
            MissingExtraError: There are no PostgreSQL binaries for `embedded:`.
            ConnectionUnavailableError: The embedded server does not start.
        """
        await self._resolve()

    async def close(self) -> None:
        """Close every connection and stop the embedded server, if there is one. Idempotent; the manager is not reopened.

        A connection in use is closed when it is given back. Being cancelled does not cut this short: the cancellation is raised after it.

        Raises:
            WrongEventLoopError: The manager belongs to another event loop, which still exists; nothing was closed.
        """
        if self._engine is not None:
            self._pool_of(self._engine).require_closable()
        self._closed = True
        await _uninterrupted(self._close())

    async def _close(self) -> None:
        self.telemetry.close()
        engine, self._engine, self._read_engine = self._engine, None, None
        if engine is not None:
            await engine.dispose()
        if self._embedded is not None:
            async with self._starting:  # a start under way would outlive its stop
                await asyncio.to_thread(self._embedded.stop)

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def engine(self) -> AsyncEngine:
        """The SQLAlchemy engine under the sessions, for code that needs one.

        Raises:
            ClosedError: The manager was closed.
        """
        self._require_open()
        if self._engine is None:
            settings = self.settings
            self._engine = create_async_engine(
                URL,  # asyncpg reads the connection string, so nothing in the engine holds a secret
                async_creator=self._connect_measured,
                hide_parameters=True,
                poolclass=DirectPool,
                pool_size=settings.pool_size,
                max_overflow=settings.max_overflow,
                pool_timeout=settings.pool_timeout_seconds,
                pool_recycle=settings.pool_recycle_seconds,
                ping_after=settings.pool_ping_after_seconds,
                ping_timeout=settings.pool_ping_timeout_seconds,
                on_wait=self.telemetry.waited,
            )
            recognise_lost_connections(self._engine.sync_engine)
            self.telemetry.watch(self.pool_status)
            keep_no_statements(self._engine.sync_engine)
        return self._engine

    @staticmethod
    def _pool_of(engine: AsyncEngine) -> DirectPool:
        return cast("DirectPool", engine.pool)

    def create_engine(
        self, *, server_settings: Mapping[str, str] | None = None, activity: Activity = "app", direct: bool = True
    ) -> AsyncEngine:
        """Build an engine without a pool and without time limits on statements: for migrations. The caller disposes of it.

        Args:
            server_settings: As for `connect`.
            activity: As for `connect`.
            direct: Whether it connects as `connect_direct` does, or as `connect`.

        Raises:
            ClosedError: The manager was closed.
        """
        self._require_open()
        connect = self.connect_direct if direct else self.connect

        async def creator() -> asyncpg.Connection:
            unlimited = {
                "statement_timeout": "0",
                "idle_in_transaction_session_timeout": "0",
                **(server_settings or {}),
            }
            return await connect(server_settings=unlimited, command_timeout=None, activity=activity)

        engine = create_async_engine(URL, async_creator=creator, hide_parameters=True, poolclass=NullPool)
        keep_no_statements(engine.sync_engine)
        return engine

    # --- sessions -----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def get_session(self) -> AsyncGenerator[AsyncSession]:
        """Give a session whose work is one transaction.

        Commits once when the block ends; rolls back, and returns the connection, when it raises or is cancelled. A commit under way is not
        cancelled: the cancellation is raised after it.

        Yields:
            A SQLModel `AsyncSession`; rows stay readable after the block.

        Raises:
            ClosedError: The manager was closed.
            ConnectionUnavailableError: The server cannot be reached or the connection was lost; as `PoolTimeoutError`, no connection came free.
            OutcomeUnknownError: The connection was lost during COMMIT: all of it was written, or nothing.
            ControlPlaneError: Whatever the database refused, in the block or at commit, by its own class; nothing was written. Errors that are
                neither the database's nor ours pass through unchanged.
        """
        with self.telemetry.session("write"):
            async with self._translated(), self._ended(self._session(AsyncSession, self.engine)) as session:
                yield session
                async with self._translated(io=True, committing=True):
                    await _uninterrupted(session.commit())

    @asynccontextmanager
    async def get_read_session(self) -> AsyncGenerator[AsyncReadSession]:
        """Give a session for reading: its transaction is READ ONLY in the server and ends with a rollback.

        Yields:
            A session without the writing half of SQLModel's `AsyncSession`.

        Raises:
            ClosedError: The manager was closed.
            AccessDeniedError: An object to write was handed to the session, or a statement writes.
            ConnectionUnavailableError: As for `get_session`.
        """
        with self.telemetry.session("read"):
            ending = self._ended(self._session(ReadSession, self._reading()))
            async with self._translated(reading=True), ending as session:
                yield session

    def get_session_direct(self) -> AsyncSession:
        """Return a session that the caller commits and must close; prefer `get_session()`.

        Raises:
            ClosedError: The manager was closed.
        """
        return self._session(_DirectSession, self.engine)

    def _reading(self) -> AsyncEngine:
        """Return the engine over the same pool whose every transaction is READ ONLY, a second one of a session too."""
        engine = self.engine
        if self._read_engine is None:
            self._read_engine = engine.execution_options(postgresql_readonly=True)
        return self._read_engine

    def _session(self, kind: type[S], engine: AsyncEngine) -> S:
        # Whoever keeps a session beyond its block would begin a transaction that nobody ends: it is closed for good.
        lasting = kind is _DirectSession
        return kind(engine, expire_on_commit=False, info={"role": self.role}, close_resets_only=lasting)

    @asynccontextmanager
    async def _ended(self, session: S) -> AsyncGenerator[S]:
        """End a session with its block: what fails then replaces neither the block's error nor a cancellation, and fails nothing that was done.

        A cancellation does not wait for the end, which goes on in the background.

        Yields:
            The session.
        """
        try:
            yield session
        finally:
            session.info[ENDED] = True
            ending = asyncio.ensure_future(AsyncSession.close(session))
            self._ending.add(ending)
            ending.add_done_callback(self._let_go)
            with suppress(Exception):  # the pool has heard of it: it is a rollback whose connection is lost
                await asyncio.shield(ending)

    def _let_go(self, ending: "asyncio.Future[None]") -> None:
        self._ending.discard(ending)
        if not ending.cancelled():
            ending.exception()  # seen

    @property
    def role(self) -> str | None:
        """The role the server gives us, as far as the connection string says; for hints."""
        return (self._dsn.server_settings.get("role") or self._dsn.user) if self._dsn else None

    @asynccontextmanager
    async def _translated(
        self, *, io: bool = False, reading: bool = False, committing: bool = False
    ) -> AsyncGenerator[None]:
        error: ControlPlaneError | None = None
        try:
            yield
        except Exception as problem:
            error = translate(problem, io=io) or _swallowed(problem)
            if reading and error is not None and error.details.get("sqlstate") == _READ_ONLY:
                error = AccessDeniedError(
                    "this session only reads; nothing was written",
                    hint="Write in get_session().",
                    details=error.details,
                )
            # A statement, which the error names, is one of those that were to be written before the COMMIT.
            if committing and getattr(problem, "statement", None) is None and _leaves_open(problem, error):
                error = OutcomeUnknownError(
                    "the connection was lost during COMMIT: all that the block wrote is stored, or nothing of it",
                    hint="Look before you do it again, or let manager.run() do it, which finds out.",
                    retryable=False,
                )
            if error is None or error is problem:
                raise
        if error is not None:
            try:
                raise error
            finally:
                error.__context__ = None  # the driver's error: the caller's `async with` is still handling it

    # --- units of work ------------------------------------------------------------------------------------------------

    async def run(
        self,
        unit: Unit[T],
        *,
        operation_id: UUID | str | None = None,
        deadline: float | None = None,
        isolation_level: IsolationLevel | None = None,
    ) -> T:
        """Run a unit of work in a transaction of its own, and again as a whole until it is committed.

        It is repeated after a serialization failure, a deadlock, or a lost connection, with growing pauses, until the deadline. A COMMIT whose
        answer was lost is decided by the operation's id, which is stored in the same transaction: what was done is not done twice. So the unit must
        do everything in its session, and may do it several times. Two round trips more than the unit's own with an `operation_id`, one more without.

        Args:
            unit: An async function of a session. It neither commits nor rolls back: it returns, or raises.
            operation_id: The same for every try at the same work, also from another process: once one was committed, the unit is not run, and
                what it had returned then, a JSON value, is returned. Kept for `operation_retention_seconds`. None: the unit is an operation of its own.
            deadline: Seconds until it is not begun again; by default the setting.
            isolation_level: Of the transaction; by default the server's.

        Raises:
            OutcomeUnknownError: A COMMIT was lost and could not be decided in time; `details["operation_id"]` is what to ask with.
            ConflictError: Another run with this `operation_id` has not ended in time, or the transaction met others until the deadline.
            ConnectionUnavailableError: The database was not available until the deadline; nothing was written. As `PoolTimeoutError`, no
                connection came free: that is not repeated.
            InvalidDataError: The unit has an `operation_id` and returned what is no JSON value; nothing was written.
            ConfigurationError: An argument is not acceptable, or the unit ended its own transaction.
            ControlPlaneError: Whatever else the database refused; nothing was written. What the unit itself raises passes unchanged.
        """
        seconds = self.settings.unit_deadline_seconds if deadline is None else deadline
        with self.telemetry.unit():
            result = await run_unit(
                self, unit, operation_id=operation_id, deadline=seconds, isolation_level=isolation_level
            )
        await self._prune_now_and_then()
        return result

    @asynccontextmanager
    async def unit_session(self) -> AsyncGenerator[UnitSession]:
        """Give the session of one attempt at a unit of work: for `run`.

        Yields:
            A session that is rolled back unless it was stored.
        """
        with self.telemetry.session("write"):
            async with self._translated(), self._ended(self._session(UnitSession, self.engine)) as session:
                yield session

    async def store(self, session: UnitSession) -> None:
        """Commit an attempt at a unit of work: for `run`.

        Raises:
            ControlPlaneError: Whatever the database refused.
        """
        async with self._translated(io=True):
            await _uninterrupted(AsyncSession.commit(session))

    def repeating(self, problem: ControlPlaneError) -> None:
        """Count that a unit of work is run again: for `run`."""
        self.telemetry.repeated("unit", problem)

    async def prune_operations(self, *, older_than_seconds: float | None = None) -> int:
        """Forget the ids of operations that were completed long ago, and return how many; `run` does so once an hour.

        Args:
            older_than_seconds: By default `operation_retention_seconds`.

        Raises:
            ConfigurationError: It is not a number of seconds above 0.
            ControlPlaneError: The database does not answer, or does not let this role delete.
        """
        seconds = self.settings.operation_retention_seconds if older_than_seconds is None else older_than_seconds
        if not seconds > 0:
            raise ConfigurationError("older_than_seconds must be a number of seconds above 0")
        return len(await self.fetch(_PRUNE, (timedelta(seconds=seconds),), repeat=False))

    async def _prune_now_and_then(self) -> None:
        if time.monotonic() - self._pruned_at >= _PRUNE_EVERY_SECONDS:
            self._pruned_at = time.monotonic()
            with suppress(Exception):  # the unit is done, and its caller has nothing to do with this
                await self.prune_operations()

    # --- single statements --------------------------------------------------------------------------------------------

    async def fetch(self, sql: str, arguments: Sequence[Any], *, repeat: bool) -> list[asyncpg.Record]:
        """Run one statement on a connection of the pool, as its own transaction, and return its rows: one round trip.

        Takes the pool's, the connect's and the command's time limit at most, together; with `repeat` `read_retry_seconds` more.

        Args:
            sql: One statement, its parameters `$1`, `$2`, ...
            arguments: A value for each.
            repeat: Whether it only reads: then it is run again, on another connection, when the connection is lost. A write never is.

        Raises:
            ClosedError: The manager was closed.
            ConnectionUnavailableError: As for `get_session`.
            OutcomeUnknownError: The connection was lost under a statement that is not to be repeated: it was done, or it was not.
            ControlPlaneError: What the database refused, by its own class; nothing was written.
        """
        try:
            return await self._fetch_once(sql, arguments)
        except _LostError as problem:
            lost = problem
        if repeat and not lost.slow:
            return await self._fetch_again(sql, arguments, lost.error)
        if lost.sent and not repeat:
            raise OutcomeUnknownError(
                "the connection was lost before the answer came: what the statement writes is stored, or it is not",
                hint="Look before you do it again, or let manager.run() do it, which finds out.",
                details=lost.error.details,
                retryable=False,
            )
        raise lost.error

    async def _fetch_once(self, sql: str, arguments: Sequence[Any]) -> list[asyncpg.Record]:
        try:
            with self.telemetry.statement(sql):
                return await self._pool_of(self.engine).fetch(sql, arguments)
        except Exception as problem:
            error = refusal(problem)
            if error is None:
                raise
            told: Exception = error
            if isinstance(error, ConnectionUnavailableError):
                told = _LostError(error, sent=_leaves_open(problem, error), slow=isinstance(problem, TimeoutError))
        raise told  # outside of the except block: the driver's error, and what it holds, is on no __context__

    async def _fetch_again(self, sql: str, arguments: Sequence[Any], error: ControlPlaneError) -> list[asyncpg.Record]:
        until = time.monotonic() + self.settings.read_retry_seconds
        pause = 0.0  # the first time at once: most often one connection was lost, and not the server
        attempt = 1
        while time.monotonic() + pause < until:
            await asyncio.sleep(pause)
            attempt += 1
            self.telemetry.repeated("read", error)
            facts = {"event": "statement.repeated", "attempt": attempt, "error": error.code}
            _log.info("a read lost its connection and is run again (%s)", error.code, extra=facts)
            pause = min(max(2 * pause, 0.02), 0.5) * random.uniform(0.5, 1.5)  # noqa: S311 -- so that not all come back at once
            try:
                return await self._fetch_once(sql, arguments)
            except _LostError as problem:
                error = problem.error
                if problem.slow:
                    break
        raise error.with_traceback(None)

    # --- connections --------------------------------------------------------------------------------------------------

    async def connect(
        self,
        *,
        server_settings: Mapping[str, str] | None = None,
        command_timeout: float | Literal["settings"] | None = "settings",
        activity: Activity = "app",
    ) -> asyncpg.Connection:
        """Open one asyncpg connection outside of the pool; the caller closes it.

        Tries the hosts in order, each for at most `connect_timeout_seconds`, until one has the role `target_session_attrs` asks for (with several
        hosts and nothing asked: one that takes writes). Through a connection pooler it serves for statements and transactions; every statement is in a
        transaction then. What needs a session of the server's own uses `connect_direct`.

        Args:
            server_settings: Run-time parameters that win over those of the settings and of the connection string.
            command_timeout: Seconds a statement may take, as asyncpg counts; None is no limit, by default the setting.
            activity: What it is for: part of the `application_name` that `pg_stat_activity` shows, `NAME/ACTIVITY/PROCESS ID`.

        Raises:
            ClosedError: The manager was closed.
            ConfigurationError: User, password, database name or TLS are not what the server accepts, or the server is older than PostgreSQL 12.
            ConnectionUnavailableError: No host accepted the connection in time.
        """
        return await self._connect(await self._resolve(), self._poolers, server_settings, command_timeout, activity)

    async def connect_direct(
        self,
        *,
        server_settings: Mapping[str, str] | None = None,
        command_timeout: float | Literal["settings"] | None = "settings",
        activity: Activity = "app",
    ) -> asyncpg.Connection:
        """Open one asyncpg connection to the server itself, for session locks, LISTEN and migrations; the caller closes it.

        Follows `direct_database_url` when it is set, and otherwise `database_url`; as `connect` does.

        Args:
            server_settings: As for `connect`.
            command_timeout: As for `connect`.
            activity: As for `connect`.

        Raises:
            DirectConnectionRequiredError: The connection leads through a connection pooler.
            ClosedError: The manager was closed.
            ConfigurationError: As for `connect`.
            ConnectionUnavailableError: As for `connect`.
        """
        dsn = self._direct_dsn or await self._resolve()
        connection = await self._connect(dsn, self._direct_poolers, server_settings, command_timeout, activity)
        if leads_through_pooler(connection):
            connection.terminate()
            if self._direct_dsn is not None:
                raise DirectConnectionRequiredError("direct_database_url leads through a connection pooler as well")
            raise DirectConnectionRequiredError
        return connection

    async def _connect(
        self,
        dsn: Dsn,
        poolers: Poolers,
        server_settings: Mapping[str, str] | None,
        command_timeout: float | Literal["settings"] | None,
        activity: Activity,
    ) -> asyncpg.Connection:
        self._require_open()
        started = time.perf_counter()
        failures: list[ControlPlaneError] = []
        for attributes, host in attempts(dsn):
            connection, error = await dial(
                dsn,
                host,
                timeout=self.settings.connect_timeout_seconds,
                poolers=poolers,
                target_session_attrs=attributes,
                command_timeout=self.settings.command_timeout_seconds
                if command_timeout == "settings"
                else command_timeout,
                server_settings={**self._server_settings(activity), **dsn.server_settings, **(server_settings or {})},
            )
            place = {"host": host.name, "port": host.port}
            if connection is not None:
                opened = {"event": "connection.opened", **place, "activity": activity}
                _log.debug("connected", extra={**opened, "seconds": time.perf_counter() - started})
                return connection
            if not isinstance(error, ConnectionUnavailableError):
                raise error
            failures.append(error)
            if len(dsn.hosts) > 1:
                skipped = {"event": "connection.host_skipped", **place, "error": error.code}
                _log.info("%s:%s does not take the connection", host.name, host.port, extra=skipped)
        error = none_accepted(failures)
        raise error

    async def _connect_measured(self) -> asyncpg.Connection:
        with self.telemetry.connecting():
            return await self.connect()

    def _server_settings(self, activity: Activity) -> dict[str, str]:
        settings = self.settings
        suffix = f"/{activity}/{os.getpid()}"
        return {
            "application_name": settings.application_name[: _MAX_APPLICATION_NAME - len(suffix)] + suffix,
            "TimeZone": "UTC",  # spelt as in a Dsn, so that the one of a connection string wins
            # Pinned, and without our schema: a table is named with its schema or not found. A host application's own model named "tenants",
            # read through our session, must not silently be ours.
            "search_path": "pg_catalog",
            "statement_timeout": _milliseconds(settings.statement_timeout_seconds),
            "lock_timeout": _milliseconds(settings.lock_timeout_seconds),
            "idle_in_transaction_session_timeout": _milliseconds(settings.idle_in_transaction_timeout_seconds),
        }

    async def _resolve(self) -> Dsn:
        """Return where to connect; starts the embedded server on first use."""
        self._require_open()
        if self._dsn is not None:
            return self._dsn
        assert self._embedded is not None  # noqa: S101 -- the constructor sets one or the other
        async with self._starting:
            self._require_open()
            if self._dsn is None:
                await _uninterrupted(asyncio.to_thread(_start, self._embedded))
                self._dsn = dsns.parse(self._embedded.dsn(DATABASE_NAME))
        return self._dsn

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError

    # --- health -------------------------------------------------------------------------------------------------------

    async def health_check(self) -> HealthStatus:
        """Ask the server for its version and the schema's revision; never raises for an unhealthy database.

        At most three round trips on a pooled connection. Bounded by the pool, connect and command time limits.

        Raises:
            ClosedError: The manager was closed.
        """
        self._require_open()
        started = time.perf_counter()
        version: str | None = None
        revision: str | None = None
        schema: SchemaState = "unknown"
        through_pooler: bool | None = None
        error: ControlPlaneError | None = None
        try:
            async with self._translated(), self.engine.connect() as connection:
                through_pooler = leads_through_pooler((await connection.get_raw_connection()).driver_connection)
                facts: Any = (await connection.exec_driver_sql(_HEALTH)).one()
                version, has_schema, has_revision = facts
                if has_revision:
                    revision = (await connection.exec_driver_sql(_REVISION)).scalar()
            schema, error = _judge(revision, has_schema=has_schema)
        except ControlPlaneError as problem:
            error = problem
            if isinstance(error, PermissionDeniedError):
                error.hint = grants_for(_VERSION_TABLE, role=self.role)
        except (OSError, SQLAlchemyError) as problem:
            error = translate(problem, io=True) or ControlPlaneError("the server answers with an error of its own")
        return HealthStatus(
            healthy=error is None,
            latency_seconds=time.perf_counter() - started,
            server_version=version,
            revision=revision,
            head=REVISIONS[-1],
            schema=schema,
            pool=self.pool_status(),
            error=error,
            through_pooler=through_pooler,
        )

    async def require_schema(self) -> None:
        """Return when the schema is exactly what this version of the library needs.

        Raises:
            SchemaMissingError: There is no schema, or it was never migrated.
            SchemaOutdatedError: Its revision is behind or ahead of the code.
            ControlPlaneError: The database cannot be asked; whatever error that is.
        """
        health = await self.health_check()
        if health.error is not None:
            raise health.error
        if health.schema == "ahead":
            raise SchemaOutdatedError(
                f"the schema's revision {health.revision!r} is unknown to this version of the library, which knows up to {health.head!r}",
                hint="Upgrade the library; or, to go back, downgrade the schema with the version that migrated it.",
                details={"revision": health.revision, "head": health.head},
            )

    def pool_status(self) -> PoolStatus:
        """Return the pool's figures; no I/O."""
        if self._engine is None:
            return PoolStatus(limit=self.settings.pool_size + self.settings.max_overflow, opened=0, in_use=0)
        return self._pool_of(self._engine).figures()


_MAX_APPLICATION_NAME = 63  # what PostgreSQL keeps

_READ_ONLY = "25006"

_PRUNE_EVERY_SECONDS = 3600.0
_PRUNE = (
    "DELETE FROM control_plane.completed_operations WHERE completed_at < now() - $1::interval RETURNING operation_id"
)

_HEALTH = (
    "SELECT current_setting('server_version'), to_regnamespace('control_plane') IS NOT NULL, "
    "to_regclass('control_plane.alembic_version') IS NOT NULL"
)
_REVISION = "SELECT version_num FROM control_plane.alembic_version"
_VERSION_TABLE = select(Table("alembic_version", MetaData(schema=SCHEMA)))


def _judge(revision: str | None, *, has_schema: bool) -> tuple[SchemaState, ControlPlaneError | None]:
    head = REVISIONS[-1]
    if revision == head:
        return "current", None
    if revision is None:
        text = "the schema was never migrated" if has_schema else f"schema '{SCHEMA}' does not exist"
        return "missing", SchemaMissingError(text)
    if revision not in REVISIONS:
        return "ahead", None
    return "behind", SchemaOutdatedError(
        f"the schema is at revision {revision!r}, behind {head!r}",
        hint="Run migrations: alembic upgrade head (or: car-cp db upgrade).",
        details={"revision": revision, "head": head},
    )


async def _uninterrupted(work: Coroutine[Any, Any, None]) -> None:
    """Wait for the work to end even while being cancelled; then let the cancellation through.

    A commit cut off half-way has an unknown outcome. The wait is bounded by the command time limit.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as interruption:
            cancelled = interruption
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # seen: the caller learns of the cancellation instead
        raise cancelled
    await task


class _LostError(Exception):
    """A single statement met no server, or lost its connection: whether it had been sent, and whether it waited in vain."""

    def __init__(self, error: ConnectionUnavailableError, *, sent: bool, slow: bool) -> None:
        self.error, self.sent, self.slow = error, sent, slow


def _leaves_open(problem: Exception, error: ControlPlaneError | None) -> bool:
    """Whether an error leaves open if what was to be written was: not if it is ours, or the server's that it takes no writes, or nothing was sent."""
    if not isinstance(error, ConnectionUnavailableError) or error is problem:
        return False
    sent = not isinstance(getattr(getattr(problem, "orig", None), "__cause__", problem), asyncpg.InterfaceError)
    return sent and error.details.get("sqlstate") != _READ_ONLY


def _swallowed(problem: Exception) -> ControlPlaneError | None:
    """Say that the block went on after a statement had failed: PostgreSQL refuses everything then, the commit too."""
    if getattr(getattr(problem, "orig", None), "sqlstate", None) != asyncpg.InFailedSQLTransactionError.sqlstate:
        return None
    return ControlPlaneError(
        "an earlier statement of this transaction failed, and its error was swallowed; nothing was written",
        hint="Let the error end the block, or contain it: async with session.begin_nested().",
        details={"sqlstate": asyncpg.InFailedSQLTransactionError.sqlstate},
    )


def _direct(direct: str, text: str) -> Dsn:
    if dsns.is_embedded(text) or dsns.is_embedded(direct):
        raise ConfigurationError("direct_database_url goes with a server behind a pooler, and not with an embedded one")
    try:
        return dsns.parse(direct)
    except ConfigurationError as problem:
        raise ConfigurationError(f"direct_database_url: {problem.message}", hint=problem.hint) from None
    finally:
        del direct, text  # as in the constructor


def _start(embedded: EmbeddedPostgres) -> None:
    embedded.start()
    embedded.create_database(DATABASE_NAME)


def _milliseconds(seconds: float) -> str:
    return str(math.ceil(seconds * 1000))  # rounding down to 0 would mean "no limit"


_Target = str | SecretStr | ControlPlaneSettings | None


def _concealed(target: _Target, overrides: Mapping[str, Any]) -> tuple[_Target, dict[str, Any]]:
    """Wrap secrets before anything can fail: error trackers print the arguments of every frame an error passes."""
    return conceal(target), {name: conceal(value) if name in SECRETS else value for name, value in overrides.items()}


_default: AsyncConnectionManager | None = None


def init_db(target: str | SecretStr | ControlPlaneSettings | None = None, **overrides: Any) -> AsyncConnectionManager:
    """Make a manager and the default one of this process; connects on first use.

    Args:
        target: As for `AsyncConnectionManager`; None reads `DATABASE_URL`.
        **overrides: Single settings that win over the environment.

    Raises:
        ConfigurationError: As for `AsyncConnectionManager`; the default manager is then unchanged.
    """
    global _default  # noqa: PLW0603 -- the one module state of the library, promised by the seed's API
    target, overrides = _concealed(target, overrides)
    _default = AsyncConnectionManager(target, **overrides)
    return _default


def get_connection_manager() -> AsyncConnectionManager:
    """Return the default manager; on first use it is made from `DATABASE_URL`.

    Raises:
        ConfigurationError: There is none yet and `DATABASE_URL` does not make one.
    """
    return _default if _default is not None else init_db()
