"""`car-cp database` as its users meet it: where a database is, the sealed way in, and that no secret is left lying about."""

import asyncio
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any, NoReturn

import pytest

from car_control_plane import Key, NotFoundError, dsn as dsns
from car_control_plane.cli import databases
from car_control_plane.cli.databases import Status
from car_control_plane.models import TenantDatabaseStatus
from tests.fixtures import cli as clis
from tests.fixtures.cli import Cli, Terminal, execute, plain, posix, run, started
from tests.fixtures.servers import unused_port

compiled_once = clis.compiled_once
nothing_set = clis.nothing_set

SECRET = "s3cret-c4n4ry"
REMOTE = f"postgresql://app:{SECRET}@db.example.com:6432/acme?sslmode=verify-full&application_name=acme"
MASKED = "postgresql://app:***@db.example.com:6432/acme?sslmode=verify-full&application_name=acme"
KEYS = f"k1:{Key('k1', bytes(range(32))).to_base64()}"
KEYED = {"CAR_CONTROL_PLANE_ENCRYPTION_KEYS": KEYS}
NOWHERE = "01980000-0000-7000-8000-000000000000"


@pytest.fixture
def cli(shared_manager: object, shared_database: str) -> Cli:
    """The command line on a migrated database with a key and two tenants; what it writes there is deleted afterwards."""
    del shared_manager  # does the deleting
    cli = Cli(shared_database)
    cli.environment["CAR_CONTROL_PLANE_ENCRYPTION_KEYS"] = KEYS
    cli.done("tenant", "import", "-", stdin="name,environment\nacme,production\nglobex,development\n")
    return cli


def register(cli: Cli, tenant: str = "acme", *arguments: str, dsn: str = REMOTE) -> Any:
    return cli.done("database", "register", tenant, "-", *arguments, stdin=f"{dsn}\n")


def reachable(server: str) -> str:
    """Return a connection string of the server of the tests as tenants write it: complete, with a password to look for."""
    dsn = dsns.parse(server)
    password = dsn.password or SECRET
    text = dsn.replace(database="postgres").reveal()
    return text if dsn.password else re.sub(r"^(postgresql://[^:@/]+)@", rf"\1:{password}@", text)


# --- registering ------------------------------------------------------------------------------------------------------


def test_register_prints_where_the_database_is_and_never_the_way_in(cli: Cli) -> None:
    result = cli("database", "register", "acme", "-", stdin=REMOTE)
    assert (result.exit_code, result.stderr) == (0, "")
    row = json.loads(result.stdout)
    assert (row["tenant"], row["purpose"], row["status"], row["kid"]) == ("acme", "primary", "active", "k1")
    assert (row["host"], row["port"], row["database_name"]) == ("db.example.com", 6432, "acme")
    assert SECRET not in result.output
    assert "connection_string" not in result.stdout
    assert cli.done("database", "show", row["id"]) == row
    assert cli("database", "connection-string", row["id"], "--reveal").stdout == f"{REMOTE}\n"


@pytest.mark.parametrize("text", [f"{REMOTE}\n", f"{REMOTE}\r\n", f"\ufeff{REMOTE}", f"  {REMOTE}  "])
def test_a_pipe_is_read_whatever_stands_around_the_connection_string(text: str, cli: Cli) -> None:
    row = cli.done("database", "register", "acme", stdin=text)  # without a -, too
    assert cli("database", "connection-string", row["id"], "--reveal").stdout == f"{REMOTE}\n"


def test_the_environment_is_read_when_nothing_is_piped(cli: Cli) -> None:
    result = cli("database", "register", "acme", TENANT_DATABASE_URL=REMOTE)
    assert json.loads(result.stdout)["host"] == "db.example.com", result.stderr
    other = cli("database", "register", "globex", "--from-env", "OTHER", OTHER=REMOTE, TENANT_DATABASE_URL="x")
    assert json.loads(other.stdout)["tenant"] == "globex", other.stderr


def test_what_is_piped_wins_over_the_environment(cli: Cli) -> None:
    """A variable that was left set for one tenant must not become another's way in."""
    result = cli(
        "database", "register", "acme", stdin=REMOTE, TENANT_DATABASE_URL="postgresql://u:p@other.example.com/x"
    )
    assert json.loads(result.stdout)["host"] == "db.example.com", result.stderr


def test_the_parts_of_a_connection_string_need_no_escapes(cli: Cli) -> None:
    password = "p@ss/w:rd?#% é"
    row = cli.done(
        *("database", "register", "acme", "--host", "db.example.com", "--port", "6432"),
        *("--database", "a b/c", "--user", "app@acme"),
        stdin=f"{password}\n",
    )
    assert (row["host"], row["port"], row["database_name"]) == ("db.example.com", 6432, "a b/c")
    opened = dsns.parse(cli("database", "connection-string", row["id"], "--reveal").stdout)
    assert (opened.password, opened.user, opened.database) == (password, "app@acme", "a b/c")


def test_purposes_tell_the_databases_of_a_tenant_apart(cli: Cli) -> None:
    register(cli)
    assert register(cli, "acme", "--purpose", "reporting")["purpose"] == "reporting"
    assert "already has a database" in cli.refused(8, "database", "register", "acme", "-", stdin=REMOTE)


PARTS = ("--host", "db.example.com", "--database", "d", "--user", "u")

REFUSED = [
    pytest.param(("acme", "-"), REMOTE.replace("db.example.com", "127.0.0.1"), 6, "refused", id="loopback"),
    pytest.param(("acme", "-"), REMOTE.replace("db.example.com", "169.254.169.254"), 6, "metadata", id="metadata"),
    pytest.param(("acme", "-"), f"postgresql://app:{SECRET}@/x?host=/tmp", 2, "socket", id="socket"),
    pytest.param(("acme", "-"), f"postgresql://app:{SECRET}@a,b/x", 2, "several hosts", id="several hosts"),
    pytest.param(("acme", "-"), f"host=h user=u dbname=d password={SECRET} service=x", 2, "service", id="service"),
    pytest.param(("acme", "-"), f"{REMOTE}&sslmod=x", 2, "", id="unknown option"),
    pytest.param(("acme", "-"), f"{SECRET}", 2, "postgresql://", id="no connection string"),
    pytest.param(("acme", "-"), "", 2, "there is no connection string", id="empty"),
    pytest.param(("acme", "-"), " \n", 2, "there is no connection string", id="blank"),
    pytest.param(("acme", "-"), b"\xff" + SECRET.encode(), 2, "not UTF-8", id="not UTF-8"),
    pytest.param(("acme", "-"), SECRET * 10_000, 2, "longer than any", id="too long"),
    pytest.param(("nobody", "-"), REMOTE, 7, "nobody", id="no such tenant"),
    pytest.param(("acme", "-", "--purpose", "A B"), REMOTE, 2, "purpose", id="bad purpose"),
    pytest.param(("acme", "-", "--from-env", "X"), REMOTE, 2, "exclude each other", id="two sources"),
    pytest.param(("acme", "--from-env", "NOT_SET"), "", 2, "NOT_SET", id="variable not set"),
    pytest.param(("acme", "--host", "h"), SECRET, 2, "--database is missing", id="parts missing"),
    pytest.param(("acme", "--port", "1"), SECRET, 2, "--host is missing", id="port alone"),
    pytest.param(("acme", *PARTS), "", 2, "--no-password", id="no password"),
    pytest.param(("acme", *PARTS, "-"), "\r\n", 2, "there is no password", id="blank password"),
    pytest.param(("acme", *PARTS), f"{SECRET}\nmore\n", 2, "more than one line", id="two lines"),
    pytest.param(("acme", *PARTS), f"{SECRET}\n\n", 2, "more than one line", id="two line breaks"),
    pytest.param(("acme", *PARTS), f"{SECRET}\rmore", 2, "more than one line", id="carriage return"),
    pytest.param(("acme", *PARTS), REMOTE, 2, "whole connection string", id="URI for a password"),
    pytest.param(("acme", *PARTS), f"host=h password={SECRET}", 2, "whole connection", id="pairs for a password"),
    pytest.param(("acme", *PARTS, "--no-password", "-"), SECRET, 2, "exclude", id="no password and a pipe"),
    pytest.param(("acme", "--no-password"), REMOTE, 2, "goes with --host", id="no password without parts"),
    pytest.param(("acme", "--host", "h@x", "--database", "d", "--user", "u"), SECRET, 2, "host", id="odd host"),
    pytest.param(("acme", SECRET), "", 2, "no argument", id="something as an argument"),
    pytest.param(("acme", REMOTE), "", 2, "no argument", id="URI as an argument"),
    pytest.param((REMOTE,), "", 2, "no argument", id="URI for a tenant"),
    pytest.param(("acme", f"host=h password={SECRET}"), "", 2, "no argument", id="pairs as an argument"),
    pytest.param(("acme", "--from-env", REMOTE), "", 2, "no argument", id="URI for a variable"),
    pytest.param(("acme", "--host", REMOTE), "", 2, "no argument", id="URI for a host"),
    pytest.param(("acme", f"--host={REMOTE}"), "", 2, "no argument", id="URI with an equals sign"),
]


@pytest.mark.parametrize(("arguments", "stdin", "code", "said"), REFUSED)
def test_what_is_refused_is_not_repeated_and_nothing_is_stored(
    arguments: tuple[str, ...], stdin: str | bytes, code: int, said: str, cli: Cli
) -> None:
    told = cli.refused(code, "database", "register", *arguments, stdin=stdin)
    assert said in told
    assert SECRET not in told
    assert cli("database", "list").stdout == ""


@pytest.mark.parametrize("name", ["PW", "OTHER"])
def test_a_variable_holds_the_password_when_it_is_named(name: str, cli: Cli) -> None:
    """The variable of whole connection strings is none of a password, and is not passed over in silence."""
    given = {name: SECRET, "EMPTY": ""}
    arguments = ("database", "register", "acme", *PARTS)
    both = cli(*arguments, TENANT_DATABASE_URL=REMOTE, **given)
    assert (both.exit_code, both.stdout) == (2, "")
    assert "TENANT_DATABASE_URL is set, and --host names another way in" in " ".join(both.stderr.split())
    assert SECRET not in both.stderr
    empty = cli(*arguments, "--from-env", "EMPTY", **given)
    assert (empty.exit_code, "EMPTY is empty" in empty.stderr, "--no-password" in empty.stderr) == (2, True, True)
    row = json.loads(cli(*arguments, "--from-env", name, TENANT_DATABASE_URL=REMOTE, **given).stdout)
    assert dsns.parse(cli("database", "connection-string", row["id"], "--reveal").stdout).password == SECRET
    piped = cli("database", "set-connection-string", row["id"], *PARTS, stdin="piped\n", TENANT_DATABASE_URL=REMOTE)
    assert piped.exit_code == 0, piped.stderr
    assert dsns.parse(cli("database", "connection-string", row["id"], "--reveal").stdout).password == "piped"


@pytest.mark.parametrize(
    "command", ["list", "show", "verify", "set-status", "delete", "connection-string", "set-connection-string"]
)
def test_no_command_repeats_a_connection_string_among_its_arguments(command: str, cli: Cli) -> None:
    told = cli.refused(2, "database", command, REMOTE)
    assert "no argument" in told
    assert SECRET not in told


def test_3_without_a_key_and_nothing_is_stored(cli: Cli) -> None:
    del cli.environment["CAR_CONTROL_PLANE_ENCRYPTION_KEYS"]
    told = cli.refused(3, "database", "register", "acme", "-", stdin=REMOTE)
    assert "car-cp key generate" in told
    assert SECRET not in told
    assert cli("database", "list").stdout == ""


# --- finding ----------------------------------------------------------------------------------------------------------


def listed(cli: Cli, *arguments: str) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in cli("database", "list", *arguments).stdout.splitlines()]
    return [(row["tenant"], row["purpose"]) for row in rows]


def test_list_filters_and_needs_no_key(cli: Cli) -> None:
    first = register(cli)
    register(cli, "acme", "--purpose", "reporting", dsn=REMOTE.replace("db.", "reports."))
    register(cli, "globex")
    cli.done("database", "set-status", first["id"], "migrating")
    del cli.environment["CAR_CONTROL_PLANE_ENCRYPTION_KEYS"]
    everything = [("acme", "primary"), ("acme", "reporting"), ("globex", "primary")]
    assert listed(cli) == listed(cli, "--all") == listed(cli, "--kid", "k1") == everything
    assert listed(cli, "--tenant", "acme") == listed(cli, "--tenant", first["tenant_id"]) == everything[:2]
    assert listed(cli, "--status", "migrating", "--status", "error") == everything[:1]
    assert listed(cli, "--purpose", "reporting") == listed(cli, "--host", "reports.example.com") == everything[1:2]
    assert listed(cli, "--kid", "k2") == []
    assert cli("database", "list", "--kid", "k2").stderr == "No databases.\n"
    assert cli.refused(7, "database", "list", "--tenant", "nobody")
    assert cli.refused(2, "database", "list", "--all", "--after", "x")


def test_list_pages(cli: Cli) -> None:
    for number in range(5):
        register(cli, "acme", "--purpose", f"p{number}")
    page = cli("database", "list", "--limit", "3")
    cursor = re.search(r"--after (\S+), or --all", page.stderr)
    assert cursor is not None
    rest = cli("database", "list", "--limit", "3", "--after", cursor[1])
    rows = [json.loads(line)["purpose"] for line in [*page.stdout.splitlines(), *rest.stdout.splitlines()]]
    assert rows == [f"p{number}" for number in range(5)]
    assert rest.stderr == ""


def test_the_choices_are_those_of_the_library() -> None:
    assert [*Status] == [*map(str, TenantDatabaseStatus)]


def test_a_table_names_the_tenant(cli: Cli) -> None:
    row = register(cli)
    head, line = cli("database", "list", "-o", "table").stdout.splitlines()
    assert head.split()[:4] == ["TENANT", "PURPOSE", "STATUS", "ID"]
    assert line.split()[:4] == ["acme", "primary", "active", row["id"]]
    shown = cli("database", "show", row["id"], "-o", "table").stdout
    assert re.search(r"^host +db\.example\.com$", shown, re.MULTILINE)


@posix
@pytest.mark.parametrize("columns", [40, 80, 160])
def test_a_terminal_gets_a_table_that_fits_and_cuts_no_id(columns: int, cli: Cli) -> None:
    row = register(cli)
    terminal = Terminal(cli.url, "database", "list", columns=columns)
    assert terminal.end() == 0
    head, line = plain(terminal.text).splitlines()
    assert row["id"] in line
    assert ("HOST" in head, "CREATED_AT" in head) == (columns >= 80, False)
    assert ("KID" in head) == (columns == 160)
    assert columns < 80 or len(line) <= columns


# --- changing ---------------------------------------------------------------------------------------------------------


def test_a_status_and_another_connection_string(cli: Cli) -> None:
    row = register(cli)
    moved = cli.done("database", "set-status", row["id"], "inactive", "--expected-version", str(row["version"]))
    assert (moved["status"], moved["version"] > row["version"]) == ("inactive", True)
    told = cli.refused(8, "database", "set-status", row["id"], "active", "--expected-version", str(row["version"]))
    assert "changed" in told
    elsewhere = REMOTE.replace("db.", "new.").replace(SECRET, "another")
    changed = cli.done("database", "set-connection-string", row["id"], "-", stdin=elsewhere)
    assert changed["host"] == "new.example.com"
    assert cli("database", "connection-string", row["id"], "--reveal").stdout == f"{elsewhere}\n"
    parts = ("--host", "third.example.com", "--database", "d", "--user", "u")
    assert cli.done("database", "set-connection-string", row["id"], *parts, stdin="pw")["host"] == "third.example.com"
    for nothing in ("", "\n", "  \n"):
        told = cli.refused(2, "database", "set-connection-string", row["id"], *parts, stdin=nothing)
        assert "there is no password" in told
        assert "--no-password" in told
    opened = dsns.parse(cli("database", "connection-string", row["id"], "--reveal").stdout)
    assert opened.password == "pw", "the one that works is still there"
    cli.done("database", "set-connection-string", row["id"], *parts, "--no-password")
    assert cli("database", "connection-string", row["id"], "--reveal").stdout.startswith("postgresql://u@third.")
    version = ("--expected-version", str(row["version"]))
    assert "changed" in cli.refused(8, "database", "set-connection-string", row["id"], "-", *version, stdin=REMOTE)


def test_delete_forgets_the_way_in(cli: Cli) -> None:
    row = register(cli)
    assert "--yes" in cli.refused(2, "database", "delete", row["id"])
    stale = ("--expected-version", "1")
    assert "changed" in cli.refused(8, "database", "delete", row["id"], "--yes", *stale)
    assert cli.done("database", "delete", row["id"], "--yes") == row
    assert cli("database", "list").stdout == ""


def test_changes_are_sentences_in_a_table(cli: Cli) -> None:
    table = ("-o", "table")
    said = [cli("database", "register", "acme", "-", *table, stdin=REMOTE).stdout]
    key = cli.done("database", "list")["id"]
    said += [
        cli("database", *arguments, *table, stdin=REMOTE).stdout
        for arguments in (("set-status", key, "error"), ("set-connection-string", key, "-"), ("delete", key, "--yes"))
    ]
    assert [re.sub(r"[0-9a-f-]{36}", "ID", re.sub(r"version \d+", "version N", text)) for text in said] == [
        "acme/primary is registered as ID, version N.\n",
        "acme/primary is error, version N.\n",
        "acme/primary has a new connection string, version N.\n",
        "acme/primary is forgotten.\n",
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ("show", NOWHERE),
        ("verify", NOWHERE),
        ("set-status", NOWHERE, "active"),
        ("set-connection-string", NOWHERE, "-"),
        ("connection-string", NOWHERE),
        ("delete", NOWHERE, "--yes"),
    ],
    ids=" ".join,
)
def test_7_for_what_is_not_there(arguments: tuple[str, ...], cli: Cli) -> None:
    result = cli("database", *arguments, stdin=REMOTE)
    assert result.exit_code == 7
    assert NOWHERE in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("show", "acme"), "UUID"),
        (("verify",), "either"),
        (("verify", NOWHERE, "--all"), "either"),
        (("set-status", NOWHERE, "gone"), "gone"),
        (("list", "--limit", "501"), "--limit"),
        (("list", "--kid", "K 1"), "key"),
        (("list", "--after", "nonsense"), "this is not a cursor"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_2_for_wrong_usage(arguments: tuple[str, ...], said: str, cli: Cli) -> None:
    assert said in cli.refused(2, "database", *arguments)


# --- opening ----------------------------------------------------------------------------------------------------------


def test_the_way_in_is_masked_unless_it_is_to_be_revealed(cli: Cli) -> None:
    key = register(cli)["id"]
    for form in ("table", "json", "tsv"):
        assert cli("database", "connection-string", key, "-o", form).stdout == f"{MASKED}\n"
        assert cli("database", "connection-string", key, "--reveal", "-o", form).stdout == f"{REMOTE}\n"


@pytest.mark.parametrize(
    ("user", "actor"),
    [("root", "car-cp:root"), ("a\nb", r"car-cp:a\\u000ab"), ("\udcff", r"car-cp:\\udcff"), (None, "car-cp")],
)
def test_the_log_is_told_who_has_opened_it(
    user: str | None, actor: str, cli: Cli, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def name() -> str:
        if user is None:
            raise ImportError("pwd")  # as on Windows
        return user

    key = register(cli)["id"]
    monkeypatch.setattr("getpass.getuser", name)
    with caplog.at_level(logging.INFO, "car_control_plane.secrets"):
        result = cli("database", "connection-string", key, "--reveal")
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{REMOTE}\n", "")
    (told,) = caplog.records
    assert f"actor='{actor}'" in told.getMessage()
    assert SECRET not in caplog.text


def test_a_value_swapped_by_sql_does_not_open_and_stops_no_other(cli: Cli) -> None:
    first, second, third = (register(cli, "acme", "--purpose", f"p{number}")["id"] for number in range(3))
    execute(
        cli.url,
        "UPDATE control_plane.tenant_databases a SET connection_string_encrypted = b.connection_string_encrypted "
        f"FROM control_plane.tenant_databases b WHERE a.id <> b.id AND '{third}' NOT IN (a.id::text, b.id::text)",
    )
    for key in (first, second):
        told = cli.refused(1, "database", "connection-string", key, "--reveal")
        assert "belongs to another row" in told
        assert SECRET not in told
    alone = run(cli.url, "database", "connection-string", first, environment=KEYED)
    assert (alone.returncode, alone.stderr[:7]) == (1, b"Error: ")
    assert b"refused to open" not in alone.stderr, "the library's log is not printed as well"
    assert cli("database", "connection-string", third, "--reveal").stdout == f"{REMOTE}\n"
    assert len(listed(cli)) == 3


def test_a_key_that_is_not_here_is_named(cli: Cli) -> None:
    key = register(cli)["id"]
    cli.environment["CAR_CONTROL_PLANE_ENCRYPTION_KEYS"] = f"other:{Key.generate('other').to_base64()}"
    assert "'k1'" in cli.refused(1, "database", "connection-string", key)


# --- verifying --------------------------------------------------------------------------------------------------------


@pytest.fixture
def trusting(cli: Cli) -> Cli:
    """The command line where a tenant in development may use the server of the tests, wherever that listens."""
    cli.environment["CAR_CONTROL_PLANE_TENANT_CONNECTIONS_ALLOW"] = "sockets"
    return cli


def test_verify_connects_and_records_what_it_found(trusting: Cli, server_dsn: str) -> None:
    row = register(trusting, "globex", dsn=reachable(server_dsn))
    found = trusting.done("database", "verify", row["id"])
    assert (found["ok"], found["id"], found["message"]) == (True, row["id"], None)
    shown = trusting.done("database", "show", row["id"])
    assert shown["verified_at"] is not None
    assert shown["server_version"] == found["server_version"]
    assert re.match(r"\d+", shown["server_version"])


def test_one_that_cannot_be_used_stops_no_other_and_the_first_failure_gives_the_code(
    trusting: Cli, server_dsn: str
) -> None:
    dead = f"postgresql://app:{SECRET}@127.0.0.1:{unused_port()}/x"
    bad = register(trusting, "globex", "--purpose", "dead", dsn=dead)
    good = register(trusting, "globex", dsn=reachable(server_dsn))
    for arguments in ((bad["id"], good["id"]), ("--all",)):
        result = trusting("database", "verify", *arguments)
        rows = [json.loads(line) for line in result.stdout.splitlines()]
        assert [(row["id"], row["ok"]) for row in rows] == [(bad["id"], False), (good["id"], True)]
        assert (rows[0]["code"], rows[0]["host"]) == ("connection-unavailable", "127.0.0.1")
        assert result.exit_code == 4
        assert result.stderr == "1 of 2 cannot be used.\n"
        assert SECRET not in result.output
    assert "refused" in trusting.done("database", "show", bad["id"])["verification_error"]
    execute(trusting.url, f"DELETE FROM control_plane.tenant_databases WHERE id = '{bad['id']}'")
    assert trusting("database", "verify", bad["id"], good["id"]).exit_code == 7


def test_more_are_verified_than_the_pool_has_connections(trusting: Cli, server_dsn: str) -> None:
    trusting.environment |= {"CAR_CONTROL_PLANE_POOL_SIZE": "2", "CAR_CONTROL_PLANE_MAX_OVERFLOW": "0"}
    trusting.environment["CAR_CONTROL_PLANE_POOL_TIMEOUT_SECONDS"] = "0.001"  # none waits for another's connection
    for number in range(5):
        register(trusting, "globex", "--purpose", f"p{number}", dsn=reachable(server_dsn))
    table = trusting("database", "verify", "--all", "-o", "table").stdout
    head, *rows = table.splitlines()
    assert head.split()[:5] == ["ID", "OK", "PURPOSE", "HOST", "TENANT_ID"]
    assert [line.split()[1:3] for line in rows] == [["yes", f"p{number}"] for number in range(5)]


async def test_verify_does_several_at_once_and_tells_them_in_order(
    trusting: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one is slow: those after it are begun, not more than the pool has connections for, and told after it."""
    monkeypatch.setattr(databases, "PAGE_ROWS", 7)  # pages end in between
    ids = [
        (await asyncio.to_thread(register, trusting, "globex", "--purpose", f"p{number}"))["id"] for number in range(20)
    ]
    now, most, begun = 0, 0, list[str]()

    async def slow(self: object, database: uuid.UUID) -> NoReturn:
        nonlocal now, most
        del self
        now, most = now + 1, max(most, now + 1)
        begun.append(str(database))
        await asyncio.sleep(0.5 if str(database) == ids[0] else 0.02)
        now -= 1
        raise NotFoundError("gone")

    monkeypatch.setattr("car_control_plane.TenantDatabaseRepository.verify", slow)
    for settings, expected in (
        ({}, 8),
        ({"CAR_CONTROL_PLANE_POOL_SIZE": "2", "CAR_CONTROL_PLANE_MAX_OVERFLOW": "1"}, 3),
    ):
        for ahead in (databases.VERIFIED_AHEAD, 3):
            most = 0
            monkeypatch.setattr(databases, "VERIFIED_AHEAD", ahead)
            result = await asyncio.to_thread(trusting, "database", "verify", "--all", **settings)
            assert [json.loads(line)["id"] for line in result.stdout.splitlines()] == ids
            assert (result.exit_code, result.stderr) == (7, "20 of 20 cannot be used.\n")
            assert most == min(expected, ahead)


@posix
def test_ctrl_c_ends_a_verification_at_once(trusting: Cli) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        dead = f"postgresql://app:{SECRET}@127.0.0.1:{silent.getsockname()[1]}/x"
        for number in range(3):
            register(trusting, "globex", "--purpose", f"p{number}", dsn=dead)
        with started(trusting.url, "database", "verify", "--all", environment=KEYED) as process:
            silent.settimeout(clis.WAIT_SECONDS)
            silent.accept()[0].close()
            connection, _ = silent.accept()  # another is under way
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=8)  # sooner than the servers' time is up
            connection.close()
    assert (process.returncode, SECRET.encode() in output + errors) == (130, False)
    assert errors == b"Interrupted.\n"


def test_verify_of_nothing(cli: Cli) -> None:
    result = cli("database", "verify", "--all")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "No databases.\n")


# --- secrets, signals, terminals --------------------------------------------------------------------------------------


def command_lines() -> str:
    """Return what the process list shows to everybody."""
    return subprocess.run(["ps", "-eww", "-o", "args"], capture_output=True, text=True, check=True).stdout


@posix
def test_the_process_list_shows_no_secret_while_it_runs(cli: Cli) -> None:
    with started(cli.url, "database", "register", "acme", "-", stdin=subprocess.PIPE, environment=KEYED) as process:
        assert process.stdin is not None
        process.stdin.write(REMOTE.encode())
        process.stdin.flush()
        assert "database register acme -" in command_lines()
        assert SECRET not in command_lines()
        output, errors = process.communicate(timeout=clis.WAIT_SECONDS)
    assert (process.returncode, errors) == (0, b"")
    assert SECRET.encode() not in output
    with subprocess.Popen(
        ["sleep", "60", SECRET], stderr=subprocess.DEVNULL
    ) as shown:  # so that the look could find one
        try:
            clis.until(lambda: SECRET in command_lines() or shown.poll() is not None)
        finally:
            shown.kill()


@posix
def test_the_prompt_shows_nothing_of_what_is_typed(cli: Cli) -> None:
    terminal = Terminal(cli.url, "database", "register", "acme", environment=KEYED)
    terminal.read_until("Connection string:")
    terminal.wait_until_hidden()
    terminal.type(f"{REMOTE}\n")
    assert terminal.end() == 0, terminal.text
    assert "acme/primary is registered as" in plain(terminal.text)
    assert SECRET not in terminal.text


@posix
def test_an_empty_password_is_said_on_purpose_and_not_by_the_enter_key(cli: Cli) -> None:
    terminal = Terminal(cli.url, "database", "register", "acme", *PARTS, environment=KEYED)
    terminal.read_until("Password:")
    terminal.wait_until_hidden()
    terminal.type("\n")
    assert terminal.end() == 2, terminal.text
    assert "--no-password" in plain(terminal.text)
    assert cli("database", "list").stdout == ""
    terminal = Terminal(cli.url, "database", "register", "acme", *PARTS, "--no-password", environment=KEYED)
    assert terminal.end() == 0, terminal.text
    key = cli.done("database", "list")["id"]
    assert cli("database", "connection-string", key, "--reveal").stdout.startswith("postgresql://u@db.example.com")


@posix
def test_nobody_is_asked_for_a_password_beside_a_whole_connection_string(cli: Cli) -> None:
    environment = {**KEYED, "TENANT_DATABASE_URL": REMOTE}
    terminal = Terminal(cli.url, "database", "register", "acme", *PARTS, environment=environment)
    assert terminal.end() == 2, terminal.text
    assert "TENANT_DATABASE_URL is set" in plain(terminal.text)
    assert "Password:" not in terminal.text


@posix
@pytest.mark.parametrize(
    ("tenant", "environment", "code"),
    [
        pytest.param("nobody", KEYED, 7, id="no such tenant"),
        pytest.param("acme", {}, 3, id="no source of keys"),
        pytest.param("acme", {"CAR_CONTROL_PLANE_ENCRYPTION_KEY_FILE": "nowhere"}, 4, id="no keys there"),
    ],
)
def test_nobody_is_asked_for_a_secret_that_could_not_be_stored(
    tenant: str, environment: dict[str, str], code: int, cli: Cli
) -> None:
    terminal = Terminal(cli.url, "database", "register", tenant, environment=environment, stdout=subprocess.PIPE)
    terminal.type("\n")  # the answer, should it ask
    assert terminal.end() == code, terminal.text
    assert "Connection string:" not in terminal.text


@posix
def test_in_a_terminal_the_variable_is_read_first(cli: Cli) -> None:
    environment = {**KEYED, "TENANT_DATABASE_URL": REMOTE}
    terminal = Terminal(cli.url, "database", "register", "acme", environment=environment)
    assert terminal.end() == 0, terminal.text
    assert "Connection string:" not in terminal.text


@posix
@pytest.mark.parametrize("typed", ["\n", "\x04"])
def test_nothing_typed_at_the_prompt_registers_nothing(typed: str, cli: Cli) -> None:
    terminal = Terminal(cli.url, "database", "register", "acme", environment=KEYED)
    terminal.read_until("Connection string:")
    terminal.wait_until_hidden()
    terminal.type(typed)
    assert terminal.end() in {1, 2}
    assert "Traceback" not in terminal.text
    assert cli("database", "list").stdout == ""


@posix
def test_ctrl_c_at_the_prompt_registers_nothing(cli: Cli) -> None:
    terminal = Terminal(cli.url, "database", "register", "acme", environment=KEYED)
    terminal.read_until("Connection string:")
    terminal.wait_until_hidden()
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 130, terminal.text
    assert plain(terminal.text).rstrip().endswith("Interrupted.")
    assert cli("database", "list").stdout == ""


@posix
def test_ctrl_c_while_waiting_for_a_pipe_registers_nothing(cli: Cli) -> None:
    with started(cli.url, "database", "register", "acme", "-", stdin=subprocess.PIPE, environment=KEYED) as process:
        assert process.stderr is not None
        clis.until(lambda: waits_for_input(process.pid))
        process.send_signal(signal.SIGINT)
        assert process.wait(clis.WAIT_SECONDS) == 130
        assert process.stderr.read() == b"Interrupted.\n"
    assert cli("database", "list").stdout == ""


def waits_for_input(pid: int) -> bool:
    """Whether a process has read its command line and waits for its standard input: it has come to the module that reads it."""
    try:
        maps = Path(f"/proc/{pid}/wchan").read_text(encoding="ascii")
    except OSError:
        time.sleep(2)  # a system that does not tell
        return True
    return "pipe" in maps


@posix
@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("n\n", 1)])
def test_delete_asks_in_a_terminal(answer: str, code: int, cli: Cli) -> None:
    key = register(cli)["id"]
    terminal = Terminal(cli.url, "database", "delete", key)
    terminal.read_until("[y/N]")
    assert f"Forget acme/primary (acme on db.example.com:6432, active, {key})" in plain(terminal.text).replace("\n", "")
    terminal.type(answer)
    assert terminal.end() == code
    assert (cli("database", "list").stdout == "") == (code == 0)


@posix
def test_verify_shows_its_progress_on_standard_error(cli: Cli) -> None:
    register(cli, "globex", dsn=f"postgresql://app:{SECRET}@127.0.0.1:{unused_port()}/x")
    terminal = Terminal(cli.url, "database", "verify", "--all", columns=100, stdout=subprocess.PIPE, environment=KEYED)
    assert terminal.process.stdout is not None
    output = terminal.process.stdout.read()
    assert terminal.end() == 4, terminal.text
    assert json.loads(output)["code"] == "connection-unavailable"
    assert "Verifying" in plain(terminal.text)


def test_a_mistake_of_ours_shows_no_secret_either(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object, **__: object) -> None:
        raise KeyError(SECRET)

    monkeypatch.setattr("car_control_plane.TenantDatabaseRepository.register", broken)
    assert SECRET not in cli.refused(1, "database", "register", "acme", "-", stdin=REMOTE)


# --- what all commands share ------------------------------------------------------------------------------------------

COMMANDS = [
    ("database", "register", "acme", "-"),
    ("database", "list"),
    ("database", "list", "--all"),
    ("database", "show", NOWHERE),
    ("database", "verify", "--all"),
    ("database", "verify", NOWHERE),
    ("database", "set-status", NOWHERE, "active"),
    ("database", "set-connection-string", NOWHERE, "-"),
    ("database", "connection-string", NOWHERE),
    ("database", "delete", NOWHERE, "--yes"),
    ("key", "status"),
    ("key", "rotate"),
]
every = pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)


@every
def test_3_without_a_database_url(arguments: tuple[str, ...]) -> None:
    nowhere = Cli(None)
    nowhere.environment |= KEYED
    told = nowhere.refused(3, *arguments, stdin=REMOTE)
    assert told.startswith("Error: DATABASE_URL environment variable is required\n")


@every
def test_4_when_the_server_is_not_reached(arguments: tuple[str, ...]) -> None:
    dead = Cli(f"postgresql://user:{SECRET}@127.0.0.1:{unused_port()}/x")
    dead.environment |= KEYED
    told = dead.refused(4, *arguments, stdin=REMOTE)
    assert "Connection refused" in told
    assert SECRET not in told


@every
def test_5_when_it_was_never_migrated(arguments: tuple[str, ...], empty_database: str) -> None:
    fresh = Cli(empty_database)
    fresh.environment |= KEYED
    assert "Hint: Run migrations: alembic upgrade head" in fresh.refused(5, *arguments, stdin=REMOTE)


def test_help_does_not_wait_for_sqlalchemy() -> None:
    code = (
        "import sys; from car_control_plane.cli import main; sys.argv = ['car-cp', sys.argv[1], sys.argv[2], '--help']; main(); "
        "sys.stderr.write(' '.join(sorted({'sqlalchemy', 'alembic', 'asyncpg', 'cryptography'} & set(sys.modules))))"
    )
    for group, command in (("database", "register"), ("key", "rotate")):
        done = subprocess.run(
            [sys.executable, "-c", code, group, command],
            env={**os.environ, "PYTHONPATH": str(clis.ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert "--help" in done.stdout
        assert done.stderr == ""
