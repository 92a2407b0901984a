"""The page of permissions is run: what it grants is enough, and no more."""

import re
import secrets
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest
import sqlalchemy
from sqlalchemy import inspect
from sqlmodel.ext.asyncio.session import AsyncSession

from car_control_plane import dsn as dsns
from car_control_plane.connection import AsyncConnectionManager
from car_control_plane.encryption import Key, Keyring, LocalKeyWrapper, StaticKeys, WrappedKeys
from car_control_plane.errors import PermissionDeniedError
from car_control_plane.migrations import downgrade, upgrade
from car_control_plane.models import EncryptionKey, TenantCreate, TenantDatabase, TenantEnvironment
from car_control_plane.repositories import SystemConfigRepository, TenantRepository
from car_control_plane.repositories.keys import EncryptionKeyRepository, EncryptionKeyStore
from car_control_plane.rotation import rotate_keys
from tests.quality.programs import ROOT

PAGE = ROOT / "docs" / "reference" / "permissions.md"
KEY = Key.generate("k1")
BLOCKS = re.findall(r"^```sql\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


class Roles:
    """The page's roles under names nobody else uses, for roles belong to the whole server."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.suffix = secrets.token_hex(4)

    def sql(self, block: int) -> str:
        database = dsns.parse(self.dsn).database
        text = re.sub(r"(?<=DATABASE )control_plane\b", f'"{database}"', BLOCKS[block])
        return re.sub(r"\bcontrol_plane_(migrator|app|keys|reader)\b", rf"control_plane_\1_{self.suffix}", text)

    def connect(self, role: str) -> AsyncConnectionManager:
        """Return a manager whose sessions act as the role, whatever the server asks a login for."""
        separator = "&" if "?" in self.dsn else "?"
        return AsyncConnectionManager(f"{self.dsn}{separator}role=control_plane_{role}_{self.suffix}")


@pytest.fixture
async def roles(empty_database: str) -> AsyncIterator[Roles]:
    """Migrated as the page says, by the role it says."""
    roles = Roles(empty_database)
    async with AsyncConnectionManager(empty_database) as superuser:
        connection = await superuser.connect()
        try:
            await connection.execute(roles.sql(0))
            async with roles.connect("migrator") as migrator:
                await upgrade(migrator)
            for block in (1, 2, 3, 4):
                await connection.execute(roles.sql(block))
            yield roles
        finally:
            for role in ("migrator", "app", "keys", "reader"):
                name = f"control_plane_{role}_{roles.suffix}"
                if await connection.fetchval("SELECT true FROM pg_roles WHERE rolname = $1", name):
                    await connection.execute(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")
            await connection.close()


async def test_the_working_role_can_do_what_the_library_does(roles: Roles) -> None:
    async with roles.connect("app") as manager:
        assert await manager.health_check()
        async with manager.get_session() as session:
            tenants, config = TenantRepository(session), SystemConfigRepository(session)
            new = TenantCreate(name="acme", environment=TenantEnvironment.STAGING)
            acme = await tenants.create(new)
            await tenants.activate(acme.tenant_id)
            await tenants.rename(acme.tenant_id, "acme 2")
            await tenants.create_many([{"name": "other", "environment": "staging"}])
            await config.set("key", 1)
            await config.set("key", 2)
            await config.delete("key")
            await tenants.delete(acme.tenant_id)
            keys = EncryptionKeyRepository(session)
            await keys.confirm(KEY, "environment")
            assert await keys.verify(Keyring(StaticKeys(f"{KEY.kid}:{KEY.to_base64()}"))) == []
            assert await keys.usage() == {}
        async with manager.get_read_session() as reading:
            assert len(await TenantRepository(reading).list()) == 2
        assert len(await TenantRepository(manager).list()) == 2

        async def unit(session: AsyncSession) -> int:
            return await TenantRepository(session).count()

        operation_id = uuid.uuid4()
        for _ in range(2):
            assert await manager.run(unit, operation_id=operation_id) == 2
        assert await manager.prune_operations(older_than_seconds=1e-6) == 1


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE control_plane.mine ()",
        "DROP TABLE control_plane.tenants",
        "ALTER TABLE control_plane.tenants DISABLE TRIGGER ALL",
        "INSERT INTO control_plane.change_log SELECT * FROM control_plane.change_log",
        "DELETE FROM control_plane.change_log",
        "SELECT nextval('control_plane.version_seq')",
        "UPDATE control_plane.alembic_version SET version_num = 'other'",
        "UPDATE control_plane.encryption_keys SET provider = 'other'",
        "DELETE FROM control_plane.encryption_keys",
        "CREATE SCHEMA mine",
    ],
)
async def test_the_working_role_can_do_no_more(roles: Roles, statement: str) -> None:
    async with roles.connect("app") as manager:
        connection = await manager.connect()
        try:
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(statement)
        finally:
            await connection.close()


async def test_the_role_of_the_keys_can_do_what_the_library_does(roles: Roles, tmp_path: Path) -> None:
    path = tmp_path / "outer"
    path.touch(0o600)
    path.write_text(f"outer:{Key.generate('outer').to_base64()}", encoding="utf-8")
    wrapper = LocalKeyWrapper(path)
    async with roles.connect("keys") as manager:
        assert await manager.health_check()
        async with manager.get_session() as session:
            keys = EncryptionKeyRepository(session)
            await keys.create(KEY, wrapper, state="current")
            await keys.create(Key.generate("k2"), wrapper)
            await keys.promote("k2")
            await keys.rewrap(wrapper)
            await keys.destroy(KEY.kid)
        ring = Keyring(WrappedKeys(wrapper, EncryptionKeyStore(manager)))
        assert (await rotate_keys(manager, ring)).kid == "k2"
        with pytest.raises(PermissionDeniedError, match=r"INSERT.* ON control_plane\.tenants"):
            async with manager.get_session() as session:
                await TenantRepository(session).create(TenantCreate(name="acme", environment=TenantEnvironment.STAGING))


async def test_the_looking_role_sees_everything_but_secrets(roles: Roles) -> None:
    async with roles.connect("reader") as manager:
        assert await manager.health_check()
        async with manager.get_read_session() as session:
            assert len(await TenantRepository(session).list()) == 1
        with pytest.raises(PermissionDeniedError):
            async with manager.get_session() as session:
                await session.get(TenantDatabase, "00000000-0000-7000-8000-000000000001")
        with pytest.raises(PermissionDeniedError):
            await EncryptionKeyStore(manager).load()
        for table in (TenantDatabase, EncryptionKey):
            hidden = {"connection_string_encrypted", "wrapped"}
            shown = [each for each in inspect(table).local_table.columns if each.name not in hidden]
            async with manager.get_read_session() as session:
                await (await session.connection()).execute(sqlalchemy.select(*shown))
        with pytest.raises(PermissionDeniedError, match=r"INSERT.* ON control_plane\.system_config"):
            async with manager.get_session() as session:
                await SystemConfigRepository(session).set("key", 1)


async def test_the_migrating_role_can_undo_what_it_did(roles: Roles) -> None:
    async with roles.connect("migrator") as manager:
        await downgrade(manager, "base")
