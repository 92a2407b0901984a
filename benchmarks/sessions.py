"""Sessions through the pool with two doors, beside SQLAlchemy's own pool; and what the guard costs."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlmodel.ext.asyncio.session import AsyncSession

from benchmarks.baselines import PlainTenant, plain_engine
from benchmarks.harness import (
    Bench,
    Line,
    Table,
    Way,
    at_least,
    at_most,
    connect,
    connected,
    interleaved,
    ratios,
    spread,
    timed,
)
from car_control_plane import AsyncConnectionManager
from car_control_plane.pool import DirectPool

TENANTS = 100_000
CONNECTIONS = 16
WORKERS = (1, 16, 64)
CALLS = 128
"""Calls of each way in each slice."""
SLICES = 10


async def measure(bench: Bench) -> Table:
    dsn = await bench.filled(bench.size(TENANTS))
    async with connected(dsn) as connection:
        found = await connection.fetch(
            "SELECT tenant_id FROM control_plane.tenants ORDER BY md5(tenant_id::text) LIMIT $1", CALLS
        )
    ids = [row["tenant_id"] for row in found]
    lines = []
    async with (
        _ways(dsn, ids) as engines,
        AsyncConnectionManager(dsn, pool_size=CONNECTIONS, max_overflow=0) as manager,
    ):
        for workers in WORKERS:
            ways = {name: _get(engine, ids, workers) for name, engine in engines.items()}
            ways["manager"] = _read(manager, ids, workers)
            await interleaved(ways, 1)
            costs = await interleaved(ways, bench.rounds, slices=bench.slices(SLICES))
            at = f"{workers} at once"
            lines += [
                Line(f"`session.get`, our pool, {at}", against, ratios(costs, way, to="ours"), goal)
                for against, way, goal in (
                    ("SQLAlchemy's default pool", "default", at_least(1)),
                    ("... with `pool_pre_ping`", "ping", at_least(1.5)),
                )
            ]
            lines += [
                Line(f"`get_read_session()`, {at}", "... with `pool_pre_ping`", ratios(costs, "ping", to="manager")),
                Line(f"time with the guard, {at}", "without it", ratios(costs, "ours", to="unguarded"), at_most(1.06)),
            ]
    return Table(
        "Sessions",
        f"Throughput of reading one row by its id, each in a session of its own, from pools of {CONNECTIONS} connections; for the guard, time.",
        lines,
    )


@asynccontextmanager
async def _ways(dsn: str, ids: list[UUID]) -> AsyncIterator[dict[str, AsyncEngine]]:
    """Give engines that differ in their pools only."""

    def ours(**options: float) -> AsyncEngine:
        return create_async_engine(
            "postgresql+asyncpg://",
            async_creator=lambda: connect(dsn),
            poolclass=DirectPool,
            pool_size=CONNECTIONS,
            max_overflow=0,
            **options,
        )

    def stock(*, pre_ping: bool) -> AsyncEngine:
        return create_async_engine(
            "postgresql+asyncpg://",
            async_creator=lambda: connect(dsn),
            pool_size=CONNECTIONS,
            max_overflow=0,
            pool_pre_ping=pre_ping,
        )

    engines = {
        "ours": ours(),
        "unguarded": ours(ping_after=float("inf")),
        "default": plain_engine(dsn, connections=CONNECTIONS),
        "ping": stock(pre_ping=True),
    }
    async with AsyncExitStack() as stack:
        for engine in engines.values():
            stack.push_async_callback(engine.dispose)
        yield engines


def _get(engine: AsyncEngine, ids: list[UUID], workers: int) -> Way:
    async def get(key: UUID) -> None:
        async with AsyncSession(engine, expire_on_commit=False) as session:
            assert await session.get(PlainTenant, key) is not None

    async def run() -> float:
        return await timed(spread(get, ids, workers))

    return run


def _read(manager: AsyncConnectionManager, ids: list[UUID], workers: int) -> Way:
    async def get(key: UUID) -> None:
        async with manager.get_read_session() as session:
            assert await session.get(PlainTenant, key) is not None

    async def run() -> float:
        return await timed(spread(get, ids, workers))

    return run
