"""The pool with two doors: one limit, one queue, one set of rules; and nothing is lost, whoever is cancelled, killed, forked or silent."""

import asyncio
import inspect
import os
import random
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import asyncpg
import pytest
from sqlalchemy import event
from sqlalchemy.pool import Pool
from sqlalchemy.pool.base import _ConnectionRecord
from sqlmodel import select

from car_control_plane import pool as pools
from car_control_plane.connection import AsyncConnectionManager, PoolStatus
from car_control_plane.errors import (
    ClosedError,
    ConnectionUnavailableError,
    ControlPlaneError,
    InvalidDataError,
    OutcomeUnknownError,
    PoolTimeoutError,
    StatementTimeoutError,
    WrongEventLoopError,
)
from car_control_plane.models import SYSTEM_ADMIN_ID, SYSTEM_ADMIN_NAME, Tenant
from car_control_plane.pool import DirectPool
from tests.fixtures.pools import heard_of_their_end, idle_drivers

Make = Callable[..., AsyncConnectionManager]

NAME_OF = "SELECT name FROM control_plane.tenants WHERE tenant_id = $1"
PID = "SELECT pg_backend_pid()"


@pytest.fixture
async def make(shared_manager: AsyncConnectionManager, shared_database: str) -> AsyncIterator[Make]:
    """Make managers of the shared database, which are closed afterwards."""
    made: list[AsyncConnectionManager] = []

    def one(**settings: Any) -> AsyncConnectionManager:
        made.append(AsyncConnectionManager(shared_database, **settings))
        return made[-1]

    yield one
    for manager in made:
        await manager.close()


@pytest.fixture
async def killer(shared_manager: AsyncConnectionManager) -> AsyncIterator[asyncpg.Connection]:
    """A connection outside of every pool, to look and to kill with."""
    connection = await shared_manager.connect()
    yield connection
    await connection.close()


def pool_of(manager: AsyncConnectionManager) -> DirectPool:
    pool = manager.engine.pool
    assert isinstance(pool, DirectPool)
    return pool


async def one(manager: AsyncConnectionManager, sql: str, *arguments: Any, repeat: bool = False) -> Any:
    """Return the first column of the first row, by the direct door."""
    return (await manager.fetch(sql, arguments, repeat=repeat))[0][0]


async def by_session(manager: AsyncConnectionManager) -> str:
    async with manager.get_session() as session:
        return (await session.exec(select(Tenant.name).where(Tenant.tenant_id == SYSTEM_ADMIN_ID))).one()


async def kill(killer: asyncpg.Connection, manager: AsyncConnectionManager) -> None:
    """End the backends of all idle connections, and wait until the event loop has heard of it."""
    drivers = idle_drivers(manager)
    pids = [driver.get_server_pid() for driver in drivers]
    assert await killer.fetchval("SELECT bool_and(pg_terminate_backend(pid)) FROM unnest($1::int[]) pid", pids)
    await heard_of_their_end(drivers)


async def held_up(killer: asyncpg.Connection) -> int:
    """Wait until somebody waits for the lock that `killer` holds, and return its process."""
    sql = (
        "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    async with asyncio.timeout(60):
        while (pid := await killer.fetchval(sql)) is None:  # noqa: ASYNC110 -- the other side is a server
            await asyncio.sleep(0.001)
    return int(pid)


async def settled(manager: AsyncConnectionManager) -> PoolStatus:
    """Wait until everything is given back."""
    async with asyncio.timeout(60):
        while manager.pool_status().in_use:  # noqa: ASYNC110 -- some of it happens in the background
            await asyncio.sleep(0.001)
    return manager.pool_status()


# --- two doors, one pool ----------------------------------------------------------------------------------------------


async def test_both_doors_use_the_same_connections(make: Make) -> None:
    manager = make(pool_size=1, max_overflow=0)
    direct = await one(manager, PID)
    async with manager.get_session() as session:
        assert (await (await session.connection()).exec_driver_sql(PID)).scalar() == direct
    async with pool_of(manager).connection() as connection:
        assert await connection.fetchval(PID) == direct
    assert manager.pool_status() == PoolStatus(limit=1, opened=1, in_use=0)
    assert manager.pool_status().connects == 1


async def test_a_statement_of_the_direct_door_is_its_own_transaction(make: Make, killer: asyncpg.Connection) -> None:
    manager = make()
    sql = "INSERT INTO control_plane.system_config (key, value) VALUES ($1, $2) RETURNING key"
    key = uuid.uuid4().hex
    try:
        assert await one(manager, sql, key, "[1]") == key
        assert await killer.fetchval("SELECT true FROM control_plane.system_config WHERE key = $1", key)
    finally:
        await killer.execute("DELETE FROM control_plane.system_config WHERE key = $1", key)


async def test_first_come_first_served_at_both_doors(make: Make) -> None:
    manager = make(pool_size=1, max_overflow=0, pool_timeout_seconds=60)
    order: list[int] = []

    async def direct(number: int) -> None:
        async with pool_of(manager).connection():
            order.append(number)

    async def session(number: int) -> None:
        async with manager.get_session() as session:
            await session.connection()
            order.append(number)

    async with pool_of(manager).connection():
        tasks = []
        for number in range(10):
            tasks.append(asyncio.create_task((direct if number % 2 else session)(number)))
            while manager.pool_status().waiting <= number:  # noqa: ASYNC110 -- a session begins to wait in a task of its own
                await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    assert order == list(range(10))
    assert manager.pool_status().waited == 10


async def test_the_limit_holds_for_both_doors_together(make: Make, killer: asyncpg.Connection) -> None:
    name = f"limit-{uuid.uuid4().hex[:8]}"
    manager = make(pool_size=2, max_overflow=2, pool_timeout_seconds=60, application_name=name)
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE $1 || '%'"
            most = max(most, await killer.fetchval(sql, name))

    watcher = asyncio.create_task(watch())
    await asyncio.gather(*(one(manager, PID) if n % 2 else by_session(manager) for n in range(200)))
    watcher.cancel()
    await asyncio.wait({watcher})
    assert 1 <= most <= 4
    assert (await settled(manager)).opened <= 2


async def test_who_waits_too_long_is_told_how_long_and_for_how_many(make: Make) -> None:
    manager = make(pool_size=1, max_overflow=0, pool_timeout_seconds=0.05)
    async with pool_of(manager).connection():
        results = await asyncio.gather(
            *(one(manager, PID, repeat=True) for _ in range(5)), by_session(manager), return_exceptions=True
        )
    for error in results:
        assert isinstance(error, PoolTimeoutError)
        assert error.details == {"limit": 1, "waited_seconds": 0.05}
    assert manager.pool_status() == PoolStatus(limit=1, opened=1, in_use=0)
    assert await one(manager, PID)


async def test_sqlalchemys_events_and_recycling_work_at_both_doors(make: Make) -> None:
    manager = make(pool_size=1, max_overflow=0, pool_recycle_seconds=0.05)
    connected: list[object] = []
    closed: list[object] = []
    event.listen(manager.engine.pool, "connect", lambda connection, _: connected.append(connection))
    event.listen(manager.engine.pool, "invalidate", lambda connection, *_: closed.append(connection))
    pids = set()
    for _ in range(2):
        pids.add(await one(manager, PID))
        await asyncio.sleep(0.06)
        await by_session(manager)
        await asyncio.sleep(0.06)
    assert len(pids) == 2
    assert len(connected) == manager.pool_status().connects == 4
    assert len(closed) == 3
    assert manager.pool_status().lost == 0, "old is not lost"


# --- errors -----------------------------------------------------------------------------------------------------------


async def test_after_an_error_of_the_server_or_of_an_argument_the_connection_is_kept(make: Make) -> None:
    manager = make(pool_size=1, max_overflow=0, statement_timeout_seconds=0.2)
    pid = await one(manager, PID)
    with pytest.raises(ControlPlaneError) as caught:
        await one(manager, "SELECT * FROM control_plane.nowhere")
    assert caught.value.code == "schema-missing"
    assert caught.value.__cause__ is caught.value.__context__ is None
    with pytest.raises(StatementTimeoutError):
        await one(manager, "SELECT pg_sleep(30)")
    with pytest.raises((InvalidDataError, asyncpg.DataError)):
        await one(manager, NAME_OF, "no uuid")
    assert await one(manager, PID) == pid
    assert manager.pool_status().lost == 0


async def test_a_statement_nobody_answers_in_time_condemns_the_connections_of_its_age(
    make: Make, killer: asyncpg.Connection
) -> None:
    manager = make(pool_size=3, max_overflow=0, command_timeout_seconds=0.2, statement_timeout_seconds=0)
    async with pool_of(manager).connection() as first, pool_of(manager).connection() as second:
        pids = [await connection.fetchval(PID) for connection in (first, second)]
        with pytest.raises(ConnectionUnavailableError):
            await one(manager, "SELECT pg_sleep(30)", repeat=True)
    assert manager.pool_status() == PoolStatus(limit=3, opened=0, in_use=0)
    assert await one(manager, PID) not in pids


# --- connections that die ---------------------------------------------------------------------------------------------


async def test_all_connections_killed_while_idle_cost_no_reader_anything(
    make: Make, killer: asyncpg.Connection
) -> None:
    manager = make(pool_size=10, max_overflow=0, pool_timeout_seconds=60)
    pids = set(await asyncio.gather(*(one(manager, f"{PID}, pg_sleep(0.05)") for _ in range(10))))
    await kill(killer, manager)
    names = await asyncio.gather(*(one(manager, NAME_OF, SYSTEM_ADMIN_ID, repeat=True) for _ in range(40)))
    assert names == [SYSTEM_ADMIN_NAME] * 40
    assert manager.pool_status().lost == len(pids)


async def test_sessions_after_a_massacre_fail_for_nobody(make: Make, killer: asyncpg.Connection) -> None:
    manager = make(pool_size=5, max_overflow=0, pool_timeout_seconds=60)
    await asyncio.gather(*(one(manager, f"{PID}, pg_sleep(0.05)") for _ in range(5)))
    await kill(killer, manager)
    assert await asyncio.gather(*(by_session(manager) for _ in range(20))) == [SYSTEM_ADMIN_NAME] * 20


async def test_a_connection_killed_under_a_statement_fails_a_write_once_and_no_read(
    make: Make, killer: asyncpg.Connection
) -> None:
    manager = make(pool_size=1, max_overflow=0, lock_timeout_seconds=0)

    async def killed(*, repeat: bool) -> Any:
        await killer.execute("SELECT pg_advisory_lock(1)")
        reading = asyncio.create_task(one(manager, f"{PID}, pg_advisory_xact_lock(1)", repeat=repeat))
        pid = await held_up(killer)
        await killer.execute("SELECT pg_terminate_backend($1), pg_advisory_unlock(1)", pid)
        return pid, await reading

    with pytest.raises(OutcomeUnknownError) as caught:
        await killed(repeat=False)
    assert caught.value.__context__ is None
    assert not caught.value.retryable
    first, second = await killed(repeat=True)
    assert first != second
    assert manager.pool_status() == PoolStatus(limit=1, opened=1, in_use=0)


async def test_an_idle_connection_is_asked_and_a_busy_one_is_not(make: Make) -> None:
    manager = make(pool_size=1, max_overflow=0, pool_ping_after_seconds=3600)
    for _ in range(3):
        await one(manager, PID)
    assert manager.pool_status().pings == 0
    always = make(pool_size=1, max_overflow=0, pool_ping_after_seconds=0)
    for _ in range(3):
        await one(always, PID)
        await by_session(always)
    assert always.pool_status().pings == 5
    assert always.pool_status().connects == 1


# --- cancellation -----------------------------------------------------------------------------------------------------


async def test_cancelled_at_any_moment_nothing_is_lost_and_no_answer_is_anothers(
    make: Make, killer: asyncpg.Connection
) -> None:
    manager = make(pool_size=3, max_overflow=1, pool_timeout_seconds=60)
    chance = random.Random(7)
    wrong: list[Any] = []
    done = 0

    async def ask(number: int) -> None:
        nonlocal done
        if number % 3 == 0:
            async with manager.get_session() as session:
                answer = (await (await session.connection()).exec_driver_sql(f"SELECT {number}")).scalar()
        else:
            answer = await one(manager, "SELECT $1::int", number, repeat=bool(number % 2))
        done += 1
        if answer != number:
            wrong.append((number, answer))

    async def killing() -> None:
        while True:
            await asyncio.sleep(0.05)
            sql = (
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid() AND query LIKE 'SELECT $1::int%' LIMIT 2"
            )
            await killer.execute(sql)

    murderer = asyncio.create_task(killing())
    for batch in range(20):
        tasks = [asyncio.create_task(ask(batch * 100 + number)) for number in range(100)]
        while pending := [task for task in tasks if not task.done()]:
            await asyncio.sleep(chance.uniform(0.0005, 0.01))
            for task in chance.sample(pending, min(len(pending), 5)):
                task.cancel()
        for task in tasks:
            if not task.cancelled() and (error := task.exception()) is not None:
                assert isinstance(error, ConnectionUnavailableError | OutcomeUnknownError), error
    murderer.cancel()
    await asyncio.wait({murderer})
    assert wrong == []
    assert done > 0
    status = await settled(manager)
    assert status.waiting == 0
    assert status.opened <= 3
    names = await asyncio.gather(*(one(manager, NAME_OF, SYSTEM_ADMIN_ID, repeat=True) for _ in range(20)))
    assert names == [SYSTEM_ADMIN_NAME] * 20


async def test_who_is_cancelled_while_being_handed_a_connection_hands_it_on(make: Make) -> None:
    manager = make(pool_size=1, max_overflow=0, pool_timeout_seconds=60)
    pool = pool_of(manager)
    for place in (False, True):  # handed a connection; handed the place of one that is gone
        entry = await pool.acquire()
        first, second = (asyncio.create_task(one(manager, PID)) for _ in range(2))
        while pool.figures().waiting < 2:  # noqa: ASYNC110 -- two tasks have to start
            await asyncio.sleep(0)
        if place:
            driver: Any = entry.driver_connection
            driver.terminate()
        pool.release(entry)
        first.cancel()
        assert await second
        await asyncio.wait({first})
        assert first.cancelled()
        assert manager.pool_status() == PoolStatus(limit=1, opened=1, in_use=0)


# --- the end ----------------------------------------------------------------------------------------------------------


async def test_closing_ends_the_waiting_and_leaves_those_at_work_to_finish(
    make: Make, killer: asyncpg.Connection
) -> None:
    name = f"closing-{uuid.uuid4().hex[:8]}"
    limits = {"pool_timeout_seconds": 60, "lock_timeout_seconds": 0}
    manager = make(pool_size=1, max_overflow=0, application_name=name, **limits)
    await killer.execute("SELECT pg_advisory_lock(1)")
    working = asyncio.create_task(one(manager, "SELECT 7, pg_advisory_xact_lock(1)"))
    await held_up(killer)
    waiting = asyncio.create_task(one(manager, PID))
    while not manager.pool_status().waiting:  # noqa: ASYNC110
        await asyncio.sleep(0)
    await manager.close()
    with pytest.raises(ClosedError):
        await waiting
    await killer.execute("SELECT pg_advisory_unlock(1)")
    assert await working == 7
    with pytest.raises(ClosedError):
        await one(manager, PID)
    async with asyncio.timeout(60):
        sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE $1 || '%'"
        while await killer.fetchval(sql, name):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_an_engine_disposed_of_has_a_new_pool_and_the_old_one_keeps_nothing(make: Make) -> None:
    manager = make()
    pid = await one(manager, PID)
    old = pool_of(manager)
    await manager.engine.dispose()
    assert old.figures() == PoolStatus(limit=10, opened=0, in_use=0)
    assert await one(manager, PID) != pid


# --- loops, threads, forks --------------------------------------------------------------------------------------------


async def test_another_loop_in_another_thread_is_refused_and_harms_nothing(make: Make) -> None:
    manager = make()
    await one(manager, PID)
    errors: list[BaseException] = []

    def elsewhere() -> None:
        for call in (lambda: one(manager, PID, repeat=True), lambda: by_session(manager), manager.close):
            try:
                asyncio.run(call())
            except BaseException as error:
                errors.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    await asyncio.to_thread(thread.join)
    assert [type(error) for error in errors] == [WrongEventLoopError] * 3
    assert "one manager for each event loop" in str(errors[0])


def test_a_loop_that_is_over_is_told_like_any_other(shared_database: str) -> None:
    manager = AsyncConnectionManager(shared_database)
    assert asyncio.run(_ask_and_leave(manager)) == SYSTEM_ADMIN_NAME
    with pytest.raises(WrongEventLoopError):
        asyncio.run(by_session(manager))
    asyncio.run(manager.close())


async def _ask_and_leave(manager: AsyncConnectionManager) -> str:
    name = await by_session(manager)
    pool_of(manager).condemn("the loop is about to end")
    return name


FORKS = """
import asyncio, os, sys
from car_control_plane.connection import AsyncConnectionManager

manager = AsyncConnectionManager(os.environ["DATABASE_URL"], pool_size=3)

async def pids():
    rows = await asyncio.gather(*(manager.fetch("SELECT pg_backend_pid(), pg_sleep(0.01)", (), repeat=False) for _ in range(3)))
    return {row[0][0] for row in rows}

async def session():
    async with manager.get_session() as session:
        await (await session.connection()).exec_driver_sql("SELECT 1")

async def child(parents):
    assert manager.pool_status().opened == 0, manager.pool_status()
    assert not (await pids() & parents), "a connection of the parent's was used"
    await session()
    await manager.close()

async def main():
    mine = await pids()
    for _ in range(10):
        pid = os.fork()
        if pid == 0:
            try:
                asyncio.run(child(mine))
            except BaseException as problem:
                print("child:", type(problem).__name__, problem, file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        await session()
        assert await pids() == mine, "the parent lost a connection"
        _, status = await asyncio.to_thread(os.waitpid, pid, 0)
        assert status == 0, status
        assert await pids() == mine, "the parent lost a connection"
    await manager.close()

asyncio.run(main())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
async def test_a_forked_child_starts_clean_and_harms_nothing_in_the_parent(shared_database: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKS),
        env={**os.environ, "DATABASE_URL": shared_database},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(240):
        said, _ = await process.communicate()
    assert (process.returncode, said.decode()) == (0, "")


# --- what of SQLAlchemy is private ------------------------------------------------------------------------------------


def test_the_private_names_of_sqlalchemy_are_there_and_mean_the_same() -> None:
    for name in ("_do_get", "_do_return_conn", "_invalidate", "_return_conn"):
        assert callable(getattr(Pool, name)), name
    assert list(inspect.signature(_ConnectionRecord).parameters) == ["pool", "connect"]
    assert hasattr(_ConnectionRecord, "_soft_invalidate_time")
    assert pools.CLOSE_SECONDS > 0
