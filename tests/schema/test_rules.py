"""What the database refuses by itself, whoever asks: the life cycle, the protected tenant, new keys, TRUNCATE."""

import json
from typing import Any

import asyncpg
import pytest

from car_control_plane.errors import (
    InvalidDataError,
    InvalidTransitionError,
    ProtectedError,
    StillReferencedError,
    translate,
)
from car_control_plane.models import SYSTEM_ADMIN_ID, TRANSITIONS, TenantStatus, uuid7
from tests.schema.rows import insert_database, insert_tenant


async def refusal(connection: asyncpg.Connection, statement: str, *arguments: Any) -> asyncpg.PostgresError:
    """Return the error the statement ends with; the connection stays usable, and nothing is written."""
    with pytest.raises(asyncpg.PostgresError) as caught:
        async with connection.transaction():
            await connection.execute(statement, *arguments)
    return caught.value


# --- life cycle -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TenantStatus)
@pytest.mark.parametrize("source", TenantStatus)
async def test_status_changes_as_the_models_say(
    rolled_back: asyncpg.Connection, source: TenantStatus, target: TenantStatus
) -> None:
    tenant = await insert_tenant(rolled_back, source)
    change = "UPDATE control_plane.tenants SET status = $2 WHERE tenant_id = $1"
    if source == target or target in TRANSITIONS[source]:
        await rolled_back.execute(change, tenant, target)
        expected = target
    else:
        error = await refusal(rolled_back, change, tenant, target)
        assert (error.sqlstate, error.constraint_name) == ("23514", "ck_tenants_status_transition")
        assert (error.schema_name, error.table_name, error.column_name) == ("control_plane", "tenants", "status")
        assert json.loads(error.detail) == {"from": source, "to": target}
        assert error.hint
        translated = translate(error)
        assert isinstance(translated, InvalidTransitionError)
        assert f"from {source} to {target}" in translated.message
        expected = source
    status = await rolled_back.fetchval("SELECT status FROM control_plane.tenants WHERE tenant_id = $1", tenant)
    assert status == expected


@pytest.mark.parametrize("status", TenantStatus)
async def test_a_tenant_may_begin_in_any_status(rolled_back: asyncpg.Connection, status: TenantStatus) -> None:
    await insert_tenant(rolled_back, status)


async def test_one_refused_row_refuses_the_whole_statement(rolled_back: asyncpg.Connection) -> None:
    active, pending = await insert_tenant(rolled_back, "active"), await insert_tenant(rolled_back, "pending")
    await refusal(
        rolled_back,
        "UPDATE control_plane.tenants SET status = 'suspended' WHERE tenant_id = ANY ($1)",
        [active, pending],
    )
    query = "SELECT status FROM control_plane.tenants WHERE tenant_id = $1"
    assert await rolled_back.fetchval(query, active) == "active"


async def test_the_life_cycle_holds_in_an_upsert(rolled_back: asyncpg.Connection) -> None:
    tenant = await insert_tenant(rolled_back, "inactive")
    error = await refusal(
        rolled_back,
        "INSERT INTO control_plane.tenants (tenant_id, name, environment) VALUES ($1, 'other', 'staging')"
        " ON CONFLICT (tenant_id) DO UPDATE SET status = 'suspended'",
        tenant,
    )
    assert error.constraint_name == "ck_tenants_status_transition"


# --- the protected tenant ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM control_plane.tenants WHERE tenant_id = $1",
        "DELETE FROM control_plane.tenants WHERE tenant_id = $1 OR true",
        "UPDATE control_plane.tenants SET name = 'root' WHERE tenant_id = $1",
        "UPDATE control_plane.tenants SET status = 'suspended' WHERE tenant_id = $1",
        "UPDATE control_plane.tenants SET status = 'inactive' WHERE tenant_id = $1",
    ],
)
async def test_system_admin_is_protected(rolled_back: asyncpg.Connection, statement: str) -> None:
    await insert_tenant(rolled_back)
    error = await refusal(rolled_back, statement, SYSTEM_ADMIN_ID)
    assert (error.sqlstate, error.constraint_name) == ("23514", "ck_tenants_system_admin")
    assert isinstance(translate(error), ProtectedError)


async def test_the_rest_of_system_admin_may_change(rolled_back: asyncpg.Connection) -> None:
    await rolled_back.execute(
        """UPDATE control_plane.tenants SET labels = '{"a": "b"}', status_reason = 'r' WHERE tenant_id = $1""",
        SYSTEM_ADMIN_ID,
    )


async def test_system_admin_may_become_active(rolled_back: asyncpg.Connection) -> None:
    """Where it is not, because somebody restored it so."""
    await rolled_back.execute("ALTER TABLE control_plane.tenants DISABLE TRIGGER USER")
    await rolled_back.execute(
        "UPDATE control_plane.tenants SET status = 'inactive' WHERE tenant_id = $1", SYSTEM_ADMIN_ID
    )
    await rolled_back.execute("ALTER TABLE control_plane.tenants ENABLE TRIGGER USER")
    await rolled_back.execute(
        "UPDATE control_plane.tenants SET status = 'active' WHERE tenant_id = $1", SYSTEM_ADMIN_ID
    )


async def test_other_tenants_are_not_protected(rolled_back: asyncpg.Connection) -> None:
    tenant = await insert_tenant(rolled_back)
    await rolled_back.execute(
        "UPDATE control_plane.tenants SET name = 'n', status = 'inactive' WHERE tenant_id = $1", tenant
    )
    assert await rolled_back.execute("DELETE FROM control_plane.tenants WHERE tenant_id = $1", tenant) == "DELETE 1"


async def test_a_tenant_with_a_database_is_not_deleted(rolled_back: asyncpg.Connection) -> None:
    tenant = await insert_tenant(rolled_back)
    await insert_database(rolled_back, tenant)
    error = await refusal(rolled_back, "DELETE FROM control_plane.tenants WHERE tenant_id = $1", tenant)
    assert error.constraint_name == "fk_tenant_databases_tenant_id_tenants"
    assert isinstance(translate(error), StillReferencedError)


# --- identity ---------------------------------------------------------------------------------------------------------


async def test_a_key_does_not_change(rolled_back: asyncpg.Connection) -> None:
    tenant, other = await insert_tenant(rolled_back), await insert_tenant(rolled_back)
    await insert_database(rolled_back, tenant)
    await rolled_back.execute("INSERT INTO control_plane.system_config (key, value) VALUES ('k', '1')")
    for statement, arguments in (
        ("UPDATE control_plane.tenants SET tenant_id = $2 WHERE tenant_id = $1", (tenant, uuid7())),
        ("UPDATE control_plane.tenant_databases SET id = $2 WHERE tenant_id = $1", (tenant, uuid7())),
        ("UPDATE control_plane.tenant_databases SET tenant_id = $2 WHERE tenant_id = $1", (tenant, other)),
        ("UPDATE control_plane.system_config SET key = 'l' WHERE key = 'k'", ()),
    ):
        error = await refusal(rolled_back, statement, *arguments)
        assert (error.sqlstate, error.constraint_name) == ("23514", "ck_control_plane_identity"), statement
        assert isinstance(translate(error), InvalidDataError)


# --- truncate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tables", ["tenants CASCADE", "tenant_databases", "system_config", "change_log, control_plane.system_config"]
)
async def test_truncate_is_refused(rolled_back: asyncpg.Connection, tables: str) -> None:
    error = await refusal(rolled_back, f"TRUNCATE control_plane.{tables}")
    assert (error.sqlstate, error.constraint_name) == ("23514", "ck_control_plane_truncate")
    assert "DELETE" in str(error.hint)
    assert isinstance(translate(error), ProtectedError)


async def test_the_log_may_be_pruned(rolled_back: asyncpg.Connection) -> None:
    await rolled_back.execute("DELETE FROM control_plane.change_log")
    await rolled_back.execute("TRUNCATE control_plane.change_log")


# --- checks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "constraint"),
    [
        ("UPDATE control_plane.tenants SET name = '' WHERE tenant_id = $1", "ck_tenants_name"),
        ("UPDATE control_plane.tenants SET name = ' a' WHERE tenant_id = $1", "ck_tenants_name"),
        ("UPDATE control_plane.tenants SET name = E'a\\nb' WHERE tenant_id = $1", "ck_tenants_name"),
        ("UPDATE control_plane.tenants SET labels = '[]' WHERE tenant_id = $1", "ck_tenants_labels"),
        ("UPDATE control_plane.tenant_databases SET port = 0 WHERE tenant_id = $1", "ck_tenant_databases_port"),
        ("UPDATE control_plane.tenant_databases SET port = 65536 WHERE tenant_id = $1", "ck_tenant_databases_port"),
        (
            "UPDATE control_plane.tenant_databases SET purpose = 'No' WHERE tenant_id = $1",
            "ck_tenant_databases_purpose",
        ),
        (
            "INSERT INTO control_plane.change_log SELECT 0, 't', 'r', $1, 'merge', 1, now()",
            "ck_change_log_operation",
        ),
    ],
)
async def test_checks(rolled_back: asyncpg.Connection, statement: str, constraint: str) -> None:
    tenant = await insert_tenant(rolled_back)
    await insert_database(rolled_back, tenant)
    error = await refusal(rolled_back, statement, tenant)
    assert (error.sqlstate, error.constraint_name) == ("23514", constraint)
