"""Writes the reference pages that say what the code says: settings, commands, errors, schema.

`nox -s reference` writes them; with `--check` nothing is written, and a page that is not fresh is named and fails the run.
"""

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer
from pydantic_core import PydanticUndefined
from sqlalchemy import CheckConstraint, Column, ForeignKeyConstraint, Table, UniqueConstraint
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateIndex

from car_control_plane import errors
from car_control_plane.cli import app
from car_control_plane.cli.output import READER_GONE
from car_control_plane.cli.program import EXIT_CODES, INTERRUPTED
from car_control_plane.errors import ControlPlaneError
from car_control_plane.models import (
    REVISIONS,
    SCHEMA,
    ChangeLogEntry,
    EncryptionKey,
    Model,
    SystemConfig,
    Tenant,
    TenantDatabase,
)
from car_control_plane.models.base import native_enums
from car_control_plane.settings import PREFIX, ControlPlaneSettings
from car_control_plane.telemetry import ACTIVITIES, EVENTS, METRICS

REFERENCE = Path(__file__).parent / "reference"
GENERATED = "<!-- Written by docs/generate_reference.py; `nox -s reference` writes it again. -->\n"

Lines = Iterator[str]


def table(heads: list[str], rows: list[list[str]]) -> Lines:
    """Write a Markdown table."""
    yield "| " + " | ".join(heads) + " |"
    yield "| " + " | ".join("---" for _ in heads) + " |"
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"
    yield ""


# --- settings ---------------------------------------------------------------------------------------------------------


def settings() -> Lines:
    """Write the page of the settings."""
    yield "# Settings"
    yield ""
    yield f"Set `{PREFIX}<NAME>` in the environment or in a `.env` file (UTF-8) of the working directory; the environment wins."
    yield "Pass one as a keyword to `init_db()` or `AsyncConnectionManager()` and it wins over both."
    yield "Durations are seconds, sizes bytes. A bad value is a [`ConfigurationError`](errors.md#configuration) that names the setting"
    yield "and does not show the value."
    yield ""
    for name, field in ControlPlaneSettings.model_fields.items():
        variables = [f"{PREFIX}{name.upper()}"] + (["DATABASE_URL"] if name == "database_url" else [])
        default = "none" if field.default in {None, PydanticUndefined} else f"`{field.default}`"
        yield f"## {name} {{ #{name} }}"
        yield ""
        yield (field.description or "").replace("\n", " ")
        yield ""
        yield f"- Environment: {' or '.join(f'`{variable}`' for variable in variables)}"
        yield f"- Default: {default}"
        if limits := ", ".join(bound(limit) for limit in field.metadata if bound(limit)):
            yield f"- Accepted: {limits}"
        yield ""
    yield "## Not settings"
    yield ""
    yield from table(
        ["Variable", "Read by"],
        [
            ["`CAR_CP_PG_BIN`", "`embedded:`: the directory of the PostgreSQL binaries to run"],
            ["`PGHOST`, `PGPORT`, `PGUSER`, `PGPASSWORD`, `PGSSLMODE` …", "whatever the connection string leaves out"],
            ["`TEST_DATABASE_URL`", "the project's own tests"],
        ],
    )


def bound(limit: Any) -> str:
    """Say a constraint of pydantic's in words."""
    words = {"ge": "from", "gt": "more than", "le": "to", "lt": "less than"}
    said = [f"{word} {value}" for name, word in words.items() if (value := getattr(limit, name, None)) is not None]
    said += [f"text that matches `{limit.pattern}`"] if getattr(limit, "pattern", None) else []
    said += [f"at least {limit.min_length} characters"] if getattr(limit, "min_length", None) else []
    said += [f"at most {limit.max_length} characters"] if getattr(limit, "max_length", None) else []
    return ", ".join(said)


# --- errors -----------------------------------------------------------------------------------------------------------

REMEDIES = {
    "ControlPlaneError": "The base of all. Catch it where you answer your own caller: `code`, `http_status`, `hint` and `details` are what to answer with.",
    "ConfigurationError": "Correct the setting or the connection string the message names. Nothing was connected.",
    "DirectConnectionRequiredError": "Set `direct_database_url`: [Work behind PgBouncer](../how-to/behind-pgbouncer.md). Nothing was done.",
    "MissingExtraError": 'Install the extra the hint names, `pip install "car-control-plane[cli]"` for example.',
    "ConnectionUnavailableError": "Try again later, with a growing pause. Whether a commit that was under way happened is not known.",
    "PoolTimeoutError": "More sessions are open than the pool holds. The usual cause is a session held across a slow call, or opened inside another.",
    "StatementTimeoutError": "The transaction is rolled back. The server, not your network, was slow.",
    "ClosedError": "Something uses a manager after `close()`, or an embedded server that was not started.",
    "SchemaError": "The base of what a migration, or a GRANT, mends.",
    "SchemaMissingError": "Migrate. The message says whether the schema or a table of it is missing.",
    "SchemaOutdatedError": "Migrate when the schema is behind; upgrade the library when it is ahead. `details` names both revisions.",
    "PermissionDeniedError": "The hint holds the GRANTs to run, ready to paste. See [Permissions](permissions.md).",
    "NotFoundError": "The base of the errors for a row that is not there.",
    "TenantNotFoundError": "No tenant has this id or name; `details` says which was asked for.",
    "TenantDatabaseNotFoundError": "No tenant database has this id.",
    "ConfigKeyNotFoundError": "No configuration has this key. `get_or_default` does not raise.",
    "ConflictError": "The base of the conflicts. As such it means a deadlock or a serialisation failure: repeat the whole transaction.",
    "AlreadyExistsError": 'Choose another name or id, or `on_conflict="skip"` in `create_many`.',
    "StillReferencedError": "Delete first what refers to the row.",
    "StaleWriteError": "Somebody was faster. `details` holds the version you expected and the one that is there.",
    "ProtectedError": "`system_admin` is not renamed, suspended, deactivated or deleted, and no table is truncated.",
    "InvalidDataError": "Correct the value. The message names the field, not the value.",
    "InvalidTransitionError": "Read the tenant: `details` names the status it has and the one that was asked for. See [Tenancy](../explanation/tenancy.md).",
    "AccessDeniedError": "Write in `get_session()`, not in `get_read_session()`.",
    "TenantUnavailableError": "The tenant is not active.",
    "EncryptionError": "The base of the errors about sealed connection strings.",
    "KeyUnavailableError": "Wait for the service that keeps the keys, or read the message: it may refuse. Keys in use go on opening for `encryption_outage_seconds`.",
    "OutcomeUnknownError": "Keep the operation id of the error, and run the same unit with it when the database is back.",
    "WrongEventLoopError": "Do not share a manager between threads, or between two runs of `asyncio.run`: make one inside each.",
    "UnknownKeyError": "Give the process the key the message names.",
    "DecryptionError": "Restore the value from a backup.",
    "ProvisioningError": "`details` says how far it came.",
    "MigrationError": "Mend what the message names and migrate again; the failed revision left nothing behind.",
    "FleetMigrationError": "`exceptions` holds one error per database.",
    "ChangeFeedError": "Follow again from the last safe point.",
}
"""What to do, for every class; a class without an entry fails the generator."""


def subtree(cls: type[ControlPlaneError] = ControlPlaneError) -> Iterator[type[ControlPlaneError]]:
    """Yield the class and all below it, each before its subclasses."""
    yield cls
    for below in cls.__subclasses__():
        yield from subtree(below)


def names_in_use() -> set[str]:
    """Return the names that the library's code mentions, apart from where errors are declared and exported."""
    package = Path(errors.__file__).parent
    trees = [
        ast.parse(source.read_text(encoding="utf-8")) for source in package.rglob("*.py") if source.parent != package
    ]
    for source in package.glob("*.py"):
        tree = ast.parse(source.read_text(encoding="utf-8"))
        if source.name == "errors.py":
            tree.body = [node for node in tree.body if not isinstance(node, ast.ClassDef)]
        if source.name != "__init__.py":
            trees.append(tree)
    return {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)}


def errors_page() -> Lines:
    """Write the page of the errors."""
    in_use = names_in_use()
    picture = (errors.__doc__ or "").partition("::\n")[2].partition("\nTwo rules")[0].strip("\n")
    yield "# Errors"
    yield ""
    yield "Every refusal is one of these. It says what is wrong and what to do, holds no secret, and leaves nothing half-written."
    yield "`str(error)` is the message and the hint; `code` is stable, and the anchor on this page; errors pickle."
    yield ""
    yield "```text"
    yield from (line.removeprefix("    ") for line in picture.splitlines())
    yield "```"
    yield ""
    yield "In parentheses: the builtin it also is, so that `except LookupError` works as you would guess."
    yield ""
    for cls in subtree():
        yield f"## {cls.__name__} {{ #{cls.code} }}"
        yield ""
        yield first_line(cls) + "."
        yield ""
        yield REMEDIES[cls.__name__] + ("" if cls.__name__ in in_use else " Reserved: this version does not raise it.")
        yield ""
        if cls.default_hint:
            yield f"> {cls.default_hint}"
            yield ""
        retry = "worth the same call again" if cls.default_retryable else "not retryable"
        yield f"`{cls.code}` · HTTP {cls.http_status} · {retry}"
        yield ""
    yield "## What the server says, and what you get"
    yield ""
    yield "The server's error is told by its SQLSTATE and its constraint, never by its text, which is localised and may hold a row."
    yield "One that is not in these tables passes through as it is."
    yield ""
    yield from table(["SQLSTATE", "Error", "Message"], [*sqlstates()])
    yield from table(
        ["Constraint", "Error", "Message"],
        [[f"`{name}`", link(kind), text] for name, (kind, text) in sorted(errors._CONSTRAINTS.items())],
    )


def sqlstates() -> Iterator[list[str]]:
    """Yield the rows of the table of SQLSTATEs."""
    for state, (kind, text, _) in sorted(errors._STATES.items()):
        yield [f"`{state}`", link(kind), text or first_line(kind)]
    for state in sorted(errors._CONNECTION_STATES):
        yield [f"`{state}`", link(errors.ConnectionUnavailableError), first_line(errors.ConnectionUnavailableError)]
    for prefix, kind in sorted(errors._CLASSES.items()):
        yield [f"`{prefix}…`", link(kind), first_line(kind)]


def link(cls: type[ControlPlaneError]) -> str:
    """Write a link to the entry of a class."""
    return f"[`{cls.__name__}`](#{cls.code})"


def first_line(cls: type[ControlPlaneError]) -> str:
    """Return a class's default message."""
    return (cls.__doc__ or "").splitlines()[0].removesuffix(".")


# --- schema -----------------------------------------------------------------------------------------------------------


TABLES: tuple[type[Model], ...] = (Tenant, TenantDatabase, EncryptionKey, SystemConfig, ChangeLogEntry)


def schema() -> Lines:
    """Write the page of the schema: what the models say; what only the database knows is told in words."""
    yield "# Schema"
    yield ""
    yield f"Everything lies in the schema `{SCHEMA}`, made by the revisions {', '.join(f'`{name}`' for name in REVISIONS)}."
    yield "Times are `timestamp with time zone` by the server's clock."
    yield ""
    for model in TABLES:
        each: Table = model.__table__  # type: ignore[attr-defined]  # SQLAlchemy sets it
        yield f"## {each.name} {{ #{each.name} }}"
        yield ""
        yield (model.__doc__ or "").partition("; a row of")[0].splitlines()[0].removesuffix(".") + "."
        yield ""
        yield from table(
            ["Column", "Type", "Null", "Default"],
            [
                [f"`{column.name}`", f"`{kind(column)}`", "yes" if column.nullable else "no", default(column)]
                for column in each.columns
            ],
        )
        yield from table(["Constraint or index", "Definition"], [*rules(each)])
    yield "## Enumerations"
    yield ""
    enums = native_enums(Model.metadata.tables.values())
    yield from table(
        ["Type", "Values"],
        [[f"`{name}`", ", ".join(f"`{v}`" for v in enum.enums)] for name, enum in sorted(enums.items())],
    )


def kind(column: Column[Any]) -> str:
    """Write the type of a column as PostgreSQL knows it."""
    return column.type.compile(dialect=postgresql.dialect())  # type: ignore[no-untyped-call]  # SQLAlchemy's dialects have no types


FILLED_BY_TRIGGER = {"version", "updated_at"}


def default(column: Column[Any]) -> str:
    """Write the default of a column, and whether a trigger keeps it."""
    given = column.server_default
    said = getattr(given, "arg", None)
    words = [f"`{said.compile(dialect=postgresql.dialect())}`"] if said is not None else []  # type: ignore[no-untyped-call]  # as above
    if column.name in FILLED_BY_TRIGGER and column.server_onupdate is not None:
        words.append("kept by a trigger")
    return ", ".join(words)


def rules(each: Table) -> Iterator[list[str]]:
    """Yield one row for each constraint and index."""
    yield [f"`{each.primary_key.name}`", f"PRIMARY KEY ({', '.join(column.name for column in each.primary_key)})"]
    for rule in sorted(each.constraints, key=lambda one: str(one.name)):
        match rule:
            case UniqueConstraint():
                yield [f"`{rule.name}`", f"UNIQUE ({', '.join(column.name for column in rule.columns)})"]
            case ForeignKeyConstraint():
                target = f"{rule.referred_table.name} ({', '.join(part.column.name for part in rule.elements)})"
                yield [
                    f"`{rule.name}`",
                    f"FOREIGN KEY ({', '.join(rule.column_keys)}) REFERENCES {target} ON DELETE {rule.ondelete}",
                ]
            case CheckConstraint():
                yield [f"`{rule.name}`", f"CHECK (`{rule.sqltext}`)"]
    for index in sorted(each.indexes, key=lambda one: str(one.name)):
        written = str(CreateIndex(index).compile(dialect=postgresql.dialect()))  # type: ignore[no-untyped-call]  # as above
        yield [f"`{index.name}`", f"`{written.partition(' ON ')[2].partition(' ')[2]}`"]


# --- commands ---------------------------------------------------------------------------------------------------------


def commands() -> Lines:
    """Write the page of the command line."""
    root = typer.main.get_command(app)
    yield "# Commands"
    yield ""
    yield "`car-cp`, or `python -m car_control_plane`. Results go to standard output, everything else to standard error. In a terminal you get tables, in"
    yield "a pipe JSON, one object a line. No command takes a connection string as an argument, where process lists would show it: the control plane's is in"
    yield "`DATABASE_URL` or `.env`, those of tenants come from a pipe, a prompt, or a variable of the environment."
    yield "Every command takes `--output` and `--help`, before or after its name."
    yield ""
    yield from table(["Exit code", "Means", "Errors"], exit_codes())
    yield from command_entry(root, "car-cp", 2)


MEANINGS = {
    0: "done",
    1: "failed",
    2: "wrong usage, or a value that is not acceptable",
    3: "not configured",
    4: "database, or the source of keys, not reachable",
    5: "not migrated, or drifted",
    6: "permission denied",
    7: "not found",
    8: "conflict",
    INTERRUPTED: "interrupted",
    READER_GONE: "whoever read the output went away",
}


def exit_codes() -> list[list[str]]:
    """Return the rows of the table of exit codes."""
    by_code: dict[int, list[str]] = {code: [] for code in MEANINGS}
    for cls, code in EXIT_CODES.items():
        by_code[code].append(f"[`{cls.__name__}`](errors.md#{cls.code})")
    return [[str(code), MEANINGS[code], ", ".join(names)] for code, names in by_code.items()]


def command_entry(command: Any, path: str, level: int) -> Lines:
    """Write a command and those below it."""
    context = typer.Context(command, info_name=path)
    yield f"{'#' * level} {path} {{ #{path.replace(' ', '-')} }}"
    yield ""
    yield (command.help or "").strip()
    yield ""
    yield "```text"
    yield f"{path} {' '.join(command.collect_usage_pieces(context))}"
    yield "```"
    yield ""
    rows = [row for parameter in command.get_params(context) if (row := parameter_row(parameter, context))]
    if rows:
        yield from table(["Argument or option", "Meaning"], rows)
    for name in sorted(getattr(command, "commands", {})):
        yield from command_entry(command.commands[name], f"{path} {name}", min(level + 1, 4))


def parameter_row(parameter: Any, context: Any) -> list[str]:
    """Return name and meaning of a parameter; empty when it is hidden or goes without saying."""
    everywhere = {"help", "install_completion", "show_completion"} | (
        {"wanted"} if context.info_name != "car-cp" else set()
    )
    if parameter.name in everywhere or getattr(parameter, "hidden", False):
        return []
    record = parameter.get_help_record(context)
    return [f"`{record[0]}`", record[1]] if record else []


def telemetry_page() -> Lines:
    """Write the metrics, the log records, and how connections are named."""
    yield "# Telemetry"
    yield ""
    yield "What operators see, and where. Names on this page stay what they are; what changes is in the changelog."
    yield ""
    yield "## Metrics"
    yield ""
    yield "Exported by OpenTelemetry when its API is installed (`pip install car-control-plane[otel]`) and the application has set up its SDK, before or after the manager was made. Without it nothing is"
    yield "imported or measured. The meter is called `car_control_plane`."
    yield ""
    yield from table(
        ["Metric", "Instrument", "Unit", "What it counts", "Attributes"],
        [
            [f"`{one.name}`", one.kind, f"`{one.unit}`", one.text, ", ".join(f"`{key}`" for key in one.attributes)]
            for one in METRICS
        ],
    )
    yield "Names that begin with `db.client` follow OpenTelemetry's conventions for database clients (1.45), where `db.client.operation.duration` is stable and those about connections are still"
    yield "in development. `db.namespace` is the database the connection string names. `server.address` is left out when there are several hosts; `server.port` when it is 5432."
    yield "`db.client.connection.pool.name` is `HOST:PORT/DATABASE`, with several hosts all of them, and managers of one process that share it are added up. `error.type` is the SQLSTATE, which is in"
    yield "`db.response.status_code` too, or the name of the error's class. No attribute holds a tenant, a user, a parameter or SQL."
    yield ""
    yield "An instrument that is *observed* costs nothing until somebody collects it. The others add half a microsecond to a call, and about ten when an SDK takes the figures."
    yield ""
    yield "There are no spans. Those of `opentelemetry-instrumentation-sqlalchemy` and `-asyncpg` work with sessions and statements as they do everywhere."
    yield ""
    yield "## Log records"
    yield ""
    yield "By the standard library's `logging`, below `car_control_plane`. `event` and the further attributes of a record are stable, its text is not."
    yield ""
    yield from table(
        ["`event`", "Logger", "Level", "Further attributes", "When"],
        [
            [
                f"`{one.name}`",
                f"`{one.logger}`",
                one.level,
                ", ".join(f"`{key}`" for key in one.keys),
                one.text,
            ]
            for one in EVENTS
        ],
    )
    yield "`error` is the `code` of one of [our errors](errors.md), or the name of a class. SQLAlchemy's own loggers are as they always are; parameters are hidden in them."
    yield ""
    yield "## Names of connections"
    yield ""
    yield "`pg_stat_activity` shows each connection's `application_name` as `car-control-plane/ACTIVITY/PROCESS`: the [setting](settings.md) `application_name`, what the connection is for, and the id of the"
    yield "process. Of the 63 characters PostgreSQL keeps, the last two come first. An `application_name` in the connection string is taken as it is."
    yield ""
    yield from table(["Activity", "What for"], [[f"`{name}`", text] for name, text in ACTIVITIES.items()])


PAGES: dict[str, Callable[[], Lines]] = {
    "cli.md": commands,
    "errors.md": errors_page,
    "schema.md": schema,
    "settings.md": settings,
    "telemetry.md": telemetry_page,
}


def main(arguments: list[str]) -> int:
    """Write the pages, or with `--check` name those that are not fresh."""
    outdated = []
    for name, write in PAGES.items():
        text = GENERATED + "\n" + "\n".join(write()).rstrip() + "\n"
        page = REFERENCE / name
        if page.exists() and page.read_text(encoding="utf-8") == text:
            continue
        outdated.append(name)
        if arguments != ["--check"]:
            page.write_text(text, encoding="utf-8", newline="\n")
    for name in outdated:
        sys.stdout.write(f"docs/reference/{name} {'is not fresh' if arguments == ['--check'] else 'written'}\n")
    return int(bool(outdated) and arguments == ["--check"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
