"""How a connection comes about: every form of connection string, several hosts, TLS, and every way it fails, against real servers."""

import asyncio
import os
import re
import socket
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import asyncpg
import pytest
from pydantic import SecretStr

from car_control_plane import dialing
from car_control_plane.connection import AsyncConnectionManager, PoolStatus
from car_control_plane.errors import (
    ClosedError,
    ConfigurationError,
    ConnectionUnavailableError,
    ControlPlaneError,
)
from car_control_plane.settings import load_settings
from tests.fixtures.servers import (
    CANARY,
    DATABASE,
    PASSWORD,
    USER,
    Certificates,
    Cluster,
    black_hole,
    error_response,
    front,
    has_ipv6,
    rogue,
    unused_port,
)


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the machine decides where to connect: no PG* variable, no password file."""
    for name in list(os.environ):
        if name.startswith(("PG", "CAR_CONTROL_PLANE_")) or name == "DATABASE_URL":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
async def port(cluster: Cluster) -> AsyncIterator[int]:
    """The primary's port on loopback, without TLS."""
    async with front(cluster.primary) as port:
        yield port


async def asked(target: Any, sql: str = "SELECT current_user", **overrides: Any) -> Any:
    """Ask one question in a session of a manager made for it."""
    async with AsyncConnectionManager(target, **overrides) as manager, manager.get_session() as session:
        return (await (await session.connection()).exec_driver_sql(sql)).scalar()


async def refusal(target: Any, **overrides: Any) -> ControlPlaneError:
    """Connect twice, on its own and for a session; return the error, which is the same."""
    async with AsyncConnectionManager(target, **overrides) as manager:
        with pytest.raises(ControlPlaneError) as alone:
            await manager.connect()
        with pytest.raises(ControlPlaneError) as in_session:
            async with manager.get_session() as session:
                await session.connection()
        health = await manager.health_check()
        assert manager.pool_status() == PoolStatus(limit=10, opened=0, in_use=0)
    assert str(in_session.value) == str(alone.value)
    assert in_session.value.details == alone.value.details
    assert type(in_session.value) is type(health.error) is type(alone.value)
    return alone.value


# --- forms of connection strings --------------------------------------------------------------------------------------

ESCAPED = quote(PASSWORD, safe="")
IN_QUOTES = PASSWORD.replace("\\", "\\\\").replace("'", "\\'")

FORMS = {
    "postgresql": "postgresql://{user}:{password}@127.0.0.1:{port}/{database}",
    "postgres": "postgres://{user}:{password}@127.0.0.1:{port}/{database}",
    "asyncpg driver": "postgresql+asyncpg://{user}:{password}@127.0.0.1:{port}/{database}",
    "psycopg2 driver": "postgresql+psycopg2://{user}:{password}@127.0.0.1:{port}/{database}",
    "psycopg driver": "postgres+psycopg://{user}:{password}@127.0.0.1:{port}/{database}",
    "blanks around it": " postgresql://{user}:{password}@127.0.0.1:{port}/{database}\n",
    "sslmode": "postgresql://{user}:{password}@127.0.0.1:{port}/{database}?sslmode=disable",
    "sslmode prefer": "postgresql://{user}:{password}@127.0.0.1:{port}/{database}?sslmode=prefer",
    "connect_timeout": "postgresql://{user}:{password}@127.0.0.1:{port}/{database}?connect_timeout=9",
    "channel_binding": "postgresql://{user}:{password}@127.0.0.1:{port}/{database}?channel_binding=prefer",
    "user in the query": "postgresql://127.0.0.1:{port}/{database}?user={user}&password={password}",
    "host in the query": "postgresql://{user}:{password}@/{database}?host=127.0.0.1&port={port}",
    "hostaddr": "postgresql://{user}:{password}@/{database}?hostaddr=127.0.0.1&port={port}",
    "host name": "postgresql://{user}:{password}@localhost:{port}/{database}",
    "two hosts": "postgresql://{user}:{password}@127.0.0.1:{port},127.0.0.1:{port}/{database}",
    "libpq": "host=127.0.0.1 port={port} dbname={database} user={user} password='{in_quotes}'",
    "unix socket": "postgresql://{user}:{password}@/{database}?host={directory}&port=5432",
    "unix socket, libpq": "host={directory} dbname={database} user={user} password='{in_quotes}' port=5432",
    "unix socket, SQLAlchemy": "postgresql+asyncpg://{user}:{password}@/{database}?host={directory}&port=5432",
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
async def test_every_form_connects(form: str, cluster: Cluster, port: int) -> None:
    dsn = form.format(
        user=USER,
        password=ESCAPED,
        in_quotes=IN_QUOTES,
        database=DATABASE,
        port=port,
        directory=cluster.primary,
    )
    assert await asked(dsn, "SELECT current_user || '@' || current_database()") == f"{USER}@{DATABASE}"


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")
async def test_an_ipv6_address_connects(cluster: Cluster) -> None:
    async with front(cluster.primary, host="::1") as port:
        assert await asked(cluster.dsn(f"[::1]:{port}")) == USER


@pytest.mark.parametrize(
    ("option", "setting", "value"),
    [
        ("application_name=ours", "application_name", "ours"),
        ("fallback_application_name=ours", "application_name", "ours"),
        ("options=-c%20work_mem%3D321kB", "work_mem", "321kB"),
        ("options=-c%20statement_timeout%3D7s", "statement_timeout", "7s"),
        ("statement_timeout=7s", "statement_timeout", "7s"),
        ("timezone=Europe/Berlin", "TimeZone", "Europe/Berlin"),
        ("search_path=public", "search_path", "public"),
        ("car.platform=yes", "car.platform", "yes"),
    ],
)
async def test_options_for_the_server_reach_it_and_win(option: str, setting: str, value: str, cluster: Cluster) -> None:
    dsn = f"{cluster.dsn(cluster.primary)}&{option}"
    if option.startswith("options") and setting == "statement_timeout":
        # What the settings say is sent as a parameter of its own, which the server puts above `options`.
        value = "10s"
    assert await asked(dsn, f"SELECT current_setting('{setting}')") == value


@pytest.mark.parametrize(
    ("setting", "value", "sql", "seen"),
    [
        ("application_name", "mine", "SHOW application_name", f"mine/app/{os.getpid()}"),
        ("statement_timeout_seconds", 1.5, "SHOW statement_timeout", "1500ms"),
        ("statement_timeout_seconds", 0, "SHOW statement_timeout", "0"),
        ("lock_timeout_seconds", 0.0001, "SHOW lock_timeout", "1ms"),
        ("statement_timeout_seconds", 2_147_483, "SHOW statement_timeout", "2147483s"),
        ("lock_timeout_seconds", 2, "SHOW lock_timeout", "2s"),
        ("idle_in_transaction_timeout_seconds", 60, "SHOW idle_in_transaction_session_timeout", "1min"),
    ],
)
async def test_settings_reach_the_server(setting: str, value: Any, sql: str, seen: str, cluster: Cluster) -> None:
    assert await asked(cluster.dsn(cluster.primary), sql, **{setting: value}) == seen


async def test_time_zone_and_search_path_are_pinned(cluster: Cluster) -> None:
    sql = "SELECT current_setting('TimeZone') || ' ' || current_setting('search_path')"
    assert await asked(cluster.dsn(cluster.primary), sql) == "UTC pg_catalog"


async def test_the_password_may_come_from_the_environment(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    assert await asked(cluster.dsn(cluster.primary, password=None)) == USER


async def test_host_and_port_may_come_from_the_environment(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", str(cluster.primary))
    monkeypatch.setenv("PGPORT", "5432")
    assert await asked(f"postgresql://{USER}:{ESCAPED}@/{DATABASE}") == USER


async def test_the_connection_string_may_come_from_the_environment_settings_or_a_secret(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    dsn = cluster.dsn(cluster.primary)
    monkeypatch.setenv("DATABASE_URL", dsn)
    assert await asked(None) == USER
    monkeypatch.delenv("DATABASE_URL")
    assert await asked(SecretStr(dsn)) == USER
    assert await asked(None, database_url=dsn) == USER
    assert await asked(load_settings(database_url=dsn)) == USER


# --- making a manager -------------------------------------------------------------------------------------------------


def test_a_manager_is_made_without_a_server() -> None:
    manager = AsyncConnectionManager(f"postgresql://u:{CANARY}@db.invalid/d")
    assert repr(manager) == "<AsyncConnectionManager postgresql://u:***@db.invalid:5432/d>"
    assert manager.pool_status() == PoolStatus(limit=10, opened=0, in_use=0)


@pytest.mark.parametrize(
    ("target", "overrides", "said"),
    [
        (None, {}, "DATABASE_URL environment variable is required"),
        ("", {}, "DATABASE_URL environment variable is required"),
        ("mysql://h/d", {}, "the connection string does not start with postgresql:// or postgres://"),
        ("postgresql://u:p@ss@h/d", {}, "the connection string holds more than one '@'"),
        ("embedded://host/path", {}, "this is no embedded: address"),
        ("postgresql://h/d", {"pool_size": 0}, "CAR_CONTROL_PLANE_POOL_SIZE: "),
        ("postgresql://h/d", {"pool": 0}, "there is no setting 'pool'"),
        ("postgresql://h/d", {"database_url": "postgresql://i/d"}, "the connection string is given twice"),
        (load_settings(database_url="postgresql://h/d"), {"pool_size": 2}, "pass either settings or single overrides"),
        (5, {}, "DATABASE_URL: "),
    ],
)
def test_a_manager_is_refused_what_it_cannot_use(target: Any, overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        AsyncConnectionManager(target, **overrides)
    assert caught.value.message.startswith(said)


def test_the_limit_of_the_pool_is_size_and_overflow() -> None:
    manager = AsyncConnectionManager("postgresql://h/d", pool_size=3, max_overflow=4)
    assert manager.pool_status() == PoolStatus(limit=7, opened=0, in_use=0)


# --- several hosts ----------------------------------------------------------------------------------------------------

IN_RECOVERY = "SELECT pg_is_in_recovery()"


async def test_a_dead_host_is_passed_over(cluster: Cluster, port: int) -> None:
    assert await asked(cluster.dsn(f"127.0.0.1:{unused_port()},127.0.0.1:{port}")) == USER


async def test_a_silent_host_costs_its_own_time_limit_and_no_more(cluster: Cluster, port: int) -> None:
    """With one limit for all hosts together, as asyncpg counts, the second would not be asked at all."""
    with black_hole() as silent:
        dsn = cluster.dsn(f"127.0.0.1:{silent},127.0.0.1:{port}")
        async with asyncio.timeout(60):  # asyncpg's own limit is 60 s
            assert await asked(dsn, connect_timeout_seconds=1) == USER
            assert await asked(f"{dsn}?connect_timeout=1", connect_timeout_seconds=600) == USER


async def test_a_host_that_hangs_up_is_passed_over(cluster: Cluster, port: int) -> None:
    """A proxy in front of a dead server: says yes, then closes. Not the same as a server without TLS."""

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(8)

    async with rogue(hang_up) as dead:
        for mode in ("disable", "prefer", "require"):
            dsn = cluster.dsn(f"127.0.0.1:{dead}", sslmode=mode)
            error = await refusal(dsn)
            assert type(error) is ConnectionUnavailableError, mode
        assert await asked(cluster.dsn(f"127.0.0.1:{dead},127.0.0.1:{port}")) == USER


@pytest.mark.parametrize(
    ("wanted", "in_recovery"),
    [
        (None, False),  # of several hosts, one that takes writes
        ("read-write", False),
        ("primary", False),
        ("any", True),
        ("read-only", True),
        ("standby", True),
        ("prefer-standby", True),
    ],
)
async def test_the_role_decides_between_hosts(wanted: str | None, in_recovery: bool, cluster: Cluster) -> None:
    options = {} if wanted is None else {"target_session_attrs": wanted}
    async with front(cluster.standby) as standby, front(cluster.primary) as primary:
        dsn = cluster.dsn(f"127.0.0.1:{standby},127.0.0.1:{primary}", **options)
        assert await asked(dsn, IN_RECOVERY) is in_recovery


async def test_prefer_standby_asks_every_host_before_it_takes_a_primary(cluster: Cluster, port: int) -> None:
    async with front(cluster.standby) as standby:
        dsn = cluster.dsn(f"127.0.0.1:{port},127.0.0.1:{standby}", target_session_attrs="prefer-standby")
        assert await asked(dsn, IN_RECOVERY) is True
    dsn = cluster.dsn(f"127.0.0.1:{unused_port()},127.0.0.1:{port}", target_session_attrs="prefer-standby")
    assert await asked(dsn, IN_RECOVERY) is False


async def test_a_single_host_is_taken_as_it_is(cluster: Cluster) -> None:
    assert await asked(cluster.dsn(cluster.standby), IN_RECOVERY) is True


async def test_a_host_without_the_role_says_so(cluster: Cluster) -> None:
    error = await refusal(cluster.dsn(cluster.standby, target_session_attrs="read-write"))
    assert type(error) is ConnectionUnavailableError
    assert error.message == f"{cluster.standby} does not have the role target_session_attrs asks for"
    assert error.details == {"host": str(cluster.standby), "port": 5432}


async def test_when_no_host_is_left_every_one_is_named(cluster: Cluster) -> None:
    dead = unused_port()
    with black_hole() as silent:
        async with front(cluster.standby) as standby:
            dsn = cluster.dsn(f"127.0.0.1:{dead},127.0.0.1:{silent},127.0.0.1:{standby}")
            error = await refusal(dsn, connect_timeout_seconds=1)
    assert type(error) is ConnectionUnavailableError
    assert error.retryable
    assert error.message == (
        f"none of 3 hosts accepted the connection: cannot connect to 127.0.0.1:{dead}: Connection refused; "
        f"127.0.0.1:{silent} did not answer within 1 s; 127.0.0.1:{standby} does not have the role target_session_attrs asks for"
    )
    assert error.details == {"hosts": [{"host": "127.0.0.1", "port": number} for number in (dead, silent, standby)]}


async def test_a_wrong_password_is_not_tried_on_the_next_host(cluster: Cluster, port: int) -> None:
    error = await refusal(cluster.dsn(f"127.0.0.1:{port},127.0.0.1:{unused_port()}", password="wrong"))
    assert type(error) is ConfigurationError
    assert error.details == {"sqlstate": "28P01", "host": "127.0.0.1", "port": port}


# --- what goes wrong on one host --------------------------------------------------------------------------------------


@pytest.mark.parametrize("password", ["wrong", CANARY, ESCAPED + "x"])
async def test_a_wrong_password(password: str, cluster: Cluster) -> None:
    error = await refusal(cluster.dsn(cluster.primary, password=password))
    assert type(error) is ConfigurationError
    assert error.message == "password authentication failed"
    assert "percent-encode" in error.hint
    assert not error.retryable


async def test_no_password(cluster: Cluster) -> None:
    error = await refusal(cluster.dsn(cluster.primary, password=None))
    assert type(error) is ConfigurationError
    assert error.message == "password authentication failed"


async def test_no_such_database(cluster: Cluster) -> None:
    error = await refusal(cluster.dsn(cluster.primary, database="nowhere"))
    assert type(error) is ConfigurationError
    assert str(error) == "the database does not exist. Create it first: CREATE DATABASE control_plane;"


def _as_user(server_dsn: str, user: str) -> str:
    """Write the address of the tests' server, whoever's it is, for another user whose password is "let-me-in"."""
    return re.sub("//[^@/]*@", f"//{user}:let-me-in@", server_dsn)


async def test_no_such_user(server_dsn: str) -> None:
    error = await refusal(_as_user(server_dsn, "nobody_at_all"))
    assert type(error) is ConfigurationError
    assert error.details["sqlstate"] in {"28000", "28P01"}


async def test_no_such_host() -> None:
    error = await refusal("postgresql://u@db.invalid/d", connect_timeout_seconds=60)
    assert type(error) is ConnectionUnavailableError
    assert error.message.startswith("cannot connect to db.invalid:5432: ")
    with pytest.raises(socket.gaierror) as system:
        await asyncio.get_running_loop().getaddrinfo("db.invalid", 5432)
    assert error.message.endswith(f": {system.value.strerror}")


async def test_a_port_where_nobody_listens() -> None:
    port = unused_port()
    error = await refusal(f"postgresql://u@127.0.0.1:{port}/d")
    assert type(error) is ConnectionUnavailableError
    assert error.message == f"cannot connect to 127.0.0.1:{port}: Connection refused"
    assert error.details == {"host": "127.0.0.1", "port": port}
    assert error.retryable


@pytest.mark.skipif(not has_ipv6(), reason="the name has one address")
async def test_a_name_with_several_addresses_where_nobody_listens() -> None:
    names = {family for family, *_ in socket.getaddrinfo("localhost", 1, type=socket.SOCK_STREAM)}
    error = await refusal(f"postgresql://u@localhost:{(port := unused_port())}/d")
    reason = "none of its addresses accepts connections" if len(names) > 1 else "Connection refused"
    assert error.message == f"cannot connect to localhost:{port}: {reason}"


async def test_no_such_socket(tmp_path: Path) -> None:
    error = await refusal(f"postgresql://u@/d?host={tmp_path}")
    assert type(error) is ConnectionUnavailableError
    assert error.message == f"cannot connect to {tmp_path}: No such file or directory"


async def test_no_host_at_all() -> None:
    """asyncpg then looks in the usual places, of which none has a server on this port."""
    error = await refusal(f"postgresql://u@:{unused_port()}/d")
    assert error.message.startswith("cannot connect to the default host: ")


async def test_silence() -> None:
    with black_hole() as silent:
        error = await refusal(f"postgresql://u@127.0.0.1:{silent}/d", connect_timeout_seconds=0.2)
    assert type(error) is ConnectionUnavailableError
    assert error.message == f"127.0.0.1:{silent} did not answer within 0.2 s"


async def test_a_server_that_is_full(cluster: Cluster, server_dsn: str) -> None:
    """The limit of a role is the server's answer for the limit of the server: 53300."""
    async with AsyncConnectionManager(server_dsn) as owner:
        admin = await owner.connect()
        role = f"car_cp_full_{os.getpid()}"
        try:
            await admin.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'let-me-in' CONNECTION LIMIT 0")
            error = await refusal(_as_user(server_dsn, role))
        finally:
            await admin.execute(f"DROP ROLE IF EXISTS {role}")
            await admin.close()
    assert type(error) is ConnectionUnavailableError
    assert error.message.endswith("is not available: the server has no connection left")


async def test_a_server_that_is_too_old(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialing, "MINIMUM_SERVER", (99, 0))
    ours = []
    terminate = asyncpg.Connection.terminate

    def note(connection: asyncpg.Connection) -> None:
        ours.append(connection)
        terminate(connection)

    monkeypatch.setattr(asyncpg.Connection, "terminate", note)
    error = await refusal(cluster.dsn(cluster.primary))
    assert type(error) is ConfigurationError
    assert error.message.startswith("the server is PostgreSQL ")
    assert error.message.endswith("; the control plane needs PostgreSQL 12 or newer")
    assert len(ours) == 3
    assert all(connection.is_closed() for connection in ours)


@pytest.mark.parametrize(
    ("options", "sqlstate"),
    [({"DateStyle": "nonsense"}, "22023"), ({"options": "-c no_such_setting=1"}, "42704"), ({"role": "x y"}, "22023")],
)
async def test_a_parameter_the_server_does_not_take(options: dict[str, str], sqlstate: str, cluster: Cluster) -> None:
    error = await refusal(cluster.dsn(cluster.primary, **options))
    assert type(error) is ConfigurationError
    assert error.message == f"{cluster.primary} does not take a run-time parameter of the connection string"
    assert error.details == {"sqlstate": sqlstate, "host": str(cluster.primary), "port": 5432}


async def _garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 3)
    await writer.drain()


async def _huge(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1000)
    writer.write(b"R" + struct.pack("!i", 2**31 - 1) + b"\0" * 100)
    await writer.drain()
    await reader.read()


async def _fatal(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1000)
    writer.write(error_response("XX000", f"{CANARY} said the server"))
    await writer.drain()


async def _unknown_authentication(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1000)
    writer.write(b"R" + struct.pack("!ii", 8, 99))
    await writer.drain()
    await reader.read()


@pytest.mark.parametrize("behave", [_garbage, _huge, _fatal, _unknown_authentication])
@pytest.mark.parametrize("mode", ["disable", "prefer", "require"])
async def test_a_server_that_talks_nonsense_is_unavailable(
    behave: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any], mode: str
) -> None:
    async with rogue(behave) as port:
        error = await refusal(f"postgresql://u:{CANARY}@127.0.0.1:{port}/d?sslmode={mode}", connect_timeout_seconds=0.5)
    assert type(error) in {ConnectionUnavailableError, ConfigurationError}
    assert CANARY not in str(error)


# --- TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture
async def secure(cluster: Cluster, certificates: Certificates) -> AsyncIterator[int]:
    """The primary's port on loopback, with TLS and nothing else."""
    async with front(cluster.primary, tls=certificates.context()) as port:
        yield port


@pytest.mark.parametrize("mode", [None, "allow", "prefer", "require"])
async def test_tls_that_trusts_everybody(mode: str | None, cluster: Cluster, secure: int) -> None:
    options = {} if mode is None else {"sslmode": mode}
    assert await asked(cluster.dsn(secure, **options)) == USER


@pytest.mark.parametrize("mode", ["require", "verify-ca", "verify-full"])
async def test_tls_that_knows_the_authority(
    mode: str, cluster: Cluster, secure: int, certificates: Certificates
) -> None:
    """Like libpq, `require` with a root certificate checks it."""
    dsn = cluster.dsn(f"localhost:{secure}", sslmode=mode, sslrootcert=str(certificates.authority))
    async with AsyncConnectionManager(dsn) as manager:
        connection = await manager.connect()
        transport: Any = connection._transport
        assert transport.get_extra_info("cipher")
        assert await connection.fetchval("SELECT current_user") == USER
        await connection.close()


@pytest.mark.parametrize("mode", ["require", "verify-ca", "verify-full"])
async def test_tls_by_another_authority_is_refused(
    mode: str, cluster: Cluster, secure: int, certificates: Certificates
) -> None:
    dsn = cluster.dsn(f"localhost:{secure}", sslmode=mode, sslrootcert=str(certificates.other_authority))
    error = await refusal(dsn)
    assert type(error) is ConfigurationError
    assert error.message.startswith(f"no TLS connection to localhost:{secure}: its certificate was not accepted (")
    assert "sslrootcert" in error.hint
    assert error.details == {"host": "localhost", "port": secure}


async def test_tls_for_another_name_is_refused_by_verify_full_alone(
    cluster: Cluster, secure: int, certificates: Certificates
) -> None:
    dsn = cluster.dsn(secure, sslrootcert=str(certificates.authority))
    assert await asked(f"{dsn}&sslmode=verify-ca") == USER
    error = await refusal(f"{dsn}&sslmode=verify-full")
    assert type(error) is ConfigurationError
    assert "certificate was not accepted (IP address mismatch" in error.message


@pytest.mark.parametrize("mode", ["require", "verify-full"])
async def test_a_server_without_tls_is_refused(
    mode: str, cluster: Cluster, port: int, certificates: Certificates
) -> None:
    dsn = cluster.dsn(f"localhost:{port}", sslmode=mode, sslrootcert=str(certificates.authority))
    error = await refusal(dsn)
    assert type(error) is ConfigurationError
    assert error.message == f"no TLS connection to localhost:{port}: the server does not offer TLS"


async def test_a_client_without_tls_is_refused_by_a_server_that_wants_it(cluster: Cluster, secure: int) -> None:
    error = await refusal(cluster.dsn(secure, sslmode="disable"))
    assert type(error) is ConfigurationError
    assert error.message == "the server refuses this user"


async def test_a_handshake_that_fails(cluster: Cluster) -> None:
    async def no_handshake(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(8)
        writer.write(b"S")
        await reader.read(1000)
        writer.write(b"this is no TLS record, and never will be")
        await writer.drain()

    async with rogue(no_handshake) as port:
        error = await refusal(cluster.dsn(port, sslmode="require"))
    assert type(error) is ConfigurationError
    assert error.message.startswith(f"no TLS connection to 127.0.0.1:{port}: the handshake failed (")


async def test_no_root_certificate(cluster: Cluster, secure: int) -> None:
    error = await refusal(cluster.dsn(f"localhost:{secure}", sslmode="verify-full"))
    assert type(error) is ConfigurationError
    assert error.message == (
        f"no TLS connection to localhost:{secure}: the root certificate file (sslrootcert) does not exist or cannot be read"
    )


@pytest.mark.parametrize("option", ["sslrootcert", "sslcert"])
async def test_a_file_that_is_not_there(option: str, cluster: Cluster, secure: int, tmp_path: Path) -> None:
    error = await refusal(cluster.dsn(secure, **{"sslmode": "require", option: str(tmp_path / "nothing")}))
    assert type(error) is ConfigurationError
    assert error.message == (
        f"no TLS connection to 127.0.0.1:{secure}: a file named in the connection string (sslrootcert, sslcert, sslkey, sslcrl) does not exist"
    )


async def test_a_root_certificate_that_is_none(cluster: Cluster, secure: int, tmp_path: Path) -> None:
    (file := tmp_path / "root.crt").write_text(CANARY, encoding="utf-8")
    error = await refusal(cluster.dsn(secure, sslmode="verify-full", sslrootcert=str(file)))
    assert type(error) is ConfigurationError
    assert error.message.startswith(
        f"no TLS connection to 127.0.0.1:{secure}: the handshake failed (NO_CERTIFICATE_OR_CRL_FOUND"
    )


async def test_the_systems_authorities(cluster: Cluster, secure: int) -> None:
    """They do not know ours, so this shows that they are asked: without `ssl=True` asyncpg would look for a file called "system"."""
    error = await refusal(cluster.dsn(f"localhost:{secure}", sslrootcert="system"))
    assert type(error) is ConfigurationError
    assert "its certificate was not accepted" in error.message


# --- connections outside of the pool ----------------------------------------------------------------------------------


async def test_a_connection_of_its_own(cluster: Cluster) -> None:
    async with AsyncConnectionManager(cluster.dsn(cluster.primary)) as manager:
        connection = await manager.connect(server_settings={"statement_timeout": "123ms", "application_name": "x"})
        try:
            assert await connection.fetchval("SHOW statement_timeout") == "123ms"
            assert await connection.fetchval("SHOW application_name") == "x"
            assert await connection.fetchval("SHOW lock_timeout") == "3s"
            assert manager.pool_status().opened == 0
        finally:
            await connection.close()


async def test_a_statement_is_waited_for_as_long_as_asked(cluster: Cluster) -> None:
    async with AsyncConnectionManager(cluster.dsn(cluster.primary), command_timeout_seconds=0.3) as manager:
        impatient = await manager.connect()
        with pytest.raises(TimeoutError):
            await impatient.fetchval("SELECT pg_sleep(30)")
        await impatient.close()
        for limit in (None, 60.0):
            patient = await manager.connect(command_timeout=limit)
            assert await patient.fetchval("SELECT pg_sleep(0.6)::text") == ""
            await patient.close()


async def test_an_engine_for_migrations_has_no_pool_and_no_limit_on_statements(cluster: Cluster) -> None:
    async with AsyncConnectionManager(cluster.dsn(cluster.primary), command_timeout_seconds=0.1) as manager:
        engine = manager.create_engine(server_settings={"application_name": "migration"})
        try:
            pids = set()
            for _ in range(2):
                async with engine.connect() as connection:
                    row: Any = (
                        await connection.exec_driver_sql(
                            "SELECT current_setting('statement_timeout'), current_setting('idle_in_transaction_session_timeout'), "
                            "current_setting('lock_timeout'), current_setting('application_name'), pg_sleep(0.3)::text, pg_backend_pid()"
                        )
                    ).one()
                    assert row[:5] == ("0", "0", "3s", "migration", "")
                    pids.add(row[5])
            assert len(pids) == 2
        finally:
            await engine.dispose()


async def test_an_engine_for_migrations_may_keep_a_limit(cluster: Cluster) -> None:
    async with AsyncConnectionManager(cluster.dsn(cluster.primary)) as manager:
        engine = manager.create_engine(server_settings={"statement_timeout": "5s"})
        async with engine.connect() as connection:
            assert (await connection.exec_driver_sql("SHOW statement_timeout")).scalar() == "5s"
        await engine.dispose()


async def test_the_engine_is_one_and_the_same(cluster: Cluster) -> None:
    async with AsyncConnectionManager(cluster.dsn(cluster.primary)) as manager:
        assert manager.engine is manager.engine
        async with manager.engine.connect() as connection:
            assert (await connection.exec_driver_sql("SELECT 1")).scalar() == 1
            assert manager.pool_status() == PoolStatus(limit=10, opened=1, in_use=1)
        assert manager.pool_status() == PoolStatus(limit=10, opened=1, in_use=0)


async def test_a_closed_manager_opens_nothing(cluster: Cluster) -> None:
    manager = AsyncConnectionManager(cluster.dsn(cluster.primary))
    await manager.close()
    with pytest.raises(ClosedError):
        await manager.connect()
    with pytest.raises(ClosedError):
        manager.create_engine()
