"""Sessions: one block is one transaction, whatever happens in it, and its connection always comes back."""

import asyncio
import gc
import os
import re
import subprocess
import sys
import tempfile
import uuid
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from sqlalchemy import event, func
from sqlalchemy.exc import ArgumentError, DBAPIError, SAWarning
from sqlmodel import col, delete, select, update
from sqlmodel.ext.asyncio.session import AsyncSession

from car_control_plane import connection as connections, dsn as dsns
from car_control_plane.connection import AsyncConnectionManager, PoolStatus, get_connection_manager, init_db
from car_control_plane.embedded import EmbeddedPostgres
from car_control_plane.errors import (
    AccessDeniedError,
    AlreadyExistsError,
    ClosedError,
    ConfigurationError,
    ConflictError,
    ConnectionUnavailableError,
    ControlPlaneError,
    InvalidDataError,
    InvalidTransitionError,
    OutcomeUnknownError,
    PermissionDeniedError,
    PoolTimeoutError,
    ProtectedError,
    SchemaMissingError,
    StaleWriteError,
    StatementTimeoutError,
)
from car_control_plane.execution import SessionExecutor, grants_for
from car_control_plane.migrations import upgrade
from car_control_plane.models import (
    SYSTEM_ADMIN_ID,
    SYSTEM_ADMIN_NAME,
    SystemConfig,
    Tenant,
    TenantCreate,
    TenantDatabase,
    TenantEnvironment,
    TenantStatus,
)
from car_control_plane.repositories import SystemConfigRepository, TenantRepository
from tests.fixtures.pools import heard_of_their_end, idle_drivers
from tests.fixtures.postgres import database_dsn

ROOT = Path(__file__).resolve().parents[2]

Make = Callable[..., AsyncConnectionManager]


@pytest.fixture
async def make(shared_manager: AsyncConnectionManager, shared_database: str) -> AsyncIterator[Make]:
    """Make managers of the shared database; afterwards none of them has a connection out, and no transaction is left."""
    made: list[AsyncConnectionManager] = []

    def one(**settings: Any) -> AsyncConnectionManager:
        made.append(AsyncConnectionManager(shared_database, **settings))
        return made[-1]

    yield one
    for manager in made:
        assert manager.pool_status().in_use == 0
        await manager.close()
    left = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in transaction%'"
    )
    await until_none(shared_manager, left)  # the server takes a moment to see that a client has hung up


def tenant(name: str = "acme", **fields: Any) -> Tenant:
    return Tenant(name=name, environment=TenantEnvironment.STAGING, **fields)


async def run(session: AsyncSession, sql: str) -> Any:
    """Run SQL as it is; return the first value, if there is one."""
    result = await (await session.connection()).exec_driver_sql(sql)
    return result.scalar() if result.returns_rows else None


async def value(manager: AsyncConnectionManager, sql: str) -> Any:
    async with manager.get_session() as session:
        return await run(session, sql)


async def block(opened: AbstractAsyncContextManager[Any], work: Callable[[Any], Any]) -> None:
    """Do the work in a session."""
    async with opened as session:
        await work(session)


async def failure(
    kind: type[BaseException], opened: AbstractAsyncContextManager[Any], work: Callable[[Any], Any]
) -> Any:
    """Do the work in a session, where it fails; return what leaves the block."""
    with pytest.raises(kind) as caught:
        await block(opened, work)
    return caught.value


async def until_none(manager: AsyncConnectionManager, sql: str) -> None:
    """Wait until a count of the server is 0."""
    async with asyncio.timeout(60):
        while await value(manager, sql):  # noqa: ASYNC110 -- the server has no event for it
            await asyncio.sleep(0.02)


async def names(manager: AsyncConnectionManager) -> set[str]:
    async with manager.get_session() as session:
        return set(await session.exec(select(Tenant.name).where(Tenant.name != SYSTEM_ADMIN_NAME)))


def count(manager: AsyncConnectionManager, *kinds: str) -> dict[str, int]:
    """Count what the engine does: `commit`, `rollback`, `checkout`."""
    counts = dict.fromkeys(kinds, 0)
    for kind in kinds:

        def note(*_: object, kind: str = kind) -> None:
            counts[kind] += 1

        target = manager.engine.sync_engine if kind in {"commit", "rollback"} else manager.engine.sync_engine.pool
        event.listen(target, kind, note)
    return counts


# --- a block that ends well -------------------------------------------------------------------------------------------


async def test_a_block_commits_once(make: Make) -> None:
    manager = make()
    counts = count(manager, "commit", "rollback", "checkout")
    async with manager.get_session() as session:
        session.add(tenant("one"))
        await session.flush()
        session.add(tenant("two"))
        assert await names(make()) == set()
    assert counts == {"commit": 1, "rollback": 0, "checkout": 1}
    assert await names(make()) == {"one", "two"}
    assert manager.pool_status() == PoolStatus(limit=10, opened=1, in_use=0)


async def test_a_block_without_a_statement_needs_no_connection(make: Make) -> None:
    manager = make()
    async with manager.get_session(), manager.get_read_session():
        pass
    assert manager.pool_status() == PoolStatus(limit=10, opened=0, in_use=0)


async def test_rows_can_be_read_after_the_block(make: Make) -> None:
    async with make().get_session() as session:
        session.add(row := tenant())
    assert (row.name, row.status, row.labels) == ("acme", TenantStatus.PENDING, {})
    assert row.version > 0
    assert row.created_at <= row.updated_at
    assert row.model_dump()["tenant_id"] == row.tenant_id


async def test_a_session_is_sqlmodels(make: Make) -> None:
    async with make().get_session() as session:
        assert isinstance(session, AsyncSession)
        assert (await session.exec(select(Tenant.name))).all() == [SYSTEM_ADMIN_NAME]


async def test_sessions_inside_one_another_are_transactions_of_their_own(make: Make) -> None:
    manager = make()

    async def outer(session: AsyncSession) -> None:
        session.add(tenant("outer"))
        await session.flush()
        async with manager.get_session() as inner:
            inner.add(tenant("inner"))
        raise RuntimeError

    await failure(RuntimeError, manager.get_session(), outer)
    assert await names(manager) == {"inner"}


async def test_two_managers_do_not_know_of_each_other(make: Make) -> None:
    one, other = make(application_name="one"), make(application_name="other")
    async with one.get_session() as first, other.get_session() as second:
        assert await run(first, "SHOW application_name") == f"one/app/{os.getpid()}"
        assert await run(second, "SHOW application_name") == f"other/app/{os.getpid()}"
    await one.close()
    assert await names(other) == set()


async def test_a_manager_is_a_context(shared_database: str) -> None:
    async with AsyncConnectionManager(shared_database) as manager:
        assert await names(manager) == set()
    with pytest.raises(ClosedError):
        manager.get_session_direct()


# --- a block that ends badly ------------------------------------------------------------------------------------------


class _OurOwnExit(BaseException):
    pass


FOREIGN = [
    RuntimeError("not yours"),
    TimeoutError("mine"),
    OSError(5, "mine too"),
    LookupError(),
    ExceptionGroup("several", [ValueError("one"), ExceptionGroup("deeper", [KeyError("two")])]),
    BaseExceptionGroup("several", [_OurOwnExit()]),
    KeyboardInterrupt(),
    SystemExit(3),
    _OurOwnExit(),
    GeneratorExit(),
    ClosedError("of something else"),
]


@pytest.mark.parametrize("error", FOREIGN, ids=lambda error: type(error).__name__)
async def test_whatever_a_block_raises_passes_unchanged_and_leaves_nothing(error: BaseException, make: Make) -> None:
    manager = make()
    counts = count(manager, "commit", "rollback")

    async def work(session: AsyncSession) -> None:
        session.add(tenant())
        await session.flush()
        raise error

    assert await failure(type(error), manager.get_session(), work) is error
    assert counts == {"commit": 0, "rollback": 1}
    assert manager.pool_status() == PoolStatus(limit=10, opened=1, in_use=0)
    assert await names(manager) == set()


async def test_an_error_before_the_first_statement_needs_no_connection(make: Make) -> None:
    manager = make()
    with pytest.raises(RuntimeError):
        async with manager.get_session():
            raise RuntimeError
    assert manager.pool_status().opened == 0


async def _insert_twice(session: AsyncSession) -> None:
    session.add(tenant())
    session.add(tenant())


async def _insert_twice_now(session: AsyncSession) -> None:
    await _insert_twice(session)
    await session.flush()


async def _bad_transition(session: AsyncSession) -> None:
    session.add(row := tenant())
    await session.flush()
    row.status = TenantStatus.SUSPENDED


async def _rename_the_protected(session: AsyncSession) -> None:
    (await session.get_one(Tenant, SYSTEM_ADMIN_ID)).name = "x"


async def _stale(session: AsyncSession) -> None:
    session.add(row := tenant())
    await session.flush()
    await run(session, "UPDATE control_plane.tenants SET labels = '{\"a\": \"b\"}' WHERE name = 'acme'")
    row.name = "other"


async def _missing_value(session: AsyncSession) -> None:
    await run(session, "INSERT INTO control_plane.tenants (tenant_id) VALUES (NULL)")


async def _no_such_table(session: AsyncSession) -> None:
    await run(session, "SELECT * FROM control_plane.tenantz")


@pytest.mark.parametrize(
    ("work", "kind", "said"),
    [
        (_insert_twice, AlreadyExistsError, "a tenant with this name exists already"),
        (_insert_twice_now, AlreadyExistsError, "a tenant with this name exists already"),
        (_bad_transition, InvalidTransitionError, "a tenant cannot change from pending to suspended"),
        (_rename_the_protected, ProtectedError, "the tenant system_admin is protected"),
        (_stale, StaleWriteError, "The row has changed since it was read; nothing was written"),
        (_missing_value, InvalidDataError, "a required value is missing"),
        (_no_such_table, SchemaMissingError, "relation does not exist"),
    ],
)
async def test_what_the_database_refuses_becomes_ours(
    work: Callable[[AsyncSession], Any], kind: type[ControlPlaneError], said: str, make: Make
) -> None:
    """In the block or at its end; with nothing of the driver's error, which holds rows, hanging on it."""
    manager = make()
    error = await failure(ControlPlaneError, manager.get_session(), work)
    assert type(error) is kind
    assert error.message == said
    assert error.__cause__ is None
    assert error.__context__ is None
    assert await names(manager) == set()


async def test_a_deferred_constraint_speaks_at_commit(own_database: str) -> None:
    async with AsyncConnectionManager(own_database) as manager:
        async with manager.get_session() as session:
            await run(session, "CREATE TABLE public.late (i int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
        with pytest.raises(AlreadyExistsError):
            async with manager.get_session() as session:
                await run(session, "INSERT INTO public.late VALUES (1), (1)")
        assert await value(manager, "SELECT count(*) FROM public.late") == 0
        assert manager.pool_status().in_use == 0


async def test_a_group_of_errors_passes_with_everything_rolled_back(make: Make) -> None:
    """Each session of the group is its own; what it raises is ours already."""
    manager = make()

    async def one(name: str) -> None:
        async with manager.get_session() as session:
            session.add(tenant(name))
            await session.flush()
            session.add(tenant(name))

    async def outer(session: AsyncSession) -> None:
        session.add(tenant("outer"))
        await session.flush()
        errors = await asyncio.gather(one("a"), one("b"), return_exceptions=True)
        raise ExceptionGroup("together", [error for error in errors if isinstance(error, Exception)])

    group = await failure(ExceptionGroup, manager.get_session(), outer)
    assert [type(error) for error in group.exceptions] == [AlreadyExistsError, AlreadyExistsError]
    assert await names(manager) == set()


# --- errors that a block swallows -------------------------------------------------------------------------------------


async def _swallow(session: AsyncSession) -> None:
    with pytest.raises(DBAPIError):
        await run(session, "SELECT 1/0")


async def test_a_swallowed_error_is_no_commit(make: Make) -> None:
    """PostgreSQL answers COMMIT with ROLLBACK then, and no error: silence here would be a lost write."""
    manager = make()

    async def work(session: AsyncSession) -> None:
        session.add(tenant())
        await session.flush()
        await _swallow(session)

    error = await failure(ControlPlaneError, manager.get_session(), work)
    assert error.details == {"sqlstate": "25P02"}
    assert error.message == (
        "an earlier statement of this transaction failed, and its error was swallowed; nothing was written"
    )
    assert "begin_nested" in error.hint
    assert error.__context__ is None
    assert await names(manager) == set()


async def test_after_a_swallowed_error_nothing_more_runs(make: Make) -> None:
    async def work(session: AsyncSession) -> None:
        await _swallow(session)
        await run(session, "SELECT 1")

    error = await failure(ControlPlaneError, make().get_session(), work)
    assert error.details == {"sqlstate": "25P02"}


async def test_a_swallowed_error_of_a_repository_is_no_commit(make: Make) -> None:
    manager = make(lock_timeout_seconds=0.1)
    async with manager.get_session() as session:
        session.add(row := tenant())

    async def work(session: AsyncSession) -> None:
        session.add(tenant("other"))
        await session.flush()
        with pytest.raises(ConflictError):
            await TenantRepository(session).activate(row.tenant_id)

    async with manager.get_session() as holder:
        await run(holder, "SELECT 1 FROM control_plane.tenants WHERE name = 'acme' FOR UPDATE")
        error = await failure(ControlPlaneError, manager.get_session(), work)
    assert error.details == {"sqlstate": "25P02"}
    assert await names(manager) == {"acme"}


async def test_a_direct_session_is_told_as_well(make: Make) -> None:
    manager = make()
    session = manager.get_session_direct()
    session.add(tenant())
    await session.flush()
    await _swallow(session)
    with pytest.raises(DBAPIError, match="rolled back"):
        await session.commit()
    await session.close()
    assert await names(manager) == set()


async def test_an_error_contained_in_a_savepoint_costs_only_what_is_in_it(make: Make) -> None:
    manager = make()
    async with manager.get_session() as session:

        async def inside(_: object) -> None:
            session.add(tenant("inside"))
            await session.flush()
            await run(session, "SELECT 1/0")

        session.add(tenant("before"))
        await session.flush()
        await failure(DBAPIError, session.begin_nested(), inside)
        session.add(tenant("after"))
    assert await names(manager) == {"before", "after"}


async def test_a_block_may_roll_back_and_begin_again(make: Make) -> None:
    manager = make()
    async with manager.get_session() as session:
        session.add(tenant("first"))
        await session.flush()
        await _swallow(session)
        await session.rollback()
        session.add(tenant("second"))
    assert await names(manager) == {"second"}


# --- read sessions ----------------------------------------------------------------------------------------------------


async def test_a_read_session_reads(make: Make) -> None:
    manager = make()
    counts = count(manager, "commit", "rollback")
    async with manager.get_read_session() as session:
        assert [row.name for row in await session.exec(select(Tenant))] == [SYSTEM_ADMIN_NAME]
        assert (await session.exec(select(Tenant.name, Tenant.status))).one() == (SYSTEM_ADMIN_NAME, "active")
        row = await session.get(Tenant, SYSTEM_ADMIN_ID)
        assert row is not None
        assert await session.scalar(select(func.count()).select_from(Tenant)) == 1
        assert (await TenantRepository(session).list()).items == (row,)
    assert row.name == SYSTEM_ADMIN_NAME
    assert counts == {"commit": 0, "rollback": 1}


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO control_plane.system_config (key, value) VALUES ('a', '1')",
        "UPDATE control_plane.tenants SET name = 'x'",
        "DELETE FROM control_plane.tenants",
        "CREATE TABLE control_plane.mine ()",
        "SELECT nextval('control_plane.version_seq')",
    ],
)
async def test_the_server_refuses_to_write_in_a_read_session(sql: str, make: Make) -> None:
    with pytest.raises(AccessDeniedError, match="only reads") as caught:
        async with make().get_read_session() as session:
            await (await session.connection()).exec_driver_sql(sql)
    assert caught.value.details == {"sqlstate": "25006"}


@pytest.mark.parametrize("end", ["rollback", "commit"])
async def test_every_transaction_of_a_read_session_is_read_only(end: str, make: Make) -> None:
    """A type checker hides `commit` and `rollback`; whoever calls them nevertheless has a second transaction."""

    async def work(session: AsyncSession) -> None:
        await run(session, "SELECT 1")
        await getattr(session, end)()
        await run(session, "DELETE FROM control_plane.system_config")

    error = await failure(AccessDeniedError, make().get_read_session(), work)
    assert error.details == {"sqlstate": "25006"}


@pytest.mark.parametrize("verb", ["add", "add_all", "delete", "delete_all", "merge", "merge_all"])
async def test_a_read_session_refuses_objects_at_once(verb: str, make: Make) -> None:
    manager = make()
    with pytest.raises(AccessDeniedError) as caught:
        async with manager.get_read_session() as session:
            getattr(session, verb)(tenant())
    assert str(caught.value) == "this session only reads. Write in get_session()."
    assert manager.pool_status().opened == 0


async def test_a_repository_refuses_to_write_in_a_read_session_before_it_asks(make: Make) -> None:
    manager = make()
    writes: dict[str, Callable[[Any], Any]] = {
        "create": lambda session: TenantRepository(session).create(
            TenantCreate(name="a", environment=TenantEnvironment.STAGING)
        ),
        "create_many": lambda session: TenantRepository(session).create_many([{"name": "a", "environment": "staging"}]),
        "rename": lambda session: TenantRepository(session).rename(uuid.uuid4(), "b"),
        "delete": lambda session: TenantRepository(session).delete(uuid.uuid4()),
        "set": lambda session: SystemConfigRepository(session).set("a", 1),
        "fetch": lambda session: SessionExecutor(session).fetch("SELECT 1", writes=Tenant),
    }
    for name, write in writes.items():
        with pytest.raises(AccessDeniedError) as caught:
            async with manager.get_read_session() as session:
                await write(session)
        assert str(caught.value) == "this session only reads; nothing was written. Write in get_session().", name
    assert manager.pool_status().opened == 0


async def test_after_a_read_session_the_connection_writes_again(make: Make) -> None:
    manager = make(pool_size=1, max_overflow=0)
    async with manager.get_read_session() as reading:
        pid = await reading.scalar(select(func.pg_backend_pid()))
        assert await reading.scalar(select(func.current_setting("transaction_read_only"))) == "on"
    async with manager.get_session() as session:
        assert await session.scalar(select(func.pg_backend_pid())) == pid
        assert await session.scalar(select(func.current_setting("transaction_read_only"))) == "off"
        session.add(tenant())
    assert await names(manager) == {"acme"}


async def test_after_a_read_session_that_failed_the_connection_writes_again(make: Make) -> None:
    manager = make(pool_size=1, max_overflow=0)
    with pytest.raises(ControlPlaneError):
        async with manager.get_read_session() as session:
            await (await session.connection()).exec_driver_sql("DELETE FROM control_plane.tenants")
    async with manager.get_session() as writing:
        writing.add(tenant())
    assert await names(manager) == {"acme"}


SNIPPET = """
from typing import assert_type

from sqlmodel import select
from sqlmodel.ext.asyncio.session import AsyncSession

from car_control_plane.connection import AsyncConnectionManager, AsyncReadSession
from car_control_plane.models import Tenant
from car_control_plane.repositories import TenantRepository


async def read(session: AsyncReadSession) -> None:
    assert_type((await session.exec(select(Tenant))).one(), Tenant)
    assert_type((await session.exec(select(Tenant.name, Tenant.version))).one(), tuple[str, int])
    assert_type(await session.get(Tenant, 1), Tenant | None)
    TenantRepository(session)


async def write(session: AsyncSession) -> None: ...


async def use(manager: AsyncConnectionManager, row: Tenant) -> None:
    async with manager.get_read_session() as reading:
        assert_type(reading, AsyncReadSession)
        await read(reading)
        reading.add(row)  # E: [attr-defined]
        reading.add_all([])  # E: [attr-defined]
        await reading.delete(row)  # E: [attr-defined]
        await reading.merge(row)  # E: [attr-defined]
        await reading.commit()  # E: [attr-defined]
        await reading.flush()  # E: [attr-defined]
        await write(reading)  # E: [arg-type]
    async with manager.get_session() as writing:
        assert_type(writing, AsyncSession)
        await read(writing)
        await write(writing)
    assert_type(manager.get_session_direct(), AsyncSession)
"""


@pytest.mark.slow
async def test_a_type_checker_tells_reading_from_writing(tmp_path: Path) -> None:
    (tmp_path / "snippet.py").write_text(SNIPPET, encoding="utf-8")
    arguments = ["--config-file", "pyproject.toml", "--no-error-summary", "--show-error-codes", tmp_path / "snippet.py"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "mypy", *map(str, arguments), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output = (await process.communicate())[0].decode()
    told = re.findall(r"snippet\.py:(\d+): error: .* (\[[a-z-]+\])$", output, re.MULTILINE)
    wanted = [
        (str(number), line.partition("# E: ")[2])
        for number, line in enumerate(SNIPPET.splitlines(), 1)
        if "# E: " in line
    ]
    assert told == wanted, output


# --- direct sessions --------------------------------------------------------------------------------------------------


async def test_a_direct_session_is_the_callers_to_commit_and_to_close(make: Make) -> None:
    manager = make()
    session = manager.get_session_direct()
    try:
        session.add(kept := tenant("kept"))
        await session.commit()
        session.add(tenant("dropped"))
        await session.flush()
        assert manager.pool_status().in_use == 1
    finally:
        await session.close()
    assert manager.pool_status().in_use == 0
    assert kept.name == "kept"
    assert await names(manager) == {"kept"}


async def test_a_direct_session_is_a_context_as_well(make: Make) -> None:
    manager = make()
    async with manager.get_session_direct() as session:
        session.add(tenant())
        await session.flush()
    assert await names(manager) == set()


async def test_a_forgotten_direct_session_is_told(make: Make) -> None:
    manager = make()

    async def forget() -> None:
        session = manager.get_session_direct()
        assert await run(session, "SELECT 1") == 1

    gc.collect()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        await forget()
        gc.collect()
        said = [str(warning.message) for warning in told if warning.category is ResourceWarning]
        told.clear()  # it holds the session, for tracemalloc to say where it was made
        gc.collect()
    assert said == [
        "a session of get_session_direct() was never closed: its connection stayed out of the pool until now"
    ]
    assert {warning.category for warning in told} <= {ResourceWarning, SAWarning}
    assert manager.pool_status().in_use == 0


async def test_a_direct_session_that_was_closed_or_never_used_is_not_told(make: Make) -> None:
    manager = make()

    async def behave() -> None:
        manager.get_session_direct()
        session = manager.get_session_direct()
        await run(session, "SELECT 1")
        await session.close()

    gc.collect()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        await behave()
        gc.collect()
    assert [str(warning.message) for warning in told] == []


# --- time limits ------------------------------------------------------------------------------------------------------


async def test_a_statement_that_takes_too_long_keeps_the_connection(make: Make) -> None:
    manager = make(pool_size=1, max_overflow=0, statement_timeout_seconds=0.5)
    pid = await value(manager, "SELECT pg_backend_pid()")
    with pytest.raises(StatementTimeoutError) as caught:
        await value(manager, "SELECT pg_sleep(30)")
    assert caught.value.details == {"sqlstate": "57014"}
    assert isinstance(caught.value, TimeoutError)
    assert await value(manager, "SELECT pg_backend_pid()") == pid


async def test_a_lock_that_takes_too_long_may_be_tried_again(make: Make) -> None:
    manager = make(lock_timeout_seconds=0.1)
    lock = "SELECT 1 FROM control_plane.tenants FOR UPDATE"
    async with manager.get_session() as holder:
        await run(holder, lock)
        with pytest.raises(ConflictError) as caught:
            await value(manager, lock)
    assert type(caught.value) is ConflictError
    assert caught.value.retryable
    assert caught.value.details == {"sqlstate": "55P03"}
    assert await value(manager, lock) == 1


async def test_a_transaction_left_open_is_ended_by_the_server(make: Make) -> None:
    manager = make(idle_in_transaction_timeout_seconds=0.5)

    async def work(session: AsyncSession) -> None:
        session.add(tenant())
        await session.flush()
        await _gone(manager, await run(session, "SELECT pg_backend_pid()"))
        await run(session, "SELECT 1")

    error = await failure(ConnectionUnavailableError, manager.get_session(), work)
    assert error.retryable
    assert await names(manager) == set()


async def _gone(manager: AsyncConnectionManager, pid: int) -> None:
    """Wait until the server has no such backend any more."""
    await until_none(manager, f"SELECT count(*) FROM pg_stat_activity WHERE pid = {pid}")


async def test_a_client_does_not_wait_for_ever(make: Make) -> None:
    """It is told as a lost connection, in a repository and in SQL of one's own."""
    manager = make(command_timeout_seconds=0.5, statement_timeout_seconds=0)
    with pytest.raises(ConnectionUnavailableError) as caught:
        await value(manager, "SELECT pg_sleep(30)")
    assert caught.value.__cause__ is caught.value.__context__ is None
    assert await value(manager, "SELECT 1") == 1
    async with make().get_session() as holder:
        await run(holder, "SELECT 1 FROM control_plane.tenants FOR UPDATE")
        impatient = make(command_timeout_seconds=0.5, lock_timeout_seconds=0)
        with pytest.raises(ConnectionUnavailableError):
            async with impatient.get_session() as session:
                await TenantRepository(session).update(SYSTEM_ADMIN_ID, {"labels": {"a": "b"}})  # type: ignore[arg-type]  # a mapping is taken
    assert await names(impatient) == set()


async def test_a_commit_is_not_waited_for_for_ever(own_database: str) -> None:
    async with AsyncConnectionManager(own_database) as patient, patient.get_session() as session:
        await run(session, "CREATE TABLE public.slow (i int)")
        await run(
            session,
            "CREATE FUNCTION public.sleep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(30); RETURN NULL; END'",
        )
        await run(
            session,
            "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON public.slow DEFERRABLE INITIALLY DEFERRED "
            "FOR EACH ROW EXECUTE FUNCTION public.sleep()",
        )
    settings = {"command_timeout_seconds": 0.5, "statement_timeout_seconds": 0}
    async with AsyncConnectionManager(own_database, **settings) as manager:
        with pytest.raises(OutcomeUnknownError) as caught:
            async with manager.get_session() as session:
                await run(session, "INSERT INTO public.slow VALUES (1)")
        assert caught.value.__cause__ is caught.value.__context__ is None
        assert await value(manager, "SELECT count(*) FROM public.slow") == 0
        assert manager.pool_status().in_use == 0


# --- the pool ---------------------------------------------------------------------------------------------------------


async def test_a_pool_that_is_empty_says_how_large_it_is_and_how_long_one_waited(make: Make) -> None:
    manager = make(pool_size=1, max_overflow=1, pool_timeout_seconds=0.1)
    async with manager.get_session() as one, manager.get_session() as two:
        await run(one, "SELECT 1")
        await run(two, "SELECT 1")
        assert manager.pool_status() == PoolStatus(limit=2, opened=2, in_use=2)
        with pytest.raises(PoolTimeoutError) as in_session:
            await value(manager, "SELECT 1")
        with pytest.raises(PoolTimeoutError) as in_read_session:
            async with manager.get_read_session() as reading:
                await reading.connection()
        with pytest.raises(PoolTimeoutError) as in_repository:
            async with manager.get_session() as session:
                await TenantRepository(session).count()
    for caught in (in_session, in_read_session, in_repository):
        assert caught.value.details == {"limit": 2, "waited_seconds": 0.1}
        assert isinstance(caught.value, TimeoutError)
        assert caught.value.retryable
    assert manager.pool_status() == PoolStatus(limit=2, opened=1, in_use=0)


async def test_a_pool_of_another_manager_is_not_taken_for_ones_own(make: Make) -> None:
    small = make(pool_size=1, max_overflow=0, pool_timeout_seconds=0.1)

    async def work(session: AsyncSession) -> None:
        await run(session, "SELECT 1")
        await value(small, "SELECT 1")

    async with small.get_session() as holder:
        await run(holder, "SELECT 1")
        error = await failure(PoolTimeoutError, make().get_session(), work)
    assert error.details == {"limit": 1, "waited_seconds": 0.1}


async def test_a_hundred_tasks_share_five_connections(make: Make) -> None:
    manager = make(pool_size=3, max_overflow=2, pool_timeout_seconds=60)
    most = 0

    async def register(number: int) -> None:
        nonlocal most
        async with manager.get_session() as session:
            session.add(tenant(f"tenant {number}"))
            await session.flush()
            most = max(most, manager.pool_status().in_use)
            if number % 10 == 0:
                raise RuntimeError

    results = await asyncio.gather(*(register(number) for number in range(100)), return_exceptions=True)
    assert sum(isinstance(result, RuntimeError) for result in results) == 10
    assert sum(result is None for result in results) == 90
    assert most == 5
    assert await names(manager) == {f"tenant {number}" for number in range(100) if number % 10}
    assert manager.pool_status() == PoolStatus(limit=5, opened=3, in_use=0)


# --- connections that break -------------------------------------------------------------------------------------------


async def _kill(manager: AsyncConnectionManager, pid: int) -> None:
    assert await value(manager, f"SELECT pg_terminate_backend({pid})")
    await _gone(manager, pid)


@pytest.mark.parametrize("at_commit", [False, True])
async def test_a_connection_that_breaks_costs_one_block(at_commit: bool, make: Make) -> None:
    manager, other = make(), make()

    async def work(session: AsyncSession) -> None:
        session.add(tenant())
        await session.flush()
        await _kill(other, await run(session, "SELECT pg_backend_pid()"))
        if not at_commit:
            await run(session, "SELECT 1")

    error = await failure(ConnectionUnavailableError, manager.get_session(), work)
    assert error.retryable
    assert error.__context__ is None
    assert await names(manager) == set()


async def test_connections_that_broke_in_the_pool_cost_nobody_anything(make: Make) -> None:
    manager, other = make(), make()
    async with manager.get_session() as one, manager.get_session() as two:
        pids = [await run(session, "SELECT pg_backend_pid()") for session in (one, two)]
    drivers = idle_drivers(manager)
    assert {driver.get_server_pid() for driver in drivers} == set(pids)
    for pid in pids:
        await _kill(other, pid)
    await heard_of_their_end(drivers)
    assert await names(manager) == set()
    async with manager.get_session() as one, manager.get_session() as two:
        assert {await run(session, "SELECT pg_backend_pid()") for session in (one, two)}.isdisjoint(pids)


async def test_a_connection_that_breaks_in_a_savepoint(make: Make) -> None:
    manager, other = make(), make()

    async def work(session: AsyncSession) -> None:
        async with SessionExecutor(session).atomic():
            session.add(tenant())
            await session.flush()
            await _kill(other, await run(session, "SELECT pg_backend_pid()"))
            await run(session, "SELECT 1")

    await failure(ConnectionUnavailableError, manager.get_session(), work)
    assert await names(manager) == set()


# --- the end of a manager ---------------------------------------------------------------------------------------------


async def test_open_and_close_may_be_called_twice(make: Make) -> None:
    manager = make()
    await manager.open()
    await manager.open()
    assert await names(manager) == set()
    await manager.close()
    await asyncio.gather(manager.close(), manager.close())
    assert repr(manager).endswith(" (closed)>")


async def test_a_closed_manager_says_so_from_every_entry(make: Make) -> None:
    manager = make()
    await names(manager)
    await manager.close()
    entries: dict[str, Callable[[], Any]] = {
        "open": manager.open,
        "connect": manager.connect,
        "health_check": manager.health_check,
        "require_schema": manager.require_schema,
        "get_session": manager.get_session().__aenter__,
        "get_read_session": manager.get_read_session().__aenter__,
        "async with": manager.__aenter__,
    }
    for name, entry in entries.items():
        with pytest.raises(ClosedError) as caught:
            await entry()
        assert str(caught.value) == (
            "The connection manager is closed. A closed manager is not reopened: make a new one."
        ), name
    for call in (manager.get_session_direct, manager.create_engine, lambda: manager.engine):
        with pytest.raises(ClosedError):
            call()
    assert manager.pool_status() == PoolStatus(limit=10, opened=0, in_use=0)


async def test_a_session_in_use_outlives_the_close_and_then_gives_its_connection_up(make: Make) -> None:
    manager = make(application_name="outlives")
    async with manager.get_session() as session:
        session.add(tenant())
        await session.flush()
        await manager.close()
    other = make()
    assert await names(other) == {"acme"}
    seen = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'outlives/%'"
    await until_none(other, seen)


async def test_a_cancelled_close_closes_every_connection(make: Make, shared_database: str) -> None:
    manager = AsyncConnectionManager(shared_database, application_name="cancelled close")
    async with manager.get_session() as one, manager.get_session() as two, manager.get_session() as three:
        for session in (one, two, three):
            await session.connection()
    assert manager.pool_status().opened == 3
    closing = asyncio.ensure_future(manager.close())
    for _ in range(3):
        await asyncio.sleep(0)
        closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    await until_none(make(), "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'cancelled close/%'")


# --- a server of one's own --------------------------------------------------------------------------------------------


@pytest.fixture
def data_directory() -> Iterator[Path]:
    # Not pytest's own directory: that is private, and as root the server runs as somebody else.
    with tempfile.TemporaryDirectory(prefix="car-cp-test-") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory, "kept data")


@pytest.mark.slow
async def test_an_embedded_server_starts_on_first_use_and_ends_with_its_manager() -> None:
    manager = AsyncConnectionManager("embedded:")
    assert repr(manager) == "<AsyncConnectionManager embedded:>"
    await asyncio.gather(manager.open(), manager.open(), value(manager, "SELECT 1"))
    assert await value(manager, "SELECT current_database()") == "control_plane"
    embedded: Any = manager._embedded
    home = embedded.data_dir
    assert home.exists()
    await asyncio.gather(manager.close(), manager.close())
    assert not home.exists()
    with pytest.raises(ClosedError):
        await manager.open()


@pytest.mark.slow
async def test_an_embedded_server_keeps_its_data_where_it_is_told_to(data_directory: Path) -> None:
    target = f"embedded:{data_directory}"
    await upgrade(target)
    async with AsyncConnectionManager(target) as manager, manager.get_session() as session:
        session.add(tenant("kept"))
    async with AsyncConnectionManager(target) as manager:
        assert await names(manager) == {"kept"}
        assert await manager.health_check()


@pytest.mark.slow
async def test_a_manager_that_is_closed_while_it_starts_leaves_no_server() -> None:
    manager = AsyncConnectionManager("embedded:")
    opening = asyncio.ensure_future(manager.open())
    waiting = asyncio.ensure_future(manager.open())
    checking = asyncio.ensure_future(manager.health_check())
    await asyncio.sleep(0.05)
    await manager.close()
    await opening
    with pytest.raises(ClosedError):
        await waiting
    assert isinstance((await checking).error, ClosedError)
    embedded: Any = manager._embedded
    with pytest.raises(ClosedError):
        embedded.dsn()


@pytest.mark.slow
async def test_a_cancelled_start_is_ended_by_close() -> None:
    manager = AsyncConnectionManager("embedded:")
    opening = asyncio.ensure_future(manager.open())
    await asyncio.sleep(0.05)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    embedded: Any = manager._embedded
    assert embedded.dsn()  # it was not cut off half-way
    await manager.close()
    with pytest.raises(ClosedError):
        embedded.dsn()


async def test_a_server_that_does_not_start_says_why(data_directory: Path) -> None:
    data_directory.mkdir()
    (data_directory / "something else").touch()
    async with AsyncConnectionManager("postgresql://h/d"):
        pass
    manager = AsyncConnectionManager(f"embedded:{data_directory}")
    with pytest.raises(ConfigurationError):
        await manager.open()
    health = await manager.health_check()
    assert isinstance(health.error, ConfigurationError)
    await manager.close()


# --- the default manager ----------------------------------------------------------------------------------------------


@pytest.fixture
async def no_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[None]:
    """A process in which nobody has called `init_db` yet."""
    monkeypatch.setattr(connections, "_default", None)
    for name in ("DATABASE_URL", "CAR_CONTROL_PLANE_DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    yield
    if connections._default is not None:
        await connections._default.close()


@pytest.mark.usefixtures("no_default")
async def test_the_default_manager_is_made_from_the_environment_once(
    shared_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", shared_database)
    manager = get_connection_manager()
    assert await names(manager) == set()
    monkeypatch.delenv("DATABASE_URL")
    assert get_connection_manager() is manager


@pytest.mark.usefixtures("no_default")
async def test_init_db_replaces_the_default_manager(shared_database: str, server_dsn: str) -> None:
    first = init_db(shared_database, pool_size=2)
    assert get_connection_manager() is first
    assert first.settings.pool_size == 2
    second = init_db(database_dsn(server_dsn, "other"))
    assert get_connection_manager() is second
    assert await names(first) == set()
    await first.close()


@pytest.mark.usefixtures("no_default")
async def test_a_closed_default_manager_stays_until_init_db(shared_database: str) -> None:
    manager = init_db(shared_database)
    await manager.close()
    assert get_connection_manager() is manager
    with pytest.raises(ClosedError):
        await get_connection_manager().health_check()
    assert await names(init_db(shared_database)) == set()


@pytest.mark.usefixtures("no_default")
async def test_what_init_db_refuses_leaves_the_default_manager(shared_database: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^DATABASE_URL environment variable is required"):
        get_connection_manager()
    with pytest.raises(ConfigurationError, match=r"^DATABASE_URL environment variable is required"):
        init_db()
    manager = init_db(shared_database)
    with pytest.raises(ConfigurationError):
        init_db("mysql://h/d")
    assert get_connection_manager() is manager


# --- the executor's own -----------------------------------------------------------------------------------------------


async def test_a_unit_is_all_or_nothing_and_leaves_the_session_usable(make: Make) -> None:
    manager = make()
    async with manager.get_session() as session:
        executor = SessionExecutor(session)
        async with executor.atomic():
            session.add(tenant("kept"))
        for error in (RuntimeError(), asyncio.CancelledError()):

            async def fail(_: object, error: BaseException = error) -> None:
                session.add(tenant("dropped"))
                await session.flush()
                raise error

            await failure(type(error), executor.atomic(), fail)
        with pytest.raises(AlreadyExistsError):
            async with executor.atomic():
                session.add(tenant("kept"))
    assert await names(manager) == {"kept"}


async def test_a_unit_whose_flush_failed_leaves_the_session_usable(make: Make) -> None:
    manager = make()
    async with manager.get_session() as session:
        session.add(tenant("kept"))
        await session.flush()
        for now in (True, False):

            async def fail(_: object, now: bool = now) -> None:
                session.add(tenant("kept"))
                if now:
                    await session.flush()

            await failure(Exception, SessionExecutor(session).atomic(), fail)
            assert await run(session, "SELECT 1") == 1
    assert await names(manager) == {"kept"}


async def test_a_unit_that_the_session_has_ended_already_is_not_rolled_back_twice(make: Make) -> None:
    async def work(session: AsyncSession) -> None:
        async with SessionExecutor(session).atomic():
            await session.rollback()
            raise RuntimeError

    await failure(RuntimeError, make().get_session(), work)


async def test_get_asks_again_for_a_row_that_has_expired(make: Make) -> None:
    async with make().get_session() as session:
        executor = SessionExecutor(session)
        row = await executor.get(Tenant, col(Tenant.tenant_id), SYSTEM_ADMIN_ID)
        assert row is not None
        assert await executor.get(Tenant, col(Tenant.tenant_id), SYSTEM_ADMIN_ID) is row
        session.expire(row)
        assert await executor.get(Tenant, col(Tenant.tenant_id), SYSTEM_ADMIN_ID) is row
        assert row.name == SYSTEM_ADMIN_NAME


async def test_an_error_that_is_not_the_databases_leaves_the_executor_as_it_is(make: Make) -> None:
    async with make().get_session() as session:
        with pytest.raises(ArgumentError):
            await SessionExecutor(session).all("no statement")  # type: ignore[arg-type]  # on purpose


async def test_a_deleted_row_is_forgotten_by_the_session(make: Make) -> None:
    async with make().get_session() as session:
        session.add(row := tenant())
        await session.flush()
        await TenantRepository(session).delete(row.tenant_id)
        assert await TenantRepository(session).get_or_none(row.tenant_id) is None
        assert row not in session


# --- what a role may do -----------------------------------------------------------------------------------------------

NEW = TenantCreate(name="new", environment=TenantEnvironment.STAGING)
KEPT = uuid.UUID("00000000-0000-7000-8000-0000000000aa")
GONE = uuid.UUID("00000000-0000-7000-8000-0000000000bb")


async def _consume(session: Any) -> None:
    async for _ in TenantRepository(session).stream():
        pass


VERBS: dict[str, Callable[[Any], Any]] = {
    "get": lambda s: TenantRepository(s).get(KEPT),
    "get_or_none": lambda s: TenantRepository(s).get_or_none(KEPT),
    "get_many": lambda s: TenantRepository(s).get_many([KEPT]),
    "get_by_name": lambda s: TenantRepository(s).get_by_name("kept"),
    "exists": lambda s: TenantRepository(s).exists(KEPT),
    "count": lambda s: TenantRepository(s).count(status=TenantStatus.PENDING),
    "list": lambda s: TenantRepository(s).list(name_prefix="k"),
    "stream": _consume,
    "create": lambda s: TenantRepository(s).create(NEW),
    "create_many": lambda s: TenantRepository(s).create_many([NEW]),
    "update": lambda s: TenantRepository(s).update(KEPT, {"labels": {"a": "b"}}),  # type: ignore[arg-type]  # a mapping is taken
    "rename": lambda s: TenantRepository(s).rename(KEPT, "kept 2"),
    "activate": lambda s: TenantRepository(s).activate(KEPT),
    "suspend": lambda s: TenantRepository(s).suspend(KEPT),
    "deactivate": lambda s: TenantRepository(s).deactivate(KEPT),
    "delete": lambda s: TenantRepository(s).delete(GONE),
    "config get": lambda s: SystemConfigRepository(s).get("kept"),
    "config get_many": lambda s: SystemConfigRepository(s).get_many(["kept", "gone"]),
    "config get_or_default": lambda s: SystemConfigRepository(s).get_or_default("kept"),
    "config list": lambda s: SystemConfigRepository(s).list(prefix="k"),
    "config set": lambda s: SystemConfigRepository(s).set("kept", 2),
    "config set new": lambda s: SystemConfigRepository(s).set("new", 2, expected_version=0),
    "config set at": lambda s: SystemConfigRepository(s).set("kept", 3, expected_version=10**9),
    "config delete": lambda s: SystemConfigRepository(s).delete("kept"),
}


def test_every_verb_is_among_them() -> None:
    public = {
        *(name for name in vars(TenantRepository) if not name.startswith("_")),
        *(f"config {name}" for name in vars(SystemConfigRepository) if not name.startswith("_")),
    }
    assert public - {"config get_entry"} <= VERBS.keys()


@pytest.fixture
async def stranger(own_database: str) -> AsyncIterator[tuple[AsyncConnectionManager, AsyncConnectionManager]]:
    """The owner's manager, and one of a role that may do nothing, under a name that has to be quoted."""
    role = f'car cp "stranger" {os.getpid()}'
    quoted = '"' + role.replace('"', '""') + '"'
    async with AsyncConnectionManager(own_database) as owner:
        async with owner.get_session() as session:
            await run(session, f"CREATE ROLE {quoted} LOGIN PASSWORD 'x'")
            session.add(tenant("kept", tenant_id=KEPT, status=TenantStatus.SUSPENDED))
            session.add(tenant("gone", tenant_id=GONE))
            session.add(SystemConfig(key="kept", value=1))
        try:
            parsed = dsns.parse(own_database)
            host = parsed.hosts[0]
            text = f"host='{host.name}' port={host.port} dbname='{parsed.database}' user='{role}' password=x"
            async with AsyncConnectionManager(text) as manager:
                yield owner, manager
        finally:
            async with owner.get_session() as session:
                await run(session, f"DROP OWNED BY {quoted}")
                await run(session, f"DROP ROLE {quoted}")


@pytest.mark.parametrize("verb", VERBS)
async def test_the_hint_is_exactly_the_grants_a_verb_needs(
    verb: str, stranger: tuple[AsyncConnectionManager, AsyncConnectionManager]
) -> None:
    """Each GRANT of it is needed: without the last one it is still refused; with all of them it works, and nothing else is allowed."""
    owner, manager = stranger
    hint = await _denied(manager, verb)
    start, *grants = re.split(r"(?=GRANT )", hint)
    assert start == "As the owner of the schema run: "
    for grant in grants:
        assert await _denied(manager, verb) == hint
        async with owner.get_session() as session:
            await run(session, grant)
    await _works(manager, verb)


async def test_the_hint_names_the_role_that_was_taken_on(
    stranger: tuple[AsyncConnectionManager, AsyncConnectionManager],
) -> None:
    owner, manager = stranger
    role = dsns.parse(manager.settings.require_database_url()).user
    assert role is not None
    url = owner.settings.require_database_url()
    taken_on = f"{url}{'&' if '?' in url else '?'}role={quote(role)}"
    async with AsyncConnectionManager(taken_on) as other:
        assert await _denied(other, "get") == await _denied(manager, "get")


async def _denied(manager: AsyncConnectionManager, verb: str) -> str:
    error = await failure(PermissionDeniedError, manager.get_session(), VERBS[verb])
    assert error.message == "permission denied"
    assert error.details == {"sqlstate": "42501"}
    return str(error.hint)


async def _works(manager: AsyncConnectionManager, verb: str) -> None:
    """Works, or is refused for a reason of its own, which takes the same rights to find out."""
    refused = {"suspend": InvalidTransitionError, "config set at": StaleWriteError}.get(verb)
    if refused is None:
        await block(manager.get_session(), VERBS[verb])
    else:
        await failure(refused, manager.get_session(), VERBS[verb])


def test_grants_are_no_more_than_needed() -> None:
    owned = select(TenantDatabase.id).where(col(TenantDatabase.tenant_id) == col(Tenant.tenant_id)).exists()
    assert grants_for(delete(Tenant).where(~owned), role='a"b') == (
        'As the owner of the schema run: GRANT USAGE ON SCHEMA control_plane TO "a""b"; '
        'GRANT SELECT, DELETE ON control_plane.tenants TO "a""b"; '
        'GRANT SELECT ON control_plane.tenant_databases TO "a""b";'
    )
    assert grants_for(update(Tenant)) == (
        "As the owner of the schema run: GRANT USAGE ON SCHEMA control_plane TO <your role>; "
        "GRANT SELECT, UPDATE ON control_plane.tenants TO <your role>;"
    )


async def test_health_says_which_grants_it_needs(
    stranger: tuple[AsyncConnectionManager, AsyncConnectionManager],
) -> None:
    owner, manager = stranger
    health = await manager.health_check()
    assert isinstance(health.error, PermissionDeniedError)
    start, *grants = re.split(r"(?=GRANT )", health.error.hint)
    assert start == "As the owner of the schema run: "
    assert [grant.split(" TO ")[0] for grant in grants] == [
        "GRANT USAGE ON SCHEMA control_plane",
        "GRANT SELECT ON control_plane.alembic_version",
    ]
    for grant in grants:
        assert not await manager.health_check()
        async with owner.get_session() as session:
            await run(session, grant)
    assert await manager.health_check()


def test_embedded_is_what_a_manager_runs() -> None:
    manager = AsyncConnectionManager("embedded:")
    assert isinstance(manager._embedded, EmbeddedPostgres)
