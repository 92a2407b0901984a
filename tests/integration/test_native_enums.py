"""Enums travel as text and are enums all the same: whatever is asked, the answer is the one SQLAlchemy's own type gives."""

import itertools
import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from pydantic import JsonValue
from sqlalchemy import event
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, distinct_on, insert
from sqlalchemy.exc import DBAPIError, StatementError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from car_control_plane import AsyncConnectionManager, Tenant, TenantRepository, TenantStatus
from car_control_plane.encryption import KeyState
from car_control_plane.errors import InvalidTransitionError, SchemaOutdatedError
from car_control_plane.models import (
    EncryptionKey,
    SystemConfig,
    TenantCreate,
    TenantDatabase,
    TenantEnvironment,
    metadata,
)
from car_control_plane.models.base import SCHEMA, NativeEnum, native_enums

# The same table, as SQLAlchemy alone would have it.
STOCK = sa.Table(
    "tenants",
    sa.MetaData(schema=SCHEMA),
    *(
        sa.Column(column.name, column.type.enum if isinstance(column.type, NativeEnum) else column.type)
        for column in metadata.tables["control_plane.tenants"].columns
    ),
)
OURS = metadata.tables["control_plane.tenants"]
NEW = uuid.UUID("00000000-0000-7000-8000-0000000000aa")

Question = Callable[[sa.Table, Any], sa.Executable]


@pytest.fixture
async def tenants(session: AsyncSession) -> AsyncSession:
    """Two tenants of each status but one, in no order."""
    for number, status in enumerate([*TenantStatus][1:] * 2):
        session.add(Tenant(name=f"tenant {number * 7 % 10}", environment=TenantEnvironment.STAGING, status=status))
    await session.flush()
    return session


def named(table: sa.Table, *wanted: Any) -> sa.Select[Any]:
    return sa.select(table.c.name).where(*wanted).order_by(table.c.name)


QUESTIONS: dict[str, Question] = {
    "equal": lambda t, s: named(t, s == TenantStatus.PENDING),
    "equal to text": lambda t, s: named(t, s == "pending"),
    "other than": lambda t, s: named(t, s != TenantStatus.PENDING),
    "less than": lambda t, s: named(t, s < TenantStatus.SUSPENDED),
    "between": lambda t, s: named(t, s.between(TenantStatus.INACTIVE, TenantStatus.SUSPENDED)),
    "null": lambda t, s: named(t, s.is_(None)),
    "distinct from": lambda t, s: named(t, s.is_distinct_from(TenantStatus.PENDING)),
    "in": lambda t, s: named(t, s.in_([TenantStatus.PENDING, "inactive"])),
    "in one": lambda t, s: named(t, s.in_([TenantStatus.PENDING])),
    "in nothing": lambda t, s: named(t, s.in_([])),
    "not in": lambda t, s: named(t, s.not_in([TenantStatus.PENDING])),
    "not in nothing": lambda t, s: named(t, s.not_in([])),
    "in a query": lambda t, s: named(t, s.in_(sa.select(s).where(t.c.name == "tenant 1"))),
    "with another column": lambda t, s: named(t, sa.tuple_(t.c.name, s).in_([("tenant 7", TenantStatus.SUSPENDED)])),
    "with another column in nothing": lambda t, s: named(t, sa.tuple_(t.c.name, s).in_([])),
    "any of an array": lambda t, s: named(t, s == sa.any_(sa.literal(["pending", "inactive"], ARRAY(s.type)))),
    "any of an array of text": lambda t, s: named(
        t, s == sa.any_(sa.cast(sa.literal(["pending"], ARRAY(sa.Text())), ARRAY(s.type)))
    ),
    "as text": lambda t, s: named(t, sa.cast(s, sa.Text()).like("%ing")),
    "a late value": lambda t, s: named(t, s == sa.bindparam("status", TenantStatus.PENDING)),
    "a literal": lambda t, s: sa.select(sa.literal(TenantStatus.PENDING, s.type)),
    "a value that is cast": lambda t, s: sa.select(sa.cast("pending", s.type)),
    "read": lambda t, s: sa.select(t.c.name, s).order_by(t.c.name),
    "read under a name": lambda t, s: sa.select(s.label("state"), t.c.name).order_by(t.c.name),
    "ordered": lambda t, s: sa.select(s).order_by(s),
    "ordered downwards": lambda t, s: sa.select(s).order_by(s.desc().nulls_last()),
    "ordered, not read": lambda t, s: sa.select(t.c.name).order_by(s, t.c.name),
    "ordered by name of the column": lambda t, s: sa.select(s).order_by("status"),
    "ordered by another name": lambda t, s: sa.select(s.label("state")).order_by("state"),
    "ordered by the label": lambda t, s: sa.select(label := s.label("state")).order_by(label.desc()),
    "ordered by what is computed": lambda t, s: (
        sa.select(t.c.environment, state := sa.func.max(s).label("state")).group_by(t.c.environment, s).order_by(state)
    ),
    "ordered by its number": lambda t, s: sa.select(s).order_by(sa.text("1")),
    "ordered by text": lambda t, s: sa.select(s).order_by(sa.text("status DESC")),
    "ordered by a name without a table": lambda t, s: sa.select(s).order_by(sa.column("status")),
    "distinct": lambda t, s: sa.select(s).distinct().order_by(s),
    "distinct on": lambda t, s: sa.select(s, t.c.name).ext(distinct_on(s)).order_by(s, t.c.name),
    "grouped": lambda t, s: sa.select(s, sa.func.count()).group_by(s).order_by(s),
    "grouped by name": lambda t, s: sa.select(s, sa.func.count()).group_by("status").order_by("status"),
    "highest": lambda t, s: sa.select(sa.func.max(s)),
    "aggregated": lambda t, s: sa.select(sa.func.array_agg(sa.distinct(s), type_=ARRAY(s.type))),
    "with a default": lambda t, s: sa.select(sa.func.coalesce(sa.null(), s)).order_by(t.c.name),
    "one or the other": lambda t, s: sa.select(sa.case((t.c.name > "tenant 5", s), else_=sa.null())).order_by(t.c.name),
    "within a query": lambda t, s: (
        sa.select((inner := sa.select(s, t.c.name).subquery()).c.status)
        .where(inner.c.status == "pending")
        .order_by(inner.c.status)
    ),
    "as a scalar": lambda t, s: sa.select(sa.select(s).where(t.c.name == "tenant 1").scalar_subquery().label("state")),
    "joined": lambda t, s: (
        sa.select(t.c.name, (other := t.alias()).c.status)
        .join_from(t, other, sa.and_(s == other.c.status, t.c.name > other.c.name))
        .order_by(t.c.name)
    ),
    "union": lambda t, s: sa.union(sa.select(s), sa.select(s)).order_by("status"),
    "union within a query": lambda t, s: sa.select(
        (both := sa.union_all(sa.select(s), sa.select(s)).subquery()).c.status
    ).order_by(both.c.status),
    "ranked": lambda t, s: sa.select(t.c.name, sa.func.rank().over(order_by=s)).order_by(t.c.name),
    "updated": lambda t, s: sa.update(t).where(s == "suspended").values(status="active").returning(t.c.name, s),
    "updated in a query": lambda t, s: sa.select(
        (done := sa.update(t).where(s == "suspended").values(status="active").returning(s).cte()).c.status
    ).where(done.c.status == "active"),
    "updated from a column": lambda t, s: sa.update(t).where(t.c.name == "tenant 1").values(status=s).returning(s),
    "deleted": lambda t, s: sa.delete(t).where(s == "pending").returning(s),
    "inserted, or updated": lambda t, s: (
        (
            new := insert(t).values(
                tenant_id=NEW,
                name="new",
                environment="staging",
                status="pending",
                labels={},
            )
        )
        .on_conflict_do_update(index_elements=["name"], set_={"status": new.excluded.status})
        .returning(s, t.c.labels)
    ),
    "inserted from a query": lambda t, s: (
        sa.insert(t)
        .from_select(
            ["tenant_id", "name", "environment", "status", "labels"],
            sa.select(sa.literal(NEW), sa.literal("copy"), t.c.environment, s, t.c.labels).where(
                t.c.name == "tenant 1"
            ),
            include_defaults=False,
        )
        .returning(s)
    ),
}


@pytest.mark.parametrize("name", QUESTIONS)
async def test_the_answer_is_that_of_the_stock_type(tenants: AsyncSession, name: str) -> None:
    answers = []
    for table in (STOCK, OURS):
        async with tenants.begin_nested() as savepoint:
            answers.append((await (await tenants.connection()).execute(QUESTIONS[name](table, table.c.status))).all())
            await savepoint.rollback()
    stock, ours = answers
    assert stock or "nothing" in name or name == "null"
    assert ours == stock
    assert [*map(repr, ours)] == [*map(repr, stock)]  # members, not their values, which are equal


async def test_sorting_is_in_the_order_of_the_enum(tenants: AsyncSession) -> None:
    order = [status for status in TenantStatus for _ in range(3)]
    for sorted_ in (col(Tenant.status), "status", sa.text("status"), sa.text("1")):
        found = (await tenants.exec(select(Tenant.status).order_by(sorted_))).all()
        assert found == sorted(found, key=lambda status: order.index(TenantStatus(status))), sorted_
    found = (await tenants.exec(select(Tenant.status).distinct().order_by(col(Tenant.status)))).all()
    assert found == [*TenantStatus]


async def test_values_with_their_text_in_sql_are_the_same(tenants: AsyncSession) -> None:
    statement = select(Tenant.name).where(col(Tenant.status).in_([TenantStatus.PENDING, TenantStatus.SUSPENDED]))
    dialect = (await tenants.connection()).dialect
    written = str(statement.compile(dialect=dialect, compile_kwargs={"literal_binds": True}))
    assert "IN ('pending', 'suspended')" in written
    found = (await (await tenants.connection()).exec_driver_sql(written)).scalars().all()
    assert sorted(found) == ["tenant 4", "tenant 5", "tenant 7", "tenant 8"]


async def test_the_orm_writes_and_reads_members(session: AsyncSession) -> None:
    many = [
        Tenant(name=f"t{number}", environment=environment, status=status)
        for number, (environment, status) in enumerate(itertools.product(TenantEnvironment, TenantStatus))
    ]
    before = [(tenant.name, tenant.environment, tenant.status) for tenant in many]
    session.add_all(many)  # one statement with many rows
    await session.flush()
    session.expunge_all()
    rows = await session.exec(select(Tenant).where(col(Tenant.name).like("t%")))
    assert [
        (row.name, row.environment, row.status) for row in sorted(rows, key=lambda row: int(row.name[1:]))
    ] == before
    tenant = (await session.exec(select(Tenant).where(Tenant.status == TenantStatus.ACTIVE, Tenant.name == "t0"))).one()
    tenant.status = TenantStatus.SUSPENDED
    await session.flush()
    await session.refresh(tenant)
    assert tenant.status is TenantStatus.SUSPENDED
    assert tenant.environment in TenantEnvironment


@pytest.mark.parametrize("value", ["frozen", "ACTIVE", "", "active "])
async def test_a_label_the_database_does_not_know_is_refused_by_it(session: AsyncSession, value: str) -> None:
    for table in (STOCK, OURS):
        async with session.begin_nested() as savepoint:
            with pytest.raises(DBAPIError) as refused:
                await (await session.connection()).execute(sa.select(table.c.name).where(table.c.status == value))
            assert getattr(refused.value.orig, "sqlstate", None) == "22P02"
            await savepoint.rollback()


@pytest.mark.parametrize("value", [7, b"active", ["active"]])
async def test_what_is_no_label_at_all_is_refused_before(session: AsyncSession, value: Any) -> None:
    for table in (STOCK, OURS):
        with pytest.raises((StatementError, TypeError)):
            await (await session.connection()).execute(sa.select(table.c.name).where(table.c.status == value))


async def test_a_label_newer_than_the_code_is_an_error(manager: AsyncConnectionManager) -> None:
    connection = await manager.connect()
    await connection.execute("ALTER TYPE control_plane.tenant_environment ADD VALUE 'moon'")
    await connection.execute(
        "INSERT INTO control_plane.tenants (tenant_id, name, environment) VALUES ($1, 'x', 'moon')", NEW
    )
    await connection.close()
    async with manager.get_read_session() as session:
        for statement in (select(Tenant), select(Tenant.environment)):
            with pytest.raises(SchemaOutdatedError, match=r"column tenants\.environment holds a label"):
                (await session.exec(statement)).all()


# --- what the driver is asked to know ---------------------------------------------------------------------------------


@contextmanager
def statements_of(manager: AsyncConnectionManager) -> Iterator[set[str]]:
    """Collect what is sent while this is open."""
    seen: set[str] = set()

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        seen.add(statement)

    event.listen(manager.engine.sync_engine, "before_cursor_execute", note)
    yield seen
    event.remove(manager.engine.sync_engine, "before_cursor_execute", note)


async def test_no_statement_of_ours_makes_the_driver_ask_about_types(shared_manager: AsyncConnectionManager) -> None:
    """Any type that is not PostgreSQL's own costs a new connection several round trips before the first row."""
    with statements_of(shared_manager) as seen:
        async with shared_manager.get_session() as session:
            tenants = TenantRepository(session)
            tenant = await tenants.create(TenantCreate(name="one", environment=TenantEnvironment.STAGING))
            await tenants.create_many([TenantCreate(name="two", environment=TenantEnvironment.STAGING)])
            await tenants.activate(tenant.tenant_id)
            await tenants.suspend(tenant.tenant_id, reason="why")
            await tenants.rename(tenant.tenant_id, "three")
            await tenants.get_by_name("two")
            await tenants.list(status=[*TenantStatus], environment=TenantEnvironment.STAGING, labels={"a": "b"})
            await tenants.count(status=TenantStatus.ACTIVE)
            with pytest.raises(InvalidTransitionError):
                await tenants.suspend(tenant.tenant_id)
            session.add(orm := Tenant(name="orm", environment=TenantEnvironment.STAGING))
            session.add(Tenant(name="orm too", environment=TenantEnvironment.STAGING))
            await session.flush()
            orm.status = TenantStatus.ACTIVE
            await session.flush()
            for model in (Tenant, TenantDatabase, EncryptionKey, SystemConfig):
                await session.exec(select(model))
            await session.exec(select(TenantDatabase).where(TenantDatabase.status == "error"))
            await session.exec(select(EncryptionKey).where(EncryptionKey.state == KeyState.CURRENT))
    connection = await shared_manager.connect()
    for statement in seen:
        prepared = await connection.prepare(statement)
        schemas = {attribute.type.schema for attribute in prepared.get_attributes()}
        schemas |= {parameter.schema for parameter in prepared.get_parameters()}
        assert schemas <= {"pg_catalog"}, statement
    await connection.close()
    assert len(seen) > 15


async def test_every_enum_of_the_models_travels_as_text() -> None:
    kinds = [column.type for table in metadata.tables.values() for column in table.columns]
    assert {kind.enum.name for kind in kinds if isinstance(kind, NativeEnum)} == native_enums(
        metadata.tables.values()
    ).keys()


async def test_the_index_on_status_is_used(own_database: str) -> None:
    async with AsyncConnectionManager(own_database) as manager:
        connection = await manager.connect()
        await connection.execute(
            "INSERT INTO control_plane.tenants (tenant_id, name, environment, status) SELECT md5(i::text)::uuid, 't' || i, "
            "'staging', (CASE WHEN i % 1000 = 0 THEN 'inactive' ELSE 'active' END)::control_plane.tenant_status "
            "FROM generate_series(1, 20000) AS i"
        )
        await connection.execute("ANALYZE control_plane.tenants")
        for wanted in (
            col(Tenant.status) == TenantStatus.INACTIVE,
            col(Tenant.status).in_([TenantStatus.INACTIVE, TenantStatus.SUSPENDED]),
        ):
            compiled = (
                select(Tenant)
                .where(wanted)
                .compile(dialect=manager.engine.dialect, compile_kwargs={"render_postcompile": True})
            )
            values = [compiled.params[name] for name in compiled.positiontup or ()]
            for mode in ("force_custom_plan", "force_generic_plan"):
                await connection.execute(f"SET plan_cache_mode = {mode}")
                plan = "\n".join(row[0] for row in await connection.fetch(f"EXPLAIN {compiled}", *values))
                assert "idx_tenants_status" in plan, plan
        await connection.close()


# --- JSON -------------------------------------------------------------------------------------------------------------


async def test_json_is_text_to_the_driver_and_json_to_the_models(shared_manager: AsyncConnectionManager) -> None:
    value: JsonValue = {"a": [1, 2**70, "\u00fc\U0001f680", None, True, 1.5], "": {}}
    async with shared_manager.get_session() as session:
        session.add(SystemConfig(key="k", value=value))
        await session.flush()
        session.expunge_all()
        assert (await session.get_one(SystemConfig, "k")).value == value
        assert (await session.exec(select(SystemConfig.value))).one() == value
        connection = await session.connection()
        typed = sa.text(
            "SELECT value, CAST(value AS json) AS again, ARRAY[value] AS more FROM control_plane.system_config"
        )
        columns: dict[str, Any] = {"value": JSONB(), "again": sa.JSON(), "more": ARRAY(JSONB())}
        assert (await connection.execute(typed.columns(**columns))).one() == (value, value, [value])
        plain = (await connection.exec_driver_sql("SELECT value FROM control_plane.system_config")).scalar_one()
        assert json.loads(plain) == value
        driver: Any = (await connection.get_raw_connection()).driver_connection
        assert await driver.fetchval("SELECT value FROM control_plane.system_config WHERE value = $1", plain) == plain


async def test_the_dialect_knows_what_it_did_not_ask(own_database: str) -> None:
    async with AsyncConnectionManager(own_database) as manager:
        stock = create_async_engine("postgresql+asyncpg://", async_creator=manager.connect)
        for engine in (stock, manager.engine):
            async with engine.connect():
                pass
        for fact in (
            "server_version_info",
            "default_schema_name",
            "default_isolation_level",
            "_backslash_escapes",
            "name",
        ):
            assert getattr(manager.engine.dialect, fact) == getattr(stock.dialect, fact), fact
        await stock.dispose()
