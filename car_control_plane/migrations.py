"""Brings the control plane's schema to a revision, and tells where it stands: Alembic, for async code and without an `alembic.ini`.

Three things make concurrent upgrades safe. Whoever migrates a database holds an advisory lock there, on an idle connection of its own and asked
for by polling, *before* the revision is read: of four processes started at once, one migrates and three find nothing left to do; and a waiting
process holds no snapshot, so it never stalls a concurrent index build. Alembic keeps its state in module globals, so inside a process one
command runs at a time, whatever task or thread it comes from. Every migration is a transaction of its own with a lock time limit: an ALTER that
waits behind a long reader gives up, lets the queue behind it pass, and is tried again.

The `alembic` command runs the same code: `alembic/env.py` calls `run_environment`. What autogenerate cannot see (triggers, functions) `drift`
does: it compares the database's catalog with the description shipped as `catalog.json`. `python -m car_control_plane.migrations` writes that
file anew, from a temporary database at the head.

Not done here: migrating the tenants' databases.

Sources: PostgreSQL manual, "Explicit Locking"; Alembic documentation, "Using Asyncio with Alembic" and "Customizing Revision Generation";
`docs/adr/0005-alembic-environment-and-lock.md`.
"""

import asyncio
import functools
import io
import json
import logging.config
import re
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import asyncpg
from alembic import command, util
from alembic.autogenerate import produce_migrations, render_python_code
from alembic.config import Config
from alembic.operations.ops import ExecuteSQLOp, MigrationScript
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from pydantic import SecretStr
from sqlalchemy import Connection, Enum, inspect, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.types import TypeDecorator

from car_control_plane.connection import AsyncConnectionManager
from car_control_plane.errors import (
    ConflictError,
    ConnectionUnavailableError,
    ControlPlaneError,
    MigrationError,
    PermissionDeniedError,
    SchemaMissingError,
    SchemaOutdatedError,
    translate,
)
from car_control_plane.models import SCHEMA, metadata
from car_control_plane.models.base import native_enums
from car_control_plane.settings import ControlPlaneSettings

__all__ = [
    "Drift",
    "MigrationResult",
    "Revision",
    "Target",
    "check",
    "current",
    "downgrade",
    "drift",
    "history",
    "render_sql",
    "run_environment",
    "upgrade",
    "wait",
]

Target = str | SecretStr | ControlPlaneSettings | AsyncConnectionManager | None
"""What to work on: a connection string, settings, or a manager (which stays open); None is `DATABASE_URL`."""

# "ccpmigr1". Any number will do, as long as every version of the library uses this one.
_LOCK_KEY = 0x63_63_70_6D_69_67_72_31
_LOCK_POLL_SECONDS = 0.2
_RETRY_SECONDS = 1.0
_TURN_POLL_SECONDS = 0.02
_WAIT_POLL_SECONDS = 0.5
_LOCK_NOT_AVAILABLE = "55P03"
_SEARCH_PATH = "pg_catalog"  # as good as empty, and what PostgreSQL looks through anyway

_CATALOG_FILE = Path(__file__).with_name("catalog.json")


class Revision(NamedTuple):
    """A step of the schema's history."""

    revision: str
    down_revision: str | None
    description: str


@dataclass(frozen=True, slots=True)
class MigrationResult:
    """What an upgrade or a downgrade did.

    Attributes:
        before: The revision it found; None for a database that was never migrated.
        after: The revision it left.
        revisions: The revisions it applied, or undid, in this order; empty when there was nothing to do.
    """

    before: str | None
    after: str | None
    revisions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Drift:
    """One object of the schema that is not as the migrations make it.

    Attributes:
        kind: `missing`, `unexpected`, or `changed`.
        object: What and which, `trigger tenants.tenants_20_life_cycle` for example.
        expected: Its definition as shipped; None for an unexpected object.
        found: Its definition in the database; None for a missing object.
    """

    kind: Literal["missing", "unexpected", "changed"]
    object: str
    expected: str | None
    found: str | None


# --- what callers use -------------------------------------------------------------------------------------------------


async def upgrade(target: Target = None, revision: str = "head") -> MigrationResult:
    """Bring the schema up to a revision, creating it where there is none; does nothing when it is there already.

    Safe to call from many processes, tasks and threads at once. Each migration is a transaction; the ones before a failing one stay.

    Args:
        target: The database.
        revision: A revision, `head`, or a number of steps (`+1`).

    Raises:
        MigrationError: A migration failed and is rolled back, or there is no such revision.
        SchemaOutdatedError: The database is at a revision this version of the library does not know; nothing was done.
        PermissionDeniedError: The role may not; the hint says which GRANT is missing.
        ConflictError: Another process kept migrating, or a transaction kept a lock, for `migration_lock_timeout_seconds`.
        ConnectionUnavailableError: The server cannot be reached or the connection was lost. Run it again.
    """
    return await _move(target, command.upgrade, revision)


async def downgrade(target: Target = None, revision: str = "-1") -> MigrationResult:
    """Take the schema back to a revision, and lose the data of what is dropped. `base` removes everything the migrations made.

    Args:
        target: The database.
        revision: A revision, `base`, or a number of steps (`-1`).

    Raises:
        MigrationError: As for `upgrade`.
        SchemaOutdatedError: As for `upgrade`.
        PermissionDeniedError: As for `upgrade`.
        ConflictError: As for `upgrade`.
        ConnectionUnavailableError: As for `upgrade`.
    """
    return await _move(target, command.downgrade, revision)


async def current(target: Target = None) -> str | None:
    """Return the schema's revision; None when it was never migrated. One connection, at most two round trips.

    Raises:
        PermissionDeniedError: The role may not read it; the hint says which GRANT is missing.
        MigrationError: The version table has more than one row: somebody changed it by hand.
        ConnectionUnavailableError: The server cannot be reached.
    """
    async with _opened(target) as manager, _connected(manager) as connection:
        return await _current(connection)


def history() -> tuple[Revision, ...]:
    """Return the revisions this version of the library knows, oldest first; the last one is its head. Reads the scripts, no database."""
    return _history(ScriptDirectory.from_config(_config()))


async def check(target: Target = None) -> tuple[str, ...]:
    """Compare the database with the models; return each difference as the migration command that would end it. Empty is clean.

    Sees what autogenerate sees: tables, columns, types, enum values, defaults, indexes, constraints. `drift` sees the rest.

    Raises:
        SchemaMissingError: The database was never migrated.
        SchemaOutdatedError: It is not at the head.
        PermissionDeniedError: As for `current`.
        ConnectionUnavailableError: As for `current`.
    """
    async with _opened(target) as manager:
        await _require_head(manager)
        differences: list[str] = []
        problem = await _run(manager, lambda connection: differences.extend(_differences(connection)), direct=False)
        if problem is not None:
            raise await _explained(manager, problem)
    return tuple(differences)


async def drift(target: Target = None) -> tuple[Drift, ...]:
    """Compare the database's catalog, object by object, with the description shipped for the head. Empty is clean.

    Raises:
        SchemaMissingError: The database was never migrated.
        SchemaOutdatedError: It is not at the head.
        PermissionDeniedError: As for `current`.
        ConnectionUnavailableError: As for `current`.
    """
    expected = _shipped_catalog()
    async with _opened(target) as manager:
        await _require_head(manager)
        async with _connected(manager) as connection:
            found = await _catalog(connection)
    return tuple(
        Drift(_drift_kind(expected.get(key), found.get(key)), " ".join(key), expected.get(key), found.get(key))
        for key in sorted(expected.keys() | found.keys())
        if expected.get(key) != found.get(key)
    )


def render_sql(revision: str = "head", *, from_: str | None = None) -> str:
    """Return an upgrade as an SQL script, each migration in a transaction of its own. Needs no database.

    Blocks while another thread runs Alembic; in async code that may migrate at the same time, use `asyncio.to_thread`.

    Args:
        revision: The revision to end at.
        from_: The revision to start from; None starts from an empty database.

    Raises:
        MigrationError: There is no such revision.
        ConflictError: A migration is running in this very event loop, which a blocking call would stop.
    """
    script = io.StringIO()
    refusal: MigrationError | None = None
    with _turn_of_a_blocking_call():
        try:
            command.upgrade(_config(output=script), f"{from_ or 'base'}:{revision}", sql=True)
        except util.CommandError as error:
            refusal = _refused(error)
    if refusal is not None:
        raise refusal
    return script.getvalue()


async def wait(target: Target = None, *, timeout_seconds: float = 60.0) -> None:
    """Return as soon as the database can be reached and is at the head: for a service that starts beside the one that migrates.

    Raises:
        ConnectionUnavailableError: It could still not be reached after `timeout_seconds`.
        SchemaMissingError: It was still not migrated after `timeout_seconds`.
        SchemaOutdatedError: It was still behind after `timeout_seconds`; or it is ahead of this version of the library, told at once.
        ConfigurationError: Waiting would not help: a wrong password, no such database.
        PermissionDeniedError: As for `current`.
    """
    deadline = time.monotonic() + timeout_seconds
    async with _opened(target) as manager:
        while True:
            try:
                problem: ControlPlaneError | None = _behind(await current(manager))
            except ConnectionUnavailableError as error:
                problem = error
            if problem is None:
                return
            if time.monotonic() >= deadline:
                raise problem
            await asyncio.sleep(_WAIT_POLL_SECONDS)


# --- what alembic/env.py uses -----------------------------------------------------------------------------------------


def run_environment(context: Any) -> None:
    """Run the Alembic command under way; `alembic/env.py` consists of this call.

    A connection in `config.attributes["connection"]` is used as it is, in its transaction if it has one; otherwise one is made from `DATABASE_URL`.

    Args:
        context: The module `alembic.context`.

    Raises:
        CommandError: The command cannot be done; the text is that of the library's own error, and `alembic` prints it as one line.
        ConflictError: On a connection that was passed: somebody else is migrating the database.
    """
    config: Config = context.config
    options = config.cmd_opts  # None unless this is the `alembic` command
    if options is not None and config.config_file_name is not None:
        logging.config.fileConfig(config.config_file_name, disable_existing_loggers=False)
    connection: Connection | None = config.attributes.get("connection")
    if context.is_offline_mode():
        _write_sql(context)
    elif connection is not None and config.attributes.get("locked"):  # _move has seen to everything
        _run_command(context, connection)
    elif connection is not None:
        with _lock_on(connection) if _changes_something(context) else nullcontext(), _empty_search_path(connection):
            _run_command(context, connection)
    elif getattr(options, "autogenerate", True) is False:
        _name_a_file(context)
    else:
        _run_from_the_command_line(context)


def _run_from_the_command_line(context: Any) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        msg = "an event loop is running here: await car_control_plane.migrations.upgrade() instead"
        raise util.CommandError(msg)
    problem = asyncio.run(_run_on_a_connection_of_its_own(context))
    if isinstance(problem, ControlPlaneError):
        raise util.CommandError(str(problem)) from problem
    if problem is not None:
        raise problem


async def _run_on_a_connection_of_its_own(context: Any) -> Exception | None:
    changes = _changes_something(context)
    looking = _locked if changes else _connected
    try:
        async with AsyncConnectionManager() as manager, looking(manager) as connection:
            revision = await _current(connection)
            if not getattr(context.config.cmd_opts, "purge", False):  # the way out of an unknown revision
                _require_known(revision, _history(context.script))
            problem = await _run(manager, functools.partial(_run_command, context), direct=changes)
            if problem is None or isinstance(problem, util.CommandError):
                return problem  # Alembic's own words are what its users expect
            return await _explained(manager, problem)
    except ControlPlaneError as error:
        return error


def _changes_something(context: Any) -> bool:
    """Tell upgrade, downgrade and stamp from the commands that only look."""
    try:
        context.get_revision_argument()
    except KeyError:
        return False
    return True


def _run_command(context: Any, connection: Connection) -> None:
    """Let Alembic do what it was asked to. Leaves no trace of Alembic in a database without a revision."""
    changes = _changes_something(context)
    passing = connection.in_transaction()
    if changes:
        with _transaction(connection):
            connection.execute(text(_CREATE_SCHEMA))
    context.configure(connection=connection, dont_mutate=not changes, **_OPTIONS)
    try:
        with context.begin_transaction():
            context.run_migrations()
    finally:
        with suppress(SQLAlchemyError):  # on a connection that broke
            if not passing:
                connection.rollback()  # what Alembic began by reading
            if changes:
                with _transaction(connection):
                    connection.execute(text(_TIDY_UP))


@contextmanager
def _empty_search_path(connection: Connection) -> Iterator[None]:
    """Let nothing be found by its bare name on a connection that a program passed, as on our own.

    A migration that forgets a schema then fails, and autogenerate sees our types and tables with their schema: without it, it takes them for others.
    """
    dialect = connection.dialect
    default = dialect.default_schema_name
    setting = text("SELECT set_config('search_path', :path, false)")
    with _transaction(connection):
        path = connection.scalar(text("SELECT current_setting('search_path')"))
        connection.execute(setting, {"path": _SEARCH_PATH})
    dialect.default_schema_name = _SEARCH_PATH
    try:
        yield
    finally:
        dialect.default_schema_name = default
        with suppress(SQLAlchemyError), _transaction(connection):  # a transaction that failed takes it back by itself
            connection.execute(setting, {"path": path})


def _write_sql(context: Any) -> None:
    context.configure(**_OFFLINE, **_OPTIONS)
    if context.get_starting_revision_argument() is None:
        context.execute(_CREATE_SCHEMA)
    with context.begin_transaction():
        context.run_migrations()


def _name_a_file(context: Any) -> None:
    """Serve `alembic revision` without --autogenerate, which needs no database."""
    context.configure(as_sql=True, **_OFFLINE, **_OPTIONS)
    context.run_migrations()


def _transaction(connection: Connection) -> AbstractContextManager[Any]:
    """A transaction, unless the caller's is open: what runs before Alembic's own must be committed, or nothing at all is."""
    return nullcontext() if connection.in_transaction() else connection.begin()


_MARK = "The control plane. Made by its first migration."

# Not CREATE SCHEMA IF NOT EXISTS, which a role without CREATE on the database may not say even when the schema exists.
_CREATE_SCHEMA = f"""
DO $$
BEGIN
    IF to_regnamespace('{SCHEMA}') IS NULL THEN
        CREATE SCHEMA {SCHEMA};
        COMMENT ON SCHEMA {SCHEMA} IS '{_MARK}';
    END IF;
END $$
"""

# Alembic never drops its table. A schema that somebody else made, with rights given on it, stays.
_TIDY_UP = f"""
DO $$
BEGIN
    IF to_regclass('{SCHEMA}.alembic_version') IS NOT NULL THEN
        IF NOT EXISTS (SELECT FROM {SCHEMA}.alembic_version) THEN
            DROP TABLE {SCHEMA}.alembic_version;
        END IF;
    END IF;
    IF obj_description(to_regnamespace('{SCHEMA}'), 'pg_namespace') = '{_MARK}' THEN
        BEGIN
            DROP SCHEMA {SCHEMA};
        EXCEPTION WHEN dependent_objects_still_exist THEN
            NULL;
        END;
    END IF;
END $$
"""


def _after_each_step(ctx: MigrationContext, step: Any, heads: Any, **_: Any) -> None:
    """Remove what Alembic itself made, in the transaction of the last downgrade."""
    if not heads and not step.is_upgrade:
        ctx.execute(_TIDY_UP)


def _include_name(name: str | None, kind: str, _parents: Mapping[str, Any]) -> bool:
    """Look at our schema only: without this, autogenerate proposes to drop the tables of all others."""
    return name == SCHEMA if kind == "schema" else True


def _render_item(kind: str, item: Any, context: Any) -> str | Literal[False]:
    """Render types in SQLAlchemy's own words: a revision is history, and must not depend on a type of SQLModel's or ours that moves."""
    if kind != "type":
        return False
    stored = item.impl_instance if isinstance(item, TypeDecorator) else item
    if isinstance(stored, Enum):  # the type itself is made by _add_enum_types
        context.imports.add("from sqlalchemy.dialects import postgresql")
        labels = "".join(f"{label!r}, " for label in stored.enums)
        return f"postgresql.ENUM({labels}name={stored.name!r}, schema={stored.schema!r}, create_type=False)"
    return f"sa.{stored!r}" if stored is not item else False


def _finish_revision(context: MigrationContext, _revision: Any, directives: list[MigrationScript]) -> None:
    for script in directives:
        _add_enum_types(context, script)
        _name_revision(context, script)


def _add_enum_types(context: MigrationContext, script: MigrationScript) -> None:
    """Add what autogenerate leaves out: enum types that come or go, and new labels."""
    up, down = script.upgrade_ops, script.downgrade_ops
    if context.connection is None or context.as_sql or up is None or down is None:
        return
    enums = native_enums(context.opts["target_metadata"].tables.values())
    wanted = {name: enum.enums for name, enum in enums.items()}
    inspector: Any = inspect(context.connection)  # PostgreSQL's, which knows enums
    found = {enum["name"]: enum["labels"] for enum in inspector.get_enums(schema=SCHEMA)}
    for name in sorted(wanted.keys() - found.keys()):
        up.ops.insert(0, _create_type(name, wanted[name]))
        down.ops.append(ExecuteSQLOp(f"DROP TYPE {SCHEMA}.{name}"))
    for name in sorted(found.keys() - wanted.keys()):
        up.ops.append(ExecuteSQLOp(f"DROP TYPE {SCHEMA}.{name}"))
        down.ops.insert(0, _create_type(name, found[name]))
    for name in sorted(wanted.keys() & found.keys()):
        # There is no way back, for PostgreSQL drops no label: after a downgrade it is there already.
        new = [label for label in wanted[name] if label not in found[name]]
        up.ops[:0] = [ExecuteSQLOp(f"ALTER TYPE {SCHEMA}.{name} ADD VALUE IF NOT EXISTS '{label}'") for label in new]


def _create_type(name: str, labels: Sequence[str]) -> ExecuteSQLOp:
    quoted = ", ".join(f"'{label}'" for label in labels)
    return ExecuteSQLOp(f"CREATE TYPE {SCHEMA}.{name} AS ENUM ({quoted})")


def _name_revision(context: MigrationContext, script: MigrationScript) -> None:
    """Call the next revision <next number>_<message>. An id given with --rev-id wins; a bare number gets the message appended."""
    given = context.opts["revision_context"].command_args["rev_id"] or ""
    head = re.match(r"\d+", context.opts["script"].get_current_head() or "")
    if head is None or not re.fullmatch(r"\d*", given):
        return
    number = given or f"{int(head[0]) + 1:03}"
    name = "_".join([number, *re.findall(r"\w+", script.message or "")]).lower()
    script.rev_id = name if len(name) <= _LONGEST_ID else name[: _LONGEST_ID + 1].rpartition("_")[0]


_LONGEST_ID = 32  # Alembic keeps it in a VARCHAR(32)

_OPTIONS: dict[str, Any] = {
    "target_metadata": metadata,
    "version_table_schema": SCHEMA,
    "include_schemas": True,
    "include_name": _include_name,
    "compare_type": True,
    "compare_server_default": True,
    "render_item": _render_item,
    "process_revision_directives": _finish_revision,
    "on_version_apply": _after_each_step,
    "transaction_per_migration": True,
    "autogenerate_plugins": ["alembic.autogenerate.*", "alembic.ext.checkconstraint_byname"],
}

_OFFLINE: dict[str, Any] = {
    "dialect_name": "postgresql",
    "dialect_opts": {"paramstyle": "named"},  # the default one doubles every % sign
    "literal_binds": True,
}


# --- running Alembic --------------------------------------------------------------------------------------------------


def _config(*, connection: Connection | None = None, output: io.StringIO | None = None) -> Config:
    config = Config(output_buffer=output)
    config.set_main_option("script_location", str(_scripts()).replace("%", "%%"))
    config.attributes.update({"connection": connection, "locked": True})
    return config


def _scripts() -> Path:
    """Return where the revisions are: inside the package in a wheel, beside it in a working copy."""
    package = Path(__file__).parent
    installed = package / "_alembic"
    return installed if installed.is_dir() else package.parent / "alembic"


def _history(scripts: ScriptDirectory) -> tuple[Revision, ...]:
    """Return the line of revisions; that it is one line, without branches and merges, a test watches."""
    newest_first = [
        Revision(script.revision, None if script.down_revision is None else str(script.down_revision), script.doc)
        for script in scripts.walk_revisions()
    ]
    return tuple(reversed(newest_first))


async def _move(target: Target, direction: Callable[[Config, str], None], revision: str) -> MigrationResult:
    line = history()
    async with _opened(target) as manager, _locked(manager) as connection:
        before = await _current(connection)
        _require_known(before, line)
        problem = await _run(manager, lambda sync: direction(_config(connection=sync), revision))
        if problem is not None:
            raise await _explained(manager, problem)
        after = await _current(connection)
    return MigrationResult(before, after, _between(before, after, line))


def _between(before: str | None, after: str | None, line: Sequence[Revision]) -> tuple[str, ...]:
    revisions = [step.revision for step in line]
    start, end = (0 if revision is None else revisions.index(revision) + 1 for revision in (before, after))
    return tuple(revisions[start:end] or reversed(revisions[end:start]))


async def _run(
    manager: AsyncConnectionManager, work: Callable[[Connection], None], *, direct: bool = True
) -> Exception | None:
    """Do the work on a connection of its own, and again while a lock cannot be had. Returns what stopped it instead of raising it.

    With `direct` never through a connection pooler: for whatever changes something.

    Nothing is in the search path: every name in a migration carries its schema, and one that does not fails.
    """
    engine = manager.create_engine(server_settings={"search_path": _SEARCH_PATH}, activity="migrate", direct=direct)
    deadline = time.monotonic() + manager.settings.migration_lock_timeout_seconds
    try:
        while True:
            try:
                async with _turn(), engine.connect() as connection:
                    await connection.run_sync(work)
            except Exception as error:  # raised outside of this block, so that a driver's error hangs on no __context__
                problem = error
            else:
                return None
            if _sqlstate(problem) != _LOCK_NOT_AVAILABLE or time.monotonic() >= deadline:
                return problem
            await asyncio.sleep(_RETRY_SECONDS)
    finally:
        await engine.dispose()


_alembic = threading.Lock()


@asynccontextmanager
async def _turn() -> AsyncIterator[None]:
    """Wait for Alembic's module globals, which every task of every event loop in every thread shares."""
    while not _alembic.acquire(blocking=False):  # noqa: ASYNC110 -- an asyncio.Event reaches no other loop or thread
        await asyncio.sleep(_TURN_POLL_SECONDS)
    try:
        yield
    finally:
        _alembic.release()


@contextmanager
def _turn_of_a_blocking_call() -> Iterator[None]:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        blocking = True
    else:
        blocking = False  # whose turn it is may be a task of this very loop
    if not _alembic.acquire(blocking=blocking):
        raise ConflictError(
            "a migration is running in this event loop",
            hint="Use await asyncio.to_thread(render_sql, ...).",
            retryable=True,
        )
    try:
        yield
    finally:
        _alembic.release()


# --- the database -----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _opened(target: Target) -> AsyncIterator[AsyncConnectionManager]:
    if isinstance(target, AsyncConnectionManager):
        yield target
    else:
        async with AsyncConnectionManager(target) as manager:
            yield manager


@asynccontextmanager
async def _connected(
    manager: AsyncConnectionManager, missing_grant: str | None = None, *, direct: bool = False
) -> AsyncIterator[asyncpg.Connection]:
    """Give a connection for looking around; what goes wrong on it is raised as one of ours.

    Args:
        manager: Where to connect.
        missing_grant: The question whose answer is the hint when permission is denied; by default `_TO_READ`.
        direct: Whether it must be a session of the server's own.

    Yields:
        A connection with nothing in its search path.

    Raises:
        ControlPlaneError: Whatever the server refuses.
    """
    problem: ControlPlaneError | None = None
    connect = manager.connect_direct if direct else manager.connect
    connection = await connect(server_settings={"search_path": _SEARCH_PATH}, activity="migrate")
    try:
        yield connection
    except ControlPlaneError:
        raise
    except Exception as error:
        problem = translate(error, io=True)
        if problem is None:
            raise
    finally:
        with suppress(OSError, asyncpg.InterfaceError):  # gone already, or not answering
            await connection.close(timeout=manager.settings.connect_timeout_seconds)
    if isinstance(problem, PermissionDeniedError):
        problem = await _permission_denied(manager, missing_grant or _TO_READ)
    if problem is not None:
        try:
            raise problem
        finally:
            problem.__context__ = None  # the driver's error: the caller's `async with` is still handling it


@asynccontextmanager
async def _locked(manager: AsyncConnectionManager) -> AsyncIterator[asyncpg.Connection]:
    """Keep every other migration of this database out, and wait for the one that is under way.

    The connection idles while its owner migrates on another one, and so it does while it waits: inside a statement it would hold a snapshot, and
    the other's CREATE INDEX CONCURRENTLY waits for that.

    Yields:
        The connection whose end lets go of the lock.

    Raises:
        ConflictError: The other one did not end in time.
    """
    deadline = time.monotonic() + manager.settings.migration_lock_timeout_seconds
    async with _connected(manager, _TO_MIGRATE, direct=True) as connection:
        while not await connection.fetchval("SELECT pg_try_advisory_lock($1)", _LOCK_KEY):
            if time.monotonic() >= deadline:
                raise ConflictError(**_somebody_else(await connection.fetchrow(_LOCK_HOLDER, _LOCK_KEY)))
            await asyncio.sleep(_LOCK_POLL_SECONDS)
        await connection.execute(_KEEP_IDLE_SESSION)
        yield connection


@contextmanager
def _lock_on(connection: Connection) -> Iterator[None]:
    """Hold the lock on a connection that a program passed to Alembic: in its transaction, if it has one open.

    Raises:
        ConflictError: Somebody else is migrating this database. There is no waiting here, for this may be a thread that must not block.
    """
    passing = connection.in_transaction()
    with _transaction(connection):
        lock = text(f"SELECT {'pg_try_advisory_xact_lock' if passing else 'pg_try_advisory_lock'}(:key)")
        free = connection.scalar(lock, {"key": _LOCK_KEY})
    if not free:
        raise ConflictError(**_somebody_else(None))
    try:
        yield
    finally:
        if not passing:
            connection.rollback()
            with _transaction(connection):
                connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": _LOCK_KEY})


_LOCK_HOLDER = """
SELECT l.pid, a.usename AS role, a.application_name AS application, host(a.client_addr) AS client
FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid
WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND (l.classid::bigint << 32 | l.objid::bigint) = $1
"""

# From PostgreSQL 14 on a server may end sessions that idle.
_KEEP_IDLE_SESSION = "SELECT set_config(name, '0', false) FROM pg_settings WHERE name = 'idle_session_timeout'"


def _somebody_else(holder: Mapping[str, Any] | None) -> dict[str, Any]:
    who = {key: value for key, value in dict(holder or {}).items() if value}
    named = ", ".join(f"{key} {value}" for key, value in who.items())
    return {
        "message": f"another process is migrating this database{f' ({named})' if named else ''}",
        "hint": "Wait for it to end, or raise migration_lock_timeout_seconds.",
        "details": who,
        "retryable": True,
    }


async def _current(connection: asyncpg.Connection) -> str | None:
    if await connection.fetchval("SELECT to_regclass($1) IS NULL", f"{SCHEMA}.alembic_version"):
        return None
    rows = await connection.fetch(f"SELECT version_num FROM {SCHEMA}.alembic_version ORDER BY 1")  # noqa: S608 -- a constant
    if len(rows) > 1:
        raise MigrationError(
            "the database has more than one revision",
            hint=f"Somebody changed {SCHEMA}.alembic_version by hand: keep the row that is right.",
            details={"revisions": [row[0] for row in rows]},
        )
    return rows[0][0] if rows else None


def _require_known(revision: str | None, line: Sequence[Revision]) -> None:
    head = line[-1].revision
    if revision is not None and revision not in {step.revision for step in line}:
        raise SchemaOutdatedError(
            f"the database is at revision {revision!r}, which this version of the library, with head {head!r}, does not know",
            hint="Upgrade the library; or, to go back, downgrade the schema with the version that migrated it.",
            details={"revision": revision, "head": head},
        )


async def _require_head(manager: AsyncConnectionManager) -> None:
    problem = _behind(await current(manager))
    if problem is not None:
        raise problem


def _behind(revision: str | None) -> ControlPlaneError | None:
    """Return what keeps the database from being at the head.

    Raises:
        SchemaOutdatedError: It is ahead of the head.
    """
    line = history()
    _require_known(revision, line)
    head = line[-1].revision
    if revision is None:
        return SchemaMissingError("the schema was never migrated")
    if revision == head:
        return None
    return SchemaOutdatedError(
        f"the schema is at revision {revision!r}, behind {head!r}",
        hint="Run migrations: alembic upgrade head (or: car-cp db upgrade).",
        details={"revision": revision, "head": head},
    )


# --- what went wrong --------------------------------------------------------------------------------------------------


async def _explained(manager: AsyncConnectionManager, problem: Exception) -> Exception:
    """Turn what stopped a migration into one of ours. An error that is neither Alembic's nor the database's comes back as it is."""
    if isinstance(problem, util.CommandError):
        return _refused(problem)
    known = translate(problem, io=True)
    state = _sqlstate(problem)
    if isinstance(known, PermissionDeniedError):
        return await _permission_denied(manager, _TO_MIGRATE)
    if isinstance(known, ConnectionUnavailableError) or state in {None, _LOCK_NOT_AVAILABLE}:
        return known or problem
    failed = _failed_revision(problem)
    return MigrationError(
        f"{failed or 'the comparison'} failed: {_server_message(problem) or 'the server log says why'} (SQLSTATE {state})",
        hint="It is rolled back; the migrations before it stay." if failed else "",
        details={"revision": failed, "sqlstate": state},
    )


def _refused(problem: util.CommandError) -> MigrationError:
    known = [step.revision for step in history()]
    return MigrationError(str(problem), hint=f"Known revisions: {', '.join(known)}.", details={"known": known})


def _failed_revision(problem: Exception) -> str | None:
    """Name the script the traceback passes through."""
    trace = problem.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_globals
        if "down_revision" in module:
            return str(module.get("revision"))
        trace = trace.tb_next
    return None


def _sqlstate(problem: Exception) -> str | None:
    state = getattr(getattr(problem, "orig", problem), "sqlstate", None)
    return state if isinstance(state, str) else None


def _server_message(problem: Exception) -> str | None:
    """Return the server's words where they can only be about the schema: errors of class 42 and 2B name objects, never a row's values."""
    cause = getattr(problem, "orig", problem).__cause__
    if not isinstance(cause, asyncpg.PostgresError) or not (_sqlstate(problem) or "").startswith(("42", "2B")):
        return None
    return str(cause.args[0])


_TO_MIGRATE = f"""
SELECT CASE
    WHEN n.oid IS NULL THEN format('GRANT CREATE ON DATABASE %I TO %I;', current_database(), current_user)
    WHEN NOT pg_has_role(c.relowner, 'USAGE') THEN NULL
    WHEN NOT (has_schema_privilege(n.oid, 'USAGE') AND has_schema_privilege(n.oid, 'CREATE'))
        THEN format('GRANT USAGE, CREATE ON SCHEMA {SCHEMA} TO %I;', current_user)
END
FROM (SELECT) here
    LEFT JOIN pg_namespace n ON n.nspname = '{SCHEMA}'
    LEFT JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = 'alembic_version'
"""  # noqa: S608 -- a constant

_TO_READ = f"""
SELECT format('GRANT USAGE ON SCHEMA {SCHEMA} TO %1$I; GRANT SELECT ON {SCHEMA}.alembic_version TO %1$I;', current_user)
"""


async def _permission_denied(manager: AsyncConnectionManager, missing_grant: str) -> PermissionDeniedError:
    """Ask the server which GRANT would help."""
    async with _connected(manager) as connection:
        grant = await connection.fetchval(missing_grant)
    if grant is None:  # a table can be changed by its owner only
        return PermissionDeniedError(
            hint="Migrate as the role that owns the tables of the control plane.", details={"sqlstate": "42501"}
        )
    return PermissionDeniedError(
        hint=f"Let an administrator run: {grant}", details={"sqlstate": "42501", "grant": grant}
    )


# --- what the schema is like ------------------------------------------------------------------------------------------


def _differences(connection: Connection) -> list[str]:
    context = MigrationContext.configure(connection, opts=dict(_OPTIONS))
    script = produce_migrations(context, metadata)
    _add_enum_types(context, script)
    if script.upgrade_ops is None or script.upgrade_ops.is_empty():
        return []
    code = render_python_code(script.upgrade_ops, render_item=_render_item, migration_context=context)
    return [line for line in map(str.strip, code.splitlines()) if not line.startswith("#")]


def _shipped_catalog() -> dict[tuple[str, str], str]:
    rows = json.loads(_CATALOG_FILE.read_text(encoding="utf-8"))["objects"]
    return {(kind, name): definition for kind, name, definition in rows}


def _drift_kind(expected: str | None, found: str | None) -> Literal["missing", "unexpected", "changed"]:
    if found is None:
        return "missing"
    return "unexpected" if expected is None else "changed"


async def _catalog(connection: asyncpg.Connection) -> dict[tuple[str, str], str]:
    """Describe every object of the schema by what PostgreSQL says it is: the same text on PostgreSQL 12 to 18."""
    rows = await connection.fetch(_CATALOG, SCHEMA, ["alembic_version", "alembic_version_pkc"])
    return {(kind, name): definition for kind, name, definition in rows}


_CATALOG = """
SELECT 'table' AS kind, c.relname AS name,
       concat_ws(' ', c.relkind::text, c.relpersistence::text, CASE WHEN c.relrowsecurity THEN 'row security' END,
                 CASE WHEN c.relforcerowsecurity THEN 'forced' END) AS definition
  FROM pg_class c
 WHERE c.relnamespace = $1::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm', 'f') AND c.relname <> ALL ($2)
UNION ALL
SELECT 'sequence', c.relname,
       concat_ws(' ', format_type(s.seqtypid, NULL), 'start', s.seqstart, 'increment', s.seqincrement, 'min', s.seqmin,
                 'max', s.seqmax, 'cache', s.seqcache, CASE WHEN s.seqcycle THEN 'cycle' END)
  FROM pg_sequence s JOIN pg_class c ON c.oid = s.seqrelid
 WHERE c.relnamespace = $1::regnamespace
UNION ALL
SELECT 'column', c.relname || '.' || a.attname,
       concat_ws(' ', format_type(a.atttypid, a.atttypmod), CASE WHEN a.attnotnull THEN 'not null' END,
                 'default ' || pg_get_expr(d.adbin, d.adrelid), nullif(a.attidentity, ''), nullif(a.attgenerated, ''))
  FROM pg_attribute a
  JOIN pg_class c ON c.oid = a.attrelid
  LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
 WHERE c.relnamespace = $1::regnamespace AND c.relkind IN ('r', 'p') AND a.attnum > 0 AND NOT a.attisdropped
   AND c.relname <> ALL ($2)
UNION ALL
SELECT 'constraint', c.relname || '.' || k.conname, pg_get_constraintdef(k.oid)
  FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid
 WHERE c.relnamespace = $1::regnamespace AND k.contype <> 'n' AND c.relname <> ALL ($2)  -- 18 lists NOT NULL here too
UNION ALL
SELECT 'index', i.relname, pg_get_indexdef(x.indexrelid) || CASE WHEN x.indisvalid THEN '' ELSE ' INVALID' END
  FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid JOIN pg_class c ON c.oid = x.indrelid
 WHERE c.relnamespace = $1::regnamespace AND c.relname <> ALL ($2)
UNION ALL
SELECT 'enum', t.typname, (SELECT string_agg(e.enumlabel, ', ' ORDER BY e.enumsortorder) FROM pg_enum e WHERE e.enumtypid = t.oid)
  FROM pg_type t
 WHERE t.typnamespace = $1::regnamespace AND t.typtype = 'e'
UNION ALL
SELECT 'function', p.oid::regprocedure::text,
       pg_get_functiondef(p.oid) || CASE WHEN has_function_privilege('public', p.oid, 'EXECUTE') THEN ' GRANT EXECUTE TO PUBLIC' ELSE '' END
  FROM pg_proc p
 WHERE p.pronamespace = $1::regnamespace AND p.prokind IN ('f', 'p')
UNION ALL
SELECT 'trigger', c.relname || '.' || g.tgname,
       pg_get_triggerdef(g.oid) || CASE g.tgenabled WHEN 'O' THEN '' WHEN 'D' THEN ' DISABLED' ELSE ' ENABLED ' || g.tgenabled::text END
  FROM pg_trigger g JOIN pg_class c ON c.oid = g.tgrelid
 WHERE c.relnamespace = $1::regnamespace AND NOT g.tgisinternal
UNION ALL
SELECT 'policy', c.relname || '.' || p.polname,
       concat_ws(' ', p.polcmd::text, CASE WHEN p.polpermissive THEN 'permissive' ELSE 'restrictive' END,
                 (SELECT string_agg(r::regrole::text, ',' ORDER BY 1) FROM unnest(p.polroles) r WHERE r <> 0),
                 pg_get_expr(p.polqual, p.polrelid), pg_get_expr(p.polwithcheck, p.polrelid))
  FROM pg_policy p JOIN pg_class c ON c.oid = p.polrelid
 WHERE c.relnamespace = $1::regnamespace
 ORDER BY 1, 2
"""


async def _describe_head() -> str:
    async with AsyncConnectionManager("embedded:") as manager:
        result = await upgrade(manager)
        async with _connected(manager) as connection:
            objects = sorted((await _catalog(connection)).items())
    rows = ",\n".join(f"  {json.dumps([*key, definition], ensure_ascii=False)}" for key, definition in objects)
    return f'{{"head": {json.dumps(result.after)}, "objects": [\n{rows}\n]}}\n'


if __name__ == "__main__":
    _path = Path(sys.argv[1]) if len(sys.argv) > 1 else _CATALOG_FILE
    _path.write_text(asyncio.run(_describe_head()), encoding="utf-8", newline="\n")
