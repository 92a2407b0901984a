"""`rotate_keys`: every row gets the current key whatever happens meanwhile, and nobody but the holder of an old key notices."""

import asyncio
import logging
import random
import secrets
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from car_control_plane import rotation
from car_control_plane.connection import AsyncConnectionManager
from car_control_plane.encryption import Key, KeyInfo, Keyring, KeyState, SealedConnectionString
from car_control_plane.encryption.envelope import connection_string_context, seal, unseal
from car_control_plane.errors import (
    ConfigurationError,
    ConflictError,
    ConnectionUnavailableError,
    InvalidDataError,
    KeyUnavailableError,
    PermissionDeniedError,
    SchemaOutdatedError,
)
from car_control_plane.migrations import upgrade
from car_control_plane.models import uuid7
from car_control_plane.rotation import RotationProgress, RotationResult, rotate_keys
from tests.fixtures.leaks import failure_of, leaks
from tests.quality.programs import ROOT, run_python
from tests.schema.rows import acting_as

PASSWORD = "correct-horse-battery"

ROTATORS = "pg_locks WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"

Hook = Callable[[], Awaitable[None]]


class Keys:
    """A source of keys whose states a test changes, and that lets something happen meanwhile when it is asked."""

    name = "test"

    def __init__(self, current: Key, *others: Key) -> None:
        self.keys = {key.kid: key for key in (current, *others)}
        self.current = current.kid
        self.down = False
        self.asked = 0
        self._meanwhile: Hook | None = None
        self._rings: list[Keyring] = []

    async def list(self) -> Sequence[KeyInfo]:
        self.asked += 1
        hook, self._meanwhile = self._meanwhile, None
        if hook is not None:
            await hook()
        if self.down:
            raise OSError("no answer")
        return [KeyInfo(kid, KeyState.CURRENT if kid == self.current else KeyState.RETIRED) for kid in self.keys]

    async def get(self, kid: str) -> Key:
        if self.down:
            raise OSError("no answer")
        return self.keys[kid]

    async def close(self) -> None:
        pass

    def keyring(self) -> Keyring:
        """Make a keyring without a cache."""
        self._rings.append(Keyring(self, cache_seconds=1e-9, outage_seconds=0))
        return self._rings[-1]

    async def take_back(self) -> None:
        """Close the keyrings: one whose caller was cancelled goes on asking."""
        for ring in self._rings:
            await ring.close()

    def let(self, hook: Hook, *after: int) -> Callable[[RotationProgress], None]:
        """Let something happen while a batch is sealed, after it was read and before it is stored; for each of `after`, when so many rows are done."""
        due = list(after or [0])

        def progress(step: RotationProgress) -> None:
            if due and step.done >= due[0]:
                del due[0]
                self._meanwhile = hook

        return progress


@pytest.fixture
def old() -> Key:
    return Key.generate("old")


@pytest.fixture
def new() -> Key:
    return Key.generate("new")


@pytest.fixture
async def keys(old: Key, new: Key) -> AsyncIterator[Keys]:
    keys = Keys(new, old)
    yield keys
    await keys.take_back()


@pytest.fixture
async def connection(manager: AsyncConnectionManager) -> AsyncIterator[asyncpg.Connection]:
    async with connected(manager) as connection:
        yield connection


@asynccontextmanager
async def connected(manager: AsyncConnectionManager) -> AsyncIterator[asyncpg.Connection]:
    connection = await manager.connect()
    try:
        yield connection
    finally:
        await connection.close()


def sealed(key: Key, tenant: uuid.UUID, database: uuid.UUID, text: str) -> str:
    return seal(key, text, connection_string_context(tenant, database))


async def fill(connection: asyncpg.Connection, count: int, *keys: Key) -> dict[uuid.UUID, str]:
    """Insert so many databases, each with its tenant, sealed with the keys in turn; return what each opens to."""
    texts: dict[uuid.UUID, str] = {}
    tenants, databases = [], []
    for number in range(count):
        tenant, database = uuid7(), uuid7()
        texts[database] = f"postgresql://app:{PASSWORD}-{number}@db.example/d{number}?sslmode=verify-full"
        tenants.append((tenant, str(tenant), "staging", 0))
        databases.append(
            (database, tenant, sealed(keys[number % len(keys)], tenant, database, texts[database]), "d", "h", 0)
        )
    async with connection.transaction():
        await connection.copy_records_to_table(
            "tenants",
            schema_name="control_plane",
            records=tenants,
            columns=["tenant_id", "name", "environment", "version"],
        )
        await connection.copy_records_to_table(
            "tenant_databases",
            schema_name="control_plane",
            records=databases,
            columns=["id", "tenant_id", "connection_string_encrypted", "database_name", "host", "version"],
        )
    return texts


async def opened(connection: asyncpg.Connection, *keys: Key) -> dict[uuid.UUID, str]:
    """Open every row with the one of the keys that it names; fails when it names another."""
    by_kid = {key.kid: key for key in keys}
    rows = await connection.fetch(
        "SELECT id, tenant_id, connection_string_encrypted FROM control_plane.tenant_databases"
    )
    return {
        id: unseal(by_kid[SealedConnectionString(text).kid or ""], text, connection_string_context(tenant, id))
        for id, tenant, text in rows
    }


async def everything_else(connection: asyncpg.Connection) -> list[asyncpg.Record]:
    """Return all that is stored, but the sealed text itself, and how often the counter of versions was used."""
    return list(
        await connection.fetch("""
            SELECT 'row', to_jsonb(d) - 'connection_string_encrypted' FROM control_plane.tenant_databases d
            UNION ALL SELECT 'log', to_jsonb(l) FROM control_plane.change_log l WHERE table_name = 'tenant_databases'
            ORDER BY 1, 2
        """)
    )


async def test_every_row_gets_the_current_key_and_no_other_trace(
    manager: AsyncConnectionManager, connection: asyncpg.Connection, keys: Keys, old: Key, new: Key
) -> None:
    older = Key.generate("older")
    keys.keys["older"] = older
    texts = await fill(connection, 3_001, old, older, new)
    before = await everything_else(connection)
    heard: list[str] = []
    async with connected(manager) as listener:
        await listener.add_listener("control_plane", lambda *event: heard.append(event[3]))
        result = await rotate_keys(manager, keys.keyring())
        await connection.execute("NOTIFY control_plane, 'the end'")
        async with asyncio.timeout(60):
            while "the end" not in heard:  # noqa: ASYNC110 -- a listener is a callback
                await asyncio.sleep(0.001)
    assert result == RotationResult(kid="new", rotated=2_001, lost_races=0, failed=(), failed_count=0, remaining=0)
    assert await opened(connection, new) == texts
    assert await everything_else(connection) == before
    assert not any("tenant_databases" in payload for payload in heard)


async def test_progress_begins_with_the_count_and_ends_with_all(
    manager: AsyncConnectionManager, connection: asyncpg.Connection, keys: Keys, old: Key
) -> None:
    await fill(connection, 250, old)
    seen: list[RotationProgress] = []
    await rotate_keys(manager, keys.keyring(), batch_rows=100, progress=seen.append)
    assert [(step.done, step.total, step.failed) for step in seen] == [
        (0, 250, 0),
        (100, 250, 0),
        (200, 250, 0),
        (250, 250, 0),
    ]
    assert seen[0].rows_per_second == 0 < seen[-1].rows_per_second


@pytest.mark.parametrize("rows", [0, 50], ids=["empty", "current already"])
async def test_where_there_is_nothing_to_do_one_statement_finds_out(
    *,
    rows: int,
    manager: AsyncConnectionManager,
    connection: asyncpg.Connection,
    keys: Keys,
    new: Key,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await fill(connection, rows, new)
    statements: list[str] = []
    connect = manager.connect_direct

    async def listened(**how: Any) -> asyncpg.Connection:
        connection = await connect(**how)
        connection.add_query_logger(lambda record: statements.append(record.query))
        return connection

    monkeypatch.setattr(manager, "connect_direct", listened)
    seen: list[RotationProgress] = []
    result = await rotate_keys(manager, keys.keyring(), progress=seen.append)
    assert (result.rotated, result.remaining, seen) == (0, 0, [])
    assert sum("tenant_databases" in statement for statement in statements) == 1


@pytest.mark.parametrize("rows", [0, -1, 10_001, True, "100", 1.5])
async def test_a_batch_has_a_size(rows: Any, manager: AsyncConnectionManager, keys: Keys) -> None:
    with pytest.raises(InvalidDataError, match="batch_rows"):
        await rotate_keys(manager, keys.keyring(), batch_rows=rows)
    assert keys.asked == 0


async def test_an_older_schema_is_refused(empty_database: str, keys: Keys) -> None:
    """It would log every row as changed."""
    await upgrade(empty_database, "002_seed_data")
    async with AsyncConnectionManager(empty_database) as manager:
        with pytest.raises(SchemaOutdatedError):
            await rotate_keys(manager, keys.keyring())


@pytest.fixture
async def role(server_dsn: str) -> AsyncIterator[str]:
    """Name of a role that may nothing. Ask for it before the database: what it has in there must go before it can."""
    name = f"car_cp_role_{secrets.token_hex(4)}"
    async with AsyncConnectionManager(server_dsn) as manager, connected(manager) as connection:
        await connection.execute(f"CREATE ROLE {name}")
        yield name
        await connection.execute(f"DROP ROLE {name}")


async def test_who_may_not_rotate_is_told_what_is_missing(
    role: str, own_database: str, connection: asyncpg.Connection, keys: Keys, old: Key
) -> None:
    await fill(connection, 1, old)
    await connection.execute(f"GRANT USAGE ON SCHEMA control_plane TO {role}")
    await connection.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA control_plane TO {role}")
    await connection.execute(f"GRANT INSERT ON control_plane.encryption_keys TO {role}")
    async with AsyncConnectionManager(acting_as(role, own_database)) as manager:
        with pytest.raises(PermissionDeniedError) as refused:
            await rotate_keys(manager, keys.keyring())
        assert "GRANT SELECT, UPDATE ON control_plane.tenant_databases" in refused.value.hint
        await connection.execute(f"GRANT SELECT, UPDATE ON control_plane.tenant_databases TO {role}")
        assert (await rotate_keys(manager, keys.keyring())).rotated == 1


# --- others at work ---------------------------------------------------------------------------------------------------


async def test_writers_lose_nothing_and_leave_no_old_key_behind(
    manager: AsyncConnectionManager, connection: asyncpg.Connection, keys: Keys, old: Key, new: Key
) -> None:
    """Half of the way they seal with the old key, as processes do that have not heard of the new one; one of them registers new rows."""
    texts = await fill(connection, 4_000, old)
    ids = list(texts)
    tenants = dict(await connection.fetch("SELECT id, tenant_id FROM control_plane.tenant_databases"))
    halfway, done = asyncio.Event(), asyncio.Event()
    written = {"old": 0, "new": 0, "inserted": 0}

    async def update(seed: int) -> None:
        choose = random.Random(seed)
        async with connected(manager) as own:
            while not done.is_set():
                key = new if halfway.is_set() else old
                id = ids[choose.randrange(len(ids) // 3) * 3 + seed]  # each writer has rows of its own
                text = f"postgresql://app:{secrets.token_hex(8)}@db.example/d"
                await own.execute(
                    "UPDATE control_plane.tenant_databases SET connection_string_encrypted = $2 WHERE id = $1",
                    id,
                    sealed(key, tenants[id], id, text),
                )
                texts[id] = text
                written[key.kid] += 1

    async def insert() -> None:
        async with connected(manager) as own:
            while not halfway.is_set():
                added = await fill(own, 1, old)
                texts.update(added)
                written["inserted"] += 1

    def progress(step: RotationProgress) -> None:
        if step.done >= 2_000:
            halfway.set()

    async with asyncio.TaskGroup() as writers:
        for seed in range(3):
            writers.create_task(update(seed))
        writers.create_task(insert())
        try:
            result = await rotate_keys(manager, keys.keyring(), batch_rows=200, progress=progress)
        finally:
            halfway.set()
            done.set()
    assert all(written.values())
    assert (result.failed_count, result.remaining) == (0, 0)
    assert await opened(connection, new) == texts


async def test_a_row_changed_between_reading_and_writing_is_left_to_its_writer(
    manager: AsyncConnectionManager, connection: asyncpg.Connection, keys: Keys, old: Key, new: Key
) -> None:
    texts = await fill(connection, 30, old)
    with_new, with_old, gone = list(texts)[3:6]
    tenants = dict(await connection.fetch("SELECT id, tenant_id FROM control_plane.tenant_databases"))

    async def meanwhile() -> None:
        for id, key in ((with_new, new), (with_old, old)):
            texts[id] = f"postgresql://app:changed@db.example/{key.kid}"
            await connection.execute(
                "UPDATE control_plane.tenant_databases SET connection_string_encrypted = $2 WHERE id = $1",
                id,
                sealed(key, tenants[id], id, texts[id]),
            )
        await connection.execute("DELETE FROM control_plane.tenant_databases WHERE id = $1", gone)
        del texts[gone]

    result = await rotate_keys(manager, keys.keyring(), progress=keys.let(meanwhile))
    assert (result.rotated, result.lost_races, result.remaining) == (28, 3, 0)
    assert await opened(connection, new) == texts


async def test_a_row_somebody_holds_is_not_waited_for_and_not_forgotten(
    manager: AsyncConnectionManager, connection: asyncpg.Connection, keys: Keys, old: Key, new: Key
) -> None:
    texts = await fill(connection, 300, old)
    held = next(iter(texts))
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute("UPDATE control_plane.tenant_databases SET revision = 'r1' WHERE id = $1", held)
    seen: list[tuple[int, int]] = []
    finished = False

    def progress(step: RotationProgress) -> None:
        seen.append((step.done, step.total))

    async def writer() -> None:
        async with asyncio.timeout(60):
            while (300, 300) not in seen:  # noqa: ASYNC110 -- progress is a callback
                await asyncio.sleep(0.001)
        assert not finished
        await transaction.commit()

    writing = asyncio.create_task(writer())
    result = await rotate_keys(manager, keys.keyring(), batch_rows=100, progress=progress)
    finished = True
    await writing
    assert (result.rotated, result.remaining) == (300, 0)
    assert result.lost_races >= 1
    assert await opened(connection, new) == texts
    assert await connection.fetchval("SELECT revision FROM control_plane.tenant_databases WHERE id = $1", held) == "r1"


async def test_a_lock_on_the_table_is_waited_for_in_short_turns(
    *,
    manager: AsyncConnectionManager,
    connection: asyncpg.Connection,
    keys: Keys,
    old: Key,
    new: Key,
    caplog: pytest.LogCaptureFixture,
) -> None:
    texts = await fill(connection, 300, old)
    transaction = connection.transaction()

    async def meanwhile() -> None:
        await transaction.start()
        await connection.execute("LOCK TABLE control_plane.tenant_databases IN SHARE ROW EXCLUSIVE MODE")

    async def let_go() -> None:
        async with asyncio.timeout(60):
            while not any("holds the lock" in message for message in caplog.messages):  # noqa: ASYNC110 -- a log is no event
                await asyncio.sleep(0.01)
        await transaction.commit()

    releasing = asyncio.create_task(let_go())
    with caplog.at_level(logging.WARNING, "car_control_plane.rotation"):
        result = await rotate_keys(manager, keys.keyring(), batch_rows=100, progress=keys.let(meanwhile))
    await releasing
    assert (result.rotated, result.remaining) == (300, 0)
    assert await opened(connection, new) == texts


# --- one at a time ----------------------------------------------------------------------------------------------------


async def test_a_second_rotation_is_refused_at_once_until_the_first_is_gone(
    manager: AsyncConnectionManager, connection: asyncpg.Connection, keys: Keys, old: Key, new: Key
) -> None:
    await fill(connection, 100, old)
    under_way = asyncio.Event()

    async def hang() -> None:
        under_way.set()
        await asyncio.Event().wait()

    first = asyncio.create_task(rotate_keys(manager, keys.keyring(), progress=keys.let(hang)))
    await under_way.wait()
    others = Keys(new, old)
    with pytest.raises(ConflictError, match="running already") as refused:
        await rotate_keys(manager, others.keyring())
    assert refused.value.retryable
    pid = refused.value.details["pid"]
    assert await connection.fetchval("SELECT count(*) FROM pg_stat_activity WHERE pid = $1", pid) == 1
    first.cancel()
    await asyncio.wait({first})
    await ended(connection, pid)
    assert (await rotate_keys(manager, others.keyring())).rotated == 100


async def ended(connection: asyncpg.Connection, pid: int) -> None:
    """Wait for the server to notice that a client is gone."""
    async with asyncio.timeout(60):
        while await connection.fetchval("SELECT count(*) FROM pg_stat_activity WHERE pid = $1", pid):  # noqa: ASYNC110
            await asyncio.sleep(0.001)


# --- what stops it ----------------------------------------------------------------------------------------------------


async def test_a_cancelled_rotation_is_taken_on_by_the_next(
    manager: AsyncConnectionManager, connection: asyncpg.Connection, keys: Keys, old: Key, new: Key
) -> None:
    texts = await fill(connection, 1_000, old)
    task: asyncio.Task[RotationResult]

    def progress(step: RotationProgress) -> None:
        if step.done == 300:
            task.cancel()

    task = asyncio.create_task(rotate_keys(manager, keys.keyring(), batch_rows=100, progress=progress))
    await asyncio.wait({task})
    assert task.cancelled()
    left = await connection.fetchval(
        "SELECT count(*) FROM control_plane.tenant_databases WHERE connection_string_encrypted LIKE 'ccp1:old:%'"
    )
    assert left == 700
    assert await opened(connection, old, new) == texts
    result = await again(manager, keys)
    assert (result.rotated, result.remaining) == (700, 0)
    assert await opened(connection, new) == texts


async def again(manager: AsyncConnectionManager, keys: Keys) -> RotationResult:
    """Rotate, as soon as the server has noticed that the former rotator is gone."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await rotate_keys(manager, keys.keyring())
            except ConflictError:
                await asyncio.sleep(0.001)


async def test_wherever_it_is_cancelled_nothing_is_lost(
    manager: AsyncConnectionManager, connection: asyncpg.Connection, keys: Keys, old: Key, new: Key
) -> None:
    texts = await fill(connection, 2_000, old)
    interrupted = 0
    for number in range(40):
        task = asyncio.create_task(rotate_keys(manager, keys.keyring(), batch_rows=20))
        await asyncio.sleep(random.Random(number).uniform(0.0, 0.06))
        task.cancel()
        await asyncio.wait({task})
        interrupted += task.cancelled()
        assert task.cancelled() or task.exception() is None or isinstance(task.exception(), ConflictError)
    assert interrupted >= 10, "the moments must fall into the rotation"
    assert await opened(connection, old, new) == texts
    assert (await again(manager, keys)).remaining == 0
    assert await opened(connection, new) == texts


async def test_a_lost_connection_is_replaced_and_the_rotation_goes_on(
    manager: AsyncConnectionManager, connection: asyncpg.Connection, keys: Keys, old: Key, new: Key
) -> None:
    texts = await fill(connection, 1_000, old)
    ended = 0

    async def meanwhile() -> None:
        nonlocal ended
        ended += await connection.fetchval(f"SELECT count(pg_terminate_backend(pid)) FROM {ROTATORS}")

    progress = keys.let(meanwhile, 0, 300, 600)
    result = await rotate_keys(manager, keys.keyring(), batch_rows=100, progress=progress)
    assert ended == 3
    assert (result.rotated + result.lost_races, result.remaining) == (1_000, 0)
    assert await opened(connection, new) == texts


async def test_a_rotation_that_lost_its_lock_to_another_gives_up(
    manager: AsyncConnectionManager,
    connection: asyncpg.Connection,
    keys: Keys,
    old: Key,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await fill(connection, 300, old)
    monkeypatch.setattr(rotation, "_DELAYS_SECONDS", (0.01, 0.01))

    async def meanwhile() -> None:
        key = await connection.fetchval(f"SELECT classid::bigint << 32 | objid::bigint FROM {ROTATORS}")
        await connection.execute(f"SELECT pg_terminate_backend(pid) FROM {ROTATORS}")
        await connection.execute("SELECT pg_advisory_lock($1)", key)

    with pytest.raises(ConflictError, match="running already"):
        await rotate_keys(manager, keys.keyring(), batch_rows=100, progress=keys.let(meanwhile))


async def test_a_server_that_stays_away_ends_it_typed(
    manager: AsyncConnectionManager,
    connection: asyncpg.Connection,
    keys: Keys,
    old: Key,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await fill(connection, 300, old)
    monkeypatch.setattr(rotation, "_DELAYS_SECONDS", (0.01, 0.01))

    async def refuse(**_: Any) -> asyncpg.Connection:
        raise ConnectionUnavailableError("the host is gone")

    async def meanwhile() -> None:
        monkeypatch.setattr(manager, "connect_direct", refuse)
        await connection.execute(f"SELECT pg_terminate_backend(pid) FROM {ROTATORS}")

    with pytest.raises(ConnectionUnavailableError, match="the host is gone"):
        await rotate_keys(manager, keys.keyring(), batch_rows=100, progress=keys.let(meanwhile))


# --- keys -------------------------------------------------------------------------------------------------------------


async def test_an_outage_of_the_keys_ends_it_typed_and_keeps_what_is_done(
    manager: AsyncConnectionManager, connection: asyncpg.Connection, keys: Keys, old: Key, new: Key
) -> None:
    texts = await fill(connection, 1_000, old)

    def progress(step: RotationProgress) -> None:
        keys.down = step.done >= 300

    error = await failure_of(rotate_keys(manager, keys.keyring(), batch_rows=100, progress=progress))
    assert isinstance(error, KeyUnavailableError)
    assert error.retryable
    assert list(leaks(error, PASSWORD)) == []
    assert await opened(connection, old, new) == texts
    keys.down = False
    result = await rotate_keys(manager, keys.keyring())
    assert 0 < result.rotated <= 700
    assert await opened(connection, new) == texts


async def test_a_key_promoted_meanwhile_is_the_one_they_end_with(
    manager: AsyncConnectionManager, connection: asyncpg.Connection, keys: Keys, old: Key, new: Key
) -> None:
    texts = await fill(connection, 1_000, old)
    newest = Key.generate("newest")
    keys.keys["newest"] = newest

    def progress(step: RotationProgress) -> None:
        if step.done >= 300:
            keys.current = "newest"

    result = await rotate_keys(manager, keys.keyring(), batch_rows=100, progress=progress)
    assert (result.kid, result.remaining) == ("newest", 0)
    assert result.rotated > 1_000
    assert await opened(connection, newest) == texts


async def test_rows_of_a_key_promoted_meanwhile_are_not_sealed_again_but_those_of_its_forerunner_are(
    manager: AsyncConnectionManager, connection: asyncpg.Connection, keys: Keys, old: Key, new: Key
) -> None:
    """To seal them again would be a change of theirs: the marker hides only one key for another."""
    newest = Key.generate("newest")
    keys.keys["newest"] = newest
    texts = await fill(connection, 20, newest, new)
    before = await everything_else(connection)

    def progress(_: RotationProgress) -> None:
        keys.current = "newest"

    result = await rotate_keys(manager, keys.keyring(), progress=progress)
    assert (result.kid, result.rotated, result.remaining) == ("newest", 10, 0)
    assert await opened(connection, newest) == texts
    assert await everything_else(connection) == before


async def test_a_current_key_other_than_the_one_on_record_seals_nothing(
    manager: AsyncConnectionManager, connection: asyncpg.Connection, keys: Keys, old: Key, new: Key
) -> None:
    texts = await fill(connection, 10, old)
    assert (await rotate_keys(manager, keys.keyring())).rotated == 10
    mistyped = Keys(Key.generate("new"), old)
    more = await fill(connection, 10, old)
    with pytest.raises(ConfigurationError, match="new"):
        await rotate_keys(manager, mistyped.keyring())
    assert await opened(connection, old, new) == texts | more


# --- rows that cannot be opened ---------------------------------------------------------------------------------------


async def test_rows_that_cannot_be_opened_are_reported_and_stop_no_others(
    manager: AsyncConnectionManager,
    connection: asyncpg.Connection,
    keys: Keys,
    old: Key,
    new: Key,
) -> None:
    texts = await fill(connection, 250, old)
    lost_key = await fill(connection, 3, Key.generate("lost"))
    other_bytes = await fill(connection, 2, Key.generate("old"))
    damaged, swapped, swapped_too = list(texts)[100:103]
    set_ = "UPDATE control_plane.tenant_databases SET connection_string_encrypted = $2 WHERE id = $1"
    found = dict(await connection.fetch("SELECT id, connection_string_encrypted FROM control_plane.tenant_databases"))
    await connection.execute(set_, damaged, found[damaged][:-6] + "AAAAAA")
    await connection.execute(set_, swapped, found[swapped_too])
    await connection.execute(set_, swapped_too, found[swapped])
    expected = dict.fromkeys([damaged, swapped, swapped_too, *other_bytes], "decryption") | dict.fromkeys(
        lost_key, "unknown-key"
    )
    stored = dict(
        await connection.fetch(
            "SELECT id, connection_string_encrypted FROM control_plane.tenant_databases WHERE id = ANY ($1)",
            list(expected),
        )
    )
    seen: list[RotationProgress] = []
    for rotated in (247, 0):
        seen.clear()
        result = await rotate_keys(manager, keys.keyring(), batch_rows=50, progress=seen.append)
        assert dict(result.failed) == expected
        assert (result.rotated, result.failed_count, result.remaining) == (rotated, 8, 8)
    assert [(step.done, step.total, step.failed) for step in seen] == [(0, 8, 0), (3, 8, 3), (8, 8, 8)], (
        "one look at each"
    )
    for id, text in stored.items():
        assert await connection.fetchval(
            "SELECT connection_string_encrypted = $2 FROM control_plane.tenant_databases WHERE id = $1", id, text
        )
    await connection.execute("DELETE FROM control_plane.tenant_databases WHERE id = ANY ($1)", list(expected))
    assert await opened(connection, new) == {id: text for id, text in texts.items() if id not in expected}


async def test_of_many_rows_that_cannot_be_opened_a_thousand_are_listed(
    manager: AsyncConnectionManager, connection: asyncpg.Connection, keys: Keys
) -> None:
    await fill(connection, 1_150, Key.generate("lost"))
    seen: list[RotationProgress] = []
    result = await rotate_keys(manager, keys.keyring(), batch_rows=100, progress=seen.append)
    assert (len(result.failed), result.failed_count, result.remaining) == (1_000, 1_150, 1_150)
    assert (seen[-1].done, seen[-1].total, seen[-1].failed) == (1_150, 1_150, 1_150)


# --- what it costs ----------------------------------------------------------------------------------------------------


# In a process of its own, where nothing of other tests is kept, loaded or let go meanwhile. The first rotation imports and prepares what is needed
# once; the second, back to the former key, is measured. When the collector runs by itself depends on how much there is, so it is told to, and
# freed of looking at what is there already.
MEASURED = """
import asyncio, gc, sys, tracemalloc
from car_control_plane import AsyncConnectionManager, Keyring, StaticKeys
from car_control_plane.rotation import rotate_keys

async def rotate(manager, text, progress):
    async with Keyring(StaticKeys(text)) as keyring:
        return (await rotate_keys(manager, keyring, batch_rows=50, progress=progress)).rotated

async def main():
    old, new = sys.stdin.read().split()
    async with AsyncConnectionManager() as manager:
        await rotate(manager, f"{new},{old}", None)
        gc.collect()
        gc.freeze()
        tracemalloc.start()
        rotated = await rotate(manager, f"{old},{new}", lambda _: gc.collect())
        print(rotated, tracemalloc.get_traced_memory()[1])

asyncio.run(main())
"""


async def test_memory_does_not_grow_with_the_rows(
    own_database: str, connection: asyncpg.Connection, old: Key, new: Key
) -> None:
    async def peak(rows: int) -> int:
        given = "\n".join(f"{key.kid}:{key.to_base64()}" for key in (old, new)).encode()
        printed = await run_python("-c", MEASURED, cwd=ROOT, given=given, DATABASE_URL=own_database)
        rotated, most = map(int, printed.split())
        assert rotated == rows
        return most

    await fill(connection, 500, old)
    few = await peak(500)
    await fill(connection, 9_500, old)
    many = await peak(10_000)
    assert many - few < 9_500 * 32, "less than the ids alone would take"


def test_the_slower_the_server_the_longer_the_pause() -> None:
    pace = rotation._Pace()
    assert pace.pause(0.2, 1_000) == 0
    assert pace.pause(0.1, 1_000) == 0
    assert pace.pause(0.12, 1_000) == 0
    assert pace.pause(0.35, 1_000) == pytest.approx(0.2)
    assert pace.pause(0.035, 100) == pytest.approx(0.02)
    assert pace.pause(60, 1_000) == 1
    assert pace.pause(0, 0) == 0
