"""The process between an owner and its server: it brings the server up, says where it listens, and cleans up when the owner is gone.

The idea: one process does everything in order. It makes a home, runs `initdb`, starts the server, reports on its standard output, and then blocks
on its standard input, a pipe that only the owner holds open. End-of-file means the owner is gone, however it died, and the supervisor stops the
server and removes the home. One process taking one step after the other leaves no moment at which a killed owner leaves something behind.

It runs without site-packages, so this package imports nothing but the standard library and `errors`. It does not restart a server that died, and
does not speak PostgreSQL's protocol.
"""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Never, Self

from car_control_plane.embedded.binaries import Binaries, User, environment, find, run
from car_control_plane.errors import ConfigurationError, ConnectionUnavailableError, ControlPlaneError

if sys.platform != "win32":
    import fcntl

__all__ = ["LONGEST_SECONDS", "SUPERUSER", "Endpoint", "Order", "fail", "supervise"]

SUPERUSER: Final = "postgres"

_HOME_PREFIX: Final = "car-cp-pg-"
# sun_path holds 104 bytes on macOS and 108 on Linux; the home's name and "/.s.PGSQL.5432" take 33 of them.
_LONGEST_TEMPORARY_BYTES: Final = 60
_SOCKET_PORT: Final = 5432
_LOG_NAME: Final = "server.log"
_LOG_LINES: Final = 20
_PASSWORD_NAME: Final = "car-cp-password"  # noqa: S105 -- the name of a file

_SERVED_SECONDS: Final = 30.0
_INITDB_SECONDS: Final = 120.0
_START_SECONDS: Final = 120.0  # crash recovery of kept data takes its time
_STOP_SECONDS: Final = 60.0
_QUIT_SECONDS: Final = 10.0  # the postmaster itself kills its children 5 s after SIGQUIT
_POLL_SECONDS: Final = 0.02

LONGEST_SECONDS: Final = _SERVED_SECONDS + _INITDB_SECONDS + _START_SECONDS + _STOP_SECONDS + _QUIT_SECONDS
"""A supervisor whose owner is gone has ended by then, whatever it was doing."""

_SETTINGS: Final = {"max_connections": "200", "timezone": "UTC", "log_timezone": "UTC", "lc_messages": "C"}
_VOLATILE_SETTINGS: Final = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "wal_level": "minimal",
    "max_wal_senders": "0",
}


# --- between owner and supervisor -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Order:
    """What the supervisor is to run. It travels on a command line, so it holds no secret."""

    candidates: list[str]
    data_dir: str | None
    durable: bool
    settings: dict[str, str]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What the supervisor answers: where the server listens, and whether it is another supervisor's."""

    host: str
    port: int
    password: str | None
    data_dir: str
    log: str
    bin_dir: str
    version: str
    attached: bool


def fail(message: str, log: Sequence[str] = ()) -> Never:
    """Say that the server is not to be had; the line of its log that says why joins the message.

    Raises:
        ConnectionUnavailableError: Always.
    """
    lines = [line.strip() for line in log if line.strip()][-_LOG_LINES:]
    telling = [found[0] for line in lines if (found := re.search(r"\b(FATAL|PANIC|ERROR|error): .*", line))]
    reason = " ".join("".join(telling[:1] or lines[-1:]).split())
    raise ConnectionUnavailableError(
        f"{message}: {reason}" if reason else message,
        hint="The error's details hold the lines around it, under server_log." if lines else "",
        details={"server_log": lines},
        retryable=False,
    ) from None


# --- the process ------------------------------------------------------------------------------------------------------


def supervise() -> None:
    """Be the supervisor: bring the server up, report, wait until the owner is gone, clean up."""
    signal.signal(signal.SIGTERM, _terminate)
    with ExitStack() as cleanup:
        try:
            endpoint = _bring_up(Order(**json.loads(sys.argv[1])), cleanup)
        except ControlPlaneError as error:
            _answer(
                error, message=error.message, hint=error.hint, details=dict(error.details), retryable=error.retryable
            )
        else:
            _answer(endpoint, **asdict(endpoint))
            if not endpoint.attached:
                sys.stdin.buffer.read()
            _terminate()


def _answer(kind: object, **content: Any) -> None:
    print(json.dumps([type(kind).__name__, content]), flush=True)  # noqa: T201 -- standard output is the pipe to the owner


def _terminate(*_: object) -> Never:
    """Begin the cleaning up, because the owner is gone, the server is, or the system shuts down; no signal interrupts it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform != "win32":
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    sys.exit()


def _bring_up(order: Order, cleanup: ExitStack) -> Endpoint:
    """Return a server that answers; `cleanup` learns to undo every step as it is taken."""
    kept = None if order.data_dir is None else Path(order.data_dir)
    try:
        with nullcontext() if kept is None else _exclusive(kept):
            cluster = None if kept is None else _cluster_version(kept)
            if kept is not None and (served := _served(kept)) is not None:
                return _endpoint(served, _serving(kept, str(cluster)), kept, kept, attached=True)
            user = User.for_server(kept)
            binaries = find(map(Path, order.candidates), cluster).for_user(user)
            home = Path(tempfile.mkdtemp(prefix=_HOME_PREFIX, dir=_short_temporary(user)))
            cleanup.callback(shutil.rmtree, home, ignore_errors=True)
            _hand_over(home, user)
            data_dir, log_dir = kept or home / "data", kept or home
            if cluster is None:
                data_dir.mkdir(mode=0o700, exist_ok=True)
                _hand_over(data_dir, user)
                _initialise(binaries, data_dir, home, user, durable=order.durable)
            server = _Server(binaries, data_dir, log_dir / _LOG_NAME, user)
            cleanup.callback(server.stop, clean=kept is not None)
            speed = {} if order.durable else _VOLATILE_SETTINGS
            found = server.start({**_SETTINGS, **speed, **order.settings, **_where(home)})
            server.watch()
            return _endpoint(found, binaries, data_dir, log_dir, attached=False)
    except (OSError, subprocess.SubprocessError) as error:
        fail(f"The embedded server did not start: {error}")


def _endpoint(found: "_PidFile", binaries: Binaries, data_dir: Path, log_dir: Path, *, attached: bool) -> Endpoint:
    return Endpoint(
        host=found.host,
        port=found.port,
        password=(data_dir / _PASSWORD_NAME).read_text(encoding="ascii") if sys.platform == "win32" else None,
        data_dir=str(data_dir),
        log=str(log_dir / _LOG_NAME),
        bin_dir=str(binaries.bin_dir),
        version=binaries.version,
        attached=attached,
    )


# --- directories ------------------------------------------------------------------------------------------------------


def _short_temporary(user: User | None) -> str:
    """Return a directory for the home whose sockets' paths stay short and need no quoting."""
    usual = tempfile.gettempdir()
    if sys.platform == "win32":
        return usual
    for root in (usual, "/tmp", "/var/tmp"):  # noqa: S108 -- the home in it is made by mkdtemp
        fits = len(os.fsencode(root)) <= _LONGEST_TEMPORARY_BYTES and re.fullmatch(r"[\w/.+-]+", root, re.ASCII)
        if fits and os.access(root, os.W_OK | os.X_OK) and (user is None or user.reaches(Path(root))):
            return root
    raise ConfigurationError(
        "There is no temporary directory with a short path for the embedded server's socket", hint="Set TMPDIR to one."
    )


def _hand_over(directory: Path, user: User | None) -> None:
    """Give a directory to the user the server runs as."""
    if user is None:
        return
    if not user.reaches(directory.parent):
        raise ConfigurationError(
            f"PostgreSQL refuses to run as root, and the user {user.name}, as whom it runs instead, does not reach {directory}",
            hint="Choose a directory outside private homes, or run as an ordinary user.",
        )
    os.chown(directory, user.uid, user.gid)


@contextmanager
def _exclusive(data_dir: Path) -> Iterator[None]:
    """Keep every other supervisor off a data directory, which is made when absent.

    The lock is on the directory itself: a file inside would be in initdb's way, one beside it would stay behind.
    """
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = None if sys.platform == "win32" else os.open(data_dir, os.O_RDONLY)
    except OSError as error:
        _refuse(data_dir, error)
    if descriptor is None:
        yield  # unlocked, for Windows opens no directories; postmaster.pid still guards the data
        return
    try:
        deadline = time.monotonic() + _SERVED_SECONDS + _INITDB_SECONDS + _START_SECONDS
        while not _locked(descriptor):
            if time.monotonic() > deadline:
                fail(f"Another process has been starting a server in {data_dir} for too long")
            time.sleep(_POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    if sys.platform != "win32":
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks: postmaster.pid still guards the data
            pass
    return True


def _cluster_version(data_dir: Path) -> str | None:
    """Return the major version that wrote a data directory, None for an empty one."""
    try:
        if not any(data_dir.iterdir()):
            return None
        version = (data_dir / "PG_VERSION").read_text(encoding="ascii", errors="replace").strip()
    except FileNotFoundError:
        version = ""
    except OSError as error:
        _refuse(data_dir, error)
    if not re.fullmatch(r"9\.\d|\d\d", version):
        raise ConfigurationError(
            f"The data directory {data_dir} is not empty and holds no PostgreSQL data",
            hint="Choose a new or an empty directory; nothing in this one was changed.",
        )
    return version


def _refuse(data_dir: Path, error: OSError) -> Never:
    raise ConfigurationError(
        f"The data directory {data_dir} cannot be used: {error.strerror}",
        hint="Choose a directory that you may write to.",
    ) from None


@dataclass(frozen=True, slots=True)
class _PidFile:
    """What a server says of itself in postmaster.pid (pidfile.h, unchanged since PostgreSQL 10)."""

    pid: int
    port: int
    host: str
    status: str

    @classmethod
    def read(cls, data_dir: Path) -> Self | None:
        try:
            lines = (data_dir / "postmaster.pid").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
            pid, _, _, port, socket_dir, _, _, status = [*lines[:8], *[""] * (8 - len(lines))]
            host = "127.0.0.1" if sys.platform == "win32" else socket_dir
            return cls(int(pid), int(port or 0), host, status.strip())
        except (OSError, ValueError):
            return None

    def alive(self) -> bool:
        if sys.platform == "win32":  # where os.kill has no harmless signal
            return True
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, PermissionError):  # another user's process cannot serve a directory of ours
            return False
        return True

    def answers(self) -> bool:
        on_windows = sys.platform == "win32"
        address = (self.host, self.port) if on_windows else f"{self.host}/.s.PGSQL.{self.port}"
        with socket.socket(socket.AF_INET if on_windows else socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(_SERVED_SECONDS)
            return probe.connect_ex(address) == 0


def _served(data_dir: Path) -> _PidFile | None:
    """Return the living server of a data directory; one that is just starting or stopping is waited for.

    None also when the file lies: then the new server decides, which knows more about its predecessors (shared memory) than can be known here.
    """
    deadline = time.monotonic() + _SERVED_SECONDS
    while (found := _PidFile.read(data_dir)) is not None and found.alive() and time.monotonic() < deadline:
        if found.status == "ready":
            return found if found.answers() else None
        time.sleep(_POLL_SECONDS)
    return None


def _serving(data_dir: Path, cluster: str) -> Binaries:
    """Return the binaries a living server was started from, which need not be the ones found first here."""
    command = (data_dir / "postmaster.opts").read_text(encoding="utf-8", errors="surrogateescape")
    bin_dir = Path(command.split(' "', 1)[0]).parent
    return Binaries.probe(bin_dir) or Binaries(bin_dir, cluster)


# --- the server -------------------------------------------------------------------------------------------------------


def _initialise(binaries: Binaries, data_dir: Path, home: Path, user: User | None, *, durable: bool) -> None:
    """Make a cluster; on failure initdb removes what it has written."""
    # Trust holds inside the 0700 directory only; whoever runs the kept data with other tools later does not open it to the network.
    options = ["--auth-local=trust", "--auth-host=reject"]
    password_file = home / _PASSWORD_NAME
    if sys.platform == "win32":
        password_file.write_text(secrets.token_urlsafe(24), encoding="ascii")
        options = ["--auth=scram-sha-256", f"--pwfile={password_file}"]
    options += ["--encoding=UTF8", "--no-locale", *([] if durable else ["--no-sync"])]
    command = [binaries.tool("initdb"), "-D", str(data_dir), "-U", SUPERUSER, *options]
    result = run(command, user=user, timeout=_INITDB_SECONDS)
    if result.returncode != 0:
        fail("The embedded server's data could not be initialised", result.stdout.splitlines())
    if sys.platform == "win32":
        password_file.replace(data_dir / _PASSWORD_NAME)


def _where(home: Path) -> dict[str, str]:
    """Return the settings that say where the server listens."""
    if sys.platform == "win32":
        with socket.create_server(("127.0.0.1", 0)) as free:
            return {"listen_addresses": "127.0.0.1", "port": str(free.getsockname()[1])}
    return {
        "listen_addresses": "",
        "port": str(_SOCKET_PORT),
        "unix_socket_directories": str(home),
        "unix_socket_permissions": "0700",
    }


@dataclass(slots=True)
class _Server:
    """The server as a child of the supervisor: no process id is ever guessed, no shell reads a path."""

    binaries: Binaries
    data_dir: Path
    log: Path
    user: User | None
    process: subprocess.Popen[bytes] | None = None

    def start(self, settings: Mapping[str, str]) -> _PidFile:
        """Return when the server accepts connections."""
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        # Anew and exclusively: root writes here into a directory of the server's user, who could have left a link.
        self.log.unlink(missing_ok=True)
        if sys.platform == "win32":  # pg_ctl, because it sheds the administrator's rights, which PostgreSQL refuses
            self._pg_ctl("start", "-l", str(self.log), "-o", subprocess.list2cmdline(options))
            if (found := _PidFile.read(self.data_dir)) is not None:
                return found
            fail("The embedded server did not start", self._said())
        with self.log.open("xb") as log:
            process = self.process = subprocess.Popen(
                [self.binaries.tool("postgres"), "-D", str(self.data_dir), *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(),
                user=self.user.uid if self.user else None,
                group=self.user.gid if self.user else None,
                extra_groups=[] if self.user else None,
            )
        deadline = time.monotonic() + _START_SECONDS
        while process.poll() is None:
            found = _PidFile.read(self.data_dir)
            if found is not None and found.pid == process.pid and found.status == "ready":
                return found
            if time.monotonic() > deadline:
                fail("The embedded server was not ready in time", self._said())
            time.sleep(_POLL_SECONDS)
        fail("The embedded server did not start", self._said())

    def watch(self) -> None:
        """From now on end the supervisor when the server ends: an unreaped server looks alive to the next one on its data."""
        if sys.platform != "win32":
            signal.signal(signal.SIGCHLD, self._reap)
            self._reap()

    def _reap(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is not None:
            _terminate()

    def stop(self, *, clean: bool) -> None:
        """Stop the server, if need be by force; unclean is quicker, for data that is about to be removed."""
        if sys.platform == "win32":
            self._pg_ctl("stop", "-m", "fast" if clean else "immediate")
            return
        if self.process is None:
            return
        # https://www.postgresql.org/docs/current/server-shutdown.html
        escalation = [(signal.SIGINT, _STOP_SECONDS), (signal.SIGQUIT, _QUIT_SECONDS), (signal.SIGKILL, _QUIT_SECONDS)]
        for how, seconds in escalation if clean else escalation[1:]:
            self.process.send_signal(how)
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                continue
            return

    def _pg_ctl(self, action: str, *options: str) -> None:
        """Run pg_ctl; its output is not read, because the server it starts would hold the pipe open."""
        where = ["-D", str(self.data_dir), "-w", "-t", f"{_STOP_SECONDS:.0f}"]
        subprocess.run(
            [self.binaries.tool("pg_ctl"), action, *where, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment(),
            check=False,
        )

    def _said(self) -> list[str]:
        return self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.exists() else []
