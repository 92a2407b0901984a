"""Roles: the right to write a table is enough to write it, and is no way to anything else."""

import asyncpg
import pytest

from car_control_plane import dsn as dsns
from car_control_plane.connection import AsyncConnectionManager
from car_control_plane.errors import PermissionDeniedError
from car_control_plane.migrations import check, current, downgrade, drift, upgrade
from car_control_plane.models import REVISIONS
from tests.schema.rows import acting_as, insert_database, insert_tenant

WRITER = """
GRANT USAGE ON SCHEMA control_plane TO {role};
GRANT SELECT, INSERT, UPDATE, DELETE ON control_plane.tenants, control_plane.tenant_databases, control_plane.system_config,
    control_plane.encryption_keys TO {role};
"""


@pytest.fixture
async def writer(role: str, connection: asyncpg.Connection) -> str:
    """A role with rights on the three tables only."""
    await connection.execute(WRITER.format(role=role))
    return role


async def test_a_writer_needs_no_rights_on_log_and_sequence(writer: str, connection: asyncpg.Connection) -> None:
    await connection.execute(f"SET ROLE {writer}")
    tenant = await insert_tenant(connection)
    await insert_database(connection, tenant)
    await connection.execute("INSERT INTO control_plane.system_config (key, value) VALUES ('k', '1')")
    await connection.execute("UPDATE control_plane.tenants SET status = 'suspended' WHERE tenant_id = $1", tenant)
    await connection.execute("DELETE FROM control_plane.tenant_databases")
    for statement in (
        "SELECT * FROM control_plane.change_log",
        "INSERT INTO control_plane.change_log SELECT * FROM control_plane.change_log",
        "SELECT nextval('control_plane.version_seq')",
        "SELECT setval('control_plane.version_seq', 1)",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(statement)
    await connection.execute("RESET ROLE")
    count = "SELECT count(*) FROM control_plane.change_log WHERE tenant_id = $1"
    assert await connection.fetchval(count, tenant) == 4


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE control_plane.tenants SET status = 'pending' WHERE name <> 'system_admin'",
        "DELETE FROM control_plane.tenants",
        "UPDATE control_plane.tenants SET tenant_id = '00000000-0000-7000-8000-000000000002'",
    ],
)
async def test_the_rules_hold_for_a_writer(writer: str, connection: asyncpg.Connection, statement: str) -> None:
    await connection.execute(f"SET ROLE {writer}")
    await insert_tenant(connection)
    with pytest.raises(asyncpg.CheckViolationError):
        await connection.execute(statement)


@pytest.mark.parametrize("path", ["evil, pg_catalog, control_plane", "evil", "pg_temp, evil"])
async def test_a_writer_cannot_have_functions_of_his_own_run_for_him(
    writer: str, connection: asyncpg.Connection, path: str
) -> None:
    """Whatever stands first in the search path, the trigger functions, which run as their owner, do not find it."""
    await connection.execute(f"CREATE SCHEMA evil AUTHORIZATION {writer}")
    await connection.execute(f"SET ROLE {writer}")
    for function, result in (
        ("nextval(regclass)", "bigint"),
        ("nextval(text)", "bigint"),
        ("clock_timestamp()", "timestamptz"),
        ("txid_current()", "bigint"),
        ("pg_notify(text, text)", "void"),
        ("same(text, text)", "boolean"),
        ("more(bigint, bigint)", "boolean"),
        ("more(bigint, integer)", "boolean"),
    ):
        await connection.execute(
            f"CREATE FUNCTION evil.{function} RETURNS {result} LANGUAGE plpgsql AS $$ BEGIN RAISE 'hijacked'; END $$"
        )
    await connection.execute("CREATE OPERATOR evil.= (FUNCTION = evil.same, LEFTARG = text, RIGHTARG = text)")
    await connection.execute("CREATE OPERATOR evil.<> (FUNCTION = evil.more, LEFTARG = bigint, RIGHTARG = bigint)")
    await connection.execute("CREATE OPERATOR evil.> (FUNCTION = evil.more, LEFTARG = bigint, RIGHTARG = integer)")
    await connection.execute("CREATE TEMPORARY TABLE change_log (LIKE control_plane.system_config)")
    await connection.execute(f"SET search_path = {path}")
    tenant = await insert_tenant(connection)
    await connection.execute(
        "UPDATE control_plane.tenants SET status = 'suspended' WHERE tenant_id OPERATOR(pg_catalog.=) $1", tenant
    )
    await connection.execute("DELETE FROM control_plane.tenants WHERE tenant_id OPERATOR(pg_catalog.=) $1", tenant)


async def test_nobody_attaches_the_functions_to_a_table_of_his_own(writer: str, connection: asyncpg.Connection) -> None:
    functions = await connection.fetch("SELECT proname FROM pg_proc WHERE pronamespace = 'control_plane'::regnamespace")
    assert len(functions) == 13
    await connection.execute(f"CREATE SCHEMA mine AUTHORIZATION {writer}")
    await connection.execute(f"SET ROLE {writer}")
    await connection.execute("CREATE TABLE mine.t (version bigint, updated_at timestamptz)")
    for (function,) in functions:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(
                f"CREATE TRIGGER t BEFORE INSERT ON mine.t FOR EACH ROW EXECUTE FUNCTION control_plane.{function}()"
            )


# --- migrating --------------------------------------------------------------------------------------------------------


async def grant(dsn: str, statement: str) -> None:
    async with AsyncConnectionManager(dsn) as manager:
        connection = await manager.connect()
        await connection.execute(statement)
        await connection.close()


async def test_create_on_the_database_is_all_a_migration_needs(role: str, empty_database: str) -> None:
    dsn = acting_as(role, empty_database)
    with pytest.raises(PermissionDeniedError) as caught:
        await upgrade(dsn)
    assert caught.value.details["grant"] == f"GRANT CREATE ON DATABASE {dsns.parse(dsn).database} TO {role};"
    assert caught.value.details["grant"] in str(caught.value)
    assert await current(dsn) is None

    await grant(empty_database, caught.value.details["grant"])
    assert (await upgrade(dsn)).revisions
    assert await check(dsn) == ()
    assert await drift(dsn) == ()
    assert (await downgrade(dsn, "base")).after is None
    assert await current(dsn) is None


async def test_a_schema_somebody_else_made_is_enough_and_stays(role: str, empty_database: str) -> None:
    dsn = acting_as(role, empty_database)
    await grant(empty_database, "CREATE SCHEMA control_plane; COMMENT ON SCHEMA control_plane IS 'ours'")
    with pytest.raises(PermissionDeniedError) as caught:
        await upgrade(dsn)
    assert caught.value.details["grant"] == f"GRANT USAGE, CREATE ON SCHEMA control_plane TO {role};"
    await grant(empty_database, caught.value.details["grant"])
    assert (await upgrade(dsn)).revisions
    await downgrade(dsn, "base")
    async with AsyncConnectionManager(empty_database) as manager:
        connection = await manager.connect()
        comment = "SELECT obj_description('control_plane'::regnamespace, 'pg_namespace')"
        assert await connection.fetchval(comment) == "ours"
        assert (
            await connection.fetchval(
                "SELECT count(*) FROM pg_class WHERE relnamespace = 'control_plane'::regnamespace"
            )
            == 0
        )
        await connection.close()


async def test_without_the_right_to_look(role: str, own_database: str) -> None:
    dsn = acting_as(role, own_database)
    for attempt, advice in (
        (upgrade, "Migrate as the role that owns the tables"),
        (downgrade, "Migrate as the role that owns the tables"),
        (current, "GRANT SELECT ON control_plane.alembic_version"),
        (check, "GRANT SELECT ON control_plane.alembic_version"),
        (drift, "GRANT SELECT ON control_plane.alembic_version"),
    ):
        with pytest.raises(PermissionDeniedError, match=advice) as caught:
            await attempt(dsn)
        assert caught.value.__cause__ is None
        assert caught.value.__context__ is None
    with pytest.raises(PermissionDeniedError) as caught:
        await current(dsn)
    await grant(own_database, caught.value.details["grant"])
    assert await current(dsn) is not None
    assert await drift(dsn) == ()
    assert await check(dsn) == ()


async def test_only_the_owner_migrates(role: str, own_database: str) -> None:
    await grant(
        own_database,
        f"GRANT ALL ON SCHEMA control_plane TO {role}; GRANT ALL ON ALL TABLES IN SCHEMA control_plane TO {role}",
    )
    dsn = acting_as(role, own_database)
    assert (await upgrade(dsn)).revisions == ()
    with pytest.raises(PermissionDeniedError, match="Migrate as the role that owns the tables"):
        await downgrade(dsn)
    assert await current(dsn) == REVISIONS[-1]
