"""Cancellation, at every point where a session waits: nothing half-written, no connection lost, and a commit that has begun ends."""

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.orm import Session
from sqlmodel import delete, select
from sqlmodel.ext.asyncio.session import AsyncSession

from car_control_plane.connection import AsyncConnectionManager, PoolStatus
from car_control_plane.errors import ControlPlaneError, PoolTimeoutError
from car_control_plane.models import SYSTEM_ADMIN_NAME, Tenant, TenantEnvironment
from car_control_plane.repositories import TenantRepository
from tests.fixtures.cancelling import Cancelled
from tests.fixtures.servers import black_hole

Make = Callable[..., AsyncConnectionManager]


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


def tenant(name: str) -> Tenant:
    return Tenant(name=name, environment=TenantEnvironment.STAGING)


async def settled(manager: AsyncConnectionManager, shared_manager: AsyncConnectionManager) -> None:
    """Wait until what a cancellation leaves to the background is done: every connection given back, no transaction open."""
    open_transactions = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in transaction%'"
    )
    async with asyncio.timeout(60):
        while manager.pool_status().in_use:  # noqa: ASYNC110 -- SQLAlchemy closes a session in a task of its own
            await asyncio.sleep(0.001)
        connection = await shared_manager.connect()
        while await connection.fetchval(open_transactions):  # noqa: ASYNC110 -- nor does the server tell when it sees a client hang up
            await asyncio.sleep(0.001)
        await connection.close()


async def names(manager: AsyncConnectionManager) -> set[str]:
    async with manager.get_session() as session:
        return set(await session.exec(select(Tenant.name).where(Tenant.name != SYSTEM_ADMIN_NAME)))


async def write_two(manager: AsyncConnectionManager) -> None:
    async with manager.get_session() as session:
        session.add(tenant("one"))
        await session.flush()
        session.add(tenant("two"))
        await session.flush()


async def register(manager: AsyncConnectionManager) -> None:
    async with manager.get_session() as session:
        await TenantRepository(session).create_many(
            [{"name": name, "environment": "staging"} for name in ("one", "two")]
        )


async def read(manager: AsyncConnectionManager) -> None:
    async with manager.get_read_session() as session:
        await session.exec(select(Tenant))


async def check(manager: AsyncConnectionManager) -> None:
    assert await manager.health_check()


@pytest.mark.parametrize("cold", [True, False], ids=["connecting", "connected"])
@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("work", [write_two, register, read, check])
async def test_wherever_a_block_is_cancelled_it_is_all_or_nothing(
    work: Callable[[AsyncConnectionManager], Coroutine[Any, Any, None]],
    twice: bool,
    cold: bool,
    make: Make,
    shared_manager: AsyncConnectionManager,
) -> None:
    manager = make(pool_size=1, max_overflow=1)
    writes = work in {write_two, register}
    cancelled = 0
    for at in itertools.count(1):
        if cold:
            await manager.close()
            manager = make(pool_size=1, max_overflow=1)
        else:
            await names(manager)
        committing = _note_commits(manager)
        attempt = Cancelled(work(manager), at, at + 1 if twice else 0)
        (outcome,) = await asyncio.gather(_run(attempt), return_exceptions=True)
        await settled(manager, shared_manager)
        if outcome is None:
            assert attempt.waits < at, "a cancellation was swallowed"
        else:
            assert type(outcome) is asyncio.CancelledError, outcome
            cancelled += 1
        assert await names(shared_manager) == ({"one", "two"} if writes and committing else set())
        if outcome is None or not writes:
            assert bool(committing) is writes
        async with shared_manager.get_session() as session:
            await session.exec(delete(Tenant).where(Tenant.name != SYSTEM_ADMIN_NAME))  # type: ignore[arg-type]  # SQLModel types it as bool
        if outcome is None:
            break
    assert cancelled >= 4
    assert manager.pool_status().opened <= 2


def _note_commits(manager: AsyncConnectionManager) -> list[object]:
    begun: list[object] = []
    event.listen(manager.engine.sync_engine, "commit", begun.append)
    return begun


async def _run(work: Awaitable[None]) -> None:
    await asyncio.ensure_future(_of(work))


async def _of(work: Awaitable[None]) -> None:
    await work


async def test_a_commit_that_has_begun_ends_before_the_cancellation_is_raised(own_database: str) -> None:
    """The commit takes its time: a deferred trigger waits in it for a lock."""
    async with (
        AsyncConnectionManager(own_database, lock_timeout_seconds=0, statement_timeout_seconds=0) as manager,
        AsyncConnectionManager(own_database) as other,
    ):
        watching = await other.connect()
        await watching.execute("""
            CREATE TABLE public.slow (i int);
            CREATE FUNCTION public.wait() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NULL; END';
            CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON public.slow DEFERRABLE INITIALLY DEFERRED
                FOR EACH ROW EXECUTE FUNCTION public.wait();
            SELECT pg_advisory_lock(1);
        """)
        task = asyncio.ensure_future(_insert_slowly(manager))
        async with asyncio.timeout(60):
            committing = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'COMMIT%' AND wait_event = 'advisory'"
            while not await watching.fetchval(committing):  # noqa: ASYNC110 -- the server has no event for it
                await asyncio.sleep(0.01)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0.01)
        assert not task.done()
        await watching.execute("SELECT pg_advisory_unlock(1)")
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await watching.fetchval("SELECT count(*) FROM public.slow") == 1
        assert manager.pool_status() == PoolStatus(limit=10, opened=1, in_use=0)
        await watching.close()


async def _insert_slowly(manager: AsyncConnectionManager) -> None:
    async with manager.get_session() as session:
        await (await session.connection()).exec_driver_sql("INSERT INTO public.slow VALUES (1)")


async def test_a_commit_that_fails_while_it_is_cancelled_is_a_cancellation(
    make: Make, shared_manager: AsyncConnectionManager, caplog: pytest.LogCaptureFixture
) -> None:
    """And nobody complains that its error was never looked at."""
    manager = make()
    flushing = asyncio.Event()

    async def write_twice() -> None:
        async with manager.get_session() as session:

            def write(committing: Session) -> None:
                flushing.set()
                committing.add_all([tenant("one"), tenant("one")])

            event.listen(session.sync_session, "before_commit", write)
            await session.connection()

    task = asyncio.ensure_future(write_twice())
    await flushing.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await settled(manager, shared_manager)
    assert await names(shared_manager) == set()
    assert "never retrieved" not in caplog.text


async def test_a_time_limit_around_a_block_is_a_plain_one(make: Make, shared_manager: AsyncConnectionManager) -> None:
    manager = make()

    async def slow() -> None:
        async with asyncio.timeout(0.1), manager.get_session() as session:
            session.add(tenant("one"))
            await session.flush()
            await (await session.connection()).exec_driver_sql("SELECT pg_sleep(30)")

    with pytest.raises(TimeoutError) as caught:
        await slow()
    assert not isinstance(caught.value, ControlPlaneError)
    await settled(manager, shared_manager)
    assert await names(shared_manager) == set()
    running = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'SELECT pg_sleep%'"
    )
    connection = await shared_manager.connect()
    while await connection.fetchval(running):  # noqa: ASYNC110 -- the server has no event for it
        await asyncio.sleep(0.02)
    await connection.close()


async def test_waiting_for_the_pool_can_be_cancelled(make: Make, shared_manager: AsyncConnectionManager) -> None:
    manager = make(pool_size=1, max_overflow=1, pool_timeout_seconds=60)
    async with manager.get_session() as one, manager.get_session() as two:
        await one.connection()
        await two.connection()
        waiting = [asyncio.ensure_future(names(manager)) for _ in range(5)]
        await asyncio.sleep(0.05)
        for task in waiting[:4]:
            task.cancel()
        results = await asyncio.gather(*waiting[:4], return_exceptions=True)
        assert {type(result) for result in results} == {asyncio.CancelledError}
        assert not waiting[4].done()
        assert manager.pool_status() == PoolStatus(limit=2, opened=2, in_use=2)
    assert await waiting[4] == set()
    await whole(manager)


async def whole(manager: AsyncConnectionManager) -> None:
    """The pool still holds as many connections as it may, and no more: none was lost on the way."""
    limit = manager.pool_status().limit
    sessions = [manager.get_session_direct() for _ in range(limit)]
    try:
        async with asyncio.timeout(60):
            for session in sessions:
                await session.connection()
        assert manager.pool_status() == PoolStatus(limit=limit, opened=limit, in_use=limit)
    finally:
        for session in sessions:
            await session.close()


async def test_a_pool_survives_a_storm(make: Make, shared_manager: AsyncConnectionManager) -> None:
    """Tasks are cancelled at random while they wait, connect, write and commit; nobody gets another's answer."""
    manager = make(pool_size=3, max_overflow=2, pool_timeout_seconds=60)
    chance = random.Random(20240229)
    wrong: list[object] = []

    async def one(number: int) -> None:
        async with manager.get_session() as session:
            answer = (await (await session.connection()).exec_driver_sql(f"SELECT {number}")).scalar()
            if answer != number:
                wrong.append((number, answer))
            session.add(tenant(f"tenant {number}"))
            await session.flush()

    tasks = [asyncio.ensure_future(one(number)) for number in range(200)]
    while not all(task.done() for task in tasks):
        await asyncio.sleep(chance.random() * 0.004)
        chance.choice(tasks).cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(result) for result in results} <= {asyncio.CancelledError, type(None)}
    await settled(manager, shared_manager)
    assert wrong == []
    told_done = {f"tenant {number}" for number, result in enumerate(results) if result is None}
    assert told_done
    assert len(told_done) < 200
    assert told_done <= await names(shared_manager)
    await whole(manager)


async def test_connecting_can_be_cancelled(make: Make) -> None:
    with black_hole() as port:
        async with AsyncConnectionManager(
            f"postgresql://u@127.0.0.1:{port}/d",
            connect_timeout_seconds=60,
            pool_size=1,
            max_overflow=0,
            pool_timeout_seconds=0.1,
        ) as manager:
            task = asyncio.ensure_future(names(manager))
            await asyncio.sleep(0.05)
            with pytest.raises(PoolTimeoutError):
                await names(manager)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert manager.pool_status() == PoolStatus(limit=1, opened=0, in_use=0)


async def test_a_unit_that_is_cancelled_leaves_the_session_usable(make: Make) -> None:
    """Inside a block that goes on: what the unit wrote is gone, what was written before is not."""
    manager = make()

    async def slow_batch() -> AsyncIterator[dict[str, str]]:
        for number in range(3):
            yield {"name": f"tenant {number}", "environment": "staging"}
        await asyncio.sleep(60)

    async with manager.get_session() as session:
        await _register_before(session)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(TenantRepository(session).create_many(slow_batch()), 0.1)
        assert await TenantRepository(session).count() == 2
    assert await names(manager) == {"before"}


async def _register_before(session: AsyncSession) -> None:
    session.add(tenant("before"))
    await session.flush()
