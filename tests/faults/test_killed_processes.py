"""Processes killed with SIGKILL at any moment leave a database that the next one takes on: nothing half-migrated, nothing half-written."""

import asyncio
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import car_control_plane
from car_control_plane.connection import AsyncConnectionManager
from car_control_plane.migrations import check, current, downgrade, drift, upgrade
from car_control_plane.models import REVISIONS
from car_control_plane.repositories import TenantRepository

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL"),
]

ROOT = Path(car_control_plane.__file__).parents[1]
KILLS = 20


def start(url: str, *command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, "DATABASE_URL": url},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


async def killed(process: subprocess.Popen[bytes], after_seconds: float) -> bool:
    """Kill the process after a while; tell whether it was still running then."""
    await asyncio.sleep(after_seconds)
    running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return running


async def test_a_migration_killed_at_any_moment_is_taken_on_by_the_next(empty_database: str) -> None:
    caught = 0
    for number in range(KILLS):
        moment = random.Random(number).uniform(0.3, 3.0)
        caught += await killed(start(empty_database, "alembic", "upgrade", "head"), moment)
        assert await current(empty_database) in {None, *REVISIONS}
        result = await upgrade(empty_database)
        assert result.after == REVISIONS[-1]
        assert await drift(empty_database) == ()
        assert await check(empty_database) == ()
        await downgrade(empty_database, "base")
    assert caught >= KILLS // 4, "the moments must fall into the migration"


async def test_an_import_killed_at_any_moment_has_written_all_or_nothing(own_database: str, tmp_path: Path) -> None:
    rows = 30_000
    file = tmp_path / "tenants.csv"
    file.write_text("name,environment\n" + "".join(f"t{i},staging\n" for i in range(rows)))
    caught = 0
    async with AsyncConnectionManager(own_database) as manager:
        for number in range(KILLS):
            moment = random.Random(number).uniform(0.5, 4.0)
            caught += await killed(start(own_database, "car_control_plane", "tenant", "import", str(file)), moment)
            found = -1
            for _ in range(100):  # the server notices a dead client when it next reads or writes
                async with manager.get_read_session() as session:
                    found = await TenantRepository(session).count(name_prefix="t")
                if found in {0, rows}:
                    break
                await asyncio.sleep(0.1)
            assert found in {0, rows}
            async with manager.get_session() as cleaning:
                connection = await cleaning.connection()
                await connection.exec_driver_sql("DELETE FROM control_plane.tenants WHERE name LIKE 't%'")
    assert caught >= KILLS // 4, "the moments must fall into the import"
