"""The error tree as callers rely on it, and what `translate` makes of the driver's errors.

The errors here are objects of SQLAlchemy's and asyncpg's own classes, built as those libraries build them. `tests/integration/test_errors_in_database.py`
provokes the same ones in a server.
"""

import copy
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import asyncpg
import pytest
from asyncpg import InterfaceError as DriverInterfaceError
from asyncpg.exceptions import ClientConfigurationError, InternalClientError, TargetServerAttributeNotMatched
from sqlalchemy import exc as sa
from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_dbapi as Adapter
from sqlalchemy.orm.exc import StaleDataError

from car_control_plane import errors
from car_control_plane.errors import (
    AccessDeniedError,
    AlreadyExistsError,
    ChangeFeedError,
    ClosedError,
    ConfigKeyNotFoundError,
    ConfigurationError,
    ConflictError,
    ConnectionUnavailableError,
    ControlPlaneError,
    DecryptionError,
    DirectConnectionRequiredError,
    EncryptionError,
    FleetMigrationError,
    InvalidDataError,
    InvalidTransitionError,
    KeyUnavailableError,
    MigrationError,
    MissingExtraError,
    NotFoundError,
    OutcomeUnknownError,
    PermissionDeniedError,
    PoolTimeoutError,
    ProtectedError,
    ProvisioningError,
    SchemaError,
    SchemaMissingError,
    SchemaOutdatedError,
    StaleWriteError,
    StatementTimeoutError,
    StillReferencedError,
    TenantDatabaseNotFoundError,
    TenantNotFoundError,
    TenantUnavailableError,
    UnknownKeyError,
    WrongEventLoopError,
    refusal,
    translate,
)

CANARY = "c4n4ry-s3cr3t"

# class: parent, the builtin a caller would guess, code, HTTP status, retryable
TREE: dict[type[ControlPlaneError], tuple[type[Exception], type[Exception] | None, str, int, bool]] = {
    ControlPlaneError: (Exception, None, "control-plane", 500, False),
    ConfigurationError: (ControlPlaneError, ValueError, "configuration", 500, False),
    DirectConnectionRequiredError: (ConfigurationError, None, "direct-connection-required", 500, False),
    MissingExtraError: (ControlPlaneError, ImportError, "missing-extra", 500, False),
    ConnectionUnavailableError: (ControlPlaneError, None, "connection-unavailable", 503, True),
    PoolTimeoutError: (ConnectionUnavailableError, TimeoutError, "pool-timeout", 503, True),
    StatementTimeoutError: (ControlPlaneError, TimeoutError, "statement-timeout", 504, False),
    ClosedError: (ControlPlaneError, RuntimeError, "closed", 500, False),
    SchemaError: (ControlPlaneError, None, "schema", 503, False),
    SchemaMissingError: (SchemaError, None, "schema-missing", 503, False),
    SchemaOutdatedError: (SchemaError, None, "schema-outdated", 503, False),
    PermissionDeniedError: (SchemaError, None, "permission-denied", 500, False),
    NotFoundError: (ControlPlaneError, LookupError, "not-found", 404, False),
    TenantNotFoundError: (NotFoundError, None, "tenant-not-found", 404, False),
    TenantDatabaseNotFoundError: (NotFoundError, None, "tenant-database-not-found", 404, False),
    ConfigKeyNotFoundError: (NotFoundError, None, "config-key-not-found", 404, False),
    ConflictError: (ControlPlaneError, None, "conflict", 409, False),
    AlreadyExistsError: (ConflictError, None, "already-exists", 409, False),
    StillReferencedError: (ConflictError, None, "still-referenced", 409, False),
    StaleWriteError: (ConflictError, None, "stale-write", 409, True),
    ProtectedError: (ConflictError, None, "protected", 409, False),
    InvalidDataError: (ControlPlaneError, ValueError, "invalid-data", 422, False),
    InvalidTransitionError: (InvalidDataError, None, "invalid-transition", 409, False),
    AccessDeniedError: (ControlPlaneError, None, "access-denied", 403, False),
    TenantUnavailableError: (AccessDeniedError, None, "tenant-unavailable", 403, False),
    EncryptionError: (ControlPlaneError, None, "encryption", 500, False),
    KeyUnavailableError: (EncryptionError, None, "key-unavailable", 503, True),
    OutcomeUnknownError: (ControlPlaneError, None, "outcome-unknown", 504, True),
    WrongEventLoopError: (ControlPlaneError, RuntimeError, "wrong-event-loop", 500, False),
    UnknownKeyError: (EncryptionError, None, "unknown-key", 500, False),
    DecryptionError: (EncryptionError, None, "decryption", 500, False),
    ProvisioningError: (ControlPlaneError, None, "provisioning", 500, False),
    MigrationError: (ControlPlaneError, None, "migration", 500, False),
    FleetMigrationError: (MigrationError, ExceptionGroup, "fleet-migration", 500, False),
    ChangeFeedError: (ControlPlaneError, None, "change-feed", 500, False),
}
each_class = pytest.mark.parametrize("cls", TREE, ids=lambda cls: cls.__name__)


def make(cls: type[ControlPlaneError], *args: Any, **more: Any) -> ControlPlaneError:
    """Build an error of any class; only a group needs parts."""
    if issubclass(cls, FleetMigrationError):
        return cls(args[0] if args else None, [ValueError("one")], **more)
    return cls(*args, **more)


# --- the tree ---------------------------------------------------------------------------------------------------------


def classes(cls: type[ControlPlaneError]) -> Iterator[type[ControlPlaneError]]:
    yield cls
    for below in cls.__subclasses__():
        yield from classes(below)


def test_every_class_is_described_here() -> None:
    ours = {cls for cls in classes(ControlPlaneError) if cls.__module__ == errors.__name__}
    assert ours == set(TREE)


@each_class
def test_a_class_has_its_parent_its_builtin_and_its_attributes(cls: type[ControlPlaneError]) -> None:
    parent, builtin, code, http_status, retryable = TREE[cls]
    assert cls.__bases__[0] is parent
    assert [base.__name__ for base in cls.__bases__[1:]] == ([builtin.__name__] if builtin else [])
    assert (cls.code, cls.http_status, cls.default_retryable) == (code, http_status, retryable)


def test_codes_are_unique() -> None:
    assert len({cls.code for cls in TREE}) == len(TREE)


@each_class
def test_an_error_without_arguments_says_what_its_class_says(cls: type[ControlPlaneError]) -> None:
    error = make(cls)
    assert cls.__doc__ is not None
    assert error.message == cls.__doc__.splitlines()[0].removesuffix(".")
    assert error.hint == cls.default_hint
    assert error.retryable is cls.default_retryable
    assert error.details == {}


def test_a_class_without_a_docstring_says_its_name() -> None:
    nameless = type("NamelessError", (ControlPlaneError,), {})
    assert nameless().message == "NamelessError"


@each_class
def test_what_is_given_wins_over_the_class(cls: type[ControlPlaneError]) -> None:
    error = make(cls, "this", hint="that", details={"key": 1}, retryable=not cls.default_retryable)
    assert error.message == "this"
    assert str(error) == "this. that"
    assert error.details == {"key": 1}
    assert error.retryable is not cls.default_retryable


@each_class
def test_an_empty_message_or_hint_is_not_replaced(cls: type[ControlPlaneError]) -> None:
    error = make(cls, "", hint="")
    assert (error.message, error.hint) == ("", "")


@pytest.mark.parametrize(
    ("message", "hint", "text"),
    [
        ("no tenant", "", "no tenant"),
        ("no tenant", "Look again.", "no tenant. Look again."),
        ("No tenant!", "Look again.", "No tenant! Look again."),
        ("Tenant?", "Look again.", "Tenant? Look again."),
        ("Done.", "Look again.", "Done. Look again."),
        ("Known tenants:", "none", "Known tenants: none"),
    ],
)
def test_the_text_is_the_message_and_the_hint(message: str, hint: str, text: str) -> None:
    assert str(ControlPlaneError(message, hint=hint)) == text


def test_details_are_the_errors_own() -> None:
    given = {"key": 1}
    error = ControlPlaneError(details=given)
    given["key"] = 2
    assert error.details == {"key": 1}


@pytest.mark.parametrize(
    ("cls", "text"),
    [
        (SchemaMissingError, "relation does not exist. Run migrations: alembic upgrade head"),
        (PermissionDeniedError, "permission denied. Ensure your database user has: CREATE SCHEMA permission"),
    ],
)
def test_the_seeds_sentences_begin_the_text(cls: type[ControlPlaneError], text: str) -> None:
    assert str(cls()).startswith(text)


# --- across processes -------------------------------------------------------------------------------------------------

protocols = pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))


def facts(error: ControlPlaneError) -> tuple[Any, ...]:
    notes = getattr(error, "__notes__", [])
    return type(error), error.message, error.hint, error.details, error.retryable, str(error), error.args, notes


@each_class
@protocols
def test_an_error_pickles_whole(cls: type[ControlPlaneError], protocol: int) -> None:
    error = make(cls, "this", hint="that", details={"states": ["a", "b"]}, retryable=not cls.default_retryable)
    error.add_note("on host one")
    arrived = pickle.loads(pickle.dumps(error, protocol))
    assert facts(arrived) == facts(error)


@each_class
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_an_error_copies_whole(cls: type[ControlPlaneError], copied: Any) -> None:
    error = make(cls, "this", details={"key": 1})
    assert facts(copied(error)) == facts(error)


def test_a_group_pickles_with_its_parts() -> None:
    parts = [TenantNotFoundError("acme", details={"name": "acme"}), FleetMigrationError("inner", [ValueError("x")])]
    arrived = pickle.loads(pickle.dumps(FleetMigrationError("outer", parts)))
    assert isinstance(arrived, FleetMigrationError)
    first, second = arrived.exceptions
    assert isinstance(first, TenantNotFoundError)
    assert facts(first) == facts(parts[0])
    assert isinstance(second, FleetMigrationError)
    assert repr(second.exceptions) == repr((ValueError("x"),))


# --- the group --------------------------------------------------------------------------------------------------------


def group() -> FleetMigrationError:
    parts: Sequence[Exception] = [ValueError("one"), TenantNotFoundError("two"), TypeError("three")]
    return FleetMigrationError("3 of 9 failed", parts, hint="Again.", details={"failed": 3}, retryable=True)


def test_a_group_without_parts_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="non-empty sequence"):
        FleetMigrationError("nothing failed")


def test_a_group_says_what_its_class_says() -> None:
    assert FleetMigrationError(errors=[ValueError("x")]).message.startswith("Some tenant databases could not be")


def test_a_part_of_a_group_is_of_the_same_kind() -> None:
    whole = group()
    whole.add_note("note")
    some, rest = whole.split(ValueError)
    assert some is not None
    assert rest is not None
    assert [str(part) for part in some.exceptions] == ["one"]
    assert [str(part) for part in rest.exceptions] == ["two", "three"]
    for part in (some, rest):
        assert isinstance(part, FleetMigrationError)
        assert facts(part) == facts(whole)


def test_except_star_takes_parts_and_leaves_the_rest() -> None:
    caught: list[ExceptionGroup[ValueError]] = []

    def handle() -> None:
        try:
            raise group()
        except* ValueError as found:
            caught.append(found)

    with pytest.raises(FleetMigrationError) as left:
        handle()
    assert [repr(part) for one in caught for part in one.exceptions] == ["ValueError('one')"]
    assert isinstance(caught[0], FleetMigrationError)
    assert [str(part) for part in left.value.exceptions] == ["two", "three"]
    assert facts(left.value) == facts(group())


def test_except_star_takes_the_group_whole_by_its_own_class() -> None:
    caught: list[ExceptionGroup[Any]] = []
    try:
        raise group()
    except* ControlPlaneError as found:
        caught.append(found)
    assert [len(one.exceptions) for one in caught] == [3]


def test_a_plain_except_catches_the_group_as_a_migration_error() -> None:
    with pytest.raises(MigrationError, match="3 of 9 failed") as caught:
        raise group()
    assert caught.value.details == {"failed": 3}


# --- translate: the driver's errors -----------------------------------------------------------------------------------


def driver_error(state: str, *, query: str | None = None, **fields: str) -> asyncpg.PostgresError:
    """Build asyncpg's error for a message of the server, as asyncpg does."""
    names = {"constraint": "n", "detail": "D", "hint": "H", "table": "t", "column": "c"}
    message = {"S": "ERROR", "V": "ERROR", "C": state, "M": f"{CANARY} refused", "D": f"Key (name)=({CANARY}) exists."}
    return asyncpg.PostgresError.new(message | {names[name]: text for name, text in fields.items()}, query)


def through_sqlalchemy(error: Exception, statement: str | None = None, *, lost: bool = False) -> sa.DBAPIError:
    """Wrap a driver's error the way SQLAlchemy's dialect and engine do."""
    kind = Adapter.InterfaceError if isinstance(error, DriverInterfaceError) else Adapter.Error
    adapted = kind(str(error), error)  # type: ignore[no-untyped-call]  # SQLAlchemy leaves its adapter untyped
    adapted.__cause__ = error
    wrapper = sa.InterfaceError if kind is Adapter.InterfaceError else sa.IntegrityError
    return wrapper(statement, {"name": CANARY}, adapted, hide_parameters=False, connection_invalidated=lost)


def both_ways(state: str, *, statement: str | None = None, **fields: str) -> list[ControlPlaneError | None]:
    """Translate an error as the direct connection and as SQLAlchemy raise it."""
    bare = driver_error(state, query=statement, **fields)
    return [translate(bare), translate(through_sqlalchemy(bare, statement))]


def told(error: ControlPlaneError) -> str:
    """Return everything an error shows or carries."""
    return "\n".join([str(error), repr(error), error.hint, repr(error.details), repr(vars(error)), repr(error.args)])


KNOWN_STATES: list[tuple[str, type[ControlPlaneError], str]] = [
    ("08000", ConnectionUnavailableError, "cannot be reached"),
    ("08003", ConnectionUnavailableError, "cannot be reached"),
    ("08006", ConnectionUnavailableError, "cannot be reached"),
    ("22000", InvalidDataError, "does not fit its column"),
    ("22001", InvalidDataError, "not acceptable"),
    ("22021", InvalidDataError, "not acceptable"),
    ("22P02", InvalidDataError, "not acceptable"),
    ("22P05", InvalidDataError, "not acceptable"),
    ("23001", StillReferencedError, "still refer"),
    ("23502", InvalidDataError, "required value is missing"),
    ("23503", ConflictError, "does not exist"),
    ("23505", AlreadyExistsError, "exists already"),
    ("23514", InvalidDataError, "not acceptable"),
    ("25006", ConnectionUnavailableError, "takes no writes"),
    ("25P03", ConnectionUnavailableError, "cannot be reached"),
    ("28000", ConfigurationError, "refuses this user"),
    ("28P01", ConfigurationError, "password authentication failed"),
    ("3D000", ConfigurationError, "CREATE DATABASE control_plane;"),
    ("3F000", SchemaMissingError, "schema 'control_plane' does not exist"),
    ("40001", ConflictError, "Repeat the whole transaction"),
    ("40P01", ConflictError, "Repeat the whole transaction"),
    ("42501", PermissionDeniedError, "permission denied"),
    ("42703", SchemaOutdatedError, "alembic upgrade head"),
    ("42704", SchemaOutdatedError, "alembic upgrade head"),
    ("42883", SchemaOutdatedError, "alembic upgrade head"),
    ("42P01", SchemaMissingError, "relation does not exist"),
    ("53300", ConnectionUnavailableError, "max_connections"),
    ("54001", InvalidDataError, "not acceptable"),
    ("55P03", ConflictError, "holds the lock"),
    ("57014", StatementTimeoutError, "longer than it may"),
    ("57P01", ConnectionUnavailableError, "cannot be reached"),
    ("57P02", ConnectionUnavailableError, "cannot be reached"),
    ("57P03", ConnectionUnavailableError, "cannot be reached"),
    ("57P04", ConnectionUnavailableError, "cannot be reached"),
    ("57P05", ConnectionUnavailableError, "cannot be reached"),
]


@pytest.mark.parametrize(("state", "cls", "text"), KNOWN_STATES, ids=[state for state, *_ in KNOWN_STATES])
def test_a_known_sqlstate_becomes_one_of_ours(state: str, cls: type[ControlPlaneError], text: str) -> None:
    for error in both_ways(state, table="tenants", column="name"):
        assert type(error) is cls
        assert text in str(error)
        assert error.details == {"sqlstate": state}
        assert error.retryable is (state in {"40001", "40P01", "55P03"} or cls.default_retryable)


@pytest.mark.parametrize("state", ["00000", "0A000", "25P02", "42601", "42P07", "58030", "P0001", "XX000", "ZZ999"])
def test_an_unknown_sqlstate_is_left_alone(state: str) -> None:
    assert both_ways(state) == [None, None]


CONSTRAINTS: list[tuple[str, str, type[ControlPlaneError], str]] = [
    ("23505", "pk_tenants", AlreadyExistsError, "a tenant with this id exists already"),
    ("23505", "uq_tenants_name", AlreadyExistsError, "a tenant with this name exists already"),
    ("23505", "pk_tenant_databases", AlreadyExistsError, "a tenant database with this id exists already"),
    (
        "23505",
        "uq_tenant_databases_tenant_id_purpose",
        AlreadyExistsError,
        "the tenant already has a database for this purpose",
    ),
    ("23505", "pk_system_config", AlreadyExistsError, "this configuration key exists already"),
    ("23503", "fk_tenant_databases_tenant_id_tenants", TenantNotFoundError, "there is no such tenant"),
    ("23514", "ck_tenants_system_admin", ProtectedError, "the tenant system_admin is protected"),
    (
        "23514",
        "ck_control_plane_identity",
        InvalidDataError,
        "the identity of a row cannot be changed: its key, and the tenant a database belongs to",
    ),
    ("23514", "ck_control_plane_truncate", ProtectedError, "tables of the control plane cannot be truncated"),
    (
        "23514",
        "ck_tenants_status_transition",
        InvalidTransitionError,
        "the tenant's status cannot change like that",
    ),
    (
        "23514",
        "ck_tenant_databases_sealed",
        InvalidDataError,
        "the connection string is not sealed: the column takes ccp1:… only",
    ),
    (
        "23514",
        "ck_tenant_databases_destroyed_key",
        UnknownKeyError,
        "the connection string is sealed with a key that was destroyed; nothing was written",
    ),
    ("23505", "pk_encryption_keys", AlreadyExistsError, "an encryption key with this id exists already"),
    ("23505", "uq_encryption_keys_current", ConflictError, "another encryption key is current; nothing was written"),
    ("23514", "ck_encryption_keys_state_transition", ConflictError, "the key's state cannot change like that"),
    (
        "23514",
        "ck_encryption_keys_in_use",
        StillReferencedError,
        "tenant databases are still sealed with this key; nothing was written",
    ),
    (
        "25000",
        "ck_encryption_keys_isolation",
        ConflictError,
        "a key is deleted or destroyed in a READ COMMITTED transaction only; nothing was written",
    ),
    ("23514", "ck_tenants_name", InvalidDataError, "A value is not acceptable; nothing was written"),
]


@pytest.mark.parametrize(("state", "name", "cls", "message"), CONSTRAINTS, ids=[name for _, name, *_ in CONSTRAINTS])
def test_a_constraint_says_more_than_its_sqlstate(
    state: str, name: str, cls: type[ControlPlaneError], message: str
) -> None:
    for error in both_ways(state, constraint=name):
        assert type(error) is cls
        assert error.message == message
        assert error.details == {"sqlstate": state, "constraint": name}


def test_every_constraint_with_words_of_its_own_is_tested_here() -> None:
    assert set(errors._CONSTRAINTS) <= {name for _, name, *_ in CONSTRAINTS}
    assert set(errors._STATES) <= {state for state, *_ in KNOWN_STATES}


FOREIGN_KEY = "fk_tenant_databases_tenant_id_tenants"


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM control_plane.tenants WHERE tenant_id = $1",
        "\n  delete\tfrom control_plane.tenants",
        "/* from a comment */ DELETE FROM control_plane.tenants",
        "WITH gone AS (DELETE FROM control_plane.tenants RETURNING *) SELECT count(*) FROM gone",
    ],
)
@pytest.mark.parametrize("name", [FOREIGN_KEY, "fk_of_another_table"])
def test_deleting_what_others_refer_to_is_told_by_the_statement(statement: str, name: str) -> None:
    """Up to PostgreSQL 17 both sides of a foreign key share SQLSTATE 23503 and the constraint's name."""
    for error in both_ways("23503", constraint=name, statement=statement):
        assert type(error) is StillReferencedError


def test_deleting_what_others_refer_to_has_an_sqlstate_from_postgresql_18() -> None:
    for error in both_ways("23001", constraint=FOREIGN_KEY):
        assert type(error) is StillReferencedError


@pytest.mark.parametrize(
    "statement",
    ["INSERT INTO control_plane.tenant_databases (deleted) VALUES ($1)", "UPDATE deletes SET x = 1", "", None],
)
def test_any_other_statement_refers_to_what_does_not_exist(statement: str | None) -> None:
    for error in both_ways("23503", constraint=FOREIGN_KEY, statement=statement):
        assert type(error) is TenantNotFoundError


def test_a_refused_transition_names_both_states() -> None:
    detail = '{"from": "pending", "to": "suspended"}'
    for error in both_ways("23514", constraint="ck_tenants_status_transition", detail=detail):
        assert type(error) is InvalidTransitionError
        assert error.message == "a tenant cannot change from pending to suspended"
        assert error.details["from"] == "pending"
        assert error.details["to"] == "suspended"
        assert error.details["sqlstate"] == "23514"


@pytest.mark.parametrize(
    "detail",
    ["", "Failing row contains (c4n4ry-s3cr3t).", "{}", '{"from": "pending"}', "null", "5", '["from", "to"]', '"x"'],
)
def test_a_detail_that_is_not_our_triggers_is_not_shown(detail: str) -> None:
    for error in both_ways("23514", constraint="ck_tenants_status_transition", detail=detail):
        assert type(error) is InvalidTransitionError
        assert error.message == "the tenant's status cannot change like that"
        assert set(error.details) == {"sqlstate", "constraint"}


@pytest.mark.parametrize("state", [state for state, *_ in KNOWN_STATES])
@pytest.mark.parametrize("constraint", [None, "ck_tenants_status_transition", "some_constraint"])
def test_nothing_the_server_or_the_caller_wrote_is_shown(state: str, constraint: str | None) -> None:
    fields = {"hint": CANARY, "table": CANARY, "column": CANARY} | ({"constraint": constraint} if constraint else {})
    for error in both_ways(state, statement=f"DELETE FROM x WHERE name = '{CANARY}'", **fields):
        assert error is not None
        assert CANARY not in told(error)
        assert CANARY.encode() not in pickle.dumps(error)
        assert error.__cause__ is None
        assert error.__context__ is None


def test_an_error_of_ours_comes_back_as_it_is() -> None:
    error = TenantNotFoundError("acme")
    assert translate(error) is error
    assert translate(error, io=True) is error


@pytest.mark.parametrize("sqlstate", ["57P01", "23505", "40001"])
def test_somebody_elses_error_stays_his_whatever_it_was_raised_from(sqlstate: str) -> None:
    for cause in (driver_error(sqlstate), through_sqlalchemy(driver_error(sqlstate, constraint="uq_tenants_name"))):
        outer = RuntimeError("from the caller's own layer")
        outer.__cause__ = cause
        assert translate(cause) is not None
        assert translate(outer) is None
        assert translate(outer, io=True) is None


class MisleadingError(Exception):
    """Carries what looks like a driver's attributes."""

    sqlstate = 23505
    constraint_name = b"uq_tenants_name"
    statement = 5
    query = b"DELETE FROM x"
    orig = "not an exception"


def test_attributes_of_another_kind_are_not_believed() -> None:
    assert translate(MisleadingError()) is None
    outer = MisleadingError()
    outer.sqlstate = "23503"  # type: ignore[assignment]  # the point of the test
    assert translate(outer) is None


# --- translate: errors without an SQLSTATE ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "cls"),
    [
        (StaleDataError(f"UPDATE statement on table '{CANARY}' expected to update 1 row(s)"), StaleWriteError),
        (sa.TimeoutError(f"QueuePool limit of size 5 overflow 5 reached {CANARY}"), PoolTimeoutError),
        (InternalClientError(f"got result for unknown protocol state {CANARY}"), ConnectionUnavailableError),
        (TargetServerAttributeNotMatched(CANARY), ConnectionUnavailableError),
        (ClientConfigurationError(f"sslmode {CANARY}"), ConfigurationError),
        (
            through_sqlalchemy(DriverInterfaceError(f"connection is closed {CANARY}"), lost=True),
            ConnectionUnavailableError,
        ),
        (through_sqlalchemy(OSError(f"reset {CANARY}"), lost=True), ConnectionUnavailableError),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else type(value).__name__,
)
def test_an_error_without_an_sqlstate_is_told_by_its_class(error: Exception, cls: type[ControlPlaneError]) -> None:
    for found in (translate(error), translate(error, io=True)):
        assert type(found) is cls
        assert CANARY not in told(found)
        assert found.details == {}


@pytest.mark.parametrize(
    "error",
    [
        OSError("no route to host"),
        ConnectionResetError("reset by peer"),
        TimeoutError(),
        DriverInterfaceError("connection is closed"),
        through_sqlalchemy(DriverInterfaceError("another operation is in progress")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_bare_system_error_means_the_connection_only_where_nothing_else_can_fail(error: Exception) -> None:
    assert translate(error) is None
    assert type(translate(error, io=True)) is ConnectionUnavailableError


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        KeyError("sqlstate"),
        sa.InvalidRequestError("x"),
        sa.NoResultFound("x"),
        KeyboardInterrupt(),
        type("TimeoutError", (Exception,), {})(),
        type("StaleDataError", (Exception,), {"__module__": "elsewhere.orm"})(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_somebody_else_is_left_alone(error: BaseException) -> None:
    assert translate(error) is None
    assert translate(error, io=True) is None


# --- refusal ----------------------------------------------------------------------------------------------------------


def test_whatever_the_server_refuses_a_statement_of_ours_is_an_error_of_ours() -> None:
    for error in (driver_error("0A000"), through_sqlalchemy(driver_error("0A000"))):
        assert translate(error, io=True) is None
        refused = refusal(error)
        assert refused is not None
        assert (type(refused), refused.details) == (ControlPlaneError, {"sqlstate": "0A000"})


def test_a_refusal_of_somebody_elses_or_after_another_one_is_none() -> None:
    assert refusal(RuntimeError("not the database's")) is None
    assert refusal(driver_error("25P02")) is None
    assert type(refusal(driver_error("23505"))) is AlreadyExistsError
