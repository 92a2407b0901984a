"""One tenant at a time: reading it by its id, and changing its status."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession as AlchemySession
from sqlmodel.ext.asyncio.session import AsyncSession

from benchmarks.baselines import AlchemyRepository, PlainTenant, plain_engine
from benchmarks.harness import Bench, Line, Table, Way, at_least, connected, interleaved, ratios, spread, timed
from car_control_plane import AsyncConnectionManager, Tenant, TenantRepository, TenantStatus

TENANTS = 100_000
WORKERS = (1, 16)
CALLS = 32
"""Calls of each way in each slice."""
SLICES = 15

Step = Callable[[UUID], Awaitable[object]]

# What is compared: what it is called, the way, its yardstick, and the goal.
COMPARED = (
    ("`get` in `get_read_session()`", "get", "sqlmodel", at_least(1)),
    ("`get` in `get_session()`, which commits", "get, commit", "sqlmodel", at_least(1)),
    ("`get` in a stock session", "get in stock session", "sqlmodel", at_least(1)),
    ("`get` in `get_read_session()`", "get", "alchemy", at_least(1.2)),
    ("`get` in a stock session", "get in stock session", "alchemy", at_least(1.2)),
    ("`suspend`, `activate`", "change", "orm", at_least(1.5)),
    ("`suspend`, `activate`", "change", "orm, our model", at_least(1.5)),
    ("... waiting for the disk", "durable change", "durable orm", None),
)
YARDSTICKS = {
    "sqlmodel": "`session.get` of stock SQLModel",
    "alchemy": "advanced-alchemy's `get`",
    "orm": "get, change, commit of stock SQLModel",
    "orm, our model": "get, change of `Tenant` in `get_session()`",
    "durable orm": "get, change, commit of stock SQLModel",
}


async def measure(bench: Bench) -> Table:
    dsn = await bench.filled(bench.size(TENANTS))
    async with connected(dsn) as connection:
        found = await connection.fetch(
            "SELECT tenant_id FROM control_plane.tenants WHERE status = 'active' AND name <> 'system_admin' "
            "ORDER BY md5(tenant_id::text) LIMIT $1",
            CALLS,
        )
    ids = [row["tenant_id"] for row in found]
    costs = {}
    async with _pools(f"{dsn}&synchronous_commit=off") as pools, _pools(dsn) as durable:
        ways = {**_reads(*pools), **_changes(*pools)}
        ways |= {f"durable {name}": way for name, way in _changes(*durable).items() if name in {"change", "orm"}}
        for workers in WORKERS:
            at_work = {name: _way(steps, ids, workers) for name, steps in ways.items()}
            await interleaved(at_work, 1)
            costs[workers] = await interleaved(at_work, bench.rounds, slices=bench.slices(SLICES))
    return Table(
        "One tenant at a time",
        f"Calls per second, each call in a session of its own, from pools of {max(WORKERS)} connections. `synchronous_commit` is off, for the disk costs both "
        "sides the same; with it on, both mostly wait for the disk.",
        [
            Line(f"{what}, {workers} at once", YARDSTICKS[yardstick], ratios(costs[workers], yardstick, to=way), goal)
            for workers in WORKERS
            for what, way, yardstick, goal in COMPARED
        ],
    )


@asynccontextmanager
async def _pools(dsn: str) -> AsyncIterator[tuple[AsyncConnectionManager, AsyncEngine]]:
    """Give a manager and a stock engine, with as many connections each."""
    connections = max(WORKERS)
    engine = plain_engine(dsn, connections=connections)
    async with AsyncConnectionManager(dsn, pool_size=connections, max_overflow=0) as manager:
        yield manager, engine
    await engine.dispose()


def _way(steps: Sequence[Step], ids: Sequence[UUID], workers: int) -> Way:
    """Take each step for every id; the last one leaves the rows as the first found them."""

    async def run() -> float:
        return sum([await timed(spread(step, ids, workers)) for step in steps])

    return run


def _reads(manager: AsyncConnectionManager, engine: AsyncEngine) -> dict[str, list[Step]]:
    async def get(key: UUID) -> object:
        async with manager.get_read_session() as session:
            return await TenantRepository(session).get(key)

    async def get_and_commit(key: UUID) -> object:
        async with manager.get_session() as session:
            return await TenantRepository(session).get(key)

    async def get_in_stock_session(key: UUID) -> object:
        async with AsyncSession(engine, expire_on_commit=False) as session:
            return await TenantRepository(session).get(key)

    async def sqlmodel(key: UUID) -> object:
        async with AsyncSession(engine, expire_on_commit=False) as session:
            return await session.get(PlainTenant, key)

    async def alchemy(key: UUID) -> object:
        async with AlchemySession(engine, expire_on_commit=False) as session:
            return await AlchemyRepository(session=session).get(key)

    return {
        "get": [get],
        "get, commit": [get_and_commit],
        "get in stock session": [get_in_stock_session],
        "sqlmodel": [sqlmodel],
        "alchemy": [alchemy],
    }


def _changes(manager: AsyncConnectionManager, engine: AsyncEngine) -> dict[str, list[Step]]:
    async def suspend(key: UUID) -> None:
        async with manager.get_session() as session:
            await TenantRepository(session).suspend(key)

    async def activate(key: UUID) -> None:
        async with manager.get_session() as session:
            await TenantRepository(session).activate(key)

    def stock(status: TenantStatus) -> Step:
        async def change(key: UUID) -> None:
            async with AsyncSession(engine, expire_on_commit=False) as session:
                tenant = await session.get_one(PlainTenant, key)
                tenant.status = status
                await session.commit()

        return change

    def ours(status: TenantStatus) -> Step:
        async def change(key: UUID) -> None:
            async with manager.get_session() as session:
                tenant = await session.get_one(Tenant, key)
                tenant.status = status

        return change

    there_and_back = TenantStatus.SUSPENDED, TenantStatus.ACTIVE
    return {
        "change": [suspend, activate],
        "orm": [stock(status) for status in there_and_back],
        "orm, our model": [ours(status) for status in there_and_back],
    }
