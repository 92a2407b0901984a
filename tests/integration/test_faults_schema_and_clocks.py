"""A schema that changes under a live pool, and clocks that disagree: callers who read see nothing of it."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from sqlmodel import select

from car_control_plane.connection import AsyncConnectionManager
from car_control_plane.errors import ConflictError
from car_control_plane.models import SYSTEM_ADMIN_ID, SYSTEM_ADMIN_NAME, Tenant
from car_control_plane.repositories import SystemConfigRepository, TenantRepository
from tests.fixtures.faults import looking

Make = Callable[..., AsyncConnectionManager]


@pytest.fixture
async def make(own_database: str) -> AsyncIterator[Make]:
    async with AsyncExitStack() as stack:

        def one(dsn: str = own_database, **settings: Any) -> AsyncConnectionManager:
            manager = AsyncConnectionManager(dsn, **settings)
            stack.push_async_callback(manager.close)
            return manager

        yield one


@pytest.fixture
async def looker(own_database: str) -> AsyncIterator[asyncpg.Connection]:
    async with looking(own_database) as looker:
        yield looker


# --- the schema -----------------------------------------------------------------------------------------------------------

REPLACED_ENUM = """
    CREATE TYPE control_plane.replacement AS ENUM ('development', 'staging', 'production', 'elsewhere');
    ALTER TABLE control_plane.tenants ALTER COLUMN environment TYPE control_plane.replacement
        USING environment::text::control_plane.replacement;
    DROP TYPE control_plane.tenant_environment;
    ALTER TYPE control_plane.replacement RENAME TO tenant_environment;
"""

WIDER_COLUMN = """
    DO $$
    DECLARE definition text;
    BEGIN
        SELECT pg_get_triggerdef(oid) INTO definition FROM pg_trigger WHERE tgname = 'system_config_10_identity';
        DROP TRIGGER system_config_10_identity ON control_plane.system_config;
        ALTER TABLE control_plane.system_config ALTER COLUMN key TYPE varchar(400);
        EXECUTE definition;
    END $$
"""

CHANGES = {
    "a column more": "ALTER TABLE control_plane.tenants ADD COLUMN more text DEFAULT 'more'",
    "a wider column": WIDER_COLUMN,
    "a column of another type": "ALTER TABLE control_plane.tenants ALTER COLUMN status_reason TYPE varchar(4000)",
    "a label more": "ALTER TYPE control_plane.tenant_environment ADD VALUE 'elsewhere'",
    "another type under the same name": REPLACED_ENUM,
    "an index more": "CREATE INDEX more ON control_plane.tenants (updated_at)",
}


async def _get(manager: AsyncConnectionManager) -> str:
    return (await TenantRepository(manager).get(SYSTEM_ADMIN_ID)).name


async def _list(manager: AsyncConnectionManager) -> str:
    return (await TenantRepository(manager).list()).items[0].name


async def _read_session(manager: AsyncConnectionManager) -> str:
    async with manager.get_read_session() as session:
        return (await session.exec(select(Tenant))).one().name


async def _repository_in_a_session(manager: AsyncConnectionManager) -> str:
    async with manager.get_read_session() as session:
        return (await TenantRepository(session).get(SYSTEM_ADMIN_ID)).name


async def _config(manager: AsyncConnectionManager) -> Any:
    return await SystemConfigRepository(manager).get("name")


async def _config_in_a_session(manager: AsyncConnectionManager) -> Any:
    async with manager.get_read_session() as session:
        return await SystemConfigRepository(session).get("name")


READS = [_get, _list, _read_session, _repository_in_a_session, _config, _config_in_a_session]


@pytest.mark.parametrize("change", CHANGES)
async def test_who_reads_sees_nothing_of_a_change_of_the_schema(
    change: str, make: Make, looker: asyncpg.Connection
) -> None:
    """Statements are prepared on every connection before it; none of them may be told that its plan is out of date."""
    manager = make(pool_size=3, max_overflow=0)
    await SystemConfigRepository(manager).set("name", SYSTEM_ADMIN_NAME)
    for _ in range(3):
        await asyncio.gather(*(read(manager) for read in READS for _ in range(3)))
    await looker.execute(CHANGES[change])
    for _ in range(3):
        results = await asyncio.gather(*(read(manager) for read in READS for _ in range(3)), return_exceptions=True)
        assert results == [SYSTEM_ADMIN_NAME] * len(results)


async def test_a_transaction_the_schema_changes_under_can_be_repeated(make: Make, looker: asyncpg.Connection) -> None:
    """Its second statement cannot be prepared again behind the caller's back: what the first one found may be of yesterday."""
    manager = make(pool_size=1, max_overflow=0)

    async def read() -> str:
        async with manager.get_session() as session:
            await (await session.connection()).exec_driver_sql("SELECT 1")
            return (await session.exec(select(Tenant))).one().name

    await read()
    await looker.execute(CHANGES["a column of another type"])
    with pytest.raises(ConflictError, match="schema changed") as caught:
        await read()
    assert caught.value.retryable
    assert caught.value.__cause__ is caught.value.__context__ is None
    assert await read() == SYSTEM_ADMIN_NAME
    assert manager.pool_status().lost == 0


# --- clocks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="the zone of a process cannot be changed here")
async def test_instants_are_the_same_whatever_zone_server_and_client_are_in(
    make: Make, looker: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = await looker.fetchval("SELECT current_database()")
    await looker.execute(f"ALTER DATABASE \"{database}\" SET timezone = 'America/New_York'")
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    time.tzset()
    try:
        manager = make()
        before = await looker.fetchval("SELECT clock_timestamp()")
        tenant = await TenantRepository(manager).create({"name": "here", "environment": "staging"})  # type: ignore[arg-type]  # a mapping is taken
        after = await looker.fetchval("SELECT clock_timestamp()")
        async with manager.get_read_session() as session:
            read = (await session.exec(select(Tenant).where(Tenant.name == "here"))).one()
    finally:
        monkeypatch.delenv("TZ")
        time.tzset()
    assert before <= tenant.created_at <= after
    assert read.created_at == tenant.created_at == await looker.fetchval(CREATED_AT)
    assert tenant.created_at.utcoffset() == timedelta()
    assert abs(tenant.created_at - datetime.now(UTC)) < timedelta(minutes=5), "no zone is added or lost"


CREATED_AT = "SELECT created_at FROM control_plane.tenants WHERE name = 'here'"


@pytest.mark.parametrize("hours", [-7, 7])
async def test_a_clock_that_is_wrong_by_hours_or_set_while_working_changes_nothing(
    hours: int, make: Make, looker: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is stored is the server's time, and the pool counts its own by a clock nobody sets."""
    manager = make(pool_size=2, max_overflow=0)
    pid = (await manager.fetch("SELECT pg_backend_pid()", (), repeat=True))[0][0]
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + 3600 * hours)
    before = await looker.fetchval("SELECT clock_timestamp()")
    tenant = await TenantRepository(manager).create({"name": "here", "environment": "staging"})  # type: ignore[arg-type]  # a mapping is taken
    async with manager.get_session() as session:
        changed = await TenantRepository(session).update(tenant.tenant_id, {"labels": {"a": "b"}})  # type: ignore[arg-type]  # a mapping is taken
    after = await looker.fetchval("SELECT clock_timestamp()")
    assert before <= tenant.created_at <= changed.updated_at <= after
    assert (await manager.fetch("SELECT pg_backend_pid()", (), repeat=True))[0][0] == pid
    monkeypatch.undo()
    assert (await manager.fetch("SELECT pg_backend_pid()", (), repeat=True))[0][0] == pid
    assert (manager.pool_status().connects, manager.pool_status().lost) == (1, 0)
