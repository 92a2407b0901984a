"""Every error this library raises on purpose, and the one place that turns a driver's error into one of them.

The tree (`docs/reference/errors.md` says for each what to do; a test compares that page, this picture and the classes)::

    ControlPlaneError
    ├── ConfigurationError (ValueError)
    │   └── DirectConnectionRequiredError
    ├── MissingExtraError (ImportError)
    ├── ConnectionUnavailableError
    │   └── PoolTimeoutError (TimeoutError)
    ├── OutcomeUnknownError
    ├── StatementTimeoutError (TimeoutError)
    ├── ClosedError (RuntimeError)
    ├── WrongEventLoopError (RuntimeError)
    ├── SchemaError
    │   ├── SchemaMissingError
    │   ├── SchemaOutdatedError
    │   └── PermissionDeniedError
    ├── NotFoundError (LookupError)
    │   ├── TenantNotFoundError
    │   ├── TenantDatabaseNotFoundError
    │   └── ConfigKeyNotFoundError
    ├── ConflictError
    │   ├── AlreadyExistsError
    │   ├── StillReferencedError
    │   ├── StaleWriteError
    │   └── ProtectedError
    ├── InvalidDataError (ValueError)
    │   └── InvalidTransitionError
    ├── AccessDeniedError
    │   └── TenantUnavailableError
    ├── EncryptionError
    │   ├── KeyUnavailableError
    │   ├── UnknownKeyError
    │   └── DecryptionError
    ├── ProvisioningError
    ├── MigrationError
    │   └── FleetMigrationError (ExceptionGroup)
    └── ChangeFeedError

Two rules keep secrets out. `translate` reads SQLSTATE, constraint name and exception class, never a message or a DETAIL written by the server
(PostgreSQL puts whole rows in there). And whoever translates raises the new error *after* the `except` block, so that the driver's error, with
its statement and parameters, hangs on no `__context__`.

This module imports the standard library only.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

__all__ = [
    "AccessDeniedError",
    "AlreadyExistsError",
    "ChangeFeedError",
    "ClosedError",
    "ConfigKeyNotFoundError",
    "ConfigurationError",
    "ConflictError",
    "ConnectionUnavailableError",
    "ControlPlaneError",
    "DecryptionError",
    "DirectConnectionRequiredError",
    "EncryptionError",
    "FleetMigrationError",
    "InvalidDataError",
    "InvalidTransitionError",
    "KeyUnavailableError",
    "MigrationError",
    "MissingExtraError",
    "NotFoundError",
    "OutcomeUnknownError",
    "PermissionDeniedError",
    "PoolTimeoutError",
    "ProtectedError",
    "ProvisioningError",
    "SchemaError",
    "SchemaMissingError",
    "SchemaOutdatedError",
    "StaleWriteError",
    "StatementTimeoutError",
    "StillReferencedError",
    "TenantDatabaseNotFoundError",
    "TenantNotFoundError",
    "TenantUnavailableError",
    "UnknownKeyError",
    "WrongEventLoopError",
    "translate",
]


class ControlPlaneError(Exception):
    """The control plane could not do what was asked.

    `str(error)` is the message followed by the hint. Errors pickle, so they cross process boundaries whole.

    Attributes:
        code: Stable kebab-case name; the anchor of the error's entry in `docs/reference/errors.md`.
        http_status: What an HTTP API answers when it lets this error through.
        hint: What to do about it; empty when there is nothing to add.
        retryable: Whether the same call, unchanged, can succeed later.
        details: Facts for programs (names, states, versions); JSON-compatible and free of secrets.
    """

    code: ClassVar[str] = "control-plane"
    http_status: ClassVar[int] = 500
    default_hint: ClassVar[str] = ""
    default_retryable: ClassVar[bool] = False

    hint: str
    retryable: bool
    details: Mapping[str, Any]

    def __init__(
        self,
        message: str | None = None,
        *,
        hint: str | None = None,
        details: Mapping[str, Any] | None = None,
        retryable: bool | None = None,
    ) -> None:
        """Build the error; what is left out comes from the class (the docstring's first line is its message)."""
        self.hint = hint if hint is not None else self.default_hint
        self.retryable = retryable if retryable is not None else self.default_retryable
        self.details = dict(details or {})
        super().__init__(message if message is not None else _first_line(type(self)))

    @property
    def message(self) -> str:
        """What is wrong, in one sentence, without a full stop."""
        return str(self.args[0])

    def __str__(self) -> str:
        if not self.hint:
            return self.message
        return f"{self.message}{'' if self.message.endswith(('.', '!', '?', ':')) else '.'} {self.hint}"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message,), self.__dict__


class ConfigurationError(ControlPlaneError, ValueError):
    """A setting is missing or wrong."""

    code = "configuration"


class DirectConnectionRequiredError(ConfigurationError):
    """This needs a connection of its own to the server, and there is a connection pooler in between."""

    code = "direct-connection-required"
    default_hint = (
        "Set direct_database_url (CAR_CONTROL_PLANE_DIRECT_DATABASE_URL) to a connection string that leads to the server itself: "
        "docs/how-to/behind-pgbouncer.md."
    )


class MissingExtraError(ControlPlaneError, ImportError):
    """An optional dependency is not installed."""

    code = "missing-extra"


class ConnectionUnavailableError(ControlPlaneError):
    """The database cannot be reached, or the connection to it was lost."""

    code = "connection-unavailable"
    http_status = 503
    default_retryable = True
    default_hint = (
        "Check that the server runs and that host and port are right; a lost connection is worth another try."
    )


class PoolTimeoutError(ConnectionUnavailableError, TimeoutError):
    """No connection of the pool came free in time."""

    code = "pool-timeout"
    default_hint = (
        "Hold sessions for less long, do not open one session inside another, or raise pool_size and max_overflow."
    )


class OutcomeUnknownError(ControlPlaneError):
    """The connection was lost during COMMIT, and whether it was done could not be found out in time."""

    code = "outcome-unknown"
    http_status = 504
    default_retryable = True
    default_hint = (
        'Run the same unit again with details["operation_id"] as operation_id: what was done is not done twice.'
    )


class StatementTimeoutError(ControlPlaneError, TimeoutError):
    """A statement ran longer than it may and was ended; its transaction is rolled back."""

    code = "statement-timeout"
    http_status = 504
    default_hint = "Ask for less at once, or raise statement_timeout_seconds."


class ClosedError(ControlPlaneError, RuntimeError):
    """The connection manager is closed."""

    code = "closed"
    default_hint = "A closed manager is not reopened: make a new one."


class WrongEventLoopError(ControlPlaneError, RuntimeError):
    """The connection manager belongs to another event loop: the one that used it first."""

    code = "wrong-event-loop"
    default_hint = "Make one manager for each event loop (each thread, each asyncio.run), inside of it."


class SchemaError(ControlPlaneError):
    """The database schema is not what this version of the library needs."""

    code = "schema"
    http_status = 503


class SchemaMissingError(SchemaError):
    """relation does not exist"""  # noqa: D415 -- the seed guide's sentence, word for word

    code = "schema-missing"
    default_hint = "Run migrations: alembic upgrade head (or: car-cp db upgrade)."


class SchemaOutdatedError(SchemaError):
    """The schema's revision is not the one this version of the library was made for."""

    code = "schema-outdated"
    default_hint = "Schema behind the code: run `alembic upgrade head`. Schema ahead of the code: upgrade the library."


class PermissionDeniedError(SchemaError):
    """permission denied"""  # noqa: D415 -- the seed guide's sentence, word for word

    code = "permission-denied"
    http_status = 500
    default_hint = (
        "Ensure your database user has: CREATE SCHEMA permission, CREATE TABLE permission, CREATE TYPE permission (for enums) to migrate; "
        "USAGE on schema control_plane and SELECT, INSERT, UPDATE, DELETE on its tables to work."
    )


class NotFoundError(ControlPlaneError, LookupError):
    """There is no such row."""

    code = "not-found"
    http_status = 404


class TenantNotFoundError(NotFoundError):
    """There is no such tenant."""

    code = "tenant-not-found"


class TenantDatabaseNotFoundError(NotFoundError):
    """There is no such tenant database."""

    code = "tenant-database-not-found"


class ConfigKeyNotFoundError(NotFoundError):
    """There is no such configuration key."""

    code = "config-key-not-found"


class ConflictError(ControlPlaneError):
    """The change conflicts with the stored state; nothing was written."""

    code = "conflict"
    http_status = 409


class AlreadyExistsError(ConflictError):
    """A row with this key or name exists already; nothing was written."""

    code = "already-exists"


class StillReferencedError(ConflictError):
    """Other rows still refer to this one; nothing was deleted."""

    code = "still-referenced"


class StaleWriteError(ConflictError):
    """The row has changed since it was read; nothing was written."""

    code = "stale-write"
    default_retryable = True
    default_hint = "Read the row again, decide again, and write with its new version."


class ProtectedError(ConflictError):
    """This row is protected; nothing was written."""

    code = "protected"


class InvalidDataError(ControlPlaneError, ValueError):
    """A value is not acceptable; nothing was written."""

    code = "invalid-data"
    http_status = 422


class InvalidTransitionError(InvalidDataError):
    """The tenant's status cannot change like that; nothing was written."""

    code = "invalid-transition"
    http_status = 409


class AccessDeniedError(ControlPlaneError):
    """This is not permitted."""

    code = "access-denied"
    http_status = 403


class TenantUnavailableError(AccessDeniedError):
    """The tenant may not be used now."""

    code = "tenant-unavailable"


class EncryptionError(ControlPlaneError):
    """A secret could not be sealed or opened."""

    code = "encryption"


class KeyUnavailableError(EncryptionError):
    """The keys cannot be had now: the service that keeps them does not answer."""

    code = "key-unavailable"
    http_status = 503
    default_retryable = True


class UnknownKeyError(EncryptionError):
    """The value is sealed with a key this process does not have."""

    code = "unknown-key"


class DecryptionError(EncryptionError):
    """The sealed value is damaged, belongs to another row, or was sealed with another key."""

    code = "decryption"
    default_hint = "If `car-cp key status` says that the key is right, somebody has changed the row."


class ProvisioningError(ControlPlaneError):
    """A tenant database could not be created, rotated or removed."""

    code = "provisioning"


class MigrationError(ControlPlaneError):
    """A migration failed; its transaction is rolled back."""

    code = "migration"


class FleetMigrationError(MigrationError, ExceptionGroup[Exception]):
    """Some tenant databases could not be migrated; the others were."""

    code = "fleet-migration"

    # An exception group takes its parts in __new__, so both constructors see all arguments.
    def __new__(cls, message: str | None = None, errors: Sequence[Exception] = (), **_: Any) -> Self:
        """Build the group; needs at least one error."""
        return super().__new__(cls, message if message is not None else _first_line(cls), errors)

    def __init__(self, message: str | None = None, errors: Sequence[Exception] = (), **more: Any) -> None:
        """Build the error; `errors` are its parts, available as `exceptions`."""
        del errors
        super().__init__(message, **more)

    def derive(self, excs: Sequence[Exception], /) -> "FleetMigrationError":  # type: ignore[override]  # one kind, not any
        """Build a group of the same kind around some of the parts (what `except*` does)."""
        return FleetMigrationError(self.message, excs, hint=self.hint, details=self.details, retryable=self.retryable)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.exceptions), self.__dict__


class ChangeFeedError(ControlPlaneError):
    """Changes could not be followed."""

    code = "change-feed"


def _first_line(cls: type) -> str:
    return (cls.__doc__ or cls.__name__).splitlines()[0].removesuffix(".")


def translate(error: BaseException, *, io: bool = False) -> ControlPlaneError | None:
    """Turn a driver's or SQLAlchemy's error into ours, or return None when it is not one we know.

    Reads SQLSTATE, constraint name and class; never message text, which is localised and may hold a row. Raise the result outside of the
    `except` block. Never raises by itself.

    Args:
        error: Anything raised while talking to PostgreSQL. One of ours comes back as it is. One that is neither SQLAlchemy's, nor asyncpg's, nor the
            system's is its raiser's own, also when it was raised from one of those: it is not translated.
        io: Whether the call did nothing but talk to the server, so that a bare `OSError` or `TimeoutError` means the connection.

    Source: PostgreSQL manual, appendix A "PostgreSQL Error Codes"; `docs/reference/errors.md`.
    """
    if isinstance(error, ControlPlaneError):
        return error
    if type(error).__module__.partition(".")[0] not in _DRIVERS and not isinstance(error, OSError):
        return None  # somebody's own error, whatever it was raised from
    for link in _chain(error):
        if isinstance(
            link, ControlPlaneError
        ):  # a column's type refused the value, which SQLAlchemy's error has among its parameters
            return link.with_traceback(None)
        if isinstance(state := getattr(link, "sqlstate", None), str):
            if (
                type(link).__name__ == "InvalidCachedStatementError"
            ):  # whose SQLSTATE is that of all that is not supported
                return ConflictError(
                    "the schema changed while the transaction was open; nothing was written",
                    hint="Repeat the whole transaction.",
                    retryable=True,
                )
            return _by_sqlstate(state, _constraint(error), error)
    return _by_class(error, io=io)


def refusal(error: BaseException) -> ControlPlaneError | None:
    """Turn what a statement of ours ran into into one of our errors, as `translate` does, and whatever else the server refuses as well.

    Args:
        error: What was raised while the statement ran.

    Returns:
        None for what is not the database's, and for a statement in a transaction that has failed before: what failed first tells more.
    """
    if (known := translate(error, io=True)) is not None:
        return known
    if type(error).__module__.partition(".")[0] in _DRIVERS:
        for link in _chain(error):
            state = getattr(link, "sqlstate", None)
            if isinstance(state, str) and state != _FAILED_BEFORE:
                return ControlPlaneError(
                    f"the server refused the statement (SQLSTATE {state})", details={"sqlstate": state}
                )
    return None


_FAILED_BEFORE = "25P02"
_DRIVERS = frozenset({"sqlalchemy", "asyncpg"})


def _chain(error: BaseException) -> Iterator[BaseException]:
    """SQLAlchemy's error, the adapter's (`orig`), asyncpg's (its cause): whichever of them there are."""
    link: Any = error
    for _ in range(4):
        if not isinstance(link, BaseException):
            return
        yield link
        link = getattr(link, "orig", None) or link.__cause__


def _constraint(error: BaseException) -> tuple[str | None, BaseException]:
    for link in _chain(error):
        if isinstance(name := getattr(link, "constraint_name", None), str):
            return name, link
    return None, error


_CONSTRAINTS: dict[str, tuple[type[ControlPlaneError], str]] = {
    "pk_tenants": (AlreadyExistsError, "a tenant with this id exists already"),
    "uq_tenants_name": (AlreadyExistsError, "a tenant with this name exists already"),
    "pk_tenant_databases": (AlreadyExistsError, "a tenant database with this id exists already"),
    "uq_tenant_databases_tenant_id_purpose": (
        AlreadyExistsError,
        "the tenant already has a database for this purpose",
    ),
    "pk_system_config": (AlreadyExistsError, "this configuration key exists already"),
    "fk_tenant_databases_tenant_id_tenants": (TenantNotFoundError, "there is no such tenant"),
    "ck_tenants_status_transition": (InvalidTransitionError, "the tenant's status cannot change like that"),
    "ck_tenants_system_admin": (ProtectedError, "the tenant system_admin is protected"),
    "ck_control_plane_identity": (
        InvalidDataError,
        "the identity of a row cannot be changed: its key, and the tenant a database belongs to",
    ),
    "ck_tenant_databases_sealed": (
        InvalidDataError,
        "the connection string is not sealed: the column takes ccp1:… only",
    ),
    "ck_tenant_databases_destroyed_key": (
        UnknownKeyError,
        "the connection string is sealed with a key that was destroyed; nothing was written",
    ),
    "pk_encryption_keys": (AlreadyExistsError, "an encryption key with this id exists already"),
    "uq_encryption_keys_current": (ConflictError, "another encryption key is current; nothing was written"),
    "ck_encryption_keys_state_transition": (ConflictError, "the key's state cannot change like that"),
    "ck_encryption_keys_in_use": (
        StillReferencedError,
        "tenant databases are still sealed with this key; nothing was written",
    ),
    "ck_encryption_keys_isolation": (
        ConflictError,
        "a key is deleted or destroyed in a READ COMMITTED transaction only; nothing was written",
    ),
    "ck_control_plane_truncate": (ProtectedError, "tables of the control plane cannot be truncated"),
}

_STATES: dict[str, tuple[type[ControlPlaneError], str | None, str | None]] = {
    "22000": (InvalidDataError, "a value does not fit its column", None),  # asyncpg's own, before anything was sent
    "23502": (InvalidDataError, "a required value is missing", None),
    "23503": (ConflictError, "the row refers to one that does not exist", None),
    "23505": (AlreadyExistsError, None, None),
    "23514": (InvalidDataError, None, None),
    "25006": (
        ConnectionUnavailableError,
        "the server takes no writes: it is a standby, or the transaction is read-only",
        "Connect to the primary (several hosts and target_session_attrs=read-write); write in get_session(), not get_read_session().",
    ),
    "28000": (
        ConfigurationError,
        "the server refuses this user",
        "Check the user in DATABASE_URL and the server's pg_hba.conf.",
    ),
    "28P01": (
        ConfigurationError,
        "password authentication failed",
        "Check user and password in DATABASE_URL; percent-encode special characters (@ is %40).",
    ),
    "3D000": (ConfigurationError, "the database does not exist", "Create it first: CREATE DATABASE control_plane;"),
    "3F000": (
        SchemaMissingError,
        "schema 'control_plane' does not exist",
        "Run migrations: alembic upgrade head. They create it; if not: CREATE SCHEMA control_plane;",
    ),
    "40001": (ConflictError, "the transaction conflicts with another one", "Repeat the whole transaction."),
    "40P01": (ConflictError, "the transaction and another one wait for each other", "Repeat the whole transaction."),
    "42501": (PermissionDeniedError, None, None),
    "42P01": (SchemaMissingError, None, None),
    "42703": (SchemaOutdatedError, None, None),
    "42704": (SchemaOutdatedError, None, None),
    "42883": (SchemaOutdatedError, None, None),
    "53300": (
        ConnectionUnavailableError,
        "the server has no connection left",
        "Lower the pool sizes of its clients, or raise max_connections.",
    ),
    "55P03": (
        ConflictError,
        "another transaction holds the lock for too long",
        "Try again, or raise lock_timeout_seconds.",
    ),
    "57014": (StatementTimeoutError, None, None),
}
_RETRYABLE_STATES = frozenset({"40001", "40P01", "55P03"})
_CLASSES: dict[str, type[ControlPlaneError]] = {
    "08": ConnectionUnavailableError,
    "22": InvalidDataError,
    "54": InvalidDataError,  # program limits: too many columns, a value nested too deeply
}
_CONNECTION_STATES = frozenset({"57P01", "57P02", "57P03", "57P04", "57P05", "25P03"})
_DELETE = re.compile(r"\bDELETE\s+FROM\b", re.IGNORECASE)


def _by_sqlstate(
    state: str, constraint: tuple[str | None, BaseException], error: BaseException
) -> ControlPlaneError | None:
    name, holder = constraint
    details: dict[str, Any] = {"sqlstate": state} | ({"constraint": name} if name else {})
    if state == "23001" or (state == "23503" and _deletes(error)):
        return StillReferencedError(details=details)
    if name in _CONSTRAINTS:
        kind, message = _CONSTRAINTS[name]
        if kind is InvalidTransitionError:
            return _transition(message, details, holder)
        return kind(message, details=details)
    if state in _STATES:
        kind, text, hint = _STATES[state]
        return kind(text, hint=hint, details=details, retryable=True if state in _RETRYABLE_STATES else None)
    if state in _CONNECTION_STATES:
        return ConnectionUnavailableError(details=details)
    by_class = _CLASSES.get(state[:2])
    return by_class(details=details) if by_class else None


def _deletes(error: BaseException) -> bool:
    """Whether the statement deletes: up to PostgreSQL 17 both sides of a foreign key are refused with one SQLSTATE and one constraint name."""
    for link in _chain(error):
        sql = getattr(link, "statement", None) or getattr(link, "query", None)  # SQLAlchemy's name, asyncpg's name
        if isinstance(sql, str):
            return _DELETE.search(sql) is not None
    return False


def _transition(message: str, details: dict[str, Any], holder: BaseException) -> InvalidTransitionError:
    """Name both states. The one DETAIL that is read: our own trigger writes it, as JSON with two enum values."""
    try:
        states = json.loads(getattr(holder, "detail", None) or "")
        source, target = str(states["from"]), str(states["to"])
    except (ValueError, TypeError, KeyError):
        return InvalidTransitionError(message, details=details)
    return InvalidTransitionError(
        f"a tenant cannot change from {source} to {target}", details=details | {"from": source, "to": target}
    )


def _by_class(error: BaseException, *, io: bool) -> ControlPlaneError | None:
    """Errors without an SQLSTATE: SQLAlchemy's own, and a driver that lost its connection. Told by class, so that nothing is imported."""
    names = {(cls.__module__.partition(".")[0], cls.__name__) for link in _chain(error) for cls in type(link).__mro__}
    if ("sqlalchemy", "StaleDataError") in names:
        return StaleWriteError()
    if ("sqlalchemy", "TimeoutError") in names:
        return PoolTimeoutError()
    if ("asyncpg", "ClientConfigurationError") in names:
        return ConfigurationError("the connection string asks for something the driver cannot do")
    lost = getattr(error, "connection_invalidated", False) or ("asyncpg", "InternalClientError") in names
    # Without `io`, an InterfaceError on a live connection is a mistake in the program, such as two tasks using one session: not ours to translate.
    if lost or (io and (isinstance(error, OSError) or ("asyncpg", "InterfaceError") in names)):
        return ConnectionUnavailableError()
    return None
