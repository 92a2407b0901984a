"""The models on a real server: every row comes back as it went in, with what the server wrote, in the same round trip."""

import copy
import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st
from pydantic import JsonValue, ValidationError
from sqlalchemy import event, func, inspect, text, update
from sqlalchemy.exc import StatementError
from sqlalchemy.orm.exc import StaleDataError
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from car_control_plane.connection import AsyncConnectionManager
from car_control_plane.encryption import SealedConnectionString
from car_control_plane.errors import InvalidDataError, StaleWriteError
from car_control_plane.models import (
    ChangeLogEntry,
    ChangeOperation,
    Model,
    SystemConfig,
    Tenant,
    TenantDatabase,
    TenantDatabaseStatus,
    TenantEnvironment,
    TenantPublic,
    TenantStatus,
    TenantUpdate,
    uuid7,
)
from car_control_plane.models.config import MAX_INTEGER_DIGITS, MAX_VALUE_BYTES, MAX_VALUE_DEPTH


def new_tenant(**values: Any) -> Tenant:
    return Tenant(**{"name": f"tenant-{uuid7()}", "environment": TenantEnvironment.STAGING} | values)


def new_database(tenant: Tenant, **values: Any) -> TenantDatabase:
    where: dict[str, Any] = {
        "connection_string_encrypted": SealedConnectionString("ccp1:k1:c2VhbGVk"),
        "database_name": "acme",
        "host": "db.example",
    }
    return TenantDatabase(**{"tenant_id": tenant.tenant_id} | where | values)


def full_rows() -> list[Model]:
    """Return a row of every table a client writes, with a value in every column."""
    tenant = new_tenant(
        name="Caf\u00e9 \U0001f680 \u6771\u4eac",
        status=TenantStatus.SUSPENDED,
        labels={"tier": "gold", "\u00fc": "", "quote": "'\"\\"},
        status_reason="unpaid since M\u00e4rz",
    )
    return [
        tenant,
        new_database(
            tenant,
            port=6543,
            status=TenantDatabaseStatus.MIGRATING,
            purpose="archive_2-x",
            revision="00ff",
            host="/run/pg",
        ),
        SystemConfig(key="mail.sender \u00fc", value={"name": "ops", "ports": [25, None, 0.5], "": {}}),
    ]


def small_rows() -> list[Model]:
    """Return a row of every table a client writes, with defaults wherever there are some."""
    tenant = new_tenant()
    return [tenant, new_database(tenant), SystemConfig(key="k", value=None)]


@contextmanager
def statements(session: AsyncSession) -> Iterator[list[str]]:
    """Collect what the session sends."""
    seen: list[str] = []
    engine = session.get_bind().engine

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        seen.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(engine, "before_cursor_execute", note)


async def stored(session: AsyncSession, row: Model) -> dict[str, Any]:
    """Return what the table holds, past the identity map."""
    table = inspect(type(row)).local_table
    key = inspect(type(row)).primary_key[0]
    found = await session.connection()
    return dict((await found.execute(table.select().where(key == getattr(row, key.name)))).mappings().one())


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [full_rows, small_rows])
async def test_a_row_comes_back_as_it_went_in(session: AsyncSession, make: Any) -> None:
    rows: list[Model] = make()
    given_values = [row.model_dump() for row in rows]
    session.add_all(rows)
    await session.commit()
    session.expunge_all()
    for row, values in zip(rows, given_values, strict=True):
        key = inspect(row).identity
        assert key is not None
        loaded = await session.get_one(type(row), key[0])
        assert loaded is not row
        assert values.items() <= loaded.model_dump().items()
        assert loaded.model_dump() == row.model_dump()
        assert loaded == row
        for name in type(row).model_fields:
            assert isinstance(getattr(loaded, name), type(getattr(row, name))), name  # asyncpg has a UUID of its own


async def test_an_entry_of_the_change_log_is_read(session: AsyncSession) -> None:
    tenant = new_tenant()
    session.add(tenant)
    await session.commit()
    entry = (await session.exec(select(ChangeLogEntry).where(ChangeLogEntry.version == tenant.version))).one()
    assert entry.operation is not None
    assert (entry.table_name, entry.row_id, entry.tenant_id) == ("tenants", str(tenant.tenant_id), tenant.tenant_id)
    assert entry.operation == ChangeOperation.INSERT
    assert entry.transaction_id > 0
    assert entry.changed_at.tzinfo is not None


@pytest.mark.parametrize("make", [full_rows, small_rows])
async def test_what_the_server_fills_comes_with_the_insert(session: AsyncSession, make: Any) -> None:
    """No statement but the INSERT itself, and no attribute that would need one: that would be MissingGreenlet."""
    rows: list[Model] = make()
    await session.connection()
    with statements(session) as seen:
        session.add_all(rows)
        await session.flush()
        values = [{name: getattr(row, name) for name in type(row).model_fields} for row in rows]
    assert [statement.split()[0] for statement in seen] == ["INSERT"] * len(rows)
    for row, read in zip(rows, values, strict=True):
        assert inspect(row).expired_attributes == set()
        assert read == await stored(session, row)
        assert isinstance(read["version"], int)
        assert isinstance(read["updated_at"], datetime)


async def test_what_a_trigger_changes_comes_with_the_update(session: AsyncSession) -> None:
    rows = small_rows()
    session.add_all(rows)
    await session.commit()
    before = [row.model_dump() for row in rows]
    with statements(session) as seen:
        for row, (field, _, value) in zip(rows, CHANGES.values(), strict=True):
            setattr(row, field, value)
        await session.flush()
        after = [{name: getattr(row, name) for name in type(row).model_fields} for row in rows]
    assert sorted(statement.split()[0] for statement in seen if not statement.startswith("SAVEPOINT")) == ["UPDATE"] * 3
    for row, old, new in zip(rows, before, after, strict=True):
        assert inspect(row).expired_attributes == set()
        assert new == await stored(session, row)
        assert new["version"] > old["version"]
        assert new["updated_at"] > old["updated_at"]
        assert new.get("created_at") == old.get("created_at")


async def test_every_row_of_one_flush_gets_its_own_version(session: AsyncSession) -> None:
    tenants = [new_tenant() for _ in range(250)]
    session.add_all(tenants)
    await session.flush()
    assert len({tenant.version for tenant in tenants}) == len(tenants)
    for tenant in tenants[::50]:
        assert tenant.model_dump() == await stored(session, tenant)


async def test_rows_stay_whole_after_the_commit(shared_manager: AsyncConnectionManager) -> None:
    """With SQLAlchemy's default `expire_on_commit` a dump would be `{}`, and reading an attribute MissingGreenlet."""
    async with shared_manager.get_session() as session:
        tenant = new_tenant()
        session.add(tenant)
    assert set(tenant.model_dump()) == set(Tenant.model_fields)
    assert tenant.version > 0
    async with shared_manager.get_session() as session:
        loaded = await session.get_one(Tenant, tenant.tenant_id)
        loaded.name = "other"
    assert loaded.name == "other"
    assert loaded.version > tenant.version
    assert TenantPublic.model_validate(loaded).version == loaded.version


async def test_a_refreshed_row_is_whole(session: AsyncSession) -> None:
    tenant = new_tenant()
    session.add(tenant)
    await session.flush()
    public = TenantPublic.model_validate(tenant)
    await session.refresh(tenant, ["name", "created_at"])
    assert TenantPublic.model_validate(tenant) == public
    assert list(TenantPublic.model_validate(tenant).model_dump()) == list(TenantPublic.model_fields)


async def test_enums_are_stored_as_their_values(session: AsyncSession) -> None:
    for status in TenantStatus:
        for environment in TenantEnvironment:
            tenant = new_tenant(status=status, environment=environment)
            session.add(tenant)
            await session.flush()
            found = await (await session.connection()).execute(
                text("SELECT status::text, environment::text FROM control_plane.tenants WHERE tenant_id = :id"),
                {"id": tenant.tenant_id},
            )
            assert tuple(found.one()) == (status.value, environment.value)


@pytest.mark.parametrize("tenant_first", [True, False])
async def test_a_tenant_and_its_databases_go_in_and_out_together(
    shared_manager: AsyncConnectionManager, tenant_first: bool
) -> None:
    """SQLAlchemy orders the rows of one flush by relationships, not by foreign keys."""
    tenant = new_tenant()
    rows = [tenant, new_database(tenant), new_database(tenant, purpose="archive")]
    if not tenant_first:
        rows.reverse()
    async with shared_manager.get_session() as session:
        session.add_all(rows)
    await delete(shared_manager, *rows)
    async with shared_manager.get_session() as session:
        assert await session.get(Tenant, tenant.tenant_id) is None


# --- the sealed column -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored_text", ["ccp1:k1:c2VhbGVk", "postgresql://u:p@h/d", ""])
async def test_whatever_is_stored_is_loaded(session: AsyncSession, stored_text: str) -> None:
    """A damaged row stops no listing, and can be repaired."""
    database = await _stored_as(session, stored_text)
    loaded = (await session.exec(select(TenantDatabase))).one()
    assert isinstance(loaded.connection_string_encrypted, SealedConnectionString)
    assert loaded.connection_string_encrypted.text == stored_text
    assert loaded.id == database
    loaded.connection_string_encrypted = SealedConnectionString("ccp1:k2:bWVuZGVk")
    await session.flush()
    assert (await stored(session, loaded))["connection_string_encrypted"].text == "ccp1:k2:bWVuZGVk"


async def _stored_as(session: AsyncSession, stored_text: str) -> Any:
    await (await session.connection()).execute(
        text("ALTER TABLE control_plane.tenant_databases DROP CONSTRAINT ck_tenant_databases_sealed")
    )
    tenant = new_tenant()
    database = new_database(tenant, connection_string_encrypted=SealedConnectionString(stored_text))
    session.add_all([tenant, database])
    await session.flush()
    session.expunge_all()
    return database.id


@pytest.mark.parametrize("plain", ["ccp1:k1:c4n4ry", "postgresql://u:c4n4ry@h/d"])
async def test_a_statement_takes_sealed_values_only(session: AsyncSession, plain: str) -> None:
    """A statement is not validated like a row is; here it is the column's type that refuses, before anything is sent."""
    tenant = new_tenant()
    database = new_database(tenant)
    session.add_all([tenant, database])
    await session.commit()
    with statements(session) as seen, pytest.raises(StatementError) as caught:
        await session.exec(update(TenantDatabase).values(connection_string_encrypted=plain))
    assert isinstance(caught.value.orig, InvalidDataError)
    assert "c4n4ry" not in f"{caught.value} {caught.value!r}"
    assert [statement for statement in seen if "SAVEPOINT" not in statement] == []
    new = SealedConnectionString("ccp1:k2:bmV3")
    await session.exec(update(TenantDatabase).values(connection_string_encrypted=new))
    await session.refresh(database)
    assert database.connection_string_encrypted == new
    found = await session.exec(select(TenantDatabase.id).where(TenantDatabase.connection_string_encrypted == new))
    assert found.one() == database.id


# --- clocks -----------------------------------------------------------------------------------------------------------


async def test_both_stamps_of_a_new_row_are_the_servers(session: AsyncSession) -> None:
    tenant = new_tenant()
    session.add(tenant)
    await session.flush()
    now = await session.scalar(select(func.now()))
    assert tenant.created_at == tenant.updated_at == now
    assert tenant.created_at.tzinfo == UTC


async def test_a_time_keeps_its_instant_in_any_zone(session: AsyncSession) -> None:
    instant = datetime(2020, 2, 29, 23, 59, 59, 999999, tzinfo=timezone(timedelta(hours=-11)))
    tenant = new_tenant(created_at=instant)
    session.add(tenant)
    await session.commit()
    session.expunge_all()
    loaded = await session.get_one(Tenant, tenant.tenant_id)
    assert loaded.created_at == instant
    assert loaded.created_at.tzinfo == UTC


async def test_a_version_or_time_a_client_sends_is_not_believed(session: AsyncSession) -> None:
    """A row that showed another version than the one stored would be taken for newer or older than it is."""
    tenant = new_tenant(version=2**62, updated_at=datetime(1999, 1, 1, tzinfo=UTC))
    session.add(tenant)
    await session.flush()
    assert tenant.model_dump() == await stored(session, tenant)
    first = tenant.version
    assert first < 2**62
    tenant.sqlmodel_update({"name": "other", "version": 2**62, "updated_at": datetime(1998, 1, 1, tzinfo=UTC)})
    await session.flush()
    assert tenant.model_dump() == await stored(session, tenant)
    assert first < tenant.version < 2**62
    assert tenant.updated_at.year > 1999


async def test_assigning_only_a_version_writes_nothing(session: AsyncSession) -> None:
    tenant = new_tenant()
    session.add(tenant)
    await session.commit()
    before = tenant.model_dump()
    with statements(session) as seen:
        tenant.version = 7
        await session.flush()
    assert "UPDATE" not in " ".join(seen)
    assert tenant.model_dump() == before


# --- what is loaded is not validated ----------------------------------------------------------------------------------


@pytest.fixture
async def odd(session: AsyncSession) -> Tenant:
    """A row the database takes and Python would refuse: a bidirectional override, no normal form C, a label that is no text."""
    key = uuid7()
    await (await session.connection()).execute(
        text(
            "INSERT INTO control_plane.tenants (tenant_id, name, environment, labels, status_reason) "
            "VALUES (:id, :name, 'production', '{\"tier\": 1}', :reason)"
        ),
        {"id": key, "name": "\u202ecafe\u0301\u0085", "reason": "x" * 2000},
    )
    return await session.get_one(Tenant, key)


async def test_a_row_python_would_refuse_is_loaded(odd: Tenant) -> None:
    assert odd.name == "\u202ecafe\u0301\u0085"
    labels: dict[str, Any] = dict(odd.labels)
    assert labels == {"tier": 1}
    assert len(odd.status_reason or "") == 2000
    with pytest.raises(ValidationError) as caught:
        Tenant.model_validate(odd)
    assert {problem["loc"][0] for problem in caught.value.errors()} == {"name", "labels", "status_reason"}


async def test_a_row_python_would_refuse_can_be_changed_elsewhere_and_mended(
    session: AsyncSession, odd: Tenant
) -> None:
    odd.status = TenantStatus.ACTIVE
    await session.flush()
    assert (await stored(session, odd))["name"] == "\u202ecafe\u0301\u0085"
    odd.sqlmodel_update({"name": "caf\u00e9", "labels": {"tier": "1"}, "status_reason": None})
    await session.flush()
    assert Tenant.model_validate(odd).name == "caf\u00e9"


async def test_a_loaded_row_knows_all_its_fields(session: AsyncSession) -> None:
    tenant = new_tenant()
    session.add(tenant)
    await session.commit()
    session.expunge_all()
    loaded = await session.get_one(Tenant, tenant.tenant_id)
    assert loaded.model_fields_set == set(Tenant.model_fields)
    assert loaded.model_dump(exclude_unset=True) == loaded.model_dump() == tenant.model_dump()


async def test_a_loaded_row_pickles_deepcopies_and_merges(session: AsyncSession) -> None:
    tenant = new_tenant()
    session.add(tenant)
    await session.commit()
    for way in ("deepcopy", "pickle"):
        other = copy.deepcopy(tenant) if way == "deepcopy" else pickle.loads(pickle.dumps(tenant))
        assert other == tenant
        assert inspect(other).detached
        other.name = f"merged-{uuid7()}"
        merged = await session.merge(other)
        assert merged is tenant
        await session.flush()
        assert (await stored(session, tenant))["name"] == other.name
        assert tenant.version > other.version


# --- refused and unnoticed changes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("name", " x"),
        ("name", None),
        ("status", "gone"),
        ("labels", {"": "x"}),
        ("version", "x"),
        ("created_at", "1999-01-01T00:00:00"),
    ],
)
async def test_a_refused_value_is_not_written(session: AsyncSession, name: str, value: Any) -> None:
    tenant = new_tenant()
    session.add(tenant)
    await session.commit()
    before = tenant.model_dump()
    with pytest.raises(ValidationError):
        setattr(tenant, name, value)
    with pytest.raises(ValidationError):
        tenant.sqlmodel_update({"status_reason": "half of it", name: value})
    assert not session.dirty
    assert not session.is_modified(tenant)
    with statements(session) as seen:
        await session.commit()
    assert "UPDATE" not in " ".join(seen)
    assert tenant.model_dump() == before == await stored(session, tenant)


async def test_assigning_the_same_value_writes_nothing(session: AsyncSession) -> None:
    tenant = new_tenant(labels={"tier": "gold"})
    session.add(tenant)
    await session.commit()
    version = tenant.version
    with statements(session) as seen:
        tenant.sqlmodel_update(TenantUpdate(name=tenant.name, labels={"tier": "gold"}))
        await session.flush()
    assert "UPDATE" not in " ".join(seen)
    assert tenant.version == version


async def test_a_change_inside_a_value_is_not_noticed_and_a_new_value_is(session: AsyncSession) -> None:
    config = SystemConfig(key="k", value={"a": [1]})
    session.add(config)
    await session.commit()
    assert isinstance(config.value, dict)
    config.value["b"] = 2
    assert not session.dirty
    config.value = {**config.value, "c": 3}
    await session.commit()
    assert (await stored(session, config))["value"] == {"a": [1], "b": 2, "c": 3}


# --- the optimistic lock ----------------------------------------------------------------------------------------------


async def pair(manager: AsyncConnectionManager, kind: type[Model]) -> tuple[Any, Any]:
    """Return the key of a committed row, and the row as somebody else read it."""
    tenant, database, config = small_rows()
    async with manager.get_session() as session:
        session.add_all([tenant, database, config])
    row = {Tenant: tenant, TenantDatabase: database, SystemConfig: config}[kind]
    key = inspect(row).identity
    assert key is not None
    return key[0], row


CHANGES: dict[type[Model], tuple[str, Any, Any]] = {
    Tenant: ("status_reason", "first", "second"),
    TenantDatabase: ("port", 1111, 2222),
    SystemConfig: ("value", {"by": "first"}, {"by": "second"}),
}
each_versioned = pytest.mark.parametrize("kind", CHANGES, ids=lambda kind: kind.__name__)


async def write(manager: AsyncConnectionManager, row: Model, field: str, value: Any) -> None:
    async with manager.get_session() as session:
        session.add(row)
        setattr(row, field, value)


async def delete(manager: AsyncConnectionManager, *rows: Model) -> None:
    async with manager.get_session() as session:
        for row in rows:
            session.add(row)
            await session.delete(row)


@each_versioned
async def test_the_second_of_two_writers_is_refused(shared_manager: AsyncConnectionManager, kind: type[Model]) -> None:
    key, _ = await pair(shared_manager, kind)
    field, first, second = CHANGES[kind]
    async with AsyncSession(shared_manager.engine) as slow:
        late = await slow.get_one(kind, key)
        async with shared_manager.get_session() as quick:
            setattr(await quick.get_one(kind, key), field, first)
        setattr(late, field, second)
        with pytest.raises(StaleDataError):
            await slow.flush()
    async with shared_manager.get_session() as session:
        assert getattr(await session.get_one(kind, key), field) == first


@each_versioned
async def test_a_stale_write_is_an_error_of_ours(shared_manager: AsyncConnectionManager, kind: type[Model]) -> None:
    key, row = await pair(shared_manager, kind)
    field, first, second = CHANGES[kind]
    async with shared_manager.get_session() as session:
        setattr(await session.get_one(kind, key), field, first)
    with pytest.raises(StaleWriteError, match="has changed since it was read") as caught:
        await write(shared_manager, row, field, second)
    assert caught.value.retryable
    assert caught.value.__cause__ is None


@each_versioned
async def test_a_stale_row_is_not_deleted(shared_manager: AsyncConnectionManager, kind: type[Model]) -> None:
    key, row = await pair(shared_manager, kind)
    if kind is Tenant:  # what refers to it would be refused first
        async with shared_manager.get_session() as session:
            databases = await session.exec(select(TenantDatabase).where(col(TenantDatabase.tenant_id) == key))
            await session.delete(databases.one())
    field, first, _ = CHANGES[kind]
    async with shared_manager.get_session() as session:
        setattr(await session.get_one(kind, key), field, first)
    with pytest.raises(StaleWriteError):
        await delete(shared_manager, row)
    async with shared_manager.get_session() as session:
        assert await session.get(kind, key) is not None


async def test_a_row_changed_past_the_orm_is_stale_too(shared_manager: AsyncConnectionManager) -> None:
    key, row = await pair(shared_manager, Tenant)
    async with shared_manager.get_session() as session:
        await (await session.connection()).execute(
            text("UPDATE control_plane.tenants SET status = 'active' WHERE tenant_id = :id"), {"id": key}
        )
    with pytest.raises(StaleWriteError):
        await write(shared_manager, row, "name", "other")


async def test_one_session_writes_again_and_again(session: AsyncSession) -> None:
    """The version each UPDATE brings back is the one the next compares with."""
    tenant = new_tenant()
    session.add(tenant)
    versions = []
    for n in range(5):
        tenant.status_reason = str(n)
        await session.flush()
        versions.append(tenant.version)
    assert versions == sorted(set(versions))


# --- names and JSON ---------------------------------------------------------------------------------------------------

storable = st.characters(exclude_categories=["Cs"], exclude_characters="\x00")
json_values: st.SearchStrategy[JsonValue] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**MAX_INTEGER_DIGITS) + 1, 10**MAX_INTEGER_DIGITS - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(storable),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(storable), inner),
    max_leaves=20,
)
in_the_database = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def floats_again(value: JsonValue, original: JsonValue) -> JsonValue:
    """Return what was read with each number that went in as a float a float again."""
    if isinstance(original, float) and isinstance(value, int | float):
        return float(value)
    if isinstance(original, list) and isinstance(value, list):
        return [floats_again(one, other) for one, other in zip(value, original, strict=True)]
    if isinstance(original, dict) and isinstance(value, dict):
        return {key: floats_again(value[key], original[key]) for key in value}
    return value


async def round_trip(session: AsyncSession, value: JsonValue) -> JsonValue:
    """Store a value and read it back in place of what the session knows."""
    config = SystemConfig(key=f"key-{uuid7()}", value=value)
    session.add(config)
    await session.flush()
    session.expunge(config)
    return (await session.get_one(SystemConfig, config.key)).value


@in_the_database
@given(json_values)
@example(None)
@example(1e23)
@example(-0.0)
@example(5e-324)
@example(1.7976931348623157e308)
@example(2**53 + 1)
@example(10**MAX_INTEGER_DIGITS - 1)
@example({"": {"\U0010ffff": "\u2028\u0001"}})
async def test_every_accepted_json_value_comes_back(session: AsyncSession, value: JsonValue) -> None:
    assert floats_again(await round_trip(session, value), value) == value


async def test_a_float_with_an_exponent_comes_back_as_the_integer_it_says(session: AsyncSession) -> None:
    assert await round_trip(session, 1e23) == 10**23


async def test_json_null_is_a_value_and_not_sql_null(session: AsyncSession) -> None:
    config = SystemConfig(key="k", value=None)
    session.add(config)
    await session.flush()
    kind = "SELECT jsonb_typeof(value) FROM control_plane.system_config WHERE key = 'k'"
    assert await session.scalar(text(kind)) == "null"
    config.value = 5
    await session.flush()
    config.value = None
    await session.flush()
    assert await session.scalar(text(kind)) == "null"


async def test_the_deepest_and_the_largest_value_come_back(session: AsyncSession) -> None:
    deep: JsonValue = "leaf"
    for n in range(MAX_VALUE_DEPTH):
        deep = [deep] if n % 2 else {"k": deep}
    assert await round_trip(session, deep) == deep
    large: JsonValue = ["x" * (MAX_VALUE_BYTES - 4)]
    assert len(json.dumps(large)) == MAX_VALUE_BYTES
    assert await round_trip(session, large) == large


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=255)


@in_the_database
@given(names)
@example("\u0958" * 127)
@example("x" * 255)
@example("'; DROP TABLE control_plane.tenants; --")
@example("\U0001f469\u200d\U0001f680")
async def test_every_name_python_accepts_the_database_accepts(session: AsyncSession, name: str) -> None:
    try:
        tenant = new_tenant(name=name, labels={name[:20]: name}, status_reason=name)
    except ValidationError:
        return
    async with session.begin_nested() as savepoint:
        session.add(tenant)
        await session.flush()
        session.expunge(tenant)
        loaded = await session.get_one(Tenant, tenant.tenant_id)
        assert (loaded.name, loaded.labels, loaded.status_reason) == (tenant.name, tenant.labels, tenant.status_reason)
        assert Tenant.model_validate(loaded) == loaded
        await savepoint.rollback()


async def test_the_database_counts_characters_as_python_does(session: AsyncSession) -> None:
    tenant = new_tenant(name="\U0001f680" * 255)
    session.add(tenant)
    await session.flush()
    assert (
        await session.scalar(select(func.length(col(Tenant.name))).where(Tenant.tenant_id == tenant.tenant_id)) == 255
    )
