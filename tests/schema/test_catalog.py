"""The shipped description of the schema: right on every server, and what tampering is found by."""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from car_control_plane import migrations
from car_control_plane.migrations import drift
from car_control_plane.models import REVISIONS, metadata
from tests.schema.scripts import ROOT

SHIPPED: dict[str, Any] = json.loads((ROOT / "car_control_plane" / "catalog.json").read_text(encoding="utf-8"))


async def test_the_migrated_schema_is_as_described(own_database: str) -> None:
    assert await drift(own_database) == ()


async def test_the_description_is_that_of_the_head_and_written_by_the_program(tmp_path: Path) -> None:
    path = tmp_path / "catalog.json"
    program = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "car_control_plane.migrations", str(path), env=os.environ, cwd=tmp_path
    )
    assert await program.wait() == 0
    assert path.read_bytes() == (ROOT / "car_control_plane" / "catalog.json").read_bytes()
    assert SHIPPED["head"] == REVISIONS[-1]


def test_the_description_names_every_table_column_and_index_of_the_models() -> None:
    described = {(kind, name) for kind, name, _ in SHIPPED["objects"]}
    for table in metadata.tables.values():
        assert ("table", table.name) in described
        assert {("column", f"{table.name}.{column.name}") for column in table.columns} <= described
        assert {("index", str(index.name)) for index in table.indexes} <= described
        assert {("constraint", f"{table.name}.{constraint.name}") for constraint in table.constraints} <= described


@pytest.mark.parametrize(
    ("tampering", "found"),
    [
        ("ALTER TYPE control_plane.tenant_status ADD VALUE 'frozen'", ("changed", "enum tenant_status")),
        (
            "CREATE FUNCTION control_plane.f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
            ("unexpected", "function control_plane.f()"),
        ),
        (
            "ALTER TABLE control_plane.tenants DISABLE TRIGGER tenants_20_life_cycle",
            ("changed", "trigger tenants.tenants_20_life_cycle"),
        ),
        (
            "DROP TRIGGER tenants_95_log_update ON control_plane.tenants",
            ("missing", "trigger tenants.tenants_95_log_update"),
        ),
        (
            "CREATE OR REPLACE FUNCTION control_plane.log_tenants() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
            ("changed", "function control_plane.log_tenants()"),
        ),
        (
            "ALTER FUNCTION control_plane.stamp_version() SECURITY INVOKER",
            ("changed", "function control_plane.stamp_version()"),
        ),
        (
            "GRANT EXECUTE ON FUNCTION control_plane.stamp_version() TO PUBLIC",
            ("changed", "function control_plane.stamp_version()"),
        ),
        ("DROP INDEX control_plane.idx_tenants_labels", ("missing", "index idx_tenants_labels")),
        ("CREATE INDEX extra ON control_plane.tenants (updated_at)", ("unexpected", "index extra")),
        ("ALTER TABLE control_plane.tenants ALTER status DROP DEFAULT", ("changed", "column tenants.status")),
        ("ALTER TABLE control_plane.tenants ALTER name DROP NOT NULL", ("changed", "column tenants.name")),
        ("ALTER TABLE control_plane.tenants ADD extra int", ("unexpected", "column tenants.extra")),
        (
            "ALTER TABLE control_plane.tenants DROP CONSTRAINT ck_tenants_name",
            ("missing", "constraint tenants.ck_tenants_name"),
        ),
        ("ALTER TABLE control_plane.tenants ENABLE ROW LEVEL SECURITY", ("changed", "table tenants")),
        ("ALTER TABLE control_plane.change_log SET UNLOGGED", ("changed", "table change_log")),
        ("CREATE POLICY p ON control_plane.tenants USING (false)", ("unexpected", "policy tenants.p")),
        ("ALTER SEQUENCE control_plane.version_seq CACHE 100", ("changed", "sequence version_seq")),
        ("CREATE VIEW control_plane.v AS SELECT 1", ("unexpected", "table v")),
    ],
)
async def test_drift_names_what_was_tampered_with(
    own_database: str, connection: asyncpg.Connection, tampering: str, found: tuple[str, str]
) -> None:
    await connection.execute(tampering)
    drifts = await drift(own_database)
    assert [(each.kind, each.object) for each in drifts] == [found]
    assert (drifts[0].expected is None) == (found[0] == "unexpected")
    assert (drifts[0].found is None) == (found[0] == "missing")
    assert drifts[0].expected != drifts[0].found


async def test_an_invalid_index_is_drift(own_database: str, connection: asyncpg.Connection) -> None:
    """What a concurrent index build leaves behind when it fails."""
    await connection.execute(
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'control_plane.idx_tenants_status'::regclass"
    )
    assert [each.object for each in await drift(own_database)] == ["index idx_tenants_status"]


async def test_a_search_path_changes_no_description(own_database: str, connection: asyncpg.Connection) -> None:
    for path in ("control_plane", "public", "control_plane, public"):
        name = await connection.fetchval("SELECT current_database()")
        await connection.execute(f'ALTER DATABASE "{name}" SET search_path = {path}')
        assert await drift(own_database) == ()


async def test_functions_run_as_their_owner_with_a_pinned_path(connection: asyncpg.Connection) -> None:
    """All but one: it runs for every row, and names everything with its schema instead."""
    functions = await connection.fetch(
        "SELECT proname, prosecdef, proconfig FROM pg_proc WHERE pronamespace = 'control_plane'::regnamespace"
    )
    assert all(function["prosecdef"] for function in functions)
    unpinned = {
        function["proname"]
        for function in functions
        if "search_path=pg_catalog, pg_temp" not in (function["proconfig"] or [])
    }
    assert unpinned == {"stamp_version"}


def test_the_description_is_found_beside_the_module() -> None:
    assert migrations._CATALOG_FILE.is_file()
