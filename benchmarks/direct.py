"""Repositories on a manager, beside the drivers' own pools and the ORMs: one row read, one row written, one page."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import asyncpg
from psycopg_pool import AsyncConnectionPool
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession as AlchemySession
from sqlmodel import select
from sqlmodel.ext.asyncio.session import AsyncSession

from benchmarks.baselines import AlchemyRepository, PlainTenant, plain_engine
from benchmarks.harness import Bench, Line, Table, Way, at_least, connected, interleaved, ratios, spread, timed
from car_control_plane import AsyncConnectionManager, SystemConfigRepository, TenantRepository, dsn as dsns

TENANTS = 100_000
CONNECTIONS = 16
WORKERS = (1, 16, 64)
CALLS = 192
"""Reads of each way in each slice; a sixteenth of it writes and pages."""
SLICES = 8

_COLUMNS = "tenant_id, name, environment, status, created_at, updated_at, labels, status_reason, version"
_BY_ID = f"SELECT {_COLUMNS} FROM control_plane.tenants WHERE tenant_id = $1"
_BY_NAME = f"SELECT {_COLUMNS} FROM control_plane.tenants WHERE name = $1"
_PAGE = f"SELECT {_COLUMNS} FROM control_plane.tenants ORDER BY created_at, tenant_id LIMIT 100"
_SET = f"UPDATE control_plane.tenants SET status_reason = $2 WHERE tenant_id = $1 RETURNING {_COLUMNS}"
_UPSERT = (
    "INSERT INTO control_plane.system_config (key, value) VALUES ($1, $2) "
    "ON CONFLICT (key) DO UPDATE SET value = excluded.value RETURNING key, value, updated_at, version"
)

Step = Callable[[Any], Awaitable[object]]

# What is compared: what it is called, the way, its yardstick, and for each number of callers at once the goal.
READS = (
    ("get by id", "get", "asyncpg.Pool", (2, 3, 4.5)),
    ("get by name", "by name", "asyncpg.Pool, by name", (2, 2, 2)),
    ("get by id", "get", "psycopg 3 pool", (None, None, None)),
    ("get by id", "get", "`session.get` of SQLModel", (None, 8, None)),
    ("get by id", "get", "advanced-alchemy's get", (None, 10, None)),
)
OTHERS = (
    ("update, waiting for the disk", "update", "asyncpg.Pool, the same UPDATE", (1.3, 1.3, 1.3)),
    ("update, waiting for the disk", "update", "get, change, commit of SQLModel", (5, 5, 5)),
    ("upsert of a configuration key", "upsert", "asyncpg.Pool, the same INSERT", (1.3, 1.3, 1.3)),
    ("page of 100", "page", "asyncpg.Pool, records", (0.4, 0.4, 0.4)),
    ("page of 100", "page", "SQLModel's select", (2, 2, 2)),
)


async def measure(bench: Bench) -> Table:
    dsn = await bench.filled(bench.size(TENANTS))
    async with connected(dsn) as connection:
        found = await connection.fetch(
            "SELECT tenant_id, name FROM control_plane.tenants WHERE name <> 'system_admin' "
            "ORDER BY md5(tenant_id::text) LIMIT $1",
            CALLS,
        )
    ids, names = [row["tenant_id"] for row in found], [row["name"] for row in found]
    keys = [f"key-{number}" for number in range(len(ids))]
    lines: list[Line] = []
    async with _everything(dsn) as (manager, raw, psycopg, engine):
        read_items: dict[str, list[Any]] = {"by name": names, "asyncpg.Pool, by name": names}
        reads = {
            name: (step, read_items.get(name, ids)) for name, step in _reads(manager, raw, psycopg, engine).items()
        }
        other_items: dict[str, list[Any]] = {"upsert": keys, "asyncpg.Pool, the same INSERT": keys}
        some = max(len(ids) // 16, 1)
        others = {
            name: (step, other_items.get(name, ids)[:some]) for name, step in _others(manager, raw, engine).items()
        }
        for compared, steps in ((READS, reads), (OTHERS, others)):
            for number, workers in enumerate(WORKERS):
                ways = {name: _way(step, items, workers) for name, (step, items) in steps.items()}
                await interleaved(ways, 1)
                costs = await interleaved(ways, bench.rounds, slices=bench.slices(SLICES))
                for what, way, yardstick, goals in compared:
                    goal = goals[number]
                    figures = ratios(costs, yardstick, to=way)
                    at = f"{what}, {workers} at once"
                    lines.append(Line(at, yardstick, figures, None if goal is None else at_least(goal)))
    return Table(
        "Repositories on a manager",
        f"Calls per second, from pools of {CONNECTIONS} connections.",
        lines,
    )


@asynccontextmanager
async def _everything(
    dsn: str,
) -> AsyncIterator[tuple[AsyncConnectionManager, asyncpg.Pool, AsyncConnectionPool, AsyncEngine]]:
    parsed = dsns.parse(dsn)
    engine = plain_engine(dsn, connections=CONNECTIONS)
    async with (
        AsyncConnectionManager(dsn, pool_size=CONNECTIONS, max_overflow=0) as manager,
        asyncpg.create_pool(parsed.for_host(parsed.hosts[0]), min_size=CONNECTIONS, max_size=CONNECTIONS) as raw,
        AsyncConnectionPool(dsn, min_size=CONNECTIONS, max_size=CONNECTIONS, kwargs={"autocommit": True}) as psycopg,
    ):
        yield manager, raw, psycopg, engine
    await engine.dispose()


def _way(step: Step, items: list[Any], workers: int) -> Way:
    async def run() -> float:
        return await timed(spread(step, items, workers))

    return run


def _reads(
    manager: AsyncConnectionManager, raw: asyncpg.Pool, psycopg: AsyncConnectionPool, engine: AsyncEngine
) -> dict[str, Step]:
    tenants = TenantRepository(manager)
    in_psycopg = _BY_ID.replace("$1", "%s")

    async def by_pool(key: UUID) -> object:
        async with raw.acquire() as connection:
            return await connection.fetchrow(_BY_ID, key)

    async def by_pool_name(name: str) -> object:
        async with raw.acquire() as connection:
            return await connection.fetchrow(_BY_NAME, name)

    async def by_psycopg(key: UUID) -> object:
        async with psycopg.connection() as connection:
            cursor = await connection.execute(in_psycopg, (key,), prepare=True)
            return await cursor.fetchone()

    async def sqlmodel(key: UUID) -> object:
        async with AsyncSession(engine, expire_on_commit=False) as session:
            return await session.get(PlainTenant, key)

    async def alchemy(key: UUID) -> object:
        async with AlchemySession(engine, expire_on_commit=False) as session:
            return await AlchemyRepository(session=session).get(key)

    return {
        "get": tenants.get,
        "by name": tenants.get_by_name,
        "asyncpg.Pool": by_pool,
        "asyncpg.Pool, by name": by_pool_name,
        "psycopg 3 pool": by_psycopg,
        "`session.get` of SQLModel": sqlmodel,
        "advanced-alchemy's get": alchemy,
    }


def _others(manager: AsyncConnectionManager, raw: asyncpg.Pool, engine: AsyncEngine) -> dict[str, Step]:
    tenants, config = TenantRepository(manager), SystemConfigRepository(manager)
    turn = {"number": 0}

    def another() -> str:
        turn["number"] += 1
        return f"reason {turn['number']}"

    async def update(key: UUID) -> object:
        return await tenants.update(key, {"labels": {"reason": another()}})  # type: ignore[arg-type]  # a mapping is taken too

    async def by_pool(key: UUID) -> object:
        async with raw.acquire() as connection:
            return await connection.fetchrow(_SET, key, another())

    async def by_orm(key: UUID) -> None:
        async with AsyncSession(engine, expire_on_commit=False) as session:
            tenant = await session.get_one(PlainTenant, key)
            tenant.status_reason = another()
            await session.commit()

    async def upsert(key: str) -> object:
        return await config.set(key, another())

    async def upsert_by_pool(key: str) -> object:
        async with raw.acquire() as connection:
            return await connection.fetchrow(_UPSERT, key, json.dumps(another()))

    async def page(_: UUID) -> object:
        return await tenants.list(limit=100)

    async def page_by_pool(_: UUID) -> object:
        async with raw.acquire() as connection:
            return await connection.fetch(_PAGE)

    async def page_by_orm(_: UUID) -> object:
        statement = select(PlainTenant).order_by(PlainTenant.created_at, PlainTenant.tenant_id).limit(100)  # type: ignore[arg-type]
        async with AsyncSession(engine, expire_on_commit=False) as session:
            return (await session.exec(statement)).all()

    return {
        "update": update,
        "asyncpg.Pool, the same UPDATE": by_pool,
        "get, change, commit of SQLModel": by_orm,
        "upsert": upsert,
        "asyncpg.Pool, the same INSERT": upsert_by_pool,
        "page": page,
        "asyncpg.Pool, records": page_by_pool,
        "SQLModel's select": page_by_orm,
    }
