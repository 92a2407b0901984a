"""Compares ways of doing the same thing, side by side in one run.

A time depends on the machine, the moment and the neighbours; a ratio of two times taken right after each other depends on them much less. So every
way is run once in each round, the order turns around from round to round, and what is reported is the ratio within a round: the median of all rounds,
with the lowest and the highest. Before each run the garbage of the one before is collected; during it the collector works as it always does.

A benchmark is a group: an async function that takes a `Bench` and returns a `Table`. This module knows none of them before `main` runs.
"""

import argparse
import asyncio
import gc
import importlib
import json
import os
import platform
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar

import asyncpg

from car_control_plane import dsn as dsns
from car_control_plane.embedded import EmbeddedPostgres

ROOT = Path(__file__).resolve().parents[1]

GROUPS = ("bulk", "connecting", "direct", "listing", "memory", "rotation", "sealing", "sessions", "single", "imports")
PACKAGES = ("sqlmodel", "sqlalchemy", "asyncpg", "pydantic", "cryptography", "advanced-alchemy")

# A server that keeps its promises (fsync and all), but does no work of its own while something is measured.
SERVER_SETTINGS = {"autovacuum": "off", "max_wal_size": "8GB", "checkpoint_timeout": "1h"}

T = TypeVar("T")

Way = Callable[[], Awaitable[float]]
"""Does the work once and returns what it cost: seconds, or bytes."""

Costs = Mapping[str, Sequence[float]]


# --- what is reported -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Goal:
    """What a figure has to be."""

    bound: Literal["≤", "≥"]
    limit: float

    def met(self, figure: float) -> bool:
        return figure <= self.limit if self.bound == "≤" else figure >= self.limit


def at_most(limit: float) -> Goal:
    return Goal("≤", limit)


def at_least(limit: float) -> Goal:
    return Goal("≥", limit)


@dataclass(frozen=True, slots=True)
class Line:
    """One comparison: its figure in each round, and the goal for their median, if there is one."""

    what: str
    against: str
    figures: Sequence[float]
    goal: Goal | None = None
    unit: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.figures)

    @property
    def verdict(self) -> str:
        return "" if self.goal is None else "ok" if self.goal.met(self.median) else "missed"

    def cells(self) -> tuple[str, ...]:
        goal = "" if self.goal is None else f"{self.goal.bound} {self.goal.limit:g}{self.unit}"
        span = f" ({min(self.figures):.2f} to {max(self.figures):.2f})" if len(self.figures) > 1 else ""
        return self.what, self.against, goal, f"**{self.median:.2f}**{span}{self.unit}", self.verdict

    def data(self) -> dict[str, Any]:
        goal = None if self.goal is None else f"{self.goal.bound} {self.goal.limit:g}"
        return {**asdict(self), "goal": goal, "median": self.median, "verdict": self.verdict}


@dataclass(frozen=True, slots=True)
class Table:
    """The lines of a group, under a title; `note` says what they count and how."""

    title: str
    note: str
    lines: Sequence[Line]

    def markdown(self) -> str:
        rows = [
            ("", "against", "goal", "median (lowest to highest)", ""),
            ("---",) * 5,
            *(line.cells() for line in self.lines),
        ]
        return "\n".join([f"### {self.title}", "", *(f"| {' | '.join(row)} |" for row in rows), "", self.note, ""])


def ratios(costs: Costs, way: str, *, to: str) -> list[float]:
    """Return, round by round, how many times as much as `to` a way costs."""
    return [cost / yardstick for cost, yardstick in zip(costs[way], costs[to], strict=True)]


# --- how it is measured -----------------------------------------------------------------------------------------------


async def interleaved(ways: Mapping[str, Way], rounds: int, *, slices: int = 1) -> Costs:
    """Run every way once in each round, in turning order, and return their costs by round.

    A round of several slices goes through the ways so many times and adds up: short bursts of each, so that a noisy moment meets them all.
    """
    costs: dict[str, list[float]] = {name: [] for name in ways}
    gc.collect()
    gc.freeze()  # neither the input nor what is loaded is anybody's garbage
    try:
        for number in range(rounds):
            cost = dict.fromkeys(ways, 0.0)
            for slice_ in range(slices):
                for name in list(ways) if (number + slice_) % 2 == 0 else reversed(list(ways)):
                    gc.collect()
                    cost[name] += await ways[name]()
            for name in ways:
                costs[name].append(cost[name])
    finally:
        gc.unfreeze()
    return costs


async def timed(work: Awaitable[Any]) -> float:
    """Return the seconds the work takes."""
    started = time.perf_counter()
    await work
    return time.perf_counter() - started


async def spread(work: Callable[[T], Awaitable[Any]], items: Iterable[T], workers: int) -> None:
    """Do the work for every item, by so many tasks at once."""
    waiting = iter(items)

    async def worker() -> None:
        for item in waiting:
            await work(item)

    await asyncio.gather(*(worker() for _ in range(workers)))


def last_json(*command: str, environment: Mapping[str, str] | None = None) -> Any:
    """Run a Python process of its own and return what the last line it prints says, as JSON."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


# --- what it is measured on -------------------------------------------------------------------------------------------

# Rows as after some months of service: ids and times in order of creation, names not; one in ten suspended.
_FILL = """
INSERT INTO control_plane.tenants (tenant_id, name, environment, status, created_at, updated_at, labels, version)
SELECT (lpad(to_hex(1735689600000 + i * 10), 12, '0') || '7' || substr(md5(i::text), 1, 3) || '8' || substr(md5(i::text), 4, 15))::uuid,
    substr(md5(i::text), 1, 2) || '-tenant-' || i,
    (ARRAY['production', 'staging', 'development'])[1 + i % 3]::control_plane.tenant_environment,
    (CASE i % 10 WHEN 0 THEN 'suspended' WHEN 1 THEN 'pending' ELSE 'active' END)::control_plane.tenant_status,
    to_timestamp(1735689600 + i * 0.01), to_timestamp(1735689600 + i * 0.01),
    json_build_object('plan', CASE WHEN i % 100 = 0 THEN 'enterprise' ELSE 'basic' END, 'region', 'r' || i % 7)::jsonb,
    nextval('control_plane.version_seq')
FROM generate_series(1, {rows}) AS i
"""


async def connect(dsn: str) -> asyncpg.Connection:
    """Open a connection as anybody would who has asyncpg and nothing else."""
    parsed = dsns.parse(dsn)
    secret = {} if parsed.password is None else {"password": parsed.password}
    return await asyncpg.connect(parsed.for_host(parsed.hosts[0]), **secret)


@asynccontextmanager
async def connected(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await connect(dsn)
    try:
        yield connection
    finally:
        await connection.close()


class Bench:
    """What a group is given: how many rounds, how large, and databases to work on."""

    def __init__(self, dsn: str, *, rounds: int, quick: bool) -> None:
        self.rounds = rounds
        self._dsn = dsn
        self._quick = quick
        self._filled: dict[int, str] = {}

    def size(self, full: int) -> int:
        """Return how many of something to take; a hundredth in a quick run."""
        return max(full // 100, 10) if self._quick else full

    def slices(self, full: int) -> int:
        """Return in how many slices to do a round; in one in a quick run."""
        return 1 if self._quick else full

    @asynccontextmanager
    async def fresh(self) -> AsyncIterator[str]:
        """Give a database that was just migrated, and drop it afterwards."""
        template = await self.filled(0)
        dsn = await self._create(template=template)
        try:
            yield dsn
        finally:
            await self._drop(dsn)

    async def filled(self, rows: int) -> str:
        """Give a database with so many tenants; the same one to all who ask."""
        from car_control_plane.migrations import upgrade

        if rows not in self._filled:
            self._filled[rows] = dsn = await self._create()
            await upgrade(dsn)
            async with connected(dsn) as connection:
                await connection.execute("ALTER TABLE control_plane.tenants DISABLE TRIGGER USER")
                await connection.execute(_FILL.format(rows=rows))
                await connection.execute("ALTER TABLE control_plane.tenants ENABLE TRIGGER USER")
                await connection.execute("VACUUM (ANALYZE) control_plane.tenants")
        return self._filled[rows]

    async def close(self) -> None:
        """Drop the databases that were given to several."""
        for dsn in self._filled.values():
            await self._drop(dsn)

    async def _create(self, *, template: str | None = None) -> str:
        name = f"car_cp_bench_{secrets.token_hex(6)}"
        source = "" if template is None else f" TEMPLATE {dsns.parse(template).database}"
        async with connected(self._dsn) as connection:
            await connection.execute(f"CREATE DATABASE {name}{source}")
        return dsns.parse(self._dsn).replace(database=name).reveal()

    async def _drop(self, dsn: str) -> None:
        name = dsns.parse(dsn).database
        async with connected(self._dsn) as connection:
            await connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", name)
            await connection.execute(f"DROP DATABASE {name}")


# --- the command ------------------------------------------------------------------------------------------------------


def main() -> int:
    """Run the groups named on the command line, all by default, and print their tables; figures never make it fail."""
    parser = argparse.ArgumentParser(prog="benchmarks/run", description=main.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"groups to run: {', '.join(GROUPS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=7, help="how often everything is measured (default: 7)")
    parser.add_argument(
        "--quick", action="store_true", help="a hundredth of the size: shows that it runs, measures nothing"
    )
    parser.add_argument("--dsn", help="a server where databases may be created (default: an embedded, durable one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    given = parser.parse_args()
    if strangers := sorted(set(given.names) - set(GROUPS)):
        parser.error(f"there is no group {strangers[0]!r}; there are {', '.join(GROUPS)}")
    if given.rounds < 1:
        parser.error("--rounds must be at least 1")
    names = [name for name in GROUPS if name in given.names or not given.names]
    if given.dsn:
        tables, facts = asyncio.run(_measure(given.dsn, "", names, given.rounds, quick=given.quick))
    else:
        with EmbeddedPostgres(durable=True, settings=SERVER_SETTINGS) as server:
            kind = " (embedded, durable, no autovacuum)"
            tables, facts = asyncio.run(_measure(server.dsn(), kind, names, given.rounds, quick=given.quick))
    if given.json:
        groups = {name: [line.data() for line in table.lines] for name, table in tables.items()}
        given.json.write_text(json.dumps({"facts": facts, "groups": groups}, indent=2) + "\n", encoding="utf-8")
    return 0


async def _measure(
    dsn: str, kind: str, names: Sequence[str], rounds: int, *, quick: bool
) -> tuple[dict[str, Table], dict[str, Any]]:
    async with connected(dsn) as connection:
        server = str(await connection.fetchval("SHOW server_version")).split()[0]
    versions = {"Python": platform.python_version(), "PostgreSQL": f"{server}{kind}"}
    versions |= {name: version(name) for name in PACKAGES}
    facts = {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "rounds": rounds,
        "quick": quick,
        "versions": versions,
    }
    said = ", ".join(f"{name} {number}" for name, number in versions.items())
    print(f"{facts['date']}, {facts['cores']} cores, {rounds} rounds{', quick' if quick else ''}; {said}\n", flush=True)
    bench = Bench(dsn, rounds=rounds, quick=quick)
    tables: dict[str, Table] = {}
    try:
        for name in names:
            tables[name] = await importlib.import_module(f"benchmarks.{name}").measure(bench)
            print(tables[name].markdown(), flush=True)
    finally:
        await bench.close()
    return tables, facts
