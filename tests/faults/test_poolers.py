"""A longer hunt for wrong answers through PgBouncer, also while server connections are killed under it."""

import asyncio
import os
import random
from typing import Any

import asyncpg
import pytest

from car_control_plane import dsn as dsns
from tests.fixtures.pooled_load import run_programs
from tests.fixtures.poolers import pgbouncer

pytestmark = [pytest.mark.faults, pytest.mark.skipif(os.name == "nt", reason="PgBouncer's fixture needs a unix socket")]

SECONDS = 30


@pytest.mark.parametrize("size", [1, 2, 5])
async def test_no_answer_is_somebody_elses(server_dsn: str, own_database: str, size: int) -> None:
    with pgbouncer(server_dsn, size=size) as pooler:
        counts = await run_programs(pooler.to(own_database), own_database, SECONDS)
    assert [(one["wrong"], one["failed"]) for one in counts] == [(0, 0)] * 3, counts
    assert sum(one["right"] for one in counts) > 500


async def test_no_answer_is_somebody_elses_while_connections_are_killed(server_dsn: str, own_database: str) -> None:
    with pgbouncer(server_dsn, server_login_retry="1") as pooler:
        work = asyncio.ensure_future(run_programs(pooler.to(own_database), own_database, SECONDS))
        killed = await kill_connections(own_database, work)
        counts = await work
    assert killed > 10
    assert [one["wrong"] for one in counts] == [0] * 3, counts
    assert sum(one["right"] for one in counts) > 300
    kinds = {kind.split(": ")[1] for one in counts for kind in one["errors"]}
    assert kinds <= {"ConnectionUnavailableError"}, counts


async def kill_connections(direct: str, work: "asyncio.Future[Any]") -> int:
    """End a server connection of the pooler every now and then, until the work is done; return how many."""
    parsed, rolls, killed = dsns.parse(direct), random.Random(1), 0
    connection = await asyncpg.connect(parsed.for_host(parsed.hosts[0]), password=parsed.password)
    try:
        while not work.done():
            await asyncio.sleep(rolls.uniform(0.1, 1.0))
            killed += await connection.fetchval(
                "SELECT count(pg_terminate_backend(pid)) FROM (SELECT pid FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid() ORDER BY random() LIMIT 1) AS one"
            )
    finally:
        await connection.close()
    return killed
