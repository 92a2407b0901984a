"""What a verb of a repository on a manager costs on the wire: one Bind, Execute and Sync, one answer, nothing before and nothing after."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from pydantic import SecretStr

from car_control_plane.connection import AsyncConnectionManager
from car_control_plane.encryption import Key, Keyring, StaticKeys
from car_control_plane.models import (
    SYSTEM_ADMIN_ID,
    TenantCreate,
    TenantDatabaseStatus,
    TenantEnvironment,
    TenantStatus,
    TenantUpdate,
    uuid7,
)
from car_control_plane.repositories import (
    EncryptionKeyRepository,
    SystemConfigRepository,
    TenantDatabaseRepository,
    TenantRepository,
)
from tests.fixtures.faults import FaultProxy, Wire

Verb = Callable[[], Awaitable[object]]
PREPARED = {("to_server", "B"): 1, ("to_server", "E"): 1, ("to_server", "S"): 1}
DSN = "postgresql://app:secret@db.example:5432/data"


@pytest.fixture
async def proxy(own_database: str) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(own_database) as proxy:
        yield proxy


@pytest.fixture
async def manager(proxy: FaultProxy) -> AsyncIterator[AsyncConnectionManager]:
    # One connection, and never a ping: what is counted is the verb.
    settings: dict[str, Any] = {"pool_size": 1, "max_overflow": 0, "pool_ping_after_seconds": 600}
    async with AsyncConnectionManager(proxy.dsn, **settings) as manager:
        yield manager


async def counted(proxy: FaultProxy, verb: Verb) -> Wire:
    with proxy.counting() as wire:
        await verb()
    return wire


def sent(wire: Wire) -> dict[tuple[str, str], int]:
    return {kind: number for kind, number in wire.messages.items() if kind[0] == "to_server"}


async def verbs_of(manager: AsyncConnectionManager) -> dict[str, tuple[Verb, int]]:
    """Every verb, and how many statements it is."""
    tenants, config = TenantRepository(manager), SystemConfigRepository(manager)
    keys = EncryptionKeyRepository(manager)
    keyring = Keyring(StaticKeys(f"k1:{Key.generate('k1').to_base64()}"))
    databases = TenantDatabaseRepository(manager, keyring)
    made = await tenants.create(TenantCreate(name="acme", environment=TenantEnvironment.STAGING))
    key = made.tenant_id
    database = (await databases.register(key, {"connection_string": DSN, "purpose": "first"})).id
    counter = iter(range(1000))

    def new() -> TenantCreate:
        return TenantCreate(name=f"tenant {next(counter)}", environment=TenantEnvironment.STAGING)

    async def create_and_delete() -> None:
        await tenants.delete((await tenants.create(new())).tenant_id)

    async def to_and_fro() -> None:
        await tenants.activate(key)
        await tenants.suspend(key, reason="unpaid")

    async def set_and_delete() -> None:
        await config.set("gone", next(counter), expected_version=0)
        await config.delete("gone")

    async def register_and_delete() -> None:
        await databases.delete((await databases.register(key, {"connection_string": DSN})).id)

    status = TenantDatabaseStatus
    return {
        "tenants.get": (lambda: tenants.get(key), 1),
        "tenants.get_or_none": (lambda: tenants.get_or_none(uuid7()), 1),
        "tenants.get_by_name": (lambda: tenants.get_by_name("acme"), 1),
        "tenants.get_many": (lambda: tenants.get_many([key, SYSTEM_ADMIN_ID, uuid7()]), 1),
        "tenants.exists": (lambda: tenants.exists(key), 1),
        "tenants.count": (lambda: tenants.count(status=TenantStatus.ACTIVE), 1),
        "tenants.list": (lambda: tenants.list(limit=10, name_prefix="a", environment=TenantEnvironment.STAGING), 1),
        "tenants.create, delete": (create_and_delete, 2),
        "tenants.update": (lambda: tenants.update(key, TenantUpdate(labels={"n": str(next(counter))})), 1),
        "tenants.rename": (lambda: tenants.rename(key, "acme"), 1),
        "tenants.activate, suspend": (to_and_fro, 2),
        "config.set": (lambda: config.set("limits", {"n": next(counter)}), 1),
        "config.get": (lambda: config.get("limits"), 1),
        "config.get_or_default": (lambda: config.get_or_default("none"), 1),
        "config.get_many": (lambda: config.get_many(["limits", "none"]), 1),
        "config.list": (lambda: config.list(prefix="l"), 1),
        "config.set, delete": (set_and_delete, 2),
        "databases.get": (lambda: databases.get(database), 1),
        "databases.get_many": (lambda: databases.get_many([database, uuid7()]), 1),
        "databases.list_for_tenant": (lambda: databases.list_for_tenant(key), 1),
        "databases.connection_string": (lambda: databases.connection_string(database), 1),
        "databases.set_status": (lambda: databases.set_status(database, status.MIGRATING), 1),
        "databases.register, delete": (register_and_delete, 3),
        "databases.update_connection_string": (
            lambda: databases.update_connection_string(database, SecretStr(DSN)),
            2,
        ),
        "keys.get": (lambda: keys.get("k1"), 1),
        "keys.get_many": (lambda: keys.get_many(["k1", "k2"]), 1),
        "keys.list": (keys.list, 1),
    }


async def test_a_verb_is_one_round_trip(proxy: FaultProxy, manager: AsyncConnectionManager) -> None:
    found: dict[str, tuple[int, dict[tuple[str, str], int]]] = {}
    wanted: dict[str, tuple[int, dict[tuple[str, str], int]]] = {}
    for name, (verb, statements) in (await verbs_of(manager)).items():
        await verb()  # its statement is prepared once on each connection
        wire = await counted(proxy, verb)
        found[name] = wire.round_trips, sent(wire)
        wanted[name] = statements, dict.fromkeys(PREPARED, statements)
    assert found == wanted
    assert manager.pool_status().connects == 1


async def test_the_first_time_costs_one_more_to_prepare_it(proxy: FaultProxy, manager: AsyncConnectionManager) -> None:
    tenants = TenantRepository(manager)
    await tenants.exists(SYSTEM_ADMIN_ID)  # opens the connection
    wire = await counted(proxy, lambda: tenants.get(SYSTEM_ADMIN_ID))
    assert wire.round_trips == 2
    wire = await counted(proxy, lambda: tenants.get(SYSTEM_ADMIN_ID))
    assert wire.round_trips == 1


async def test_a_hundred_gets_at_once_are_two_round_trips(proxy: FaultProxy, manager: AsyncConnectionManager) -> None:
    tenants = TenantRepository(manager)

    async def gets() -> list[Any]:
        return await asyncio.gather(*(tenants.get(SYSTEM_ADMIN_ID) for _ in range(100)))

    await gets()
    wire = await counted(proxy, gets)
    assert (wire.round_trips, sent(wire)) == (2, dict.fromkeys(PREPARED, 2))
