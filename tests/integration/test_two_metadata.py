"""Our tables live beside those of a host application: neither side creates, maps or migrates the other's."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, MetaData, inspect, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import configure_mappers, selectinload
from sqlmodel import SQLModel, col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from car_control_plane import dsn as dsns, migrations, models
from car_control_plane.connection import AsyncConnectionManager
from tests.fixtures.two_services import billing, crm

TABLES = {
    "public": {"tenants", "invoices"},
    "crm": {"tenants", "contacts"},
    "control_plane": {
        "tenants",
        "tenant_databases",
        "system_config",
        "change_log",
        "encryption_keys",
        "completed_operations",
    },
}


@asynccontextmanager
async def service(dsn: str) -> AsyncIterator[AsyncEngine]:
    """Give an engine as a host application makes one, without ours."""
    parsed = dsns.parse(dsn)

    async def connect() -> asyncpg.Connection:
        return await asyncpg.connect(parsed.for_host(parsed.hosts[0]), password=parsed.password)

    engine = create_async_engine("postgresql+asyncpg://", async_creator=connect)
    try:
        yield engine
    finally:
        await engine.dispose()


async def create(engine: AsyncEngine, *several: MetaData) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("CREATE SCHEMA IF NOT EXISTS crm"))
        for metadata in several:
            await connection.run_sync(metadata.create_all)


async def tables(engine: AsyncEngine) -> dict[str, set[str]]:
    """Return the tables of every schema that has some, without Alembic's."""
    sql = "SELECT schemaname, tablename FROM pg_tables WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
    async with engine.connect() as connection:
        rows = (await connection.execute(text(sql))).all()
    found: dict[str, set[str]] = {}
    for schema, table in rows:
        if table != "alembic_version":
            found.setdefault(schema, set()).add(table)
    return found


def test_each_class_is_on_the_metadata_of_its_service() -> None:
    assert {table.key for table in models.metadata.sorted_tables} == {
        f"control_plane.{t}" for t in TABLES["control_plane"]
    }
    assert {table.key for table in crm.metadata.sorted_tables} == {f"crm.{t}" for t in TABLES["crm"]}
    assert TABLES["public"] <= set(SQLModel.metadata.tables)
    assert not [table.key for table in SQLModel.metadata.sorted_tables if table.schema == models.SCHEMA]
    for tenant, metadata in (
        (models.Tenant, models.metadata),
        (billing.Tenant, SQLModel.metadata),
        (crm.Tenant, crm.metadata),
    ):
        assert inspect(tenant).local_table is metadata.tables[inspect(tenant).local_table.key]  # type: ignore[attr-defined]  # a table


def test_a_class_named_like_ours_is_found_by_its_own_service() -> None:
    configure_mappers()
    targets = {
        billing.Invoice: billing.Tenant,
        crm.Contact: crm.Tenant,
    }
    for owner, target in targets.items():
        assert inspect(owner).relationships["tenant"].mapper.class_ is target
    assert inspect(models.TenantDatabase).relationships["_tenant"].mapper.class_ is models.Tenant


@pytest.mark.parametrize(
    ("metadata", "schema"), [(SQLModel.metadata, "public"), (crm.metadata, "crm")], ids=["billing", "crm"]
)
async def test_a_service_creates_only_its_own_tables(empty_database: str, metadata: MetaData, schema: str) -> None:
    async with service(empty_database) as engine:
        await create(engine, metadata)
        found = await tables(engine)
    assert set(found) == {schema}
    assert found[schema] >= TABLES[schema]


async def test_migrating_creates_only_ours(own_database: str) -> None:
    async with service(own_database) as engine:
        assert await tables(engine) == {"control_plane": TABLES["control_plane"]}


async def test_three_tenants_in_one_transaction(own_database: str) -> None:
    async with service(own_database) as engine:
        await create(engine, SQLModel.metadata, crm.metadata)
        ours = models.Tenant(name="acme", environment=models.TenantEnvironment.PRODUCTION)
        async with AsyncSession(engine, expire_on_commit=False) as session:
            session.add_all([ours, billing.Tenant(name="acme", status=billing.TenantStatus.OWING)])
            session.add(crm.Tenant(tenant_id=ours.tenant_id, contacts=[crm.Contact()]))  # type: ignore[call-arg]  # linked
            await session.commit()
            session.expunge_all()
            theirs = (await session.exec(select(billing.Tenant))).one()
            assert (theirs.id, theirs.status) == (1, billing.TenantStatus.OWING)
            assert (await session.get_one(models.Tenant, ours.tenant_id)).status is models.TenantStatus.PENDING
            linked: Any = crm.Tenant.contacts
            contact = (await session.exec(select(crm.Tenant).options(selectinload(linked)))).one().contacts[0]
            assert contact.tenant_id == ours.tenant_id
            same = col(crm.Tenant.tenant_id) == col(models.Tenant.tenant_id)
            assert len((await session.exec(select(models.Tenant, crm.Tenant).join(crm.Tenant, same))).all()) == 1


async def test_our_session_reads_their_tables_by_their_schema(own_database: str) -> None:
    async with service(own_database) as engine:
        await create(engine, crm.metadata)
    async with AsyncConnectionManager(own_database) as manager:
        async with manager.get_session() as session:
            session.add(crm.Tenant(tenant_id=models.SYSTEM_ADMIN_ID))
        async with manager.get_session() as session:
            assert await session.get(crm.Tenant, models.SYSTEM_ADMIN_ID) is not None
            assert (await session.get_one(models.Tenant, models.SYSTEM_ADMIN_ID)).name == "system_admin"


async def test_our_migrations_leave_their_tables_alone(own_database: str) -> None:
    """Without `include_name` autogenerate would propose to drop the tables of every other schema."""
    async with service(own_database) as engine:
        await create(engine, SQLModel.metadata, crm.metadata)
        before = await tables(engine)
        assert await migrations.check(own_database) == ()
        assert await migrations.drift(own_database) == ()
        await migrations.downgrade(own_database, "base")
        assert await tables(engine) == {schema: found for schema, found in before.items() if schema != models.SCHEMA}
        await migrations.upgrade(own_database)
        assert await tables(engine) == before
        assert await migrations.check(own_database) == ()


def differences(connection: Connection, metadata: MetaData, **options: Any) -> list[Any]:
    context = MigrationContext.configure(connection, opts={"target_metadata": metadata, **options})
    return compare_metadata(context, metadata)  # type: ignore[no-any-return]  # Alembic says Any


async def test_their_migrations_leave_our_tables_alone(own_database: str) -> None:
    def only_crm(name: str | None, kind: str, _: Any) -> bool:
        return kind != "schema" or name == "crm"

    def compare(connection: Connection) -> list[list[Any]]:
        return [
            differences(connection, SQLModel.metadata),
            differences(connection, crm.metadata, include_schemas=True, include_name=only_crm),
            differences(connection, crm.metadata, include_schemas=True),
        ]

    async with service(own_database) as engine:
        await create(engine, SQLModel.metadata, crm.metadata)
        async with engine.connect() as connection:
            as_usual, several_schemas, carelessly = await connection.run_sync(compare)
    assert as_usual == []
    assert several_schemas == []
    removed = {change[1].fullname for change in carelessly if change[0] == "remove_table"}
    assert "control_plane.tenants" in removed  # a filter is needed on their side as on ours
