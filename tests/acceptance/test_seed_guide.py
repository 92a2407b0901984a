"""The setup guide this project began with, walked from top to bottom: every table, column, type, index, command, example and trouble.

Its examples are synchronous and import from `src.db`; here they are async and import from `car_control_plane`, and are otherwise as they stand there.
"""

import os
import re
import subprocess
import sys
import uuid
from pathlib import Path

import asyncpg
import pytest
from sqlmodel import select

import car_control_plane
from car_control_plane import connection
from car_control_plane.connection import AsyncConnectionManager, get_connection_manager, init_db
from car_control_plane.dsn import parse
from car_control_plane.errors import ConfigurationError, PermissionDeniedError, SchemaMissingError
from car_control_plane.models import Tenant, TenantEnvironment, TenantStatus
from tests.fixtures.postgres import create_database, database_dsn, drop_database

ROOT = Path(car_control_plane.__file__).parents[1]


@pytest.fixture(autouse=True)
def no_default_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_default", None)


def alembic(*arguments: str, url: str | None, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run the `alembic` command as the guide does."""
    environment = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
    if url is not None:
        environment["DATABASE_URL"] = url
    return subprocess.run(
        [sys.executable, "-m", "alembic", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


async def connect(dsn: str) -> asyncpg.Connection:
    parsed = parse(dsn)
    return await asyncpg.connect(parsed.for_host(parsed.hosts[0]), password=parsed.password)


# --- Prerequisites


async def test_the_server_is_postgresql_12_or_newer(server_dsn: str) -> None:
    server = await connect(server_dsn)
    try:
        assert server.get_server_version() >= (12,)
    finally:
        await server.close()


@pytest.mark.parametrize("how", ["environment", ".env"])
async def test_the_url_comes_from_the_environment_or_from_a_file(
    own_database: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.chdir(tmp_path)
    if how == "environment":
        monkeypatch.setenv("DATABASE_URL", own_database)
    else:
        (tmp_path / ".env").write_text(f"DATABASE_URL={own_database}\n")
    manager = init_db()
    try:
        assert await manager.health_check()
    finally:
        await manager.close()


def test_the_url_of_the_guide_is_read_as_it_is_meant() -> None:
    url = parse("postgresql://user:password@localhost:5432/control_plane")
    assert [(host.name, host.port) for host in url.hosts] == [("localhost", 5432)]
    assert (url.user, url.password, url.database) == ("user", "password", "control_plane")


def test_the_placeholders_of_the_guide_are_not_taken_for_a_server() -> None:
    with pytest.raises(ConfigurationError, match="has a port that is not a number") as caught:
        init_db("postgresql://user:pass@host:port/db")
    assert "postgresql://user:password@host:5432/database" in caught.value.hint


# --- Installation and Migrations


def test_the_dependencies_are_pinned_in_one_file() -> None:
    """`pip install -r requirements.txt`: everything the migrations need, each with its hashes."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    for package in ("alembic", "asyncpg", "pydantic-settings", "sqlalchemy", "sqlmodel"):
        assert re.search(rf"^{package}==\S+ \\\n    --hash=sha256:", text, re.MULTILINE), package


def test_the_commands_of_the_guide(empty_database: str, tmp_path: Path) -> None:
    """`upgrade head`, `current`, `history`, `downgrade -1`, `revision --autogenerate -m`, in the order a reader tries them."""

    def run(*arguments: str) -> str:
        result = alembic(*arguments, url=empty_database)
        assert result.returncode == 0, result.stderr
        return result.stdout

    run("upgrade", "head")
    assert run("current").split() == ["004_completed_operations", "(head)"]
    history = run("history")
    assert "001_control_plane_schema -> 002_seed_data," in history
    assert "<base> -> 001_control_plane_schema" in history
    run("check")
    run("downgrade", "-1")
    assert run("current").split() == ["003_sealed_connection_strings"]
    run("upgrade", "head")
    assert run("current").split() == ["004_completed_operations", "(head)"]


async def test_rolling_the_seed_back_takes_only_the_seed(own_database: str) -> None:
    async with AsyncConnectionManager(own_database) as manager:
        async with manager.get_session() as session:
            session.add(Tenant(name="acme_corp", environment=TenantEnvironment.PRODUCTION))
        result = alembic("downgrade", "001_control_plane_schema", url=own_database)
        assert result.returncode == 0, result.stderr
        async with manager.get_read_session() as reading:
            assert (await reading.exec(select(Tenant.name))).all() == ["acme_corp"]


def test_a_new_migration_of_unchanged_models_is_empty(own_database: str, tmp_path: Path) -> None:
    # The command writes beside the other scripts, so it works on a copy of them.
    for name in ("alembic", "alembic.ini", "car_control_plane"):
        source, copy = ROOT / name, tmp_path / name
        subprocess.run(["cp", "-r", str(source), str(copy)], check=True)
    result = alembic("revision", "--autogenerate", "-m", "description", url=own_database, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (script,) = [path for path in (tmp_path / "alembic/versions").glob("*.py") if "description" in path.name]
    text = script.read_text()
    assert not re.search(r"\bop\.", text)
    assert "import sqlmodel" not in text
    assert "pass" in text


# --- Database Schema

COLUMNS = {
    "tenants": [
        ("tenant_id", "uuid", "NO"),
        ("name", "character varying(255)", "NO"),
        ("environment", "control_plane.tenant_environment", "NO"),
        ("status", "control_plane.tenant_status", "NO"),
        ("created_at", "timestamp with time zone", "NO"),
        ("updated_at", "timestamp with time zone", "NO"),
    ],
    "tenant_databases": [
        ("id", "uuid", "NO"),
        ("tenant_id", "uuid", "NO"),
        ("connection_string_encrypted", "text", "NO"),
        ("database_name", "character varying(255)", "NO"),
        ("host", "character varying(255)", "NO"),
        ("port", "integer", "NO"),
        ("status", "control_plane.tenant_database_status", "NO"),
        ("created_at", "timestamp with time zone", "NO"),
        ("updated_at", "timestamp with time zone", "NO"),
    ],
    "system_config": [
        ("key", "character varying(255)", "NO"),
        ("value", "jsonb", "NO"),
        ("updated_at", "timestamp with time zone", "NO"),
    ],
}


@pytest.mark.parametrize("table", COLUMNS)
async def test_every_column_stands_where_the_guide_has_it(own_database: str, table: str) -> None:
    database = await connect(own_database)
    try:
        rows = await database.fetch(
            """SELECT attname::text, format_type(atttypid, atttypmod), CASE WHEN attnotnull THEN 'NO' ELSE 'YES' END
               FROM pg_attribute WHERE attrelid = ('control_plane.' || $1::text)::regclass AND attnum > 0 AND NOT attisdropped
               ORDER BY attnum""",
            table,
        )
    finally:
        await database.close()
    expected = COLUMNS[table]
    assert [tuple(row) for row in rows][: len(expected)] == expected


@pytest.mark.parametrize(
    ("table", "index", "columns"),
    [
        ("tenants", "idx_tenants_status", "(status)"),
        ("tenant_databases", "idx_tenant_databases_tenant_id", "(tenant_id)"),
        ("tenant_databases", "idx_tenant_databases_status", "(status)"),
    ],
)
async def test_every_index_of_the_guide_is_there(own_database: str, table: str, index: str, columns: str) -> None:
    database = await connect(own_database)
    try:
        definition = await database.fetchval(
            "SELECT indexdef FROM pg_indexes WHERE schemaname = 'control_plane' AND tablename = $1 AND indexname = $2",
            table,
            index,
        )
    finally:
        await database.close()
    assert definition.endswith(columns)


async def test_keys_enums_and_defaults_are_the_guides(own_database: str) -> None:
    database = await connect(own_database)
    try:
        keys = await database.fetch(
            """SELECT conrelid::regclass::text, contype::text, pg_get_constraintdef(oid) FROM pg_constraint
               WHERE connamespace = 'control_plane'::regnamespace AND contype IN ('p', 'u', 'f')"""
        )
        enums = await database.fetch(
            """SELECT typname::text, array_agg(enumlabel::text ORDER BY enumsortorder) FROM pg_type JOIN pg_enum ON enumtypid = pg_type.oid
               WHERE typnamespace = 'control_plane'::regnamespace GROUP BY 1"""
        )
        port = await database.fetchval(
            """SELECT column_default FROM information_schema.columns
               WHERE table_schema = 'control_plane' AND table_name = 'tenant_databases' AND column_name = 'port'"""
        )
    finally:
        await database.close()
    assert {
        ("control_plane.tenants", "p", "PRIMARY KEY (tenant_id)"),
        ("control_plane.tenants", "u", "UNIQUE (name)"),
        ("control_plane.tenant_databases", "p", "PRIMARY KEY (id)"),
        (
            "control_plane.tenant_databases",
            "f",
            "FOREIGN KEY (tenant_id) REFERENCES control_plane.tenants(tenant_id) ON DELETE RESTRICT",
        ),
        ("control_plane.system_config", "p", "PRIMARY KEY (key)"),
    } <= {tuple(row) for row in keys}
    found = dict(tuple(row) for row in enums)
    assert {
        "tenant_environment": ["development", "staging", "production"],
        "tenant_status": ["active", "inactive", "suspended", "pending"],
        "tenant_database_status": ["active", "inactive", "migrating", "error"],
    }.items() <= found.items()
    assert port == "5432"


@pytest.mark.parametrize(
    ("change", "row"),
    [
        (
            'UPDATE control_plane.tenants SET labels = \'{"a": "b"}\'',
            "SELECT created_at, updated_at FROM control_plane.tenants",
        ),
        (
            "UPDATE control_plane.system_config SET value = '2'",
            "SELECT timestamptz '2020-01-01', updated_at FROM control_plane.system_config",
        ),
        (
            "UPDATE control_plane.tenant_databases SET port = 5433",
            "SELECT created_at, updated_at FROM control_plane.tenant_databases",
        ),
    ],
)
async def test_updated_at_is_updated_by_itself(own_database: str, change: str, row: str) -> None:
    database = await connect(own_database)
    try:
        await database.execute("INSERT INTO control_plane.system_config (key, value) VALUES ('k', '1')")
        await database.execute(
            """INSERT INTO control_plane.tenant_databases (id, tenant_id, connection_string_encrypted, database_name, host)
               SELECT tenant_id, tenant_id, 'ccp1:k:AAAA', 'd', 'h' FROM control_plane.tenants"""
        )
        await database.execute(change)
        created, updated = await database.fetchrow(row)
    finally:
        await database.close()
    assert updated > created


# --- Usage


async def test_initialize_database_connection(own_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", own_database)
    # Initialize with default DATABASE_URL from environment
    manager = init_db()
    assert get_connection_manager() is manager
    await manager.close()
    # Or with custom URL
    manager = init_db(own_database)
    assert get_connection_manager() is manager
    await manager.close()


async def test_using_database_sessions(own_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", own_database)
    manager = get_connection_manager()

    # Context manager (auto-commits/rollbacks)
    async with manager.get_session() as session:
        tenant = (await session.exec(select(Tenant).where(Tenant.name == "system_admin"))).first()
        assert tenant is not None
        assert "system_admin" in repr(tenant)

    # Direct session (must close manually)
    session = manager.get_session_direct()
    try:
        assert (await session.exec(select(Tenant))).all()
    finally:
        await session.close()
    await manager.close()


async def test_a_session_rolls_back_by_itself(own_database: str) -> None:
    manager = init_db(own_database)
    with pytest.raises(LookupError):
        await _add_and_fail(manager)
    async with manager.get_read_session() as reading:
        assert (await reading.exec(select(Tenant.name))).all() == ["system_admin"]
    await manager.close()


async def _add_and_fail(manager: AsyncConnectionManager) -> None:
    async with manager.get_session() as session:
        session.add(Tenant(name="acme_corp", environment=TenantEnvironment.PRODUCTION))
        await session.flush()
        raise LookupError


async def test_working_with_models(own_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", own_database)
    manager = get_connection_manager()

    async with manager.get_session() as session:
        # Create a new tenant
        tenant = Tenant(
            tenant_id=uuid.uuid4(),
            name="acme_corp",
            environment=TenantEnvironment.PRODUCTION,
            status=TenantStatus.ACTIVE,
        )
        session.add(tenant)
        # Session commits automatically on exit

    async with manager.get_read_session() as read:
        stored = (await read.exec(select(Tenant).where(Tenant.name == "acme_corp"))).one()
    assert (stored.tenant_id, stored.status) == (tenant.tenant_id, TenantStatus.ACTIVE)
    await manager.close()


# --- Seed Data and Health Check


async def test_the_seed_is_system_admin_in_production_and_active(own_database: str) -> None:
    manager = init_db(own_database)
    async with manager.get_read_session() as session:
        (tenant,) = (await session.exec(select(Tenant))).all()
    await manager.close()
    assert (tenant.name, tenant.environment, tenant.status) == (
        "system_admin",
        TenantEnvironment.PRODUCTION,
        TenantStatus.ACTIVE,
    )


async def test_health_check(own_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", own_database)
    manager = get_connection_manager()
    said = "Database connection is healthy" if await manager.health_check() else "Database connection failed"
    await manager.close()
    assert said == "Database connection is healthy"


async def test_health_check_of_a_server_that_is_not_there() -> None:
    manager = init_db("postgresql://user:password@localhost:1/control_plane")
    said = "Database connection is healthy" if await manager.health_check() else "Database connection failed"
    await manager.close()
    assert said == "Database connection failed"


# --- Troubleshooting


def test_the_url_is_required(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError) as caught:
        init_db()
    assert caught.value.message == "DATABASE_URL environment variable is required"
    assert '$env:DATABASE_URL="' in caught.value.hint
    result = alembic("upgrade", "head", url=None)
    assert result.returncode != 0
    assert "DATABASE_URL environment variable is required" in result.stderr + result.stdout
    assert "Traceback" not in result.stderr


async def test_relation_does_not_exist(empty_database: str) -> None:
    server = await connect(empty_database)
    await server.execute("CREATE SCHEMA control_plane")
    await server.close()
    manager = init_db(empty_database)
    with pytest.raises(SchemaMissingError) as caught:
        async with manager.get_session() as session:
            await session.exec(select(Tenant))
    assert caught.value.message == "relation does not exist"
    assert "Run migrations: alembic upgrade head" in caught.value.hint
    # The fix of the guide; the schema that was there is taken as it is.
    assert alembic("upgrade", "head", url=empty_database).returncode == 0
    async with manager.get_session() as session:
        assert (await session.exec(select(Tenant.name))).all() == ["system_admin"]
    await manager.close()


async def test_the_schema_does_not_exist_until_the_migration_creates_it(empty_database: str) -> None:
    manager = init_db(empty_database)
    health = await manager.health_check()
    await manager.close()
    assert not health
    assert isinstance(health.error, SchemaMissingError)
    assert health.error.message == "schema 'control_plane' does not exist"
    assert alembic("upgrade", "head", url=empty_database).returncode == 0


async def test_permission_denied_until_the_user_may_create_the_schema(server_dsn: str) -> None:
    name, role = f"car_cp_seed_{uuid.uuid4().hex[:12]}", f"car_cp_seed_{uuid.uuid4().hex[:12]}"
    server = await connect(server_dsn)
    await server.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'only-for-this-test'")
    dsn = await create_database(server_dsn, name)
    try:
        parsed = parse(database_dsn(server_dsn, name))
        as_role = re.sub(r"//[^@]*@", f"//{role}:only-for-this-test@", parsed.reveal())
        denied = alembic("upgrade", "head", url=as_role)
        assert denied.returncode != 0
        said = denied.stderr + denied.stdout
        assert "permission denied" in said
        assert "GRANT CREATE ON DATABASE" in said
        assert "Traceback" not in said
        assert "only-for-this-test" not in said
        await server.execute(f"GRANT CREATE ON DATABASE {name} TO {role}")
        granted = alembic("upgrade", "head", url=as_role)
        assert granted.returncode == 0, granted.stderr
    finally:
        await drop_database(server_dsn, name)
        await server.execute(f"DROP ROLE {role}")
        await server.close()
    assert dsn


def test_the_permissions_of_the_guide_stand_in_the_hint() -> None:
    hint = PermissionDeniedError().hint
    for permission in ("CREATE SCHEMA permission", "CREATE TABLE permission", "CREATE TYPE permission (for enums)"):
        assert permission in hint
