"""Looks for everything that commonly keeps a control plane from working, and says what to do about it.

A table of checks, each of which asks one question and gives one `Finding`. A check that builds on another one that failed is skipped, so the
first failure is the cause, and what follows is not a list of its consequences. Nothing is changed, and no finding holds a secret.

Sources: `docs/how-to/troubleshoot.md` and `docs/reference/permissions.md`, whose entries these are; PostgreSQL manual, "System Catalogs" and
"Access Privilege Inquiry Functions"; PostgreSQL's versioning policy.
"""

import importlib.util
import ipaddress
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from typing import Any, Final, Literal

import asyncpg
from pydantic import SecretStr

from car_control_plane import dsn as dsns, migrations
from car_control_plane.connection import AsyncConnectionManager
from car_control_plane.dsn import Dsn
from car_control_plane.embedded import find_binaries
from car_control_plane.encryption import Keyring, KeyState
from car_control_plane.errors import (
    ConfigurationError,
    ControlPlaneError,
    DecryptionError,
    DirectConnectionRequiredError,
    MissingExtraError,
    PermissionDeniedError,
    SchemaError,
    SchemaMissingError,
    UnknownKeyError,
    translate,
)
from car_control_plane.models import SCHEMA, SYSTEM_ADMIN_ID, SYSTEM_ADMIN_NAME, metadata
from car_control_plane.models.base import native_enums
from car_control_plane.poolers import leads_through_pooler
from car_control_plane.repositories import EncryptionKeyRepository, EncryptionKeyStore
from car_control_plane.settings import ControlPlaneSettings, load_settings, unknown_environment

__all__ = ["Finding", "examine"]

SKEW_SECONDS: Final = 2.0
"""More than this between two clocks confuses whoever compares times of the two."""

RELEASE_YEAR_OF_0: Final = 2007
"""PostgreSQL 12 came out in 2019, and one version each year since."""

SUPPORTED_YEARS: Final = 5
"""Each version has its last release in the November so many years after its first."""

_SHOWN: Final = 3
_READ_TABLES: Final = ("change_log", "alembic_version")
_WRITTEN_TABLES: Final = ("tenants", "tenant_databases", "system_config", "completed_operations")
_KEY_TABLE: Final = "encryption_keys"
_EXTRAS: Final = {"cli": ("typer", "rich"), "embedded": (), "testing": ("pytest", "pytest_asyncio", "testcontainers")}


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    Attributes:
        check: The name of the check.
        status: `warn` works but should not stay so; `skipped` could not be asked because an earlier check failed.
        message: What was found, in one sentence.
        hint: What to do about it; empty when there is nothing to do.
        code: Of a failure, the code of the error that a program would get (`docs/reference/errors.md`); otherwise empty.
    """

    check: str
    status: Literal["ok", "warn", "fail", "skipped"]
    message: str
    hint: str = ""
    code: str = ""


async def examine(target: str | SecretStr | ControlPlaneSettings | None = None) -> list[Finding]:
    """Ask every check, in the order of cause and effect; never raises for what is wrong with the control plane.

    At most four connections, closed at the end, and some thirty queries. `embedded:` starts its server, and stops it.

    Args:
        target: As for `AsyncConnectionManager`; None reads `DATABASE_URL`.

    Returns:
        One finding for each check.
    """
    findings: list[Finding] = []
    async with AsyncExitStack() as stack:
        patient = _Patient(target, stack)
        for name, look, needed in _CHECKS:
            failed = {finding.check for finding in findings if finding.status in {"fail", "skipped"}}
            if missing := failed & set(needed.split()):
                finding = Finding(name, "skipped", f"not looked at, because of: {', '.join(sorted(missing))}")
            else:
                finding = await _asked(look, patient)
            findings.append(replace(finding, check=name))
    return findings


async def _asked(look: "Callable[[_Patient], Awaitable[Finding]]", patient: "_Patient") -> Finding:
    try:
        return await look(patient)
    except ControlPlaneError as error:
        return _failed(error)
    except Exception as problem:  # whatever it is, the other checks are still worth asking
        # A file that cannot be read is an OSError too, and not the connection's.
        known = translate(problem, io=isinstance(problem, asyncpg.InterfaceError | ConnectionError | TimeoutError))
        return _failed(known or ControlPlaneError(f"this could not be told: {type(problem).__name__}"))


class _Patient:
    """What the checks look at; each takes it as far as it comes."""

    settings: ControlPlaneSettings
    keyring: Keyring | None  # None without a source of keys
    dsn: Dsn | None
    manager: AsyncConnectionManager
    connection: Any  # asyncpg's, which has no types

    def __init__(self, target: str | SecretStr | ControlPlaneSettings | None, stack: AsyncExitStack) -> None:
        self.target = target
        self.stack = stack

    @property
    def is_remote(self) -> bool:
        """Whether a host of the connection string is another machine."""
        return self.dsn is not None and not all(_is_local(host.name) for host in self.dsn.hosts)


def _is_local(host: str) -> bool:
    """Tell whether a host is a unix socket, the driver's default (a socket or localhost), or a loopback address."""
    if not host or host.startswith("/") or host.lower() == "localhost":
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    return False


def _ok(message: str) -> Finding:
    return Finding("", "ok", message)


def _warning(message: str, hint: str) -> Finding:
    return Finding("", "warn", message, hint)


def _failed(error: ControlPlaneError) -> Finding:
    return Finding("", "fail", error.message, error.hint, error.code)


# --- what is set ------------------------------------------------------------------------------------------------------


async def _settings(patient: _Patient) -> Finding:
    """Missing or unreadable .env, bad values, no DATABASE_URL."""
    given = patient.target
    patient.settings = (
        given
        if isinstance(given, ControlPlaneSettings)
        else load_settings(**({} if given is None else {"database_url": given}))
    )
    patient.settings.require_database_url()
    if given is not None:
        return _ok("the connection string was passed")
    named = [name for name in ("CAR_CONTROL_PLANE_DATABASE_URL", "DATABASE_URL") if os.environ.get(name)]
    return _ok(f"{named[0]} is set in the environment" if named else "DATABASE_URL is set in .env")


async def _unknown_variables(_: _Patient) -> Finding:
    strangers = unknown_environment()
    if not strangers:
        return _ok("no variable is misspelt")
    meant = [f"{name} (did you mean {near}?)" if near else name for name, near in strangers.items()]
    return _warning(f"no setting, hence without effect: {', '.join(meant)}", "Correct the name, or unset it.")


async def _connection_string(patient: _Patient) -> Finding:
    """Malformed, unescaped password, unknown options."""
    text = patient.settings.require_database_url()
    patient.dsn = None if dsns.is_embedded(text) else dsns.parse(text)
    if patient.dsn is not None:
        return _ok(patient.dsn.redacted())
    path = dsns.embedded_path(text)
    return _ok(f"a server of our own, with its data in {path}" if path else "a temporary server of our own")


async def _extras(_: _Patient) -> Finding:
    installed = {name for name, modules in _EXTRAS.items() if all(map(importlib.util.find_spec, modules))}
    try:
        find_binaries()
    except (MissingExtraError, ConfigurationError):
        installed.discard("embedded")
    absent = sorted(_EXTRAS.keys() - installed)
    text = f"installed: {', '.join(sorted(installed)) or 'none'}"
    return _ok(f"{text}; not installed: {', '.join(absent)}" if absent else text)


# --- the way to the server --------------------------------------------------------------------------------------------


async def _reachable(patient: _Patient) -> Finding:
    """Name resolution, refused or dropped connections, TLS, password, missing database, old server: the error says which."""
    manager = patient.manager = AsyncConnectionManager(patient.settings)
    await patient.stack.enter_async_context(manager)
    started = time.perf_counter()
    patient.connection = await manager.connect(server_settings={"search_path": "pg_catalog"}, activity="doctor")
    patient.stack.push_async_callback(patient.connection.close)
    milliseconds = (time.perf_counter() - started) * 1000
    role, database = await patient.connection.fetchrow("SELECT current_user, current_database()")
    return _ok(f"connected as {role} to {database} in {milliseconds:.0f} ms")


async def _pooler(patient: _Patient) -> Finding:
    """A pooler without a way around it, and a way around it that leads elsewhere."""
    behind = leads_through_pooler(patient.connection)
    if patient.settings.direct_database_url is None:
        if not behind:
            return _ok("there is no connection pooler in between")
        return _warning(
            "the connection leads through a pooler in transaction mode, and nothing else leads to the server: migrations and the rotation of keys "
            "are refused",
            DirectConnectionRequiredError.default_hint,
        )
    direct = await patient.manager.connect_direct()
    try:
        if await direct.fetch(_WHERE) != await patient.connection.fetch(_WHERE):
            raise ConfigurationError(
                "direct_database_url and database_url lead to different databases",
                hint="Both name the same database of the same server, one through the pooler and one around it.",
            )
    finally:
        await direct.close()
    way = "leads through a pooler in transaction mode" if behind else "does not lead through a pooler"
    return _ok(f"the connection {way}; direct_database_url leads to the same database")


_WHERE: Final = "SELECT oid, pg_postmaster_start_time() FROM pg_database WHERE datname = current_database()"


async def _encryption(patient: _Patient) -> Finding:
    if not patient.is_remote:
        return _ok("the server is on this machine")
    mode = (patient.dsn and patient.dsn.sslmode) or os.environ.get("PGSSLMODE") or "prefer"
    if mode == "verify-full":
        return _ok("encrypted, and the server has proved its name (sslmode=verify-full)")
    # What the server sees is its own end; with these modes there would be no connection if ours were not encrypted.
    asked = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
    encrypted = mode in {"require", "verify-ca"} or await patient.connection.fetchval(asked)
    return _warning(
        f"{'encrypted' if encrypted else 'not encrypted'}, and nothing proves that this is your server (sslmode={mode})",
        "Add ?sslmode=verify-full&sslrootcert=system (or the file of your authority) to DATABASE_URL: "
        "docs/how-to/connect-securely.md.",
    )


# --- the server -------------------------------------------------------------------------------------------------------


async def _server_version(patient: _Patient) -> Finding:
    number = int(await patient.connection.fetchval("SELECT current_setting('server_version_num')"))
    text = await patient.connection.fetchval("SELECT current_setting('server_version')")
    major = number // 10_000
    last = _last_release(major)
    if datetime.now(UTC).date() <= last:
        return _ok(f"PostgreSQL {text}, which gets fixes until {last:%B %Y}")
    return _warning(
        f"PostgreSQL {text} has had no fixes since {last:%B %Y}",
        "Upgrade the server: 12 to 18 work, newer ones get fixes.",
    )


def _last_release(major: int) -> date:
    return date(RELEASE_YEAR_OF_0 + major + SUPPORTED_YEARS, 11, 30)


async def _writable(patient: _Patient) -> Finding:
    standby, read_only = await patient.connection.fetchrow(
        "SELECT pg_is_in_recovery(), current_setting('default_transaction_read_only') = 'on'"
    )
    if standby:
        return _warning(
            "the server is a standby: it can be read and not written",
            "Name all hosts in DATABASE_URL, with target_session_attrs=read-write.",
        )
    if read_only:
        return _warning(
            "transactions are read-only by default here",
            "See default_transaction_read_only of the server, the database, the role and DATABASE_URL.",
        )
    return _ok("the server takes writes")


async def _encoding(patient: _Patient) -> Finding:
    encoding = await patient.connection.fetchval(
        "SELECT pg_encoding_to_char(encoding) FROM pg_database WHERE datname = current_database()"
    )
    if encoding == "UTF8":
        return _ok("the database is in UTF-8")
    return _warning(
        f"the database is in {encoding}: names with other characters are refused",
        "Make a new one: CREATE DATABASE control_plane ENCODING 'UTF8' TEMPLATE template0;",
    )


async def _clock(patient: _Patient) -> Finding:
    before = time.time()
    server = await patient.connection.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8")
    after = time.time()
    ahead = float(server) - (before + after) / 2
    if abs(ahead) <= SKEW_SECONDS + (after - before):
        return _ok(f"the server's clock and this one differ by less than {SKEW_SECONDS:g} s")
    return _warning(
        f"the server's clock is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} this one",
        "Keep both by NTP. Stored times are the server's.",
    )


async def _time_zone(patient: _Patient) -> Finding:
    zone = await patient.connection.fetchval("SELECT current_setting('TimeZone')")
    if zone in {"UTC", "Etc/UTC", "GMT", "Etc/GMT"}:
        return _ok("sessions are in UTC")
    return _warning(
        f"sessions are in {zone}: psql and ours print times differently", "Take TimeZone out of DATABASE_URL."
    )


async def _connections(patient: _Patient) -> Finding:
    limits = await patient.connection.fetchrow(_CONNECTION_LIMITS)
    wanted = patient.settings.pool_size + patient.settings.max_overflow
    available = min(limit for limit in limits if limit >= 0)
    if wanted <= available:
        return _ok(f"a pool may take {wanted} of {available} connections")
    return _warning(
        f"a pool may take {wanted} connections, and there are only {available} for this role",
        "Lower CAR_CONTROL_PLANE_POOL_SIZE or CAR_CONTROL_PLANE_MAX_OVERFLOW, or raise max_connections or the CONNECTION LIMIT.",
    )


_CONNECTION_LIMITS: Final = """
SELECT current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
       - coalesce(current_setting('reserved_connections', true)::int, 0),
       (SELECT rolconnlimit FROM pg_roles WHERE rolname = current_user),
       (SELECT datconnlimit FROM pg_database WHERE datname = current_database())
"""


async def _role(patient: _Patient) -> Finding:
    if patient.dsn is None:
        return _ok("a superuser, on a server of our own")
    role, superuser = await patient.connection.fetchrow(
        "SELECT rolname, rolsuper FROM pg_roles WHERE rolname = current_user"
    )
    if not superuser:
        return _ok(f"{role} is no superuser")
    return _warning(
        f"{role} is a superuser: whoever gets in through the control plane may do anything to the server",
        "Work as a role of its own: docs/reference/permissions.md has the GRANTs.",
    )


# --- the schema -------------------------------------------------------------------------------------------------------


async def _schema_exists(patient: _Patient) -> Finding:
    if await patient.connection.fetchval("SELECT to_regnamespace($1) IS NOT NULL", SCHEMA):
        return _ok(f"schema '{SCHEMA}' exists")
    error = SchemaMissingError(f"schema '{SCHEMA}' does not exist")
    if not await patient.connection.fetchval("SELECT has_database_privilege(current_database(), 'CREATE')"):
        grant = await patient.connection.fetchval(
            "SELECT format('GRANT CREATE ON DATABASE %I TO %I;', current_database(), current_user)"
        )
        error.hint = f"This role may not create it. As the owner of the database run: {grant} Then: car-cp db upgrade."
    return _failed(error)


async def _privileges(patient: _Patient) -> Finding:
    """Compare what the role may with what the library needs, and write the GRANTs that are missing."""
    role = await patient.connection.fetchval("SELECT quote_ident(current_user)")
    if not await patient.connection.fetchval("SELECT has_schema_privilege($1, 'USAGE')", SCHEMA):
        return _failed(_denied(f"{role} may not use the schema", [_grant_usage(role), *_grants(_needed(), role)]))
    rows = await patient.connection.fetch(_PRIVILEGES, SCHEMA, [*_READ_TABLES, *_WRITTEN_TABLES, _KEY_TABLE])
    held = {(row["relname"], privilege) for row in rows for privilege in row["held"]}
    tables = {row["relname"] for row in rows}
    missing = [one for one in _needed() if one[0] in tables and one not in held]
    if not missing:
        return _ok(f"{role} may read and write everything it needs")
    if not any(privilege != "SELECT" for _, privilege in held):
        if all(privilege != "SELECT" or table == _KEY_TABLE for table, privilege in missing):
            return _warning(f"{role} may read, and write nothing", f"To write: {' '.join(_grants(missing, role))}")
    elif all(privilege == "DELETE" for _, privilege in missing):
        return _warning(f"{role} may not delete", f"To delete: {' '.join(_grants(missing, role))}")
    lacks = ", ".join(sorted({f"{privilege} on {table}" for table, privilege in missing}))
    return _failed(_denied(f"{role} lacks {lacks}", _grants(missing, role)))


def _needed() -> list[tuple[str, str]]:
    reads = [(table, "SELECT") for table in (*_READ_TABLES, *_WRITTEN_TABLES)]
    keys = [(_KEY_TABLE, "SELECT"), (_KEY_TABLE, "INSERT")]  # to compare a key with its record, and to make that
    return reads + keys + [(table, verb) for table in _WRITTEN_TABLES for verb in ("INSERT", "UPDATE", "DELETE")]


def _grant_usage(role: str) -> str:
    return f"GRANT USAGE ON SCHEMA {SCHEMA} TO {role};"


def _grants(missing: Iterable[tuple[str, str]], role: str) -> list[str]:
    """Write GRANTs, one for each set of privileges."""
    by_table: dict[str, list[str]] = {}
    for table, privilege in missing:
        by_table.setdefault(table, []).append(privilege)
    by_set: dict[str, list[str]] = {}
    for table, privileges in by_table.items():
        by_set.setdefault(", ".join(privileges), []).append(f"{SCHEMA}.{table}")
    return [f"GRANT {privileges} ON {', '.join(tables)} TO {role};" for privileges, tables in by_set.items()]


def _denied(what: str, grants: Iterable[str]) -> PermissionDeniedError:
    return PermissionDeniedError(
        f"permission denied: {what}", hint=f"As the owner of the schema run: {' '.join(grants)}"
    )


# By oid, because looking a table up by its name asks for USAGE on its schema. A right to some columns is enough to read: see the role that looks.
_PRIVILEGES: Final = """
SELECT c.relname,
       ARRAY(SELECT privilege FROM unnest(ARRAY['INSERT', 'UPDATE', 'DELETE']) AS privilege
             WHERE has_table_privilege(c.oid, privilege))
       || CASE WHEN has_any_column_privilege(c.oid, 'SELECT') THEN ARRAY['SELECT'] ELSE '{}' END AS held
FROM pg_class c
WHERE c.relnamespace = to_regnamespace($1) AND c.relname = ANY ($2::text[])
"""


async def _revision(patient: _Patient) -> Finding:
    await patient.manager.require_schema()
    return _ok(f"the schema is at {migrations.history()[-1].revision}, which this version of the library needs")


async def _drift(patient: _Patient) -> Finding:
    found = await migrations.drift(patient.manager)
    if not found:
        return _ok("every object is as the migrations make it")
    named = ", ".join(f"{one.object} ({one.kind})" for one in found[:_SHOWN])
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return _failed(
        SchemaError(
            f"the schema was changed by hand: {named}{more}",
            hint="See car-cp db drift -o json for what is there and what should be; put it back, or write a revision.",
        )
    )


async def _enums(patient: _Patient) -> Finding:
    rows = await patient.connection.fetch(_ENUMS, SCHEMA)
    found = {row["typname"]: list(row["labels"]) for row in rows}
    differing = [name for name, values in _python_enums().items() if found.get(name) != values]
    if not differing:
        return _ok("Python and the database know the same values")
    return _failed(
        SchemaError(
            f"Python and the database differ about the values of {', '.join(sorted(differing))}",
            hint="A value that Python does not know raises LookupError when it is read: upgrade the library.",
        )
    )


def _python_enums() -> Mapping[str, list[str]]:
    return {name: list(enum.enums) for name, enum in native_enums(metadata.tables.values()).items()}


_ENUMS: Final = """
SELECT t.typname, array_agg(e.enumlabel::text ORDER BY e.enumsortorder) AS labels
FROM pg_type t JOIN pg_enum e ON e.enumtypid = t.oid
WHERE t.typnamespace = to_regnamespace($1)
GROUP BY t.typname
"""


async def _indexes(patient: _Patient) -> Finding:
    rows = await patient.connection.fetch(_INVALID_INDEXES, SCHEMA)
    if not rows:
        return _ok("every index is valid")
    names = [row["relname"] for row in rows]
    repairs = " ".join(f"REINDEX INDEX CONCURRENTLY {SCHEMA}.{row['quoted']};" for row in rows)
    return _failed(SchemaError(f"invalid, hence not used: {', '.join(names)}", hint=f"As the owner run: {repairs}"))


_INVALID_INDEXES: Final = """
SELECT c.relname, quote_ident(c.relname) AS quoted
FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
WHERE c.relnamespace = to_regnamespace($1) AND NOT (i.indisvalid AND i.indisready AND i.indislive)
ORDER BY 1
"""


async def _system_admin(patient: _Patient) -> Finding:
    name, status = await patient.connection.fetchrow(_SYSTEM_ADMIN, SYSTEM_ADMIN_ID) or (None, None)
    if (name, status) == (SYSTEM_ADMIN_NAME, "active"):
        return _ok(f"the tenant {SYSTEM_ADMIN_NAME} is there, and active")
    if name is None:
        problem = SchemaError(f"the tenant {SYSTEM_ADMIN_NAME} is missing", hint=f"Put it back: {_REPAIR_MISSING}")
    elif name == SYSTEM_ADMIN_NAME:
        problem = SchemaError(f"the tenant {name} is {status}", hint=f"Run: car-cp tenant activate {name}")
    else:
        problem = SchemaError(f"the tenant {SYSTEM_ADMIN_NAME} is renamed", hint=f"As the owner run: {_REPAIR_RENAMED}")
    return _failed(problem)


# Printed, for somebody to run; nothing but constants is in them.
_REPAIR_MISSING: Final = (
    f"INSERT INTO {SCHEMA}.tenants (tenant_id, name, environment, status) "  # noqa: S608 -- see above
    f"VALUES ('{SYSTEM_ADMIN_ID}', '{SYSTEM_ADMIN_NAME}', 'production', 'active');"
)
_REPAIR_RENAMED: Final = (
    f"ALTER TABLE {SCHEMA}.tenants DISABLE TRIGGER tenants_30_protect_update; "  # noqa: S608 -- see above
    f"UPDATE {SCHEMA}.tenants SET name = '{SYSTEM_ADMIN_NAME}' WHERE tenant_id = '{SYSTEM_ADMIN_ID}'; "
    f"ALTER TABLE {SCHEMA}.tenants ENABLE TRIGGER tenants_30_protect_update;"
)
_SYSTEM_ADMIN: Final = f"SELECT name, status::text FROM {SCHEMA}.tenants WHERE tenant_id = $1"  # noqa: S608 -- a constant


# --- keys, and what is sealed -----------------------------------------------------------------------------------------


async def _keys(patient: _Patient) -> Finding:
    """No source of keys, one that cannot be used or asked, no current key."""
    settings = patient.settings
    if not (settings.encryption_keys or settings.encryption_key_file or settings.encryption_key_wrapper):
        patient.keyring = None
        if not await patient.connection.fetchval(_ANY_DATABASE):
            return _ok("no keys are configured, and no connection string is sealed")
        return _warning(
            "no keys are configured: this process lists tenant databases, and can neither register nor open one",
            "Where that is not meant, set CAR_CONTROL_PLANE_ENCRYPTION_KEYS, _ENCRYPTION_KEY_FILE or "
            "_ENCRYPTION_KEY_WRAPPER: docs/how-to/rotate-keys.md.",
        )
    patient.keyring = Keyring.from_settings(settings, store=EncryptionKeyStore(patient.manager))
    patient.stack.push_async_callback(patient.keyring.close)
    current = await patient.keyring.current()
    others = len([info for info in await patient.keyring.list() if info.state is not KeyState.DESTROYED]) - 1
    return _ok(f"{current.kid} seals, and {others} more open ({patient.keyring.provider.name})")


async def _key_record(patient: _Patient) -> Finding:
    """A key that cannot be had, or is not the one that sealed what is there."""
    if patient.keyring is None:
        return _ok("there are no keys to compare")
    async with patient.manager.get_read_session() as session:
        recorded = {row.kid: row.check_value for row in await EncryptionKeyRepository(session).list()}
    different, closed = [], dict[str, ControlPlaneError]()
    for info in await patient.keyring.list():
        if info.state is KeyState.DESTROYED:
            continue
        try:
            key = await patient.keyring.get(info.kid)
        except ControlPlaneError as error:
            closed[info.kid] = error
        else:
            different += [key.kid] if recorded.get(key.kid, key.check_value) != key.check_value else []
    if different:
        return _failed(
            ConfigurationError(
                f"not the keys of these names that the database knows: {_few(different)}",
                hint="Nothing is sealed with them, and nothing opens. Give this process the right keys, or new ones names of their own.",
            )
        )
    if closed:
        first = next(iter(closed.values()))
        return _failed(type(first)(f"keys that cannot be had: {_few(closed)} ({first.message})", hint=first.hint))
    return _ok("every key is the one the database knows, or new to it")


async def _sealed_rows(patient: _Patient) -> Finding:
    """Rows that cannot be opened, and rows that a rotation has still to reach. Opens none."""
    try:
        async with patient.manager.get_read_session() as session:
            usage = await EncryptionKeyRepository(session).usage()
    except PermissionDeniedError:
        return _ok("this role may not look at sealed values")
    damaged, rows = usage.pop("", 0), sum(usage.values())
    if damaged:
        return _failed(
            DecryptionError(
                f"something else than a sealed connection string in {_counted(damaged)}",
                hint=f"Give them their connection strings anew: car-cp database set-connection-string. To find them: {_FIND_DAMAGED}",
            )
        )
    if patient.keyring is None:
        return _ok(f"{_counted(rows)} sealed")
    states = {info.kid: info.state for info in await patient.keyring.list()}
    lost = {kid: count for kid, count in usage.items() if states.get(kid, KeyState.DESTROYED) is KeyState.DESTROYED}
    if lost:
        return _failed(
            UnknownKeyError(
                f"{_counted(sum(lost.values()))} sealed with keys that this process does not have: {_few(lost)}",
                hint="Give it those keys, as retired ones: docs/how-to/rotate-keys.md.",
            )
        )
    if former := {kid: count for kid, count in usage.items() if states[kid] is not KeyState.CURRENT}:
        return _warning(
            f"{_counted(sum(former.values()))} of {rows} sealed with keys that are not current: {_few(former)}",
            "Finish the rotation: car-cp key rotate.",
        )
    return _ok(f"{_counted(rows)} sealed with the current key" if rows else "no connection string is sealed")


def _counted(rows: int) -> str:
    return f"{rows} tenant database{'s' * (rows != 1)}"


def _few(names: Iterable[str]) -> str:
    """List the first of some names."""
    listed = sorted(names)
    return ", ".join(listed[:_SHOWN]) + (f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else "")


async def _sealed_form(patient: _Patient) -> Finding:
    """The constraint that keeps plain text out, whoever writes."""
    validated = await patient.connection.fetchval(_CONSTRAINT, f"{SCHEMA}.tenant_databases", _SEALED_CONSTRAINT)
    if validated:
        return _ok("the database refuses connection strings that are not sealed")
    repair = (
        f"ALTER TABLE {SCHEMA}.tenant_databases ADD CONSTRAINT {_SEALED_CONSTRAINT} CHECK ({_SEALED_FORM});"
        if validated is None
        else f"ALTER TABLE {SCHEMA}.tenant_databases VALIDATE CONSTRAINT {_SEALED_CONSTRAINT};"
    )
    return _failed(
        SchemaError(
            f"the constraint {_SEALED_CONSTRAINT} is {'missing' if validated is None else 'not valid'}: the database takes plain text",
            hint=f"As the owner run: {repair}",
        )
    )


_SEALED_CONSTRAINT: Final = "ck_tenant_databases_sealed"
_SEALED_FORM: Final = "connection_string_encrypted ~ '^ccp1:[a-z0-9-]{1,32}:[A-Za-z0-9_-]+$'"
# Printed, for somebody to run.
_FIND_DAMAGED: Final = f"SELECT id, tenant_id, purpose FROM {SCHEMA}.tenant_databases WHERE NOT ({_SEALED_FORM});"  # noqa: S608 -- constants
_CONSTRAINT: Final = "SELECT convalidated FROM pg_constraint WHERE conrelid = to_regclass($1) AND conname = $2"
_ANY_DATABASE: Final = f"SELECT EXISTS (SELECT FROM {SCHEMA}.tenant_databases)"  # noqa: S608 -- a constant


async def _verifications(patient: _Patient) -> Finding:
    """What `verify` found when it was last asked."""
    try:
        failed, never, rows = await patient.connection.fetchrow(_VERIFICATIONS)
    except asyncpg.InsufficientPrivilegeError:
        return _ok("this role may not look at verifications")
    if failed:
        named = ", ".join(str(row["id"]) for row in await patient.connection.fetch(_FAILED_VERIFICATIONS, _SHOWN))
        return _warning(
            f"{_counted(failed)} could not be used when last verified: {named}{' …' if failed > _SHOWN else ''}",
            "To see why: car-cp database show ID. To look again: car-cp database verify ID.",
        )
    if never:
        return _ok(f"{_counted(never)} of {rows} never verified, the others in order")
    return _ok("every tenant database was in order when last verified" if rows else "there are no tenant databases")


_VERIFICATIONS: Final = f"""
SELECT count(*) FILTER (WHERE verification_error IS NOT NULL), count(*) FILTER (WHERE verified_at IS NULL), count(*)
FROM {SCHEMA}.tenant_databases
"""  # noqa: S608 -- a constant
_FAILED_VERIFICATIONS: Final = f"""
SELECT id FROM {SCHEMA}.tenant_databases WHERE verification_error IS NOT NULL ORDER BY verified_at DESC, id LIMIT $1
"""  # noqa: S608 -- a constant


# --- the table --------------------------------------------------------------------------------------------------------

_CHECKS: Final[tuple[tuple[str, Callable[[_Patient], Awaitable[Finding]], str], ...]] = (
    ("settings", _settings, ""),
    ("variables", _unknown_variables, ""),
    ("database-url", _connection_string, "settings"),
    ("extras", _extras, ""),
    ("connection", _reachable, "database-url"),
    ("pooler", _pooler, "connection"),
    ("encryption", _encryption, "connection"),
    ("server", _server_version, "connection"),
    ("writes", _writable, "connection"),
    ("encoding", _encoding, "connection"),
    ("clock", _clock, "connection"),
    ("time-zone", _time_zone, "connection"),
    ("pool", _connections, "connection"),
    ("role", _role, "connection"),
    ("schema", _schema_exists, "connection"),
    ("privileges", _privileges, "schema"),
    ("revision", _revision, "privileges"),
    ("drift", _drift, "revision"),
    ("enums", _enums, "revision"),
    ("indexes", _indexes, "schema"),
    ("system-admin", _system_admin, "revision"),
    ("keys", _keys, "revision"),
    ("key-record", _key_record, "keys"),
    ("sealed-rows", _sealed_rows, "keys"),
    ("sealed-form", _sealed_form, "revision"),
    ("verifications", _verifications, "revision"),
)
"""Name, question, and the names of the checks without whose success it cannot be asked."""
