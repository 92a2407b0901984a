"""How fast `rotate_keys` seals a million connection strings anew, in how much memory, and what a writer beside it notices.

Run as a program, this module is what is measured: one process fills, one rotates, one writes, each on connections of its own.
"""

import asyncio
import json
import os
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from benchmarks.harness import ROOT, Bench, Line, Table, at_least, at_most, connect, connected, last_json
from benchmarks.memory import MIB, memory

DATABASES = 1_000_000
FILLERS = 2
WRITER_SECONDS = 20.0

TENANT_COLUMNS = ("tenant_id", "name", "environment", "version")
DATABASE_COLUMNS = ("id", "tenant_id", "connection_string_encrypted", "database_name", "host", "version")


async def measure(bench: Bench) -> Table:
    from car_control_plane import Key

    rows = bench.size(DATABASES)
    rates, slowdowns, growths, notes = [], [], [], []
    async with bench.fresh() as dsn:
        key = Key.generate("round-0")
        await _fill(dsn, rows, key.to_base64())
        for number in range(1, min(bench.rounds, 3) + 1):
            former, key = key, Key.generate(f"round-{number}")
            keys = f"{key.kid}:{key.to_base64()},{former.kid}:{former.to_base64()}"
            await _vacuum(dsn)
            async with _writer(dsn, keys) as stop:
                await asyncio.sleep(WRITER_SECONDS if rows == DATABASES else 1)
                alone = await stop()
            async with _writer(dsn, keys) as stop:
                rotated = await asyncio.to_thread(_program_json, "rotate", dsn, keys)
                beside = await stop()
            assert rotated["remaining"] == rotated["failed"] == 0
            rates.append(rotated["rotated"] / rotated["seconds"])
            slowdowns.append(beside["p99"] / alone["p99"])
            growths.append((rotated["peak"] - rotated["start"]) / MIB)
            notes.append(
                f"p50 {alone['p50']:.1f} and {beside['p50']:.1f} ms, p99 {alone['p99']:.1f} and {beside['p99']:.1f} ms, "
                f"slowest {alone['max']:.0f} and {beside['max']:.0f} ms, {alone['rate']:,.0f} and {beside['rate']:,.0f} writes a second; "
                f"{rotated['cpu'] / rotated['rotated'] * 1e6:.0f} microseconds of processor a row in the rotating process, load average {rotated['load']:.1f}"
            )
    return Table(
        f"Rotating {rows:,} connection strings",
        "The writer stores strings one by one, as fast as it can, in rows chosen at random; it runs alone for a while, and then beside the rotation. "
        f"Its times alone and beside: {'; '.join(notes)}.",
        [
            Line("`rotate_keys` beside a writer", "", rates, at_least(5_000), " rows/s"),
            Line("the writer's p99 beside it", "alone", slowdowns, at_most(3)),
            Line("memory of the rotating process, peak", "its start", growths, at_most(30), " MiB"),
        ],
    )


def _program_json(*arguments: str) -> Any:
    *what, keys = arguments
    return last_json("-m", "benchmarks.rotation", *what, environment={"BENCHMARK_KEYS": keys})


async def _fill(dsn: str, rows: int, key: str) -> None:
    tables = ("tenants", "tenant_databases")
    async with connected(dsn) as connection:
        for table in tables:
            await connection.execute(f"ALTER TABLE control_plane.{table} DISABLE TRIGGER USER")
        each = [str(len(range(number, rows, FILLERS))) for number in range(FILLERS)]
        await asyncio.gather(*(asyncio.to_thread(_program_json, "fill", dsn, count, key) for count in each))
        for table in tables:
            await connection.execute(f"ALTER TABLE control_plane.{table} ENABLE TRIGGER USER")


async def _vacuum(dsn: str) -> None:
    """Do what autovacuum would: each rotation leaves a dead row for every row."""
    async with connected(dsn) as connection:
        await connection.execute("VACUUM (ANALYZE) control_plane.tenant_databases", timeout=600)
        await connection.execute("CHECKPOINT", timeout=600)


@asynccontextmanager
async def _writer(dsn: str, keys: str) -> AsyncIterator[Callable[[], Any]]:
    """Run a writer; the function given ends it and returns its times."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.rotation", "write", dsn),
        cwd=ROOT,
        env={**os.environ, "BENCHMARK_KEYS": keys},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )

    async def stop() -> Any:
        said, _ = await process.communicate(b"")  # the end of its input ends it
        return json.loads(said.decode().splitlines()[-1])

    try:
        assert process.stdout is not None
        await process.stdout.readline()  # it has begun
        yield stop
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


# --- what runs in a process of its own --------------------------------------------------------------------------------


async def fill(dsn: str, count: int, key_text: str) -> dict[str, Any]:
    from car_control_plane import Key, uuid7
    from car_control_plane.encryption.envelope import connection_string_context, seal

    key = Key.from_base64("round-0", key_text)
    connection = await connect(dsn)
    for first in range(0, count, 10_000):
        pairs = [(uuid7(), uuid7()) for _ in range(first, min(first + 10_000, count))]
        await connection.copy_records_to_table(
            "tenants",
            schema_name="control_plane",
            columns=TENANT_COLUMNS,
            records=[(tenant, str(tenant), "production", 1) for tenant, _ in pairs],
        )
        await connection.copy_records_to_table(
            "tenant_databases",
            schema_name="control_plane",
            columns=DATABASE_COLUMNS,
            records=[
                (id, tenant, seal(key, _text(id), connection_string_context(tenant, id)), f"t_{id}", "db.example", 1)
                for tenant, id in pairs
            ],
        )
    await connection.close()
    return {"rows": count}


def _text(id: object) -> str:
    return f"postgresql://app:correct-horse-battery-staple@db-17.internal.example:5432/t_{id}?sslmode=verify-full"


async def rotate(dsn: str, keys: str) -> dict[str, Any]:
    from car_control_plane import AsyncConnectionManager, Keyring, StaticKeys
    from car_control_plane.rotation import RotationProgress, rotate_keys

    started = start = 0.0

    def progress(step: RotationProgress) -> None:
        nonlocal start
        if not start and step.done:
            start = memory("VmRSS")

    async with AsyncConnectionManager(dsn) as manager, Keyring(StaticKeys(keys)) as keyring:
        started = time.perf_counter()
        result = await rotate_keys(manager, keyring, progress=progress)
        seconds = time.perf_counter() - started
    return {
        "rotated": result.rotated,
        "lost_races": result.lost_races,
        "failed": result.failed_count,
        "remaining": result.remaining,
        "seconds": seconds,
        "cpu": time.process_time(),
        "load": os.getloadavg()[0],
        "start": start,
        "peak": memory("VmHWM"),
    }


async def write(dsn: str, keys: str) -> dict[str, Any]:
    from car_control_plane import Keyring, StaticKeys

    ending = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    connection = await connect(dsn)
    rows = await connection.fetch("SELECT id, tenant_id FROM control_plane.tenant_databases TABLESAMPLE SYSTEM (5)")
    rows = rows or await connection.fetch("SELECT id, tenant_id FROM control_plane.tenant_databases")
    choose = random.Random(1)
    keyring = Keyring(StaticKeys(keys))
    times: list[float] = []
    print("ready", flush=True)
    began = time.perf_counter()
    while not ending.done():
        id, tenant = choose.choice(rows)
        sealed = await keyring.seal(_text(id), tenant_id=tenant, database_id=id)
        started = time.perf_counter()
        await connection.execute(
            "UPDATE control_plane.tenant_databases SET connection_string_encrypted = $2 WHERE id = $1", id, sealed.text
        )
        times.append((time.perf_counter() - started) * 1000)
    ran = time.perf_counter() - began
    await connection.close()
    cuts = statistics.quantiles(times, n=100)
    return {"p50": cuts[49], "p99": cuts[98], "max": max(times), "rate": len(times) / ran}


if __name__ == "__main__":
    what, dsn, *more = sys.argv[1:]
    keys = os.environ["BENCHMARK_KEYS"]
    if what == "fill":
        outcome = asyncio.run(fill(dsn, int(more[0]), keys))
    else:
        outcome = asyncio.run(rotate(dsn, keys) if what == "rotate" else write(dsn, keys))
    print(json.dumps(outcome))
