"""The models without a database: what a table takes, what it refuses on every way in, and what a refusal leaves behind and tells."""

import contextvars
import copy
import itertools
import json
import os
import pickle
import time
import traceback
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import sqlmodel._compat
from pydantic import MISSING, BaseModel, TypeAdapter, ValidationError
from sqlalchemy import DateTime, MetaData, inspect
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import configure_mappers, make_transient_to_detached, registry
from sqlalchemy.schema import CreateColumn
from sqlmodel import Field, Session, SQLModel

from car_control_plane import models
from car_control_plane.encryption import KeyState, SealedConnectionString
from car_control_plane.errors import InvalidDataError
from car_control_plane.models import (
    SCHEMA,
    SYSTEM_ADMIN_ID,
    TRANSITIONS,
    ChangeLogEntry,
    ChangeLogEntryPublic,
    ChangeOperation,
    CompletedOperation,
    EncryptionKey,
    EncryptionKeyPublic,
    Model,
    SystemConfig,
    SystemConfigCreate,
    SystemConfigPublic,
    SystemConfigUpdate,
    Tenant,
    TenantBase,
    TenantCreate,
    TenantDatabase,
    TenantDatabaseCreate,
    TenantDatabasePublic,
    TenantDatabaseStatus,
    TenantDatabaseUpdate,
    TenantEnvironment,
    TenantPublic,
    TenantStatus,
    TenantUpdate,
    metadata,
    sources_of,
    uuid7,
)
from car_control_plane.models.base import native_enums
from car_control_plane.models.databases import SealedText

CANARY = "c4n4ry-s3cr3t"
TENANT_ID = uuid.UUID("01890000-0000-7000-8000-000000000001")
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

GOOD: dict[type[Model], dict[str, Any]] = {
    Tenant: {"name": "acme", "environment": "production"},
    TenantDatabase: {
        "tenant_id": str(TENANT_ID),
        "connection_string_encrypted": SealedConnectionString("ccp1:k1:c2VhbGVk"),
        "database_name": "acme",
        "host": "db.example",
    },
    SystemConfig: {"key": "mail.sender", "value": {"name": "ops"}},
    ChangeLogEntry: {
        "version": 7,
        "table_name": "tenants",
        "row_id": str(TENANT_ID),
        "operation": "insert",
        "transaction_id": 1,
        "changed_at": NOW.isoformat(),
    },
    EncryptionKey: {"kid": "k1", "provider": "environment", "check_value": "0123456789abcdef" * 2},
}
TABLES = list(GOOD)
POSTGRESQL = postgresql.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy leaves it untyped
each_table = pytest.mark.parametrize("table", TABLES, ids=lambda table: table.__name__)

SCHEMAS: dict[type[Model], dict[str, Any]] = {
    TenantCreate: GOOD[Tenant],
    TenantUpdate: {"name": "acme"},
    TenantDatabaseCreate: {"connection_string": "postgresql://db.example/acme"},
    TenantDatabaseUpdate: {"purpose": "archive"},
    SystemConfigCreate: GOOD[SystemConfig],
    SystemConfigUpdate: {"value": None},
}

BAD: list[tuple[type[Model], str, Any]] = [
    (Tenant, "tenant_id", "no uuid"),
    (Tenant, "tenant_id", None),
    (Tenant, "name", ""),
    (Tenant, "name", " acme"),
    (Tenant, "name", "acme\u3000"),
    (Tenant, "name", "a\x00b"),
    (Tenant, "name", "a\nb"),
    (Tenant, "name", "a\u202eb"),
    (Tenant, "name", "a" * 256),
    (Tenant, "name", "a\ud800"),
    (Tenant, "name", 5),
    (Tenant, "name", None),
    (Tenant, "environment", "prod"),
    (Tenant, "environment", "PRODUCTION"),
    (Tenant, "status", "gone"),
    (Tenant, "status", None),
    (Tenant, "labels", {"tier": 1}),
    (Tenant, "labels", {"": "x"}),
    (Tenant, "labels", {"k" * 64: "x"}),
    (Tenant, "labels", {"k": "v" * 256}),
    (Tenant, "labels", {"k": "a\x00"}),
    (Tenant, "labels", {f"k{n}": "v" for n in range(65)}),
    (Tenant, "labels", ["tier"]),
    (Tenant, "labels", None),
    (Tenant, "status_reason", "x" * 1001),
    (Tenant, "status_reason", "a\x00"),
    (Tenant, "created_at", "2026-01-02T03:04:05"),
    (Tenant, "updated_at", None),
    (Tenant, "version", "seven"),
    (Tenant, "version", None),
    (TenantDatabase, "tenant_id", 7),
    (TenantDatabase, "connection_string_encrypted", ""),
    (TenantDatabase, "connection_string_encrypted", "ccp1:k1:c2VhbGVk"),
    (TenantDatabase, "connection_string_encrypted", b"ccp1:k1:c2VhbGVk"),
    (TenantDatabase, "connection_string_encrypted", None),
    (TenantDatabase, "database_name", ""),
    (TenantDatabase, "host", "db\n.example"),
    (TenantDatabase, "port", 0),
    (TenantDatabase, "port", 65536),
    (TenantDatabase, "port", "http"),
    (TenantDatabase, "status", "gone"),
    (TenantDatabase, "purpose", "Primary"),
    (TenantDatabase, "purpose", "primary\n"),
    (TenantDatabase, "purpose", "p" * 64),
    (TenantDatabase, "revision", "a\x00"),
    (TenantDatabase, "revision", "r" * 256),
    (SystemConfig, "key", ""),
    (SystemConfig, "key", "k" * 256),
    (SystemConfig, "value", float("nan")),
    (SystemConfig, "value", {"deep": ["a\x00"]}),
    (SystemConfig, "value", object()),
    (SystemConfig, "updated_at", "2026-01-02T03:04:05"),
    (ChangeLogEntry, "operation", "truncate"),
    (ChangeLogEntry, "changed_at", "2026-01-02T03:04:05"),
    (ChangeLogEntry, "version", None),
    (EncryptionKey, "kid", ""),
    (EncryptionKey, "kid", "K1"),
    (EncryptionKey, "kid", "k1\n"),
    (EncryptionKey, "kid", "k" * 33),
    (EncryptionKey, "provider", ""),
    (EncryptionKey, "provider", "p" * 64),
    (EncryptionKey, "provider", None),
    (EncryptionKey, "kek_ref", "a\x00"),
    (EncryptionKey, "wrapped", "a\x00"),
    (EncryptionKey, "state", "lost"),
    (EncryptionKey, "check_value", "0123456789ABCDEF" * 2),
    (EncryptionKey, "check_value", "0" * 31),
    (EncryptionKey, "check_value", None),
]
each_bad_value = pytest.mark.parametrize(
    ("table", "field", "value"),
    BAD,
    ids=[f"{table.__name__}.{field}-{n}" for n, (table, field, _) in enumerate(BAD)],
)


def to_json(value: object) -> str:
    return json.dumps(value, default=str)


WAYS_IN: dict[str, Callable[[type[Model], dict[str, Any]], Any]] = {
    "construction": lambda table, data: table(**data),
    "model_validate": lambda table, data: table.model_validate(data),
    "model_validate with update": lambda table, data: table.model_validate(GOOD[table], update=data),
    "model_validate of an object": lambda table, data: table.model_validate(SimpleNamespace(**data)),
    "model_validate of a mapping": lambda table, data: table.model_validate(MappingProxyType(data)),
    "TypeAdapter": lambda table, data: TypeAdapter(table).validate_python(data),
    "TypeAdapter of an object": lambda table, data: TypeAdapter(table).validate_python(SimpleNamespace(**data)),
    "TypeAdapter of a mapping": lambda table, data: TypeAdapter(table).validate_python(MappingProxyType(data)),
    "TypeAdapter of a list": lambda table, data: TypeAdapter(list[table]).validate_python([data])[0],  # type: ignore[valid-type]  # a value here
}
WAYS_IN_AS_JSON: dict[str, Callable[[type[Model], dict[str, Any]], Any]] = {
    "model_validate_json": lambda table, data: table.model_validate_json(to_json(data)),
    "TypeAdapter.validate_json": lambda table, data: TypeAdapter(table).validate_json(to_json(data)),
}
each_way_in = pytest.mark.parametrize("way", WAYS_IN | WAYS_IN_AS_JSON)
# JSON has no sealed values.
each_way_into_a_table = pytest.mark.parametrize(
    ("way", "table"),
    [
        pytest.param(way, table, id=f"{way}-{table.__name__}")
        for way in WAYS_IN | WAYS_IN_AS_JSON
        for table in TABLES
        if table is not TenantDatabase or way in WAYS_IN
    ],
)


def enter(way: str, table: type[Model], data: dict[str, Any]) -> Any:
    return (WAYS_IN | WAYS_IN_AS_JSON)[way](table, data)


def row_of(table: type[Model]) -> Any:
    return table(**GOOD[table])


def stored(table: type[Model]) -> tuple[Any, Session]:
    """Return a row as if it had been loaded, and the session that tracks it."""
    row = row_of(table)
    make_transient_to_detached(row)
    session = Session()
    session.add(row)
    return row, session


def told(error: ValidationError) -> str:
    """Return everything a refusal shows to somebody."""
    return "\n".join([str(error), repr(error), repr(error.errors()), error.json(), repr(error.__context__)])


# --- what a table takes -----------------------------------------------------------------------------------------------


@each_way_into_a_table
def test_every_way_in_makes_a_row_that_can_be_stored(way: str, table: type[Model]) -> None:
    row = enter(way, table, GOOD[table])
    assert type(row) is table
    assert inspect(row).transient
    assert inspect(row).obj() is row
    assert {name for name in GOOD[table] if str(getattr(row, name)) != str(GOOD[table][name])} <= {"changed_at"}
    with Session() as session:
        session.add(row)
        assert row in session.new


@each_way_in
def test_values_arrive_in_their_own_types(way: str) -> None:
    row = enter(way, Tenant, {**GOOD[Tenant], "tenant_id": str(TENANT_ID), "status": "active", "created_at": str(NOW)})
    assert row.tenant_id == TENANT_ID
    assert row.environment is TenantEnvironment.PRODUCTION
    assert row.status is TenantStatus.ACTIVE
    assert row.created_at == NOW


def test_defaults_are_those_of_the_columns() -> None:
    tenant, database = row_of(Tenant), row_of(TenantDatabase)
    assert (tenant.status, tenant.labels, tenant.status_reason) == (TenantStatus.PENDING, {}, None)
    assert (database.port, database.status, database.purpose) == (5432, TenantDatabaseStatus.ACTIVE, "primary")
    assert database.revision is None


def test_what_the_server_fills_is_left_out_of_the_insert() -> None:
    """An attribute that is not set at all lets the INSERT say DEFAULT."""
    row = row_of(Tenant)
    assert {"created_at", "updated_at", "version"}.isdisjoint(row.__dict__)
    assert row.created_at is None


def test_a_field_that_was_assigned_counts_as_set() -> None:
    row = row_of(Tenant)
    assert row.model_dump(exclude_unset=True).keys() == {"name", "environment"}
    row.status = TenantStatus.ACTIVE
    row.sqlmodel_update({"labels": {"tier": "gold"}})
    assert row.model_dump(exclude_unset=True).keys() == {"name", "environment", "status", "labels"}


def test_two_rows_share_no_default() -> None:
    one, two = row_of(Tenant), row_of(Tenant)
    assert one.labels is not two.labels
    assert one.tenant_id != two.tenant_id


def test_a_name_is_stored_in_normal_form_c() -> None:
    row = Tenant(name="Cafe\u0301", environment=TenantEnvironment.PRODUCTION)
    assert row.name == "Caf\u00e9"
    row.name = "Zu\u0308rich"
    assert row.name == "Z\u00fcrich"


@pytest.mark.parametrize("schema", [TenantCreate, TenantPublic], ids=lambda schema: schema.__name__)
def test_a_row_is_made_from_a_schema(schema: type[Model]) -> None:
    source = schema.model_validate(
        {**GOOD[Tenant], "tenant_id": TENANT_ID, "status": "active", "status_reason": None, "labels": {"tier": "gold"}}
        | ({"created_at": NOW, "updated_at": NOW, "version": 3} if schema is TenantPublic else {})
    )
    row = Tenant.model_validate(source)
    assert (row.tenant_id, row.name, row.labels) == (TENANT_ID, "acme", {"tier": "gold"})


def test_a_row_is_made_from_a_row_and_is_another_one() -> None:
    """A row that was never stored has nothing yet in the columns the server fills."""
    one = row_of(Tenant)
    two = Tenant.model_validate(one, update={"name": "other"})
    assert two is not one
    assert (one.name, two.name, two.tenant_id) == ("acme", "other", one.tenant_id)
    assert inspect(two) is not inspect(one)


def test_a_row_in_a_type_adapter_stays_the_same_row() -> None:
    row = row_of(Tenant)
    assert TypeAdapter(Tenant).validate_python(row) is row


def test_a_downstream_schema_extends_the_base() -> None:
    class Registration(TenantBase):
        code: str

    assert Registration(**GOOD[Tenant], code="x").code == "x"
    with pytest.raises(ValidationError, match="name"):
        Registration(name=" ", environment=TenantEnvironment.STAGING, code="x")


# --- what a table refuses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "table", "field", "value"),
    [
        pytest.param(way, table, field, value, id=f"{way}-{table.__name__}.{field}-{n}")
        for way in WAYS_IN
        for n, (table, field, value) in enumerate(BAD)
        if not (way.endswith("of an object") and value is None and field in {"updated_at", "version"})
    ],
)
def test_every_way_in_refuses(way: str, table: type[Model], field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        enter(way, table, {**GOOD[table], field: value})
    (path,) = {problem["loc"] for problem in caught.value.errors()}
    assert field in path[:2]


@each_bad_value
def test_assignment_refuses_and_leaves_no_trace(table: type[Model], field: str, value: Any) -> None:
    row, session = stored(table)
    before, fields_set = dict(row.__dict__), set(row.model_fields_set)
    with pytest.raises(ValidationError):
        setattr(row, field, value)
    assert row.__dict__ == before
    assert row.model_fields_set == fields_set
    assert not inspect(row).modified
    assert row not in session.dirty
    assert not inspect(row).attrs[field].history.has_changes()
    session.close()


@each_bad_value
def test_an_update_of_several_fields_takes_all_or_none(table: type[Model], field: str, value: Any) -> None:
    others = {
        Tenant: {"name": "changed"},
        TenantDatabase: {"host": "changed"},
        SystemConfig: {"key": "changed"},
        ChangeLogEntry: {"row_id": "changed"},
        EncryptionKey: {"provider": "changed"},
    }
    row, session = stored(table)
    before, fields_set = dict(row.__dict__), set(row.model_fields_set)
    with pytest.raises(ValidationError):
        row.sqlmodel_update({**others[table], field: value})
    with pytest.raises(ValidationError):
        row.sqlmodel_update(others[table], update={field: value})
    assert row.__dict__ == before
    assert row.model_fields_set == fields_set
    assert row not in session.dirty
    session.close()


@each_table
@each_way_in
def test_an_unknown_field_is_refused_on_every_way_in(way: str, table: type[Model]) -> None:
    data = {**GOOD[table], "colour": "red"}
    if way.endswith("of an object"):  # an object may have more attributes than the table has columns
        assert not hasattr(enter(way, table, data), "colour")
        return
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        enter(way, table, data)


@each_table
def test_an_unknown_field_is_refused_on_assignment(table: type[Model]) -> None:
    row = row_of(table)
    with pytest.raises(ValueError, match="has no field"):
        row.colour = "red"
    with pytest.raises(ValidationError, match="colour"):
        row.sqlmodel_update({"colour": "red"})
    assert not hasattr(row, "colour")


def test_an_unknown_field_of_another_model_is_refused() -> None:
    class Registration(TenantBase):
        code: str

    with pytest.raises(ValidationError, match="code"):
        Tenant.model_validate(Registration(**GOOD[Tenant], code="x"))


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_a_schema_refuses_unknown_fields(schema: type[Model]) -> None:
    schema(**SCHEMAS[schema])
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        schema(**SCHEMAS[schema], colour="red")


@each_table
@pytest.mark.parametrize("nothing", ["text", 5, None, ["list"], b"bytes", object()], ids=repr)
def test_what_has_no_fields_at_all_is_refused(table: type[Model], nothing: object) -> None:
    attempts: list[Callable[[], Any]] = [
        lambda: table.model_validate(nothing),
        lambda: table.model_validate(nothing, update=GOOD[table]),
        lambda: TypeAdapter(table).validate_python(nothing),
    ]
    for attempt in attempts:
        with pytest.raises(ValidationError):
            attempt()


def test_strict_validation_is_passed_on() -> None:
    with pytest.raises(ValidationError, match="environment"):
        Tenant.model_validate(GOOD[Tenant], strict=True)
    assert Tenant.model_validate_json(to_json(GOOD[Tenant]), strict=True).name == "acme"


def test_two_label_keys_that_become_one_are_refused() -> None:
    with pytest.raises(ValidationError, match="two labels have the same key"):
        Tenant(**GOOD[Tenant], labels={"caf\u00e9": "1", "cafe\u0301": "2"})


def test_labels_are_counted_as_they_are_stored() -> None:
    """U+0958 is two characters in normal form C."""
    Tenant(**GOOD[Tenant], labels={"k" * 63: "\u0958" * 127 + "x"} | {f"k{n}": "" for n in range(63)})
    with pytest.raises(ValidationError, match="at most 255 characters"):
        Tenant(**GOOD[Tenant], labels={"k": "\u0958" * 128})
    with pytest.raises(ValidationError, match="at most 63 characters"):
        Tenant(**GOOD[Tenant], labels={"\u0958" * 32: "v"})


def test_a_status_reason_is_counted_as_it_is_stored() -> None:
    assert Tenant(**GOOD[Tenant], status_reason="x" * 1000).status_reason == "x" * 1000
    with pytest.raises(ValidationError):
        Tenant(**GOOD[Tenant], status_reason="\u0958" * 501)


# --- what a refusal tells ---------------------------------------------------------------------------------------------

LEAKS: list[tuple[type[Model], Any]] = [
    (TenantDatabaseCreate, {"connection_string": CANARY, "purpose": CANARY.upper()}),
    (TenantDatabaseCreate, {"connection_string": [CANARY]}),
    (TenantDatabaseCreate, {"connection_string": {"dsn": CANARY}}),
    (TenantDatabaseCreate, {"connection_string": CANARY.encode() + b"\xff"}),
    (TenantDatabaseCreate, {"connection_string": CANARY, "colour": CANARY}),
    (TenantDatabaseCreate, {"purpose": CANARY}),
    (TenantDatabaseCreate, CANARY),
    (TenantDatabaseCreate, [CANARY]),
    (TenantDatabaseUpdate, {"connection_string": 5, "purpose": CANARY.upper()}),
    (TenantDatabaseUpdate, {"connection_string": [CANARY]}),
    (TenantDatabase, {"connection_string_encrypted": CANARY}),
    (TenantDatabase, {**GOOD[TenantDatabase], "connection_string_encrypted": CANARY, "port": 0}),
    (TenantDatabase, {**GOOD[TenantDatabase], "connection_string_encrypted": CANARY + "\n"}),
    (TenantDatabase, {**GOOD[TenantDatabase], "connection_string_encrypted": [CANARY]}),
    (TenantDatabase, {**GOOD[TenantDatabase], "host": CANARY + "\n"}),
    (TenantCreate, {"name": CANARY + "\n", "environment": CANARY, "labels": {"k": CANARY + "\x00"}}),
    (TenantUpdate, {"name": [CANARY]}),
    (TenantPublic, {"name": CANARY}),
    (SystemConfigCreate, {"key": "k", "value": [CANARY, float("nan")]}),
    (SystemConfigUpdate, {"value": {"k": (CANARY,)}}),
    (SystemConfigUpdate, {"val": CANARY}),
]


@pytest.mark.parametrize(("model", "data"), LEAKS, ids=[f"{m.__name__}-{n}" for n, (m, _) in enumerate(LEAKS)])
def test_a_refusal_never_repeats_the_value(model: type[Model], data: Any) -> None:
    attempts: list[Callable[[], Any]] = [
        lambda: model.model_validate(data),
        lambda: TypeAdapter(model).validate_python(data),
        lambda: TypeAdapter(list[model]).validate_python([data]),  # type: ignore[valid-type]  # a value here
    ]
    if isinstance(data, dict):
        attempts += [lambda: model(**data)]
    for attempt in attempts:
        with pytest.raises(ValidationError) as caught:
            attempt()
        said = told(caught.value)
        assert CANARY not in said
        assert CANARY.upper() not in said
        assert caught.value.error_count() > 0
        for problem in caught.value.errors():
            assert problem["input"] is None
            assert not isinstance(problem.get("ctx", {}).get("error"), BaseException)


@each_table
def test_a_refused_assignment_does_not_repeat_the_value(table: type[Model]) -> None:
    row = row_of(table)
    name = {SystemConfig: "updated_at", ChangeLogEntry: "operation", EncryptionKey: "state"}.get(table, "tenant_id")
    with pytest.raises(ValidationError) as caught:
        setattr(row, name, CANARY)
    assert CANARY not in told(caught.value)


def test_a_refusal_names_the_field_the_reason_and_the_limit() -> None:
    with pytest.raises(ValidationError) as caught:
        TenantDatabase.model_validate({**GOOD[TenantDatabase], "port": 0, "purpose": "P"})
    assert [(p["type"], p["loc"], p.get("ctx")) for p in caught.value.errors()] == [
        ("greater_than_equal", ("port",), {"ge": 1}),
        ("string_pattern_mismatch", ("purpose",), {"pattern": "^[a-z][a-z0-9_-]{0,62}$"}),
    ]
    assert str(caught.value).startswith("2 validation errors for TenantDatabase\nport\n  Input should be greater than")
    assert "input_value" not in str(caught.value)


# --- the sealed column ------------------------------------------------------------------------------------------------


def test_the_sealed_column_shows_nowhere() -> None:
    row = TenantDatabase(**{**GOOD[TenantDatabase], "connection_string_encrypted": SealedConnectionString(CANARY)})
    shown = [repr(row), str(row), str(row.model_dump()), str(row.model_dump(mode="json")), row.model_dump_json()]
    shown += [
        str(TypeAdapter(TenantDatabase).dump_python(row)),
        TypeAdapter(list[TenantDatabase]).dump_json([row]).decode(),
        TenantDatabasePublic.model_validate(
            row, update={"created_at": NOW, "updated_at": NOW, "version": 1}
        ).model_dump_json(),
    ]
    for text in shown:
        assert CANARY not in text
        assert "connection_string" not in text
    assert row.connection_string_encrypted.text == CANARY


@pytest.mark.parametrize("way", WAYS_IN | WAYS_IN_AS_JSON)
def test_the_sealed_column_takes_sealed_values_only(way: str) -> None:
    """Text of the right form is refused as well: nobody has said that it is sealed."""
    plain = f"ccp1:k1:{CANARY}"
    with pytest.raises(ValidationError, match="SealedConnectionString") as caught:
        enter(way, TenantDatabase, {**GOOD[TenantDatabase], "connection_string_encrypted": plain})
    assert CANARY not in told(caught.value)
    row, session = stored(TenantDatabase)
    with pytest.raises(ValidationError, match="SealedConnectionString") as caught:
        row.connection_string_encrypted = plain
    assert CANARY not in told(caught.value)
    assert row not in session.dirty
    session.close()


@pytest.mark.parametrize("plain", [f"ccp1:k1:{CANARY}", CANARY, CANARY.encode(), 5, [CANARY]], ids=repr)
def test_the_columns_type_takes_sealed_values_only(plain: object) -> None:
    """Past the model, in a statement; and the error's frames in our code do not hold what was refused."""
    with pytest.raises(InvalidDataError, match="SealedConnectionString only") as caught:
        SealedText().process_bind_param(plain, POSTGRESQL)
    assert CANARY not in f"{caught.value!r} {caught.value}"
    trace = caught.value.__traceback__
    frames = [frame for frame, _ in traceback.walk_tb(trace) if frame.f_code.co_name == "process_bind_param"]
    assert [name for frame in frames for name, value in frame.f_locals.items() if value is plain] == []
    assert frames


@pytest.mark.parametrize("text", ["ccp1:k1:c2VhbGVk", "postgresql://u:p@h/d", "", "ccp1:"])
def test_the_columns_type_loads_whatever_is_stored(text: str) -> None:
    loaded = SealedText().process_result_value(text, POSTGRESQL)
    assert isinstance(loaded, SealedConnectionString)
    assert loaded.text == text == SealedText().process_bind_param(loaded, POSTGRESQL)
    assert SealedText().process_result_value(None, POSTGRESQL) is None
    assert SealedText().process_bind_param(None, POSTGRESQL) is None


def test_a_wrapped_key_shows_nowhere() -> None:
    row = EncryptionKey(**GOOD[EncryptionKey], kek_ref="outer-1", state=KeyState.CURRENT, wrapped=CANARY)
    public = EncryptionKeyPublic.model_validate(row, update={"created_at": NOW, "updated_at": NOW, "version": 1})
    shown = [repr(row), str(row), str(row.model_dump()), row.model_dump_json(), public.model_dump_json()]
    schemas = [json.dumps(model.model_json_schema()) for model in (EncryptionKey, EncryptionKeyPublic)]
    for text in shown + schemas:
        assert CANARY not in text
        assert "wrapped:" not in text
        assert '"wrapped"' not in text
    assert row.wrapped == CANARY


@pytest.mark.parametrize("mode", ["validation", "serialization"])
def test_the_sealed_column_is_in_no_json_schema(mode: Any) -> None:
    for name in models.__all__:
        model = getattr(models, name)
        if isinstance(model, type) and issubclass(model, BaseModel):
            assert "encrypted" not in json.dumps(model.model_json_schema(mode=mode))


def test_no_public_schema_has_a_way_in() -> None:
    assert not [name for name in TenantDatabasePublic.model_fields if "connection" in name]


def test_the_plain_connection_string_is_masked() -> None:
    schema = TenantDatabaseCreate(connection_string=CANARY)  # type: ignore[arg-type]  # what JSON brings
    assert CANARY not in f"{schema} {schema!r} {schema.model_dump()} {schema.model_dump_json()}"
    assert schema.connection_string.get_secret_value() == CANARY


# --- PATCH ------------------------------------------------------------------------------------------------------------


def test_a_patch_tells_absent_from_null() -> None:
    assert TenantUpdate.model_validate({}).model_dump() == {}
    assert TenantUpdate(name="acme").model_dump() == {"name": "acme"}
    assert TenantUpdate().name is MISSING
    for field in TenantUpdate.model_fields:
        with pytest.raises(ValidationError, match=field):
            TenantUpdate.model_validate({field: None})
    for field in TenantDatabaseUpdate.model_fields:
        with pytest.raises(ValidationError, match=field):
            TenantDatabaseUpdate.model_validate({field: None})


def test_a_patch_changes_what_was_sent_and_nothing_else() -> None:
    row = Tenant(**GOOD[Tenant], labels={"tier": "gold"})
    assert row.sqlmodel_update(TenantUpdate(name="other")) is row
    assert (row.name, row.environment, row.labels) == ("other", TenantEnvironment.PRODUCTION, {"tier": "gold"})
    row.sqlmodel_update(TenantUpdate(environment=TenantEnvironment.STAGING).model_dump(), update={"name": "third"})
    assert (row.name, row.environment) == ("third", TenantEnvironment.STAGING)
    row.sqlmodel_update(TenantUpdate())
    assert row.name == "third"


def test_a_schema_updates_as_sqlmodel_does() -> None:
    schema = TenantCreate(**GOOD[Tenant])
    assert schema.sqlmodel_update({"name": "other"}) is schema
    assert schema.name == "other"


def test_a_patch_schema_shows_plain_optional_values() -> None:
    properties = TenantUpdate.model_json_schema()["properties"]
    assert properties["name"] == {"type": "string", "minLength": 1, "maxLength": 255, "title": "Name"}
    assert "required" not in TenantUpdate.model_json_schema()
    assert "null" not in json.dumps(properties)


@pytest.mark.parametrize("name", ["e\u0301" * 128, "\u0958" * 128, "a" * 256, " a", ""])
def test_every_schema_draws_the_line_for_names_in_the_same_place(name: str) -> None:
    for attempt in (
        lambda: Tenant(**{**GOOD[Tenant], "name": name}),
        lambda: TenantCreate(**{**GOOD[Tenant], "name": name}),
        lambda: TenantUpdate(name=name),
        lambda: SystemConfigCreate(key=name, value=1),
    ):
        with pytest.raises(ValidationError):
            attempt()


# --- public schemas ---------------------------------------------------------------------------------------------------

PUBLIC: dict[type[Model], type[Model]] = {
    Tenant: TenantPublic,
    TenantDatabase: TenantDatabasePublic,
    SystemConfig: SystemConfigPublic,
    ChangeLogEntry: ChangeLogEntryPublic,
    EncryptionKey: EncryptionKeyPublic,
}


@each_table
def test_a_public_schema_is_made_from_a_row(table: type[Model]) -> None:
    stamps = {"created_at": NOW, "updated_at": NOW, "version": 3}
    row = table(**{**GOOD[table], **{name: value for name, value in stamps.items() if name in table.model_fields}})
    public = PUBLIC[table].model_validate(row)
    assert public.model_dump() == {name: getattr(row, name) for name in PUBLIC[table].model_fields}
    assert list(public.model_dump()) == list(PUBLIC[table].model_fields)


@each_table
def test_a_public_schema_leaves_room_for_new_fields(table: type[Model]) -> None:
    """`additionalProperties: false` in a response breaks strict clients as soon as a field is added."""
    assert "additionalProperties" not in {
        key for key in PUBLIC[table].model_json_schema(mode="serialization") if key == "additionalProperties"
    }
    assert set(PUBLIC[table].model_fields) <= set(table.model_fields)


def test_a_create_schema_forbids_new_fields_in_openapi_too() -> None:
    assert TenantCreate.model_json_schema()["additionalProperties"] is False


# --- copies -----------------------------------------------------------------------------------------------------------


@each_table
def test_a_row_is_not_copied(table: type[Model]) -> None:
    row = row_of(table)
    for attempt in (row.model_copy, lambda: row.model_copy(deep=True), lambda: copy.copy(row)):
        with pytest.raises(TypeError, match="build a new one"):
            attempt()


def test_a_schema_is_copied() -> None:
    schema = TenantCreate(**GOOD[Tenant])
    assert schema.model_copy(update={"name": "other"}).name == "other"
    assert copy.copy(schema) == schema
    assert schema.name == "acme"


def through_pickle(row: Any) -> Any:
    return pickle.loads(pickle.dumps(row))


COPIES: dict[str, Callable[[Any], Any]] = {"deepcopy": copy.deepcopy, "pickle": through_pickle}


@each_table
@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("is_stored", [False, True])
def test_a_row_pickles_and_deepcopies_with_a_state_of_its_own(table: type[Model], copied: str, is_stored: bool) -> None:
    row = row_of(table)
    if is_stored:
        make_transient_to_detached(row)
    other = COPIES[copied](row)
    assert other is not row
    assert other == row
    assert other.model_fields_set == row.model_fields_set
    assert inspect(other) is not inspect(row)
    assert inspect(other).obj() is other
    assert inspect(other).key == inspect(row).key
    assert inspect(other).detached is is_stored
    with pytest.raises(ValidationError):
        setattr(other, next(iter(GOOD[table])), object())


# --- the mapping ------------------------------------------------------------------------------------------------------

COLUMNS: dict[type[Model], dict[str, str]] = {
    Tenant: {
        "tenant_id": "UUID NOT NULL",
        "name": "VARCHAR(255) NOT NULL",
        "environment": "control_plane.tenant_environment NOT NULL",
        "status": "control_plane.tenant_status DEFAULT 'pending' NOT NULL",
        "created_at": "TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL",
        "updated_at": "TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL",
        "labels": "JSONB DEFAULT '{}'::jsonb NOT NULL",
        "status_reason": "TEXT",
        "version": "BIGINT NOT NULL",
    },
    TenantDatabase: {
        "id": "UUID NOT NULL",
        "tenant_id": "UUID NOT NULL",
        "connection_string_encrypted": "TEXT NOT NULL",
        "database_name": "VARCHAR(255) NOT NULL",
        "host": "VARCHAR(255) NOT NULL",
        "port": "INTEGER DEFAULT 5432 NOT NULL",
        "status": "control_plane.tenant_database_status DEFAULT 'active' NOT NULL",
        "created_at": "TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL",
        "updated_at": "TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL",
        "purpose": "VARCHAR(63) DEFAULT 'primary' NOT NULL",
        "revision": "VARCHAR(255)",
        "version": "BIGINT NOT NULL",
        "verified_at": "TIMESTAMP WITH TIME ZONE",
        "server_version": "VARCHAR(63)",
        "tls_version": "VARCHAR(63)",
        "verification_error": "TEXT",
    },
    SystemConfig: {
        "key": "VARCHAR(255) NOT NULL",
        "value": "JSONB NOT NULL",
        "updated_at": "TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL",
        "version": "BIGINT NOT NULL",
    },
    ChangeLogEntry: {
        "version": "BIGINT NOT NULL",
        "table_name": "TEXT NOT NULL",
        "row_id": "TEXT NOT NULL",
        "tenant_id": "UUID",
        "operation": "TEXT NOT NULL",
        "transaction_id": "BIGINT NOT NULL",
        "changed_at": "TIMESTAMP WITH TIME ZONE NOT NULL",
    },
    EncryptionKey: {
        "kid": "VARCHAR(32) NOT NULL",
        "provider": "VARCHAR(63) NOT NULL",
        "kek_ref": "TEXT",
        "wrapped": "TEXT",
        "state": "control_plane.encryption_key_state",
        "check_value": "VARCHAR(32) NOT NULL",
        "created_at": "TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL",
        "updated_at": "TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL",
        "version": "BIGINT NOT NULL",
    },
}


@each_table
def test_the_columns_are_the_seeds_in_the_seeds_order(table: type[Model]) -> None:
    columns = inspect(table).local_table.columns
    described = {
        column.name: str(CreateColumn(column).compile(dialect=POSTGRESQL)).removeprefix(f"{column.name} ")
        for column in columns
    }
    assert described == COLUMNS[table]
    assert list(described) == list(COLUMNS[table])


def test_enums_store_their_values_in_our_schema() -> None:
    types = {
        "tenant_environment": [*TenantEnvironment],
        "tenant_status": [*TenantStatus],
        "tenant_database_status": [*TenantDatabaseStatus],
        "encryption_key_state": [*KeyState],
    }
    found = native_enums(metadata.tables.values())
    assert found.keys() == types.keys()
    for name, kind in found.items():
        assert kind.enums == [member.value for member in types[name]]
        assert (kind.schema, kind.metadata, kind.native_enum) == (SCHEMA, metadata, True)


def test_enum_values_are_the_seeds() -> None:
    assert [*TenantEnvironment] == ["development", "staging", "production"]
    assert [*TenantStatus] == ["active", "inactive", "suspended", "pending"]
    assert [*TenantDatabaseStatus] == ["active", "inactive", "migrating", "error"]
    assert [*KeyState] == ["pending", "current", "retired", "destroyed"]
    assert [*ChangeOperation] == ["insert", "update", "delete"]


def test_every_time_has_a_time_zone() -> None:
    times = [
        c for t in metadata.tables.values() for c in t.columns if isinstance(c.type, DateTime) or c.name.endswith("_at")
    ]
    assert len(times) == 10
    for column in times:
        assert str(column.type.compile(POSTGRESQL)) == "TIMESTAMP WITH TIME ZONE"


def test_constraints_and_indexes_have_the_seeds_names() -> None:
    assert {table.key: sorted(str(c.name) for c in table.constraints) for table in metadata.sorted_tables} == {
        "control_plane.change_log": ["ck_change_log_operation", "pk_change_log"],
        "control_plane.completed_operations": ["pk_completed_operations"],
        "control_plane.encryption_keys": [
            "ck_encryption_keys_check_value",
            "ck_encryption_keys_kid",
            "ck_encryption_keys_provider",
            "ck_encryption_keys_wrapped",
            "pk_encryption_keys",
        ],
        "control_plane.system_config": ["pk_system_config"],
        "control_plane.tenant_databases": [
            "ck_tenant_databases_port",
            "ck_tenant_databases_purpose",
            "ck_tenant_databases_sealed",
            "fk_tenant_databases_tenant_id_tenants",
            "pk_tenant_databases",
            "uq_tenant_databases_tenant_id_purpose",
        ],
        "control_plane.tenants": ["ck_tenants_labels", "ck_tenants_name", "pk_tenants", "uq_tenants_name"],
    }
    assert {"idx_tenants_status"} <= {index.name for index in metadata.tables["control_plane.tenants"].indexes}
    assert {
        "idx_tenant_databases_tenant_id",
        "idx_tenant_databases_status",
        "idx_tenant_databases_created_at_id",
        "idx_tenant_databases_kid_id",
    } == {index.name for index in metadata.tables["control_plane.tenant_databases"].indexes}


@each_table
def test_a_table_has_no_relationship_to_read(table: type[Model]) -> None:
    """A lazy load on attribute access is MissingGreenlet; repositories have methods instead. The one there is orders a flush."""
    configure_mappers()
    found = {relation.key: relation.lazy for relation in inspect(table).relationships}
    assert found == ({"_tenant": "raise"} if table is TenantDatabase else {})
    assert not table.__sqlmodel_relationships__


@each_table
def test_a_versioned_table_brings_what_the_server_wrote_back(table: type[Model]) -> None:
    mapper = inspect(table)
    if table is ChangeLogEntry:
        assert mapper.version_id_col is None
        return
    assert mapper.eager_defaults is True
    assert mapper.version_id_col is mapper.local_table.c.version
    assert mapper.version_id_generator is False


def test_the_tables_stand_apart_from_sqlmodels() -> None:
    assert Tenant.metadata is metadata
    assert not [key for key in SQLModel.metadata.tables if key.startswith(f"{SCHEMA}.")]
    assert {mapper.class_ for mapper in Model._sa_registry.mappers} == {*TABLES, CompletedOperation}


# --- why the base is built as it is: SQLModel's own behaviour, so that a change of it is seen ---------------------------


def test_a_stock_table_validates_nothing() -> None:
    class Stock(SQLModel, registry=registry(metadata=MetaData())):
        pass

    class Row(Stock, table=True):
        id: int = Field(primary_key=True)
        name: str = Field(max_length=3)

    wrong: Any = 5
    row = Row(id=1, name="too long")
    assert row.name == "too long"
    row.name = wrong
    assert row.name is wrong


def test_finish_init_tells_when_an_empty_shell_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one private name of SQLModel the base leans on: a context variable, true except while a shell is built."""
    assert isinstance(sqlmodel._compat.finish_init, contextvars.ContextVar)
    assert sqlmodel._compat.finish_init.get() is True
    assert vars(models.base)["finish_init"] is sqlmodel._compat.finish_init
    seen: list[bool] = []

    def spy(self: SQLModel, /, **data: Any) -> None:
        seen.append(sqlmodel._compat.finish_init.get())

    monkeypatch.setattr(SQLModel, "__init__", spy)

    class Stock(SQLModel, registry=registry(metadata=MetaData())):
        pass

    class Row(Stock, table=True):
        id: int = Field(primary_key=True)

    Row.model_validate({"id": 1})
    Row(id=1)
    assert seen == [False, True]


@each_table
def test_a_refused_row_leaves_the_next_one_alone(table: type[Model]) -> None:
    """A shell that failed must not leave `finish_init` false: every later row of the task would be built empty."""
    for way in WAYS_IN:
        with pytest.raises(ValidationError):
            enter(way, table, {**GOOD[table], next(iter(GOOD[table])): object()})
        assert sqlmodel._compat.finish_init.get() is True
        assert row_of(table).model_fields_set == set(GOOD[table])


def test_a_class_keyword_for_the_configuration_is_silently_ignored() -> None:
    class Loose(SQLModel, extra="forbid"):
        code: str

    assert Loose(code="x", colour="red").code == "x"  # type: ignore[call-arg]  # the point of the test


def test_the_json_schema_is_that_of_a_stock_model() -> None:
    class Stock(SQLModel):
        """What is needed."""

        model_config = {"extra": "forbid"}
        code: str = Field(max_length=5)
        count: int = 3

    class Ours(Model):
        """What is needed."""

        code: str = Field(max_length=5)
        count: int = 3

    for mode in ("validation", "serialization"):
        ours, stock = Ours.model_json_schema(mode=mode), Stock.model_json_schema(mode=mode)
        assert {**ours, "title": "Stock"} == stock


# --- keys and states --------------------------------------------------------------------------------------------------


def test_uuid7_has_its_version_variant_and_time() -> None:
    before = time.time_ns() // 1_000_000
    made = [uuid7() for _ in range(100)]
    after = time.time_ns() // 1_000_000
    for one in made:
        assert one.version == 7
        assert one.variant == uuid.RFC_4122
        assert before <= one.int >> 80 <= after


def test_uuid7_sorts_by_time_and_is_unique() -> None:
    made = [uuid7() for _ in range(20_000)]
    assert len(set(made)) == len(made)
    assert [one.int >> 64 for one in made] == sorted(one.int >> 64 for one in made)


def test_uuid7_counts_the_parts_of_a_millisecond(monkeypatch: pytest.MonkeyPatch) -> None:
    for nanoseconds, fraction in ((0, 0), (500_000, 2048), (999_999, 4095)):
        monkeypatch.setattr(time, "time_ns", lambda n=nanoseconds: 1_700_000_000_000 * 1_000_000 + n)
        one = uuid7()
        assert one.int >> 80 == 1_700_000_000_000
        assert one.int >> 64 & 0xFFF == fraction
        assert (one.version, one.variant) == (7, uuid.RFC_4122)


def test_uuid7_has_62_random_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "urandom", lambda n: b"\xff" * n)
    assert uuid7().int & (1 << 64) - 1 == 0xBFFF_FFFF_FFFF_FFFF


def test_the_id_of_the_system_admin_is_fixed() -> None:
    assert str(SYSTEM_ADMIN_ID) == "00000000-0000-7000-8000-000000000001"
    assert SYSTEM_ADMIN_ID.version == 7


LIFE_CYCLE = {
    ("pending", "active"),
    ("active", "suspended"),
    ("suspended", "active"),
    ("active", "inactive"),
    ("suspended", "inactive"),
    ("pending", "inactive"),
    ("inactive", "active"),
}


def test_the_transitions_are_those_of_the_life_cycle() -> None:
    assert {(source.value, target.value) for source, targets in TRANSITIONS.items() for target in targets} == LIFE_CYCLE
    for source, target in itertools.product(TenantStatus, repeat=2):
        assert (source in sources_of(target)) is ((source, target) in LIFE_CYCLE)


def test_the_sources_of_a_status_are_in_the_enums_order() -> None:
    assert sources_of(TenantStatus.INACTIVE) == (TenantStatus.ACTIVE, TenantStatus.SUSPENDED, TenantStatus.PENDING)
    assert sources_of(TenantStatus.PENDING) == ()
