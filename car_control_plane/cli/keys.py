"""`car-cp key`: the keys that seal connection strings, from the first one to the last row that leaves it."""

import asyncio
import re
import secrets
import string
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

import car_control_plane as library
from car_control_plane.cli.output import Column
from car_control_plane.cli.program import Cli, UsageError, command, exit_code
from car_control_plane.errors import ConfigurationError, ControlPlaneError, DecryptionError

__all__ = ["keys"]

keys = typer.Typer(
    name="key", help="Make, look at and change the keys that seal connection strings.", no_args_is_help=True
)

COLUMNS = (
    Column("kid"),
    Column("state"),
    Column("check"),
    Column("rows"),
    Column("provider", optional=True),
    Column("created_at", optional=True),
)

SHOWN = 20
"""Rows that failed which a person is told of one by one; the result has them all."""

PRINTED = (
    "This is the key itself, kept nowhere else: what it seals is lost with it. Put it into a secret store, and from there into",
    "CAR_CONTROL_PLANE_ENCRYPTION_KEYS of every process, where the first key seals and those behind it, after commas, only open.",
    "To have it written into a file of keys instead: car-cp key generate --file PATH",
)

FAILED = (
    "Nothing of these was changed. Which keys are missing or wrong: car-cp key status",
    'What to do about them: docs/how-to/rotate-keys.md, "Rows that cannot be opened".',
)


# As in tenants: the setting's own type comes with pydantic. A test compares them.
class Wrapper(StrEnum):
    """What wraps keys that are kept in the database."""

    LOCAL = "local"
    AWS_KMS = "aws-kms"
    VAULT_TRANSIT = "vault-transit"


Kid = Annotated[str, typer.Argument(metavar="KID", help="The key's id.", show_default=False)]
KeyFile = Annotated[
    Path | None,
    typer.Option("--file", metavar="PATH", help="A file of keys instead of where keys are kept.", show_default=False),
]


@command(keys)
async def generate(
    cli: Cli,
    kid: Annotated[
        str | None,
        typer.Option(
            metavar="KID",
            help="Its id: 1 to 32 of a-z, 0-9 and -; by default k, the date and four more.",
            show_default=False,
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Write the key into this file, which is made with mode 0600 if need be; by default ENCRYPTION_KEY_FILE.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Make a key.

    With --file it is added to a file; otherwise it goes where keys are kept: into the file that ENCRYPTION_KEY_FILE names, or wrapped into the
    database if ENCRYPTION_KEY_WRAPPER is set. With neither it is printed: one line, kid:base64. Where there are keys already it is pending, which means that it opens but does not seal until it is promoted.
    """
    key = library.Key.generate(_checked(kid))
    path = file or library.load_settings().encryption_key_file
    if path is not None:
        from car_control_plane.cli import keyfile  # noqa: PLC0415 -- imports pydantic

        state = await keyfile.add(path, key)
        _made(cli, {"kid": key.kid, "state": state.value, "file": str(path)}, f"{key.kid} is in {path}, {state}.")
    elif library.load_settings().encryption_key_wrapper is not None:
        async with _kept(cli, "") as (manager, wrapper), manager.get_session() as session:
            repository = library.EncryptionKeyRepository(session)
            first = not any(str(each.state) == library.KeyState.CURRENT for each in await repository.list())
            state = library.KeyState.CURRENT if first else library.KeyState.PENDING
            stored = await repository.create(key, wrapper, state=state.value)
        _made(cli, _record(stored), f"{key.kid} is in the database, wrapped by {wrapper.name}, {state}.")
    else:
        cli.out.write(f"{key.kid}:{key.to_base64()}\n")
        for line in PRINTED:
            cli.out.note(line)


def _made(cli: Cli, record: dict[str, Any], sentence: str) -> None:
    cli.out.result(record, sentence)
    if record["state"] == library.KeyState.PENDING:
        cli.out.note(f"Once every process has it: car-cp key promote {record['kid']}")


def _checked(kid: str | None) -> str:
    from car_control_plane.encryption.values import KID  # noqa: PLC0415 -- imports pydantic

    if kid is None:
        tail = "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(4))
        return f"k{datetime.now(UTC):%Y%m%d}-{tail}"
    if not re.fullmatch(KID, kid):
        raise UsageError("a key's id is 1 to 32 of a-z, 0-9 and -")
    return kid


@command(keys)
async def status(cli: Cli) -> None:
    """List the keys, and say what is wrong with them.

    CHECK compares a key with what the database has on record of it: ok; differs, when it is another key of the same name; not on record, until it
    seals for the first time; closed, when it cannot be had; missing here, when connection strings need it; destroyed, when they need it and
    nobody has it any more. ROWS counts those it has sealed. Exits with the code of what is wrong first: 3 for a wrong or missing key, 1 for
    connection strings that are damaged, or whose key is destroyed.
    """
    async with cli.manager() as manager, cli.keyring(manager) as keyring:
        infos = {info.kid: info.state for info in await keyring.list()}
        async with manager.get_read_session() as session:
            repository = library.EncryptionKeyRepository(session)
            recorded = {row.kid: row for row in await repository.list()}
            usage = await repository.usage()
        damaged, troubles = usage.pop("", 0), list[ControlPlaneError]()
        with cli.out.rows(COLUMNS, nothing="No keys.") as rows:
            for kid in dict.fromkeys([*infos, *recorded, *usage]):
                row, count = recorded.get(kid), usage.get(kid, 0)
                state = infos.get(
                    kid, library.KeyState.DESTROYED if row and str(row.state) == library.KeyState.DESTROYED else None
                )
                check, trouble = await _compared(keyring, kid, state, row.check_value if row else None, count)
                troubles += [trouble] if trouble else []
                here = {"kid": kid, "state": state, "check": check, "rows": count}
                known = {"provider": keyring.provider.name, "created_at": None} if row is None else _record(row)
                rows.add({**here, "provider": known["provider"], "created_at": known["created_at"]})
        if library.KeyState.CURRENT not in infos.values():
            troubles.append(
                ConfigurationError("no key is current", hint="Promote one, or make one: car-cp key generate.")
            )
    if damaged:
        troubles.append(
            DecryptionError(
                f"{damaged:,} row{' of tenant databases holds' if damaged == 1 else 's of tenant databases hold'} no sealed connection string",
                hint="Write them anew: car-cp database set-connection-string.",
            )
        )
    for trouble in troubles:
        cli.out.error(trouble.message, trouble.hint)
    _end(exit_code(type(troubles[0])) if troubles else 0)


async def _compared(
    keyring: "library.Keyring", kid: str, state: "library.KeyState | None", check_value: str | None, rows: int
) -> tuple[str | None, ControlPlaneError | None]:
    """Return a word for how a key stands to its record, and what is wrong."""
    if state in {None, library.KeyState.DESTROYED}:
        if not rows:
            return None, None
        if state is not None:
            return "destroyed", DecryptionError(
                f"{rows:,} connection string{' was' if rows == 1 else 's were'} sealed with the key {kid!r}, which is destroyed: "
                f"{'it' if rows == 1 else 'they'} cannot be opened any more",
                hint=f"car-cp database list --kid {kid} names them. Write them anew: car-cp database set-connection-string.",
            )
        message = f"{rows:,} connection string{' needs' if rows == 1 else 's need'} the key {kid!r}, which is not here"
        return "missing here", ConfigurationError(message, hint="Give it to this process, behind the current one.")
    try:
        key = await keyring.get(kid)
    except ControlPlaneError as problem:
        return "closed", problem
    if check_value in {None, key.check_value}:
        return "not on record" if check_value is None else "ok", None
    message = f"the key {kid!r} is another one than the key of this id that the database knows"
    return "differs", ConfigurationError(
        message, hint="Give this process the right key; a new key needs an id of its own."
    )


@command(keys)
async def promote(cli: Cli, kid: Kid, file: KeyFile = None) -> None:
    """Make a key the one that seals; the one that did so only opens from then on.

    Do it once every process has the key, and rotate afterwards.
    """
    path = file or library.load_settings().encryption_key_file
    if path is not None:
        from car_control_plane.cli import keyfile  # noqa: PLC0415 -- imports pydantic

        await keyfile.promote(path, kid)
        record: dict[str, Any] = {"kid": kid, "state": "current", "file": str(path)}
    else:
        how = "Put the key first in CAR_CONTROL_PLANE_ENCRYPTION_KEYS, or say --file."
        async with (
            _kept(cli, how) as (manager, _),
            cli.keyring(manager) as keyring,
            manager.get_session() as session,
        ):
            record = _record(await library.EncryptionKeyRepository(session).promote(kid, keyring=keyring))
    cli.out.result(record, f"{kid} is current.")
    if file is None:
        cli.out.note("To seal with it what other keys have sealed: car-cp key rotate")


@command(keys)
async def rotate(
    cli: Cli,
    batch_rows: Annotated[
        int, typer.Option(metavar="ROWS", help="Rows of one transaction.", min=1, max=10_000)
    ] = 1_000,
) -> None:
    """Seal with the current key what other keys have sealed, while the platform runs.

    May be interrupted and started again; two at once exclude each other. What cannot be opened stays as it is: it is named, and the exit code is 1.
    """
    async with cli.manager() as manager, cli.keyring(manager) as keyring:
        with _resumable(cli), cli.out.progress("Rotating", "connection strings") as show:
            done = await library.rotate_keys(
                manager, keyring, batch_rows=batch_rows, progress=lambda now: show(now.done, now.total)
            )
    _report(cli, done)


@contextmanager
def _resumable(cli: Cli) -> Iterator[None]:
    try:
        yield
    except asyncio.CancelledError:  # Ctrl-C
        cli.out.note("What is sealed anew stays so. Started again, it goes on from there: car-cp key rotate")
        raise


def _report(cli: Cli, done: "library.RotationResult") -> None:
    failed = [{"id": database, "code": code} for database, code in done.failed]
    left = f"{done.remaining:,}" if done.remaining else "none"
    cli.out.result(
        {**asdict(done), "failed": failed},
        f"Sealed {done.rotated:,} anew with {done.kid}; {left} left with another key.",
    )
    for database, code in done.failed[:SHOWN]:
        cli.out.note(f"{database} cannot be opened: {code}")
    if done.failed_count > SHOWN:
        cli.out.note(f"... and {done.failed_count - SHOWN:,} more; -o json lists the first {len(failed):,}.")
    if done.failed_count:
        for line in FAILED:
            cli.out.note(line)
    _end(exit_code(DecryptionError) if done.failed_count else 0)


@command(keys)
async def rewrap(
    cli: Cli,
    former: Annotated[
        Wrapper | None,
        typer.Option("--from", help="What has wrapped them, when it was another service.", show_default=False),
    ] = None,
) -> None:
    """Wrap the keys in the database anew, after a change of the outer key.

    Touches no connection string.
    """
    how = "Only those have an outer key. To change keys that are kept elsewhere: car-cp key rotate."
    async with (
        _kept(cli, how) as (manager, wrapper),
        _former(manager, former) as opener,
        manager.get_session() as session,
    ):
        count = await library.EncryptionKeyRepository(session).rewrap(wrapper, former=opener)
    cli.out.result(
        {"rewrapped": count, "wrapper": wrapper.name},
        f"{count} key{'' if count == 1 else 's'} wrapped anew by {wrapper.name}.",
    )


@command(keys)
async def destroy(
    cli: Cli, kid: Kid, yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False
) -> None:
    """Destroy a key that seals no connection string any more. Cannot be undone.

    What it has sealed in backups stays closed for ever.
    """
    how = "Where keys are kept, remove it, as soon as car-cp key status shows no row of it."
    async with _kept(cli, how) as (manager, _):
        async with manager.get_read_session() as session:
            found = await library.EncryptionKeyRepository(session).get(kid)
        cli.confirm(f"Destroy key {kid} ({found.state})? What it has sealed in backups stays closed for ever.", yes=yes)
        async with manager.get_session() as session:
            await library.EncryptionKeyRepository(session).destroy(kid)
    cli.out.result({"kid": kid, "state": "destroyed"}, f"{kid} is destroyed.")


@asynccontextmanager
async def _kept(
    cli: Cli, otherwise: str
) -> AsyncGenerator[tuple["library.AsyncConnectionManager", "library.KeyWrapper"]]:
    """Give the database that keys are kept in, and the outer key that wraps them.

    Args:
        cli: The way to the database.
        otherwise: What to do where keys are kept elsewhere.

    Yields:
        Both; closed when the block ends.

    Raises:
        ConfigurationError: Keys are kept elsewhere, or the outer key is not set.
    """
    from car_control_plane.encryption.sources import wrapper_from_settings  # noqa: PLC0415 -- imports cryptography

    settings = library.load_settings()
    if settings.encryption_key_wrapper is None:
        raise ConfigurationError(
            "keys are not kept in the database here: CAR_CONTROL_PLANE_ENCRYPTION_KEY_WRAPPER is not set",
            hint=otherwise,
        )
    wrapper = wrapper_from_settings(settings)
    try:
        async with cli.manager() as manager:
            yield manager, wrapper
    finally:
        await wrapper.close()


@asynccontextmanager
async def _former(
    manager: "library.AsyncConnectionManager", name: Wrapper | None
) -> AsyncGenerator["library.KeyWrapper | None"]:
    from car_control_plane.encryption.sources import wrapper_from_settings  # noqa: PLC0415 -- as above

    if name is None:
        yield None
        return
    wrapper = wrapper_from_settings(manager.settings.model_copy(update={"encryption_key_wrapper": name.value}))
    try:
        yield wrapper
    finally:
        await wrapper.close()


def _record(key: "library.EncryptionKey") -> dict[str, Any]:
    return {name: getattr(key, name) for name in library.EncryptionKeyPublic.model_fields}


def _end(code: int) -> None:
    if code:
        raise typer.Exit(code)
