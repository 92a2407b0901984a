"""Register tenants by the hundred thousand from a file, in memory that does not grow: python examples/import_tenants.py"""

import asyncio
import csv
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from car_control_plane import AsyncConnectionManager, TenantRepository
from car_control_plane.migrations import upgrade

ROWS = 100_000


def write_example(path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "environment"])
        writer.writerows((f"tenant-{i}", "production") for i in range(ROWS))
        writer.writerow(["tenant-7", "production"])  # a name that is taken


def read(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(newline="") as file:
        yield from csv.DictReader(file)


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tenants.csv"
        write_example(path)
        async with AsyncConnectionManager(os.environ.get("DATABASE_URL", "embedded:")) as manager:
            await upgrade(manager)
            started = time.perf_counter()
            async with manager.get_session() as session:
                result = await TenantRepository(session).create_many(read(path), on_conflict="skip")
            print(f"created {result.created}, skipped {result.skipped}, in {time.perf_counter() - started:.1f} s")
            for conflict in result.conflicts:
                print(f"line {conflict.index + 2}: {conflict.name!r} is taken")


if __name__ == "__main__":
    asyncio.run(main())
