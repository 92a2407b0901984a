"""Rows and roles for these tests, made by plain SQL."""

import hashlib
import uuid

import asyncpg

from car_control_plane.models import uuid7


async def insert_tenant(connection: asyncpg.Connection, status: str = "active") -> uuid.UUID:
    tenant = uuid7()
    await connection.execute(
        "INSERT INTO control_plane.tenants (tenant_id, name, environment, status) VALUES ($1, $2, 'staging', $3)",
        tenant,
        str(tenant),
        status,
    )
    return tenant


async def insert_tenants(connection: asyncpg.Connection, count: int) -> None:
    """In one statement."""
    await connection.execute(
        "INSERT INTO control_plane.tenants (tenant_id, name, environment)"
        " SELECT md5(i::text)::uuid, 'tenant ' || i, 'staging' FROM generate_series(1, $1::int) i",
        count,
    )


async def insert_database(connection: asyncpg.Connection, tenant: uuid.UUID) -> uuid.UUID:
    database = uuid7()
    await connection.execute(
        "INSERT INTO control_plane.tenant_databases (id, tenant_id, connection_string_encrypted, database_name, host)"
        " VALUES ($1, $2, 'ccp1:k1:c2VhbGVk', 'd', 'h')",
        database,
        tenant,
    )
    return database


async def insert_key(connection: asyncpg.Connection, kid: str, state: str | None = None) -> None:
    """Put a key on record: one that is kept outside, or with a state a wrapped one."""
    await connection.execute(
        "INSERT INTO control_plane.encryption_keys (kid, provider, kek_ref, wrapped, state, check_value)"
        " VALUES ($1, $2, $3, $4, $5, $6)",
        kid,
        "local" if state else "environment",
        "outer" if state else None,
        "bytes" if state and state != "destroyed" else None,
        state,
        hashlib.sha256(kid.encode()).hexdigest()[:32],
    )


def acting_as(role: str, dsn: str) -> str:
    """Return the DSN with every session acting as the role, whatever the server asks a login for."""
    return f"{dsn}{'&' if '?' in dsn else '?'}role={role}"
