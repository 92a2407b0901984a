"""The schema goes up and down, alone and in company, and every failure is one of ours."""

import ast
import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from alembic import command, util
from alembic.config import Config
from alembic.script import ScriptDirectory

from car_control_plane import migrations
from car_control_plane.connection import AsyncConnectionManager
from car_control_plane.errors import (
    ConfigurationError,
    ConflictError,
    ConnectionUnavailableError,
    ControlPlaneError,
    MigrationError,
    SchemaMissingError,
    SchemaOutdatedError,
)
from car_control_plane.migrations import check, current, downgrade, drift, history, render_sql, upgrade, wait
from car_control_plane.models import REVISIONS, SYSTEM_ADMIN_ID
from car_control_plane.settings import load_settings
from tests.fixtures.postgres import create_database, drop_database
from tests.schema.rows import insert_database, insert_tenant
from tests.schema.scripts import HEAD, ROOT, add_revision, copy_scripts

SCHEMA_GONE = "SELECT to_regnamespace('control_plane') IS NULL"


@asynccontextmanager
async def connected(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    async with AsyncConnectionManager(dsn) as manager:
        connection = await manager.connect()
        yield connection
        await connection.close()


async def fetchval(dsn: str, query: str) -> Any:
    async with connected(dsn) as connection:
        return await connection.fetchval(query)


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the scripts that the library takes for its own."""
    scripts = copy_scripts(tmp_path)
    monkeypatch.setattr(migrations, "_scripts", lambda: scripts)
    return scripts


# --- the line of revisions --------------------------------------------------------------------------------------------


def test_there_is_one_line_of_revisions_and_the_models_name_it() -> None:
    line = history()
    assert tuple(step.revision for step in line) == REVISIONS
    assert [step.down_revision for step in line] == [None, *(step.revision for step in line[:-1])]
    assert all(step.description for step in line)
    config = Config()
    config.set_main_option("script_location", str(ROOT / "alembic"))
    assert ScriptDirectory.from_config(config).get_heads() == [REVISIONS[-1]]


@pytest.mark.parametrize("path", sorted((ROOT / "alembic" / "versions").glob("*.py")), ids=lambda path: path.stem)
def test_a_revision_is_called_as_its_file_and_imports_nothing_that_moves(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} <= {"alembic", "sqlalchemy"}
    assert path.stem in REVISIONS
    assert len(path.stem) <= 32


def test_the_scripts_are_no_package() -> None:
    """An `__init__.py` there would hide Alembic itself from whoever starts Python beside it."""
    assert not (ROOT / "alembic" / "__init__.py").exists()


# --- up and down ------------------------------------------------------------------------------------------------------


async def test_up_down_up(empty_database: str) -> None:
    assert await current(empty_database) is None
    result = await upgrade(empty_database)
    assert (result.before, result.after, result.revisions) == (None, HEAD, REVISIONS)
    assert await current(empty_database) == HEAD

    result = await downgrade(empty_database, "base")
    assert (result.before, result.after, result.revisions) == (HEAD, None, REVISIONS[::-1])
    assert await current(empty_database) is None
    assert await fetchval(empty_database, SCHEMA_GONE)

    await upgrade(empty_database)
    assert await drift(empty_database) == ()
    assert await check(empty_database) == ()


async def test_step_by_step(empty_database: str) -> None:
    assert (await upgrade(empty_database, "+1")).after == REVISIONS[0]
    assert (await upgrade(empty_database)).revisions == REVISIONS[1:]
    assert (await upgrade(empty_database)).revisions == ()
    assert (await downgrade(empty_database)).revisions == (REVISIONS[-1],)
    for before in reversed(REVISIONS[:-2]):
        assert (await downgrade(empty_database, "-1")).after == before
    assert (await downgrade(empty_database, "-1")).after is None
    assert await fetchval(empty_database, SCHEMA_GONE)


async def test_what_is_not_ours_stays(empty_database: str) -> None:
    async with connected(empty_database) as connection:
        await connection.execute(
            "CREATE TABLE public.tenants (tenant_id int); CREATE SCHEMA other; CREATE TABLE other.t ()"
        )
        await upgrade(empty_database)
        assert await check(empty_database) == ()
        await connection.execute("CREATE TABLE control_plane.theirs ()")
        await downgrade(empty_database, "base")
        assert await connection.fetchval("SELECT to_regclass('control_plane.theirs') IS NOT NULL")
        assert await connection.fetchval("SELECT to_regclass('control_plane.alembic_version') IS NULL")
        await upgrade(empty_database)


async def test_downgrading_keeps_what_the_lower_revision_has(own_database: str) -> None:
    async with connected(own_database) as connection:
        tenant = await insert_tenant(connection)
        await downgrade(own_database, REVISIONS[0])
        remaining = "SELECT tenant_id FROM control_plane.tenants ORDER BY tenant_id"
        assert [row[0] for row in await connection.fetch(remaining)] == [tenant]
        await upgrade(own_database)
        assert [row[0] for row in await connection.fetch(remaining)] == [SYSTEM_ADMIN_ID, tenant]
        with pytest.raises(asyncpg.CheckViolationError):  # its guard is back
            await connection.execute("DELETE FROM control_plane.tenants WHERE tenant_id = $1", SYSTEM_ADMIN_ID)


async def test_system_admin_stays_as_long_as_it_owns_a_database(own_database: str) -> None:
    async with connected(own_database) as connection:
        await insert_database(connection, SYSTEM_ADMIN_ID)
        before = await connection.fetchrow("SELECT * FROM control_plane.tenants")
        await downgrade(own_database, REVISIONS[0])
        await upgrade(own_database)
        assert await connection.fetchrow("SELECT * FROM control_plane.tenants") == before


async def test_base_drops_tables_full_of_rows(own_database: str) -> None:
    async with connected(own_database) as connection:
        await insert_database(connection, await insert_tenant(connection))
    await downgrade(own_database, "base")
    assert await fetchval(own_database, SCHEMA_GONE)


async def test_system_admin_is_as_the_seed_says(own_database: str) -> None:
    async with connected(own_database) as connection:
        row = await connection.fetchrow("SELECT * FROM control_plane.tenants")
    assert (row["tenant_id"], row["name"], row["environment"], row["status"]) == (
        SYSTEM_ADMIN_ID,
        "system_admin",
        "production",
        "active",
    )


@pytest.mark.parametrize("kind", ["settings", "manager"])
async def test_other_targets(empty_database: str, kind: str) -> None:
    if kind == "settings":
        assert (await upgrade(load_settings(database_url=empty_database))).after == HEAD
        return
    async with AsyncConnectionManager(empty_database) as manager:
        await upgrade(manager)
        assert await manager.health_check()  # it was not closed


async def test_the_target_is_database_url_when_none_is_given(
    empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", empty_database)
    await upgrade()
    assert await current() == HEAD
    monkeypatch.delenv("DATABASE_URL")
    with pytest.raises(ConfigurationError, match=r"^DATABASE_URL environment variable is required"):
        await upgrade()


# --- in company -------------------------------------------------------------------------------------------------------


async def test_tasks_at_once(empty_database: str) -> None:
    results = await asyncio.gather(*(upgrade(empty_database) for _ in range(4)))
    assert sorted(len(result.revisions) for result in results) == [0, 0, 0, len(REVISIONS)]


async def test_threads_with_loops_of_their_own(server_dsn: str, template_database: str) -> None:
    """Different databases, so the lock in the database keeps nobody out: Alembic's globals are what they share."""
    names = [f"{template_database}_{number}" for number in range(3)]
    dsns = [await create_database(server_dsn, name) for name in names]
    results: list[Any] = []
    failures: list[BaseException] = []

    def work(dsn: str) -> None:
        try:
            results.append(asyncio.run(upgrade(dsn)))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(dsn,)) for dsn in dsns]
    try:
        for thread in threads:
            thread.start()
        here = await asyncio.gather(*(upgrade(dsn) for dsn in dsns))
        for thread in threads:
            await asyncio.to_thread(thread.join)
        assert failures == []
        assert sorted(len(result.revisions) for result in [*here, *results]) == [0] * 3 + [len(REVISIONS)] * 3
    finally:
        for name in names:
            await drop_database(server_dsn, name)


async def test_a_migration_waits_for_the_one_under_way(own_database: str) -> None:
    async with connected(own_database) as other:
        await other.execute("SELECT pg_advisory_lock($1)".replace("$1", str(migrations._LOCK_KEY)))
        waiting = asyncio.create_task(downgrade(own_database))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(waiting), 0.7)
        # Whoever waits does so without a transaction: a concurrent index build would wait for that.
        idle = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND pid <> pg_backend_pid() AND backend_type = 'client backend' AND backend_xmin IS NOT NULL"
        )
        assert await other.fetchval(idle) == 0
        await other.execute("SELECT pg_advisory_unlock_all()")
        assert (await waiting).after == REVISIONS[-2]


async def test_a_migration_does_not_wait_for_ever(own_database: str) -> None:
    async with connected(own_database) as other:
        await other.fetchval("SELECT pg_advisory_lock($1)", migrations._LOCK_KEY)
        with pytest.raises(ConflictError, match="another process is migrating this database") as caught:
            await downgrade(load_settings(database_url=own_database, migration_lock_timeout_seconds=0.1))
        assert caught.value.details["pid"] == other.get_server_pid()
        assert caught.value.retryable
        assert await current(own_database) == HEAD  # looking needs no lock


async def test_the_lock_goes_with_the_migration_whatever_its_end(own_database: str, scripts: Path) -> None:
    add_revision(scripts, "005_fails", 'op.execute("SELECT 1 / 0")')
    impatient = load_settings(database_url=own_database, migration_lock_timeout_seconds=5)
    for _ in range(2):
        with pytest.raises(MigrationError):
            await upgrade(impatient)
    assert not migrations._alembic.locked()


async def test_a_lock_that_cannot_be_had_is_tried_again(own_database: str) -> None:
    settings = load_settings(database_url=own_database, lock_timeout_seconds=0.1)
    async with connected(own_database) as reader:
        transaction = reader.transaction()
        await transaction.start()
        await reader.fetchval("SELECT count(*) FROM control_plane.tenants")
        migrating = asyncio.create_task(downgrade(settings, "base"))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(migrating), 1.0)
        await transaction.rollback()
        assert (await migrating).after is None


async def test_not_for_ever_either(own_database: str) -> None:
    settings = load_settings(database_url=own_database, lock_timeout_seconds=0.1, migration_lock_timeout_seconds=0.2)
    async with connected(own_database) as reader, reader.transaction():
        await reader.fetchval("SELECT count(*) FROM control_plane.tenants")
        with pytest.raises(ConflictError) as caught:
            await downgrade(settings, "base")
        assert caught.value.details["sqlstate"] == "55P03"
        assert caught.value.retryable
    assert await current(own_database) == REVISIONS[0]  # what is done is done


async def test_a_migration_may_take_its_time(own_database: str, scripts: Path) -> None:
    add_revision(scripts, "005_slow", 'op.execute("SELECT pg_sleep(0.5)")')
    settings = load_settings(
        database_url=own_database,
        statement_timeout_seconds=0.1,
        command_timeout_seconds=0.2,
        idle_in_transaction_timeout_seconds=0.1,
    )
    assert (await upgrade(settings)).after == "005_slow"


# --- failures ---------------------------------------------------------------------------------------------------------


async def test_a_failing_migration_is_rolled_back_and_named(own_database: str, scripts: Path) -> None:
    add_revision(
        scripts,
        "005_fails",
        """
        op.create_table("t", sa.Column("id", sa.Integer()), schema="control_plane")
        op.execute("SELECT name::int FROM control_plane.tenants")
        """,
    )
    with pytest.raises(MigrationError) as caught:
        await upgrade(own_database)
    error = caught.value
    # Nothing of what the server says: invalid input syntax for type integer: "system_admin"
    assert error.message == "005_fails failed: the server log says why (SQLSTATE 22P02)"
    assert error.details == {"revision": "005_fails", "sqlstate": "22P02"}
    assert error.__cause__ is None
    assert error.__context__ is None
    assert await current(own_database) == HEAD
    assert await fetchval(own_database, "SELECT to_regclass('control_plane.t') IS NULL")


async def test_what_the_server_says_about_the_schema_is_passed_on(own_database: str, scripts: Path) -> None:
    add_revision(scripts, "005_twice", 'op.execute("CREATE TYPE control_plane.tenant_status AS ENUM ()")')
    with pytest.raises(MigrationError, match=r'type "tenant_status" already exists \(SQLSTATE 42710\)'):
        await upgrade(own_database)


async def test_the_migrations_before_a_failing_one_stay(empty_database: str, scripts: Path) -> None:
    add_revision(scripts, "005_fails", 'op.execute("SELECT 1 / 0")')
    with pytest.raises(MigrationError):
        await upgrade(empty_database)
    assert await current(empty_database) == HEAD


async def test_a_first_migration_that_fails_leaves_nothing(empty_database: str, scripts: Path) -> None:
    first = scripts / "versions" / f"{REVISIONS[0]}.py"
    text = first.read_text(encoding="utf-8").replace("    _create_log()\n\n", '    op.execute("SELECT 1 / 0")\n\n', 1)
    first.write_text(text, encoding="utf-8")
    with pytest.raises(MigrationError, match=f"{REVISIONS[0]} failed"):
        await upgrade(empty_database)
    assert await fetchval(empty_database, SCHEMA_GONE)


async def test_a_mistake_in_a_script_keeps_its_traceback(own_database: str, scripts: Path) -> None:
    add_revision(scripts, "005_mistake", "1 / 0")
    with pytest.raises(ZeroDivisionError):
        await upgrade(own_database)


@pytest.mark.parametrize("revision", ["nope", "+5", "005_other"])
async def test_there_is_no_such_revision(empty_database: str, revision: str) -> None:
    with pytest.raises(MigrationError) as caught:
        await upgrade(empty_database, revision)
    assert caught.value.details["known"] == list(REVISIONS)
    assert REVISIONS[0] in caught.value.hint
    assert await fetchval(empty_database, SCHEMA_GONE)


async def test_a_database_ahead_of_the_code(own_database: str) -> None:
    async with connected(own_database) as connection:
        await connection.execute("UPDATE control_plane.alembic_version SET version_num = '999_future'")
    assert await current(own_database) == "999_future"
    for attempt in (upgrade, downgrade, check, drift, wait):
        with pytest.raises(SchemaOutdatedError, match="999_future") as caught:
            await attempt(own_database)
        assert caught.value.details == {"revision": "999_future", "head": HEAD}
        assert "Upgrade the library" in caught.value.hint


async def test_a_version_table_changed_by_hand(own_database: str) -> None:
    async with connected(own_database) as connection:
        await connection.execute("INSERT INTO control_plane.alembic_version VALUES ($1)", REVISIONS[0])
    with pytest.raises(MigrationError, match="more than one revision"):
        await current(own_database)


async def test_looking_at_a_database_that_is_not_at_the_head(empty_database: str) -> None:
    for look in (check, drift):
        with pytest.raises(SchemaMissingError):
            await look(empty_database)
    await upgrade(empty_database, REVISIONS[0])
    for look in (check, drift):
        with pytest.raises(SchemaOutdatedError, match="behind"):
            await look(empty_database)
    await downgrade(empty_database, "base")


async def test_a_server_that_is_not_there() -> None:
    for attempt in (upgrade, downgrade, current, check, drift):
        with pytest.raises(ConnectionUnavailableError) as caught:
            await attempt("postgresql://nobody:s3cret@127.0.0.1:1/x")
        assert "s3cret" not in repr(caught.value)


async def test_a_connection_that_breaks_during_a_migration(own_database: str, scripts: Path) -> None:
    add_revision(scripts, "005_breaks", 'op.execute("SELECT pg_terminate_backend(pg_backend_pid())")')
    with pytest.raises(ConnectionUnavailableError):
        await upgrade(own_database)
    assert await current(own_database) == HEAD


async def test_the_lock_is_lost_while_waiting_for_it(own_database: str) -> None:
    async with connected(own_database) as other:
        await other.fetchval("SELECT pg_advisory_lock($1)", migrations._LOCK_KEY)
        waiting = asyncio.create_task(upgrade(own_database))
        others = "SELECT pid FROM pg_stat_activity WHERE query LIKE 'SELECT pg_try_advisory_lock%' AND datname = current_database()"
        while (pid := await other.fetchval(others)) is None:  # noqa: ASYNC110 -- the other side is a server
            await asyncio.sleep(0.02)
        await other.fetchval("SELECT pg_terminate_backend($1)", pid)
        with pytest.raises(ConnectionUnavailableError) as caught:
            await waiting
        assert caught.value.__context__ is None


# --- what check sees --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("DROP INDEX control_plane.idx_tenants_status", "op.create_index(op.f('idx_tenants_status')"),
        (
            "ALTER TABLE control_plane.tenants DROP COLUMN status_reason",
            "op.add_column('tenants', sa.Column('status_reason'",
        ),
        (
            "ALTER TABLE control_plane.tenant_databases ALTER host TYPE text",
            "op.alter_column('tenant_databases', 'host'",
        ),
        ("ALTER TABLE control_plane.tenants ALTER labels DROP DEFAULT", "op.alter_column('tenants', 'labels'"),
        (
            "ALTER TABLE control_plane.tenants DROP CONSTRAINT ck_tenants_labels",
            "op.create_check_constraint(op.f('ck_tenants_labels')",
        ),
        ("CREATE TABLE control_plane.theirs (id int)", "op.drop_table('theirs'"),
        (
            "ALTER TYPE control_plane.tenant_status RENAME VALUE 'inactive' TO 'off'",
            "ADD VALUE IF NOT EXISTS 'inactive'",
        ),
        ("CREATE TYPE control_plane.theirs AS ENUM ('a')", "DROP TYPE control_plane.theirs"),
    ],
)
async def test_check_says_what_would_have_to_be_done(own_database: str, change: str, expected: str) -> None:
    async with connected(own_database) as connection:
        await connection.execute(change)
    differences = await check(own_database)
    assert any(expected in difference for difference in differences), differences


# --- waiting ----------------------------------------------------------------------------------------------------------


async def test_wait_returns_when_the_schema_is_there(empty_database: str) -> None:
    waiting = asyncio.create_task(wait(empty_database, timeout_seconds=60))
    await upgrade(empty_database)
    await waiting


@pytest.mark.parametrize(("revision", "expected"), [("", SchemaMissingError), (REVISIONS[0], SchemaOutdatedError)])
async def test_wait_gives_up(empty_database: str, revision: str, expected: type[ControlPlaneError]) -> None:
    if revision:
        await upgrade(empty_database, revision)
    with pytest.raises(expected):
        await wait(empty_database, timeout_seconds=0.1)


async def test_wait_for_a_server_that_does_not_come() -> None:
    with pytest.raises(ConnectionUnavailableError):
        await wait("postgresql://127.0.0.1:1/x", timeout_seconds=0.1)


async def test_wait_does_not_wait_for_what_no_time_mends(server_dsn: str) -> None:
    separator = "&" if "?" in server_dsn else "?"
    with pytest.raises(ConfigurationError):
        await wait(f"{server_dsn}{separator}dbname=car_cp_there_is_no_such", timeout_seconds=600)


# --- SQL to run by hand -----------------------------------------------------------------------------------------------


async def test_the_sql_script_makes_the_same_schema(empty_database: str) -> None:
    async with connected(empty_database) as connection:
        await connection.execute(render_sql())
    assert await current(empty_database) == HEAD
    assert await drift(empty_database) == ()
    assert await check(empty_database) == ()
    await downgrade(empty_database, "base")
    assert await fetchval(empty_database, SCHEMA_GONE)


async def test_the_sql_script_in_parts(empty_database: str) -> None:
    async with connected(empty_database) as connection:
        await connection.execute(render_sql(REVISIONS[0]))
        assert await current(empty_database) == REVISIONS[0]
        await connection.execute(render_sql(from_=REVISIONS[0]))
    assert await drift(empty_database) == ()


def test_the_sql_script_needs_no_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)
    assert "CREATE SCHEMA control_plane" in render_sql()
    assert "CREATE SCHEMA" not in render_sql(from_=REVISIONS[0])


def test_the_sql_script_of_an_unknown_revision() -> None:
    for arguments in ({"revision": "nope"}, {"from_": "nope"}):
        with pytest.raises(MigrationError) as caught:
            render_sql(**arguments)
        assert caught.value.__context__ is None


async def test_rendering_blocks_no_loop_that_migrates(empty_database: str) -> None:
    async with migrations._turn():
        with pytest.raises(ConflictError, match=r"Use await asyncio\.to_thread"):
            render_sql()
        in_thread = asyncio.create_task(asyncio.to_thread(render_sql))
        await asyncio.sleep(0.05)
        assert not in_thread.done()
    assert "CREATE TABLE" in await in_thread


# --- programs that use Alembic themselves -----------------------------------------------------------------------------


def config_for(connection: Any) -> Config:
    config = Config(ROOT / "alembic.ini")
    config.attributes["connection"] = connection
    return config


async def test_a_connection_that_is_passed_is_used(empty_database: str) -> None:
    async with AsyncConnectionManager(empty_database) as manager, manager.engine.connect() as connection:
        await connection.run_sync(lambda sync: command.upgrade(config_for(sync), "head"))
        await connection.run_sync(lambda sync: command.check(config_for(sync)))
        assert await current(manager) == HEAD
        locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
        assert (await connection.exec_driver_sql(locks)).scalar() == 0


async def test_what_is_in_its_search_path_confuses_nobody(own_database: str) -> None:
    async with AsyncConnectionManager(own_database) as manager:
        engine = manager.create_engine(server_settings={"search_path": "control_plane, public"})
        async with engine.connect() as connection:
            assert connection.dialect.default_schema_name == "control_plane"
            await connection.run_sync(lambda sync: command.check(config_for(sync)))
            assert connection.dialect.default_schema_name == "control_plane"
            assert (await connection.exec_driver_sql("SHOW search_path")).scalar() == "control_plane, public"
        await engine.dispose()


async def test_an_open_transaction_is_left_to_whoever_opened_it(empty_database: str) -> None:
    async with AsyncConnectionManager(empty_database) as manager, manager.engine.connect() as connection:
        transaction = await connection.begin()
        await connection.run_sync(lambda sync: command.upgrade(config_for(sync), "head"))
        assert connection.in_transaction()
        with pytest.raises(ConflictError):
            await upgrade(load_settings(database_url=empty_database, migration_lock_timeout_seconds=0.1))
        await transaction.rollback()
        assert await current(manager) is None
    assert await fetchval(empty_database, SCHEMA_GONE)


async def test_a_connection_that_is_passed_does_not_push_in(own_database: str) -> None:
    async with connected(own_database) as other, AsyncConnectionManager(own_database) as manager:
        await other.fetchval("SELECT pg_advisory_lock($1)", migrations._LOCK_KEY)
        async with manager.engine.connect() as connection:
            with pytest.raises(ConflictError):
                await connection.run_sync(lambda sync: command.downgrade(config_for(sync), "base"))
    assert await current(own_database) == HEAD


async def test_a_program_in_a_loop_is_told_the_way() -> None:
    with pytest.raises(util.CommandError, match=r"await car_control_plane\.migrations\.upgrade"):
        command.upgrade(Config(ROOT / "alembic.ini"), "head")
