"""A rotation killed with SIGKILL, twice, while a writer changes strings: the next one ends it, and every string is the one written last."""

import asyncio
import os
import signal
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

import car_control_plane
from car_control_plane.connection import AsyncConnectionManager
from car_control_plane.encryption import Key, Keyring, SealedConnectionString, StaticKeys
from car_control_plane.encryption.envelope import connection_string_context, seal, unseal
from car_control_plane.errors import ConflictError
from car_control_plane.models import uuid7
from car_control_plane.rotation import RotationResult, rotate_keys

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL"),
]

ROOT = Path(car_control_plane.__file__).parents[1]
ROWS = 40_000
KILLS = 2

ROTATOR = """
import asyncio
from car_control_plane import AsyncConnectionManager, Keyring
from car_control_plane.rotation import rotate_keys

def progress(step):
    print(step.done, flush=True)

async def main():
    async with AsyncConnectionManager() as manager, Keyring.from_settings(manager.settings) as keyring:
        await rotate_keys(manager, keyring, batch_rows=500, progress=progress)

asyncio.run(main())
"""

# Begins with the old key, as a process that has not heard of the new one, and goes over to the new one when its input says so.
WRITER = """
import asyncio, random, sys
from car_control_plane import AsyncConnectionManager, Keyring, StaticKeys
from car_control_plane.settings import load_settings

async def main():
    settings = load_settings()
    text = settings.encryption_keys.get_secret_value()
    rings = Keyring(StaticKeys(",".join(reversed(text.split(","))))), Keyring(StaticKeys(text))
    loop, heard = asyncio.get_running_loop(), 0
    def listen():
        nonlocal heard
        for line in sys.stdin:
            heard += 1
        heard = 2
    listening = loop.run_in_executor(None, listen)
    choose, number = random.Random(1), 0
    async with AsyncConnectionManager(settings) as manager:
        connection = await manager.connect()
        rows = await connection.fetch("SELECT id, tenant_id FROM control_plane.tenant_databases")
        while heard < 2:
            id, tenant = choose.choice(rows)
            number += 1
            secret = f"postgresql://app:written-{number}@db.example/d"
            sealed = await rings[heard].seal(secret, tenant_id=tenant, database_id=id)
            await connection.execute(
                "UPDATE control_plane.tenant_databases SET connection_string_encrypted = $2 WHERE id = $1", id, sealed.text
            )
            print(id, secret, flush=True)
        await connection.close()
    await listening

asyncio.run(main())
"""


@asynccontextmanager
async def process(program: str, url: str, keys: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a program in a process of its own, which does not outlive the block."""
    started = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program),
        cwd=ROOT,
        env={**os.environ, "DATABASE_URL": url, "CAR_CONTROL_PLANE_ENCRYPTION_KEYS": keys},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield started
    finally:
        if started.returncode is None:
            started.kill()
        await started.communicate()


async def said(running: asyncio.subprocess.Process, count: int) -> list[str]:
    """Return the next lines a process prints."""
    assert running.stdout is not None
    lines = [(await running.stdout.readline()).decode().strip() for _ in range(count)]
    assert all(lines), "the process ended"
    return lines


async def fill(connection: asyncpg.Connection, key: Key) -> dict[uuid.UUID, str]:
    texts: dict[uuid.UUID, str] = {}
    tenants, databases = [], []
    for number in range(ROWS):
        tenant, database = uuid7(), uuid7()
        texts[database] = f"postgresql://app:filled-{number}@db.example/d"
        tenants.append((tenant, str(tenant), "staging", 0))
        sealed = seal(key, texts[database], connection_string_context(tenant, database))
        databases.append((database, tenant, sealed, "d", "h", 0))
    for table, columns, records in (
        ("tenants", ["tenant_id", "name", "environment", "version"], tenants),
        (
            "tenant_databases",
            ["id", "tenant_id", "connection_string_encrypted", "database_name", "host", "version"],
            databases,
        ),
    ):
        await connection.copy_records_to_table(table, schema_name="control_plane", records=records, columns=columns)
    return texts


async def rows_of(connection: asyncpg.Connection, kid: str) -> int:
    return int(
        await connection.fetchval(
            "SELECT count(*) FROM control_plane.tenant_databases WHERE split_part(connection_string_encrypted, ':', 2) = $1",
            kid,
        )
    )


async def ended(manager: AsyncConnectionManager, keyring: Keyring) -> RotationResult:
    """Rotate, as soon as the server has noticed that the former rotator is gone."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await rotate_keys(manager, keyring)
            except ConflictError:
                await asyncio.sleep(0.05)


async def test_a_rotation_killed_twice_under_writes_loses_nothing(own_database: str) -> None:
    old, new = Key.generate("old"), Key.generate("new")
    keys = f"new:{new.to_base64()},old:{old.to_base64()}"
    async with AsyncConnectionManager(own_database) as manager:
        connection = await manager.connect()
        texts = await fill(connection, old)
        async with process(WRITER, own_database, keys) as writer:
            assert writer.stdin is not None
            journal = await said(writer, 1)
            reading = asyncio.create_task(read_all(writer))
            left = ROWS
            for kill in range(KILLS):
                async with process(ROTATOR, own_database, keys) as rotator:
                    await said(rotator, 1 + 10)
                    rotator.send_signal(signal.SIGKILL)
                    assert await rotator.wait() == -signal.SIGKILL
                before, left = left, await rows_of(connection, "old")
                assert 0 < left < before, "the kill must fall into the middle"
                if kill == 0:
                    writer.stdin.write(b"the new key is current\n")
            async with Keyring(StaticKeys(keys)) as keyring:
                result = await ended(manager, keyring)
                assert await rows_of(connection, "old") == 0
                writer.stdin.close()
                journal += await reading
                assert await writer.wait() == 0
                assert (await ended(manager, keyring)).remaining == 0
        assert (result.failed_count, result.remaining) == (0, 0)
        assert len(journal) > 1_000, "the writer must have been at work"
        for line in journal:
            id, text = line.split()
            texts[uuid.UUID(id)] = text
        wrong = []
        for id, tenant, sealed in await connection.fetch(
            "SELECT id, tenant_id, connection_string_encrypted FROM control_plane.tenant_databases"
        ):
            assert SealedConnectionString(sealed).kid == "new"
            if unseal(new, sealed, connection_string_context(tenant, id)) != texts.pop(id):
                wrong.append(id)
        assert (wrong, texts) == ([], {})
        await connection.close()


async def read_all(running: asyncio.subprocess.Process) -> list[str]:
    assert running.stdout is not None
    return [line.decode().strip() async for line in running.stdout]
