"""A connection that is new: opening it, and the first row from it."""

import time
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
from sqlalchemy import NullPool
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlmodel import SQLModel, col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from benchmarks.baselines import PlainTenant
from benchmarks.harness import Bench, Line, Table, Way, at_most, connect, interleaved, ratios
from car_control_plane import AsyncConnectionManager, Tenant
from car_control_plane.models import SYSTEM_ADMIN_ID

SLICES = 40
_NATIVE = "SELECT * FROM control_plane.tenants WHERE tenant_id = $1"


async def measure(bench: Bench) -> Table:
    dsn = await bench.filled(0)
    async with AsyncConnectionManager(dsn) as manager:
        ours = manager.create_engine()
        stock = create_async_engine("postgresql+asyncpg://", async_creator=lambda: connect(dsn), poolclass=NullPool)
        by_id = select(Tenant).where(col(Tenant.tenant_id) == SYSTEM_ADMIN_ID)
        ways = {
            "asyncpg": _read(lambda: connect(dsn), _NATIVE),
            "asyncpg, connect": _read(lambda: connect(dsn), None),
            "ours": _read(manager.connect, str(by_id.compile(dialect=ours.dialect))),
            "ours, connect": _read(manager.connect, None),
            "stock session": _session(stock, PlainTenant),
            "our session": _session(ours, Tenant),
        }
        await interleaved(ways, 2)
        costs = await interleaved(ways, bench.rounds, slices=bench.slices(SLICES))
        await ours.dispose()
        await stock.dispose()
    return Table(
        "A new connection",
        "Time of opening one and reading the first tenant from it, which makes asyncpg ask about every type it does not know. Each time a connection of its own.",
        [
            Line(
                "connect, read by a statement of ours",
                "asyncpg, native enums",
                ratios(costs, "ours", to="asyncpg"),
                at_most(0.5),
            ),
            Line("connect", "asyncpg", ratios(costs, "ours, connect", to="asyncpg, connect")),
            Line(
                "connect, `session.get`",
                "stock SQLModel, native enums",
                ratios(costs, "our session", to="stock session"),
            ),
        ],
    )


def _read(connecting: Callable[[], Awaitable[asyncpg.Connection]], statement: str | None) -> Way:
    async def run() -> float:
        started = time.perf_counter()
        connection = await connecting()
        if statement is not None:
            assert await connection.fetchrow(statement, SYSTEM_ADMIN_ID) is not None
        cost = time.perf_counter() - started
        await connection.close()
        return cost

    return run


def _session(engine: AsyncEngine, model: type[SQLModel]) -> Way:
    async def run() -> float:
        started = time.perf_counter()
        async with AsyncSession(engine) as session:
            row: Any = await session.get(model, SYSTEM_ADMIN_ID)
            assert row is not None
        return time.perf_counter() - started

    return run
