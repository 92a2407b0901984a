"""Health: what a check finds in every state of server, schema and pool, and what `require_schema` makes of it."""

from collections.abc import AsyncIterator
from dataclasses import FrozenInstanceError

import pytest

from car_control_plane.connection import AsyncConnectionManager, HealthStatus, PoolStatus
from car_control_plane.errors import (
    ClosedError,
    ConfigurationError,
    ConnectionUnavailableError,
    ControlPlaneError,
    PoolTimeoutError,
    SchemaMissingError,
    SchemaOutdatedError,
    StatementTimeoutError,
)
from car_control_plane.migrations import downgrade, upgrade
from car_control_plane.models import REVISIONS
from tests.fixtures.pools import heard_of_their_end, idle_drivers
from tests.fixtures.postgres import database_dsn
from tests.fixtures.servers import CANARY, Cluster, black_hole, unused_port

HEAD = REVISIONS[-1]


async def sql(manager: AsyncConnectionManager, *statements: str) -> None:
    async with manager.get_session() as session:
        for statement in statements:
            await (await session.connection()).exec_driver_sql(statement)


@pytest.fixture
async def empty(empty_database: str) -> AsyncIterator[AsyncConnectionManager]:
    """A manager of a database that was never migrated."""
    async with AsyncConnectionManager(empty_database) as manager:
        yield manager


async def test_healthy(manager: AsyncConnectionManager) -> None:
    health = await manager.health_check()
    assert health
    assert health.healthy is True
    assert health.error is None
    assert (health.schema, health.revision, health.head) == ("current", HEAD, HEAD)
    assert health.latency_seconds > 0
    assert health.pool == PoolStatus(limit=10, opened=1, in_use=0)
    connection = await manager.connect()
    assert health.server_version == await connection.fetchval("SHOW server_version")
    await connection.close()
    await manager.require_schema()


async def test_a_status_cannot_be_changed(manager: AsyncConnectionManager) -> None:
    health = await manager.health_check()
    with pytest.raises(FrozenInstanceError):
        health.healthy = False  # type: ignore[misc]  # on purpose


async def unhealthy(manager: AsyncConnectionManager, kind: type[ControlPlaneError]) -> HealthStatus:
    """Check; the error is of exactly this kind, and `require_schema` raises it."""
    health = await manager.health_check()
    assert not health
    assert health.healthy is False
    assert type(health.error) is kind
    assert health.head == HEAD
    assert health.latency_seconds > 0
    with pytest.raises(kind) as caught:
        await manager.require_schema()
    assert str(caught.value) == str(health.error)
    return health


async def test_no_schema(empty: AsyncConnectionManager) -> None:
    health = await unhealthy(empty, SchemaMissingError)
    assert (health.schema, health.revision) == ("missing", None)
    assert health.server_version is not None
    assert str(health.error) == (
        "schema 'control_plane' does not exist. Run migrations: alembic upgrade head (or: car-cp db upgrade)."
    )


async def test_a_schema_that_was_never_migrated(empty: AsyncConnectionManager) -> None:
    await sql(empty, "CREATE SCHEMA control_plane")
    health = await unhealthy(empty, SchemaMissingError)
    assert (health.schema, health.revision) == ("missing", None)
    assert health.error is not None
    assert health.error.message == "the schema was never migrated"


async def test_a_schema_that_was_taken_down_again(own_database: str) -> None:
    """`downgrade base` leaves Alembic's table, without a row."""
    await downgrade(own_database, "base")
    async with AsyncConnectionManager(own_database) as manager:
        health = await unhealthy(manager, SchemaMissingError)
    assert (health.schema, health.revision) == ("missing", None)


async def test_a_schema_behind(empty_database: str) -> None:
    await upgrade(empty_database, REVISIONS[0])
    async with AsyncConnectionManager(empty_database) as manager:
        health = await unhealthy(manager, SchemaOutdatedError)
        assert (health.schema, health.revision) == ("behind", REVISIONS[0])
        assert health.error is not None
        assert health.error.details == {"revision": REVISIONS[0], "head": HEAD}
        assert str(health.error) == (
            f"the schema is at revision {REVISIONS[0]!r}, behind {HEAD!r}. Run migrations: alembic upgrade head (or: car-cp db upgrade)."
        )
        await upgrade(manager)
        assert await manager.health_check()


async def test_a_schema_ahead_is_usable_but_not_what_was_required(manager: AsyncConnectionManager) -> None:
    """A rolling deploy: the new version has migrated, the old one still serves."""
    await sql(manager, "UPDATE control_plane.alembic_version SET version_num = '999_future'")
    health = await manager.health_check()
    assert health
    assert (health.schema, health.revision, health.error) == ("ahead", "999_future", None)
    with pytest.raises(SchemaOutdatedError) as caught:
        await manager.require_schema()
    assert caught.value.message == (
        f"the schema's revision '999_future' is unknown to this version of the library, which knows up to {HEAD!r}"
    )
    assert caught.value.details == {"revision": "999_future", "head": HEAD}


async def test_unreachable() -> None:
    async with AsyncConnectionManager(f"postgresql://u@127.0.0.1:{unused_port()}/d") as manager:
        health = await unhealthy(manager, ConnectionUnavailableError)
    assert (health.schema, health.revision, health.server_version) == ("unknown", None, None)
    assert health.pool == PoolStatus(limit=10, opened=0, in_use=0)


async def test_silent() -> None:
    with black_hole() as port:
        target = f"postgresql://u:{CANARY}@127.0.0.1:{port}/d"
        async with AsyncConnectionManager(target, connect_timeout_seconds=0.2) as manager:
            health = await unhealthy(manager, ConnectionUnavailableError)
    assert health.latency_seconds >= 0.2
    assert CANARY not in repr(health)


async def test_no_database(server_dsn: str) -> None:
    async with AsyncConnectionManager(database_dsn(server_dsn, "nowhere at all")) as manager:
        health = await unhealthy(manager, ConfigurationError)
    assert health.error is not None
    assert str(health.error) == "the database does not exist. Create it first: CREATE DATABASE control_plane;"


async def test_a_wrong_password(cluster: Cluster) -> None:
    async with AsyncConnectionManager(cluster.dsn(cluster.primary, password=CANARY)) as manager:
        health = await unhealthy(manager, ConfigurationError)
    assert health.schema == "unknown"
    assert CANARY not in repr(health)


async def test_a_standby_is_asked_like_any_other(cluster: Cluster) -> None:
    async with AsyncConnectionManager(cluster.dsn(cluster.standby)) as manager:
        await unhealthy(manager, SchemaMissingError)


async def test_closed(empty_database: str) -> None:
    manager = AsyncConnectionManager(empty_database)
    await manager.close()
    for call in (manager.health_check, manager.require_schema):
        with pytest.raises(ClosedError):
            await call()


async def test_the_pool_is_counted_as_it_is_at_the_end(own_database: str) -> None:
    async with AsyncConnectionManager(own_database, pool_size=2, max_overflow=1) as manager:
        async with manager.get_session() as one, manager.get_session() as two:
            await one.connection()
            await two.connection()
            health = await manager.health_check()
            assert health.pool == PoolStatus(limit=3, opened=3, in_use=2)
        assert manager.pool_status() == PoolStatus(limit=3, opened=2, in_use=0)


async def test_a_pool_that_is_empty(own_database: str) -> None:
    settings = {"pool_size": 1, "max_overflow": 0, "pool_timeout_seconds": 0.1}
    async with AsyncConnectionManager(own_database, **settings) as manager:
        async with manager.get_session() as session:
            await session.connection()
            health = await unhealthy(manager, PoolTimeoutError)
            assert health.error is not None
            assert health.error.details == {"limit": 1, "waited_seconds": 0.1}
            assert health.pool == PoolStatus(limit=1, opened=1, in_use=1)
        assert await manager.health_check()


async def test_a_connection_that_broke_in_the_pool_costs_no_check(own_database: str) -> None:
    async with AsyncConnectionManager(own_database) as manager, AsyncConnectionManager(own_database) as other:
        async with manager.get_session() as session:
            pid = (await (await session.connection()).exec_driver_sql("SELECT pg_backend_pid()")).scalar()
        drivers = idle_drivers(manager)
        await sql(other, f"SELECT pg_terminate_backend({pid})")
        await heard_of_their_end(drivers)
        assert await manager.health_check()
        assert (await manager.health_check()).pool.lost == 1


# --- a database that answers with errors of its own -------------------------------------------------------------------


async def replace_the_revision_by(manager: AsyncConnectionManager, body: str) -> None:
    """Make asking for the revision run this."""
    await sql(
        manager,
        f"CREATE FUNCTION public.answer() RETURNS text LANGUAGE plpgsql AS $$ BEGIN {body} END $$",
        "ALTER TABLE control_plane.alembic_version RENAME TO aside",
        "CREATE VIEW control_plane.alembic_version AS SELECT public.answer() AS version_num",
    )


@pytest.mark.parametrize("sqlstate", ["XX001", "58030", "53100", "P0001"])
async def test_an_error_nobody_has_a_class_for_is_an_error_still(
    sqlstate: str, manager: AsyncConnectionManager
) -> None:
    """Corrupted data, a broken or a full disk: a check never raises for them, and never calls them healthy."""
    await replace_the_revision_by(manager, f"RAISE EXCEPTION '{CANARY}' USING ERRCODE = '{sqlstate}';")
    health = await unhealthy(manager, ControlPlaneError)
    assert health.error is not None
    assert health.error.message == "the server answers with an error of its own"
    assert health.schema == "unknown"
    assert CANARY not in repr(health)
    assert health.pool.in_use == 0


async def test_a_server_that_takes_too_long(own_database: str) -> None:
    async with AsyncConnectionManager(own_database) as manager:
        await replace_the_revision_by(manager, "PERFORM pg_sleep(30); RETURN 'x';")
    async with AsyncConnectionManager(own_database, statement_timeout_seconds=0.5) as manager:
        await unhealthy(manager, StatementTimeoutError)
    settings = {"command_timeout_seconds": 0.5, "statement_timeout_seconds": 0}
    async with AsyncConnectionManager(own_database, **settings) as manager:
        await unhealthy(manager, ConnectionUnavailableError)
        assert manager.pool_status().in_use == 0
