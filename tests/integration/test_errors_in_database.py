"""What `translate` makes of errors a real server raises, through SQLAlchemy and through asyncpg alone.

Each is provoked the way it happens in production. Values and names are canaries: the driver's error holds them, ours must not.
"""

import asyncio
import pickle
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, TimeoutError as PoolWaitError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlmodel.ext.asyncio.session import AsyncSession

from car_control_plane import dsn as dsns
from car_control_plane.connection import AsyncConnectionManager
from car_control_plane.embedded import EmbeddedPostgres
from car_control_plane.encryption import SealedConnectionString
from car_control_plane.errors import (
    AlreadyExistsError,
    ConfigurationError,
    ConflictError,
    ConnectionUnavailableError,
    ControlPlaneError,
    InvalidDataError,
    InvalidTransitionError,
    MissingExtraError,
    PermissionDeniedError,
    PoolTimeoutError,
    ProtectedError,
    SchemaMissingError,
    SchemaOutdatedError,
    StatementTimeoutError,
    StillReferencedError,
    TenantNotFoundError,
    UnknownKeyError,
    translate,
)
from car_control_plane.models import (
    SYSTEM_ADMIN_ID,
    SystemConfig,
    Tenant,
    TenantDatabase,
    TenantEnvironment,
    TenantStatus,
    uuid7,
)

CANARY = f"c4n4ry-{secrets.token_hex(4)}"


def new_tenant(**values: Any) -> Tenant:
    return Tenant(**{"name": CANARY, "environment": TenantEnvironment.STAGING} | values)


def new_database(tenant: Tenant, **values: Any) -> TenantDatabase:
    sealed = SealedConnectionString(f"ccp1:k1:{CANARY}")
    where: dict[str, Any] = {"connection_string_encrypted": sealed, "database_name": CANARY, "host": CANARY}
    return TenantDatabase(**{"tenant_id": tenant.tenant_id} | where | values)


def everything(error: BaseException | None) -> str:
    """Return all the text an error, its attributes and its causes hold."""
    found = ""
    while error is not None:
        found += f"{error!r} {error} {vars(error)} "
        error = error.__cause__ or error.__context__
    return found


async def provoke(attempt: Awaitable[Any], *, leaks: bool = False) -> ControlPlaneError:
    """Return our error for the one the attempt raises, after making sure that it tells nothing the server or the caller wrote.

    Args:
        attempt: What fails.
        leaks: Whether the driver's error is known to hold the canary, in its message, its DETAIL or its parameters.
    """
    with pytest.raises(Exception) as caught:  # noqa: PT011 -- whatever the driver raises is the point
        await attempt
    raw = caught.value
    assert not isinstance(raw, ControlPlaneError)
    assert CANARY in everything(raw) or not leaks
    error = translate(raw)
    assert error is not None
    assert CANARY not in everything(error)
    assert CANARY.encode() not in pickle.dumps(error)
    assert error.__cause__ is None
    assert error.__context__ is None
    return error


async def execute(connection: AsyncConnection | AsyncSession, sql: str, **values: Any) -> Any:
    if isinstance(connection, AsyncSession):
        connection = await connection.connection()
    return await connection.execute(text(sql), values)


async def flush(session: AsyncSession, *rows: Any) -> None:
    session.add_all(rows)
    await session.flush()


# --- constraints ------------------------------------------------------------------------------------------------------


async def test_a_duplicate_name(session: AsyncSession) -> None:
    await flush(session, new_tenant())
    error = await provoke(flush(session, new_tenant()), leaks=True)
    assert type(error) is AlreadyExistsError
    assert error.message == "a tenant with this name exists already"
    assert error.details == {"sqlstate": "23505", "constraint": "uq_tenants_name"}


async def test_a_duplicate_id(session: AsyncSession) -> None:
    tenant = new_tenant(name="one")
    await flush(session, tenant)
    session.expunge(tenant)
    error = await provoke(flush(session, new_tenant(tenant_id=tenant.tenant_id)))
    assert type(error) is AlreadyExistsError
    assert error.message == "a tenant with this id exists already"


async def test_a_second_database_for_a_purpose(session: AsyncSession) -> None:
    tenant = new_tenant()
    await flush(session, tenant, new_database(tenant))
    error = await provoke(flush(session, new_database(tenant)), leaks=True)
    assert type(error) is AlreadyExistsError
    assert error.message == "the tenant already has a database for this purpose"


async def test_a_duplicate_key(session: AsyncSession) -> None:
    config = SystemConfig(key=CANARY, value=1)
    await flush(session, config)
    session.expunge(config)
    error = await provoke(flush(session, SystemConfig(key=CANARY, value=2)), leaks=True)
    assert type(error) is AlreadyExistsError
    assert error.message == "this configuration key exists already"


async def test_a_database_of_nobody(session: AsyncSession) -> None:
    error = await provoke(flush(session, new_database(new_tenant())), leaks=True)
    assert type(error) is TenantNotFoundError
    assert error.details["constraint"] == "fk_tenant_databases_tenant_id_tenants"


@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM control_plane.tenants WHERE name = :name",
        "WITH gone AS (DELETE FROM control_plane.tenants WHERE name = :name RETURNING 1) SELECT * FROM gone",
    ],
)
async def test_a_tenant_that_still_has_a_database(session: AsyncSession, sql: str) -> None:
    tenant = new_tenant()
    await flush(session, tenant, new_database(tenant))
    error = await provoke(execute(session, sql, name=CANARY))
    assert type(error) is StillReferencedError
    assert error.details["sqlstate"] in {"23503", "23001"}  # the second from PostgreSQL 18


async def test_a_tenant_that_still_has_a_database_by_asyncpg_alone(
    shared_manager: AsyncConnectionManager, shared_database: str
) -> None:
    tenant = new_tenant()
    async with shared_manager.get_session() as session:
        session.add_all([tenant, new_database(tenant)])
    connection = await shared_manager.connect()
    try:
        deleting = connection.execute("DELETE FROM control_plane.tenants WHERE name = $1", CANARY)
        error = await provoke(deleting)
    finally:
        await connection.close()
    assert type(error) is StillReferencedError


async def test_a_check(session: AsyncSession) -> None:
    tenant = new_tenant()
    await flush(session, tenant, new_database(tenant))
    error = await provoke(execute(session, "UPDATE control_plane.tenant_databases SET port = 0"), leaks=True)
    assert type(error) is InvalidDataError
    assert error.details == {"sqlstate": "23514", "constraint": "ck_tenant_databases_port"}


async def test_text_that_is_not_sealed(session: AsyncSession) -> None:
    """Past the column's type: by SQL, or by another program."""
    tenant = new_tenant()
    await flush(session, tenant, new_database(tenant))
    setting = "UPDATE control_plane.tenant_databases SET connection_string_encrypted = :text"
    error = await provoke(execute(session, setting, text=f"postgresql://u:{CANARY}@h/d"), leaks=True)
    assert type(error) is InvalidDataError
    assert "not sealed" in error.message
    assert error.details == {"sqlstate": "23514", "constraint": "ck_tenant_databases_sealed"}


KEY = (
    "INSERT INTO control_plane.encryption_keys (kid, provider, kek_ref, wrapped, state, check_value)"
    " VALUES (:kid, 'local', 'outer', :wrapped, CAST(:state AS control_plane.encryption_key_state), repeat('0', 32))"
)


@pytest.mark.parametrize(
    ("sql", "kind", "constraint"),
    [
        (
            "INSERT INTO control_plane.encryption_keys SELECT * FROM control_plane.encryption_keys",
            AlreadyExistsError,
            "pk_encryption_keys",
        ),
        (
            "UPDATE control_plane.encryption_keys SET state = 'pending'",
            ConflictError,
            "ck_encryption_keys_state_transition",
        ),
        ("UPDATE control_plane.encryption_keys SET state = 'current'", ConflictError, "uq_encryption_keys_current"),
        ("DELETE FROM control_plane.encryption_keys", StillReferencedError, "ck_encryption_keys_in_use"),
        (
            "UPDATE control_plane.encryption_keys SET check_value = repeat('1', 32)",
            InvalidDataError,
            "ck_control_plane_identity",
        ),
        (
            "UPDATE control_plane.encryption_keys SET check_value = 'x', kid = 'X'",
            InvalidDataError,
            "ck_control_plane_identity",
        ),
        ("UPDATE control_plane.encryption_keys SET provider = ''", InvalidDataError, "ck_encryption_keys_provider"),
    ],
)
async def test_what_keys_do_not_allow(
    session: AsyncSession, sql: str, kind: type[ControlPlaneError], constraint: str
) -> None:
    tenant = new_tenant()
    await flush(session, tenant, new_database(tenant))
    for kid in ("k1", "k2"):
        await execute(session, KEY, kid=kid, state="retired", wrapped=CANARY)
    error = await provoke(execute(session, sql))
    assert type(error) is kind
    assert error.details == {
        "sqlstate": "23505" if kind is AlreadyExistsError or "uq" in constraint else "23514",
        "constraint": constraint,
    }


async def test_text_sealed_with_a_destroyed_key(session: AsyncSession) -> None:
    tenant = new_tenant()
    await flush(session, tenant)
    await execute(session, KEY, kid="k1", state="destroyed", wrapped=None)
    error = await provoke(flush(session, new_database(tenant)))
    assert type(error) is UnknownKeyError
    assert error.details["constraint"] == "ck_tenant_databases_destroyed_key"


async def test_a_missing_value(session: AsyncSession) -> None:
    await flush(session, new_tenant())
    error = await provoke(
        execute(session, "UPDATE control_plane.tenants SET environment = NULL WHERE name = :name", name=CANARY),
        leaks=True,
    )
    assert type(error) is InvalidDataError
    assert error.message == "a required value is missing"
    assert error.details == {"sqlstate": "23502"}


async def test_a_transition_the_life_cycle_does_not_know(session: AsyncSession) -> None:
    tenant = new_tenant(status=TenantStatus.PENDING)
    await flush(session, tenant)
    tenant.status = TenantStatus.SUSPENDED
    error = await provoke(flush(session, tenant))
    assert type(error) is InvalidTransitionError
    assert error.message == "a tenant cannot change from pending to suspended"
    assert error.details == {
        "sqlstate": "23514",
        "constraint": "ck_tenants_status_transition",
        "from": "pending",
        "to": "suspended",
    }


@pytest.mark.parametrize(
    ("sql", "cls"),
    [
        (f"DELETE FROM control_plane.tenants WHERE tenant_id = '{SYSTEM_ADMIN_ID}'", ProtectedError),
        (f"UPDATE control_plane.tenants SET name = 'x' WHERE tenant_id = '{SYSTEM_ADMIN_ID}'", ProtectedError),
        ("TRUNCATE control_plane.system_config", ProtectedError),
        (
            "UPDATE control_plane.tenants SET tenant_id = gen_random_uuid() WHERE name = 'system_admin'",
            InvalidDataError,
        ),
    ],
)
async def test_what_the_triggers_refuse(session: AsyncSession, sql: str, cls: type[ControlPlaneError]) -> None:
    sql = sql.replace("gen_random_uuid()", f"'{uuid7()}'")
    error = await provoke(execute(session, sql))
    assert type(error) is cls
    assert error.details["sqlstate"] == "23514"


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sql", "value", "state"),
    [
        ("SELECT CAST(:value AS text)", f"{CANARY}\x00", "22021"),
        ("SELECT CAST(:value AS text)", f"{CANARY}\ud800", "22000"),
        ("SELECT CAST(:value AS text)", [CANARY], "22000"),
        ("SELECT CAST(:value AS integer)", 2**31, "22000"),
        ("SELECT CAST(:value AS bigint)", 2**63, "22000"),
        ("SELECT CAST(CAST(:value AS text) AS integer)", CANARY, "22P02"),
        ("SELECT CAST(CAST(:value AS text) AS control_plane.tenant_status)", CANARY, "22P02"),
        ("SELECT CAST(CAST(:value AS text) AS jsonb)", f'"{CANARY}\\u0000"', "22P05"),
        ("UPDATE control_plane.tenants SET name = :value", CANARY * 20, "22001"),
        ("SELECT 1 / CAST(:value AS integer)", 0, "22012"),
    ],
)
async def test_a_value_that_does_not_fit(session: AsyncSession, sql: str, value: Any, state: str) -> None:
    error = await provoke(execute(session, sql, value=value), leaks=CANARY in repr(value))
    assert type(error) is InvalidDataError
    assert error.details == {"sqlstate": state}


# --- schema and rights ------------------------------------------------------------------------------------------------


async def test_a_database_that_was_never_migrated(empty_database: str) -> None:
    async with AsyncConnectionManager(empty_database) as manager, AsyncSession(manager.engine) as session:
        error = await provoke(session.get(Tenant, SYSTEM_ADMIN_ID))
        assert type(error) is SchemaMissingError
        assert str(error).startswith("relation does not exist. Run migrations: alembic upgrade head")
        assert error.details == {"sqlstate": "42P01"}
        await session.rollback()
        error = await provoke(execute(session, "CREATE TABLE control_plane.x ()"))
        assert type(error) is SchemaMissingError
        assert str(error).startswith("schema 'control_plane' does not exist. Run migrations")
        assert "CREATE SCHEMA control_plane;" in error.hint
        assert error.details == {"sqlstate": "3F000"}


@pytest.mark.parametrize(
    ("sql", "state"),
    [
        (f'SELECT "{CANARY}" FROM control_plane.tenants', "42703"),
        (f'SELECT control_plane."{CANARY}"()', "42883"),
        (f'SELECT NULL::control_plane."{CANARY}"', "42704"),
    ],
)
async def test_a_schema_of_another_version(session: AsyncSession, sql: str, state: str) -> None:
    error = await provoke(execute(session, sql))
    assert type(error) is SchemaOutdatedError
    assert error.details == {"sqlstate": state}


@pytest.fixture
async def role(server_dsn: str) -> AsyncIterator[str]:
    """A login role without any right, whose password is a canary."""
    name = f"car_cp_{secrets.token_hex(6)}"
    connection = await connect(server_dsn)
    try:
        await connection.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{CANARY}'")
        yield name
        await connection.execute(f"DROP ROLE {name}")
    finally:
        await connection.close()


async def connect(dsn: str, **other: Any) -> asyncpg.Connection:
    parsed = dsns.parse(dsn)
    return await asyncpg.connect(parsed.for_host(parsed.hosts[0]), **{"password": parsed.password} | other)


async def connected(dsn: str, **other: Any) -> None:
    """Connect and hang up."""
    await (await connect(dsn, **other)).close()


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM control_plane.tenants",
        "INSERT INTO control_plane.system_config (key, value) VALUES ('k', '1')",
        "CREATE SCHEMA another",
    ],
)
async def test_a_role_without_rights(session: AsyncSession, role: str, sql: str) -> None:
    await execute(session, f"SET LOCAL ROLE {role}")
    error = await provoke(execute(session, sql))
    assert type(error) is PermissionDeniedError
    assert str(error).startswith("permission denied. Ensure your database user has: CREATE SCHEMA permission")
    assert error.details == {"sqlstate": "42501"}


# --- connecting -------------------------------------------------------------------------------------------------------


@pytest.fixture
async def strict_server() -> AsyncIterator[str]:
    """Address of a server that asks everybody for a password, save its owner."""
    try:
        server = EmbeddedPostgres()
        server.start()
    except MissingExtraError as error:
        pytest.skip(f"needs a server of its own: {error.message}")
    try:
        connection = await connect(server.dsn())
        rules = "local all postgres trust", "local all all scram-sha-256", "host all all all scram-sha-256"
        lines = " UNION ALL ".join(f"SELECT '{rule}'" for rule in rules)
        await connection.execute(f"COPY ({lines}) TO '{await connection.fetchval('SHOW hba_file')}'")
        await connection.execute("CREATE ROLE somebody LOGIN PASSWORD 'right'")
        await connection.execute("SELECT pg_reload_conf()")
        await connection.close()
        yield server.dsn()
    finally:
        server.stop()


async def test_a_wrong_password(strict_server: str) -> None:
    for _ in range(2_000):  # the server reads the rules again when it gets to it
        if await refuses(strict_server):
            break
        await asyncio.sleep(0.02)
    error = await provoke(connected(strict_server, user="somebody", password=CANARY))
    assert type(error) is ConfigurationError
    assert error.message == "password authentication failed"
    assert error.details == {"sqlstate": "28P01"}
    await connected(strict_server, user="somebody", password="right")


async def refuses(dsn: str) -> bool:
    try:
        await connected(dsn, user="somebody", password="wrong")
    except asyncpg.PostgresError:
        return True
    return False


async def test_a_role_that_may_not_log_in(server_dsn: str, role: str) -> None:
    connection = await connect(server_dsn)
    await connection.execute(f"ALTER ROLE {role} NOLOGIN")
    await connection.close()
    error = await provoke(connected(server_dsn, user=role, password=CANARY))
    assert type(error) is ConfigurationError
    assert error.details == {"sqlstate": "28000"}


async def test_a_database_that_does_not_exist(server_dsn: str) -> None:
    error = await provoke(connected(server_dsn, database=CANARY), leaks=True)
    assert type(error) is ConfigurationError
    assert "CREATE DATABASE control_plane;" in error.hint
    assert error.details == {"sqlstate": "3D000"}


async def test_no_connection_left(server_dsn: str, role: str) -> None:
    connection = await connect(server_dsn)
    await connection.execute(f"ALTER ROLE {role} CONNECTION LIMIT 0")
    await connection.close()
    error = await provoke(connected(server_dsn, user=role, password=CANARY))
    assert type(error) is ConnectionUnavailableError
    assert "max_connections" in error.hint
    assert error.details == {"sqlstate": "53300"}


async def test_nobody_there() -> None:
    with pytest.raises(ConnectionRefusedError) as caught:
        await asyncpg.connect("postgresql://nobody@127.0.0.1:1/nothing")
    assert translate(caught.value) is None
    assert type(translate(caught.value, io=True)) is ConnectionUnavailableError


async def test_a_connection_string_the_driver_cannot_follow(server_dsn: str) -> None:
    error = await provoke(connected(server_dsn, target_session_attrs=CANARY), leaks=True)
    assert type(error) is ConfigurationError


async def test_a_pool_that_is_used_up(shared_manager: AsyncConnectionManager) -> None:
    engine = create_async_engine(
        "postgresql+asyncpg://", async_creator=shared_manager.connect, pool_size=1, max_overflow=0, pool_timeout=0.05
    )
    try:
        async with engine.connect():
            with pytest.raises(PoolWaitError) as caught:
                await engine.connect()
    finally:
        await engine.dispose()
    error = translate(caught.value)
    assert type(error) is PoolTimeoutError
    assert isinstance(error, TimeoutError)
    assert error.retryable


# --- two transactions -------------------------------------------------------------------------------------------------


async def both(
    manager: AsyncConnectionManager, work: Callable[[AsyncConnection, AsyncConnection], Awaitable[Any]]
) -> None:
    """Run work on two connections, each in a transaction that is rolled back."""
    async with manager.engine.connect() as one, manager.engine.connect() as two:
        await work(one, two)


@pytest.fixture
async def two_tenants(shared_manager: AsyncConnectionManager) -> list[Tenant]:
    tenants = [new_tenant(name="one"), new_tenant(name="two")]
    async with shared_manager.get_session() as session:
        session.add_all(tenants)
    return tenants


async def test_a_serialization_failure(shared_manager: AsyncConnectionManager, two_tenants: list[Tenant]) -> None:
    async def work(one: AsyncConnection, two: AsyncConnection) -> None:
        for connection, own in ((one, "one"), (two, "two")):
            await connection.execution_options(isolation_level="SERIALIZABLE")
            await execute(connection, "SELECT count(*) FROM control_plane.tenants WHERE status = 'pending'")
            await execute(connection, "UPDATE control_plane.tenants SET status = 'active' WHERE name = :own", own=own)
        await one.commit()
        error = await provoke(two.commit())
        assert type(error) is ConflictError
        assert error.retryable
        assert error.hint == "Repeat the whole transaction."
        assert error.details == {"sqlstate": "40001"}

    await both(shared_manager, work)


async def test_a_deadlock(shared_manager: AsyncConnectionManager, two_tenants: list[Tenant]) -> None:
    lock = "SELECT 1 FROM control_plane.tenants WHERE name = :name FOR UPDATE"

    async def work(one: AsyncConnection, two: AsyncConnection) -> None:
        await execute(one, lock, name="one")
        await execute(two, lock, name="two")
        outcomes = await asyncio.gather(
            execute(one, lock, name="two"), execute(two, lock, name="one"), return_exceptions=True
        )
        (failure,) = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        error = translate(failure)
        assert type(error) is ConflictError
        assert error.retryable
        assert error.details == {"sqlstate": "40P01"}
        assert CANARY not in everything(error)

    await both(shared_manager, work)


@pytest.mark.parametrize("how", ["NOWAIT", "lock_timeout"])
async def test_a_lock_somebody_holds(
    shared_manager: AsyncConnectionManager, two_tenants: list[Tenant], how: str
) -> None:
    lock = "SELECT 1 FROM control_plane.tenants WHERE name = 'one' FOR UPDATE"

    async def work(one: AsyncConnection, two: AsyncConnection) -> None:
        await execute(one, lock)
        await execute(two, "SET LOCAL lock_timeout = '20ms'")
        error = await provoke(execute(two, f"{lock} {how if how == 'NOWAIT' else ''}"))
        assert type(error) is ConflictError
        assert error.retryable
        assert error.details == {"sqlstate": "55P03"}

    await both(shared_manager, work)


async def test_a_statement_that_takes_too_long(session: AsyncSession) -> None:
    await execute(session, "SET LOCAL statement_timeout = '200ms'")
    error = await provoke(execute(session, "SELECT pg_sleep(60), :value", value=CANARY))
    assert type(error) is StatementTimeoutError
    assert isinstance(error, TimeoutError)
    assert error.details == {"sqlstate": "57014"}


async def test_a_write_in_a_read_only_transaction(session: AsyncSession) -> None:
    await execute(session, "SET TRANSACTION READ ONLY")
    error = await provoke(flush(session, new_tenant()))
    assert type(error) is ConnectionUnavailableError
    assert error.message.startswith("the server takes no writes")
    assert error.details == {"sqlstate": "25006"}


@pytest.mark.parametrize("moment", ["running", "waiting", "commit"])
async def test_a_connection_the_server_ended(shared_manager: AsyncConnectionManager, moment: str) -> None:
    async def work(one: AsyncConnection, two: AsyncConnection) -> None:
        backend = (await execute(one, "SELECT pg_backend_pid()")).scalar_one()
        end = f"SELECT pg_terminate_backend({backend})"
        if moment == "running":
            ending = asyncio.create_task(execute(two, f"{end} FROM pg_sleep(0.1)"))
            error = await provoke(execute(one, "SELECT pg_sleep(60)"))
            await ending
        else:
            await execute(two, end)
            error = await provoke(execute(one, "SELECT 1") if moment == "waiting" else one.commit())
        assert type(error) is ConnectionUnavailableError
        assert error.retryable

    await both(shared_manager, work)


async def test_two_tasks_on_one_connection_is_a_mistake_and_no_outage(shared_manager: AsyncConnectionManager) -> None:
    connection = await shared_manager.connect()
    try:
        slow = asyncio.create_task(connection.execute("SELECT pg_sleep(0.05)"))
        await asyncio.sleep(0)
        with pytest.raises(asyncpg.InterfaceError, match="another operation is in progress") as caught:
            await connection.execute("SELECT 1")
        await slow
    finally:
        await connection.close()
    assert translate(caught.value) is None


async def test_an_error_we_do_not_know_is_left_alone(session: AsyncSession) -> None:
    with pytest.raises(DBAPIError) as caught:
        await execute(session, "SELEC 1")
    assert translate(caught.value) is None
    assert translate(caught.value, io=True) is None
