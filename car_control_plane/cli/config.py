"""`car-cp config`: the configuration of the system, JSON values by key."""

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

import car_control_plane as library
from car_control_plane.cli.output import Column, Json
from car_control_plane.cli.program import Cli, UsageError, command, interruptible

if TYPE_CHECKING:
    from pydantic import JsonValue

__all__ = ["config"]

config = typer.Typer(name="config", help="Read and change the configuration of the system.", no_args_is_help=True)

COLUMNS = (Column("key"), Column("value", widest=60), Column("version"), Column("updated_at", optional=True))

LONGEST_INPUT = 16 * 1024 * 1024
"""Characters read of standard input: a value of at most 1 MiB, however much white space stands in it."""

Key = Annotated[str, typer.Argument(metavar="KEY", help="The key: 1 to 255 characters.", show_default=False)]


@command(config)
async def get(
    cli: Cli,
    key: Key,
    entry: Annotated[
        bool, typer.Option("--entry", help="Print key, value, version and time, not the value alone.")
    ] = False,
) -> None:
    """Print the value of a key as JSON."""
    async with cli.read_session() as session:
        found = await library.SystemConfigRepository(session).get_entry(key)
    if entry:
        cli.out.record(_record(found))
    else:
        cli.out.value(found.value)


@command(config, "set")
async def set_(
    cli: Cli,
    key: Key,
    value: Annotated[
        str, typer.Argument(metavar="JSON", help="The value as JSON; - reads standard input.", show_default=False)
    ],
    string: Annotated[bool, typer.Option("--string", help="The value is a text as it stands, not JSON.")] = False,
    expected_version: Annotated[
        int | None,
        typer.Option(
            metavar="VERSION",
            help="Store it only if the key is at this version; 0 only if there is no such key.",
            min=0,
            show_default=False,
        ),
    ] = None,
) -> None:
    """Store a value."""
    text = _standard_input() if value == "-" else value
    parsed = text if string else _parsed(text)
    async with cli.session() as session:
        stored = await library.SystemConfigRepository(session).set(key, parsed, expected_version=expected_version)
    cli.out.result(_record(stored), f"{stored.key} is set, version {stored.version}.")


@command(config, "list")
async def list_(
    cli: Cli,
    prefix: Annotated[str, typer.Option(metavar="PREFIX", help="Keys that begin like this.", show_default=False)] = "",
    limit: Annotated[int, typer.Option(metavar="ROWS", help="Rows of the page.", min=1, max=500)] = 50,
    after: Annotated[
        str | None, typer.Option(metavar="CURSOR", help="Where the page before ended.", show_default=False)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them instead of a page.")] = False,
) -> None:
    """List keys and values, in the order of the keys."""
    if everything and after is not None:
        raise UsageError("--all and --after exclude each other")
    async with cli.read_session() as session:
        repository = library.SystemConfigRepository(session)
        with cli.out.rows(COLUMNS, nothing="No configuration.") as rows:
            while True:
                page = await repository.list(prefix=prefix, limit=limit, after=after)
                for entry in page:
                    rows.add(_record(entry))
                after = page.next_cursor
                if not everything or after is None:
                    break
    if after is not None:
        cli.out.note(f"There are more: --after {after}, or --all.")


@command(config)
async def unset(
    cli: Cli,
    key: Key,
    expected_version: Annotated[
        int | None,
        typer.Option(
            metavar="VERSION", help="Remove it only if it is still at this version.", min=0, show_default=False
        ),
    ] = None,
) -> None:
    """Remove a key."""
    async with cli.session() as session:
        await library.SystemConfigRepository(session).delete(key, expected_version=expected_version)
    cli.out.result({"key": key}, f"{key} is unset.")


def _record(entry: "library.SystemConfig") -> dict[str, Any]:
    return {
        "key": entry.key,
        "value": Json(entry.value),
        "updated_at": entry.updated_at,
        "version": entry.version,
    }


def _standard_input() -> str:
    with interruptible():
        data = sys.stdin.buffer.read(LONGEST_INPUT + 1)
    if len(data) > LONGEST_INPUT:
        raise UsageError("standard input is longer than any value may be")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        pass
    raise UsageError("standard input is not UTF-8")


def _parsed(text: str) -> "JsonValue":
    try:
        value: JsonValue = json.loads(text)
    except (ValueError, RecursionError):
        pass
    else:
        return value
    raise UsageError(
        "the value is no JSON (a text needs quotes, inside of the shell's: '\"text\"'); to store it as a text, say --string"
    )
