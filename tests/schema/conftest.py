"""Plain SQL connections: what is tested here must hold for psql as well."""

import secrets
from collections.abc import AsyncIterator

import asyncpg
import pytest

from car_control_plane.connection import AsyncConnectionManager


@pytest.fixture
async def connection(own_database: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection to a migrated database for this test alone."""
    async with AsyncConnectionManager(own_database) as manager:
        connection = await manager.connect()
        yield connection
        await connection.close()


@pytest.fixture
async def rolled_back(shared_database: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection in a transaction that is rolled back; much cheaper. A refused statement needs a `transaction()` of its own."""
    async with AsyncConnectionManager(shared_database) as manager:
        connection = await manager.connect()
        transaction = connection.transaction()
        await transaction.start()
        yield connection
        await transaction.rollback()
        await connection.close()


@pytest.fixture
async def role(server_dsn: str) -> AsyncIterator[str]:
    """Name of a role that may nothing. Ask for it before the database: what it has in there must go before it can."""
    name = f"car_cp_role_{secrets.token_hex(4)}"
    async with AsyncConnectionManager(server_dsn) as manager:
        connection = await manager.connect()
        await connection.execute(f"CREATE ROLE {name}")
        yield name
        await connection.execute(f"DROP ROLE {name}")
        await connection.close()
