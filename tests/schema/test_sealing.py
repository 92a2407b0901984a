"""Sealed connection strings in the database: what the column takes, what rotation's marker hides, and the rules of keys, whoever asks."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from car_control_plane import migrations
from car_control_plane.connection import AsyncConnectionManager
from car_control_plane.encryption import KeyState, SealedConnectionString
from car_control_plane.errors import (
    ConflictError,
    InvalidDataError,
    MigrationError,
    ProtectedError,
    StillReferencedError,
    UnknownKeyError,
    translate,
)
from car_control_plane.migrations import check, current, downgrade, drift, upgrade
from car_control_plane.models import REVISIONS, uuid7
from tests.schema.rows import insert_database, insert_key, insert_tenant, insert_tenants
from tests.schema.test_change_log import LOG, announcements, last_version
from tests.schema.test_rules import refusal

BEFORE, SEALING = REVISIONS[1], "003_sealed_connection_strings"
CANARY = "c4n4ry-s3cr3t"
RESEAL = "UPDATE control_plane.tenant_databases SET connection_string_encrypted = $2 WHERE id = $1"


@pytest.fixture
async def before(empty_database: str) -> AsyncIterator[asyncpg.Connection]:
    """A database at the revision before this one."""
    await upgrade(empty_database, BEFORE)
    async with AsyncConnectionManager(empty_database) as manager:
        connection = await manager.connect()
        yield connection
        await connection.close()


async def catalog(connection: asyncpg.Connection) -> dict[tuple[str, str], str]:
    return await migrations._catalog(connection)


async def insert_text(connection: asyncpg.Connection, text: str) -> uuid.UUID:
    """Insert a tenant database that holds this text; works before and after the revision."""
    database = uuid7()
    await connection.execute(
        "INSERT INTO control_plane.tenant_databases (id, tenant_id, connection_string_encrypted, database_name, host)"
        " VALUES ($1, $2, $3, 'd', 'h')",
        database,
        await insert_tenant(connection),
        text,
    )
    return database


# --- what the column takes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "ccp1:k1:c2VhbGVk",
        f"ccp1:{'k' * 32}:A",
        "ccp1:-:-_",
        "",
        "ccp1:",
        "ccp1::A",
        "ccp1:k1:",
        "ccp1:k1",
        "ccp1:K1:A",
        f"ccp1:{'k' * 33}:A",
        "ccp1:k1:A=",
        "ccp1:k1:A+/",
        "ccp1:k1:A\n",
        "\nccp1:k1:A",
        "ccp1:k1:A\nccp1:k1:A",
        "ccp1:k1:A:B",
        "ccp1:k1:\u00e9",
        "ccp1:\u0661:A",
        "ccp2:k1:A",
        "CCP1:k1:A",
        " ccp1:k1:A",
        f"postgresql://u:{CANARY}@h/d",
    ],
)
async def test_the_column_takes_what_python_takes_for_sealed(rolled_back: asyncpg.Connection, text: str) -> None:
    database = await insert_text(rolled_back, "ccp1:k2:AAAA")
    if SealedConnectionString(text).kid is not None:
        await rolled_back.execute(RESEAL, database, text)
        return
    error = await refusal(rolled_back, RESEAL, database, text)
    assert (error.sqlstate, error.constraint_name) == ("23514", "ck_tenant_databases_sealed")
    translated = translate(error)
    assert isinstance(translated, InvalidDataError)
    assert "not sealed" in translated.message
    assert CANARY not in f"{translated!r} {translated} {translated.details}"


async def test_rows_are_found_by_key_and_id_through_the_index(connection: asyncpg.Connection) -> None:
    """With statistics of its own: those of a database that others write to say what the others left."""
    await insert_tenants(connection, 2_000)
    await connection.execute(
        "INSERT INTO control_plane.tenant_databases (id, tenant_id, connection_string_encrypted, database_name, host)"
        " SELECT tenant_id, tenant_id, CASE WHEN left(tenant_id::text, 2) = '00' THEN 'ccp1:k1:AAAA' ELSE 'ccp1:k2:AAAA' END, 'd', 'h'"
        " FROM control_plane.tenants"
    )
    await connection.execute("ANALYZE control_plane.tenant_databases")
    await connection.execute("SET enable_seqscan = off; SET enable_bitmapscan = off; SET enable_sort = off")
    for query, index in (
        (
            "SELECT id FROM control_plane.tenant_databases WHERE split_part(connection_string_encrypted, ':', 2) = 'k1'"
            " AND id > '00000000-0000-7000-8000-000000000001' ORDER BY id LIMIT 1000",
            "idx_tenant_databases_kid_id",
        ),
        (
            "SELECT id FROM control_plane.tenant_databases"
            " WHERE (created_at, id) > (now(), '00000000-0000-7000-8000-000000000001') ORDER BY created_at, id LIMIT 50",
            "idx_tenant_databases_created_at_id",
        ),
    ):
        plan = "\n".join(row[0] for row in await connection.fetch(f"EXPLAIN (COSTS off) {query}"))
        assert index in plan
        assert "Sort" not in plan


# --- the migration ----------------------------------------------------------------------------------------------------


async def test_rows_that_hold_other_text_stop_the_migration(before: asyncpg.Connection, empty_database: str) -> None:
    sealed = await insert_text(before, "ccp1:k1:c2VhbGVk")
    plain = [await insert_text(before, f"postgresql://u:{CANARY}@h/d"), await insert_text(before, CANARY)]
    with pytest.raises(MigrationError) as caught:
        await upgrade(empty_database)
    error = caught.value
    assert error.message.startswith(f"{SEALING} failed: 2 rows of control_plane.tenant_databases hold text that is no")
    for told in (repr(error), str(error), str(error.details), repr(error.__cause__), repr(error.__context__)):
        assert CANARY not in told
    assert await current(empty_database) == BEFORE
    assert await before.fetchval("SELECT count(*) FROM control_plane.tenant_databases") == 3

    query = error.message.partition("To find the rows: ")[2].partition(";")[0]
    assert sorted(row["id"] for row in await before.fetch(query)) == sorted(plain)
    await before.execute("DELETE FROM control_plane.tenant_databases WHERE id = ANY ($1)", plain)
    assert (await upgrade(empty_database)).revisions == REVISIONS[2:]
    assert [row["id"] for row in await before.fetch("SELECT id FROM control_plane.tenant_databases")] == [sealed]


async def test_the_migration_changes_no_row(before: asyncpg.Connection, empty_database: str) -> None:
    await insert_text(before, "ccp1:k1:c2VhbGVk")
    row, start = await before.fetchrow("SELECT * FROM control_plane.tenant_databases"), await last_version(before)
    await upgrade(empty_database, SEALING)
    after = await before.fetchrow("SELECT * FROM control_plane.tenant_databases")
    assert dict(after) == dict(row) | dict.fromkeys(
        ["verified_at", "server_version", "tls_version", "verification_error"]
    )
    assert await last_version(before) == start


async def test_the_constraint_is_valid(rolled_back: asyncpg.Connection) -> None:
    """NOT VALID would let a row of before be read, but never be changed again."""
    assert await rolled_back.fetch("SELECT conname FROM pg_constraint WHERE NOT convalidated") == []


async def test_downgrading_makes_the_schema_what_it_was(before: asyncpg.Connection, empty_database: str) -> None:
    expected = await catalog(before)
    await insert_text(before, "ccp1:k1:c2VhbGVk")
    await upgrade(empty_database, SEALING)
    await insert_key(before, "k1")
    assert await catalog(before) != expected
    assert (await downgrade(empty_database)).after == BEFORE
    assert await catalog(before) == expected
    start = await last_version(before)
    await before.execute("SET control_plane.resealing = on")
    await before.execute("UPDATE control_plane.tenant_databases SET connection_string_encrypted = 'ccp1:k2:AAAA'")
    assert len(await before.fetch(LOG, start)) == 1
    await upgrade(empty_database)
    assert await drift(empty_database) == ()
    assert await check(empty_database) == ()


async def test_downgrading_does_not_throw_keys_away_that_rows_need(
    own_database: str, connection: asyncpg.Connection
) -> None:
    await insert_key(connection, "k1", state="retired")
    await insert_key(connection, "k2", state="current")
    await insert_text(connection, "ccp1:k1:c2VhbGVk")
    with pytest.raises(MigrationError, match=r"holds the keys of 1 rows .*delete those rows first \(SQLSTATE 2BP01\)"):
        await downgrade(own_database, BEFORE)
    assert await current(own_database) == SEALING
    await upgrade(own_database)
    assert await drift(own_database) == ()
    await connection.execute("DELETE FROM control_plane.tenant_databases")
    assert (await downgrade(own_database, BEFORE)).after == BEFORE


# --- rotation's marker ------------------------------------------------------------------------------------------------


@pytest.fixture
async def database(connection: asyncpg.Connection) -> uuid.UUID:
    return await insert_text(connection, "ccp1:k1:c2VhbGVk")


async def row_of(connection: asyncpg.Connection, database: uuid.UUID) -> dict[str, Any]:
    return dict(await connection.fetchrow("SELECT * FROM control_plane.tenant_databases WHERE id = $1", database))


async def mark(connection: asyncpg.Connection, value: str = "on") -> None:
    await connection.execute("SELECT set_config('control_plane.resealing', $1, true)", value)


async def test_a_new_key_under_the_marker_is_no_change(connection: asyncpg.Connection, database: uuid.UUID) -> None:
    row, start = await row_of(connection, database), await last_version(connection)
    async with announcements(connection) as payloads, connection.transaction():
        await mark(connection)
        assert await connection.execute(RESEAL, database, "ccp1:k2:bmV3") == "UPDATE 1"
    assert await row_of(connection, database) == {**row, "connection_string_encrypted": "ccp1:k2:bmV3"}
    assert await connection.fetch(LOG, start) == []
    assert payloads == []


@pytest.mark.parametrize("marker", [None, "off", "", "ON", "true"])
async def test_without_the_marker_it_is_one(
    connection: asyncpg.Connection, database: uuid.UUID, marker: str | None
) -> None:
    row, start = await row_of(connection, database), await last_version(connection)
    async with connection.transaction():
        if marker is not None:
            await mark(connection, marker)
        await connection.execute(RESEAL, database, "ccp1:k2:bmV3")
    after = await row_of(connection, database)
    assert [entry["version"] for entry in await connection.fetch(LOG, start)] == [after["version"]]
    assert after["version"] > row["version"]
    assert after["updated_at"] > row["updated_at"]


async def test_the_marker_ends_with_its_transaction(connection: asyncpg.Connection, database: uuid.UUID) -> None:
    async with connection.transaction():
        await mark(connection)
    start = await last_version(connection)
    await connection.execute(RESEAL, database, "ccp1:k2:bmV3")
    assert len(await connection.fetch(LOG, start)) == 1


async def test_other_text_of_the_same_key_is_a_change_marker_or_not(
    connection: asyncpg.Connection, database: uuid.UUID
) -> None:
    start = await last_version(connection)
    async with connection.transaction():
        await mark(connection)
        await connection.execute(RESEAL, database, "ccp1:k1:bmV3")
    assert len(await connection.fetch(LOG, start)) == 1


NEW_VALUES = {
    "uuid": "'00000000-0000-7000-8000-00000000000a'",
    "text": "'other'",
    "character varying": "'other'",
    "integer": "1",
    "bigint": "1",
    "boolean": "true",
    "jsonb": "'1.0'",
    "timestamp with time zone": "now() - interval '1 day'",
    "control_plane.tenant_database_status": "'error'",
}


async def test_no_other_column_changes_unseen_under_the_marker(
    connection: asyncpg.Connection, database: uuid.UUID
) -> None:
    """Every column there is, and those a later revision adds: with the new key in the same statement, and alone."""
    await connection.execute("ALTER TABLE control_plane.tenant_databases ADD later jsonb DEFAULT '1', ADD last bool")
    columns = await connection.fetch(
        "SELECT attname AS name, format_type(atttypid, NULL) AS type FROM pg_attribute"
        " WHERE attrelid = 'control_plane.tenant_databases'::regclass AND attnum > 0 AND NOT attisdropped"
        " AND attname <> 'connection_string_encrypted'"
    )
    assert {"id", "status", "version", "updated_at", "later", "last"} < {column["name"] for column in columns}
    for column in columns:
        for also in ("", ", connection_string_encrypted = 'ccp1:k2:bmV3'"):
            change = f"UPDATE control_plane.tenant_databases SET {column['name']} = {NEW_VALUES[column['type']]}{also}"
            transaction = connection.transaction()
            await transaction.start()
            await mark(connection)
            if column["name"] in {"id", "tenant_id"}:
                error = await refusal(connection, change)
                assert error.constraint_name == "ck_control_plane_identity"
            else:
                start, before = await last_version(connection), await row_of(connection, database)
                await connection.execute(change)
                after = await row_of(connection, database)
                assert after["version"] > before["version"], column["name"]
                assert after["updated_at"] > before["updated_at"], column["name"]
                assert len(await connection.fetch(LOG, start)) == 1, column["name"]
            await transaction.rollback()


async def test_of_a_marked_statement_the_changes_are_logged_and_the_rest_is_not(
    connection: asyncpg.Connection, database: uuid.UUID
) -> None:
    other = await insert_text(connection, "ccp1:k1:b3RoZXI")
    start = await last_version(connection)
    async with announcements(connection) as payloads, connection.transaction():
        await mark(connection)
        await connection.execute(
            "UPDATE control_plane.tenant_databases SET connection_string_encrypted = 'ccp1:k2:bmV3',"
            " host = CASE WHEN id = $1 THEN 'elsewhere' ELSE host END",
            other,
        )
        await insert_tenant(connection)  # other tables do not know the marker
    assert sorted(
        entry["row_id"] for entry in await connection.fetch(LOG, start) if entry["operation"] == "update"
    ) == [str(other)]
    assert [(payload["table"], payload["rows"]) for payload in payloads] == [("tenant_databases", 1), ("tenants", 1)]


async def test_rules_hold_under_the_marker(connection: asyncpg.Connection, database: uuid.UUID) -> None:
    await insert_key(connection, "gone", state="destroyed")
    for text, constraint in (
        (f"postgresql://u:{CANARY}@h/d", "ck_tenant_databases_sealed"),
        ("ccp1:gone:AAAA", "ck_tenant_databases_destroyed_key"),
    ):
        async with connection.transaction():
            await mark(connection)
            assert (await refusal(connection, RESEAL, database, text)).constraint_name == constraint


# --- keys: what a row of theirs may say -------------------------------------------------------------------------------

INSERT_KEY = (
    "INSERT INTO control_plane.encryption_keys (kid, provider, state, kek_ref, wrapped, check_value)"
    " VALUES ($1, $2, $3, $4, $5, $6)"
)
GOOD_CHECK = "0123456789abcdef" * 2


@pytest.mark.parametrize(
    ("values", "constraint"),
    [
        (("", "file", None, None, None, GOOD_CHECK), "kid"),
        (("K1", "file", None, None, None, GOOD_CHECK), "kid"),
        (("k1\n", "file", None, None, None, GOOD_CHECK), "kid"),
        (("k:1", "file", None, None, None, GOOD_CHECK), "kid"),
        (("k1", "", None, None, None, GOOD_CHECK), "provider"),
        (("k1", "file", None, None, None, GOOD_CHECK.upper()), "check_value"),
        (("k1", "file", None, None, None, GOOD_CHECK[1:]), "check_value"),
        (("k1", "file", None, "outer", None, GOOD_CHECK), "wrapped"),
        (("k1", "file", None, None, "bytes", GOOD_CHECK), "wrapped"),
        (("k1", "local", "current", None, "bytes", GOOD_CHECK), "wrapped"),
        (("k1", "local", "current", "outer", None, GOOD_CHECK), "wrapped"),
        (("k1", "local", "pending", "outer", None, GOOD_CHECK), "wrapped"),
        (("k1", "local", "retired", "outer", None, GOOD_CHECK), "wrapped"),
        (("k1", "local", "destroyed", "outer", "bytes", GOOD_CHECK), "wrapped"),
        (("k1", "local", "destroyed", None, None, GOOD_CHECK), "wrapped"),
        (("k1", "file", None, None, None, GOOD_CHECK), None),
        (("k1", "local", "current", "outer", "bytes", GOOD_CHECK), None),
        (("k1", "local", "destroyed", "outer", None, GOOD_CHECK), None),
        (("k" * 32, "p" * 63, "retired", "", "bytes", GOOD_CHECK), None),
    ],
)
async def test_checks_of_a_key(
    rolled_back: asyncpg.Connection, values: tuple[str | None, ...], constraint: str | None
) -> None:
    if constraint is None:
        await rolled_back.execute(INSERT_KEY, *values)
        return
    error = await refusal(rolled_back, INSERT_KEY, *values)
    assert (error.sqlstate, error.constraint_name) == ("23514", f"ck_encryption_keys_{constraint}")


async def test_one_key_is_current_at_most(rolled_back: asyncpg.Connection) -> None:
    await insert_key(rolled_back, "k1", state="current")
    await insert_key(rolled_back, "k2", state="pending")
    for statement in (
        "UPDATE control_plane.encryption_keys SET state = 'current' WHERE kid = 'k2'",
        f"INSERT INTO control_plane.encryption_keys VALUES ('k3', 'local', 'o', 'w', 'current', '{GOOD_CHECK}')",
    ):
        error = await refusal(rolled_back, statement)
        assert (error.sqlstate, error.constraint_name) == ("23505", "uq_encryption_keys_current")
        assert isinstance(translate(error), ConflictError)


LIFE = {
    ("pending", "current"),
    ("current", "retired"),
    ("retired", "current"),
    ("pending", "destroyed"),
    ("retired", "destroyed"),
    (None, "pending"),  # a key that was kept outside is taken in
    (None, "current"),
    (None, "retired"),
}


@pytest.mark.parametrize("target", [None, *KeyState])
@pytest.mark.parametrize("source", [None, *KeyState])
async def test_states_change_as_the_life_cycle_says(
    rolled_back: asyncpg.Connection, source: str | None, target: str | None
) -> None:
    await insert_key(rolled_back, "k1", state=source)
    values = target, None if target in {None, "destroyed"} else "bytes", "outer" if target else None
    change = "UPDATE control_plane.encryption_keys SET state = $1, wrapped = $2, kek_ref = $3"
    if source == target or (source, target) in LIFE:
        await rolled_back.execute(change, *values)
        assert await rolled_back.fetchval("SELECT state FROM control_plane.encryption_keys") == target
        return
    error = await refusal(rolled_back, change, *values)
    assert (error.sqlstate, error.constraint_name) == ("23514", "ck_encryption_keys_state_transition")
    assert f"from {source or 'outside'} to {target or 'outside'}" in str(error)
    assert isinstance(translate(error), ConflictError)


@pytest.mark.parametrize("change", ["kid = 'k2'", f"check_value = '{GOOD_CHECK[::-1]}'"])
async def test_the_identity_of_a_key_does_not_change(rolled_back: asyncpg.Connection, change: str) -> None:
    await insert_key(rolled_back, "k1")
    error = await refusal(rolled_back, f"UPDATE control_plane.encryption_keys SET {change}")
    assert (error.sqlstate, error.constraint_name) == ("23514", "ck_control_plane_identity")
    assert isinstance(translate(error), InvalidDataError)


async def test_keys_are_not_truncated(rolled_back: asyncpg.Connection) -> None:
    error = await refusal(rolled_back, "TRUNCATE control_plane.encryption_keys")
    assert error.constraint_name == "ck_control_plane_truncate"
    assert isinstance(translate(error), ProtectedError)


async def test_changes_of_keys_are_logged_and_announced(connection: asyncpg.Connection) -> None:
    start = await last_version(connection)
    async with announcements(connection) as payloads:
        await insert_key(connection, "k1", state="current")
        await connection.execute("UPDATE control_plane.encryption_keys SET state = 'retired', version = 1")
        await connection.execute("UPDATE control_plane.encryption_keys SET state = 'retired'")
        await connection.execute("DELETE FROM control_plane.encryption_keys")
    entries = await connection.fetch(LOG, start)
    assert [(entry["table_name"], entry["row_id"], entry["tenant_id"], entry["operation"]) for entry in entries] == [
        ("encryption_keys", "k1", None, operation) for operation in ("insert", "update", "delete")
    ]
    assert payloads == [{"table": "encryption_keys", "version": entry["version"], "rows": 1} for entry in entries]
    assert json.dumps([dict(entry) for entry in entries], default=str).count("bytes") == 0


# --- keys that rows use -----------------------------------------------------------------------------------------------

DESTROY = "UPDATE control_plane.encryption_keys SET state = 'destroyed', wrapped = NULL WHERE kid = 'k1'"
DELETE = "DELETE FROM control_plane.encryption_keys WHERE kid = 'k1'"


@pytest.mark.parametrize(("state", "statement"), [("retired", DESTROY), ("retired", DELETE), (None, DELETE)])
async def test_a_key_that_rows_use_stays(rolled_back: asyncpg.Connection, state: str | None, statement: str) -> None:
    await insert_key(rolled_back, "k1", state=state)
    await insert_key(rolled_back, "k11", state="pending")
    database = await insert_text(rolled_back, "ccp1:k1:c2VhbGVk")
    error = await refusal(rolled_back, statement)
    assert (error.sqlstate, error.constraint_name) == ("23514", "ck_encryption_keys_in_use")
    assert isinstance(translate(error), StillReferencedError)
    await rolled_back.execute(statement.replace("'k1'", "'k11'"))  # which has none
    await rolled_back.execute(RESEAL, database, "ccp1:k2:bmV3")
    await rolled_back.execute(statement)


async def test_a_key_that_rows_use_can_still_be_changed(rolled_back: asyncpg.Connection) -> None:
    await insert_key(rolled_back, "k1", state="current")
    await insert_text(rolled_back, "ccp1:k1:c2VhbGVk")
    await rolled_back.execute("UPDATE control_plane.encryption_keys SET state = 'retired'")
    await rolled_back.execute("UPDATE control_plane.encryption_keys SET wrapped = 'anew', kek_ref = 'outer 2'")


async def test_no_row_is_stored_that_a_destroyed_key_has_sealed(rolled_back: asyncpg.Connection) -> None:
    """By a process that had the key before it was destroyed; nobody could open it."""
    await insert_key(rolled_back, "k1", state="destroyed")
    database = await insert_text(rolled_back, "ccp1:k2:c2VhbGVk")
    tenant = await insert_tenant(rolled_back)
    for statement, arguments in (
        (RESEAL, (database, "ccp1:k1:bmV3")),
        (
            "INSERT INTO control_plane.tenant_databases (id, tenant_id, connection_string_encrypted, database_name, host)"
            " VALUES ($1, $2, 'ccp1:k1:AAAA', 'd', 'h')",
            (uuid7(), tenant),
        ),
    ):
        error = await refusal(rolled_back, statement, *arguments)
        assert (error.sqlstate, error.constraint_name) == ("23514", "ck_tenant_databases_destroyed_key")
        assert isinstance(translate(error), UnknownKeyError)
    await rolled_back.execute(RESEAL, database, "ccp1:k3:bmV3")  # of a key that is not on record nothing is known


async def waits(connection: asyncpg.Connection, other: asyncpg.Connection, task: asyncio.Task[Any]) -> None:
    """Return once the other connection, on which the task is at work, waits for a lock."""
    waiting = "SELECT EXISTS (SELECT FROM pg_locks WHERE pid = $1 AND NOT granted)"
    pid = other.get_server_pid()
    while not await connection.fetchval(waiting, pid):
        assert not task.done(), "it did not wait"
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("statement", [DESTROY, DELETE])
async def test_a_row_that_is_being_written_keeps_its_key(
    own_database: str, connection: asyncpg.Connection, statement: str
) -> None:
    """The writer has not committed, so nobody sees its row; whoever destroys the key waits for it."""
    await insert_key(connection, "k1", state="retired")
    tenant = await insert_tenant(connection)
    async with AsyncConnectionManager(own_database) as manager:
        destroyer = await manager.connect()
        transaction = connection.transaction()
        await transaction.start()
        await insert_database(connection, tenant)
        destroying = asyncio.create_task(destroyer.execute(statement))
        await waits(connection, destroyer, destroying)
        await transaction.commit()
        with pytest.raises(asyncpg.CheckViolationError) as caught:
            await destroying
        assert caught.value.constraint_name == "ck_encryption_keys_in_use"
        await destroyer.close()


async def test_whoever_writes_while_a_key_is_destroyed_hears_of_it(
    own_database: str, connection: asyncpg.Connection
) -> None:
    await insert_key(connection, "k1", state="retired")
    tenant = await insert_tenant(connection)
    async with AsyncConnectionManager(own_database) as manager:
        writer = await manager.connect()
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(DESTROY)
        writing = asyncio.create_task(insert_database(writer, tenant))
        await waits(connection, writer, writing)
        await transaction.commit()
        with pytest.raises(asyncpg.CheckViolationError) as caught:
            await writing
        assert caught.value.constraint_name == "ck_tenant_databases_destroyed_key"
        await writer.close()


@pytest.mark.parametrize("isolation", ["repeatable_read", "serializable"])
@pytest.mark.parametrize("statement", [DESTROY, DELETE])
async def test_a_transaction_that_sees_the_past_destroys_no_key(
    connection: asyncpg.Connection, isolation: Any, statement: str
) -> None:
    await insert_key(connection, "k1", state="retired")
    with pytest.raises(asyncpg.CheckViolationError) as caught:
        async with connection.transaction(isolation=isolation):
            await connection.execute(statement)
    assert caught.value.constraint_name == "ck_encryption_keys_isolation"
    assert isinstance(translate(caught.value), ConflictError)


async def test_each_of_both_tables_needs_no_right_on_the_other(role: str, connection: asyncpg.Connection) -> None:
    await insert_key(connection, "k1", state="retired")
    database = await insert_text(connection, "ccp1:k2:c2VhbGVk")
    await connection.execute(f"GRANT USAGE ON SCHEMA control_plane TO {role}")
    for table, statement, arguments in (
        ("tenant_databases", RESEAL, (database, "ccp1:k1:bmV3")),
        ("tenant_databases", RESEAL, (database, "ccp1:k2:bmV3")),
        ("encryption_keys", DESTROY, ()),
    ):
        await connection.execute(f"GRANT SELECT, UPDATE ON control_plane.{table} TO {role}")
        await connection.execute(f"SET ROLE {role}")
        assert await connection.execute(statement, *arguments) == "UPDATE 1"
        await connection.execute("RESET ROLE")
        await connection.execute(f"REVOKE ALL ON control_plane.{table} FROM {role}")


async def test_a_row_whose_key_is_gone_can_be_changed_and_mended(rolled_back: asyncpg.Connection) -> None:
    """Restored from a backup, perhaps. It cannot be opened, but disabled, and given a new connection string."""
    database = await insert_text(rolled_back, "ccp1:k1:c2VhbGVk")
    await insert_key(rolled_back, "k1", state="destroyed")
    await rolled_back.execute("UPDATE control_plane.tenant_databases SET status = 'error'")
    error = await refusal(rolled_back, RESEAL, await insert_text(rolled_back, "ccp1:k2:AAAA"), "ccp1:k1:c2VhbGVk")
    assert error.constraint_name == "ck_tenant_databases_destroyed_key"
    await rolled_back.execute(RESEAL, database, "ccp1:k2:bmV3")
