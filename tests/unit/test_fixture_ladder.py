"""The fixture ladder: a way that was asked for and fails ends the run; nobody is skipped for want of a server."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from tests.fixtures.postgres import _docker_answers, database_dsn

REPOSITORY = Path(__file__).parents[2]
NOBODY_THERE = "postgresql://postgres:hunter2@127.0.0.1:1/postgres"
TESTS = """
def test_without(): pass
def test_with(server_dsn): pass
"""


def run(tmp_path: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\n")
    inherited = {name: value for name, value in os.environ.items() if name != "TEST_DATABASE_URL"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.fixtures.postgres", "-p", "no:cacheprovider", *options],
        cwd=tmp_path,
        env={**inherited, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--pg=url"], "give --pg-url or set TEST_DATABASE_URL"),
        (["--pg=embedded", "--pg-url", NOBODY_THERE], "--pg-url contradicts --pg=embedded"),
        (["--pg=cloud"], "invalid choice"),
    ],
)
def test_options_that_make_no_sense_are_a_usage_error(tmp_path: Path, options: list[str], reason: str) -> None:
    result = run(tmp_path, *options)
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert reason in result.stderr


@pytest.mark.parametrize(
    ("options", "environment", "reason"),
    [
        (["--pg=url", "--pg-url", NOBODY_THERE], {}, "--pg=url: "),
        ([], {"TEST_DATABASE_URL": NOBODY_THERE}, "--pg=auto: "),
        (["-q"], {"TEST_DATABASE_URL": NOBODY_THERE}, "--pg=auto: "),
        (["--pg=embedded"], {"CAR_CP_PG_BIN": "/nowhere"}, "CAR_CP_PG_BIN names /nowhere"),
        (["--pg=container"], {"DOCKER_HOST": "unix:///nowhere/docker.sock"}, "--pg=container: "),
    ],
)
def test_a_way_that_fails_ends_the_run(
    tmp_path: Path, options: list[str], environment: dict[str, str], reason: str
) -> None:
    result = run(tmp_path, *options, **environment)
    output = result.stdout + result.stderr
    assert result.returncode == pytest.ExitCode.USAGE_ERROR, output
    assert reason in output
    assert "skipped" not in output
    assert "hunter2" not in output


def test_tests_that_need_no_server_start_none(tmp_path: Path) -> None:
    result = run(tmp_path, "-k", "without", TEST_DATABASE_URL=NOBODY_THERE)
    assert result.returncode == pytest.ExitCode.OK, result.stdout


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        ("postgresql://u:p%40ss@h:5433/postgres", "postgresql://u:p%40ss@h:5433/new"),
        ("postgresql://u@/postgres?host=/run/pg&port=5432", "postgresql://u@/new?host=/run/pg&port=5432"),
        ("postgres://u@h?sslmode=require", "postgresql://u@h:5432/new?sslmode=require"),
        ("host=h dbname=postgres user=u", "postgresql://u@h:5432/new"),
    ],
)
def test_an_address_leads_to_another_database_of_the_same_server(server: str, expected: str) -> None:
    assert database_dsn(server, "new") == expected


@pytest.mark.parametrize(
    ("answer", "there"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\nOK", True),
        (b"HTTP/1.1 500 Internal Server Error\r\n\r\n", False),
        (b"", False),
        (None, False),
    ],
)
@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="the engine listens on a unix socket")
def test_an_engine_that_does_not_answer_is_not_there(
    monkeypatch: pytest.MonkeyPatch, answer: bytes | None, there: bool
) -> None:
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as cleanup:
        path = str(Path(directory, "docker.sock"))
        monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
        if answer is not None:
            listener = cleanup.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(path)
            listener.listen()

            def serve() -> None:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(1024)
                    connection.sendall(answer)

            thread = threading.Thread(target=serve)
            thread.start()
            cleanup.callback(thread.join)
        assert _docker_answers() is there
