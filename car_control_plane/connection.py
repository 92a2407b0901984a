"""Connects to the control plane's database: `AsyncConnectionManager`, its sessions, and its health.

A manager owns one SQLAlchemy engine and opens connections by a creator of its own: host after host, each dialed within its own time limit. Constructors do no I/O; the first session connects. `embedded:` and `embedded:PATH`
stand where a connection string does: the manager then starts the server and, in `close()`, stops it.

One `async with` is one transaction: committed once at the end, rolled back on any exception, cancellation included. Repositories never commit.

Sources: `docs/adr/0006-dsn-goes-to-asyncpg.md`; asyncpg and SQLAlchemy 2.1 as pinned in `pyproject.toml`.
"""

import asyncio
import math
import time
import warnings
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import asyncpg
from pydantic import SecretStr
from sqlalchemy import MetaData, NullPool, QueuePool, Table, event, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry
from sqlmodel.ext.asyncio.session import AsyncSession

from car_control_plane import dsn as dsns
from car_control_plane.dialing import attempts, dial, none_accepted
from car_control_plane.dsn import Dsn
from car_control_plane.embedded import EmbeddedPostgres
from car_control_plane.errors import (
    AccessDeniedError,
    ClosedError,
    ConfigurationError,
    ConnectionUnavailableError,
    ControlPlaneError,
    PermissionDeniedError,
    PoolTimeoutError,
    SchemaMissingError,
    SchemaOutdatedError,
    translate,
)
from car_control_plane.execution import AsyncReadSession, ReadSession, grants_for
from car_control_plane.models import REVISIONS, SCHEMA
from car_control_plane.settings import SECRETS, ControlPlaneSettings, conceal, load_settings

__all__ = [
    "AsyncConnectionManager",
    "AsyncReadSession",
    "HealthStatus",
    "PoolStatus",
    "get_connection_manager",
    "init_db",
]

DATABASE_NAME = "control_plane"

SchemaState = Literal["current", "behind", "ahead", "missing", "unknown"]


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """How many connections the pool may hold, holds, and has handed out."""

    limit: int
    opened: int
    in_use: int


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
    """

    healthy: bool
    latency_seconds: float
    server_version: str | None
    revision: str | None
    head: str
    schema: SchemaState
    pool: PoolStatus
    error: ControlPlaneError | None

    def __bool__(self) -> bool:
        return self.healthy


S = TypeVar("S", bound=AsyncSession)


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
        try:
            self._embedded = EmbeddedPostgres(dsns.embedded_path(text)) if dsns.is_embedded(text) else None
            self._dsn = None if self._embedded else dsns.parse(text)
        except ConfigurationError as problem:
            raise problem.with_traceback(None) from None
        finally:
            del text  # error trackers print the variables of every frame an error passes
        self._starting = asyncio.Lock()
        self._engine: AsyncEngine | None = None
        self._read_engine: AsyncEngine | None = None
        self._closed = False

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
        """
        self._closed = True
        await _uninterrupted(self._close())

    async def _close(self) -> None:
        engine, self._engine, self._read_engine = self._engine, None, None
        if engine is not None:
            event.listen(engine.pool, "checkin", _drop)  # what is in use now would stay open in a pool nobody has
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
                "postgresql+asyncpg://",  # asyncpg reads the connection string, so nothing in the engine holds a secret
                async_creator=self.connect,
                hide_parameters=True,
                pool_size=settings.pool_size,
                max_overflow=settings.max_overflow,
                pool_timeout=settings.pool_timeout_seconds,
                pool_recycle=settings.pool_recycle_seconds,
                pool_use_lifo=True,
            )
        return self._engine

    def create_engine(self, *, server_settings: Mapping[str, str] | None = None) -> AsyncEngine:
        """Build an engine without a pool and without time limits on statements: for migrations. The caller disposes of it.

        Raises:
            ClosedError: The manager was closed.
        """
        self._require_open()

        async def creator() -> asyncpg.Connection:
            unlimited = {"statement_timeout": "0", "idle_in_transaction_session_timeout": "0"}
            return await self.connect(server_settings={**unlimited, **(server_settings or {})}, command_timeout=None)

        return create_async_engine(
            "postgresql+asyncpg://", async_creator=creator, hide_parameters=True, poolclass=NullPool
        )

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
            ControlPlaneError: Whatever the database refused, in the block or at commit, by its own class; nothing was written. Errors that are
                neither the database's nor ours pass through unchanged.
        """
        async with self._translated(), self._session(AsyncSession, self.engine) as session:
            yield session
            async with self._translated(io=True):
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
        async with self._translated(reading=True), self._session(ReadSession, self._reading()) as session:
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
        return kind(engine, expire_on_commit=False, info={"role": self._role})

    @property
    def _role(self) -> str | None:
        return (self._dsn.server_settings.get("role") or self._dsn.user) if self._dsn else None

    @asynccontextmanager
    async def _translated(self, *, io: bool = False, reading: bool = False) -> AsyncGenerator[None]:
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
            if isinstance(error, PoolTimeoutError) and not error.details:
                limit = self.settings.pool_size + self.settings.max_overflow
                error.details = {"limit": limit, "waited_seconds": self.settings.pool_timeout_seconds}
            if error is None or error is problem:
                raise
        if error is not None:
            try:
                raise error
            finally:
                error.__context__ = None  # the driver's error: the caller's `async with` is still handling it

    # --- connections --------------------------------------------------------------------------------------------------

    async def connect(
        self,
        *,
        server_settings: Mapping[str, str] | None = None,
        command_timeout: float | Literal["settings"] | None = "settings",
    ) -> asyncpg.Connection:
        """Open one asyncpg connection outside of the pool; the caller closes it.

        Tries the hosts in order, each for at most `connect_timeout_seconds`, until one has the role `target_session_attrs` asks for (with several
        hosts and nothing asked: one that takes writes).

        Args:
            server_settings: Run-time parameters that win over those of the settings and of the connection string.
            command_timeout: Seconds a statement may take, as asyncpg counts; None is no limit, by default the setting.

        Raises:
            ClosedError: The manager was closed.
            ConfigurationError: User, password, database name or TLS are not what the server accepts, or the server is older than PostgreSQL 12.
            ConnectionUnavailableError: No host accepted the connection in time.
        """
        dsn = await self._resolve()
        failures: list[ControlPlaneError] = []
        for attributes, host in attempts(dsn):
            connection, error = await dial(
                dsn,
                host,
                timeout=self.settings.connect_timeout_seconds,
                target_session_attrs=attributes,
                command_timeout=self.settings.command_timeout_seconds
                if command_timeout == "settings"
                else command_timeout,
                server_settings={**self._server_settings(), **dsn.server_settings, **(server_settings or {})},
            )
            if connection is not None:
                return connection
            if not isinstance(error, ConnectionUnavailableError):
                raise error
            failures.append(error)
        error = none_accepted(failures)
        raise error

    def _server_settings(self) -> dict[str, str]:
        settings = self.settings
        return {
            "application_name": settings.application_name,
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
        error: ControlPlaneError | None = None
        try:
            async with self._translated(), self.engine.connect() as connection:
                facts: Any = (await connection.exec_driver_sql(_HEALTH)).one()
                version, has_schema, has_revision = facts
                if has_revision:
                    revision = (await connection.exec_driver_sql(_REVISION)).scalar()
            schema, error = _judge(revision, has_schema=has_schema)
        except ControlPlaneError as problem:
            error = problem
            if isinstance(error, PermissionDeniedError):
                error.hint = grants_for(_VERSION_TABLE, role=self._role)
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
        limit = self.settings.pool_size + self.settings.max_overflow
        pool = self._engine.pool if self._engine is not None else None
        if not isinstance(pool, QueuePool):
            return PoolStatus(limit=limit, opened=0, in_use=0)
        return PoolStatus(limit=limit, opened=pool.checkedin() + pool.checkedout(), in_use=pool.checkedout())


_READ_ONLY = "25006"

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


def _swallowed(problem: Exception) -> ControlPlaneError | None:
    """Say that the block went on after a statement had failed: PostgreSQL refuses everything then, the commit too."""
    if getattr(getattr(problem, "orig", None), "sqlstate", None) != asyncpg.InFailedSQLTransactionError.sqlstate:
        return None
    return ControlPlaneError(
        "an earlier statement of this transaction failed, and its error was swallowed; nothing was written",
        hint="Let the error end the block, or contain it: async with session.begin_nested().",
        details={"sqlstate": asyncpg.InFailedSQLTransactionError.sqlstate},
    )


def _drop(_: object, record: ConnectionPoolEntry) -> None:
    record.invalidate()


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
