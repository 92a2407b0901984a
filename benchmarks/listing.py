"""Pages of a large table: the first one, and one that lies deep."""

from typing import Any

from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from benchmarks.baselines import PlainTenant, plain_engine
from benchmarks.harness import Bench, Line, Table, Way, at_most, connected, interleaved, ratios, spread, timed
from car_control_plane import AsyncConnectionManager, TenantRepository
from car_control_plane.repositories.base import encode_cursor

TENANTS = 1_000_000
DEPTH = 900_000
LIMIT = 100
PAGES = 10
"""Pages read in each slice."""
SLICES = 10

_AT = "SELECT created_at, tenant_id FROM control_plane.tenants ORDER BY created_at, tenant_id OFFSET $1 LIMIT 1"


async def measure(bench: Bench) -> Table:
    tenants, depth = bench.size(TENANTS), bench.size(DEPTH)
    dsn = await bench.filled(tenants)
    async with connected(dsn) as connection:
        cursor = encode_cursor(*await connection.fetchrow(_AT, depth - 1))
    engine = plain_engine(dsn, connections=1)
    async with AsyncConnectionManager(dsn) as manager:

        def page(**where: Any) -> Way:
            async def read(_: int) -> None:
                async with manager.get_read_session() as session:
                    assert (await TenantRepository(session).list(limit=LIMIT, **where)).items

            async def run() -> float:
                return await timed(spread(read, range(PAGES), 1)) / PAGES

            return run

        async def by_offset() -> float:
            async def read() -> None:
                order = col(PlainTenant.created_at), col(PlainTenant.tenant_id)
                async with AsyncSession(engine) as session:
                    page = select(PlainTenant).order_by(*order).offset(depth - LIMIT).limit(LIMIT)
                    assert len((await session.exec(page)).all()) == LIMIT

            return await timed(read())

        ways = {
            "first": page(),
            "deep": page(after=cursor),
            "deep, filtered": page(after=cursor, status="suspended", environment="production"),
            "deep by OFFSET": by_offset,
        }
        await interleaved(ways, 1)
        costs = await interleaved(ways, bench.rounds, slices=bench.slices(SLICES))
    await engine.dispose()
    return Table(
        f"A page of {LIMIT} among {tenants:,} tenants",
        "Time of `list`, each in a read session of its own.",
        [
            Line(f"page at depth {depth:,}", "first page", ratios(costs, "deep", to="first"), at_most(2.5)),
            Line(
                "... of suspended tenants in production, 1 in 30",
                "first page",
                ratios(costs, "deep, filtered", to="first"),
            ),
            Line("SQLModel with OFFSET, same depth", "first page", ratios(costs, "deep by OFFSET", to="first")),
        ],
    )
