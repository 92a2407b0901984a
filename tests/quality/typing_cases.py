"""What a type checker makes of the public names. Nothing here runs: `nox -s types` checks it, and an exemption nobody needs is an error there."""

import uuid
from typing import assert_type

from pydantic import JsonValue
from sqlmodel import select
from sqlmodel.ext.asyncio.session import AsyncSession

from car_control_plane import (
    AsyncConnectionManager,
    AsyncReadSession,
    CreateManyResult,
    HealthStatus,
    Page,
    SystemConfig,
    SystemConfigRepository,
    Tenant,
    TenantCreate,
    TenantEnvironment,
    TenantRepository,
    TenantStatus,
    TenantUpdate,
    get_connection_manager,
    init_db,
)


def reads(session: AsyncReadSession) -> None: ...
def writes(session: AsyncSession) -> None: ...


async def sessions(manager: AsyncConnectionManager) -> None:
    async with manager.get_session() as session:
        assert_type(session, AsyncSession)
        writes(session)
        reads(session)
        assert_type((await session.exec(select(Tenant))).first(), Tenant | None)
    async with manager.get_read_session() as reading:
        assert_type(reading, AsyncReadSession)
        reads(reading)
        writes(reading)  # type: ignore[arg-type]  # a read session does not write
        reading.add(Tenant)  # type: ignore[attr-defined]  # nor does it offer to
        assert_type((await reading.exec(select(Tenant))).first(), Tenant | None)
        assert_type((await reading.exec(select(Tenant.name, Tenant.version))).first(), tuple[str, int] | None)
        assert_type(await reading.get(Tenant, uuid.uuid4()), Tenant | None)
    assert_type(await manager.health_check(), HealthStatus)


async def tenants(session: AsyncSession, reading: AsyncReadSession, key: uuid.UUID) -> None:
    repository = TenantRepository(session)
    TenantRepository(reading)
    assert_type(await repository.get(key), Tenant)
    assert_type(await repository.get_or_none(key), Tenant | None)
    assert_type(await repository.get_many([key]), dict[uuid.UUID, Tenant])
    assert_type(await repository.list(status=TenantStatus.ACTIVE, labels={"plan": "gold"}), Page[Tenant])
    assert_type((await repository.list()).items, tuple[Tenant, ...])
    async for tenant in repository.stream(environment=[TenantEnvironment.STAGING]):
        assert_type(tenant, Tenant)
    assert_type(await repository.count(), int)
    new = TenantCreate(name="acme", environment=TenantEnvironment.STAGING)
    assert_type(await repository.create(new), Tenant)
    assert_type(await repository.create_many([new, {"name": "other"}], on_conflict="skip"), CreateManyResult)
    assert_type(await repository.update(key, TenantUpdate(name="other"), expected_version=1), Tenant)
    assert_type(await repository.suspend(key, reason="late"), Tenant)
    await repository.list(colour="red")  # type: ignore[call-arg]  # there is no such filter
    await repository.create_many([new], on_conflict="ignore")  # type: ignore[arg-type]  # nor such a way


async def config(session: AsyncSession) -> None:
    repository = SystemConfigRepository(session)
    assert_type(await repository.get("key"), JsonValue)
    assert_type(await repository.get_entry("key"), SystemConfig)
    assert_type(await repository.set("key", {"deep": [1, None]}, expected_version=0), SystemConfig)
    await repository.set("key", object())  # type: ignore[arg-type]  # no JSON value


def fields(tenant: Tenant) -> None:
    assert_type(tenant.tenant_id, uuid.UUID)
    assert_type(tenant.status, TenantStatus)
    assert_type(tenant.status_reason, str | None)
    assert_type(tenant.version, int)
    assert_type(init_db(), AsyncConnectionManager)
    assert_type(get_connection_manager(), AsyncConnectionManager)
