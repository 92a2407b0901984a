"""Networks that stall, halve and reset: every call ends within its bound, and whoever only reads notices nothing but a delay."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from sqlmodel import select

from car_control_plane.connection import AsyncConnectionManager, PoolStatus
from car_control_plane.errors import ConnectionUnavailableError, ControlPlaneError, OutcomeUnknownError
from car_control_plane.models import SYSTEM_ADMIN_ID, SYSTEM_ADMIN_NAME, Tenant, TenantEnvironment
from car_control_plane.repositories import SystemConfigRepository
from tests.fixtures.faults import FaultProxy, PrivateServer, backends, looking, terminate

LIMITS: dict[str, Any] = {
    "pool_size": 8,
    "max_overflow": 0,
    "pool_timeout_seconds": 20.0,
    "pool_ping_timeout_seconds": 1.0,
    "connect_timeout_seconds": 4.0,
    "command_timeout_seconds": 2.5,  # what a stalled network costs, and what a busy machine may take for a statement
    "statement_timeout_seconds": 2.0,
    "read_retry_seconds": 60.0,
}
PATIENCE = 120.0
"""Seconds after which a call counts as one that hangs: the sum of the limits, several times."""

NAME_OF = "SELECT name FROM control_plane.tenants WHERE tenant_id = $1"
SLEEP = "SELECT pg_sleep(0.05)"

Make = Callable[..., AsyncConnectionManager]


@pytest.fixture
async def proxy(own_database: str) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(own_database) as proxy:
        yield proxy


@pytest.fixture
async def make(proxy: FaultProxy) -> AsyncIterator[Make]:
    """Make managers behind the proxy, which are closed afterwards, when everything passes again."""
    async with contextlib.AsyncExitStack() as stack:

        def one(dsn: str | None = None, **settings: Any) -> AsyncConnectionManager:
            manager = AsyncConnectionManager(dsn or proxy.dsn, **{**LIMITS, **settings})
            stack.push_async_callback(manager.close)
            return manager

        yield one
        proxy.resume()


async def direct(manager: AsyncConnectionManager) -> str:
    rows = await manager.fetch(NAME_OF, (SYSTEM_ADMIN_ID,), repeat=True)
    return str(rows[0][0])


async def by_session(manager: AsyncConnectionManager) -> str:
    async with manager.get_read_session() as session:
        return (await session.exec(select(Tenant.name).where(Tenant.tenant_id == SYSTEM_ADMIN_ID))).one()


async def warm(manager: AsyncConnectionManager, number: int) -> None:
    """Open so many connections."""
    await asyncio.gather(*(manager.fetch(SLEEP, (), repeat=True) for _ in range(number)))
    assert manager.pool_status() == PoolStatus(limit=8, opened=number, in_use=0)


async def ends(work: Awaitable[Any]) -> Any:
    """Wait for a call that must end; its error is the result."""
    task = asyncio.ensure_future(work)
    done, _ = await asyncio.wait({task}, timeout=PATIENCE)
    if not done:
        task.cancel()
        pytest.fail("a call hangs")
    return task.exception() or task.result()


# --- connections that have died -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [direct, by_session])
async def test_connections_that_died_without_a_word_cost_readers_a_delay_and_nothing_else(
    read: Callable[[AsyncConnectionManager], Awaitable[str]], make: Make, proxy: FaultProxy
) -> None:
    manager = make(pool_ping_after_seconds=0.0)
    await warm(manager, 8)
    proxy.stall()
    names = await ends(asyncio.gather(*(read(manager) for _ in range(40))))
    assert names == [SYSTEM_ADMIN_NAME] * 40
    assert manager.pool_status().lost == 8


async def test_connections_trusted_without_a_ping_fail_one_caller_at_most(make: Make, proxy: FaultProxy) -> None:
    """One after the other: the first to find out condemns the others."""
    manager = make(pool_ping_after_seconds=3600.0)
    await warm(manager, 8)
    proxy.stall()
    results = [await ends(by_session(manager)) for _ in range(8)]
    assert isinstance(results[0], ConnectionUnavailableError)
    assert results[1:] == [SYSTEM_ADMIN_NAME] * 7


@pytest.mark.parametrize(
    ("read", "how"),
    [
        *((read, how) for read in (direct, by_session) for how in ("cut", "reset", "terminated")),
        (direct, "refused for a while"),  # a session is not repeated: it is its caller's code
    ],
)
async def test_all_idle_connections_ended_cost_forty_readers_nothing(
    read: Callable[[AsyncConnectionManager], Awaitable[str]], how: str, make: Make, proxy: FaultProxy, own_database: str
) -> None:
    manager = make()
    await warm(manager, 8)
    if how == "terminated":
        async with looking(own_database) as looker:
            await terminate(looker)
    else:
        if how == "refused for a while":
            proxy.refuse()
            asyncio.get_running_loop().call_later(0.3, proxy.accept)
        assert proxy.cut(reset=how == "reset") == 8
    await proxy.quiet()
    await asyncio.sleep(0.02)  # the event loop reads the end of file
    names = await ends(asyncio.gather(*(read(manager) for _ in range(40))))
    assert names == [SYSTEM_ADMIN_NAME] * 40


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
async def test_a_killed_backend_costs_forty_single_reads_nothing(
    private_server: PrivateServer, private_database: str
) -> None:
    """The server ends all sessions then, and refuses new ones until it has recovered."""
    async with AsyncConnectionManager(private_database, **LIMITS) as manager:
        await warm(manager, 8)
        reads = [asyncio.ensure_future(direct(manager)) for _ in range(20)]
        await asyncio.sleep(0)
        async with looking(private_database) as looker:
            private_server.signal(signal.SIGKILL, (await backends(looker))[0])
        reads += [asyncio.ensure_future(direct(manager)) for _ in range(20)]
        assert await ends(asyncio.gather(*reads)) == [SYSTEM_ADMIN_NAME] * 40


# --- everything stalls ----------------------------------------------------------------------------------------------------


async def _query(manager: AsyncConnectionManager, stall: Callable[[], None]) -> None:
    async with manager.get_session() as session:
        await (await session.connection()).exec_driver_sql("SELECT 1")
        stall()
        await (await session.connection()).exec_driver_sql("SELECT 1")


async def _exit(manager: AsyncConnectionManager, stall: Callable[[], None]) -> None:
    async with manager.get_session() as session:
        await (await session.connection()).exec_driver_sql("SELECT 1")
        stall()


async def _exit_by_error(manager: AsyncConnectionManager, stall: Callable[[], None]) -> None:
    async with manager.get_session() as session:
        await (await session.connection()).exec_driver_sql("SELECT 1")
        stall()
        raise LookupError("the caller's own")


async def _exit_of_reading(manager: AsyncConnectionManager, stall: Callable[[], None]) -> None:
    async with manager.get_read_session() as session:
        await (await session.connection()).exec_driver_sql("SELECT 1")
        stall()


async def _checkout(manager: AsyncConnectionManager, stall: Callable[[], None]) -> None:
    await warm(manager, 3)
    stall()
    await by_session(manager)


async def _direct(manager: AsyncConnectionManager, stall: Callable[[], None]) -> None:
    await warm(manager, 3)
    stall()
    await manager.fetch("SELECT 1", (), repeat=False)


async def _connect(manager: AsyncConnectionManager, stall: Callable[[], None]) -> None:
    stall()
    await by_session(manager)


async def _health(manager: AsyncConnectionManager, stall: Callable[[], None]) -> None:
    await warm(manager, 3)
    stall()
    health = await manager.health_check()
    if health.error is not None:
        raise health.error


async def _close(manager: AsyncConnectionManager, stall: Callable[[], None]) -> None:
    await warm(manager, 3)
    stall()
    await manager.close()


_Moment = Callable[[AsyncConnectionManager, Callable[[], None]], Awaitable[None]]
MOMENTS: dict[str, _Moment] = {
    "query": _query,
    "exit": _exit,
    "exit by an error": _exit_by_error,
    "exit of reading": _exit_of_reading,
    "checkout": _checkout,
    "direct": _direct,
    "connect": _connect,
    "health": _health,
    "close": _close,
}
EXPECTED: dict[_Moment, type[Exception] | None] = {_close: None, _exit_of_reading: None, _exit_by_error: LookupError}
"""How a call ends when it is not by an error of ours: what was lost is nothing that was asked for, or the caller has an error of his own."""


async def _stalled(moment: _Moment, database: str, *, cancelled: bool) -> list[str]:
    """Stall the network at a moment, for good; return what went wrong."""
    wrong: list[str] = []
    limits = {**LIMITS, "pool_ping_after_seconds": 0.0, "pool_timeout_seconds": 1.0}
    async with FaultProxy(database) as proxy, AsyncConnectionManager(proxy.dsn, **limits) as manager:
        stalled = asyncio.Event()

        def stall() -> None:
            proxy.stall(new=True)
            stalled.set()

        task = asyncio.ensure_future(moment(manager, stall))
        if cancelled:
            await stalled.wait()
            await asyncio.sleep(0.05)
            task.cancel()
        done, _ = await asyncio.wait({task}, timeout=PATIENCE)
        if not done:
            wrong.append("hangs")
        elif cancelled or task.cancelled():
            wrong += [] if cancelled and task.cancelled() else [f"its cancellation came out as {task!r}"]
        else:
            error, expected = task.exception(), EXPECTED.get(moment, ControlPlaneError)
            if error is not None if expected is None else not isinstance(error, expected):
                wrong.append(f"ends with {error!r}")
        proxy.resume()
        if moment is not _close:
            async with asyncio.timeout(PATIENCE):
                if await by_session(manager) != SYSTEM_ADMIN_NAME:
                    wrong.append("does not work again")
                while manager.pool_status().in_use:  # noqa: ASYNC110 -- SQLAlchemy closes a session in a task of its own
                    await asyncio.sleep(0.001)
    return wrong


@pytest.mark.parametrize("cancelled", [False, True], ids=["left alone", "cancelled"])
async def test_a_stalled_network_ends_every_call_in_time_and_works_again_when_it_does(
    cancelled: bool, own_database: str
) -> None:
    """A query, the end of a session in every way, checkout, a single statement, connecting, health, closing: all at once, each on a network of its own."""
    results = await asyncio.gather(
        *(_stalled(moment, own_database, cancelled=cancelled) for moment in MOMENTS.values()), return_exceptions=True
    )
    assert {name: wrong for name, wrong in zip(MOMENTS, results, strict=True) if wrong} == {}


@pytest.mark.parametrize("then", ["close", "reset", "stall"])
async def test_half_an_answer_is_no_answer(then: Any, make: Make, proxy: FaultProxy) -> None:
    manager = make(pool_ping_after_seconds=3600.0)
    await warm(manager, 1)
    strike = proxy.strike(1, direction="to_client", when="half", then=then, kind="D")
    result = await ends(by_session(manager))
    assert strike.struck is not None
    assert isinstance(result, ConnectionUnavailableError)
    assert await ends(by_session(manager)) == SYSTEM_ADMIN_NAME


async def test_a_slow_and_unsteady_network_only_delays(make: Make, proxy: FaultProxy) -> None:
    manager = make(command_timeout_seconds=60.0, connect_timeout_seconds=60.0, pool_ping_timeout_seconds=60.0)
    proxy.delay(0.005, jitter=0.01)
    names = await ends(asyncio.gather(*(read(manager) for _ in range(10) for read in (direct, by_session))))
    assert names == [SYSTEM_ADMIN_NAME] * 20


# --- hosts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["black hole", "refused", "cut when it speaks"])
async def test_a_dead_first_host_of_two_does_not_take_the_second_away(
    how: str, make: Make, proxy: FaultProxy, own_database: str
) -> None:
    """Under load: the connections there are die with the host, and readers notice a delay."""
    async with FaultProxy(own_database) as first:
        two = first.dsn.replace(f":{first.port}", f":{first.port},127.0.0.1:{proxy.port}")
        manager = make(two, pool_ping_after_seconds=0.0, connect_timeout_seconds=2.0)
        await warm(manager, 4)
        assert (len(first.links), len(proxy.links)) == (4, 0)
        first.stall()
        if how == "black hole":
            first.black_hole()
        elif how == "refused":
            first.refuse()
        else:
            for number in range(1, 101):
                first.strike(number, direction="to_client", kind="R")
        names = await ends(asyncio.gather(*(read(manager) for _ in range(10) for read in (direct, by_session))))
        assert names == [SYSTEM_ADMIN_NAME] * 20
        assert len(proxy.links) >= 1


# --- what is known of a write ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("then", ["close", "stall"])
async def test_a_lost_answer_to_a_commit_is_told_as_unknown_and_a_lost_statement_as_nothing_written(
    then: Any, make: Make, proxy: FaultProxy
) -> None:
    manager = make(pool_ping_after_seconds=3600.0)
    await warm(manager, 1)

    async def write(name: str) -> None:
        async with manager.get_session() as session:
            session.add(Tenant(name=name, environment=TenantEnvironment.STAGING))

    # BEGIN is completed, the INSERT, which is flushed by the end of the block, and COMMIT.
    for at, kind in ((2, ConnectionUnavailableError), (3, OutcomeUnknownError)):
        proxy.strike(at, direction="to_client", kind="C", then=then)
        error = await ends(write(f"tenant {at}"))
        assert type(error) is kind, at
        assert error.__cause__ is error.__context__ is None
        assert len(await names(manager)) == 1 + (kind is OutcomeUnknownError)


@pytest.mark.parametrize("then", ["close", "stall"])
async def test_a_single_write_is_unknown_once_it_was_sent(then: Any, make: Make, proxy: FaultProxy) -> None:
    manager = make(pool_ping_after_seconds=3600.0)
    repository = SystemConfigRepository(manager)
    proxy.refuse()
    assert type(await ends(repository.set("key", 1))) is ConnectionUnavailableError
    proxy.accept()
    await repository.set("key", 2)
    proxy.strike(1, direction="to_client", kind="C", then=then)
    error = await ends(repository.set("key", 3))
    assert type(error) is OutcomeUnknownError
    assert not error.retryable
    assert await repository.get("key") == 3
    strike = proxy.strike(1, direction="to_client", kind="C")
    assert await ends(repository.get("key")) == 3, "a read is repeated"
    assert strike.struck is not None


async def names(manager: AsyncConnectionManager) -> list[str]:
    async with manager.get_read_session() as session:
        return list(await session.exec(select(Tenant.name)))
