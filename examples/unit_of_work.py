"""Do something once, whatever happens: run twice with the same id, the tenant is registered once."""

import asyncio
import uuid

from sqlmodel.ext.asyncio.session import AsyncSession

from car_control_plane import AsyncConnectionManager, TenantCreate, TenantEnvironment, TenantRepository
from car_control_plane.migrations import upgrade


async def register(manager: AsyncConnectionManager, request_id: uuid.UUID, name: str) -> str:
    async def unit(session: AsyncSession) -> str:
        tenant = await TenantRepository(session).create(
            TenantCreate(name=name, environment=TenantEnvironment.PRODUCTION)
        )
        return str(tenant.tenant_id)

    return await manager.run(unit, operation_id=request_id)


async def main() -> None:
    async with AsyncConnectionManager("embedded:") as manager:
        await upgrade(manager)
        request_id = uuid.uuid4()
        first = await register(manager, request_id, "acme")
        print(f"registered {first}")
        again = await register(manager, request_id, "acme")
        print(f"asked again: {'the same tenant' if again == first else 'another one'}")
        tenants = TenantRepository(manager)  # on the manager: each verb is one statement, and a transaction of its own
        print(f"there are {await tenants.count()} tenants, {(await tenants.get_by_name('acme')).name} among them")


if __name__ == "__main__":
    asyncio.run(main())
