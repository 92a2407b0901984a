"""Gets that share a statement, when something goes wrong: the loop ends, another one asks, a process forks, the answer is an error."""

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from car_control_plane.connection import AsyncConnectionManager
from car_control_plane.errors import ConnectionUnavailableError, OutcomeUnknownError, WrongEventLoopError
from car_control_plane.execution import Coalescer
from car_control_plane.models import SYSTEM_ADMIN_ID, SYSTEM_ADMIN_NAME, Tenant, TenantCreate, TenantEnvironment, uuid7
from car_control_plane.repositories import TenantRepository
from tests.fixtures.faults import FaultProxy

KEYS = [uuid7() for _ in range(5)]


@pytest.fixture
async def tenants(own_database: str) -> AsyncIterator[TenantRepository]:
    async with AsyncConnectionManager(own_database, pool_size=4, max_overflow=0) as manager:
        yield TenantRepository(manager)


def coalescer_of(tenants: TenantRepository) -> Coalescer:
    executor: Any = tenants._executor
    found: Coalescer = executor._door.coalescers[Tenant, "tenant_id"]
    return found


async def nothing_is_left(tenants: TenantRepository) -> None:
    """A get goes alone again: nobody is thought to be under way."""
    assert (await tenants.get(SYSTEM_ADMIN_ID)).name == SYSTEM_ADMIN_NAME
    coalescer = coalescer_of(tenants)
    assert (coalescer._under_way, coalescer._waiting, coalescer._tasks) == (0, {}, set())


def at_the_batch(monkeypatch: pytest.MonkeyPatch, then: Callable[[Coalescer], object]) -> None:
    """Do something in the moment in which the task of a shared statement is made, and has not begun."""
    send = Coalescer._send

    def sent(self: Coalescer) -> None:
        send(self)
        then(self)

    monkeypatch.setattr(Coalescer, "_send", sent)


async def test_a_shared_statement_that_is_cancelled_before_it_begins_ends_those_who_wait(
    tenants: TenantRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        at_the_batch(patch, lambda coalescer: [task.cancel() for task in coalescer._tasks])
        outcomes = await asyncio.gather(*(tenants.get_or_none(key) for key in KEYS), return_exceptions=True)
    assert outcomes[0] is None
    assert [type(outcome) for outcome in outcomes[1:]] == [asyncio.CancelledError] * 4
    await nothing_is_left(tenants)


async def test_a_shared_statement_that_is_cancelled_under_way_ends_those_who_wait(
    tenants: TenantRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        soon: list[Any] = []
        at_the_batch(patch, lambda coalescer: soon.extend(coalescer._tasks))
        gets = [asyncio.ensure_future(tenants.get_or_none(key)) for key in KEYS]
        while not soon:  # noqa: ASYNC110 -- a matter of turns
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        soon[0].cancel()
        await asyncio.wait(gets)
    assert gets[0].result() is None
    assert all(get.cancelled() for get in gets[1:])
    await nothing_is_left(tenants)


async def test_those_who_wait_and_are_all_cancelled_cost_no_statement(
    tenants: TenantRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    at_the_batch(monkeypatch, lambda coalescer: batches.append(len(coalescer._tasks)))
    gets = [asyncio.ensure_future(tenants.get_or_none(key)) for key in KEYS]
    await asyncio.sleep(0)
    for get in gets[1:]:
        get.cancel()
    await asyncio.wait(gets)
    assert gets[0].result() is None
    assert batches == [0]
    await nothing_is_left(tenants)


def test_the_end_of_a_loop_ends_the_gets_in_it(shared_database: str) -> None:
    """`asyncio.run` cancels every task that is left, the one of a shared statement among them, begun or not."""

    async def leave(turns: int) -> None:
        async with AsyncConnectionManager(shared_database) as manager:
            tenants = TenantRepository(manager)
            await tenants.get_or_none(uuid7())
            gets = [asyncio.ensure_future(tenants.get_or_none(key)) for key in KEYS]
            for _ in range(turns):
                await asyncio.sleep(0)
            left = asyncio.all_tasks() - {asyncio.current_task()}
            for task in left:
                task.cancel()
            await asyncio.wait({*left, *gets})
            assert all(get.cancelled() or get.result() is None for get in gets)
            await nothing_is_left(tenants)

    for turns in range(8):
        asyncio.run(leave(turns))


async def test_another_loop_is_refused_while_gets_are_under_way(tenants: TenantRepository) -> None:
    gets = [asyncio.ensure_future(tenants.get_or_none(key)) for key in KEYS]
    await asyncio.sleep(0)
    errors: list[BaseException] = []

    def elsewhere() -> None:
        try:
            asyncio.run(asyncio.wait_for(tenants.get_or_none(KEYS[0]), 60))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert [type(error) for error in errors] == [WrongEventLoopError]
    assert await asyncio.gather(*gets) == [None] * 5
    await nothing_is_left(tenants)


FORKS = """
import asyncio, os, sys
from car_control_plane import AsyncConnectionManager, TenantRepository
from car_control_plane.models import uuid7

manager = AsyncConnectionManager(os.environ["DATABASE_URL"])
tenants = TenantRepository(manager)

async def gets():
    return await asyncio.wait_for(asyncio.gather(*(tenants.get_or_none(uuid7()) for _ in range(5))), 100)

async def child():
    assert await gets() == [None] * 5
    assert await gets() == [None] * 5
    await manager.close()

async def main():
    under_way = asyncio.ensure_future(gets())
    for _ in range(3):
        await asyncio.sleep(0)  # one is under way, and the others wait for it
    pid = os.fork()
    if pid == 0:
        try:
            asyncio.run(child())
        except BaseException as problem:
            print("child:", type(problem).__name__, problem, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    assert await under_way == [None] * 5
    _, status = await asyncio.to_thread(os.waitpid, pid, 0)
    assert status == 0, status
    await manager.close()

asyncio.run(main())
"""


async def finishes(script: str, dsn: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "ignore::DeprecationWarning", "-c", script),
        env={**os.environ, "DATABASE_URL": dsn},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(240):
        said, _ = await process.communicate()
    assert (process.returncode, said.decode()) == (0, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
async def test_a_forked_child_waits_for_nobody_of_its_parent(shared_database: str) -> None:
    await finishes(FORKS, shared_database)


UVLOOP = """
import asyncio, os
import uvloop
from car_control_plane import AsyncConnectionManager, TenantRepository
from car_control_plane.models import SYSTEM_ADMIN_ID, uuid7

async def main():
    assert type(asyncio.get_running_loop()).__module__ == "uvloop"
    async with AsyncConnectionManager(os.environ["DATABASE_URL"]) as manager:
        tenants = TenantRepository(manager)
        keys = [SYSTEM_ADMIN_ID, uuid7(), SYSTEM_ADMIN_ID, uuid7()]
        for _ in range(3):
            found = await asyncio.gather(*(tenants.get_or_none(key) for key in keys))
            assert [row and row.name for row in found] == ["system_admin", None] * 2
        assert [tenant.name async for tenant in tenants.stream()] == ["system_admin"]

uvloop.run(main())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no uvloop for Windows")
async def test_gets_run_on_uvloop(own_database: str) -> None:
    await finishes(UVLOOP, own_database)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="asyncio has eager tasks from Python 3.12 on")
def test_gets_run_in_eager_tasks(shared_database: str) -> None:
    async def main() -> list[Any]:
        loop = asyncio.get_running_loop()
        loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined,unused-ignore]
        async with AsyncConnectionManager(shared_database) as manager:
            tenants = TenantRepository(manager)
            return await asyncio.gather(*(tenants.get_or_none(key) for key in [*KEYS, SYSTEM_ADMIN_ID]))

    found = asyncio.run(main())
    assert found[:-1] == [None] * 5
    assert found[-1].name == SYSTEM_ADMIN_NAME


# --- errors -----------------------------------------------------------------------------------------------------------


async def test_a_mistake_meets_everybody_by_himself(tenants: TenantRepository, monkeypatch: pytest.MonkeyPatch) -> None:
    executor: Any = tenants._executor

    async def mistaken(_sql: str, _arguments: Any, *, repeat: bool) -> list[Any]:
        await asyncio.sleep(0)
        raise KeyError(repeat)

    with monkeypatch.context() as patch:
        patch.setattr(executor._door, "fetch", mistaken)
        outcomes = await asyncio.gather(*(tenants.get(key) for key in KEYS), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [KeyError] * 5
    assert len({id(outcome) for outcome in outcomes}) == 5
    await nothing_is_left(tenants)


async def test_gets_by_name_share_statements_too(tenants: TenantRepository) -> None:
    for number in range(8):
        await tenants.create(TenantCreate(name=f"t{number}", environment=TenantEnvironment.STAGING))
    names = [f"t{number}" for number in (0, 3, 3, 7, 0)]
    found = await asyncio.gather(*(tenants.get_by_name(name) for name in names))
    assert [tenant.name for tenant in found] == names
    assert len({id(tenant) for tenant in found}) == 5


# --- a connection that is lost under way ------------------------------------------------------------------------------


async def test_a_read_is_repeated_and_a_write_is_not(own_database: str) -> None:
    async with (
        FaultProxy(own_database) as proxy,
        AsyncConnectionManager(proxy.dsn, pool_size=2, max_overflow=0) as manager,
    ):
        tenants = TenantRepository(manager)
        made = [
            await tenants.create(TenantCreate(name=f"t{number}", environment=TenantEnvironment.STAGING))
            for number in range(5)
        ]
        keys = [tenant.tenant_id for tenant in made]
        assert await tenants.get(keys[0]) == made[0]
        for kind in ("B", "C"):  # before the server hears of it, and when it has answered
            strike = proxy.strike(1, kind=kind, direction="to_server" if kind == "B" else "to_client")
            assert await asyncio.gather(*(tenants.get(key) for key in keys)) == made
            assert strike.struck is not None
        for number, kind in enumerate(("B", "C")):
            strike = proxy.strike(1, kind=kind, direction="to_server" if kind == "B" else "to_client")
            with pytest.raises((ConnectionUnavailableError, OutcomeUnknownError)):
                await tenants.rename(keys[number], "renamed")
            assert strike.struck is not None
            assert (await tenants.get(keys[number])).name == ("t0" if kind == "B" else "renamed"), "not at all, or once"
