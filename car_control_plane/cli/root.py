"""The root of the command line: what stands before the commands, the two that look at the whole, and the groups below."""

import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from dotenv import dotenv_values

import car_control_plane as library
from car_control_plane.cli.config import config
from car_control_plane.cli.database import database
from car_control_plane.cli.databases import databases
from car_control_plane.cli.demo import demo
from car_control_plane.cli.keys import keys
from car_control_plane.cli.output import Format, visible
from car_control_plane.cli.program import Cli, Program, Wanted, command, exit_code
from car_control_plane.cli.tenants import tenants
from car_control_plane.errors import ConfigurationError, ControlPlaneError

if TYPE_CHECKING:
    from car_control_plane.doctor import Finding

__all__ = ["app"]

app = typer.Typer(
    name="car-cp",
    cls=Program,
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # they show local variables
    rich_markup_mode=None,  # its frames cut option names in a narrow terminal
    help="""The control plane of database-per-tenant platforms on PostgreSQL.

    DATABASE_URL says where the database is, in the environment or in a .env file; embedded:PATH runs a server of its own. Results go to standard
    output, everything else to standard error.

    To see it with nothing set up, run the demo.
    """,
)
app.command()(demo)


@app.callback()
def root(
    context: typer.Context,
    wanted: Wanted = None,
    env_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A file of settings; the environment wins over it, and it wins over .env.",
            show_default=False,
            exists=True,
            dir_okay=False,
            readable=True,
        ),
    ] = None,
    _: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=lambda asked: _version() if asked else None, is_eager=True
        ),
    ] = False,
) -> None:
    """Take what stands before the command."""
    context.obj = wanted
    if env_file is not None:
        for name, value in _variables(env_file):
            os.environ.setdefault(name, value)


def _version() -> None:
    typer.echo(f"car-control-plane {library.__version__}")
    raise typer.Exit


def _variables(env_file: Path) -> list[tuple[str, str]]:
    try:
        return [(name, value or "") for name, value in dotenv_values(env_file).items()]
    except UnicodeDecodeError:
        pass
    raise ConfigurationError(
        f"{env_file.name} is not UTF-8",
        hint="PowerShell 5 writes UTF-16 with `>`: save it as UTF-8 (Set-Content -Encoding utf8 ...).",
    )


@command(app)
async def health(cli: Cli) -> None:
    """Tell whether the control plane can be used.

    A schema ahead of the code counts as usable: so it is during a rolling deploy.
    """
    async with library.AsyncConnectionManager() as manager:
        status = await manager.health_check()
    error = status.error
    said = {} if error is None else {"code": error.code, "message": error.message, "hint": error.hint}
    cli.out.result(asdict(replace(status, error=None)) | {"error": said or None}, _sentence(status))
    if error is not None:
        raise error


def _sentence(status: "library.HealthStatus") -> str:
    if status.server_version is None:
        return "Not healthy."
    way = " through a connection pooler" if status.through_pooler else ""
    answer = f"PostgreSQL {status.server_version} answered{way} in {status.latency_seconds * 1000:.0f} ms"
    if not status.healthy:
        return f"Not healthy: {answer}, but the schema is {status.schema}."
    head = "" if status.schema == "current" else f", {status.schema} of {status.head}"
    return f"Healthy: {answer}; the schema is at {status.revision}{head}."


@command(app)
async def doctor(cli: Cli) -> None:
    """Look for what keeps a control plane from working, and say what to do.

    Exits with the code of the first failure; those after it may only be its consequences.
    """
    from car_control_plane.doctor import examine  # noqa: PLC0415 -- imports SQLAlchemy and Alembic

    findings = await examine()
    if cli.out.format is Format.TABLE:
        for finding in findings:
            _print(cli, finding)
    else:
        with cli.out.rows((), nothing="") as rows:
            for finding in findings:
                rows.add(asdict(finding))
    counts = {status: sum(finding.status == status for finding in findings) for status in _STYLES}
    cli.out.note(", ".join(f"{count} {status}" for status, count in counts.items() if count))
    _end([finding.code for finding in findings if finding.status == "fail"])


def _end(failures: list[str]) -> None:
    if failures:
        raise typer.Exit(next(exit_code(kind) for kind in _below(ControlPlaneError) if kind.code == failures[0]))


_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "skipped": "dim"}


def _print(cli: Cli, finding: "Finding") -> None:
    label = (f"{finding.status:<9}", _STYLES[finding.status])
    cli.out.line(label, (f"{finding.check:<14}", "bold"), (visible(finding.message), ""))
    if finding.hint:
        cli.out.line((f"{'':<9}{visible(finding.hint)}", "italic"))


def _below(kind: type[ControlPlaneError]) -> Iterator[type[ControlPlaneError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _below(child)


for group in (database, tenants, databases, keys, config):
    app.add_typer(group)
