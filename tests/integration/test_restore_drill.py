"""The restore drill: what a dump of the control plane is worth with the keys, and without them.

A dump is restored into another database, and into another server. With the key file every row opens there, wrapped keys with the outer key's file;
without it each error names the key that is missing; with another key of the same name the first look at the keys says so, before any row is read.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlmodel.ext.asyncio.session import AsyncSession

from car_control_plane.connection import AsyncConnectionManager
from car_control_plane.doctor import examine
from car_control_plane.embedded import EmbeddedPostgres
from car_control_plane.encryption import FileKeys, Key, Keyring, LocalKeyWrapper, WrappedKeys
from car_control_plane.errors import ConfigurationError, DecryptionError, EncryptionError, UnknownKeyError
from car_control_plane.models import TenantCreate, TenantDatabaseCreate, TenantEnvironment
from car_control_plane.repositories import (
    EncryptionKeyRepository,
    EncryptionKeyStore,
    TenantDatabaseRepository,
    TenantRepository,
)
from car_control_plane.settings import load_settings
from tests.fixtures.leaks import failure_of, holds, leaks
from tests.fixtures.programs import postgres_program
from tests.fixtures.servers import CANARY, Cluster

ROWS = 25


@dataclass(frozen=True)
class Drill:
    """A control plane with rows under two keys, a dump of it, and what each row must open to."""

    dump: bytes
    key_file: Path
    expected: dict[uuid.UUID, str]


def write_keys(path: Path, *keys: Key) -> Path:
    path.touch(mode=0o600)
    path.write_text("".join(f"{key.kid}:{key.to_base64()}\n" for key in keys), encoding="utf-8")
    return path


async def fill(manager: AsyncConnectionManager, *keyrings: Keyring) -> dict[uuid.UUID, str]:
    """Register tenants with a database each, the keyrings in turn; return what each row must open to."""
    expected = {}
    async with manager.get_session() as session:
        for number in range(ROWS):
            new = TenantCreate(name=f"tenant {number}", environment=TenantEnvironment.PRODUCTION)
            tenant = await TenantRepository(session).create(new)
            databases = TenantDatabaseRepository(session, keyrings[number % len(keyrings)])
            text = f"postgresql://user:{CANARY}{number}@db{number}.example:5432/data?sslmode=verify-full"
            row = await databases.register(tenant.tenant_id, TenantDatabaseCreate(connection_string=SecretStr(text)))
            expected[row.id] = text
    return expected


@pytest.fixture
async def drill(manager: AsyncConnectionManager, own_database: str, tmp_path: Path) -> Drill:
    old, new = Key.generate("k1"), Key.generate("k2")
    before = Keyring(FileKeys(write_keys(tmp_path / "before", old)))
    keyring = Keyring(FileKeys(key_file := write_keys(tmp_path / "keys", new, old)))
    async with before, keyring:
        expected = await fill(manager, before, keyring)
    dump = await asyncio.to_thread(postgres_program, "pg_dump", own_database, "--no-owner", "--no-privileges")
    assert b"ccp1:k1:" in dump
    assert b"ccp1:k2:" in dump
    assert not holds(dump, CANARY)
    assert not any(holds(dump, key.to_base64()) for key in (old, new))
    return Drill(dump, key_file, expected)


@pytest.fixture(params=["another database", "another server"])
async def elsewhere(request: pytest.FixtureRequest, empty_database: str) -> AsyncIterator[str]:
    """Where nothing is yet."""
    if request.param == "another database":
        yield empty_database
        return
    server = EmbeddedPostgres(durable=False)
    await asyncio.to_thread(server.start)
    try:
        await asyncio.to_thread(server.create_database, "restored")
        yield server.dsn("restored")
    finally:
        await asyncio.to_thread(server.stop)


async def restore(dump: bytes, dsn: str) -> None:
    # Of a newer pg_dump than the server: it says SET transaction_timeout, which older ones do not know. Everything else must go through.
    script = b"".join(
        line for line in dump.splitlines(keepends=True) if not line.startswith(b"SET transaction_timeout")
    )
    await asyncio.to_thread(postgres_program, "psql", dsn, "-X", "-q", "-v", "ON_ERROR_STOP=1", given=script)


@asynccontextmanager
async def working(dsn: str, key_file: Path) -> AsyncIterator[tuple[AsyncSession, Keyring]]:
    async with (
        AsyncConnectionManager(dsn) as manager,
        Keyring(FileKeys(key_file)) as keyring,
        manager.get_session() as session,
    ):
        yield session, keyring


async def opened(manager: AsyncConnectionManager, keyring: Keyring, drill: Drill) -> dict[uuid.UUID, str]:
    async with manager.get_read_session() as session:
        databases = TenantDatabaseRepository(session, keyring)
        return {row: (await databases.connection_string(row)).reveal() for row in drill.expected}


async def test_a_dump_with_a_password_needs_none_on_its_command_line(cluster: Cluster) -> None:
    dump = await asyncio.to_thread(postgres_program, "pg_dump", cluster.dsn(cluster.primary))
    assert b"PostgreSQL database dump complete" in dump


async def test_every_row_opens_elsewhere_with_the_key_file(drill: Drill, elsewhere: str) -> None:
    await restore(drill.dump, elsewhere)
    async with AsyncConnectionManager(elsewhere) as manager, Keyring(FileKeys(drill.key_file)) as keyring:
        await manager.require_schema()
        assert await opened(manager, keyring, drill) == drill.expected
        async with manager.get_read_session() as session:
            assert await EncryptionKeyRepository(session).verify(keyring) == []
            assert sum((await EncryptionKeyRepository(session).usage()).values()) == ROWS
        # It is a control plane like any other: what is sealed there opens.
        row = next(iter(drill.expected))
        async with manager.get_session() as session:
            secret = SecretStr(drill.expected[row])
            await TenantDatabaseRepository(session, keyring).update_connection_string(row, secret)
        assert await opened(manager, keyring, drill) == drill.expected


async def test_a_row_opens_under_its_own_id_only(drill: Drill, elsewhere: str) -> None:
    """Whoever restores by hand, and gives rows new ids, has restored nothing."""
    renamed = drill.dump
    for row in drill.expected:
        renamed = renamed.replace(str(row).encode(), str(uuid.uuid4()).encode())
    await restore(renamed, elsewhere)
    async with working(elsewhere, drill.key_file) as (session, keyring):
        databases = TenantDatabaseRepository(session, keyring)
        for stored in await databases.list(limit=ROWS):
            assert stored.id not in drill.expected
            assert isinstance(await failure_of(databases.connection_string(stored.id)), DecryptionError)


async def test_without_the_keys_each_error_names_the_missing_one(drill: Drill, elsewhere: str, tmp_path: Path) -> None:
    await restore(drill.dump, elsewhere)
    strange = write_keys(tmp_path / "strange", Key.generate("k3"))
    async with working(elsewhere, strange) as (session, keyring):
        databases = TenantDatabaseRepository(session, keyring)
        assert len(await databases.list(limit=ROWS)) == ROWS  # listing needs no key
        missing = set()
        for row in drill.expected:
            error = await failure_of(databases.connection_string(row))
            assert isinstance(error, UnknownKeyError)
            assert repr(error.details["kid"]) in error.message
            assert list(leaks(error, CANARY)) == []
            missing.add(error.details["kid"])
        assert missing == {"k1", "k2"}
        found = await EncryptionKeyRepository(session).verify(keyring)
    assert {"k1", "k2"} <= {finding.kid for finding in found}
    findings = {
        one.check: one for one in await examine(load_settings(database_url=elsewhere, encryption_key_file=strange))
    }
    assert findings["sealed-rows"].code == "unknown-key"
    assert "k1, k2" in findings["sealed-rows"].message


async def test_half_of_the_keys_opens_half_of_the_rows(drill: Drill, empty_database: str, tmp_path: Path) -> None:
    """One missing key stops its own rows only."""
    await restore(drill.dump, empty_database)
    half = tmp_path / "half"
    half.touch(mode=0o600)
    half.write_text(drill.key_file.read_text(encoding="utf-8").splitlines()[0], encoding="utf-8")
    async with working(empty_database, half) as (session, keyring):
        databases = TenantDatabaseRepository(session, keyring)
        kids = {row.id: row.connection_string_encrypted.kid for row in (await databases.list(limit=ROWS)).items}
        for row, text in drill.expected.items():
            if kids[row] == "k2":
                assert (await databases.connection_string(row)).reveal() == text
            else:
                assert isinstance(await failure_of(databases.connection_string(row)), UnknownKeyError)
    assert set(kids.values()) == {"k1", "k2"}


async def test_a_wrong_key_is_noticed_at_start(drill: Drill, elsewhere: str, tmp_path: Path) -> None:
    """Keys of the right names with other bytes: found before a row is read, and before one is sealed."""
    await restore(drill.dump, elsewhere)
    wrong = write_keys(tmp_path / "wrong", Key.generate("k2"), Key.generate("k1"))
    async with working(elsewhere, wrong) as (session, keyring):
        keys = EncryptionKeyRepository(session)
        assert {finding.kid for finding in await keys.verify(keyring)} == {"k1", "k2"}
        error = await failure_of(keys.confirm(await keyring.current(), keyring.provider.name))
        assert isinstance(error, ConfigurationError)
        assert error.details["kid"] == "k2"
        databases = TenantDatabaseRepository(session, keyring)
        row, text = next(iter(drill.expected.items()))
        error = await failure_of(databases.update_connection_string(row, SecretStr(text)))
        assert isinstance(error, ConfigurationError)
        assert isinstance(await failure_of(databases.connection_string(row)), DecryptionError)
    findings = {
        one.check: one for one in await examine(load_settings(database_url=elsewhere, encryption_key_file=wrong))
    }
    assert findings["key-record"].code == "configuration"
    assert findings["key-record"].message.endswith("k1, k2")
    # And nothing was harmed by trying.
    async with AsyncConnectionManager(elsewhere) as manager, Keyring(FileKeys(drill.key_file)) as keyring:
        assert await opened(manager, keyring, drill) == drill.expected


async def test_wrapped_keys_are_in_the_dump_and_the_outer_key_is_not(
    manager: AsyncConnectionManager, own_database: str, elsewhere: str, tmp_path: Path
) -> None:
    outer = Key.generate("outer")
    wrapper = LocalKeyWrapper(outer_file := write_keys(tmp_path / "outer", outer))
    async with manager.get_session() as session:
        await EncryptionKeyRepository(session).create(inner := Key.generate("k1"), wrapper, state="current")
    async with Keyring(WrappedKeys(wrapper, EncryptionKeyStore(manager))) as keyring:
        expected = await fill(manager, keyring)
    dump = await asyncio.to_thread(postgres_program, "pg_dump", own_database, "--no-owner", "--no-privileges")
    assert not any(holds(dump, secret) for secret in (CANARY, inner.to_base64(), outer.to_base64()))
    drill = Drill(dump, outer_file, expected)
    await restore(dump, elsewhere)
    async with AsyncConnectionManager(elsewhere) as there:
        store = EncryptionKeyStore(there)
        async with Keyring(WrappedKeys(LocalKeyWrapper(outer_file), store)) as keyring:
            assert await opened(there, keyring, drill) == expected
        other = write_keys(tmp_path / "other", Key.generate("outer"))
        async with there.get_read_session() as session:
            keyring = Keyring(WrappedKeys(LocalKeyWrapper(other), store))
            assert isinstance(await failure_of(keyring.open()), DecryptionError)
            error = await failure_of(TenantDatabaseRepository(session, keyring).connection_string(next(iter(expected))))
            assert isinstance(error, EncryptionError)
            assert "'k1'" in error.message
            await keyring.close()
