"""Repositories on a manager: the same verbs, results and errors as in a session, one round trip each; and rows that are what the ORM loads."""

import asyncio
import copy
import json
import pickle
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest
from pydantic import JsonValue, SecretStr
from sqlalchemy import event, func, inspect, update
from sqlalchemy.orm import FromStatement
from sqlalchemy.orm.instrumentation import ClassManager
from sqlalchemy.orm.state import InstanceState
from sqlalchemy.util import LRUCache
from sqlmodel import col, select

from car_control_plane import execution, pool as pools
from car_control_plane.connection import AsyncConnectionManager, PoolStatus
from car_control_plane.encryption import Key, Keyring, KeyState, SealedConnectionString, StaticKeys
from car_control_plane.errors import (
    AlreadyExistsError,
    ClosedError,
    ConfigKeyNotFoundError,
    ConfigurationError,
    ControlPlaneError,
    InvalidDataError,
    InvalidTransitionError,
    PermissionDeniedError,
    ProtectedError,
    SchemaOutdatedError,
    StaleWriteError,
    StillReferencedError,
    TenantDatabaseNotFoundError,
    TenantNotFoundError,
)
from car_control_plane.execution import DirectExecutor
from car_control_plane.models import (
    SYSTEM_ADMIN_ID,
    SYSTEM_ADMIN_NAME,
    ChangeLogEntry,
    CompletedOperation,
    EncryptionKey,
    SystemConfig,
    Tenant,
    TenantCreate,
    TenantDatabase,
    TenantDatabaseStatus,
    TenantEnvironment,
    TenantStatus,
    metadata,
    uuid7,
)
from car_control_plane.repositories import (
    EncryptionKeyRepository,
    SystemConfigRepository,
    TenantDatabaseRepository,
    TenantRepository,
)
from tests.schema.rows import acting_as

PRODUCTION, STAGING = TenantEnvironment.PRODUCTION, TenantEnvironment.STAGING
DSN = "postgresql://app:hunter2@db.example:5432/data"
MODELS = (Tenant, TenantDatabase, SystemConfig, EncryptionKey, ChangeLogEntry, CompletedOperation)


def new(name: str, **more: Any) -> TenantCreate:
    return TenantCreate.model_validate({"name": name, "environment": PRODUCTION, **more})


@pytest.fixture
async def direct(own_database: str) -> AsyncIterator[AsyncConnectionManager]:
    """A manager with one connection, whose statements can be counted."""
    async with AsyncConnectionManager(own_database, pool_size=1, max_overflow=0, pool_timeout_seconds=60) as manager:
        yield manager


@pytest.fixture
def tenants(direct: AsyncConnectionManager) -> TenantRepository:
    return TenantRepository(direct)


@pytest.fixture
def keyring() -> Keyring:
    return Keyring(StaticKeys(f"k1:{Key.generate('k1').to_base64()}"))


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What goes to the driver at the direct door while the block runs."""
    sent: list[str] = []
    fetch = pools.DirectPool.fetch

    async def noted(self: pools.DirectPool, sql: str, arguments: Any) -> Any:
        sent.append(sql)
        return await fetch(self, sql, arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pools.DirectPool, "fetch", noted)
        yield sent


async def filled(manager: AsyncConnectionManager, keyring: Keyring) -> None:
    """Put a row with something in every column into every table."""
    tenants, config = TenantRepository(manager), SystemConfigRepository(manager)
    made = await tenants.create(new("acme", status="active", labels={"tier": "gold", "ü": "\U0001f600"}))
    await tenants.suspend(made.tenant_id, reason="unpaid")
    databases = TenantDatabaseRepository(manager, keyring)
    stored = await databases.register(made.tenant_id, {"connection_string": DSN})
    sql = (
        "UPDATE control_plane.tenant_databases SET revision = 'abc', verified_at = now(), server_version = '18.4', "
        "tls_version = 'TLSv1.3', verification_error = 'none' WHERE id = $1"
    )
    await manager.fetch(sql, (stored.id,), repeat=False)
    await config.set("limits", {"a": [1, 2.5, None, True, "text", 2**80]})
    await manager.fetch(
        "UPDATE control_plane.encryption_keys SET provider = 'local', kek_ref = 'outer', wrapped = '\\x0102', state = 'pending'",
        (),
        repeat=False,
    )
    sql = "INSERT INTO control_plane.completed_operations (operation_id, outcome) VALUES ($1, $2)"
    await manager.fetch(sql, (uuid7(), '{"a": 1}'), repeat=False)


# --- rows are what the ORM loads --------------------------------------------------------------------------------------


def test_every_table_is_looked_at() -> None:
    assert {model.__tablename__ for model in MODELS} == {table.name for table in metadata.tables.values()}


SLOTS = ("__pydantic_fields_set__", "__pydantic_extra__", "__pydantic_private__")


@pytest.fixture(params=["builder", "public_builder"])
def each_builder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are built the fast way, and as they are when SQLAlchemy has not what that leans on."""
    monkeypatch.setattr(execution, "_shapes", LRUCache(10))
    if request.param == "public_builder":
        monkeypatch.delattr(ClassManager, "_state_constructor")
        monkeypatch.setattr(ClassManager, "new_instance", _new_instance)


def _new_instance(manager: Any) -> Any:
    """What SQLAlchemy's does, without the name that was taken away."""
    instance = manager.class_.__new__(manager.class_)
    setattr(instance, manager.STATE_ATTR, InstanceState(instance, manager))
    return instance


@pytest.mark.usefixtures("each_builder")
@pytest.mark.parametrize("model", MODELS)
async def test_a_row_is_what_the_orm_loads(model: Any, direct: AsyncConnectionManager, keyring: Keyring) -> None:
    await filled(direct, keyring)
    found = await DirectExecutor(direct).all(select(model))
    async with direct.get_session() as session:
        loaded = (await session.exec(select(model))).all()
    assert found
    key = inspect(model).primary_key
    by_key = {tuple(getattr(row, column.key) for column in key): row for row in loaded}
    assert len(found) == len(by_key)
    seen = dict.fromkeys((column.key for column in inspect(model).columns), False)
    for row in found:
        same = by_key[tuple(getattr(row, column.key) for column in key)]
        for name in seen:
            mine, theirs = getattr(row, name), getattr(same, name)
            assert (mine, type(mine)) == (theirs, type(theirs)), name
            seen[name] |= mine is not None
        assert row == same
        assert row.model_fields_set == same.model_fields_set == set(model.model_fields)
        assert {slot: getattr(row, slot) for slot in SLOTS} == {slot: getattr(same, slot) for slot in SLOTS}
        assert row.__dict__.keys() == same.__dict__.keys()
        mine, theirs = inspect(row), inspect(same)
        assert mine.detached
        assert (mine.key, mine.modified, mine.expired_attributes) == (theirs.key, False, set())
        assert mine.unloaded == theirs.unloaded
        if model is ChangeLogEntry:  # what it dumps is its Public schema's business
            continue
        assert list(row.model_dump()) == [name for name in seen if name in row.model_dump()], "in the declared order"
        assert row.model_dump() == same.model_dump()
        assert json.loads(row.model_dump_json()) == json.loads(same.model_dump_json())
    assert all(seen.values()), f"a column without a value proves nothing: {seen}"


CHANGES: dict[Any, dict[str, Any]] = {
    Tenant: {
        "name": "renamed",
        "environment": STAGING,
        "status": TenantStatus.INACTIVE,
        "labels": {"other": "label"},
        "status_reason": "another",
    },
    SystemConfig: {"value": [1]},
    TenantDatabase: {
        "connection_string_encrypted": SealedConnectionString("ccp1:k1:AAAA"),
        "database_name": "other",
        "host": "other.example",
        "port": 6432,
        "status": TenantDatabaseStatus.MIGRATING,
        "purpose": "reports",
        "revision": "def",
        "verified_at": datetime(2026, 1, 1, tzinfo=UTC),
        "server_version": "17.1",
        "tls_version": None,
        "verification_error": None,
    },
    EncryptionKey: {
        "provider": "another",
        "kek_ref": "other",
        "wrapped": "\\x03",
        "state": KeyState.CURRENT,
    },
    CompletedOperation: {"outcome": [1], "completed_at": datetime(2026, 1, 1, tzinfo=UTC)},
}


@pytest.mark.parametrize(
    ("model", "field"), [(model, field) for model, fields in CHANGES.items() for field in fields], ids=str
)
async def test_a_row_can_be_attached_and_its_change_is_one_update_of_that_column(
    model: Any, field: str, direct: AsyncConnectionManager, keyring: Keyring
) -> None:
    await filled(direct, keyring)
    row = next(
        row for row in await DirectExecutor(direct).all(select(model)) if getattr(row, "name", "") != "system_admin"
    )
    sent: list[str] = []
    event.listen(
        direct.engine.sync_engine, "before_cursor_execute", lambda _c, _k, statement, *_: sent.append(statement)
    )
    async with direct.get_session() as session:
        session.add(row)
        setattr(row, field, CHANGES[model][field])
    (statement,) = sent
    assert statement.startswith(f"UPDATE control_plane.{model.__tablename__} SET {field}=")
    changed = statement.partition(" SET ")[2].partition(" WHERE ")[0]
    assert changed.count("=$") == 1
    (again,) = [r for r in await DirectExecutor(direct).all(select(model)) if inspect(r).key == inspect(row).key]
    assert getattr(again, field) == CHANGES[model][field]
    assert getattr(again, "version", None) == getattr(row, "version", None)
    assert again == row, "the row has what the triggers wrote"


async def test_a_row_that_has_moved_on_is_not_overwritten(
    direct: AsyncConnectionManager, tenants: TenantRepository
) -> None:
    made = await tenants.create(new("acme"))
    key = made.tenant_id
    await tenants.update(key, {"labels": {"a": "b"}})  # type: ignore[arg-type]  # a mapping is taken as one

    async def write_over() -> None:
        async with direct.get_session() as session:
            session.add(made)
            made.labels = {"c": "d"}

    with pytest.raises(StaleWriteError):
        await write_over()
    assert (await tenants.get(key)).labels == {"a": "b"}


@pytest.mark.parametrize("model", MODELS)
async def test_a_row_merges_refreshes_pickles_and_copies(
    model: Any, direct: AsyncConnectionManager, keyring: Keyring
) -> None:
    await filled(direct, keyring)
    row = (await DirectExecutor(direct).all(select(model)))[0]
    for twin in (pickle.loads(pickle.dumps(row)), copy.deepcopy(row)):
        assert twin == row
        assert inspect(twin).key == inspect(row).key
    async with direct.get_session() as session:
        merged = await session.merge(row)
        assert merged == row
        assert not session.is_modified(merged)
    async with direct.get_session() as session:
        session.add(row)
        await session.refresh(row)
        assert not session.is_modified(row)
    assert row == merged


# --- the verbs --------------------------------------------------------------------------------------------------------


async def test_every_verb_of_tenants_is_one_round_trip(
    tenants: TenantRepository, direct: AsyncConnectionManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await tenants.create(new("acme", status="active"))
    key = made.tenant_id
    verbs: dict[str, Callable[[], Any]] = {
        "get": lambda: tenants.get(key),
        "get_or_none": lambda: tenants.get_or_none(key),
        "get_many": lambda: tenants.get_many([key, SYSTEM_ADMIN_ID, uuid7()]),
        "get_by_name": lambda: tenants.get_by_name("acme"),
        "exists": lambda: tenants.exists(key),
        "count": lambda: tenants.count(status="active"),  # type: ignore[arg-type]  # text is taken too
        "list": lambda: tenants.list(status=[TenantStatus.ACTIVE, TenantStatus.PENDING], labels={}, name_prefix="a"),
        "create": lambda: tenants.create(new("other")),
        "update": lambda: tenants.update(key, {"labels": {"a": "b"}}),  # type: ignore[arg-type]
        "rename": lambda: tenants.rename(key, "renamed"),
        "suspend": lambda: tenants.suspend(key, reason="unpaid"),
        "activate": lambda: tenants.activate(key),
        "deactivate": lambda: tenants.deactivate(key),
        "delete": lambda: tenants.delete(key),
    }
    for name, verb in verbs.items():
        with counting(monkeypatch) as sent:
            await verb()
        assert len(sent) == 1, name
    assert direct.pool_status().connects == 1


async def test_verbs_return_what_is_stored(tenants: TenantRepository, direct: AsyncConnectionManager) -> None:
    made = await tenants.create(new("acme", labels={"tier": "gold"}))
    assert await tenants.get(made.tenant_id) == made
    assert await tenants.get(made.tenant_id) is not made
    assert await tenants.get_by_name("acme") == made
    active = await tenants.activate(made.tenant_id, expected_version=made.version)
    assert (active.status, active.version > made.version) == (TenantStatus.ACTIVE, True)
    assert [tenant.name async for tenant in tenants.stream()] == [SYSTEM_ADMIN_NAME, "acme"]
    first = await tenants.list(limit=1)
    assert [tenant.name for tenant in await tenants.list(after=first.next_cursor)] == ["acme"]
    result = await tenants.create_many([new("acme"), new("b"), new("c")], on_conflict="skip")
    assert (result.created, result.skipped) == (2, 1)
    assert await tenants.count() == 4
    await tenants.delete(made.tenant_id)
    assert await tenants.get_or_none(made.tenant_id) is None
    assert direct.pool_status() == PoolStatus(limit=1, opened=1, in_use=0)


async def test_refusals_are_those_of_a_session(tenants: TenantRepository, direct: AsyncConnectionManager) -> None:
    made = await tenants.create(new("acme"))
    other = await tenants.create(new("other"))
    key = made.tenant_id
    refused: dict[type[ControlPlaneError], Callable[[], Any]] = {
        TenantNotFoundError: lambda: tenants.get(uuid7()),
        AlreadyExistsError: lambda: tenants.create(new("acme")),
        InvalidTransitionError: lambda: tenants.suspend(key),
        StaleWriteError: lambda: tenants.rename(key, "x", expected_version=1),
        ProtectedError: lambda: tenants.delete(SYSTEM_ADMIN_ID),
        InvalidDataError: lambda: tenants.get("x"),  # type: ignore[arg-type]  # that is what is refused
    }
    for kind, verb in refused.items():
        with pytest.raises(kind) as caught:
            await verb()
        assert type(caught.value) is kind
        assert caught.value.__context__ is None
    with pytest.raises(AlreadyExistsError):
        await tenants.rename(key, "other")
    with pytest.raises(AlreadyExistsError):
        await tenants.create_many([new("b"), new("acme")])
    assert {tenant.name async for tenant in tenants.stream()} == {SYSTEM_ADMIN_NAME, "acme", "other"}
    assert await tenants.get(other.tenant_id) == other


async def test_configuration_on_a_manager(direct: AsyncConnectionManager, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SystemConfigRepository(direct)
    values: tuple[JsonValue, ...] = (None, True, 1, 2**80, -1.5, "text", [], {"a": [1, {"b": None}]})
    for value in values:
        stored = await config.set("key", value)
        assert stored.value == value
        assert await config.get("key") == value
        assert type(await config.get("key")) is type(value)
    version = (await config.get_entry("key")).version
    assert (await config.set("key", 2, expected_version=version)).value == 2
    with pytest.raises(StaleWriteError):
        await config.set("key", 3, expected_version=version)
    with pytest.raises(StaleWriteError):
        await config.set("key", 3, expected_version=0)
    with counting(monkeypatch) as sent:
        assert (await config.set("other", [1], expected_version=0)).value == [1]
        assert await config.get_or_default("none", 5) == 5
        assert [entry.key for entry in await config.list(prefix="o")] == ["other"]
        await config.delete("other")
    assert len(sent) == 4
    with pytest.raises(ConfigKeyNotFoundError):
        await config.get("other")


async def test_databases_and_keys_on_a_manager(direct: AsyncConnectionManager, keyring: Keyring) -> None:
    tenants, databases = TenantRepository(direct), TenantDatabaseRepository(direct, keyring)
    made = await tenants.create(new("acme"))
    stored = await databases.register(made.tenant_id, {"connection_string": DSN})
    assert isinstance(stored.connection_string_encrypted, SealedConnectionString)
    assert await databases.get(stored.id) == stored
    assert (await databases.connection_string(stored.id)).reveal() == DSN
    assert await databases.list_for_tenant(made.tenant_id) == [stored]
    changed = await databases.update_connection_string(stored.id, SecretStr(DSN.replace("db.", "db2.")))
    assert (changed.host, changed.version > stored.version) == ("db2.example", True)
    with pytest.raises(StillReferencedError):
        await tenants.delete(made.tenant_id)
    await databases.delete(stored.id)
    with pytest.raises(TenantDatabaseNotFoundError):
        await databases.get(stored.id)
    keys = EncryptionKeyRepository(direct)
    assert [key.kid for key in await keys.list()] == ["k1"]


@pytest.mark.parametrize("where", [None, "postgresql://h/d", object()])
async def test_what_is_neither_a_session_nor_a_manager_is_refused(where: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"a session or a manager, and not {type(where).__name__}"):
        TenantRepository(where)


async def test_a_closed_manager_says_so(own_database: str) -> None:
    manager = AsyncConnectionManager(own_database)
    await manager.close()
    with pytest.raises(ClosedError):
        await TenantRepository(manager).get(SYSTEM_ADMIN_ID)


async def test_a_role_without_rights_is_told_the_grants(direct: AsyncConnectionManager, own_database: str) -> None:
    role = f"poor_{uuid.uuid4().hex}"
    await direct.fetch(f"CREATE ROLE {role}", (), repeat=False)
    try:
        async with AsyncConnectionManager(acting_as(role, own_database)) as poor:
            tenants = TenantRepository(poor)
            for verb in (tenants.get, tenants.activate):
                with pytest.raises(PermissionDeniedError) as caught:
                    await verb(uuid7())
                assert "GRANT USAGE ON SCHEMA control_plane" in caught.value.hint
                assert f'TO "{role}"' in caught.value.hint
    finally:
        await direct.fetch(f"DROP ROLE {role}", (), repeat=False)


# --- a schema that is newer than the code -----------------------------------------------------------------------------


async def test_a_label_the_code_does_not_know_is_a_newer_schema_at_both_doors(
    direct: AsyncConnectionManager, tenants: TenantRepository
) -> None:
    made = await tenants.create(new("acme"))
    await direct.fetch("ALTER TYPE control_plane.tenant_environment ADD VALUE 'canary-label'", (), repeat=False)
    sql = "UPDATE control_plane.tenants SET environment = 'canary-label' WHERE name = 'acme'"
    await direct.fetch(sql, (), repeat=False)

    async def in_session(verb: str) -> None:
        async with direct.get_session() as session:
            await getattr(TenantRepository(session), verb)(made.tenant_id)

    for read in (
        lambda: tenants.get(made.tenant_id),
        tenants.list,
        lambda: tenants.get_many([made.tenant_id]),
        lambda: in_session("get"),
        lambda: in_session("activate"),
    ):
        with pytest.raises(SchemaOutdatedError, match=r"column tenants\.environment holds a label") as caught:
            await read()
        assert caught.value.details == {"column": "tenants.environment"}
        assert "canary" not in str(caught.value)
        assert caught.value.__context__ is None
    with pytest.raises(SchemaOutdatedError, match=r"the change was made, .* column tenants\.environment") as stored:
        await tenants.activate(made.tenant_id)
    assert stored.value.details == {"column": "tenants.environment", "stored": True}
    assert stored.value.__context__ is None
    assert (await direct.fetch("SELECT status::text FROM control_plane.tenants WHERE name = 'acme'", (), repeat=True))[
        0
    ][0] == "active"


# --- what neither of us expected --------------------------------------------------------------------------------------


async def at_both_doors(
    manager: AsyncConnectionManager, verb: Callable[[SystemConfigRepository], Any]
) -> list[ControlPlaneError]:
    """Call a verb that fails, in a session and on the manager, and return both errors."""

    async def in_session() -> None:
        async with manager.get_session() as session:
            await verb(SystemConfigRepository(session))

    errors: list[ControlPlaneError] = []
    for call in (in_session, lambda: verb(SystemConfigRepository(manager))):
        with pytest.raises(ControlPlaneError) as caught:
            await call()
        assert (caught.value.__context__, caught.value.__cause__) == (None, None)
        errors.append(caught.value)
    return errors


async def test_a_refusal_nobody_knows_is_one_error_at_both_doors(direct: AsyncConnectionManager) -> None:
    for sql in (
        "CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql AS "
        "'BEGIN RAISE EXCEPTION ''canary'' USING ERRCODE = ''ZZ123''; END'",
        "CREATE TRIGGER refuse BEFORE INSERT ON control_plane.system_config FOR EACH ROW EXECUTE FUNCTION public.refuse()",
    ):
        await direct.fetch(sql, (), repeat=False)
    errors = await at_both_doors(direct, lambda config: config.set("key", 1))
    for error in errors:
        assert type(error) is ControlPlaneError
        assert str(error) == "the server refused the statement (SQLSTATE ZZ123)"
        assert error.details == {"sqlstate": "ZZ123"}


@pytest.mark.parametrize("text", ["1" * 5000, "[" * 3000 + "]" * 3000], ids=["digits", "levels"])
async def test_a_value_python_cannot_read_is_one_error_at_both_doors(direct: AsyncConnectionManager, text: str) -> None:
    insert = "INSERT INTO control_plane.system_config (key, value) VALUES ('key', $1)"
    await direct.fetch(insert, (text,), repeat=False)
    if text.startswith("["):  # how deep Python reads depends on its version
        with suppress(RecursionError):
            json.loads(text)
            return
    for error in await at_both_doors(direct, lambda config: config.get("key")):
        assert type(error) is InvalidDataError
        assert "too long, or is nested too deeply" in str(error)
    with pytest.raises(
        ControlPlaneError, match="the change was made, but the row as it is now cannot be read"
    ) as caught:
        await direct_write(direct)
    assert caught.value.details["stored"] is True


async def direct_write(manager: AsyncConnectionManager) -> None:
    """Write something that gives back the row it cannot read."""
    statement: FromStatement[Any] = FromStatement(
        [SystemConfig],
        update(SystemConfig).values(value=func.jsonb_build_array(col(SystemConfig.value))).returning(SystemConfig),
    )
    await DirectExecutor(manager).one_or_none(statement, {})


async def test_many_at_once_in_every_repository(direct: AsyncConnectionManager, keyring: Keyring) -> None:
    await filled(direct, keyring)
    tenants, config = TenantRepository(direct), SystemConfigRepository(direct)
    databases, keys = TenantDatabaseRepository(direct), EncryptionKeyRepository(direct)
    made = await tenants.get_by_name("acme")
    (database,) = await databases.list_for_tenant(made.tenant_id)
    assert await tenants.get_many([made.tenant_id, uuid7()]) == {made.tenant_id: made}
    assert await databases.get_many([database.id, str(database.id), uuid7()]) == {database.id: database}  # type: ignore[list-item]
    assert await config.get_many(["limits", "none"]) == {"limits": await config.get("limits")}
    assert await keys.get_many(["k1", "k2"]) == {"k1": await keys.get("k1")}
    everything: tuple[tuple[Any, Any], ...] = ((tenants, "x"), (databases, 5), (config, 5), (keys, None))
    for repository, refused in everything:
        assert await repository.get_many([]) == {}
        with pytest.raises(InvalidDataError):
            await repository.get_many([refused])


# --- gets that share a statement --------------------------------------------------------------------------------------


async def test_gets_of_one_turn_share_statements_and_each_has_its_own_row(
    tenants: TenantRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [await tenants.create(new(f"t{number}")) for number in range(32)]
    wanted = [tenant.tenant_id for tenant in made] * 2 + [uuid7()]
    with counting(monkeypatch) as sent:
        found = await asyncio.gather(*(tenants.get_or_none(key) for key in wanted))
    assert found == [*made, *made, None]
    assert len({id(row) for row in found}) == len(wanted)
    assert len(sent) == 2, "the first goes alone, the others together"
    found[0].labels = {"mine": "alone"}  # type: ignore[union-attr]
    assert found[32].labels == {}  # type: ignore[union-attr]


async def test_who_is_cancelled_disturbs_nobody(direct: AsyncConnectionManager, tenants: TenantRepository) -> None:
    made = [await tenants.create(new(f"t{number}")) for number in range(10)]
    for cancelled in (0, 1, 5):
        tasks = [asyncio.create_task(tenants.get(tenant.tenant_id)) for tenant in made]
        await asyncio.sleep(0)
        tasks[cancelled].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(results.pop(cancelled), asyncio.CancelledError)
        assert results == [tenant for number, tenant in enumerate(made) if number != cancelled]
    never = asyncio.create_task(tenants.get(made[0].tenant_id))
    never.cancel()
    await asyncio.wait({never})
    assert await tenants.get(made[0].tenant_id) == made[0]
    assert direct.coalescers[Tenant, "tenant_id"]._under_way == 0


async def test_an_error_reaches_everybody_as_his_own(own_database: str) -> None:
    settings: dict[str, Any] = {"pool_size": 1, "max_overflow": 0, "pool_timeout_seconds": 0.1}
    async with AsyncConnectionManager(own_database, **settings) as manager:
        tenants = TenantRepository(manager)
        async with manager.get_session() as session:
            await session.connection()
            results = await asyncio.gather(*(tenants.get(uuid7()) for _ in range(5)), return_exceptions=True)
        assert [getattr(error, "code", None) for error in results] == ["pool-timeout"] * 5
        assert len({id(error) for error in results}) == 5
        assert (await tenants.get(SYSTEM_ADMIN_ID)).name == SYSTEM_ADMIN_NAME


async def test_closing_ends_the_gets_that_wait(own_database: str) -> None:
    manager = AsyncConnectionManager(own_database, pool_size=1, max_overflow=0, pool_timeout_seconds=60)
    tenants = TenantRepository(manager)
    async with manager.get_session() as session:
        await session.connection()
        tasks = [asyncio.create_task(tenants.get(uuid7())) for _ in range(5)]
        while manager.pool_status().waiting < 2:  # noqa: ASYNC110 -- one alone, and the others together
            await asyncio.sleep(0)
        await manager.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(error) for error in results] == [ClosedError] * 5


async def test_a_get_sees_what_was_stored_before_it_began(tenants: TenantRepository) -> None:
    made = await tenants.create(new("acme", status="active"))
    for _ in range(20):
        others = [asyncio.create_task(tenants.get(made.tenant_id)) for _ in range(5)]
        await asyncio.sleep(0)
        version = (await tenants.update(made.tenant_id, {"labels": {"n": str(uuid.uuid4())}})).version  # type: ignore[arg-type]
        assert (await tenants.get(made.tenant_id)).version == version
        await asyncio.gather(*others)


# --- what of SQLAlchemy is private ------------------------------------------------------------------------------------


def test_the_private_names_of_sqlalchemy_are_there() -> None:
    assert hasattr(ClassManager, "_state_constructor")
    statement = select(Tenant).where(Tenant.name == "a")
    assert statement._generate_cache_key() is not None
    assert hasattr(asyncpg.Record, "keys")
