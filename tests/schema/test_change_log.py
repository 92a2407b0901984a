"""The spine: every change of a row gets the next number, is logged once, and is announced once per statement, whoever makes it."""

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime

import asyncpg
import pytest

from car_control_plane.connection import AsyncConnectionManager
from car_control_plane.models import SYSTEM_ADMIN_ID, uuid7
from tests.schema.rows import insert_database, insert_tenant, insert_tenants

LOG = "SELECT * FROM control_plane.change_log WHERE version > $1 ORDER BY version"

# Versions become visible out of order, and a lower one may even belong to a later transaction; finished transactions do not come back.
FOLLOW = """
    SELECT s.xmin, coalesce(array_agg(l.version) FILTER (WHERE l.version > $2), '{}')
    FROM (SELECT txid_snapshot_xmin(txid_current_snapshot()) AS xmin) s
        LEFT JOIN control_plane.change_log l ON l.transaction_id >= $1 AND l.transaction_id < s.xmin
    GROUP BY s.xmin
"""


async def last_version(connection: asyncpg.Connection) -> int:
    return int(await connection.fetchval("SELECT max(version) FROM control_plane.change_log"))


@asynccontextmanager
async def announcements(connection: asyncpg.Connection) -> AsyncIterator[list[dict[str, object]]]:
    """Collect the payloads of the channel; they are complete once the block has ended."""
    payloads: list[dict[str, object]] = []

    def keep(_connection: object, _pid: int, _channel: str, payload: str) -> None:
        payloads.append(json.loads(payload))

    await connection.add_listener("control_plane", keep)
    yield payloads
    await connection.fetchval("SELECT 1")  # the server sends what is due before it answers
    await connection.remove_listener("control_plane", keep)


# --- what is logged ---------------------------------------------------------------------------------------------------


async def test_insert_update_and_delete_are_logged_with_the_version_of_the_row(connection: asyncpg.Connection) -> None:
    start = await last_version(connection)
    transaction = await connection.fetchval("SELECT txid_current()")
    tenant = await insert_tenant(connection)
    version = "SELECT version FROM control_plane.tenants WHERE tenant_id = $1"
    inserted = await connection.fetchval(version, tenant)
    await connection.execute("UPDATE control_plane.tenants SET status = 'suspended' WHERE tenant_id = $1", tenant)
    updated = await connection.fetchval(version, tenant)
    await connection.execute("DELETE FROM control_plane.tenants WHERE tenant_id = $1", tenant)

    entries = await connection.fetch(LOG, start)
    assert [(entry["operation"], entry["version"]) for entry in entries[:2]] == [
        ("insert", inserted),
        ("update", updated),
    ]
    assert entries[2]["operation"] == "delete"
    assert start < inserted < updated < entries[2]["version"]
    for number, entry in enumerate(entries):
        assert (entry["table_name"], entry["row_id"], entry["tenant_id"]) == ("tenants", str(tenant), tenant)
        assert entry["transaction_id"] > transaction
        assert isinstance(entry["changed_at"], datetime)
        assert number == 0 or entry["changed_at"] >= entries[number - 1]["changed_at"]


async def test_every_table_says_whom_a_change_concerns(connection: asyncpg.Connection) -> None:
    start = await last_version(connection)
    tenant = await insert_tenant(connection)
    database = await insert_database(connection, tenant)
    await connection.execute("INSERT INTO control_plane.system_config (key, value) VALUES ('k''1', '1')")
    await connection.execute("UPDATE control_plane.tenant_databases SET port = 1")
    await connection.execute("UPDATE control_plane.system_config SET value = '2'")
    await connection.execute("DELETE FROM control_plane.tenant_databases")
    await connection.execute("DELETE FROM control_plane.system_config")
    entries = [tuple(entry)[1:5] for entry in await connection.fetch(LOG, start)]
    assert entries == [
        ("tenants", str(tenant), tenant, "insert"),
        ("tenant_databases", str(database), tenant, "insert"),
        ("system_config", "k'1", None, "insert"),
        ("tenant_databases", str(database), tenant, "update"),
        ("system_config", "k'1", None, "update"),
        ("tenant_databases", str(database), tenant, "delete"),
        ("system_config", "k'1", None, "delete"),
    ]


async def test_the_entry_belongs_to_the_transaction_of_its_change(connection: asyncpg.Connection) -> None:
    start = await last_version(connection)
    async with connection.transaction():
        transaction = await connection.fetchval("SELECT txid_current()")
        await insert_tenant(connection)
        await insert_tenant(connection)
    entries = await connection.fetch(LOG, start)
    assert {entry["transaction_id"] for entry in entries} == {transaction}

    lost = connection.transaction()
    await lost.start()
    await insert_tenant(connection)
    await lost.rollback()
    assert len(await connection.fetch(LOG, start)) == 2


async def test_an_update_that_changes_nothing_is_no_change(connection: asyncpg.Connection) -> None:
    tenant = await insert_tenant(connection)
    row = "SELECT * FROM control_plane.tenants WHERE tenant_id = $1"
    before, start = await connection.fetchrow(row, tenant), await last_version(connection)
    async with announcements(connection) as payloads:
        await connection.execute(
            "UPDATE control_plane.tenants SET name = name, labels = '{}' WHERE tenant_id = $1", tenant
        )
        await connection.execute("UPDATE control_plane.tenants SET name = 'nobody' WHERE tenant_id = $1", uuid7())
        await connection.execute("DELETE FROM control_plane.tenants WHERE tenant_id = $1", uuid7())
    assert await connection.fetchrow(row, tenant) == before
    assert await connection.fetch(LOG, start) == []
    assert payloads == []


async def test_of_many_rows_only_those_that_change_are_logged(connection: asyncpg.Connection) -> None:
    await insert_tenants(connection, 10)
    start = await last_version(connection)
    async with announcements(connection) as payloads:
        await connection.execute(
            """UPDATE control_plane.tenants SET labels = '{"a": "b"}' WHERE name LIKE 'tenant _'"""
        )
        await connection.execute(
            """UPDATE control_plane.tenants SET labels = '{"a": "b"}' WHERE name LIKE 'tenant %'"""
        )
    entries = await connection.fetch(LOG, start)
    assert len({entry["row_id"] for entry in entries}) == len(entries) == 10
    assert [payload["rows"] for payload in payloads] == [9, 1]


async def test_a_change_that_compares_equal_is_a_change(connection: asyncpg.Connection) -> None:
    """For jsonb 1 equals 1.0, but a reader is given another value."""
    await connection.execute("INSERT INTO control_plane.system_config (key, value) VALUES ('k', '1')")
    start = await last_version(connection)
    await connection.execute("UPDATE control_plane.system_config SET value = '1.0' WHERE key = 'k'")
    assert len(await connection.fetch(LOG, start)) == 1


async def test_a_large_value_rewritten_as_it_was_is_no_change(connection: asyncpg.Connection) -> None:
    """Stored out of line and compressed, it is compared by what it is."""
    large = json.dumps([random.Random(1).random() for _ in range(20_000)])
    await connection.execute("INSERT INTO control_plane.system_config (key, value) VALUES ('k', $1)", large)
    start = await last_version(connection)
    await connection.execute("UPDATE control_plane.system_config SET value = $1 WHERE key = 'k'", large)
    assert await connection.fetch(LOG, start) == []


async def test_clients_do_not_write_the_stamps(connection: asyncpg.Connection) -> None:
    start = await last_version(connection)
    tenant = uuid7()
    await connection.execute(
        "INSERT INTO control_plane.tenants (tenant_id, name, environment, version) VALUES ($1, 'n', 'staging', 1)",
        tenant,
    )
    row = "SELECT version, created_at, updated_at FROM control_plane.tenants WHERE tenant_id = $1"
    inserted = await connection.fetchrow(row, tenant)
    assert inserted["version"] > start
    await connection.execute(
        "UPDATE control_plane.tenants SET version = 1, updated_at = 'epoch' WHERE tenant_id = $1", tenant
    )
    updated = await connection.fetchrow(row, tenant)
    assert updated["version"] > inserted["version"]
    assert updated["updated_at"] > inserted["updated_at"] == inserted["created_at"] == updated["created_at"]
    assert [entry["version"] for entry in await connection.fetch(LOG, start)] == [
        inserted["version"],
        updated["version"],
    ]


async def test_updated_at_moves_within_a_transaction(connection: asyncpg.Connection) -> None:
    """By the clock, not by the transaction's start, which would put updated_at before created_at of rows that others commit meanwhile."""
    async with connection.transaction():
        await connection.execute("UPDATE control_plane.tenants SET status_reason = 'x'")
        moved = "SELECT updated_at > now() FROM control_plane.tenants WHERE tenant_id = $1"
        assert await connection.fetchval(moved, SYSTEM_ADMIN_ID)


async def test_an_upsert_is_logged_as_what_it_does(connection: asyncpg.Connection) -> None:
    start = await last_version(connection)
    upsert = (
        "INSERT INTO control_plane.system_config (key, value) SELECT key, '1' FROM unnest($1::text[]) key"
        " ON CONFLICT (key) DO UPDATE SET value = '2'"
    )
    await connection.execute(upsert, ["a"])
    async with announcements(connection) as payloads:
        await connection.execute(upsert, ["a", "b"])
        await connection.execute(upsert.replace("DO UPDATE SET value = '2'", "DO NOTHING"), ["a", "b"])
    entries = await connection.fetch(LOG, start)
    assert sorted((entry["row_id"], entry["operation"]) for entry in entries) == [
        ("a", "insert"),
        ("a", "update"),
        ("b", "insert"),
    ]
    assert {entry["version"] for entry in entries} >= {
        row["version"] for row in await connection.fetch("SELECT version FROM control_plane.system_config")
    }
    assert len(payloads) == 2


async def test_copy_is_logged(connection: asyncpg.Connection) -> None:
    start = await last_version(connection)
    rows = [(uuid7(), f"tenant {number}", "staging") for number in range(100)]
    async with announcements(connection) as payloads:
        await connection.copy_records_to_table(
            "tenants", schema_name="control_plane", columns=["tenant_id", "name", "environment"], records=rows
        )
    entries = await connection.fetch(LOG, start)
    assert {entry["tenant_id"] for entry in entries} == {row[0] for row in rows}
    assert payloads == [{"table": "tenants", "version": entries[-1]["version"], "rows": 100}]


# --- what is announced ------------------------------------------------------------------------------------------------


async def test_a_statement_is_announced_once_with_its_highest_version(connection: asyncpg.Connection) -> None:
    async with announcements(connection) as payloads:
        await insert_tenants(connection, 5_000)
        inserted = await last_version(connection)
        await connection.execute("UPDATE control_plane.tenants SET status_reason = 'x' WHERE name LIKE 'tenant %'")
        updated = await last_version(connection)
        await connection.execute("DELETE FROM control_plane.tenants WHERE name LIKE 'tenant %'")
        deleted = await last_version(connection)
    assert payloads == [
        {"table": "tenants", "version": version, "rows": 5_000} for version in (inserted, updated, deleted)
    ]


async def test_nothing_is_announced_that_was_rolled_back(connection: asyncpg.Connection) -> None:
    async with announcements(connection) as payloads:
        lost = connection.transaction()
        await lost.start()
        await insert_tenant(connection)
        await lost.rollback()
    assert payloads == []


# --- many -------------------------------------------------------------------------------------------------------------


async def test_a_large_update_after_a_small_one(connection: asyncpg.Connection) -> None:
    """The plan PL/pgSQL kept from the small one must do: with a nested loop the large one would run for minutes."""
    await insert_tenants(connection, 25_000)
    await connection.execute("UPDATE control_plane.tenants SET status_reason = 'x' WHERE name = 'tenant 1'")
    await connection.execute("SET statement_timeout = '30s'")
    start = await last_version(connection)
    await connection.execute("UPDATE control_plane.tenants SET status_reason = 'y'", timeout=60)
    assert (
        await connection.fetchval("SELECT count(*) FROM control_plane.change_log WHERE version > $1", start) == 25_001
    )


async def test_concurrent_writers_lose_and_repeat_nothing(own_database: str) -> None:
    """Five writers change the same few rows while a reader follows the log."""
    writers, rounds, rows = 5, 40, 4
    async with AsyncConnectionManager(own_database) as manager:
        connections = [await manager.connect() for _ in range(writers + 1)]
        reader = connections.pop()
        await insert_tenants(reader, rows)
        start = await last_version(reader)
        done = asyncio.Event()

        async def write(connection: asyncpg.Connection, seed: int) -> int:
            chance, changes = random.Random(seed), 0
            for number in range(rounds):
                async with connection.transaction():
                    for _ in range(chance.randint(1, 3)):
                        await connection.execute(
                            "INSERT INTO control_plane.system_config VALUES ($1, '0')", str(uuid7())
                        )
                        changes += 1
                    # one tenant per transaction, or two writers could wait for each other
                    tenant = f"tenant {1 + (seed + number) % rows}"
                    await connection.execute(
                        "UPDATE control_plane.tenants SET status_reason = $1 WHERE name = $2", str(uuid7()), tenant
                    )
                    changes += 1
                    await asyncio.sleep(chance.random() / 200)
            return changes

        async def follow() -> list[int]:
            """Read what no running transaction can add to any more, and remember how far that was."""
            seen: list[int] = []
            passed = 0
            last = None  # transactions of other databases count as running too, so the end is not reached when the writers are done
            while last is None or passed <= last:
                if done.is_set():
                    last = await reader.fetchval("SELECT max(transaction_id) FROM control_plane.change_log")
                passed, versions = await reader.fetchrow(FOLLOW, passed, start)
                seen += versions
                await asyncio.sleep(0.005)
            return seen

        following = asyncio.create_task(follow())
        changes = await asyncio.gather(*(write(connection, seed) for seed, connection in enumerate(connections)))
        done.set()
        seen = await asyncio.wait_for(following, 60)

        versions = [entry["version"] for entry in await reader.fetch(LOG, start)]
        assert len(versions) == len(set(versions)) == sum(changes)
        assert sorted(seen) == versions
        logged = await reader.fetch(
            "SELECT t.version = max(l.version) AS latest, t.version FROM control_plane.tenants t"
            " JOIN control_plane.change_log l ON l.row_id = t.tenant_id::text GROUP BY t.tenant_id"
        )
        assert all(row["latest"] for row in logged)
        for connection in [reader, *connections]:
            await connection.close()


@pytest.mark.parametrize("table", ["tenants", "tenant_databases", "system_config"])
async def test_versions_of_a_row_only_grow(connection: asyncpg.Connection, table: str) -> None:
    await insert_database(connection, await insert_tenant(connection))
    await connection.execute("INSERT INTO control_plane.system_config (key, value) VALUES ('k', '1')")
    change = {
        "tenants": "status_reason = coalesce(status_reason, '') || 'x'",
        "tenant_databases": "port = port + 1",
        "system_config": "value = to_jsonb(value::text)",
    }[table]
    versions = [await connection.fetchval(f"SELECT max(version) FROM control_plane.{table}")]
    for _ in range(3):
        versions.append(await connection.fetchval(f"UPDATE control_plane.{table} SET {change} RETURNING version"))
    assert versions == sorted(set(versions))
