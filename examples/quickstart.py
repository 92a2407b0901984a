"""The main verbs in one file. Runs with nothing set up: python examples/quickstart.py

Set DATABASE_URL to use a server of your own; without it a temporary embedded one is started and removed again.
"""

import asyncio
import os

from car_control_plane import (
    AsyncConnectionManager,
    InvalidTransitionError,
    StaleWriteError,
    SystemConfigRepository,
    TenantCreate,
    TenantEnvironment,
    TenantRepository,
    TenantUpdate,
)
from car_control_plane.migrations import upgrade


async def main() -> None:
    async with AsyncConnectionManager(os.environ.get("DATABASE_URL", "embedded:")) as manager:
        await upgrade(manager)
        print("healthy:", bool(await manager.health_check()))

        async with manager.get_session() as session:  # one transaction: committed at the end, or not at all
            tenants = TenantRepository(session)
            acme = await tenants.create(TenantCreate(name="acme", environment=TenantEnvironment.PRODUCTION))
            acme = await tenants.activate(acme.tenant_id)
            print("active:", acme.name, acme.status)

        async with manager.get_session() as session:
            tenants = TenantRepository(session)
            suspended = await tenants.suspend(acme.tenant_id, reason="payment overdue")
            print("suspended:", suspended.status_reason)
            try:
                await tenants.suspend(acme.tenant_id)
            except InvalidTransitionError as error:
                print("refused:", error)
            try:  # somebody else read the tenant before it was suspended
                await tenants.update(
                    acme.tenant_id, TenantUpdate(labels={"tier": "gold"}), expected_version=acme.version
                )
            except StaleWriteError as error:
                print("refused:", error)

        async with manager.get_session() as session:
            config = SystemConfigRepository(session)
            limits = await config.set("billing.limits", {"seats": 50})
            await config.set("billing.limits", {"seats": 80}, expected_version=limits.version)

        async with manager.get_read_session() as session:  # READ ONLY in the server, too
            print("limits:", await SystemConfigRepository(session).get("billing.limits"))
            page = await TenantRepository(session).list(limit=10)
            print("tenants:", ", ".join(tenant.name for tenant in page))


if __name__ == "__main__":
    asyncio.run(main())
