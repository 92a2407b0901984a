"""`car-cp` as its users meet it: what it does, prints and answers, in a terminal, in a pipe, and when something is wrong.

Most tests call it inside this process. Those about signals, streams and start-up run the program.
"""

import asyncio
import csv
import dataclasses
import io
import json
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import asyncpg
import pytest
import typer

import car_control_plane
from car_control_plane import dsn as dsns
from car_control_plane.cli import app
from car_control_plane.cli.tenants import Environment, Status
from car_control_plane.models import REVISIONS, SYSTEM_ADMIN_ID, TenantEnvironment, TenantStatus
from car_control_plane.repositories.tenants import BATCH_ROWS
from car_control_plane.telemetry import PoolStatus
from tests.fixtures import cli as clis
from tests.fixtures.cli import ROOT, WAIT_SECONDS, Cli, Terminal, execute, plain, posix, run, started, until
from tests.fixtures.servers import unused_port

compiled_once = clis.compiled_once
nothing_set = clis.nothing_set


@pytest.fixture
def cli(shared_manager: object, shared_database: str) -> Cli:
    """The command line on a migrated database; what it writes there is deleted afterwards."""
    del shared_manager  # does the deleting
    return Cli(shared_database)


@pytest.fixture
def own(own_database: str) -> Cli:
    """The command line on a migrated database whose schema may be changed."""
    return Cli(own_database)


@pytest.fixture
def fresh(empty_database: str) -> Cli:
    """The command line on a database that was never migrated."""
    return Cli(empty_database)


# --- tenants ----------------------------------------------------------------------------------------------------------


def test_create_prints_the_tenant_as_it_is_stored(cli: Cli) -> None:
    created = cli.done(
        *("tenant", "create", "acme", "--environment", "production", "--status", "active", "--reason", "paid"),
        *("--label", "plan=gold", "--label", "note=a=b", "--label", "empty="),
    )
    assert list(created) == list(car_control_plane.TenantPublic.model_fields)
    assert created["labels"] == {"plan": "gold", "note": "a=b", "empty": ""}
    assert (created["status"], created["status_reason"]) == ("active", "paid")
    assert cli.done("tenant", "show", "acme") == created


def test_create_with_an_id_can_be_recognised_when_repeated(cli: Cli) -> None:
    key = str(uuid.uuid4())
    assert cli.done("tenant", "create", "acme", "--environment", "staging", "--id", key)["tenant_id"] == key
    assert "id" in cli.refused(8, "tenant", "create", "other", "--environment", "staging", "--id", key)


def test_a_tenant_is_named_by_id_or_name(cli: Cli) -> None:
    created = cli.done("tenant", "create", "acme", "--environment", "staging")
    assert cli.done("tenant", "show", created["tenant_id"]) == created
    assert cli.done("tenant", "show", "acme") == created


def test_a_name_that_looks_like_an_id_is_found(cli: Cli) -> None:
    name = uuid.uuid4().hex
    created = cli.done("tenant", "create", name, "--environment", "staging")
    assert cli.done("tenant", "show", name) == created


def test_the_life_cycle(cli: Cli) -> None:
    cli.done("tenant", "create", "acme", "--environment", "production")
    active = cli.done("tenant", "activate", "acme")
    assert active["status"] == "active"
    suspended = cli.done(
        "tenant", "suspend", "acme", "--reason", "unpaid", "--expected-version", str(active["version"])
    )
    assert (suspended["status"], suspended["status_reason"]) == ("suspended", "unpaid")
    inactive = cli.done("tenant", "deactivate", "acme", "--reason", "left")
    assert (inactive["status"], inactive["status_reason"]) == ("inactive", "left")
    again = cli.done("tenant", "activate", "acme")
    assert (again["status"], again["status_reason"]) == ("active", None)
    assert active["version"] < suspended["version"] < inactive["version"] < again["version"]


def test_rename(cli: Cli) -> None:
    before = cli.done("tenant", "create", "acme", "--environment", "production")
    after = cli.done("tenant", "rename", "acme", "acme two", "--expected-version", str(before["version"]))
    assert (after["tenant_id"], after["name"]) == (before["tenant_id"], "acme two")
    assert cli.names() == ["system_admin", "acme two"]


def test_delete(cli: Cli) -> None:
    created = cli.done("tenant", "create", "acme", "--environment", "production")
    assert cli.done("tenant", "delete", "acme", "--yes") == created
    assert cli.names() == ["system_admin"]


def test_list_filters(cli: Cli) -> None:
    cli.done("tenant", "create", "b1", "--environment", "staging", "--label", "plan=gold", "--label", "eu=1")
    cli.done("tenant", "create", "b2", "--environment", "production", "--status", "active", "--label", "plan=gold")
    cli.done("tenant", "create", "c1", "--environment", "staging", "--status", "inactive")
    assert cli.names("--status", "pending", "--status", "inactive") == ["b1", "c1"]
    assert cli.names("--environment", "staging") == ["b1", "c1"]
    assert cli.names("--name-prefix", "b") == ["b1", "b2"]
    assert cli.names("--label", "plan=gold", "--label", "eu=1") == ["b1"]
    assert cli.names("--status", "active", "--environment", "production", "--name-prefix", "b") == ["b2"]


def test_list_pages_and_all(cli: Cli) -> None:
    rows = "\n".join(f"t{number:03},staging" for number in range(7))
    cli.done("tenant", "import", "-", stdin=f"name,environment\n{rows}\n")
    everything = cli.names("--all")
    found: list[str] = []
    more: list[str] = []
    while True:
        page = cli("tenant", "list", "--limit", "3", *more)
        found += [json.loads(line)["name"] for line in page.stdout.splitlines()]
        cursor = re.search(r"--after (\S+), or --all", page.stderr)
        if cursor is None:
            break
        more = ["--after", cursor[1]]
    assert found == everything == ["system_admin", *(f"t{number:03}" for number in range(7))]
    assert page.stderr == ""


def test_an_empty_list_prints_nothing_and_says_so_elsewhere(cli: Cli) -> None:
    result = cli("tenant", "list", "--name-prefix", "nobody")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "No tenants.\n")


def test_the_choices_are_those_of_the_library() -> None:
    assert [*Environment] == [*map(str, TenantEnvironment)]
    assert [*Status] == [*map(str, TenantStatus)]


# --- import -----------------------------------------------------------------------------------------------------------


def imported(cli: Cli, text: str | bytes, *arguments: str) -> dict[str, Any]:
    """Import a text, and return the tenants that are there afterwards by name."""
    cli.done("tenant", "import", "-", *arguments, stdin=text)
    listed = cli.done("tenant", "list", "--all")
    return {one["name"]: one for one in (listed if isinstance(listed, list) else [listed])}


def test_import_of_a_file_reports_what_it_did(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "tenants.csv"
    file.write_text("name,environment\na,staging\nb,production\n", encoding="utf-8")
    assert cli.done("tenant", "import", str(file)) == {"created": 2, "skipped": 0, "conflicts": []}
    assert cli.names() == ["system_admin", "a", "b"]


def test_import_reads_every_column(cli: Cli) -> None:
    key = "0198b6f0-0000-7000-8000-00000000abcd"
    found = imported(
        cli,
        "tenant_id,name,environment,status,status_reason,labels,label.plan,label.Region\n"
        f'{key},a,production,suspended,unpaid,"{{""owner"": ""x, y""}}",gold,eu\n'
        ",b,staging,,,,,\n",
    )
    assert found["a"]["tenant_id"] == key
    assert found["a"]["status"], found["a"]["status_reason"] == ("suspended", "unpaid")
    assert found["a"]["labels"] == {"owner": "x, y", "plan": "gold", "Region": "eu"}
    assert (found["b"]["status"], found["b"]["labels"], found["b"]["status_reason"]) == ("pending", {}, None)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("name,environment\na,staging\n", id="plain"),
        pytest.param("\ufeffname,environment\na,staging\n", id="byte order mark"),
        pytest.param("name,environment\r\na,staging\r\n", id="Windows line ends"),
        pytest.param("name,environment\ra,staging\r", id="old Mac line ends"),
        pytest.param("name,environment\na,staging", id="no last line end"),
        pytest.param("\n\nname,environment\n\na,staging\n\n", id="blank lines"),
        pytest.param("name;environment\na;staging\n", id="semicolons"),
        pytest.param("name\tenvironment\na\tstaging\n", id="tabs"),
        pytest.param("Name , ENVIRONMENT\na, staging\n", id="blanks and capitals"),
        pytest.param('"name","environment"\n"a","staging"\n', id="quotes"),
        pytest.param("environment,name\nstaging,a\n", id="another order"),
        pytest.param(
            "name,environment,created_at,updated_at,version\na,staging,x,y,7\n", id="the server's own columns"
        ),
        pytest.param('{"name": "a", "environment": "staging"}\n', id="JSON"),
        pytest.param('\ufeff\n  {"name": "a", "environment": "staging"}\r\n\r\n', id="JSON with oddities"),
        pytest.param('{"environment": "staging", "version": 9, "name": "\\u0061"}', id="JSON, another order"),
    ],
)
def test_import_reads_what_spreadsheets_and_programs_write(text: str, cli: Cli) -> None:
    assert imported(cli, text)["a"]["environment"] == "staging"


def test_import_reads_separators_quotes_line_breaks_and_any_script_inside_quotes(cli: Cli) -> None:
    found = imported(cli, 'name,environment\n"Smith, ""Jo"" & Söhne 京都",staging\n')
    assert 'Smith, "Jo" & Söhne 京都' in found


def test_import_of_a_header_alone_creates_nothing(cli: Cli) -> None:
    assert cli.done("tenant", "import", "-", stdin="name,environment\n") == {
        "created": 0,
        "skipped": 0,
        "conflicts": [],
    }


def test_import_takes_the_environment_of_those_that_name_none(cli: Cli) -> None:
    found = imported(cli, "name,environment\na,\nb,staging\n", "--environment", "production")
    assert (found["a"]["environment"], found["b"]["environment"]) == ("production", "staging")
    assert imported(cli, '{"name": "c"}', "--environment", "development")["c"]["environment"] == "development"


FAULTS = [
    ("", "standard input: it is empty"),
    ("\n \n", "standard input: it is empty"),
    ("environment\nstaging\n", "line 1: names no column name"),
    ("name,environment,colour\n", "line 1: names a column 'colour', which tenants do not have"),
    ("name,name,environment\n", "line 1: names a column twice"),
    ("name,environment\na,staging\nb\n", "line 3: has 1 fields, where the first line names 2"),
    ("name,environment\na,staging,x\n", "line 2: has 3 fields, where the first line names 2"),
    ("name,environment\n\n\na,nowhere\n", "line 4: environment: Input should be"),
    ("name,environment\n,staging\n", "line 2: name: Field required"),
    ("name,environment\na,\n", "line 2: environment: Field required"),
    ('name,environment\n"a ",staging\n', "line 2: name: must not begin or end with blanks"),
    ('name,environment\n"a\nb",staging\n', "line 2: name: must not contain control characters"),
    ("name,environment\na\0b,staging\n", "line 2: name: must not contain control characters"),
    (f"name,environment\n{'x' * 256},staging\n", "line 2: name: String should have at most 255 characters"),
    ("name,environment,tenant_id\na,staging,1\n", "line 2: tenant_id: Input should be a valid UUID"),
    ("name,environment,labels\na,staging,gold\n", "line 2: has labels that are no JSON object"),
    ('name,environment\na,staging\n"b,staging\n', "line 3: is no CSV: unexpected end of data"),
    ('name,environment\n"a"b,staging\n', "line 2: is no CSV"),
    (f'name,environment\n"{"x" * 200_000}",staging\n', "line 2: is no CSV: field larger than field limit"),
    (b"name,environment\nok,staging\nM\xfcller,staging\n", "line 3: is not UTF-8"),
    ("name,environment\na,staging\n".encode("utf-16"), "standard input: it is UTF-16"),
    ("x" * 1_100_000, "line 1: has more than 1048576 characters"),
    ('{"name": "a"\n', "line 1: is no JSON at character"),
    ('{"name": "a", "environment": "staging"}\n{"name":}\n', "line 2: is no JSON at character 9"),
    ('[{"name": "a"}]\n', "line 1: is no JSON object"),
    ('{"name": "a", "environment": "staging"}\n\n"b"\n', "line 3: is no JSON object"),
    ('{"name": "a", "environment": "staging", "colour": "red"}', "line 1: colour: Extra inputs are not permitted"),
    ('{"name": 7, "environment": "staging"}', "line 1: name: Input should be a valid string"),
    ('{"name": "a", "environment": "staging", "labels": {"x": 1}}', "line 1: labels.x: Input should be a valid string"),
    (f'{{"name": {"[" * 100_000}', "line 1: is no JSON that can be read"),
    (f'{{"name": {"9" * 5_000}}}', "line 1: is no JSON that can be read"),
]


@pytest.mark.parametrize(("text", "said"), FAULTS, ids=[said for _, said in FAULTS])
def test_a_fault_in_a_file_names_its_line_and_nothing_is_written(text: str | bytes, said: str, cli: Cli) -> None:
    told = cli.refused(1, "tenant", "import", "-", stdin=text)
    assert said in told
    assert "nothing was written" in told
    assert cli.names() == ["system_admin"]


def test_a_fault_after_many_batches_leaves_nothing(cli: Cli) -> None:
    rows = "".join(f"t{number},staging\n" for number in range(25_000))
    told = cli.refused(1, "tenant", "import", "-", stdin=f"name,environment\n{rows}t-last,nowhere\n")
    assert "line 25002:" in told
    assert cli.names() == ["system_admin"]


def test_names_that_are_taken_end_the_import_or_are_left_out(cli: Cli) -> None:
    text = "name,environment\na,staging\nsystem_admin,staging\na,production\n"
    told = cli.refused(8, "tenant", "import", "-", stdin=text)
    assert "'system_admin', 'a'" in told
    assert "Hint: To import the others, say --on-conflict skip." in told
    assert cli.names() == ["system_admin"]
    done = cli.done("tenant", "import", "-", "--on-conflict", "skip", stdin=text)
    assert (done["created"], done["skipped"]) == (1, 2)
    assert [(one["index"], one["name"]) for one in done["conflicts"]] == [(1, "system_admin"), (2, "a")]
    sentence = cli("-o", "table", "tenant", "import", "-", "--on-conflict", "skip", stdin=text).stdout
    assert sentence == "Created 0 tenants; skipped 'a', 'system_admin', 'a', whose name or id is taken.\n"


def test_what_list_prints_can_be_imported(cli: Cli, fresh: Cli) -> None:
    cli.done("tenant", "import", "-", stdin="name,environment,status,label.x\na,staging,active,1\nb,production,,\n")
    listed = cli("tenant", "list", "--all", "-o", "json").stdout
    fresh.done("db", "upgrade")
    assert fresh.done("tenant", "import", "-", "--on-conflict", "skip", stdin=listed)["created"] == 2
    kept = ("tenant_id", "name", "environment", "status", "status_reason", "labels")
    for here, there in zip(cli.done("tenant", "list")[1:], fresh.done("tenant", "list")[1:], strict=True):
        assert {name: here[name] for name in kept} == {name: there[name] for name in kept}


@pytest.mark.parametrize("path", ["nowhere.csv", "."])
def test_a_file_that_cannot_be_opened_is_wrong_usage(path: str, cli: Cli) -> None:
    assert f"{path}: " in cli.refused(2, "tenant", "import", path)


# Not ru_maxrss, which a child begins with at its parent's.
PEAK = """
import pathlib, re, sys
from car_control_plane.cli import main
code = main()
sys.stderr.write(re.search("VmHWM:[^0-9]*([0-9]+)", pathlib.Path("/proc/self/status").read_text())[1])
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process from /proc")
def test_import_and_list_of_100_000_lines_are_flat_in_memory(cli: Cli, tmp_path: Path) -> None:
    """The peak of ten thousand lines, which are a batch, and that of ten times as many hardly differ."""
    peaks = {}
    for rows in (BATCH_ROWS, 10 * BATCH_ROWS):
        file = tmp_path / f"{rows}.csv"
        with file.open("w", encoding="utf-8") as out:
            out.write("name,environment,label.padding\n")
            out.writelines(f"t{rows}-{number},staging,{'x' * 200}\n" for number in range(rows))
        for arguments in (["import", str(file)], ["list", "--all", "--name-prefix", f"t{rows}-"]):
            done = python(PEAK, "tenant", *arguments, DATABASE_URL=cli.url)
            assert done.returncode == 0, done.stderr
            assert done.stdout.count("\n") == (1 if arguments[0] == "import" else rows)
            peaks[arguments[0], rows] = int(done.stderr) * 1024
    for action in ("import", "list"):
        assert peaks[action, 10 * BATCH_ROWS] - peaks[action, BATCH_ROWS] < 32 * 1024 * 1024, peaks


# --- configuration ----------------------------------------------------------------------------------------------------


def test_config_set_get_list_unset(cli: Cli) -> None:
    stored = cli.done("config", "set", "limits.tenants", '{"max": 5, "soft": [1, null]}')
    assert list(stored) == ["key", "value", "updated_at", "version"]
    assert cli.done("config", "get", "limits.tenants") == {"max": 5, "soft": [1, None]}
    assert cli.done("config", "get", "limits.tenants", "--entry") == stored
    assert cli.done("config", "list") == stored
    assert cli.done("config", "unset", "limits.tenants") == {"key": "limits.tenants"}
    assert "limits.tenants" in cli.refused(7, "config", "get", "limits.tenants")


@pytest.mark.parametrize("text", ["null", "true", "0", '"text"', "[]", "{}", str(2**80), "0.1", '"\\u00fc\\n"'])
def test_config_keeps_any_json_value(text: str, cli: Cli) -> None:
    cli.done("config", "set", "key", text)
    result = cli("config", "get", "key")
    assert json.loads(result.stdout) == json.loads(text)


def test_config_reads_standard_input_and_plain_text(cli: Cli) -> None:
    cli.done("config", "set", "a", "-", stdin='\ufeff{\n "x": 1\n}\n')
    assert cli.done("config", "get", "a") == {"x": 1}
    cli.done("config", "set", "a", "hello", "--string")
    assert cli.done("config", "get", "a") == "hello"
    cli.done("config", "set", "a", "-", "--string", stdin="line\n")
    assert cli.done("config", "get", "a") == "line\n"


@pytest.mark.parametrize("text", ["hello", "", "{'a': 1}", "[" * 100_000, "9" * 5_000])
def test_a_value_that_is_no_json_is_wrong_usage_with_a_hint(text: str, cli: Cli) -> None:
    assert "--string" in cli.refused(2, "config", "set", "key", text)
    assert cli("config", "list").stdout == ""


@pytest.mark.parametrize("text", ["NaN", "1e999", '"\\u0000"', '"\\ud800"', "[" * 201 + "]" * 201])
def test_a_value_that_cannot_be_stored_is_wrong_usage(text: str, cli: Cli) -> None:
    cli.refused(2, "config", "set", "key", text)
    assert cli("config", "list").stdout == ""


@pytest.mark.parametrize(("stdin", "said"), [(b'"\xff"', "not UTF-8"), (b"1" * 17_000_000, "longer than any value")])
def test_standard_input_that_is_no_value(stdin: bytes, said: str, cli: Cli) -> None:
    assert said in cli.refused(2, "config", "set", "key", "-", stdin=stdin)


def test_config_pages(cli: Cli) -> None:
    for number in range(5):
        cli.done("config", "set", f"page.{number}", str(number))
    cli.done("config", "set", "other", "0")
    page = cli("config", "list", "--prefix", "page.", "--limit", "3")
    assert [json.loads(line)["value"] for line in page.stdout.splitlines()] == [0, 1, 2]
    cursor = re.search(r"--after (\S+),", page.stderr)
    assert cursor is not None
    rest = cli("config", "list", "--prefix", "page.", "--limit", "3", "--after", cursor[1])
    assert [json.loads(line)["value"] for line in rest.stdout.splitlines()] == [3, 4]
    assert len(cli.done("config", "list", "--limit", "2", "--all")) == 6


def test_config_compares_and_sets(cli: Cli) -> None:
    first = cli.done("config", "set", "key", "1", "--expected-version", "0")
    assert "changed" in cli.refused(8, "config", "set", "key", "2", "--expected-version", "0")
    second = cli.done("config", "set", "key", "2", "--expected-version", str(first["version"]))
    cli.refused(8, "config", "unset", "key", "--expected-version", str(first["version"]))
    cli.done("config", "unset", "key", "--expected-version", str(second["version"]))


# --- the schema -------------------------------------------------------------------------------------------------------


def test_the_schema_up_and_down(fresh: Cli) -> None:
    assert fresh.done("db", "current") == {"revision": None, "head": REVISIONS[-1]}
    done = fresh.done("db", "upgrade")
    assert (done["before"], done["after"]) == (None, REVISIONS[-1])
    assert fresh.done("db", "upgrade")["revisions"] == []
    assert fresh.done("db", "check") == {"clean": True, "differences": []}
    assert fresh("db", "drift").stdout == ""
    assert fresh.done("db", "wait", "--timeout", "0") == {"revision": REVISIONS[-1]}
    assert fresh.done("db", "downgrade", "-1", "--yes")["revisions"] == [REVISIONS[-1]]
    assert fresh.done("db", "current")["revision"] == REVISIONS[-2]
    assert fresh.done("db", "upgrade", "+1")["after"] == REVISIONS[-1]
    assert fresh.done("db", "downgrade", "base", "--yes")["after"] is None
    assert fresh.done("db", "downgrade", "base")["revisions"] == []


def test_history_and_sql_need_no_database() -> None:
    nowhere = Cli(None)
    revisions = [step["revision"] for step in nowhere.done("db", "history")]
    assert revisions == list(REVISIONS)
    whole = nowhere("db", "sql").stdout
    assert "CREATE TABLE control_plane.tenants" in whole
    part = nowhere("db", "sql", revisions[1], "--from", revisions[0]).stdout
    assert "CREATE TABLE" not in part
    assert "system_admin" in part


def test_the_printed_sql_makes_the_schema(fresh: Cli) -> None:
    execute(fresh.url, fresh("db", "sql").stdout)
    assert fresh.done("db", "check")["clean"] is True
    assert fresh.names() == ["system_admin"]


def test_drift_and_differences_exit_with_5(own: Cli) -> None:
    execute(
        own.url,
        "DROP TRIGGER tenants_20_life_cycle ON control_plane.tenants",
        "ALTER TABLE control_plane.tenants ADD COLUMN a int, ADD COLUMN b int",
    )
    drift = own("db", "drift")
    assert drift.exit_code == 5
    kinds = {json.loads(line)["object"]: json.loads(line)["kind"] for line in drift.stdout.splitlines()}
    assert kinds["trigger tenants.tenants_20_life_cycle"] == "missing"
    assert kinds["column tenants.a"] == "unexpected"
    check = own("db", "check")
    assert check.exit_code == 5
    assert len(json.loads(check.stdout)["differences"]) == 2
    assert len(own("db", "check", "-o", "table").stdout.splitlines()) == 2


def test_an_unknown_revision_fails(cli: Cli) -> None:
    assert "Known revisions: 001_control_plane_schema" in cli.refused(1, "db", "upgrade", "nonsense")
    cli.refused(1, "db", "sql", "nonsense")
    cli.refused(2, "db", "upgrade", "--nonsense")


# --- health and doctor ------------------------------------------------------------------------------------------------


def test_health(cli: Cli, fresh: Cli) -> None:
    healthy = cli.done("health")
    assert (healthy["healthy"], healthy["schema"], healthy["error"]) == (True, "current", None)
    assert set(healthy["pool"]) == {field.name for field in dataclasses.fields(PoolStatus)}
    assert cli("health", "-o", "table").stdout.startswith("Healthy: PostgreSQL ")
    ill = fresh("health")
    assert ill.exit_code == 5
    assert json.loads(ill.stdout)["error"]["code"] == "schema-missing"
    assert "Hint: Run migrations" in ill.stderr
    assert fresh("health", "-o", "table").stdout.startswith("Not healthy: PostgreSQL ")
    gone = Cli(f"postgresql://user@127.0.0.1:{unused_port()}/x")("health", "-o", "table")
    assert (gone.exit_code, gone.stdout) == (4, "Not healthy.\n")


def test_a_schema_ahead_is_healthy_and_refused_by_commands(own: Cli) -> None:
    execute(own.url, "UPDATE control_plane.alembic_version SET version_num = '999_future'")
    assert own.done("health")["schema"] == "ahead"
    assert "ahead of 004_completed_operations" in own("health", "-o", "table").stdout
    assert "Upgrade the library" in own.refused(5, "tenant", "list")


def test_doctor_prints_findings_and_exits_with_the_code_of_the_first_failure(cli: Cli, fresh: Cli) -> None:
    found = cli.done("doctor")
    assert list(found[0]) == ["check", "status", "message", "hint", "code"]
    assert not [one for one in found if one["status"] == "fail"]
    assert fresh("doctor").exit_code == 5
    assert Cli(None)("doctor").exit_code == 3
    assert Cli(f"postgresql://user@127.0.0.1:{unused_port()}/x")("doctor").exit_code == 4
    table = fresh("doctor", "-o", "table")
    assert re.search(r"^fail     schema        schema 'control_plane' does not exist$", table.stdout, re.MULTILINE)
    assert re.search(r"^         Run migrations: alembic upgrade head", table.stdout, re.MULTILINE)
    assert re.search(r"\d+ ok, .*1 fail, \d+ skipped$", table.stderr)


# --- exit codes -------------------------------------------------------------------------------------------------------

ON_THE_SCHEMA = [
    ("tenant", "create", "x", "--environment", "staging"),
    ("tenant", "import", "-"),
    ("tenant", "list"),
    ("tenant", "list", "--all"),
    ("tenant", "show", "x"),
    ("tenant", "rename", "x", "y"),
    ("tenant", "activate", "x"),
    ("tenant", "suspend", "x"),
    ("tenant", "deactivate", "x"),
    ("tenant", "delete", "x", "--yes"),
    ("config", "get", "x"),
    ("config", "set", "x", "1"),
    ("config", "list"),
    ("config", "unset", "x"),
    ("db", "check"),
    ("db", "drift"),
    ("db", "wait", "--timeout", "0"),
]
ON_THE_DATABASE = [*ON_THE_SCHEMA, ("db", "upgrade"), ("db", "downgrade", "--yes"), ("db", "current")]
spoken = pytest.mark.parametrize("arguments", ON_THE_SCHEMA, ids=" ".join)
connected = pytest.mark.parametrize("arguments", ON_THE_DATABASE, ids=" ".join)


@connected
def test_3_without_a_database_url(arguments: tuple[str, ...]) -> None:
    told = Cli(None).refused(3, *arguments)
    assert told.startswith("Error: DATABASE_URL environment variable is required\nHint: Set it: export DATABASE_URL=")


@connected
def test_4_when_the_server_is_not_reached(arguments: tuple[str, ...]) -> None:
    told = Cli(f"postgresql://user:s3cret@127.0.0.1:{unused_port()}/x").refused(4, *arguments)
    assert "Connection refused" in told
    assert "s3cret" not in told


@spoken
def test_5_when_it_was_never_migrated(arguments: tuple[str, ...], fresh: Cli) -> None:
    assert "Hint: Run migrations: alembic upgrade head" in fresh.refused(5, *arguments, stdin="name,environment\n")


@pytest.fixture
def without_rights(own_database: str) -> Iterator[Cli]:
    """The command line as a role that may read and not write."""
    role = f"reader_{os.getpid()}"
    execute(
        own_database,
        f"CREATE ROLE {role}",
        f"GRANT USAGE ON SCHEMA control_plane TO {role}",
        f"GRANT SELECT ON ALL TABLES IN SCHEMA control_plane TO {role}",
    )
    yield Cli(f"{own_database}{'&' if '?' in own_database else '?'}role={quote(role)}")
    execute(own_database, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


@pytest.mark.parametrize(
    "arguments",
    [
        ("tenant", "create", "x", "--environment", "staging"),
        ("tenant", "import", "-"),
        ("tenant", "activate", "system_admin"),
        ("config", "set", "x", "1"),
        ("config", "unset", "x"),
        ("db", "downgrade", "base", "--yes"),
    ],
    ids=" ".join,
)
def test_6_with_the_grant_that_is_missing(arguments: tuple[str, ...], without_rights: Cli) -> None:
    assert without_rights.names() == ["system_admin"]
    told = without_rights.refused(6, *arguments, stdin="name,environment\na,staging\n")
    assert "Error: permission denied" in told
    assert "GRANT " in told or "Migrate as the role that owns" in told


@pytest.mark.parametrize(
    "arguments",
    [
        ("tenant", "show", "nobody"),
        ("tenant", "show", "01980000-0000-7000-8000-000000000000"),
        ("tenant", "rename", "nobody", "y"),
        ("tenant", "activate", "nobody"),
        ("tenant", "suspend", "nobody"),
        ("tenant", "deactivate", "nobody"),
        ("tenant", "delete", "nobody", "--yes"),
        ("config", "get", "nothing"),
        ("config", "unset", "nothing"),
    ],
    ids=" ".join,
)
def test_7_for_what_is_not_there(arguments: tuple[str, ...], cli: Cli) -> None:
    assert arguments[2] in cli.refused(7, *arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("tenant", "create", "system_admin", "--environment", "staging"), "exists already"),
        (("tenant", "activate", "system_admin"), "cannot change from active to active"),
        (("tenant", "suspend", "system_admin"), "cannot be suspended"),
        (("tenant", "deactivate", str(SYSTEM_ADMIN_ID)), "cannot be suspended or deactivated"),
        (("tenant", "rename", "system_admin", "root"), "cannot be renamed"),
        (("tenant", "delete", "system_admin", "--yes"), "cannot be deleted"),
        (("tenant", "rename", "a", "b"), "exists already"),
        (("tenant", "activate", "a", "--expected-version", "1"), "has changed"),
        (("tenant", "delete", "a", "--yes", "--expected-version", "1"), "has changed"),
        (("tenant", "suspend", "a"), "cannot change from pending to suspended"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_8_for_a_conflict(arguments: tuple[str, ...], said: str, cli: Cli) -> None:
    cli.done("tenant", "import", "-", stdin="name,environment\na,staging\nb,staging\n")
    assert said in cli.refused(8, *arguments)
    assert cli.names() == ["system_admin", "a", "b"]


def test_8_for_a_tenant_that_owns_a_database(cli: Cli) -> None:
    key = cli.done("tenant", "create", "a", "--environment", "staging")["tenant_id"]
    execute(
        cli.url,
        "INSERT INTO control_plane.tenant_databases (id, tenant_id, connection_string_encrypted, database_name, host) "
        f"VALUES ('{key}', '{key}', 'ccp1:k1:c2VhbGVk', 'd', 'h')",
    )
    assert "still owns a database" in cli.refused(8, "tenant", "delete", "a", "--yes")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "Usage:"),
        (("tenant",), "Usage:"),
        (("nonsense",), "nonsense"),
        (("tenant", "create", "x"), "--environment"),
        (("tenant", "create", "x", "--environment", "moon"), "moon"),
        (("tenant", "create", "x", "--environment", "staging", "--id", "7"), "--id"),
        (("tenant", "create", "x", "--environment", "staging", "--label", "gold"), "write KEY=VALUE"),
        (("tenant", "create", "x", "--environment", "staging", "--label", "a=1", "--label", "a=2"), "named twice"),
        (("tenant", "create", "x ", "--environment", "staging"), "must not begin or end with blanks"),
        (("tenant", "create", "", "--environment", "staging"), "name: "),
        (("tenant", "rename", "system_admin", "a\nb"), "control characters"),
        (("tenant", "suspend", "system_admin", "--expected-version", "-1"), "--expected-version"),
        (("tenant", "list", "--limit", "0"), "--limit"),
        (("tenant", "list", "--limit", "501"), "--limit"),
        (("tenant", "list", "--after", "nonsense"), "this is not a cursor"),
        (("tenant", "list", "--all", "--after", "x"), "exclude each other"),
        (("tenant", "list", "--status", "gone"), "gone"),
        (("tenant", "list", "-o", "xml"), "xml"),
        (("-o", "xml", "tenant", "list"), "xml"),
        (("tenant", "delete", "system_admin"), "--yes"),
        (("tenant", "show", "a\0b"), "control characters"),
        (("config", "list", "--after", "nonsense"), "this is not a cursor"),
        (("config", "set", "", "1"), "key: "),
        (("db", "downgrade"), "--yes"),
        (("db", "wait", "--timeout", "soon"), "--timeout"),
        (("--env-file", "nowhere.env", "health"), "nowhere.env"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_2_for_wrong_usage(arguments: tuple[str, ...], said: str, cli: Cli) -> None:
    assert said in cli.refused(2, *arguments)
    assert cli.names() == ["system_admin"]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://user:pa@s3cret@localhost/x", "percent-encode"),
        ("mysql://user:s3cret@localhost/x", "does not start with postgresql://"),
        ("s3cret", "does not start with postgresql://"),
    ],
)
def test_3_for_a_malformed_connection_string_which_is_not_repeated(url: str, said: str) -> None:
    told = Cli(url).refused(3, "tenant", "list")
    assert said in told
    assert "s3cret" not in told


def test_3_for_a_database_that_does_not_exist(server_dsn: str) -> None:
    url = dsns.parse(server_dsn).replace(database="no such database").reveal()
    assert "CREATE DATABASE" in Cli(url).refused(3, "tenant", "list")


def test_3_for_a_bad_setting(cli: Cli) -> None:
    cli.environment["CAR_CONTROL_PLANE_POOL_SIZE"] = "many"
    assert "CAR_CONTROL_PLANE_POOL_SIZE: " in cli.refused(3, "tenant", "list")


def test_3_when_the_binaries_of_the_embedded_server_are_missing() -> None:
    cli = Cli("embedded:")
    cli.environment["CAR_CP_PG_BIN"] = "/no/such/directory"
    assert "CAR_CP_PG_BIN" in cli.refused(3, "tenant", "list")


def test_1_for_a_mistake_of_ours_without_its_text(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object, **__: object) -> None:
        raise KeyError("s3cret")

    monkeypatch.setattr(car_control_plane.TenantRepository, "list", broken)
    told = cli.refused(1, "tenant", "list")
    assert "unexpected KeyError" in told
    assert "s3cret" not in told
    debugged = cli("tenant", "list", CAR_CP_DEBUG="1")
    assert "Traceback" in debugged.stderr


def test_the_server_log_of_an_embedded_server_that_does_not_start_is_shown(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "PG_VERSION").write_text("9.1\n", encoding="utf-8")
    told = Cli(f"embedded:{tmp_path / 'data'}").refused(3, "tenant", "list")
    assert "9.1" in told


# --- forms of output --------------------------------------------------------------------------------------------------


def test_a_pipe_gets_json_lines_unless_told_otherwise(cli: Cli) -> None:
    assert json.loads(cli("tenant", "list").stdout)["name"] == "system_admin"
    assert cli("tenant", "list", "-o", "auto").stdout == cli("tenant", "list").stdout
    assert cli("tenant", "list", "-o", "table").stdout.splitlines()[0].startswith("NAME ")
    assert cli("-o", "tsv", "tenant", "list").stdout.startswith("tenant_id\tname\t")
    assert cli("-o", "tsv", "tenant", "list", "-o", "json").stdout == cli("tenant", "list").stdout


def test_tables_align_and_leave_nothing_out(cli: Cli) -> None:
    cli.done("tenant", "import", "-", stdin="name,environment,label.a\n京都,staging,\nb,production,1\n")
    lines = cli("tenant", "list", "-o", "table").stdout.splitlines()
    head = lines[0]
    assert head.split() == ["NAME", "ENVIRONMENT", "STATUS", "TENANT_ID", "VERSION", "CREATED_AT", "LABELS"]
    assert lines[1].index("production") == lines[3].index("production") == head.index("ENVIRONMENT")
    assert lines[2].index("staging") == head.index("ENVIRONMENT") - 2  # two characters take four cells
    assert lines[3].endswith("a=1")
    assert not [line for line in lines if line != line.rstrip()]


def test_show_is_one_line_for_each_field(cli: Cli) -> None:
    cli.done("tenant", "create", "a", "--environment", "staging", "--label", "x=1", "--label", "y=2")
    lines = dict(line.split(maxsplit=1) for line in cli("tenant", "show", "a", "-o", "table").stdout.splitlines())
    assert lines["labels"] == "x=1 y=2"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ", lines["created_at"])
    assert "status_reason" not in lines


def test_changes_are_sentences_in_a_table(cli: Cli) -> None:
    said = [
        cli(*arguments, "-o", "table").stdout
        for arguments in (
            ("tenant", "create", "a", "--environment", "staging"),
            ("tenant", "activate", "a"),
            ("tenant", "suspend", "a", "--reason", "late"),
            ("tenant", "delete", "a", "--yes"),
            ("config", "set", "k", "1"),
            ("config", "unset", "k"),
            ("db", "upgrade"),
            ("db", "current"),
            ("db", "check"),
            ("db", "wait"),
        )
    ]
    assert [re.sub(r"version \d+", "version N", text) for text in said] == [
        "a is pending, version N.\n",
        "a is active, version N.\n",
        "a is suspended (late), version N.\n",
        "a is deleted.\n",
        "k is set, version N.\n",
        "k is unset.\n",
        "Nothing to do: the schema is at 004_completed_operations.\n",
        "004_completed_operations (head)\n",
        "Clean: the database is as the models say.\n",
        "Ready: the schema is at 004_completed_operations.\n",
    ]


def test_tsv_can_be_cut_by_tabs_and_lines(cli: Cli) -> None:
    cli.done("config", "set", "a\\b", '"x\\ty\\nz\\\\"')
    table = cli("config", "list", "-o", "tsv").stdout
    head, row = table.splitlines()
    assert head == "key\tvalue\tupdated_at\tversion"
    assert row.split("\t")[:2] == ["a\\\\b", '"x\\\\ty\\\\nz\\\\\\\\"']
    rows = csv.DictReader(io.StringIO(cli("tenant", "show", "system_admin", "-o", "tsv").stdout), delimiter="\t")
    assert next(rows)["name"] == "system_admin"


def test_a_value_is_shown_as_json_so_that_text_and_number_stay_apart(cli: Cli) -> None:
    cli.done("config", "set", "number", "1")
    cli.done("config", "set", "text", '"1"')
    lines = cli("config", "list", "-o", "table").stdout.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["number", "1"], ["text", '"1"']]
    assert cli("config", "get", "text", "-o", "table").stdout == '"1"\n'


def test_what_is_in_the_database_does_not_steer_the_terminal(cli: Cli) -> None:
    """Older rows, or psql, can hold what the library refuses."""
    sneaky = "\x9b31mred\u202egnp.exe"
    execute(
        cli.url,
        "INSERT INTO control_plane.tenants (tenant_id, name, environment) "
        f"VALUES ('01980000-0000-7000-8000-000000000001', '{sneaky}', 'staging')",
    )
    for form in ("table", "json", "tsv"):
        result = cli("tenant", "list", "-o", form)
        assert "\\u009b31mred\\u202egnp.exe" in result.stdout
        assert not set(result.output) & {"\x9b", "\u202e"}
    assert json.loads(cli("tenant", "list").stdout.splitlines()[1])["name"] == sneaky


def test_json_is_utf8_and_readable_whatever_the_locale(cli: Cli) -> None:
    done = run(
        cli.url,
        *("tenant", "create", "Größenwahn 京都", "--environment", "staging"),
        environment={"PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    assert '"name":"Größenwahn 京都"' in done.stdout.decode("utf-8")


# --- settings ---------------------------------------------------------------------------------------------------------


def test_an_env_file_is_read_and_the_environment_wins_over_it(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("DATABASE_URL=postgresql://from-dot-env/x\n", encoding="utf-8")
    file = tmp_path / "production.env"
    file.write_text(f"DATABASE_URL='{cli.url}'\n", encoding="utf-8")
    assert run(None, "--env-file", str(file), "health", cwd=tmp_path).returncode == 0
    other = run(f"postgresql://user@127.0.0.1:{unused_port()}/x", "--env-file", str(file), "health", cwd=tmp_path)
    assert other.returncode == 4


def test_an_env_file_in_utf16_is_named(tmp_path: Path) -> None:
    file = tmp_path / "windows.env"
    file.write_bytes("DATABASE_URL=x\n".encode("utf-16"))
    assert "windows.env is not UTF-8" in Cli(None).refused(3, "--env-file", str(file), "health")


def commands(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    group = group or typer.main.get_command(app)
    yield path, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


def test_the_commands_are_those_that_were_promised() -> None:
    assert {" ".join(path) for path, command in commands() if not hasattr(command, "commands")} == {
        *("demo", "health", "doctor"),
        *(f"db {name}" for name in ("upgrade", "downgrade", "current", "history", "check", "sql", "drift", "wait")),
        *(f"tenant {name}" for name in ("create", "import", "list", "show", "rename", "activate", "suspend")),
        *("tenant deactivate", "tenant delete"),
        *(f"config {name}" for name in ("get", "set", "list", "unset")),
        *(f"key {name}" for name in ("generate", "status", "promote", "rotate", "rewrap", "destroy")),
        *(f"database {name}" for name in ("register", "list", "show", "verify", "set-status", "delete")),
        *("database connection-string", "database set-connection-string"),
    }


def test_no_command_takes_a_connection_string() -> None:
    for path, command in commands():
        names = {name for parameter in command.params for name in (parameter.name, *parameter.opts)}
        names -= {"no_password", "--no-password"}  # says that there is none
        assert not [name for name in names if re.search("url|dsn|password|secret|connection", name)], path


@pytest.mark.parametrize("path", [path for path, _ in commands()], ids=" ".join)
def test_every_command_has_a_help_and_every_option_a_meaning(path: tuple[str, ...]) -> None:
    result = Cli(None)(*path, "--help")
    assert result.exit_code == 0
    command = dict(commands())[path]
    assert command.help
    assert "Raises" not in result.stdout
    assert [one.name for one in command.params if not getattr(one, "help", None)] == []


def test_version() -> None:
    assert Cli(None)("--version").stdout == f"car-control-plane {car_control_plane.__version__}\n"


# --- start-up ---------------------------------------------------------------------------------------------------------


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_it_says_which_one_to_install(missing: str) -> None:
    done = python(
        f"import sys; sys.modules[{missing!r}] = None; from car_control_plane.cli import main; sys.exit(main())"
    )
    assert done.returncode == 3
    assert done.stderr == (
        'Error: the command line needs packages that are not installed\nHint: pip install "car-control-plane[cli]"\n'
    )


def test_a_missing_module_of_another_kind_is_not_hidden() -> None:
    done = python(
        "import sys; sys.modules['car_control_plane.cli.tenants'] = None; from car_control_plane.cli import main; main()"
    )
    assert "car_control_plane.cli.tenants" in done.stderr


def test_help_and_completion_do_not_wait_for_sqlalchemy() -> None:
    code = (
        "import sys; from car_control_plane.cli import main; sys.argv = ['car-cp', 'tenant', 'list', '--help']; main(); "
        "sys.stderr.write(' '.join(sorted({'sqlalchemy', 'alembic', 'asyncpg'} & set(sys.modules))))"
    )
    done = python(code)
    assert "--name-prefix" in done.stdout
    assert done.stderr == ""


def test_completion_in_the_shell() -> None:
    def completed(*words: str) -> list[str]:
        done = python(
            "import sys; from car_control_plane.cli import main; sys.exit(main())",
            _CAR_CP_COMPLETE="complete_bash",
            COMP_WORDS=" ".join(["car-cp", *words]),
            COMP_CWORD=str(len(words)),
        )
        return done.stdout.split()

    assert completed("ten") == ["tenant"]
    assert completed("tenant", "sus") == ["suspend"]
    assert completed("tenant", "list", "--status", "") == [*TenantStatus]


def test_the_module_runs_and_returns_the_exit_code() -> None:
    done = run(None, "tenant", "list")
    assert (done.returncode, done.stdout) == (3, b"")
    assert done.stderr.startswith(b"Error: DATABASE_URL environment variable is required\n")


# --- signals and streams ----------------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("form", ["json", "tsv", "table"])
def test_a_reader_that_goes_away_ends_it_quietly(form: str, cli: Cli) -> None:
    rows = "".join(f"t{number},staging\n" for number in range(3_000))  # more than a pipe holds
    cli.done("tenant", "import", "-", stdin=f"name,environment\n{rows}")
    with started(cli.url, "tenant", "list", "--all", "-o", form) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(WAIT_SECONDS) == 141


@posix
def test_a_list_may_wait_for_its_reader_as_long_as_it_takes(cli: Cli) -> None:
    rows = "".join(f"t{number},staging\n" for number in range(5_000))
    cli.done("tenant", "import", "-", stdin=f"name,environment\n{rows}")
    impatient = {"CAR_CONTROL_PLANE_IDLE_IN_TRANSACTION_TIMEOUT_SECONDS": "0.5"}
    with started(cli.url, "tenant", "list", "--all", environment=impatient) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        time.sleep(1.5)
        assert process.stdout.read().count(b"\n") == 5_000
        assert process.stderr.read() == b""
        assert process.wait(WAIT_SECONDS) == 0


@posix
def test_ctrl_c_while_waiting_for_input_imports_nothing(cli: Cli) -> None:
    with started(cli.url, "tenant", "import", "-", stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(b"name,environment\na,staging\n")
        process.stdin.flush()
        until(lambda: statements(cli.url) != "")
        time.sleep(1)  # until it waits; the test holds at any other moment too
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_SECONDS) == 130  # with its input still open
        assert process.stderr.read() == b"Interrupted.\n"
    assert cli.names() == ["system_admin"]


@posix
def test_an_import_may_wait_for_its_input_as_long_as_it_takes(cli: Cli) -> None:
    """Its transaction is open meanwhile, and the time limit on idle ones is not for it."""
    impatient = {"CAR_CONTROL_PLANE_IDLE_IN_TRANSACTION_TIMEOUT_SECONDS": "0.5"}
    with started(cli.url, "tenant", "import", "-", stdin=subprocess.PIPE, environment=impatient) as process:
        assert process.stdin is not None
        rows = "".join(f"t{number},staging\n" for number in range(BATCH_ROWS + 5_000))
        process.stdin.write(f"name,environment\n{rows}".encode())
        process.stdin.flush()
        until(lambda: "INSERT" in statements(cli.url))
        time.sleep(1.5)
        output, errors = process.communicate(b"last,staging\n", WAIT_SECONDS)
    assert (process.returncode, errors) == (0, b"")
    assert json.loads(output)["created"] == BATCH_ROWS + 5_001


@posix
def test_ctrl_c_in_the_middle_of_an_import_leaves_nothing(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "large.csv"
    with file.open("w", encoding="utf-8") as out:
        out.write("name,environment\n")
        out.writelines(f"t{number},staging\n" for number in range(400_000))
    with started(cli.url, "tenant", "import", str(file)) as process:
        until(lambda: "INSERT" in statements(cli.url))
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=WAIT_SECONDS) == (b"", b"Interrupted.\n")
        assert process.returncode == 130
    assert cli.names() == ["system_admin"]


def statements(url: str) -> str:
    """Return what the sessions of the program are doing."""

    async def ask() -> str:
        parsed = dsns.parse(url)
        connection = await asyncpg.connect(parsed.for_host(parsed.hosts[0]), password=parsed.password)
        try:
            rows = await connection.fetch(
                "SELECT query FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'car-control-plane/%'"
            )
            return "\n".join(row["query"] for row in rows)
        finally:
            await connection.close()

    return asyncio.run(ask())


# --- in a terminal ----------------------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("columns", [40, 80, 120])
def test_a_terminal_gets_a_table_that_fits_and_cuts_no_id(columns: int, cli: Cli) -> None:
    terminal = Terminal(cli.url, "tenant", "list", columns=columns)
    assert terminal.end() == 0
    head, row = plain(terminal.text).splitlines()
    assert str(SYSTEM_ADMIN_ID) in row
    assert head.split()[:4] == ["NAME", "ENVIRONMENT", "STATUS", "TENANT_ID"]
    assert ("CREATED_AT" in head) == (columns == 120)
    assert columns < 80 or len(row) <= columns
    assert "\x1b[32mactive" in terminal.text


@posix
def test_no_colour_where_none_is_wanted(cli: Cli) -> None:
    terminal = Terminal(cli.url, "tenant", "list", environment={"NO_COLOR": "1"})
    assert terminal.end() == 0
    assert not re.search(r"\x1b\[3\dm", terminal.text)


@posix
@pytest.mark.parametrize(
    ("answer", "code", "left"),
    [("y\n", 0, False), ("n\n", 1, True), ("\n", 1, True), ("\x04", 1, True), ("\x03", 130, True)],
)
def test_delete_asks_in_a_terminal(answer: str, code: int, left: bool, cli: Cli) -> None:
    key = cli.done("tenant", "create", "acme", "--environment", "production")["tenant_id"]
    # A terminal of its own sends Ctrl-C to the program only when it is the program's controlling one; so the signal is sent.
    terminal = Terminal(cli.url, "tenant", "delete", "acme")
    terminal.read_until("[y/N]")
    assert f"Delete tenant acme (production, pending, {key})?" in plain(terminal.text).replace("\n", "")
    if answer == "\x03":
        terminal.wait_until_it_waits()  # Python loses a signal that comes while its line editor is being started
        terminal.process.send_signal(signal.SIGINT)
    else:
        terminal.type(answer)
    assert terminal.end() == code, terminal.text
    assert ("acme" in cli.names()) == left
    expected = {0: "acme is deleted.", 1: "Stopped; nothing was changed.", 130: "Interrupted."}
    assert plain(terminal.text).rstrip().endswith(expected[code])


@posix
def test_what_was_shown_is_what_is_deleted(cli: Cli) -> None:
    cli.done("tenant", "create", "acme", "--environment", "production")
    terminal = Terminal(cli.url, "tenant", "delete", "acme")
    terminal.read_until("[y/N]")
    cli.done("tenant", "activate", "acme")
    terminal.type("y\n")
    assert terminal.end() == 8
    assert "acme" in cli.names()


@posix
def test_downgrade_asks_in_a_terminal(cli: Cli) -> None:
    terminal = Terminal(cli.url, "db", "downgrade", "base")
    terminal.read_until("[y/N]")
    assert "Downgrade from 004_completed_operations to base? The data of what is dropped is lost." in plain(
        terminal.text
    )
    terminal.type("n\n")
    assert terminal.end() == 1
    assert cli.names() == ["system_admin"]


@posix
def test_import_shows_its_progress_on_standard_error(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "many.csv"
    rows = "".join(f"t{number},staging\n" for number in range(20_000))
    file.write_text(f"name,environment\n{rows}", encoding="utf-8")
    terminal = Terminal(cli.url, "tenant", "import", str(file), columns=100, stdout=subprocess.PIPE)
    assert terminal.process.stdout is not None
    output = terminal.process.stdout.read()
    assert terminal.end() == 0
    assert json.loads(output)["created"] == 20_000
    assert "Importing many.csv" in plain(terminal.text)
    assert re.search(r"[1-9][\d,]*000 tenants", plain(terminal.text))


def test_import_shows_no_progress_in_a_pipe(cli: Cli) -> None:
    assert cli("tenant", "import", "-", stdin="name,environment\na,staging\n").stderr == ""


# --- the demo ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A directory that the user a server runs as can reach too; those of `tmp_path` only their owner can."""
    with tempfile.TemporaryDirectory(prefix="car-cp-test-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


PROMISED = (
    r"^PostgreSQL [\d.]+ started in [\d.]+ s",
    rf"^nothing → {REVISIONS[-1]}, in \d steps\.$",
    r"^Healthy: PostgreSQL",
    r"^Created 8 tenants\.$",
    r"^Error: a tenant cannot change from pending to suspended$",
    r"^harbor-freight is suspended \(invoice 1042 unpaid\), version \d+\.$",
    r"^Error: tenant 'harbor-freight' has changed: version \d+ was expected, it is at \d+$",
    r"^k\d{8}-\w{4} is in demo\.keys, current\.$",
    r"^paper-plane/primary is registered as [0-9a-f-]{36}, version \d+\.$",
    r"^[0-9a-f-]{36}  yes  primary\b",
    r"^ccp1:k\d{8}-\w{4}:[\w-]+…$",
    r"^UPDATE 2$",
    r"^Error: The sealed value is damaged, belongs to another row, or was sealed with another key$",
    r"^Sealed 2 anew with k\d{8}-\w{4}; none left with another key\.$",
    r"^postgresql://postgres:\*\*\*@",
    r"^billing.grace_days is set, version \d+\.$",
    r"^14$",
    r"^There are more: --after \S+, or --all\.$",
    r"^Done in [\d.]+ s\. The server is stopped and its data is gone",
)


def test_the_demo_shows_it_all_the_same_every_time_and_leaves_nothing_behind(tmp_path: Path, scratch: Path) -> None:
    bait = "postgresql://user:s3cret@127.0.0.1:1/production"
    foreign = {"CAR_CONTROL_PLANE_DATABASE_URL": bait, "CAR_CONTROL_PLANE_POOL_SIZE": "x", "PGSSLMODE": "verify-full"}
    first = run(bait, "demo", cwd=tmp_path, environment={**foreign, "TMPDIR": str(scratch)})
    second = run(None, "demo", cwd=tmp_path, environment={"TMPDIR": str(scratch)})
    for done in (first, second):
        assert (done.returncode, done.stderr) == (0, b""), done.stdout.decode()
    text = first.stdout.decode()
    lines = text.splitlines()
    assert len(lines) < 95
    assert "s3cret" not in text
    before, after = re.findall(r"^k\d{8}-(\w{4}) \| (\d+)\nk\d{8}-\1 \| (\d+)$", text, re.MULTILINE)
    assert (before[0] != after[0], before[1:]) == (True, after[1:]), "other keys, same versions"
    assert max(map(len, lines)) <= 100
    assert "\x1b" not in text
    assert [promise for promise in PROMISED if not re.search(promise, text, re.MULTILINE)] == []
    assert without_ids_and_times(text) == without_ids_and_times(second.stdout.decode())
    assert [*tmp_path.iterdir(), *scratch.iterdir()] == []


def without_ids_and_times(text: str) -> str:
    text = re.sub(r"\b[0-9a-f]{8}-[0-9a-f-]{27}\b", "ID", text)
    text = re.sub(r"\bk\d{8}-\w{4}\b(:[\w-]+)?|(?<=host=)[\w/-]+", "KEY", text)
    return re.sub(r"[\d.]+ (s|ms)\b|--after \S+", "N", text)


def test_the_demo_keeps_its_data_where_it_is_told(scratch: Path) -> None:
    done = run(None, "demo", "--data-dir", "kept data", cwd=scratch)
    assert done.returncode == 0, done.stderr
    command = done.stdout.decode().splitlines()[-1]
    keys = "CAR_CONTROL_PLANE_ENCRYPTION_KEY_FILE='kept data/demo.keys'"
    assert command == f"DATABASE_URL='embedded:kept data' {keys} car-cp database list"
    assert stat.S_IMODE((scratch / "kept data" / "demo.keys").stat().st_mode) == 0o600
    status = run(
        "embedded:kept data",
        "key",
        "status",
        cwd=scratch,
        environment={"CAR_CONTROL_PLANE_ENCRYPTION_KEY_FILE": "kept data/demo.keys"},
    )
    assert status.returncode == 0, status.stderr
    listed = run("embedded:kept data", "tenant", "list", cwd=scratch)
    assert len(listed.stdout.splitlines()) == 9
    again = run(None, "demo", "--data-dir", "kept data", cwd=scratch)
    assert again.returncode == 2
    assert command.encode() in again.stderr


def test_a_demo_that_goes_wrong_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("car_control_plane.cli.demo.TENANTS", "no such file.csv")
    result = Cli(None)("demo")
    assert result.exit_code == 1, result.output
    assert "the demo went wrong: car-cp tenant import 'no such file.csv' ended with 2, not 0" in result.stderr
    assert "DATABASE_URL" not in os.environ
