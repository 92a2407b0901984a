"""Registering many tenants at once: `create_many`, COPY, and the ORM."""

import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from sqlmodel.ext.asyncio.session import AsyncSession

from benchmarks.baselines import PlainTenant, plain_engine
from benchmarks.harness import Bench, Costs, Line, Table, Way, at_least, at_most, connected, interleaved, ratios, timed
from car_control_plane import AsyncConnectionManager, TenantCreate, TenantRepository, uuid7

TENANTS = 100_000
TAKEN_EVERY = 100
"""Of how many tenants one is there already, where conflicts are to be reported."""

Rows = Sequence[dict[str, Any]]


async def measure(bench: Bench) -> Table:
    rows = _rows(bench.size(TENANTS))
    await interleaved(_ways(bench, rows[:TAKEN_EVERY]), 1)
    return _table(await interleaved(_ways(bench, rows), bench.rounds), len(rows))


def _table(costs: Costs, count: int) -> Table:
    return Table(
        f"Registering {count:,} tenants",
        "Time up to and with the commit, each into a newly migrated database: same rows, triggers and indexes. COPY and the ORM report no conflicts; "
        f'"some taken": the names of 1 in {TAKEN_EVERY} are there already, under other ids.',
        [
            Line("`create_many` of `TenantCreate`", "bare COPY", ratios(costs, "tenants", to="copy"), at_most(2)),
            Line("... some taken", "bare COPY", ratios(costs, "some taken", to="copy")),
            Line("... of mappings, which it validates", "bare COPY", ratios(costs, "mappings", to="copy")),
            Line(
                "ORM `add_all` of mappings",
                "`create_many` of mappings",
                ratios(costs, "orm", to="mappings"),
                at_least(6),
            ),
            Line(
                "ORM `add_all` of mappings",
                "`create_many` of `TenantCreate`",
                ratios(costs, "orm", to="tenants"),
                at_least(6),
            ),
        ],
    )


def _rows(count: int) -> Rows:
    environments = ("production", "staging", "development")
    return [
        {
            "tenant_id": uuid7(),
            "name": f"tenant-{number:07d}",
            "environment": environments[number % 3],
            "status": "pending",
            "labels": {"plan": "basic", "region": f"r{number % 7}"} if number % 2 else {},
        }
        for number in range(count)
    ]


def _ways(bench: Bench, rows: Rows) -> dict[str, Way]:
    tenants = [TenantCreate.model_validate(row) for row in rows]
    records = [(*list(row.values())[:-1], json.dumps(row["labels"])) for row in rows]

    async def copy(dsn: str) -> float:
        async with connected(dsn) as connection:
            return await timed(
                connection.copy_records_to_table(
                    "tenants", schema_name="control_plane", columns=list(rows[0]), records=records
                )
            )

    async def orm(dsn: str) -> float:
        async def add_all() -> None:
            async with AsyncSession(engine, expire_on_commit=False) as session:
                session.add_all([PlainTenant(**row) for row in rows])
                await session.commit()

        engine = plain_engine(dsn, connections=1)
        async with engine.connect():  # connecting is not what is measured
            pass
        seconds = await timed(add_all())
        await engine.dispose()
        return seconds

    def create_many(given: Sequence[Any], *, taken: Rows = ()) -> Callable[[str], Awaitable[float]]:
        async def run(dsn: str) -> float:
            async def create() -> None:
                async with manager.get_session() as session:
                    result = await TenantRepository(session).create_many(given, on_conflict="skip")
                assert (result.created, result.skipped) == (len(given) - len(taken), len(taken))

            async with AsyncConnectionManager(dsn) as manager:
                async with manager.get_session() as session:  # connects, too
                    await session.connection()
                    await TenantRepository(session).create_many([{**row, "tenant_id": uuid7()} for row in taken])
                return await timed(create())

        return run

    def on_a_fresh_database(work: Callable[[str], Awaitable[float]]) -> Way:
        async def run() -> float:
            async with bench.fresh() as dsn:
                return await work(dsn)

        return run

    ways = {
        "copy": copy,
        "tenants": create_many(tenants),
        "mappings": create_many(rows),
        "some taken": create_many(tenants, taken=rows[::TAKEN_EVERY]),
        "orm": orm,
    }
    return {name: on_a_fresh_database(work) for name, work in ways.items()}
