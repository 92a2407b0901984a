"""`car-cp db`: the schema of the control plane, its migrations and its state."""

import importlib
from typing import TYPE_CHECKING, Annotated, Any

import typer

import car_control_plane as library
from car_control_plane.cli.output import Column
from car_control_plane.cli.program import EXIT_CODES, Cli, UsageError, command
from car_control_plane.errors import SchemaError

if TYPE_CHECKING:
    from car_control_plane import migrations
else:

    class _Migrations:
        """The module `migrations`, imported when first used: it brings Alembic and SQLAlchemy with it, too slow for --help."""

        def __getattr__(self, name: str) -> Any:
            return getattr(importlib.import_module("car_control_plane.migrations"), name)

    migrations = _Migrations()

__all__ = ["database"]

database = typer.Typer(name="db", help="Migrate the schema, and see where it stands.", no_args_is_help=True)

REVISIONS = (Column("revision"), Column("down_revision", optional=True), Column("description"))
DRIFTS = (Column("kind"), Column("object"))


@command(database, context_settings={"ignore_unknown_options": True})  # -1 is a revision, not an option
async def upgrade(
    cli: Cli,
    revision: Annotated[
        str, typer.Argument(metavar="REVISION", help="A revision, head, or steps such as +1.")
    ] = "head",
) -> None:
    """Bring the schema up to a revision.

    Creates it where there is none. Safe to run from many places at once: one of them migrates, the others wait and find nothing left to do.
    """
    _report(cli, await migrations.upgrade(revision=_revision(revision)))


@command(database, context_settings={"ignore_unknown_options": True})
async def downgrade(
    cli: Cli,
    revision: Annotated[str, typer.Argument(metavar="REVISION", help="A revision, base, or steps such as -1.")] = "-1",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Take the schema back to a revision.

    The data of what is dropped is lost; with base, all of it.
    """
    target = _revision(revision)
    async with library.AsyncConnectionManager() as manager:
        before = await migrations.current(manager)
        if before is not None:
            cli.confirm(f"Downgrade from {before} to {target}? The data of what is dropped is lost.", yes=yes)
        _report(cli, await migrations.downgrade(manager, target))


@command(database)
async def current(cli: Cli) -> None:
    """Print the schema's revision."""
    revision, head = await migrations.current(), migrations.history()[-1].revision
    where = " (head)" if revision == head else f" (head is {head})"
    cli.out.result({"revision": revision, "head": head}, f"{revision}{where}" if revision else "Never migrated.")


@command(database)
async def history(cli: Cli) -> None:
    """List the revisions there are, oldest first.

    Needs no database.
    """
    with cli.out.rows(REVISIONS, nothing="") as rows:
        for step in migrations.history():
            rows.add(step._asdict())


@command(database)
async def check(cli: Cli) -> None:
    """Compare the database with the models.

    Looks at tables, columns, types, indexes and constraints; drift looks at everything.
    """
    differences = await migrations.check()
    text = "\n".join(differences) or "Clean: the database is as the models say."
    cli.out.result({"clean": not differences, "differences": differences}, text)
    _end(clean=not differences)


@command(database)
async def drift(cli: Cli) -> None:
    """Compare the database with what the migrations make.

    Object by object: triggers, functions and enum values too.
    """
    found = await migrations.drift()
    with cli.out.rows(DRIFTS, nothing="No drift: every object is as the migrations make it.") as rows:
        for each in found:
            rows.add({"kind": each.kind, "object": each.object, "expected": each.expected, "found": each.found})
    _end(clean=not found)


@command(database)
async def sql(
    cli: Cli,
    revision: Annotated[str, typer.Argument(metavar="REVISION", help="The revision to end at.")] = "head",
    start: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="REVISION",
            help="The revision to start from; an empty database if none.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Print an upgrade as an SQL script.

    Needs no database.
    """
    cli.out.write(migrations.render_sql(revision, from_=start))


@command(database)
async def wait(
    cli: Cli,
    seconds: Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="How long at most.", min=0)] = 60.0,
) -> None:
    """Wait until the database can be reached and is migrated.

    For a service that starts beside the one that migrates.
    """
    await migrations.wait(timeout_seconds=seconds)
    revision = migrations.history()[-1].revision
    cli.out.result({"revision": revision}, f"Ready: the schema is at {revision}.")


def _end(*, clean: bool) -> None:
    if not clean:
        raise typer.Exit(EXIT_CODES[SchemaError])


def _revision(given: str) -> str:
    if given.startswith("--"):
        raise UsageError(f"No such option: {given}")
    return given


def _report(cli: Cli, done: "migrations.MigrationResult") -> None:
    record = {"before": done.before, "after": done.after, "revisions": done.revisions}
    if done.revisions:
        steps = f"{len(done.revisions)} step{'' if len(done.revisions) == 1 else 's'}"
        text = f"{done.before or 'nothing'} → {done.after or 'nothing'}, in {steps}."
    else:
        text = f"Nothing to do: the schema is at {done.after or 'no revision'}."
    cli.out.result(record, text)
