"""`car-cp database`: which database serves a tenant, and the sealed way in.

A connection string comes from standard input, a prompt that does not show it, or a variable of the environment. As an argument it is refused, in
words that do not repeat it, wherever it stands.
"""

import asyncio
import getpass
import os
import re
import sys
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable
from contextlib import aclosing, asynccontextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar
from uuid import UUID

import typer
from typer.core import TyperGroup

import car_control_plane as library
from car_control_plane.cli.output import Column, visible
from car_control_plane.cli.program import Cli, UsageError, command, exit_code, interruptible
from car_control_plane.cli.tenants import Which, find
from car_control_plane.errors import ControlPlaneError, NotFoundError, StaleWriteError

if TYPE_CHECKING:
    from pydantic import SecretStr
    from sqlmodel.ext.asyncio.session import AsyncSession

__all__ = ["databases"]

T = TypeVar("T")

VARIABLE: Final = "TENANT_DATABASE_URL"

LONGEST_INPUT: Final = 64 * 1024
"""Bytes read of standard input; a connection string has some hundred."""

_NAME = re.compile("[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(r"://|\b(ssl)?password\s*=", re.IGNORECASE)
_NO_ARGUMENT = (
    "a connection string is no argument: process lists and the shell's history would keep it. Pipe it in with -, set "
    f"{VARIABLE}, or leave it out to be asked for it; change the password of the one that was typed"
)
_AMBIGUOUS = (
    f"{VARIABLE} is set, and --host names another way in: leave out --host, or unset the variable; a password that is "
    "piped in with - is read whatever it holds"
)
_LINE_BREAK = re.compile(r"[\r\n]")


class _Guarded(TyperGroup):
    """Refuses connection strings among the arguments before anything could repeat them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if any(_SECRET.search(each) for each in args):
            raise UsageError(_NO_ARGUMENT)
        return super().parse_args(ctx, args)


databases = typer.Typer(
    name="database",
    cls=_Guarded,
    help="Register the databases of tenants, check them, and find the way in.",
    no_args_is_help=True,
)

COLUMNS = (
    Column("tenant", widest=40),
    Column("purpose"),
    Column("status"),
    Column("id"),
    Column("host", optional=True, widest=60),
    Column("database_name", optional=True, widest=40),
    Column("port", optional=True),
    Column("verified_at", optional=True),
    Column("kid", optional=True),
    Column("version", optional=True),
)

VERIFIED = (
    Column("id"),
    Column("ok"),
    Column("purpose", optional=True),
    Column("host", optional=True, widest=60),
    Column("tenant_id", optional=True),
    Column("database_name", optional=True, widest=40),
    Column("server_version", optional=True),
    Column("tls_version", optional=True),
    Column("message"),
)

NAMES_AT_ONCE: Final = 500
"""Rows whose tenants are looked up together."""

PAGE_ROWS: Final = 500
"""Databases whose ids are looked up together to be verified."""

VERIFIED_AT_ONCE: Final = 8
"""Databases that are verified at the same time, if the pool has so many connections."""

VERIFIED_AHEAD: Final = 200
"""Databases that are begun or done while one before them still waits for its server."""


# As in tenants: the library's enum comes with the models. A test compares them.
class Status(StrEnum):
    """Whether a tenant database may be used."""

    ACTIVE = "active"
    INACTIVE = "inactive"
    MIGRATING = "migrating"
    ERROR = "error"


Key = Annotated[UUID, typer.Argument(metavar="ID", help="The database's id.", show_default=False)]
ExpectedVersion = Annotated[
    int | None,
    typer.Option(metavar="VERSION", help="Change it only if it is still at this version.", min=0, show_default=False),
]
Source = Annotated[
    str | None,
    typer.Argument(metavar="-", help="Read the connection string from standard input.", show_default=False),
]
FromEnv = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=f"Read it from this variable of the environment; {VARIABLE} needs no naming.",
        show_default=False,
    ),
]
Host = Annotated[
    str | None,
    typer.Option(metavar="HOST", help="Name its parts instead, and give only the password.", show_default=False),
]
Port = Annotated[
    int | None,
    typer.Option(metavar="PORT", help="With --host; 5432 if none.", min=1, max=65535, show_default=False),
]
DatabaseName = Annotated[str | None, typer.Option(metavar="NAME", help="With --host.", show_default=False)]
User = Annotated[str | None, typer.Option(metavar="NAME", help="With --host.", show_default=False)]
NoPassword = Annotated[
    bool, typer.Option("--no-password", help="With --host, for a server that asks for none; nothing is read.")
]


# --- commands ---------------------------------------------------------------------------------------------------------


@command(databases)
async def register(
    cli: Cli,
    *,
    tenant: Which,
    source: Source = None,
    purpose: Annotated[str, typer.Option(metavar="PURPOSE", help="What the tenant uses it for.")] = "primary",
    from_env: FromEnv = None,
    host: Host = None,
    port: Port = None,
    database: DatabaseName = None,
    user: User = None,
    no_password: NoPassword = False,
) -> None:
    """Register a database of a tenant.

    Its connection string is what is piped in, else what TENANT_DATABASE_URL holds, else what is typed at a prompt that does not show it. With
    --host only the password is read, in the same way, but not from that variable. It is stored sealed. Nothing is connected: see verify.
    """
    read = _secret(source, from_env, _parts(host, port, database, user), no_password=no_password)
    async with _opened(cli) as (manager, keyring):
        await keyring.open()  # whatever would refuse the secret refuses before it is asked for
        async with manager.get_read_session() as session:
            owner = await find(session, tenant)
        new = _checked(library.TenantDatabaseCreate, connection_string=read(), purpose=purpose)
        async with manager.get_session() as session:
            row = await _repository(manager, session, keyring).register(owner.tenant_id, new)
    cli.out.result(
        _record(row, owner.name), f"{_called(row, owner.name)} is registered as {row.id}, version {row.version}."
    )


@command(databases, "list")
async def list_(
    cli: Cli,
    *,
    tenant: Annotated[
        str | None, typer.Option(metavar="TENANT", help="Those of this tenant, by id or name.", show_default=False)
    ] = None,
    status: Annotated[
        list[Status] | None, typer.Option(help="Those with this status; may be repeated.", show_default=False)
    ] = None,
    purpose: Annotated[
        str | None, typer.Option(metavar="PURPOSE", help="Those for this purpose.", show_default=False)
    ] = None,
    kid: Annotated[
        str | None, typer.Option(metavar="KID", help="Those whose way in this key has sealed.", show_default=False)
    ] = None,
    host: Annotated[str | None, typer.Option(metavar="HOST", help="Those on this host.", show_default=False)] = None,
    limit: Annotated[int, typer.Option(metavar="ROWS", help="Rows of the page.", min=1, max=500)] = 50,
    after: Annotated[
        str | None, typer.Option(metavar="CURSOR", help="Where the page before ended.", show_default=False)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them instead of a page.")] = False,
) -> None:
    """List tenant databases, oldest first."""
    if everything and after is not None:
        raise UsageError("--all and --after exclude each other")
    async with cli.read_session() as session:
        owner = None if tenant is None else (await find(session, tenant)).tenant_id
        which: Any = {"tenant_id": owner, "status": status, "purpose": purpose, "kid": kid, "host": host}
        repository = library.TenantDatabaseRepository(session, None)
        with cli.out.rows(COLUMNS, nothing="No databases.") as rows:
            if everything:
                async for record in _records(session, repository.stream(**which)):
                    rows.add(record)
                return
            page = await repository.list(limit=limit, after=after, **which)
            async for record in _records(session, _each(page)):
                rows.add(record)
    if page.next_cursor is not None:
        cli.out.note(f"There are more: --after {page.next_cursor}, or --all.")


@command(databases)
async def show(cli: Cli, database: Key) -> None:
    """Show a tenant database."""
    async with cli.read_session() as session:
        row = await library.TenantDatabaseRepository(session, None).get(database)
        name = await _name(session, row)
    cli.out.record(_record(row, name))


@command(databases)
async def verify(
    cli: Cli,
    which: Annotated[list[UUID] | None, typer.Argument(metavar="ID", help="Their ids.", show_default=False)] = None,
    everything: Annotated[bool, typer.Option("--all", help="All there are.")] = False,
) -> None:
    """Connect to databases, and record what was found.

    Several at once, but told in the order of their ids as typed, with --all oldest first. One that cannot be used stops no other. Exits with the
    code of the first failure.
    """
    _require_either(which, everything=everything)
    failed, first = 0, 0
    async with _opened(cli) as (manager, keyring):
        at_once = min(VERIFIED_AT_ONCE, manager.settings.pool_size + manager.settings.max_overflow)
        slots = asyncio.Semaphore(at_once)  # each holds a connection meanwhile
        wanted = list(dict.fromkeys(which or ()))
        total = len(wanted)
        if everything:
            async with manager.get_read_session() as session:
                total = await library.TenantDatabaseRepository(session, None).count()
        ids = _all_ids(manager, slots) if everything else _each(wanted)
        with (
            cli.out.rows(VERIFIED, nothing="No databases.") as rows,
            cli.out.progress("Verifying", "databases") as progress,
        ):
            done = 0
            progress(done, total)
            async with aclosing(_in_order(ids, lambda database: _verified(manager, keyring, slots, database))) as found:
                async for record, failure in found:
                    done += 1
                    progress(done, max(done, total))
                    rows.add(record)
                    if failure is not None:
                        failed, first = failed + 1, first or exit_code(type(failure))
    if failed:
        cli.out.note(f"{failed:,} of {done:,} cannot be used.")
    _end(first)


def _end(code: int) -> None:
    if code:
        raise typer.Exit(code)


def _require_either(which: list[UUID] | None, *, everything: bool) -> None:
    if everything == bool(which):
        raise UsageError("say either which, by their ids, or --all")


async def _all_ids(manager: "library.AsyncConnectionManager", slots: asyncio.Semaphore) -> AsyncIterator[UUID]:
    """Give the id of every database, oldest first; no transaction stays open between the pages."""
    after: str | None = None
    while True:
        async with slots, manager.get_read_session() as session:
            page = await library.TenantDatabaseRepository(session, None).list(limit=PAGE_ROWS, after=after)
            ids, after = [row.id for row in page], page.next_cursor
        for database in ids:
            yield database
        if after is None:
            return


async def _in_order(ids: AsyncIterator[UUID], visit: Callable[[UUID], Coroutine[Any, Any, T]]) -> AsyncGenerator[T]:
    """Visit at the same time, and give what was found in the order of the ids, in memory that does not grow."""
    begun: deque[asyncio.Task[T]] = deque()
    try:
        async for database in ids:
            begun.append(asyncio.create_task(visit(database)))
            while len(begun) >= VERIFIED_AHEAD or (begun and begun[0].done()):
                yield await begun[0]
                begun.popleft()
        while begun:
            yield await begun[0]
            begun.popleft()
    finally:  # interrupted, or the reader is gone: what is under way ends, too
        for task in begun:
            task.cancel()
        await asyncio.gather(*begun, return_exceptions=True)


async def _verified(
    manager: "library.AsyncConnectionManager", keyring: "library.Keyring", slots: asyncio.Semaphore, database: UUID
) -> tuple[dict[str, Any], ControlPlaneError | None]:
    found: library.DatabaseVerification | None = None
    failure: ControlPlaneError | None
    try:
        async with slots, manager.get_session() as session:
            found = await _repository(manager, session, keyring).verify(database)
        failure = found.error
    except (NotFoundError, StaleWriteError) as problem:
        failure = problem
    row = None if found is None else found.database
    where = {name: getattr(row, name, None) for name in ("tenant_id", "purpose", "host", "port", "database_name")}
    facts = {name: getattr(found, name, None) for name in ("latency_seconds", "server_version", "tls_version")}
    said = {name: getattr(failure, name, None) for name in ("code", "message", "hint")}
    return {"id": database, **where, "ok": failure is None, **facts, **said}, failure


@command(databases)
async def set_status(
    cli: Cli,
    database: Key,
    status: Annotated[Status, typer.Argument(help="What it becomes.", show_default=False)],
    expected_version: ExpectedVersion = None,
) -> None:
    """Say whether a database may be used."""
    async with cli.manager() as manager, manager.get_session() as session:
        row = await _repository(manager, session).set_status(
            database, library.TenantDatabaseStatus(status), expected_version=expected_version
        )
        name = await _name(session, row)
    cli.out.result(_record(row, name), f"{_called(row, name)} is {row.status}, version {row.version}.")


@command(databases)
async def set_connection_string(
    cli: Cli,
    *,
    database: Key,
    source: Source = None,
    from_env: FromEnv = None,
    host: Host = None,
    port: Port = None,
    name: Annotated[
        str | None, typer.Option("--database", metavar="NAME", help="With --host.", show_default=False)
    ] = None,
    user: User = None,
    no_password: NoPassword = False,
    expected_version: ExpectedVersion = None,
) -> None:
    """Replace the way in, after a change of password or a move.

    The connection string, or with --host the password, is read as for register.
    """
    read = _secret(source, from_env, _parts(host, port, name, user), no_password=no_password)
    async with _opened(cli) as (manager, keyring):
        await keyring.open()  # as in register
        async with manager.get_read_session() as session:
            owner = await _name(session, await library.TenantDatabaseRepository(session).get(database))
        secret = read()
        async with manager.get_session() as session:
            row = await _repository(manager, session, keyring).update_connection_string(
                database, secret, expected_version=expected_version
            )
    cli.out.result(_record(row, owner), f"{_called(row, owner)} has a new connection string, version {row.version}.")


@command(databases)
async def connection_string(
    cli: Cli,
    database: Key,
    reveal: Annotated[bool, typer.Option("--reveal", help="Show the password, too.")] = False,
) -> None:
    """Print the way in, its password masked unless --reveal is given.

    As a URI in one line, whatever --output says. The library logs who opened what; this program shows its log nowhere.
    """
    async with _opened(cli) as (manager, keyring), manager.get_read_session() as session:
        secret = await _repository(manager, session, keyring).connection_string(database)
    # As written by us, not as it came in: a password may hold a line break, which a shell's $(...) would not survive.
    cli.out.write(f"{secret.dsn.reveal() if reveal else secret.dsn.redacted()}\n")


@command(databases)
async def delete(
    cli: Cli,
    database: Key,
    expected_version: ExpectedVersion = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Forget a database and the way in. The database itself stays as it is. Cannot be undone."""
    async with cli.manager() as manager:
        async with manager.get_read_session() as session:
            row = await library.TenantDatabaseRepository(session, None).get(database)
            name = await _name(session, row)
        cli.confirm(
            f"Forget {_called(row, name)} ({row.database_name} on {row.host}:{row.port}, {row.status}, {row.id}), and the way in?",
            yes=yes,
        )
        # What was shown is what is deleted, or nothing is.
        version = row.version if expected_version is None else expected_version
        async with manager.get_session() as session:
            await _repository(manager, session).delete(database, expected_version=version)
    cli.out.result(_record(row, name), f"{_called(row, name)} is forgotten.")


# --- where a connection string comes from -----------------------------------------------------------------------------


def _parts(host: str | None, port: int | None, database: str | None, user: str | None) -> dict[str, Any] | None:
    """Return the parts that were named; None when none was."""
    needed = {"--host": host, "--database": database, "--user": user}
    if not any([*needed.values(), port]):
        return None
    if missing := [name for name, value in needed.items() if not value]:
        raise UsageError(f"{missing[0]} is missing: --host, --database and --user go together")
    return {"host": host, "database": database, "user": user} | ({} if port is None else {"port": port})


def _secret(
    source: str | None, from_env: str | None, parts: dict[str, Any] | None, *, no_password: bool
) -> "Callable[[], SecretStr]":
    """Check what was typed, and return what reads the connection string, or with parts the password they lack."""
    if source not in {None, "-"}:
        raise UsageError(_NO_ARGUMENT)
    if source and from_env is not None:
        raise UsageError("- and --from-env exclude each other")
    if from_env is not None and from_env not in os.environ:
        raise UsageError(f"there is no variable {from_env}" if _NAME.fullmatch(from_env) else _NO_ARGUMENT)
    if no_password and parts is None:
        raise UsageError("--no-password goes with --host, --database and --user")
    if no_password and (source or from_env is not None):
        raise UsageError(f"--no-password and {'-' if source else '--from-env'} exclude each other")

    def read() -> "SecretStr":
        if parts is None:
            found = _read(source, from_env, VARIABLE, "Connection string")
            if found.get_secret_value().strip():
                return found
            hint = f"pipe it in with -, or set {VARIABLE}" if from_env is None else f"{from_env} is empty"
            raise UsageError(f"there is no connection string: {hint}")
        password = None if no_password else _password(source, from_env)
        whole: library.TenantDatabaseParts = _checked(library.TenantDatabaseParts, **parts, password=password)
        return whole.connection_string()

    return read


def _password(source: str | None, from_env: str | None) -> "SecretStr":
    """Read the password that goes with --host, and refuse what cannot be meant as one."""
    # A whole connection string beside --host: which of the two is meant? What is piped is said on purpose, and wins.
    whole = from_env is None and not source and bool(os.environ.get(VARIABLE))
    if whole and sys.stdin.isatty():
        raise UsageError(_AMBIGUOUS)
    password = _read(source, from_env, None, "Password")
    if not password.get_secret_value().strip():
        if whole:
            raise UsageError(_AMBIGUOUS)
        where = "pipe it in with -" if from_env is None else f"{from_env} is empty"
        raise UsageError(f"there is no password: {where}, or say --no-password for a server that asks for none")
    if _LINE_BREAK.search(password.get_secret_value()):
        raise UsageError("with --host only the password is read, and this has more than one line")
    if _SECRET.search(password.get_secret_value()):
        raise UsageError(
            "with --host only the password is read, and this looks like a whole connection string: leave --host out; "
            "a password that looks like one goes into a URI, percent-encoded"
        )
    return password


def _read(source: str | None, from_env: str | None, usual: str | None, what: str) -> "SecretStr":
    """Read a secret from where it was said to be; if nowhere, from a pipe, else the usual variable, else the terminal."""
    from pydantic import SecretStr  # noqa: PLC0415 -- slow to import

    if from_env is not None:
        return SecretStr(os.environ[from_env])
    if source or not sys.stdin.isatty():
        found = SecretStr(_piped())
        if source or found.get_secret_value() or usual is None:
            return found
        return SecretStr(os.environ.get(usual, ""))
    if usual is not None and usual in os.environ:
        return SecretStr(os.environ[usual])
    with interruptible():
        return SecretStr(typer.prompt(what, hide_input=True, err=True, default="", show_default=False))


def _piped() -> str:
    with interruptible():
        data = sys.stdin.buffer.read(LONGEST_INPUT + 1)
    fault = "is longer than any connection string" if len(data) > LONGEST_INPUT else ""
    if not fault:
        try:
            return data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError:
            fault = "is not UTF-8"
    del data
    raise UsageError(f"standard input {fault}")


# --- repositories and records -----------------------------------------------------------------------------------------


@asynccontextmanager
async def _opened(
    cli: Cli,
) -> AsyncGenerator[tuple["library.AsyncConnectionManager", "library.Keyring"]]:
    async with cli.manager() as manager, cli.keyring(manager) as keyring:
        yield manager, keyring


def _repository(
    manager: "library.AsyncConnectionManager",
    session: "AsyncSession | library.AsyncReadSession",
    keyring: "library.Keyring | None" = None,
) -> "library.TenantDatabaseRepository":
    policy = library.ConnectionPolicy.from_settings(manager.settings)
    return library.TenantDatabaseRepository(session, keyring, policy=policy, actor=_actor())


def _actor() -> str:
    """Return who is at work, as the log is told."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's user need not have a name
        return "car-cp"
    # It may come from a variable, which may hold anything; the log takes text alone.
    return f"car-cp:{visible(user.encode(errors='backslashreplace').decode())}"


def _record(row: "library.TenantDatabase", tenant: str) -> dict[str, Any]:
    shown = {name: getattr(row, name) for name in library.TenantDatabasePublic.model_fields}
    return {"id": shown.pop("id"), "tenant": tenant, **shown, "kid": row.connection_string_encrypted.kid}


def _called(row: "library.TenantDatabase", tenant: str) -> str:
    return f"{tenant}/{row.purpose}"


async def _name(session: "AsyncSession | library.AsyncReadSession", row: "library.TenantDatabase") -> str:
    return (await library.TenantRepository(session).get(row.tenant_id)).name


async def _records(
    session: "AsyncSession | library.AsyncReadSession", rows: "AsyncIterable[library.TenantDatabase]"
) -> AsyncIterator[dict[str, Any]]:
    """Name each row's tenant, many at a time."""
    tenants = library.TenantRepository(session)
    kept: list[library.TenantDatabase] = []

    async def named() -> list[dict[str, Any]]:
        owners = await tenants.get_many({row.tenant_id for row in kept})
        records = [_record(row, owners[row.tenant_id].name) for row in kept]
        kept.clear()
        return records

    async for row in rows:
        kept.append(row)
        if len(kept) == NAMES_AT_ONCE:
            for record in await named():
                yield record
    for record in await named():
        yield record


async def _each(some: Iterable[T]) -> AsyncIterator[T]:
    for one in some:
        yield one


def _checked(kind: Any, **given: Any) -> Any:
    from car_control_plane.repositories.base import validated  # noqa: PLC0415 -- imports the models

    return validated(kind, given)
