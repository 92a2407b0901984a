"""`car-cp key` as its users meet it: from the first key to the last row that leaves it, wherever keys are kept."""

import asyncio
import base64
import errno
import json
import os
import re
import signal
import stat
import subprocess
import uuid
from pathlib import Path
from typing import Any, get_args

import asyncpg
import pytest
import typer

from car_control_plane import Key, dsn as dsns, uuid7
from car_control_plane.cli import app
from car_control_plane.cli.keys import FAILED, Wrapper
from car_control_plane.encryption.envelope import connection_string_context, seal
from car_control_plane.settings import ControlPlaneSettings
from tests.fixtures import cli as clis
from tests.fixtures.cli import Cli, Terminal, execute, plain, posix, start, started, until

compiled_once = clis.compiled_once
nothing_set = clis.nothing_set

REMOTE = "postgresql://app:s3cret@db.example.com:6432/acme?sslmode=verify-full"
KID = r"k\d{8}-[a-z0-9]{4}"


def line(kid: str, number: int) -> str:
    """Write a key as a file or a variable has it."""
    return f"{kid}:{base64.b64encode(bytes(range(number, number + 32))).decode()}"


@pytest.fixture
def cli(shared_manager: object, shared_database: str) -> Cli:
    """The command line on a migrated database with a tenant; what it writes there is deleted afterwards."""
    del shared_manager  # does the deleting
    cli = Cli(shared_database)
    cli.done("tenant", "create", "acme", "--environment", "production")
    return cli


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a file of keys may be made."""
    return tmp_path / "keys"


@pytest.fixture
def filed(cli: Cli, path: Path) -> Cli:
    """The command line with the first key, `k1`, in a file."""
    cli.done("key", "generate", "--file", str(path), "--kid", "k1")
    cli.environment["CAR_CONTROL_PLANE_ENCRYPTION_KEY_FILE"] = str(path)
    return cli


@pytest.fixture
def wrapped(cli: Cli, tmp_path: Path) -> Cli:
    """The command line with keys in the database, none so far, and an outer key in a file."""
    outer = tmp_path / "outer"
    cli.done("key", "generate", "--file", str(outer), "--kid", "outer-1")
    cli.environment["CAR_CONTROL_PLANE_ENCRYPTION_KEY_WRAPPER"] = "local"
    cli.environment["CAR_CONTROL_PLANE_ENCRYPTION_OUTER_KEY_FILE"] = str(outer)
    return cli


def register(cli: Cli, count: int = 1, dsn: str = REMOTE) -> list[Any]:
    return [
        cli.done("database", "register", "acme", "-", "--purpose", f"p{number}", stdin=dsn) for number in range(count)
    ]


def statuses(cli: Cli) -> dict[str, tuple[str | None, str | None, int]]:
    """Return state, check and rows of each key."""
    rows = [json.loads(each) for each in cli("key", "status").stdout.splitlines()]
    return {row["kid"]: (row["state"], row["check"], row["rows"]) for row in rows}


# --- making keys ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["auto", "table", "json", "tsv"])
def test_generate_prints_one_line_that_works_as_it_is(form: str, cli: Cli) -> None:
    result = Cli(None)("key", "generate", "-o", form)  # needs no database
    assert re.fullmatch(rf"{KID}:[A-Za-z0-9+/]{{43}}=\n", result.stdout)
    assert "CAR_CONTROL_PLANE_ENCRYPTION_KEYS" in result.stderr
    assert result.stdout.split(":")[1].strip() not in result.stderr
    cli.environment["CAR_CONTROL_PLANE_ENCRYPTION_KEYS"] = result.stdout
    assert register(cli)[0]["kid"] == result.stdout.split(":")[0]


def test_keys_differ_and_are_named_as_wanted() -> None:
    made = {Cli(None)("key", "generate", "--kid", "mine").stdout for _ in range(3)}
    assert len(made) == 3
    assert {text.split(":")[0] for text in made} == {"mine"}


@pytest.mark.parametrize("kid", ["", "A", "a_b", "a:b", "x" * 33, "é", "k1\n"])
def test_2_for_a_name_no_key_can_have(kid: str, path: Path) -> None:
    assert "1 to 32 of a-z, 0-9 and -" in Cli(None).refused(2, "key", "generate", "--kid", kid)
    Cli(None).refused(2, "key", "generate", "--kid", kid, "--file", str(path))
    assert not path.exists()


def test_a_file_is_made_for_its_owner_alone_and_extended(path: Path) -> None:
    old = os.umask(0)
    try:
        first = Cli(None)("key", "generate", "--file", str(path))
    finally:
        os.umask(old)
    made = json.loads(first.stdout)
    assert (made["state"], made["file"], first.stderr) == ("current", str(path), "")
    assert os.name == "nt" or stat.S_IMODE(path.stat().st_mode) == 0o600
    second = Cli(None)("key", "generate", "--file", str(path), "--kid", "k2")
    assert json.loads(second.stdout)["state"] == "pending"
    assert second.stderr == "Once every process has it: car-cp key promote k2\n"
    text = path.read_text(encoding="utf-8")
    assert re.fullmatch(rf"{made['kid']}:[^:\n]{{44}}:current\nk2:[^:\n]{{44}}:pending\n", text)
    for printed in (first.output, second.output):
        assert not [key for key in re.findall(r":([^:\n]{44}):", text) if key in printed]
    assert [*path.parent.iterdir()] == [path]


def test_a_file_that_was_written_by_hand_keeps_its_comments_and_says_its_states_afterwards(path: Path) -> None:
    path.write_text(f"# ours\n{line('b', 1)}, {line('a', 2)} # {line('c', 3)}", encoding="utf-8")
    path.chmod(0o600)
    Cli(None).done("key", "generate", "--file", str(path), "--kid", "new")
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ["# ours", f"{line('b', 1)}:current, {line('a', 2)}:retired # {line('c', 3)}"]
    assert re.fullmatch(r"new:.{44}:pending", lines[2])


def test_a_link_to_a_file_stays_a_link(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(path)
    Cli(None).done("key", "generate", "--file", str(link))
    Cli(None).done("key", "generate", "--file", str(link))
    assert link.is_symlink()
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "mode", "code", "said"),
    [
        pytest.param(line("k1", 1), 0o600, 8, "has a key 'k1' already", id="name is taken"),
        pytest.param(line("a", 1), 0o644, 3, "can be read or written by others", id="mode"),
        pytest.param("nonsense", 0o600, 3, "kid:base64", id="no keys"),
        pytest.param(f"{line('a', 1)}\n{line('a', 2)}", 0o600, 3, "twice", id="a name twice"),
        pytest.param(f"{line('a', 1)}:current\n{line('b', 2)}", 0o600, 3, "has its state", id="half stated"),
    ],
)
def test_a_file_that_is_refused_stays_as_it_was(text: str, mode: int, code: int, said: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    told = Cli(None).refused(code, "key", "generate", "--file", str(path), "--kid", "k1")
    assert said in told
    assert not [key for key in re.findall(r":([^:\n]{44})", text) if key in told]
    assert (path.read_text(encoding="utf-8"), [*path.parent.iterdir()]) == (text, [path])


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    assert "not a plain file" in Cli(None).refused(3, "key", "generate", "--file", str(tmp_path))
    for command in (("generate",), ("promote", "k1")):
        told = Cli(None).refused(3, "key", *command, "--file", str(tmp_path / "no" / "keys"))
        assert told == (
            f"Error: {tmp_path / 'no' / 'keys'} cannot be written: there is no directory {tmp_path / 'no'}\n"
            f"Hint: Make it first, for its owner alone: mkdir -m 700 {tmp_path / 'no'}\n"
        )
    (tmp_path / "file").touch()
    assert "there is no directory" in Cli(None).refused(3, "key", "generate", "--file", str(tmp_path / "file" / "keys"))


@posix
def test_a_directory_that_takes_no_file_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refusing(name: Any, *arguments: Any, **how: Any) -> int:  # root, as which tests may run, is never refused
        if str(name).endswith(".new"):
            raise PermissionError(errno.EACCES, "Permission denied", name)
        return opened(name, *arguments, **how)

    monkeypatch.setattr(os, "open", refusing)
    told = Cli(None).refused(3, "key", "generate", "--file", str(path))
    assert f"Error: {path} cannot be written: Permission denied\n" in told
    assert f"the right to make files in {path.parent}" in told
    assert ".new" not in told


def test_the_file_of_the_settings_is_where_a_key_goes(filed: Cli, path: Path) -> None:
    made = filed("key", "generate", "--kid", "k2")
    assert json.loads(made.stdout) == {"kid": "k2", "state": "pending", "file": str(path)}
    assert made.stderr == "Once every process has it: car-cp key promote k2\n"
    assert re.findall("^(k[0-9]):", path.read_text(encoding="utf-8"), re.MULTILINE) == ["k1", "k2"]
    other = path.with_name("other")
    assert filed.done("key", "generate", "--file", str(other))["file"] == str(other)


def test_two_writers_exclude_each_other(path: Path) -> None:
    other = path.with_name(".keys.new")
    other.touch()
    told = Cli(None).refused(8, "key", "generate", "--file", str(path))
    assert f"remove {other}" in told
    assert not path.exists()


def test_a_writer_leaves_the_next_one_s_file_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is done as soon as its file has its name; the second may begin before the first has ended."""
    following = path.with_name(".keys.new")
    monkeypatch.setattr("car_control_plane.cli.keyfile._settle", lambda _: following.touch())
    Cli(None).done("key", "generate", "--file", str(path))
    assert following.exists()


def test_many_writers_lose_no_key(path: Path) -> None:
    processes = [start(None, "key", "generate", "--file", str(path), "--kid", f"k{number}") for number in range(6)]
    ends = [(process.communicate(timeout=clis.WAIT_SECONDS), process.returncode) for process in processes]
    assert {code for _, code in ends} <= {0, 8}
    made = sorted(json.loads(output)["kid"] for (output, _), code in ends if code == 0)
    assert sorted(re.findall("^k[0-9]", path.read_text(encoding="utf-8"), re.MULTILINE)) == made
    assert made


# --- the life of a key, in a file -------------------------------------------------------------------------------------


def test_a_key_in_a_file_from_first_to_last(filed: Cli, path: Path) -> None:
    rows = register(filed, 3)
    assert statuses(filed) == {"k1": ("current", "ok", 3)}
    filed.done("key", "generate", "--file", str(path), "--kid", "k2")
    assert statuses(filed) == {"k1": ("current", "ok", 3), "k2": ("pending", "not on record", 0)}
    promoted = filed("key", "promote", "k2")
    assert json.loads(promoted.stdout) == {"kid": "k2", "state": "current", "file": str(path)}
    assert promoted.stderr == "To seal with it what other keys have sealed: car-cp key rotate\n"
    done = filed.done("key", "rotate")
    assert (done["kid"], done["rotated"], done["failed"], done["remaining"]) == ("k2", 3, [], 0)
    assert statuses(filed) == {"k1": ("retired", "ok", 0), "k2": ("current", "ok", 3)}
    assert filed.done("key", "rotate")["rotated"] == 0
    after = [filed.done("database", "show", row["id"]) for row in rows]
    assert after == [{**row, "kid": "k2"} for row in rows], "no version, no time of change"
    assert filed("database", "connection-string", rows[0]["id"], "--reveal").stdout == f"{REMOTE}\n"


def test_promote_in_a_file_that_is_named(path: Path) -> None:
    for kid in ("a", "b"):
        Cli(None).done("key", "generate", "--file", str(path), "--kid", kid)
    assert Cli(None).done("key", "promote", "b", "--file", str(path))["state"] == "current"
    assert re.findall(":([a-z]+)$", path.read_text(encoding="utf-8"), re.MULTILINE) == ["retired", "current"]
    before = path.stat().st_mtime_ns
    Cli(None).done("key", "promote", "b", "--file", str(path))
    assert path.stat().st_mtime_ns == before
    assert "no key 'c'" in Cli(None).refused(1, "key", "promote", "c", "--file", str(path))
    path.write_text(path.read_text(encoding="utf-8") + "gone::destroyed\n", encoding="utf-8")
    assert "no key 'gone'" in Cli(None).refused(1, "key", "promote", "gone", "--file", str(path))
    Cli(None).done("key", "promote", "a", "--file", str(path))
    assert path.read_text(encoding="utf-8").endswith("gone::destroyed\n")


@pytest.mark.parametrize("arguments", [("rewrap",), ("destroy", "k1", "--yes")], ids=" ".join)
def test_3_for_what_only_keys_in_the_database_can_do(arguments: tuple[str, ...], filed: Cli) -> None:
    told = filed.refused(3, "key", *arguments)
    assert "CAR_CONTROL_PLANE_ENCRYPTION_KEY_WRAPPER is not set" in told
    assert "Hint: " in told


def test_promote_of_keys_in_the_environment_says_where_to_do_it(cli: Cli) -> None:
    cli.environment["CAR_CONTROL_PLANE_ENCRYPTION_KEYS"] = line("a", 1)
    assert "Put the key first" in cli.refused(3, "key", "promote", "a")


# --- the life of a key, in the database -------------------------------------------------------------------------------


def test_a_key_in_the_database_from_first_to_last(wrapped: Cli) -> None:
    made = wrapped("key", "generate", "--kid", "k1")
    record = json.loads(made.stdout)
    assert (record["kid"], record["provider"], record["kek_ref"], record["state"]) == (
        "k1",
        "local",
        "outer-1",
        "current",
    )
    assert "wrapped" not in record
    register(wrapped, 2)
    assert wrapped.done("key", "generate", "--kid", "k2")["state"] == "pending"
    assert statuses(wrapped) == {"k1": ("current", "ok", 2), "k2": ("pending", "ok", 0)}
    assert "it is current" in wrapped.refused(8, "key", "destroy", "k1", "--yes")
    assert wrapped.done("key", "promote", "k2")["state"] == "current"
    assert "2 tenant databases" in wrapped.refused(8, "key", "destroy", "k1", "--yes")
    assert wrapped.done("key", "rotate")["rotated"] == 2
    assert "--yes" in wrapped.refused(2, "key", "destroy", "k1")
    assert wrapped.done("key", "destroy", "k1", "--yes") == {"kid": "k1", "state": "destroyed"}
    assert statuses(wrapped) == {"k1": ("destroyed", None, 0), "k2": ("current", "ok", 2)}
    assert wrapped.refused(8, "key", "promote", "k1")
    assert wrapped.refused(8, "key", "generate", "--kid", "k2")
    for arguments in (("promote", "nothing"), ("destroy", "nothing", "--yes")):
        assert "'nothing'" in wrapped.refused(7, "key", *arguments)


def test_rewrap_after_a_change_of_the_outer_key(wrapped: Cli, tmp_path: Path) -> None:
    wrapped.done("key", "generate", "--kid", "k1")
    row = register(wrapped)[0]
    outer = str(tmp_path / "outer")
    wrapped.done("key", "generate", "--file", outer, "--kid", "outer-2")  # --file is the file's, whatever is configured
    wrapped.done("key", "promote", "outer-2", "--file", outer)
    assert wrapped.done("key", "rewrap") == {"rewrapped": 1, "wrapper": "local"}
    assert wrapped.done("key", "rewrap", "--from", "local")["rewrapped"] == 1
    text = Path(outer).read_text(encoding="utf-8")
    Path(outer).write_text("\n".join(one for one in text.splitlines() if "outer-2" in one), encoding="utf-8")
    assert wrapped("database", "connection-string", row["id"], "--reveal").stdout == f"{REMOTE}\n"


def test_the_wrappers_are_those_of_the_setting() -> None:
    (choices, _) = get_args(ControlPlaneSettings.model_fields["encryption_key_wrapper"].annotation)
    assert [*Wrapper] == [*get_args(choices)]


def test_3_when_the_wrapper_lacks_a_setting(wrapped: Cli) -> None:
    del wrapped.environment["CAR_CONTROL_PLANE_ENCRYPTION_OUTER_KEY_FILE"]
    for arguments in (("generate",), ("status",), ("rewrap",), ("promote", "a"), ("destroy", "a", "--yes")):
        assert "OUTER_KEY_FILE" in wrapped.refused(3, "key", *arguments)


def test_4_when_the_keys_cannot_be_had(wrapped: Cli, tmp_path: Path) -> None:
    wrapped.done("key", "generate", "--kid", "k1")
    key = register(wrapped)[0]["id"]
    (tmp_path / "outer").unlink()
    assert "cannot be read" in wrapped.refused(4, "database", "connection-string", key)
    status = wrapped("key", "status")
    assert json.loads(status.stdout)["check"] == "closed"
    assert status.exit_code == 4


# --- status -----------------------------------------------------------------------------------------------------------


def test_a_wrong_key_of_the_right_name_is_told_at_once(cli: Cli) -> None:
    cli.environment["CAR_CONTROL_PLANE_ENCRYPTION_KEYS"] = line("k1", 1)
    key = register(cli)[0]["id"]
    cli.environment["CAR_CONTROL_PLANE_ENCRYPTION_KEYS"] = line("k1", 2)
    result = cli("key", "status")
    assert (result.exit_code, json.loads(result.stdout)["check"]) == (3, "differs")
    assert "is another one than the key of this id that the database knows" in result.stderr
    assert "another" in cli.refused(1, "database", "connection-string", key)
    assert "another" in cli.refused(3, "database", "register", "acme", "-", stdin=REMOTE)


def test_a_missing_key_is_told_with_what_needs_it(cli: Cli) -> None:
    cli.environment["CAR_CONTROL_PLANE_ENCRYPTION_KEYS"] = line("k1", 1)
    register(cli, 2)
    cli.environment["CAR_CONTROL_PLANE_ENCRYPTION_KEYS"] = line("k2", 2)
    result = cli("key", "status")
    assert result.exit_code == 3
    assert statuses(cli) == {"k2": ("current", "not on record", 0), "k1": (None, "missing here", 2)}
    assert "Error: 2 connection strings need the key 'k1', which is not here\n" in result.stderr
    failed = cli("key", "rotate")
    assert failed.exit_code == 1
    done = json.loads(failed.stdout)
    assert (done["rotated"], done["remaining"], {each["code"] for each in done["failed"]}) == (0, 2, {"unknown-key"})
    named = [f"{each['id']} cannot be opened: unknown-key" for each in done["failed"]]
    assert failed.stderr.splitlines() == [*named, *FAILED]
    assert "car-cp key status" in failed.stderr
    heading = re.search(r'(docs/\S+), "(.+)"', failed.stderr)
    assert heading is not None
    assert f"## {heading[2]}\n" in (clis.ROOT / heading[1]).read_text(encoding="utf-8")


def test_a_destroyed_key_that_rows_still_name_is_told_as_what_it_is(cli: Cli, path: Path) -> None:
    """Nobody can give it to this process any more."""
    cli.environment["CAR_CONTROL_PLANE_ENCRYPTION_KEYS"] = line("k1", 1)
    row, _ = register(cli, 2)
    del cli.environment["CAR_CONTROL_PLANE_ENCRYPTION_KEYS"]
    path.write_text(f"{line('k2', 2)}:current\nk1::destroyed\nk0::destroyed\n", encoding="utf-8")
    path.chmod(0o600)
    cli.environment["CAR_CONTROL_PLANE_ENCRYPTION_KEY_FILE"] = str(path)
    result = cli("key", "status")
    assert result.exit_code == 1
    assert statuses(cli) == {
        "k2": ("current", "not on record", 0),
        "k1": ("destroyed", "destroyed", 2),
        "k0": ("destroyed", None, 0),
    }
    assert "which is destroyed: they cannot be opened any more" in result.stderr
    assert "Write them anew: car-cp database set-connection-string" in result.stderr
    assert "this process" not in result.stderr
    cli.done("database", "set-connection-string", row["id"], "-", stdin=REMOTE)
    assert "1 connection string was sealed with the key 'k1'" in cli("key", "status").stderr


def test_a_value_that_is_damaged_is_counted_and_stops_no_rotation(own_database: str) -> None:
    cli = Cli(own_database)
    cli.environment["CAR_CONTROL_PLANE_ENCRYPTION_KEYS"] = line("k1", 1)
    cli.done("tenant", "create", "acme", "--environment", "production")
    rows = register(cli, 3)
    execute(
        own_database,
        "ALTER TABLE control_plane.tenant_databases DROP CONSTRAINT ck_tenant_databases_sealed",
        f"UPDATE control_plane.tenant_databases SET connection_string_encrypted = 'plain' WHERE id = '{rows[0]['id']}'",
    )
    result = cli("key", "status")
    assert result.exit_code == 1
    assert "1 row of tenant databases holds no sealed connection string" in result.stderr
    cli.environment["CAR_CONTROL_PLANE_ENCRYPTION_KEYS"] = f"{line('k2', 2)},{line('k1', 1)}"
    rotated = cli("key", "rotate", "-o", "table")
    assert rotated.exit_code == 1
    assert rotated.stdout == "Sealed 2 anew with k2; 1 left with another key.\n"
    assert rotated.stderr.splitlines() == [f"{rows[0]['id']} cannot be opened: decryption", *FAILED]


def test_3_without_any_source_of_keys(cli: Cli) -> None:
    for arguments in (("status",), ("rotate",)):
        assert "car-cp key generate" in cli.refused(3, "key", *arguments)


def test_tables_and_sentences(wrapped: Cli) -> None:
    table = ("-o", "table")
    said = [
        wrapped("key", *arguments, *table).stdout
        for arguments in (
            ("generate", "--kid", "k1"),
            ("generate", "--kid", "k2"),
            ("promote", "k2"),
            ("rotate",),
            ("rewrap",),
            ("destroy", "k1", "--yes"),
        )
    ]
    assert said == [
        "k1 is in the database, wrapped by local, current.\n",
        "k2 is in the database, wrapped by local, pending.\n",
        "k2 is current.\n",
        "Sealed 0 anew with k2; none left with another key.\n",
        "2 keys wrapped anew by local.\n",
        "k1 is destroyed.\n",
    ]
    head, *rows = wrapped("key", "status", *table).stdout.splitlines()
    assert head.split() == ["KID", "STATE", "CHECK", "ROWS", "PROVIDER", "CREATED_AT"]
    assert [row.split()[:3] for row in rows] == [["k1", "destroyed", "0"], ["k2", "current", "ok"]]


@posix
@pytest.mark.parametrize("columns", [40, 120])
def test_a_narrow_terminal_gets_what_matters(columns: int, filed: Cli) -> None:
    environment = {name: value for name, value in filed.environment.items() if name.startswith("CAR_")}
    terminal = Terminal(filed.url, "key", "status", columns=columns, environment=environment)
    assert terminal.end() == 0, terminal.text
    head, row = plain(terminal.text).splitlines()
    assert head.split()[:4] == ["KID", "STATE", "CHECK", "ROWS"]
    assert ("PROVIDER" in head) == (columns == 120)
    assert len(row) <= columns


# --- signals and terminals --------------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("n\n", 1)])
def test_destroy_asks_in_a_terminal(answer: str, code: int, wrapped: Cli) -> None:
    for kid in ("k1", "k2"):
        wrapped.done("key", "generate", "--kid", kid)
    environment = {name: value for name, value in wrapped.environment.items() if name.startswith("CAR_")}
    terminal = Terminal(wrapped.url, "key", "destroy", "k2", environment=environment)
    terminal.read_until("[y/N]")
    assert "Destroy key k2 (pending)?" in plain(terminal.text)
    terminal.type(answer)
    assert terminal.end() == code
    assert (statuses(wrapped)["k2"][0] == "destroyed") == (code == 0)


ROWS = 12_000


async def fill(url: str, owner: str, key: Key) -> None:
    """Store rows that a key has sealed."""
    texts = []
    for _ in range(ROWS):
        database = uuid7()
        texts.append((database, seal(key, REMOTE, connection_string_context(uuid.UUID(owner), database))))
    parsed = dsns.parse(url)
    connection = await asyncpg.connect(parsed.for_host(parsed.hosts[0]), password=parsed.password)
    try:
        await connection.copy_records_to_table(
            "tenant_databases",
            schema_name="control_plane",
            columns=["id", "tenant_id", "connection_string_encrypted", "database_name", "host", "purpose"],
            records=[
                (database, uuid.UUID(owner), text, "acme", "db.example.com", f"p{number}")
                for number, (database, text) in enumerate(texts)
            ],
        )
    finally:
        await connection.close()


@pytest.fixture
def many(own_database: str) -> Cli:
    """The command line with many rows of a key that is no longer current."""
    cli = Cli(own_database)
    owner = cli.done("tenant", "create", "acme", "--environment", "production")["tenant_id"]
    asyncio.run(fill(own_database, owner, Key("k1", bytes(range(1, 33)))))
    cli.environment["CAR_CONTROL_PLANE_ENCRYPTION_KEYS"] = f"{line('k2', 2)},{line('k1', 1)}"
    return cli


@posix
def test_rotate_shows_its_progress_on_standard_error(many: Cli) -> None:
    environment = {"CAR_CONTROL_PLANE_ENCRYPTION_KEYS": many.environment["CAR_CONTROL_PLANE_ENCRYPTION_KEYS"] or ""}
    terminal = Terminal(many.url, "key", "rotate", columns=120, environment=environment, stdout=subprocess.PIPE)
    assert terminal.process.stdout is not None
    output = terminal.process.stdout.read()
    assert terminal.end() == 0, terminal.text
    assert json.loads(output)["rotated"] == ROWS
    assert re.search(r"Rotating .* [1-9][\d,]* of 12,000 connection strings", plain(terminal.text))


@posix
def test_a_rotation_that_is_interrupted_goes_on_where_it_was(many: Cli) -> None:
    environment = {"CAR_CONTROL_PLANE_ENCRYPTION_KEYS": many.environment["CAR_CONTROL_PLANE_ENCRYPTION_KEYS"] or ""}
    with started(many.url, "key", "rotate", "--batch-rows", "10", environment=environment) as process:
        until(lambda: statuses(many).get("k2", ("", "", 0))[2] > 0)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=clis.WAIT_SECONDS)
    assert (process.returncode, output) == (130, b"")
    said = errors.decode().splitlines()
    assert said == [
        "What is sealed anew stays so. Started again, it goes on from there: car-cp key rotate",
        "Interrupted.",
    ]
    done = statuses(many)["k2"][2]
    assert 0 < done < ROWS
    again = many.done("key", "rotate")
    assert (again["rotated"], again["remaining"]) == (ROWS - done, 0)


def test_generate_and_rotate_show_no_progress_in_a_pipe(filed: Cli) -> None:
    register(filed)
    assert filed("key", "rotate").stderr == ""


def test_no_key_is_an_argument() -> None:
    """Keys come from variables and files: nothing of them is ever an argument."""
    command = typer.main.get_command(app)
    (key,) = (each for name, each in command.commands.items() if name == "key")  # type: ignore[attr-defined]  # a group
    names = {name for each in key.commands.values() for one in each.params for name in one.opts}
    assert names == {"--kid", "--file", "--from", "--batch-rows", "--yes", "-y", "--output", "-o", "kid"}
