"""Behind a real PgBouncer in transaction mode: right answers only, nothing left behind, and a clear word about what cannot work there."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_connection

from car_control_plane import dsn as dsns
from car_control_plane.connection import AsyncConnectionManager
from car_control_plane.doctor import examine
from car_control_plane.encryption import Key, Keyring, StaticKeys
from car_control_plane.errors import (
    AlreadyExistsError,
    ConfigurationError,
    ConnectionUnavailableError,
    DirectConnectionRequiredError,
    InvalidDataError,
    OutcomeUnknownError,
    PoolTimeoutError,
    StatementTimeoutError,
)
from car_control_plane.migrations import check, current, downgrade, drift, upgrade
from car_control_plane.models import REVISIONS, TenantCreate, TenantEnvironment, uuid7
from car_control_plane.poolers import FramedConnection, leads_through_pooler
from car_control_plane.repositories import TenantRepository
from car_control_plane.rotation import rotate_keys
from tests.fixtures.cancelling import Cancelled
from tests.fixtures.cli import Cli
from tests.fixtures.leaks import failure_of, leaks
from tests.fixtures.pooled_load import run_programs
from tests.fixtures.poolers import Pooler, pgbouncer
from tests.fixtures.servers import CANARY, unused_port

pytestmark = pytest.mark.skipif(os.name == "nt", reason="PgBouncer's fixture needs a unix socket")

IGNORED = "search_path,statement_timeout,lock_timeout,idle_in_transaction_session_timeout,extra_float_digits"
"""What the pooler is told to take without a word, and then forgets."""


@pytest.fixture(scope="module")
def pooler(server_dsn: str) -> Iterator[Pooler]:
    """Refuses run-time parameters, as it comes."""
    with pgbouncer(server_dsn) as running:
        yield running


@pytest.fixture(scope="module")
def lone(server_dsn: str) -> Iterator[Pooler]:
    """Has one server connection, so that whatever is left there is seen by the next client."""
    with pgbouncer(server_dsn, size=1) as running:
        yield running


@pytest.fixture
async def pooled(pooler: Pooler, own_database: str) -> AsyncIterator[AsyncConnectionManager]:
    """A manager that has been told nothing about the pooler."""
    async with AsyncConnectionManager(pooler.to(own_database)) as manager:
        yield manager


@pytest.fixture
async def shared_pooled(pooler: Pooler, shared_database: str) -> AsyncIterator[AsyncConnectionManager]:
    """The same, for tests that write nothing."""
    async with AsyncConnectionManager(pooler.to(shared_database)) as manager:
        yield manager


async def plain(url: str) -> asyncpg.Connection:
    """Connect as somebody else does, in the one way that is safe."""
    parsed = dsns.parse(url)
    return await asyncpg.connect(parsed.for_host(parsed.hosts[0]), password=parsed.password, statement_cache_size=0)


# --- told apart -------------------------------------------------------------------------------------------------------


async def test_a_pooler_is_found_and_said(pooled: AsyncConnectionManager, own_database: str) -> None:
    health = await pooled.health_check()
    assert health.healthy
    assert health.through_pooler is True
    async with AsyncConnectionManager(own_database) as direct:
        assert (await direct.health_check()).through_pooler is False
        connection = await direct.connect()
        assert not leads_through_pooler(connection)
        await connection.close()


async def test_an_address_is_tried_in_vain_only_once(server_dsn: str, shared_database: str) -> None:
    with pgbouncer(server_dsn) as pooler:
        async with AsyncConnectionManager(pooler.to(shared_database)) as manager:
            for _ in range(4):
                await (await manager.connect()).close()
        assert pooler.log.count("closing because: unsupported startup parameter") == 1


async def test_a_pooler_that_takes_every_parameter_is_found_too(server_dsn: str, shared_database: str) -> None:
    with pgbouncer(server_dsn, ignore_startup_parameters=IGNORED) as pooler:
        async with AsyncConnectionManager(pooler.to(shared_database)) as manager:
            assert (await manager.health_check()).through_pooler is True
            (row,) = await manager.fetch("SELECT current_setting('statement_timeout') AS it", [], repeat=True)
            assert row["it"] == "10s"


async def test_a_pooler_that_takes_the_place_of_a_server_is_found_without_asking(
    server_dsn: str, shared_database: str
) -> None:
    with pgbouncer(server_dsn, ignore_startup_parameters=IGNORED) as pooler:
        async with AsyncConnectionManager(pooler.to(shared_database)) as manager:
            assert manager._dsn is not None
            manager._poolers._asked[manager._dsn.hosts[0]] = time.monotonic()  # as after talking to a server there
            connections = [
                await manager.connect() for _ in range(3)
            ]  # one of its process ids in 1,000 might be a server's
            assert any(leads_through_pooler(connection) for connection in connections)
            for connection in connections:
                await connection.close()


async def test_a_pooler_in_session_mode_works_as_well(server_dsn: str, shared_database: str) -> None:
    with pgbouncer(server_dsn, size=10, mode="session") as pooler:
        async with AsyncConnectionManager(pooler.to(shared_database)) as manager:
            assert await manager.health_check()
            assert [row["it"] for row in await manager.fetch("SELECT $1::int AS it", [1], repeat=True)] == [1]


async def test_one_can_say_that_there_is_a_pooler(shared_database: str, server_dsn: str) -> None:
    async with AsyncConnectionManager(shared_database, pooler="transaction") as manager:
        assert (await manager.health_check()).through_pooler is True
        assert [row["it"] for row in await manager.fetch("SELECT $1::int AS it", [1], repeat=True)] == [1]
    with pgbouncer(server_dsn) as pooler:
        async with AsyncConnectionManager(pooler.to(shared_database), pooler="transaction") as manager:
            assert await manager.health_check()
        assert "unsupported startup parameter" not in pooler.log


async def test_one_can_say_that_there_is_none(pooler: Pooler, shared_database: str) -> None:
    async with AsyncConnectionManager(pooler.to(shared_database), pooler="none") as manager:
        error = await failure_of(manager.connect())
    assert isinstance(error, ConnectionUnavailableError)
    assert "setting `pooler`" in error.hint
    assert error.details["sqlstate"] == "08P01"


async def test_a_database_the_pooler_does_not_find_is_an_error_of_ours(pooler: Pooler) -> None:
    async with AsyncConnectionManager(pooler.dsn("no such database")) as manager:
        assert isinstance(await failure_of(manager.connect()), ConnectionUnavailableError)


async def test_a_pooler_that_stops_is_a_lost_connection_and_one_that_returns_is_used(
    server_dsn: str, shared_database: str
) -> None:
    with pgbouncer(server_dsn) as pooler:
        manager = AsyncConnectionManager(pooler.to(shared_database), connect_timeout_seconds=10)
        assert await manager.health_check()
    async with manager:
        with pytest.raises(
            (ConnectionUnavailableError, OutcomeUnknownError)
        ):  # it hung up before, or under the statement
            await manager.fetch("SELECT 1", [], repeat=False)
        assert not await manager.health_check()


# --- every transaction has our settings, and nobody else does -----------------------------------------------------------

SETTINGS = {
    "search_path": "pg_catalog",
    "statement_timeout": "10s",
    "lock_timeout": "3s",
    "idle_in_transaction_session_timeout": "30s",
    "TimeZone": "UTC",
}
SHOWN = "SELECT " + ", ".join(f"current_setting('{name}') AS \"{name}\"" for name in SETTINGS)


async def test_every_way_to_run_a_statement_has_the_settings(shared_pooled: AsyncConnectionManager) -> None:
    assert [dict(row) for row in await shared_pooled.fetch(SHOWN, [], repeat=True)] == [SETTINGS]
    async with shared_pooled.get_session() as session, shared_pooled.get_read_session() as reading:
        for connection in (await session.connection(), await reading.connection()):
            assert dict((await connection.exec_driver_sql(SHOWN)).mappings().one()) == SETTINGS
    connection = await shared_pooled.connect(server_settings={"lock_timeout": "7s"})
    assert (await connection.fetchval("SHOW application_name")).startswith("car-control-plane")
    assert dict(await connection.fetchrow(SHOWN)) == SETTINGS | {"lock_timeout": "7s"}
    assert await connection.fetchval("SHOW lock_timeout") == "7s"
    assert dict((await connection.fetchmany(SHOWN, [()]))[0]) == SETTINGS | {"lock_timeout": "7s"}
    assert dict((await (await connection.prepare(SHOWN)).fetch())[0]) != {}
    async with connection.transaction(isolation="serializable", readonly=True, deferrable=True):
        assert dict(await connection.fetchrow(SHOWN)) == SETTINGS | {"lock_timeout": "7s"}
        assert await connection.fetchval("SHOW transaction_isolation") == "serializable"
    await connection.close()


async def test_nothing_of_it_stays_with_the_server(lone: Pooler, own_database: str) -> None:
    url = lone.to(own_database)
    other = await plain(url)
    before = dict(await other.fetchrow(SHOWN))
    async with AsyncConnectionManager(url) as manager:
        await manager.fetch("SELECT $1::int", [1], repeat=True)
        async with manager.get_session() as session:
            tenants = TenantRepository(session)
            for number in range(5):
                await tenants.create(TenantCreate(name=f"t{number}", environment=TenantEnvironment.STAGING))
            await tenants.count()
            await session.exec(text("SELECT set_config('app.tenant', 'somebody', true)"))  # type: ignore[call-overload]
        for number in range(5):
            async with manager.get_read_session() as session:
                await TenantRepository(session).get_by_name(f"t{number}")
        with pytest.raises(InvalidDataError):
            await manager.fetch("SELECT 1 / $1::int", [0], repeat=False)
        connection = await manager.connect()
        await connection.executemany("SELECT $1::int", [(1,), (2,)])
        await connection.prepare("SELECT 1")
        await connection.reset()
        await connection.close()
        after = dict(await other.fetchrow(SHOWN))
        assert after == before
        assert after["statement_timeout"] != SETTINGS["statement_timeout"], "the test shows something"
        assert await other.fetchval("SELECT count(*) FROM pg_prepared_statements WHERE name <> ''") == 0
        assert await other.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0
        assert await other.fetchval("SELECT coalesce(current_setting('app.tenant', true), '')") == ""
        assert await other.fetchval("SHOW jit") == await other.fetchval(
            "SELECT reset_val FROM pg_settings WHERE name = 'jit'"
        )
    await other.close()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("search_path", "pg_catalog"),
        ("search_path", 'one, "Two, three", public'),
        ("temp_tablespaces", ""),
        ("app.tenant", "it's"),
        ("app.tenant", "back\\slash ' and quote"),
        ("app.Tenant", "ü; DROP TABLE x; --"),
        ("DateStyle", "German, DMY"),
        ("work_mem", "5MB"),
        ("Work_Mem", "6MB"),
    ],
)
async def test_settings_arrive_as_they_are_written(
    shared_pooled: AsyncConnectionManager, name: str, value: str
) -> None:
    connection = await shared_pooled.connect(server_settings={name: value})
    assert await connection.fetchval("SELECT current_setting($1)", name) == value
    await connection.close()


async def test_a_role_can_be_taken_in_every_transaction(shared_pooled: AsyncConnectionManager) -> None:
    connection = await shared_pooled.connect(server_settings={"role": "pg_read_all_settings"})
    assert await connection.fetchval("SELECT current_user") == "pg_read_all_settings"
    assert await shared_pooled.fetch("SELECT 1 WHERE current_user = 'pg_read_all_settings'", [], repeat=True) == []
    await connection.close()


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        ("-c work_mem=5MB", "work_mem", "5MB"),
        ("-cwork_mem=5MB  --enable-seqscan=off", "enable_seqscan", "off"),
        (r"-c search_path=one,\ two", "search_path", "pg_catalog"),  # ours comes later, as it does without a pooler
        (r"-c app.name=a\ b\\c=d -c work_mem=5MB", "app.name", r"a b\c=d"),
    ],
)
async def test_options_of_the_connection_string_are_settings(
    pooler: Pooler, shared_database: str, options: str, name: str, value: str
) -> None:
    for url in (pooler.to(shared_database), shared_database):
        async with AsyncConnectionManager(f"{url}{'&' if '?' in url else '?'}options={quote(options)}") as manager:
            (row,) = await manager.fetch("SELECT current_setting($1) AS it", [name], repeat=True)
            assert row["it"] == value


@pytest.mark.parametrize(
    "options",
    [
        "-c no_such_setting=1",
        "-c statement_timeout=never",
        "-c role=nobody_at_all",
        "-B 5",
        "-c nothing",
        "-c",
        "--=1",
        "-c a\\ b=1",
        "-c a..b=1",
    ],
)
async def test_a_setting_the_server_does_not_take_is_told_when_connecting(
    pooler: Pooler, shared_database: str, options: str
) -> None:
    async with AsyncConnectionManager(pooler.to(shared_database, options=options)) as manager:
        assert isinstance(await failure_of(manager.connect()), ConfigurationError)
        assert isinstance(await failure_of(manager.fetch("SELECT 1", [], repeat=True)), ConfigurationError)
        assert manager.pool_status().opened == 0


async def test_statements_prepared_side_by_side_are_not_mixed_up(shared_pooled: AsyncConnectionManager) -> None:
    """What the cure rests on: asyncpg parses a statement without a name again with each use."""
    connection = await shared_pooled.connect()
    one, two = await connection.prepare("SELECT $1::int + 1"), await connection.prepare("SELECT 'two' || $1::text")
    for _ in range(3):
        assert await one.fetchval(1) == 2
        assert await two.fetchval("!") == "two!"
        assert await connection.fetchval("SELECT 3") == 3
    named = await connection.prepare("SELECT 4", name="mine")
    assert (one.get_name(), two.get_name(), named.get_name()) == ("", "", "")
    await connection.close()


async def test_a_statement_is_read_as_what_it_is_after_a_change_of_its_type(pooled: AsyncConnectionManager) -> None:
    """What keeping the descriptions of statements would cost."""
    connection = await pooled.connect()
    async with connection.transaction():
        await connection.execute("CREATE TABLE public.changing AS SELECT 1952805748 AS it")

    async def read() -> list[Any]:
        async with pooled.get_session() as session:
            in_session = (await (await session.connection()).exec_driver_sql("SELECT it FROM public.changing")).scalar()
        (row,) = await pooled.fetch("SELECT it FROM public.changing", [], repeat=False)
        return [in_session, row["it"], await connection.fetchval("SELECT it FROM public.changing")]

    assert await read() == [1952805748] * 3
    async with connection.transaction():
        await connection.execute("ALTER TABLE public.changing ALTER it TYPE text USING 'text'")
    assert await read() == ["text"] * 3
    await connection.close()


def test_sqlalchemy_has_the_cache_that_is_taken_away() -> None:
    assert "_prepared_statement_cache" in AsyncAdapt_asyncpg_connection.__slots__


# --- several programs at once -------------------------------------------------------------------------------------------


def total(counts: list[dict[str, Any]], kind: str) -> int:
    return sum(one[kind] for one in counts)


@pytest.mark.slow
async def test_several_programs_get_their_own_answers_only(server_dsn: str, own_database: str) -> None:
    with pgbouncer(server_dsn, ignore_startup_parameters=IGNORED) as pooler:
        url = pooler.to(own_database)
        counts = await run_programs(url, own_database, 3)
        assert (total(counts, "wrong"), total(counts, "failed")) == (0, 0), counts
        assert total(counts, "right") > 100
        other = await plain(url)
        for _ in range(10):
            assert await other.fetchval("SELECT count(*) FROM pg_prepared_statements WHERE name <> ''") == 0
        await other.close()


@pytest.mark.slow
async def test_the_same_programs_go_wrong_when_the_pooler_is_not_told_apart(server_dsn: str, own_database: str) -> None:
    """The counter-example: without it the test above could be passing for want of anything to find."""
    with pgbouncer(server_dsn, ignore_startup_parameters=IGNORED) as pooler:
        counts = await run_programs(pooler.to(own_database), own_database, 2, pooler="none")
        assert total(counts, "wrong") > 0, counts


# --- what cannot work ---------------------------------------------------------------------------------------------------

LASTING = [
    "LISTEN something",
    "  listen something",
    "UNLISTEN *",
    "SET app.tenant = 'x'",
    "SET SESSION app.tenant TO 'x'",
    "set search_path to public",
    "PREPARE it AS SELECT 1",
    "DISCARD ALL",
    "SELECT pg_advisory_lock(1)",
    "SELECT pg_try_advisory_lock($1)",
    "SELECT pg_catalog.pg_advisory_lock_shared (1)",
]


@pytest.mark.parametrize("sql", LASTING)
async def test_what_would_stay_with_the_server_is_refused(shared_pooled: AsyncConnectionManager, sql: str) -> None:
    connection = await shared_pooled.connect()
    arguments = [1] if "$1" in sql else []
    for call in (connection.execute, connection.fetch, connection.fetchrow, connection.fetchval):
        with pytest.raises(DirectConnectionRequiredError):
            await call(sql, *arguments)
    with pytest.raises(DirectConnectionRequiredError):
        await connection.prepare(sql)
    with pytest.raises(DirectConnectionRequiredError):
        await connection.executemany(sql, [arguments])
    await connection.close()
    with pytest.raises(DirectConnectionRequiredError):
        await shared_pooled.fetch(sql, arguments, repeat=False)
    if not arguments:
        with pytest.raises(DirectConnectionRequiredError, match="direct_database_url"):
            async with shared_pooled.get_session() as session:
                await (await session.connection()).exec_driver_sql(sql)
    assert [row["it"] for row in await shared_pooled.fetch("SELECT 1 AS it", [], repeat=True)] == [1]


@pytest.mark.parametrize(
    "sql",
    [
        "SET LOCAL app.tenant = 'x'",
        "SET TRANSACTION READ ONLY",
        "SET CONSTRAINTS ALL DEFERRED",
        "SELECT pg_advisory_xact_lock(1)",
    ],
)
async def test_what_ends_with_the_transaction_is_not(shared_pooled: AsyncConnectionManager, sql: str) -> None:
    async with shared_pooled.get_session() as session:
        await (await session.connection()).exec_driver_sql(sql)


async def test_listening_is_refused(shared_pooled: AsyncConnectionManager) -> None:
    connection = await shared_pooled.connect()
    with pytest.raises(DirectConnectionRequiredError):
        await connection.add_listener("something", print)
    await connection.close()


async def test_migrations_and_rotation_are_refused_with_what_to_do(
    pooled: AsyncConnectionManager, pooler: Pooler, own_database: str
) -> None:
    keys = Keyring(StaticKeys(f"k1:{Key.generate('k1').to_base64()}"))
    for work in (upgrade(pooled), downgrade(pooled, "base"), rotate_keys(pooled, keys), pooled.connect_direct()):
        error = await failure_of(work)
        assert isinstance(error, DirectConnectionRequiredError), error
        assert "direct_database_url" in str(error)
        assert "CAR_CONTROL_PLANE_DIRECT_DATABASE_URL" in str(error)
    # What only reads does work.
    assert await current(pooled) == REVISIONS[-1]
    assert await check(pooled) == ()
    assert await drift(pooled) == ()


async def test_the_command_line_says_so_too(
    pooler: Pooler, own_database: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    cli = Cli(pooler.to(own_database))
    result = await asyncio.to_thread(cli, "db", "upgrade")
    assert result.exit_code != 0
    assert "CAR_CONTROL_PLANE_DIRECT_DATABASE_URL" in result.stderr
    result = await asyncio.to_thread(cli, "db", "upgrade", CAR_CONTROL_PLANE_DIRECT_DATABASE_URL=own_database)
    assert result.exit_code == 0, result.output
    assert "through a connection pooler" in (await asyncio.to_thread(cli, "--output", "table", "health")).stdout


async def test_with_a_direct_database_url_all_of_it_works(pooler: Pooler, own_database: str) -> None:
    async with AsyncConnectionManager(pooler.to(own_database), direct_database_url=own_database) as manager:
        assert (await manager.health_check()).through_pooler is True
        await downgrade(manager, REVISIONS[-2])
        assert await current(manager) == REVISIONS[-2]
        assert (await upgrade(manager)).after == REVISIONS[-1]
        await rotate_keys(manager, Keyring(StaticKeys(f"k1:{Key.generate('k1').to_base64()}")))
        heard = asyncio.get_running_loop().create_future()
        connection = await manager.connect_direct()
        await connection.add_listener("something", lambda *said: heard.set_result(said[-1]))
        await connection.fetchval("SELECT pg_advisory_lock(1)")
        await manager.fetch("SELECT pg_notify('something', $1)", ["said"], repeat=False)
        async with asyncio.timeout(60):
            assert await heard == "said"
        await connection.close()


async def test_a_direct_database_url_that_is_not_one_is_told(pooler: Pooler, shared_database: str) -> None:
    async with AsyncConnectionManager(
        pooler.to(shared_database), direct_database_url=pooler.to(shared_database)
    ) as manager:
        error = await failure_of(upgrade(manager))
        assert isinstance(error, DirectConnectionRequiredError)
        assert "as well" in str(error)
    for direct in (f"postgresql://u:{CANARY}@host:port/x", f"postgresql://u:{CANARY}@h/x?nonsense=1", "embedded:"):
        with pytest.raises(ConfigurationError, match="direct_database_url") as caught:
            AsyncConnectionManager(shared_database, direct_database_url=direct)
        assert list(leaks(caught.value, CANARY)) == []
    with pytest.raises(ConfigurationError, match="direct_database_url"):
        AsyncConnectionManager("embedded:", direct_database_url=shared_database)
    manager = AsyncConnectionManager(
        shared_database, direct_database_url=f"postgresql://u:{CANARY}@127.0.0.1:{unused_port()}/x"
    )
    error = await failure_of(manager.connect_direct())
    assert isinstance(error, ConnectionUnavailableError)
    assert list(leaks(error, CANARY)) == []
    assert CANARY not in repr(manager) + repr(manager.settings)
    await manager.close()


async def test_the_doctor_knows_poolers(
    pooler: Pooler, own_database: str, empty_database: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    url = pooler.to(own_database)

    async def said(target: str) -> tuple[str, str, str]:
        findings = {finding.check: finding for finding in await examine(target)}
        assert findings["drift"].status == "ok", "the other checks work through it"
        return findings["pooler"].status, findings["pooler"].message + findings["pooler"].hint, findings["pooler"].code

    assert (await said(own_database))[0] == "ok"
    status, words, _ = await said(url)
    assert status == "warn"
    assert "CAR_CONTROL_PLANE_DIRECT_DATABASE_URL" in words
    monkeypatch.setenv("CAR_CONTROL_PLANE_DIRECT_DATABASE_URL", own_database)
    assert (await said(url))[0] == "ok"
    monkeypatch.setenv("CAR_CONTROL_PLANE_DIRECT_DATABASE_URL", url)
    assert (await said(url))[::2] == ("fail", "direct-connection-required")
    monkeypatch.setenv("CAR_CONTROL_PLANE_DIRECT_DATABASE_URL", empty_database)
    status, words, code = await said(url)
    assert (status, code) == ("fail", "configuration")
    assert "different databases" in words


# --- errors and cancellation --------------------------------------------------------------------------------------------


async def test_errors_come_as_without_a_pooler_and_the_connection_is_kept(pooled: AsyncConnectionManager) -> None:
    sql = "INSERT INTO control_plane.tenants (tenant_id, name, environment) VALUES ($1, $2, 'staging')"
    await pooled.fetch(sql, [uuid7(), "one"], repeat=False)
    with pytest.raises(AlreadyExistsError):
        await pooled.fetch(sql, [uuid7(), "one"], repeat=False)
    with pytest.raises(InvalidDataError):
        await pooled.fetch("SELECT 1 / $1::int", [0], repeat=False)
    with pytest.raises(InvalidDataError):
        await pooled.fetch("SELECT $1::int", ["not a number"], repeat=False)
    with pytest.raises(AlreadyExistsError):
        async with pooled.get_session() as session:
            await TenantRepository(session).create(TenantCreate(name="one", environment=TenantEnvironment.STAGING))
    async with pooled.get_read_session() as session:
        assert await TenantRepository(session).count(name_prefix="one") == 1
    assert pooled.pool_status().connects == 1


async def test_what_is_refused_only_at_the_commit_is_an_error(pooled: AsyncConnectionManager) -> None:
    connection = await pooled.connect()
    async with connection.transaction():
        await connection.execute("CREATE TABLE public.late (id int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
    sql = "INSERT INTO public.late VALUES ($1), ($1)"
    with pytest.raises(AlreadyExistsError):
        await pooled.fetch(sql, [1], repeat=False)
    with pytest.raises(asyncpg.UniqueViolationError):
        await connection.fetch(sql, 1)
    assert await connection.fetchval("SELECT count(*) FROM public.late") == 0
    await connection.close()


async def test_a_slow_statement_is_ended_by_the_server(pooler: Pooler, shared_database: str) -> None:
    async with AsyncConnectionManager(pooler.to(shared_database), statement_timeout_seconds=0.2) as manager:
        with pytest.raises(StatementTimeoutError):
            await manager.fetch("SELECT pg_sleep(30)", [], repeat=False)
        assert manager.pool_status().lost == 0


async def test_a_statement_with_its_frame_takes_one_time_limit(lone: Pooler, shared_database: str) -> None:
    url = lone.to(shared_database)
    async with AsyncConnectionManager(url, command_timeout_seconds=1, statement_timeout_seconds=0) as manager:
        await manager.fetch("SELECT 1", [], repeat=False)
        holder = await plain(url)
        transaction = holder.transaction()
        await transaction.start()
        call = asyncio.ensure_future(failure_of(manager.fetch("SELECT pg_sleep(0.7)", [], repeat=False)))
        await asyncio.sleep(0.7)  # the BEGIN waits for a server connection; the statement alone is within the limit
        await transaction.rollback()
        assert isinstance(await call, OutcomeUnknownError | StatementTimeoutError)
        await holder.close()


@pytest.mark.parametrize("again", [0, 1])
async def test_a_call_cancelled_at_any_point_is_cancelled_and_leaves_nothing(
    lone: Pooler, own_database: str, again: int
) -> None:
    """With one server connection: a transaction left open would stop everybody."""
    url = lone.to(own_database)
    async with AsyncConnectionManager(url, pool_size=1, max_overflow=0) as manager:
        await manager.fetch("SELECT 1", [], repeat=False)
        for at in range(1, 40):
            work = Cancelled(manager.fetch("SELECT $1::int AS it", [at], repeat=False), at, (at + again) * bool(again))
            task = asyncio.ensure_future(_awaited(work))
            if (error := (await asyncio.gather(task, return_exceptions=True))[0]) is not None:
                assert isinstance(error, asyncio.CancelledError), error
            elif work.waits < at:
                break
            rows = await manager.fetch("SELECT $1::int AS it", [-at], repeat=False)
            assert [row["it"] for row in rows] == [-at]
            assert manager.pool_status().in_use == 0
        else:
            pytest.fail("the work never came to its end")
        assert at > 4, "the points fall into the work"
    other = await plain(url)
    assert (
        await other.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%' AND datname = current_database()"
        )
        == 0
    )
    await other.close()


async def _awaited(work: Cancelled) -> None:
    await work


@pytest.mark.parametrize("then", ["time runs out", "cancelled"])
async def test_a_rollback_that_is_not_answered_hides_neither_the_error_nor_the_cancellation(
    server_dsn: str, shared_database: str, then: str
) -> None:
    with pgbouncer(server_dsn) as pooler:
        async with AsyncConnectionManager(pooler.to(shared_database)) as manager:
            connection: Any = await manager.connect()

            async def fails() -> None:
                try:
                    await asyncpg.Connection.fetch(connection, "SELECT 1 / 0")
                finally:
                    pooler.signal(signal.SIGSTOP)

            started = time.monotonic()
            try:
                work = asyncio.ensure_future(FramedConnection._framed(connection, fails))
                if then == "cancelled":
                    while not pooler.stopped:  # noqa: ASYNC110 -- nobody tells when a process has stopped
                        await asyncio.sleep(0.01)
                    await asyncio.sleep(0.05)
                    work.cancel()
                error = await failure_of(work)
            finally:
                pooler.signal(signal.SIGCONT)
            assert type(error) is (asyncio.CancelledError if then == "cancelled" else asyncpg.DivisionByZeroError)
            assert connection.is_closed()
            assert time.monotonic() - started < 60


async def test_a_call_cancelled_while_nobody_answers_is_cancelled(server_dsn: str, shared_database: str) -> None:
    """It waits for no rollback, whose own failure would take the place of the cancellation."""
    with pgbouncer(server_dsn) as pooler:
        async with AsyncConnectionManager(pooler.to(shared_database), command_timeout_seconds=5) as manager:
            connection = await manager.connect()
            work = asyncio.ensure_future(connection.fetch("SELECT pg_sleep(30)"))
            await asyncio.sleep(0.3)
            pooler.signal(signal.SIGSTOP)
            try:
                work.cancel()
                assert isinstance(await failure_of(work), asyncio.CancelledError)
                assert connection.is_closed()
            finally:
                pooler.signal(signal.SIGCONT)


async def test_a_pooler_without_a_free_server_connection_is_waited_for_and_no_longer(
    lone: Pooler, shared_database: str
) -> None:
    url = lone.to(shared_database)
    async with AsyncConnectionManager(url, connect_timeout_seconds=3, pool_timeout_seconds=1) as manager:
        holder = await plain(url)
        transaction = holder.transaction()
        await transaction.start()
        try:
            error = await failure_of(manager.fetch("SELECT 1", [], repeat=False))
        finally:
            await transaction.rollback()
            await holder.close()
        assert isinstance(error, ConnectionUnavailableError)
        assert not isinstance(error, PoolTimeoutError)
        assert "did not answer within 3 s" in str(error)
        assert [row["it"] for row in await manager.fetch("SELECT 1 AS it", [], repeat=False)] == [1]
