"""`car-cp tenant`: register tenants, look at them, walk them through their life cycle."""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

import car_control_plane as library
from car_control_plane.cli.output import Column
from car_control_plane.cli.program import Cli, UsageError, command
from car_control_plane.errors import AlreadyExistsError, TenantNotFoundError

if TYPE_CHECKING:
    from sqlmodel.ext.asyncio.session import AsyncSession

__all__ = ["Which", "find", "tenants"]

tenants = typer.Typer(
    name="tenant", help="Register tenants, and walk them through their life cycle.", no_args_is_help=True
)

COLUMNS = (
    Column("name"),
    Column("environment"),
    Column("status"),
    Column("tenant_id"),
    Column("version", optional=True),
    Column("created_at", optional=True),
    Column("status_reason", optional=True, widest=40),
    Column("labels", optional=True, widest=60),
)


SHOWN = 3
"""Names of tenants that were left out; JSON has them all."""


# The library's enums come with the models, and those with SQLAlchemy: too slow for --help and completion. A test compares them.
class Environment(StrEnum):
    """Where a tenant lives."""

    DEVELOPMENT = "development"
    STAGING = "staging"
    PRODUCTION = "production"


class Status(StrEnum):
    """Whether a tenant may be used."""

    ACTIVE = "active"
    INACTIVE = "inactive"
    SUSPENDED = "suspended"
    PENDING = "pending"


class OnConflict(StrEnum):
    """What to do about a name or id that is taken."""

    RAISE = "raise"
    SKIP = "skip"


Which = Annotated[str, typer.Argument(metavar="TENANT", help="The tenant's id or name.", show_default=False)]
ExpectedVersion = Annotated[
    int | None,
    typer.Option(
        metavar="VERSION", help="Change the tenant only if it is still at this version.", min=0, show_default=False
    ),
]
Reason = Annotated[str | None, typer.Option(metavar="TEXT", help="Why; kept in status_reason.", show_default=False)]
Labels = Annotated[
    list[str] | None,
    typer.Option("--label", metavar="KEY=VALUE", help="A label; may be repeated.", show_default=False),
]


@command(tenants)
async def create(
    cli: Cli,
    *,
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Its name, unlike that of any other tenant.", show_default=False)
    ],
    environment: Annotated[Environment, typer.Option(help="Where it lives.", show_default=False)],
    status: Annotated[Status, typer.Option(help="The status it starts in.")] = Status.PENDING,
    label: Labels = None,
    reason: Reason = None,
    tenant_id: Annotated[
        UUID | None,
        typer.Option("--id", metavar="UUID", help="Its id, to make a repeated call recognisable.", show_default=False),
    ] = None,
) -> None:
    """Register a tenant."""
    given: dict[str, Any] = {
        "name": name,
        "environment": environment.value,
        "status": status.value,
        "labels": _labels(label),
    }
    given |= {"status_reason": reason, **({} if tenant_id is None else {"tenant_id": tenant_id})}
    new = _checked(given)
    async with cli.session() as session:
        tenant = await library.TenantRepository(session).create(new)
    _report(cli, tenant)


@command(tenants, "import")
async def import_(
    cli: Cli,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="CSV with a line of column names, or JSON lines; - reads standard input.",
            show_default=False,
        ),
    ],
    on_conflict: Annotated[
        OnConflict,
        typer.Option(help="What to do about a name or id that is taken: stop and import nothing, or leave it out."),
    ] = OnConflict.RAISE,
    environment: Annotated[
        Environment | None, typer.Option(help="The environment of those that name none.", show_default=False)
    ] = None,
) -> None:
    """Register the tenants of a file: all of them, or none.

    Columns or keys: name, environment, status, status_reason, labels (a JSON object), tenant_id; in CSV also label.KEY for a single label. Only
    name and environment are needed. What `car-cp tenant list --all -o json` prints is read as well.
    """
    from car_control_plane.cli import records  # noqa: PLC0415 -- imports the models

    defaults = {} if environment is None else {"environment": environment.value}
    with records.open_source(file) as source:
        # The file may come slower than an open transaction may be idle.
        async with cli.manager(idle_in_transaction_timeout_seconds=0) as manager, manager.get_session() as session:
            with _own_hint():
                result = await library.TenantRepository(session).create_many(
                    records.tenants(source, defaults), on_conflict=on_conflict.value
                )
    created = f"Created {result.created:,} tenant{'' if result.created == 1 else 's'}"
    cli.out.result(asdict(result), f"{created}{_skipped(result)}.")


def _skipped(result: "library.CreateManyResult") -> str:
    if not result.skipped:
        return ""
    named = ", ".join(repr(conflict.name) for conflict in result.conflicts[:SHOWN])
    more = f" and {result.skipped - SHOWN:,} more" if result.skipped > SHOWN else ""
    return f"; skipped {named}{more}, whose name or id is taken"


@contextmanager
def _own_hint() -> Iterator[None]:
    try:
        yield
    except AlreadyExistsError as taken:
        taken.hint = "To import the others, say --on-conflict skip."
        raise


@command(tenants, "list")
async def list_(
    cli: Cli,
    *,
    status: Annotated[
        list[Status] | None, typer.Option(help="Those with this status; may be repeated.", show_default=False)
    ] = None,
    environment: Annotated[
        list[Environment] | None, typer.Option(help="Those in this environment; may be repeated.", show_default=False)
    ] = None,
    name_prefix: Annotated[
        str | None, typer.Option(metavar="PREFIX", help="Those whose name begins like this.", show_default=False)
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label", metavar="KEY=VALUE", help="Those with this label; may be repeated.", show_default=False
        ),
    ] = None,
    limit: Annotated[int, typer.Option(metavar="ROWS", help="Rows of the page.", min=1, max=500)] = 50,
    after: Annotated[
        str | None, typer.Option(metavar="CURSOR", help="Where the page before ended.", show_default=False)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them instead of a page.")] = False,
) -> None:
    """List tenants, oldest first."""
    if everything and after is not None:
        raise UsageError("--all and --after exclude each other")
    which: Any = {"status": status, "environment": environment, "name_prefix": name_prefix, "labels": _labels(label)}
    async with cli.read_session() as session:
        repository = library.TenantRepository(session)
        with cli.out.rows(COLUMNS, nothing="No tenants.") as rows:
            if everything:
                async for tenant in repository.stream(**which):
                    rows.add(_record(tenant))
                return
            page = await repository.list(limit=limit, after=after, **which)
            for tenant in page:
                rows.add(_record(tenant))
    if page.next_cursor is not None:
        cli.out.note(f"There are more: --after {page.next_cursor}, or --all.")


@command(tenants)
async def show(cli: Cli, tenant: Which) -> None:
    """Show a tenant."""
    async with cli.read_session() as session:
        found = await find(session, tenant)
    cli.out.record(_record(found))


@command(tenants)
async def rename(
    cli: Cli,
    tenant: Which,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its new name.", show_default=False)],
    expected_version: ExpectedVersion = None,
) -> None:
    """Give a tenant another name."""
    await _change(cli, tenant, lambda which, key: which.rename(key, name, expected_version=expected_version))


@command(tenants)
async def activate(cli: Cli, tenant: Which, expected_version: ExpectedVersion = None) -> None:
    """Let a pending, suspended or inactive tenant be used."""
    await _change(cli, tenant, lambda which, key: which.activate(key, expected_version=expected_version))


@command(tenants)
async def suspend(cli: Cli, tenant: Which, reason: Reason = None, expected_version: ExpectedVersion = None) -> None:
    """Stop an active tenant from being used, for now."""
    await _change(cli, tenant, lambda which, key: which.suspend(key, reason=reason, expected_version=expected_version))


@command(tenants)
async def deactivate(cli: Cli, tenant: Which, reason: Reason = None, expected_version: ExpectedVersion = None) -> None:
    """Take a pending, active or suspended tenant out of use."""
    await _change(
        cli, tenant, lambda which, key: which.deactivate(key, reason=reason, expected_version=expected_version)
    )


@command(tenants)
async def delete(
    cli: Cli,
    tenant: Which,
    expected_version: ExpectedVersion = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Forget a tenant that owns no database. Cannot be undone."""
    async with cli.manager() as manager:
        async with manager.get_read_session() as session:
            found = await find(session, tenant)
        cli.confirm(f"Delete tenant {found.name} ({found.environment}, {found.status}, {found.tenant_id})?", yes=yes)
        # What was shown is what is deleted, or nothing is.
        version = found.version if expected_version is None else expected_version
        async with manager.get_session() as session:
            await library.TenantRepository(session).delete(found.tenant_id, expected_version=version)
    cli.out.result(_record(found), f"{found.name} is deleted.")


async def _change(
    cli: Cli, tenant: str, change: "Callable[[library.TenantRepository, UUID], Awaitable[library.Tenant]]"
) -> None:
    """Change a tenant named by id or name, and report what it is now."""
    async with cli.session() as session:
        found = await find(session, tenant)
        changed = await change(library.TenantRepository(session), found.tenant_id)
    _report(cli, changed)


async def find(session: "AsyncSession | library.AsyncReadSession", which: str) -> "library.Tenant":
    """Return the tenant with this id or, as a name may look like an id, this name."""
    repository = library.TenantRepository(session)
    try:
        key = UUID(which)
    except ValueError:
        return await repository.get_by_name(which)
    if (tenant := await repository.get_or_none(key)) is not None:
        return tenant
    try:
        return await repository.get_by_name(which)
    except TenantNotFoundError as missing:
        error = TenantNotFoundError(f"there is no tenant with the id {which}", details=missing.details)
    raise error


def _record(tenant: "library.Tenant") -> dict[str, Any]:
    return {name: getattr(tenant, name) for name in library.TenantPublic.model_fields}


def _report(cli: Cli, tenant: "library.Tenant") -> None:
    reason = f" ({tenant.status_reason})" if tenant.status_reason else ""
    cli.out.result(_record(tenant), f"{tenant.name} is {tenant.status}{reason}, version {tenant.version}.")


def _labels(given: list[str] | None) -> dict[str, str]:
    labels: dict[str, str] = {}
    for text in given or ():
        key, separator, value = text.partition("=")
        if not separator or key in labels:
            raise UsageError(f"--label {text}: " + ("named twice" if separator else "write KEY=VALUE"))
        labels[key] = value
    return labels


def _checked(given: dict[str, Any]) -> "library.TenantCreate":
    from car_control_plane.repositories.base import validated  # noqa: PLC0415 -- imports the models

    return validated(library.TenantCreate, given)
