"""`manager.run`: a unit of work is done once, wholly, and its outcome is known, whatever is cut, whoever competes, and whoever asks again."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from pydantic import JsonValue
from sqlalchemy import text
from sqlmodel import select
from sqlmodel.ext.asyncio.session import AsyncSession

from car_control_plane.connection import AsyncConnectionManager
from car_control_plane.errors import (
    AlreadyExistsError,
    ClosedError,
    ConfigurationError,
    ConflictError,
    ConnectionUnavailableError,
    ControlPlaneError,
    InvalidDataError,
    OutcomeUnknownError,
    PoolTimeoutError,
    StatementTimeoutError,
)
from car_control_plane.models import CompletedOperation, SystemConfig
from car_control_plane.repositories import SystemConfigRepository, TenantRepository
from tests.fixtures.faults import FaultProxy, When

Unit = Callable[[AsyncSession], Awaitable[Any]]


@pytest.fixture
async def looker(own_database: str) -> AsyncIterator[asyncpg.Connection]:
    async with AsyncConnectionManager(own_database) as manager:
        connection = await manager.connect()
        yield connection
        await connection.close()


def writing(name: str, result: JsonValue = None) -> Unit:
    """A unit that inserts two rows, one after the other, and fails when one of them is there."""

    async def unit(session: AsyncSession) -> JsonValue:
        session.add(SystemConfig(key=f"{name}.a", value=1))
        await session.flush()
        session.add(SystemConfig(key=f"{name}.b", value=2))
        await session.flush()
        return result

    return unit


async def sql(session: AsyncSession, statement: str) -> None:
    await (await session.connection()).exec_driver_sql(statement)


async def stored(looker: asyncpg.Connection, name: str) -> int:
    count: int = await looker.fetchval(
        "SELECT count(*) FROM control_plane.system_config WHERE key LIKE $1 || '.%'", name
    )
    return count


async def operations(looker: asyncpg.Connection) -> int:
    count: int = await looker.fetchval("SELECT count(*) FROM control_plane.completed_operations")
    return count


# --- the ordinary case ------------------------------------------------------------------------------------------------


async def test_a_unit_is_committed_and_returns_what_it_returned(
    manager: AsyncConnectionManager, looker: asyncpg.Connection
) -> None:
    marker = object()

    async def unit(session: AsyncSession) -> object:
        await writing("one")(session)
        return marker

    assert await manager.run(unit) is marker
    assert await stored(looker, "one") == 2
    assert await operations(looker) == 1


async def test_a_unit_that_asks_for_nothing_needs_no_connection(manager: AsyncConnectionManager) -> None:
    async def unit(_: AsyncSession) -> int:
        return 7

    assert await manager.run(unit) == 7
    assert manager.pool_status().opened == 0


async def test_repositories_take_part(manager: AsyncConnectionManager) -> None:
    async def unit(session: AsyncSession) -> str:
        made = await TenantRepository(session).create({"name": "acme", "environment": "staging"})  # type: ignore[arg-type]
        await SystemConfigRepository(session).set("acme.limits", {"tenant": str(made.tenant_id)})
        return str(made.tenant_id)

    operation_id = uuid.uuid4()
    made = await manager.run(unit, operation_id=operation_id)
    assert await manager.run(unit, operation_id=operation_id) == made
    assert (await TenantRepository(manager).get_by_name("acme")).tenant_id == uuid.UUID(made)


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
async def test_the_isolation_level_is_that_of_the_unit_alone(level: Any, own_database: str) -> None:
    async with AsyncConnectionManager(own_database, pool_size=1, max_overflow=0) as manager:

        async def unit(session: AsyncSession) -> Any:
            return await session.scalar(text("SHOW transaction_isolation"))

        assert await manager.run(unit, isolation_level=level) == level.lower()
        assert await manager.run(unit) == "read committed"


# --- the same operation again -----------------------------------------------------------------------------------------

RESULTS: tuple[JsonValue, ...] = (None, 0, False, "", "text", 1.5, [], {}, {"a": [1, None, {"b": "ü"}]}, 2**80)


@pytest.mark.parametrize("result", RESULTS, ids=repr)
async def test_what_was_done_is_not_done_again_and_its_outcome_is_returned(
    result: JsonValue, manager: AsyncConnectionManager, looker: asyncpg.Connection
) -> None:
    operation_id = uuid.uuid4()
    for given in (operation_id, str(operation_id), operation_id):
        again = await manager.run(writing("one", result), operation_id=given)
        assert again == result
        assert type(again) is type(result)
    assert await stored(looker, "one") == 2
    assert await operations(looker) == 1


async def test_of_many_who_run_the_same_operation_one_does(own_database: str, looker: asyncpg.Connection) -> None:
    operation_id = uuid.uuid4()
    runs = 0

    async def unit(session: AsyncSession) -> int:
        nonlocal runs
        await writing("one")(session)
        await asyncio.sleep(0.05)
        runs += 1
        return runs

    async with (
        AsyncConnectionManager(own_database, pool_size=4, pool_timeout_seconds=60) as one,
        AsyncConnectionManager(own_database, pool_size=4, pool_timeout_seconds=60) as other,
    ):
        results = await asyncio.gather(
            *(m.run(unit, operation_id=operation_id) for m in (one, other) for _ in range(4))
        )
    assert results == [1] * 8
    assert await stored(looker, "one") == 2


@pytest.mark.parametrize("result", [object(), {1: 2}, (1, 2), float("nan"), b"bytes", uuid.uuid4()], ids=repr)
async def test_an_outcome_that_cannot_be_recorded_is_refused_before_it_is_stored(
    result: Any, manager: AsyncConnectionManager, looker: asyncpg.Connection
) -> None:
    with pytest.raises(InvalidDataError, match="must be a JSON value; nothing was written"):
        await manager.run(writing("one", result), operation_id=uuid.uuid4())
    assert await stored(looker, "one") == await operations(looker) == 0
    assert await manager.run(writing("one", result)) is result, "without an id nothing is recorded"


async def test_old_operations_are_forgotten(manager: AsyncConnectionManager, looker: asyncpg.Connection) -> None:
    for name in ("one", "two", "three"):
        await manager.run(writing(name), operation_id=uuid.uuid4())
    await looker.execute(
        "UPDATE control_plane.completed_operations SET completed_at = now() - interval '8 days'"
        " WHERE operation_id IN (SELECT operation_id FROM control_plane.completed_operations LIMIT 2)"
    )
    assert await manager.prune_operations() == 2
    assert await manager.prune_operations() == 0
    assert await operations(looker) == 1
    assert await manager.prune_operations(older_than_seconds=1e-6) == 1
    for seconds in (0, -1, float("nan")):
        with pytest.raises(ConfigurationError):
            await manager.prune_operations(older_than_seconds=seconds)


async def test_run_forgets_old_operations_now_and_then(
    manager: AsyncConnectionManager, looker: asyncpg.Connection
) -> None:
    await manager.run(writing("one"))
    await looker.execute("UPDATE control_plane.completed_operations SET completed_at = now() - interval '8 days'")
    await manager.run(writing("two"))
    assert await operations(looker) == 2, "not at every call"
    manager._pruned_at -= 3601
    await manager.run(writing("three"))
    assert await operations(looker) == 2


async def test_operations_are_no_changes(manager: AsyncConnectionManager, looker: asyncpg.Connection) -> None:
    await manager.run(writing("one"), operation_id=uuid.uuid4())
    found = await looker.fetch("SELECT DISTINCT table_name FROM control_plane.change_log WHERE version > 1")
    assert [row[0] for row in found] == ["system_config"]


# --- what is cut ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [True, False], ids=["with an id", "without"])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_cut_at_every_message_a_unit_is_done_exactly_once(
    when: When, asked: bool, own_database: str, looker: asyncpg.Connection
) -> None:
    """Of the connecting, the transaction and its end: nobody is told a lie, and nothing is done twice."""
    cuts = 0
    async with FaultProxy(own_database) as proxy:
        for at in range(1, 400):
            strike = proxy.strike(at, when=when)
            operation_id = uuid.uuid4() if asked else None
            async with AsyncConnectionManager(proxy.dsn, pool_size=1, max_overflow=0, pooler="none") as manager:
                assert await manager.run(writing(f"cut{at}", at), operation_id=operation_id, deadline=60) == at
            assert await stored(looker, f"cut{at}") == 2
            if strike.struck is None:
                break
            cuts += 1
    assert cuts >= 25
    assert await operations(looker) == cuts + 1


async def test_without_an_answer_in_time_the_error_carries_the_id_to_ask_with(
    own_database: str, looker: asyncpg.Connection
) -> None:
    async with (
        FaultProxy(own_database) as proxy,
        AsyncConnectionManager(proxy.dsn, command_timeout_seconds=1) as manager,
    ):

        async def unit(session: AsyncSession) -> str:
            await writing("one")(session)
            return "done"

        async def last(session: AsyncSession) -> str:
            result = await unit(session)
            proxy.strike(
                1, direction="to_server", kind="Q", when="after", then="stall"
            )  # COMMIT: asyncpg sends it as a query
            proxy.stall(existing=False, new=True)
            return result

        with pytest.raises(OutcomeUnknownError) as caught:
            await manager.run(last, deadline=3)
        assert caught.value.retryable
        assert caught.value.__cause__ is caught.value.__context__ is None
        operation_id = caught.value.details["operation_id"]
        proxy.resume()
        async with asyncio.timeout(60):
            while not await operations(looker):  # noqa: ASYNC110 -- the server is not done yet
                await asyncio.sleep(0.01)
        assert await manager.run(unit, operation_id=operation_id) is None, "done, by a run that recorded no outcome"
    assert await stored(looker, "one") == 2


async def test_a_former_attempt_that_is_half_alive_is_ended(own_database: str, looker: asyncpg.Connection) -> None:
    """Its COMMIT never arrived: the server keeps its transaction, and the id, until it notices."""
    settings: dict[str, Any] = {"lock_timeout_seconds": 0.2, "command_timeout_seconds": 1}
    async with FaultProxy(own_database) as proxy, AsyncConnectionManager(proxy.dsn, **settings) as manager:
        armed = True

        async def unit(session: AsyncSession) -> str:
            nonlocal armed
            await writing("one")(session)
            if armed:
                armed = False
                proxy.strike(1, direction="to_server", kind="Q", when="before", then="stall")
            return "done"

        assert await manager.run(unit, operation_id=uuid.uuid4(), deadline=60) == "done"
    assert await stored(looker, "one") == 2


# --- who competes -----------------------------------------------------------------------------------------------------


async def test_serialization_failures_are_repeated_until_all_have_counted(own_database: str) -> None:
    async with AsyncConnectionManager(own_database, pool_size=8, pool_timeout_seconds=60) as manager:
        await SystemConfigRepository(manager).set("count", 0)
        tries = 0

        async def unit(session: AsyncSession) -> None:
            nonlocal tries
            tries += 1
            entry = (await session.exec(select(SystemConfig).where(SystemConfig.key == "count"))).one()
            await asyncio.sleep(0.005)
            n = int(str(entry.value)) + 1
            await sql(session, f"UPDATE control_plane.system_config SET value = to_jsonb({n}) WHERE key = 'count'")

        await asyncio.gather(*(manager.run(unit, isolation_level="SERIALIZABLE", deadline=240) for _ in range(10)))
        assert await SystemConfigRepository(manager).get("count") == 10
        assert tries > 10, "they met"


async def test_deadlocks_are_repeated(own_database: str) -> None:
    async with AsyncConnectionManager(own_database, lock_timeout_seconds=30) as manager:
        config = SystemConfigRepository(manager)
        for key in ("a", "b"):
            await config.set(key, 0)
        both = asyncio.Barrier(2)
        met = 0

        def crossing(*keys: str) -> Unit:
            async def unit(session: AsyncSession) -> None:
                nonlocal met
                for number, key in enumerate(keys):
                    await SystemConfigRepository(session).set(key, list(keys))
                    if number == 0 and met < 2:
                        met += 1
                        await both.wait()

            return unit

        await asyncio.gather(
            manager.run(crossing("a", "b"), deadline=120), manager.run(crossing("b", "a"), deadline=120)
        )
        assert await config.get("a") == await config.get("b")


async def test_at_the_deadline_the_last_error_is_told(own_database: str, looker: asyncpg.Connection) -> None:
    async with FaultProxy(own_database) as proxy, AsyncConnectionManager(proxy.dsn) as manager:
        proxy.refuse()
        with pytest.raises(ConnectionUnavailableError, match="refused") as caught:
            await manager.run(writing("one"), deadline=2)
        assert caught.value.details["attempts"] >= 2
        assert caught.value.__cause__ is caught.value.__context__ is None
        proxy.accept()
        await manager.run(writing("one"))
    assert await stored(looker, "one") == 2


async def test_a_pool_that_is_empty_is_not_asked_again(own_database: str) -> None:
    settings: dict[str, Any] = {"pool_size": 1, "max_overflow": 0, "pool_timeout_seconds": 0.05}
    async with AsyncConnectionManager(own_database, **settings) as manager, manager.get_session() as session:
        await session.connection()
        with pytest.raises(PoolTimeoutError):
            await manager.run(writing("one"))


# --- what a unit does wrong -------------------------------------------------------------------------------------------


class OwnError(Exception):
    """Carries what looks like a driver's attribute."""

    sqlstate = "40001"


@pytest.mark.parametrize(
    "error", [OwnError(), ValueError("mine"), TimeoutError("mine"), OSError(5, "mine"), ClosedError("of mine")]
)
async def test_what_a_unit_raises_passes_unchanged_and_once(
    error: Exception, manager: AsyncConnectionManager, looker: asyncpg.Connection
) -> None:
    runs = 0

    async def unit(session: AsyncSession) -> None:
        nonlocal runs
        runs += 1
        await writing("one")(session)
        raise error

    with pytest.raises(type(error)) as caught:
        await manager.run(unit, operation_id=uuid.uuid4())
    assert caught.value is error
    assert runs == 1
    assert await stored(looker, "one") == await operations(looker) == 0


async def test_an_error_raised_from_the_databases_is_the_units_own(manager: AsyncConnectionManager) -> None:
    async def unit(session: AsyncSession) -> None:
        try:
            await sql(session, "SELECT 1/0")
        except Exception as problem:
            raise OwnError from problem

    with pytest.raises(OwnError):
        await manager.run(unit)
    with pytest.raises(OwnError):
        async with manager.get_session() as session:
            await unit(session)


async def test_what_the_database_refuses_is_told_once(manager: AsyncConnectionManager) -> None:
    await manager.run(writing("one"))
    runs = 0

    async def unit(session: AsyncSession) -> None:
        nonlocal runs
        runs += 1
        await writing("one")(session)

    with pytest.raises(AlreadyExistsError):
        await manager.run(unit)

    async def slow(session: AsyncSession) -> None:
        nonlocal runs
        runs += 1
        await sql(session, "SET LOCAL statement_timeout = 50")
        await sql(session, "SELECT pg_sleep(30)")

    with pytest.raises(StatementTimeoutError):
        await manager.run(slow)
    assert runs == 2


ENDINGS: dict[str, Callable[[AsyncSession], Awaitable[Any]]] = {
    "commit": lambda session: session.commit(),
    "rollback": lambda session: session.rollback(),
    "close": lambda session: session.close(),
    "invalidate": lambda session: session.invalidate(),
    "run_sync(rollback)": lambda session: session.run_sync(lambda sync: sync.rollback()),
    "ROLLBACK": lambda session: sql(session, "ROLLBACK"),
}


@pytest.mark.parametrize("asked", [True, False], ids=["with an id", "without"])
@pytest.mark.parametrize("how", ENDINGS)
async def test_a_unit_does_not_end_its_own_transaction(
    how: str, asked: bool, manager: AsyncConnectionManager, looker: asyncpg.Connection
) -> None:
    async def unit(session: AsyncSession) -> None:
        await writing("one")(session)
        await ENDINGS[how](session)

    with pytest.raises(ConfigurationError, match="its own transaction"):
        await manager.run(unit, operation_id=uuid.uuid4() if asked else None)
    assert await stored(looker, "one") == await operations(looker) == 0
    await manager.run(writing("one"))


async def test_a_unit_begins_no_transaction(manager: AsyncConnectionManager, looker: asyncpg.Connection) -> None:
    async def unit(session: AsyncSession) -> None:
        async with session.begin():
            await writing("one")(session)

    with pytest.raises(ConfigurationError, match="its own transaction"):
        await manager.run(unit)
    assert await stored(looker, "one") == 0


async def test_a_session_that_outlives_its_unit_is_of_no_use(manager: AsyncConnectionManager) -> None:
    kept: list[AsyncSession] = []

    async def unit(session: AsyncSession) -> None:
        kept.append(session)
        await TenantRepository(session).count()

    await manager.run(unit)
    with pytest.raises(ClosedError, match="the session has ended"):
        await TenantRepository(kept[0]).count()
    async with manager.get_session() as session:
        await TenantRepository(session).count()
    with pytest.raises(ClosedError, match="the session has ended"):
        await TenantRepository(session).count()
    async with manager.get_read_session() as reading:
        await TenantRepository(reading).count()
    with pytest.raises(ClosedError, match="the session has ended"):
        await TenantRepository(reading).count()
    assert manager.pool_status().in_use == 0


@pytest.mark.parametrize(
    "given",
    [
        {"unit": None},
        {"unit": 5},
        {"operation_id": "no uuid"},
        {"operation_id": 5},
        {"unit": lambda _: 5},
        {"isolation_level": "AUTOCOMMIT"},
        {"isolation_level": 5},
        {"deadline": 0},
        {"deadline": -1},
        {"deadline": float("nan")},
        {"deadline": float("inf")},
        {"deadline": "soon"},
        {"deadline": True},
    ],
    ids=repr,
)
async def test_arguments_that_make_no_sense_are_refused(given: dict[str, Any], manager: AsyncConnectionManager) -> None:
    with pytest.raises(ConfigurationError):
        await manager.run(**{"unit": writing("one"), **given})
    assert manager.pool_status().opened == 0


# --- cancellation -----------------------------------------------------------------------------------------------------


async def test_a_cancelled_unit_is_all_or_nothing_and_the_cancellation_is_not_lost(
    manager: AsyncConnectionManager, looker: asyncpg.Connection
) -> None:
    for number in range(40):
        task = asyncio.create_task(manager.run(writing(f"c{number}"), operation_id=uuid.uuid4()))
        await asyncio.sleep(0.0005 * number)
        task.cancel()
        await asyncio.wait({task})
        count = await stored(looker, f"c{number}")
        assert count in {0, 2}
        if not task.cancelled():
            assert task.exception() is None
            assert count == 2
    async with asyncio.timeout(60):
        while manager.pool_status().in_use:  # noqa: ASYNC110 -- sessions end in the background
            await asyncio.sleep(0.001)


async def test_pauses_can_be_cancelled(own_database: str) -> None:
    async with FaultProxy(own_database) as proxy, AsyncConnectionManager(proxy.dsn) as manager:
        proxy.refuse()
        task = asyncio.create_task(manager.run(writing("one"), deadline=3600))
        await asyncio.sleep(0.1)
        task.cancel()
        await asyncio.wait({task}, timeout=30)
        assert task.cancelled()


async def test_a_closed_manager_runs_nothing(own_database: str) -> None:
    manager = AsyncConnectionManager(own_database)
    await manager.close()
    with pytest.raises(ClosedError):
        await manager.run(writing("one"))


def test_no_error_of_ours_is_taken_for_one_that_passes_by_mistake() -> None:
    from car_control_plane.units import _passes

    assert _passes(ConnectionUnavailableError())
    assert _passes(ConflictError(details={"sqlstate": "40001"}, retryable=True))
    assert not _passes(PoolTimeoutError())
    assert not _passes(ConflictError())
    assert not _passes(ControlPlaneError(details={"sqlstate": "23505"}))
    assert CompletedOperation.__tablename__ == "completed_operations"
