"""`car-cp demo`: the real commands, run one after the other against a server of their own.

Nothing is staged: each line is what the command printed, and a step that does not end as it should ends the demo. The user's own settings are
put aside, so that it neither needs nor touches anything of theirs.
"""

import asyncio
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import chdir, contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

import car_control_plane as library
from car_control_plane.cli.output import READER_GONE, Format, Output
from car_control_plane.cli.program import EXIT_CODES, INTERRUPTED, UsageError, exit_code
from car_control_plane.errors import ConflictError, ControlPlaneError, DecryptionError, InvalidTransitionError

if TYPE_CHECKING:
    from car_control_plane.embedded import EmbeddedPostgres

__all__ = ["demo"]

TENANTS = "demo_tenants.csv"
SERVED = ("paper-plane", "old-mill")
"""Tenants that get a database: in development, where a server on the same machine is none to be kept away from."""

WIDTH = 100
"""Columns where there is no terminal to ask, in a file or a README."""

KEYS = "demo.keys"
"""The file of keys, beside the data if that is kept."""

_SEALED: Final = "SELECT left(connection_string_encrypted, 80) || '…' FROM control_plane.tenant_databases"
_SWAP: Final = """UPDATE control_plane.tenant_databases a SET connection_string_encrypted =
b.connection_string_encrypted FROM control_plane.tenant_databases b WHERE b.id <> a.id"""
_KIDS: Final = """SELECT split_part(connection_string_encrypted, ':', 2), version
FROM control_plane.tenant_databases ORDER BY version"""

_FOREIGN = ("CAR_CONTROL_PLANE_", "DATABASE_URL", "PG")


def demo(
    data_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the data in this directory, which must be empty.", show_default=False),
    ] = None,
) -> None:
    """Show what this is, with nothing set up.

    Runs other commands on a PostgreSQL server of its own, which it starts and stops. Leaves nothing behind, unless a directory is given.
    """
    _require_empty(data_dir)
    kept = None if data_dir is None else data_dir.absolute()
    began = time.perf_counter()
    with library.EmbeddedPostgres(kept) as server:
        stage = _Stage()
        where = "with its data in a temporary directory" if data_dir is None else f"with its data in {data_dir}"
        stage.say(f"PostgreSQL {server.server_version} started in {time.perf_counter() - began:.1f} s, {where}.")
        with _apart(server, kept):
            _play(stage, server)
    ended = f"Done in {time.perf_counter() - began:.1f} s. The server is stopped"
    if data_dir is None:
        stage.say(f"{ended} and its data is gone; car-cp demo --data-dir DIR keeps it.")
    else:
        stage.say(f"{ended}; its data stays in {data_dir}. Go on with:\n{_go_on(data_dir)}")


def _require_empty(data_dir: Path | None) -> None:
    if data_dir is not None and data_dir.exists() and any(data_dir.iterdir()):
        raise UsageError(f"{data_dir} is not empty; if it is a demo's, go on with: {_go_on(data_dir)}")


def _play(stage: "_Stage", server: "EmbeddedPostgres") -> None:
    stage.run("db", "upgrade")
    stage.run("health")

    stage.title("Tenants come one by one, or from a file of any length: all of it, or nothing.")
    stage.run("tenant", "import", TENANTS)

    stage.title("A tenant has a life cycle. What is not in it is refused, by the database too.")
    tenant = "harbor-freight"
    stage.run("tenant", "suspend", tenant, ends=EXIT_CODES[InvalidTransitionError])
    stage.run("tenant", "activate", tenant)
    stage.run("tenant", "suspend", tenant, "--reason", "invoice 1042 unpaid")

    version = asyncio.run(_version(tenant))
    stage.title(f"Two people have read version {version}. The second one does not overwrite the first.")
    stage.run("tenant", "activate", tenant, "--expected-version", str(version))
    stage.run("tenant", "rename", tenant, "harbor", "--expected-version", str(version), ends=EXIT_CODES[ConflictError])

    _play_sealing(stage, server)

    stage.title("Configuration is any JSON value by key.")
    stage.run("config", "set", "billing.grace_days", "14")
    stage.run("config", "get", "billing.grace_days")

    stage.title("Lists come in pages, each as fast as the first.")
    stage.run("tenant", "list", "--status", "active", "--limit", "4")
    stage.gap()


def _play_sealing(stage: "_Stage", server: "EmbeddedPostgres") -> None:
    stage.title("Connection strings are stored sealed. That takes a key: in a file, in AWS KMS, in Vault, ...")
    stage.run("key", "generate", "--file", KEYS)
    stage.export("CAR_CONTROL_PLANE_ENCRYPTION_KEY_FILE", KEYS)

    stage.title("They come in by the environment, a pipe or a prompt. As an argument they are refused.")
    stage.export("CAR_CONTROL_PLANE_TENANT_CONNECTIONS_ALLOW", "sockets")
    for tenant in SERVED:
        name = tenant.replace("-", "_")
        server.create_database(name)
        os.environ["URL"] = _with_password(server.dsn(name))
        stage.run("database", "register", tenant, "--from-env", "URL")
    database = asyncio.run(_database(SERVED[0]))
    stage.run("database", "verify", database)

    stage.title("Whoever reads the table sees this. Each is sealed for its row: swapped, it does not open.")
    stage.sql(_SEALED)
    stage.sql(_SWAP)
    stage.run("database", "connection-string", database, ends=exit_code(DecryptionError))
    stage.sql(_SWAP)

    stage.title("Swapped back, all is well. A new key seals them anew, while all runs: no version changes.")
    stage.sql(_KIDS)
    stage.run("key", "generate", "--file", KEYS)
    stage.run("key", "promote", asyncio.run(_pending()))
    stage.run("key", "rotate")
    stage.sql(_KIDS)
    stage.run("database", "connection-string", database)


def _with_password(dsn: str) -> str:
    """Give a connection string a password, for there to be something to hide; over a socket the server asks for none."""
    return re.sub(r"^(postgresql://\w+)@", r"\1:s3cret@", dsn)


async def _database(tenant: str) -> str:
    """Return the id of a tenant's database."""
    async with library.AsyncConnectionManager() as manager, manager.get_read_session() as session:
        owner = await library.TenantRepository(session).get_by_name(tenant)
        return str((await library.TenantDatabaseRepository(session).list_for_tenant(owner.tenant_id))[0].id)


async def _pending() -> str:
    return next(info.kid for info in await library.FileKeys(KEYS).list() if info.state is library.KeyState.PENDING)


async def _version(tenant: str) -> int:
    async with library.AsyncConnectionManager() as manager, manager.get_read_session() as session:
        return (await library.TenantRepository(session).get_by_name(tenant)).version


class _Stage:
    """Prints what is about to run, and runs it."""

    def __init__(self) -> None:
        self._out = Output(Format.TABLE)

    def say(self, text: str) -> None:
        self._out.line((text, ""))
        self._out.flush()

    def gap(self) -> None:
        self._out.line()

    def title(self, text: str) -> None:
        self.gap()
        self._out.line((f"# {text}", "dim"))

    def export(self, name: str, value: str) -> None:
        """Set a variable of the environment."""
        self._out.line(("$ ", "dim"), (f"export {name}={shlex.quote(value)}", "bold"))
        os.environ[name] = value

    def sql(self, statement: str) -> None:
        """Run a statement past the library, as psql would, and print what it gives."""
        for number, line in enumerate(statement.splitlines()):
            self._out.line(("     " if number else "sql> ", "dim"), (line, "bold"))
        for line in asyncio.run(_answer(statement)):
            self._out.line((line, ""))

    def run(self, *arguments: str, ends: int = 0) -> None:
        """Run a command as if it had been typed.

        Raises:
            ControlPlaneError: It did not end with the exit code it should.
            SystemExit: It was interrupted, or nobody reads any more.
        """
        from car_control_plane.cli.root import app  # noqa: PLC0415 -- which has this command in it

        typed = shlex.join(["car-cp", *arguments])
        self._out.line(("$ ", "dim"), (typed, "bold"))
        self._out.flush()
        try:
            # What the user would see in one terminal: tables, and the errors among them.
            with redirect_stderr(sys.stdout):
                app(["--output", Format.TABLE, *arguments], prog_name="car-cp")
        except SystemExit as end:
            if end.code in {INTERRUPTED, READER_GONE}:
                raise
            if end.code != ends:
                error = ControlPlaneError(f"the demo went wrong: {typed} ended with {end.code}, not {ends}")
                raise error from None


async def _answer(statement: str) -> list[str]:
    async with library.AsyncConnectionManager() as manager:
        connection = await manager.connect()
        try:
            prepared = await connection.prepare(statement)
            rows = await prepared.fetch()
            return [" | ".join(map(str, row)) for row in rows] or [prepared.get_statusmsg()]
        finally:
            await connection.close()


@contextmanager
def _apart(server: "EmbeddedPostgres", kept: Path | None) -> Iterator[None]:
    """Let commands find the server, a directory to work in with the file, and nothing of the user's settings."""
    from car_control_plane.connection import DATABASE_NAME  # noqa: PLC0415 -- imports SQLAlchemy

    server.create_database(DATABASE_NAME)
    before = dict(os.environ)
    for name in before:
        if name.upper().startswith(_FOREIGN):
            del os.environ[name]
    os.environ["DATABASE_URL"] = server.dsn(DATABASE_NAME)
    if not sys.stdout.isatty():
        os.environ["COLUMNS"] = str(WIDTH)
    try:
        with tempfile.TemporaryDirectory(prefix="car-cp-demo-") as work, chdir(work):
            for file in Path(__file__).parents[1].glob("demo_*.csv"):
                shutil.copy(file, work)
            yield
            if kept is not None:
                shutil.copy(KEYS, kept / KEYS)
    finally:
        os.environ.clear()
        os.environ.update(before)


def _go_on(data_dir: Path) -> str:
    settings = {"DATABASE_URL": f"embedded:{data_dir}", "CAR_CONTROL_PLANE_ENCRYPTION_KEY_FILE": str(data_dir / KEYS)}
    if os.name == "nt":
        return " ".join([*(f'$env:{name}="{value}";' for name, value in settings.items()), "car-cp tenant list"])
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in settings.items()), "car-cp database list"])
