"""A password is nowhere: in no text, cause, context or frame of an error, no repr, no log, no warning. Each place is first shown to leak."""

import asyncio
import functools
import gc
import logging
import os
import pickle
import uuid
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlmodel import select

from car_control_plane import connection as connections, dialing
from car_control_plane.connection import AsyncConnectionManager, init_db
from car_control_plane.errors import (
    AlreadyExistsError,
    ConfigurationError,
    ConnectionUnavailableError,
    ControlPlaneError,
)
from car_control_plane.models import Tenant, TenantEnvironment
from car_control_plane.settings import load_settings
from tests.fixtures.leaks import failure_of, failure_of_call, leaks
from tests.fixtures.servers import (
    CANARY,
    DATABASE,
    USER,
    Certificates,
    Cluster,
    black_hole,
    error_response,
    front,
    rogue,
    unused_port,
)

SSL_REQUEST = b"\x00\x00\x00\x08\x04\xd2\x16\x2f"


@pytest.fixture(autouse=True)
def no_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_default", None)
    monkeypatch.delenv("CAR_CONTROL_PLANE_DATABASE_URL", raising=False)


async def ask(connection: asyncpg.Connection) -> None:
    await connection.fetchval("SELECT 1")


async def by_connection(manager: AsyncConnectionManager) -> None:
    await ask(await manager.connect())


async def by_session(manager: AsyncConnectionManager) -> None:
    async with manager.get_session() as session:
        await session.connection()


async def by_read_session(manager: AsyncConnectionManager) -> None:
    async with manager.get_read_session() as session:
        await session.exec(select(Tenant))


async def by_direct_session(manager: AsyncConnectionManager) -> None:
    async with manager.get_session_direct() as session:
        await session.connection()


async def by_engine(manager: AsyncConnectionManager) -> None:
    engine = manager.create_engine()
    try:
        await (await engine.connect()).close()
    finally:
        await engine.dispose()


async def by_health_check(manager: AsyncConnectionManager) -> None:
    health = await manager.health_check()
    assert CANARY not in repr(health)
    assert health.error is not None
    raise health.error


async def by_require_schema(manager: AsyncConnectionManager) -> None:
    await manager.require_schema()


WAYS = (by_connection, by_session, by_read_session, by_direct_session, by_engine, by_health_check, by_require_schema)


# --- the places leak --------------------------------------------------------------------------------------------------


async def test_the_driver_shows_the_password_in_its_frames(cluster: Cluster) -> None:
    """Why the manager has a creator of its own: what asyncpg raises, wherever the password comes from."""
    by_url = functools.partial(asyncpg.connect, cluster.dsn(cluster.primary, password=CANARY))
    by_argument = functools.partial(asyncpg.connect, cluster.dsn(cluster.primary, password=None), password=CANARY)
    for connect in (by_url, by_argument):
        error = await failure_of(connect())
        assert isinstance(error, asyncpg.InvalidPasswordError)
        assert any("connect_utils.py" in place for place in leaks(error, CANARY))


async def test_sqlalchemy_shows_it_too(cluster: Cluster) -> None:
    engine = create_async_engine(f"postgresql+asyncpg://{USER}:{CANARY}@/{DATABASE}?host={cluster.primary}&port=5432")
    error = await failure_of(_connect(engine))
    assert isinstance(error, DBAPIError)
    assert list(leaks(error, CANARY))
    assert CANARY in engine.url.render_as_string(hide_password=False)
    await engine.dispose()


async def _connect(engine: AsyncEngine) -> None:
    async with engine.connect():
        pass


async def test_a_cancelled_driver_shows_it_too() -> None:
    """A time limit around a block turns the cancellation into a cause, and its frames go to the error tracker with it."""
    with black_hole() as port:
        connect = functools.partial(asyncpg.connect, f"postgresql://u:{CANARY}@127.0.0.1:{port}/d")
        error = await failure_of(_limited(connect))
    assert isinstance(error, TimeoutError)
    assert list(leaks(error, CANARY))


async def _limited(work: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(0.1):
        await work()


# --- connections that fail --------------------------------------------------------------------------------------------


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, sqlstate: str) -> None:
    """Ask for the password in clear text, and say it back."""
    first = await reader.read(1000)
    if first == SSL_REQUEST:
        writer.write(b"N")
        await reader.read(1000)
    writer.write(b"R\x00\x00\x00\x08\x00\x00\x00\x03")
    password = (await reader.read(1000))[5:-1].decode()
    assert CANARY in password
    writer.write(error_response(sqlstate, f"the password {password} is wrong"))
    await writer.drain()


@asynccontextmanager
async def trouble(kind: str, cluster: Cluster, certificates: Certificates) -> AsyncIterator[str]:
    """Give a connection string that holds the canary and does not connect."""
    dsn = cluster.dsn
    if kind in {"wrong password", "no database", "wrong role", "too old"}:
        place = cluster.standby if kind == "wrong role" else cluster.primary
        yield {
            "wrong password": dsn(place, password=CANARY),
            "no database": dsn(place, database="nowhere"),
            "wrong role": dsn(place, target_session_attrs="read-write"),
            "too old": dsn(place),
        }[kind]
    elif kind == "refused":
        yield dsn(unused_port())
    elif kind == "no host":
        yield dsn("db.invalid")
    elif kind == "silent":
        with black_hole() as port:
            yield dsn(port)
    elif kind == "several":
        with black_hole() as port:
            yield dsn(f"127.0.0.1:{unused_port()},127.0.0.1:{port}")
    elif kind.startswith("TLS"):
        options = {
            "TLS, not offered": {"sslmode": "require"},
            "TLS, unknown authority": {"sslmode": "verify-full", "sslrootcert": str(certificates.other_authority)},
            "TLS, no root certificate": {"sslmode": "verify-full", "sslrootcert": "/nowhere"},
            "TLS, not asked for": {"sslmode": "disable"},
        }[kind]
        tls = None if kind == "TLS, not offered" else certificates.context()
        async with front(cluster.primary, tls=tls) as port:
            yield dsn(f"localhost:{port}", **options)
    else:
        async with rogue(functools.partial(_echo, sqlstate=kind.removeprefix("echo "))) as port:
            yield dsn(port, password=CANARY)


KINDS = (
    "wrong password",
    "no database",
    "wrong role",
    "too old",
    "refused",
    "no host",
    "silent",
    "several",
    "TLS, not offered",
    "TLS, unknown authority",
    "TLS, no root certificate",
    "TLS, not asked for",
    "echo 28P01",
    "echo XX000",
    "echo 57P03",
    "echo 22023",
)


@pytest.mark.parametrize("kind", KINDS)
async def test_an_error_of_connecting_shows_no_password(
    kind: str,
    cluster: Cluster,
    certificates: Certificates,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    if kind == "too old":
        monkeypatch.setattr(dialing, "MINIMUM_SERVER", (99, 0))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        async with trouble(kind, cluster, certificates) as dsn:
            monkeypatch.setenv("DATABASE_URL", dsn)
            async with AsyncConnectionManager(connect_timeout_seconds=0.2) as manager:
                for way in WAYS:
                    error = await failure_of(way(manager))
                    assert isinstance(error, ConfigurationError | ConnectionUnavailableError | ControlPlaneError)
                    assert list(leaks(error, CANARY)) == [], way.__name__
                    assert error.__cause__ is None
        gc.collect()
    assert CANARY not in caplog.text
    assert not any(CANARY in str(warning.message) for warning in warned)


@pytest.mark.parametrize("way", [by_connection, by_session, by_read_session, by_engine, by_health_check])
@pytest.mark.parametrize("how", ["cancelled", "timed out"])
async def test_connecting_that_is_cut_off_shows_no_password(
    way: Callable[[AsyncConnectionManager], Any],
    how: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    with black_hole() as port:
        monkeypatch.setenv("DATABASE_URL", f"postgresql://u:{CANARY}@127.0.0.1:{port}/d")
        async with AsyncConnectionManager(connect_timeout_seconds=60) as manager:
            if how == "timed out":
                error = await failure_of(_limited(functools.partial(way, manager)))
                assert isinstance(error, TimeoutError)
            else:
                task = asyncio.ensure_future(way(manager))
                await asyncio.sleep(0.1)
                task.cancel()
                error = await failure_of(task)
                assert isinstance(error, asyncio.CancelledError)
            assert list(leaks(error, CANARY)) == []
    gc.collect()
    assert CANARY not in caplog.text


async def test_a_second_attempt_does_not_carry_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """`sslmode=allow` tries twice, and asyncpg hangs the first failure on the second: cut off there, both are gone."""
    connections_seen = 0
    limit, again = asyncio.timeout(None), asyncio.Event()

    async def refuse_then_silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections_seen
        connections_seen += 1
        await reader.read(1000)
        if connections_seen == 1:
            writer.write(error_response("28000", "no encryption"))
            await writer.drain()
        else:
            again.set()
            await reader.read()

    async def limited(manager: AsyncConnectionManager) -> None:
        async with limit:
            await by_session(manager)

    async with rogue(refuse_then_silence) as port:
        monkeypatch.setenv("DATABASE_URL", f"postgresql://u:{CANARY}@127.0.0.1:{port}/d?sslmode=allow")
        async with AsyncConnectionManager(connect_timeout_seconds=60) as manager:
            connecting = asyncio.ensure_future(limited(manager))
            await again.wait()
            limit.reschedule(asyncio.get_running_loop().time())
            error = await failure_of(connecting)
    assert connections_seen == 2
    assert isinstance(error, TimeoutError)
    assert list(leaks(error, CANARY)) == []


# --- connection strings that are refused ------------------------------------------------------------------------------

MALFORMED = (
    CANARY,
    f"mysql://u:{CANARY}@h/d",
    f"postgresql://u:p@{CANARY}@h/d",
    f"postgresql://u:p/{CANARY}@h/d",
    f"postgresql://u:p?{CANARY}@h/d",
    f"postgresql://u:p#{CANARY}@h/d",
    f"postgresql://u:{CANARY}@h:port/d",
    f"postgresql://u:{CANARY}@h/d?sslmod=require",
    f"postgresql://u@h/d?passwort={CANARY}",
    f"postgresql://u:%zz{CANARY}@h/d",
    f"postgresql://u:{CANARY}@h/d?sslmode={CANARY}",
    f"host=h password='{CANARY}",
    f"embedded://u:{CANARY}@h",
    f"embedded:\x07{CANARY}",
)
GOOD = f"postgresql://u:{CANARY}@h/d"


@pytest.mark.parametrize("bad", MALFORMED)
def test_a_refused_connection_string_is_not_shown(bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for make in (
        functools.partial(init_db, bad),
        functools.partial(init_db, database_url=bad),
        functools.partial(AsyncConnectionManager, bad),
        functools.partial(AsyncConnectionManager, load_settings(database_url=bad)),
    ):
        error = failure_of_call(make)
        assert isinstance(error, ConfigurationError)
        assert list(leaks(error, CANARY)) == []
    if "\x07" not in bad:
        monkeypatch.setenv("DATABASE_URL", bad)
        for unset in (init_db, connections.get_connection_manager, AsyncConnectionManager):
            assert list(leaks(failure_of_call(unset), CANARY)) == []


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(init_db, GOOD, pool_size=0),
        functools.partial(init_db, GOOD, poolsize=1),
        functools.partial(init_db, GOOD, database_url=GOOD),
        functools.partial(init_db, load_settings(database_url=GOOD), database_url=GOOD),
        functools.partial(AsyncConnectionManager, GOOD, pool_size="many"),
        functools.partial(AsyncConnectionManager, database_url=GOOD, pool_size="many"),
        functools.partial(load_settings, database_url=GOOD, application_name=""),
        functools.partial(load_settings, database_url=GOOD, url=GOOD),
    ],
)
def test_a_good_connection_string_beside_something_refused_is_not_shown(make: Callable[[], object]) -> None:
    error = failure_of_call(make)
    assert isinstance(error, ConfigurationError)
    if "url" not in getattr(make, "keywords", {}):  # an unknown setting is the caller's own
        assert list(leaks(error, CANARY)) == []


# --- everything that can be printed -----------------------------------------------------------------------------------


async def test_nothing_that_can_be_printed_shows_it(cluster: Cluster) -> None:
    async with AsyncConnectionManager(cluster.dsn(cluster.primary)) as manager:
        await by_session(manager)
        engine, pool = manager.engine, manager.engine.pool
        async with manager.get_session() as session, manager.get_read_session() as reading:
            connection = await session.connection()
            raw = await connection.get_raw_connection()
            await reading.connection()
            shown = [
                *(
                    repr(thing)
                    for thing in (manager, manager.settings, engine, pool, session, reading, connection, raw)
                ),
                *(repr(vars(thing)) for thing in (manager, engine.sync_engine, pool, session.sync_session)),
                repr(manager.pool_status()),
                repr(await manager.health_check()),
                pool.status(),
                str(engine.url),
                repr(engine.url),
                engine.url.render_as_string(hide_password=False),
                repr(engine.url._asdict()),
                pickle.dumps(engine.url).decode("latin-1"),
                repr(raw.driver_connection),
                manager.settings.model_dump_json(),
                repr(session.info),
            ]
    assert [thing for thing in shown if CANARY in thing] == []


async def test_the_driver_keeps_it_where_nothing_prints_it(cluster: Cluster) -> None:
    """The proof for the test above: the canary is there to be shown."""
    async with AsyncConnectionManager(cluster.dsn(cluster.primary)) as manager:
        connection = await manager.connect()
        assert CANARY in repr(connection._params)
        assert CANARY not in repr(connection)
        await connection.close()


# --- logs -------------------------------------------------------------------------------------------------------------

LOUD = ("sqlalchemy.engine", "sqlalchemy.pool", "sqlalchemy.orm", "asyncpg", "asyncio", "car_control_plane")


@pytest.fixture
def loud(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Everything logs whatever it can."""
    for name in LOUD:
        caplog.set_level(logging.DEBUG, logger=name)
    return caplog


async def insert(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        for name in ("one", "one"):
            await connection.execute(
                text(
                    "INSERT INTO control_plane.tenants (tenant_id, name, environment, status_reason) "
                    "VALUES (:id, :name, 'staging', :reason)"
                ),
                {"id": uuid.uuid4(), "name": name, "reason": CANARY},
            )


async def test_a_plain_engine_logs_values(own_database: str, loud: pytest.LogCaptureFixture) -> None:
    async with AsyncConnectionManager(own_database) as manager:
        engine = create_async_engine("postgresql+asyncpg://", async_creator=manager.connect)
        error = await failure_of(insert(engine))
        await engine.dispose()
    assert isinstance(error, IntegrityError)
    assert CANARY in str(error)
    assert CANARY in loud.text


async def test_our_engine_logs_statements_without_values(own_database: str, loud: pytest.LogCaptureFixture) -> None:
    async with AsyncConnectionManager(own_database) as manager:
        error = await failure_of(insert(manager.engine))
        assert isinstance(error, IntegrityError)
        assert CANARY not in str(error)
        error = await failure_of(_insert_twice(manager))
    assert isinstance(error, AlreadyExistsError)
    assert [place for place in leaks(error, CANARY) if " in " not in place] == []
    assert "INSERT INTO control_plane.tenants" in loud.text
    assert CANARY not in loud.text


async def _insert_twice(manager: AsyncConnectionManager) -> None:
    async with manager.get_session() as session:
        for _ in range(2):
            session.add(Tenant(name="one", environment=TenantEnvironment.STAGING, status_reason=CANARY))


async def test_a_login_is_not_logged(cluster: Cluster, loud: pytest.LogCaptureFixture) -> None:
    loop = asyncio.get_running_loop()
    loop.set_debug(True)
    try:
        async with AsyncConnectionManager(cluster.dsn(cluster.primary)) as manager:
            await by_session(manager)
            await by_engine(manager)
    finally:
        loop.set_debug(False)
    assert "sqlalchemy.pool" in {record.name[:15] for record in loud.records}
    assert CANARY not in loud.text


async def test_a_forgotten_session_is_told_without_it(cluster: Cluster, loud: pytest.LogCaptureFixture) -> None:
    async with AsyncConnectionManager(cluster.dsn(cluster.primary)) as manager:

        async def forget() -> None:
            await manager.get_session_direct().connection()

        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            await forget()
            gc.collect()
            said = [str(warning.message) for warning in warned]
            warned.clear()
            gc.collect()
            said += [str(warning.message) for warning in warned]
    assert any("get_session_direct" in one for one in said)
    assert [one for one in said if CANARY in one] == []
    assert CANARY not in loud.text


# --- what a server can get out of a client ----------------------------------------------------------------------------


async def test_no_server_gets_a_password_without_the_certificate_it_was_told_to_show(
    certificates: Certificates,
) -> None:
    """Rogue servers ask for clear text. With `verify-full` none gets that far; without TLS each one does, so that is no setting for a network."""
    heard: list[bytes] = []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, tls: bool) -> None:
        first = await reader.read(1000)
        if first == SSL_REQUEST:
            writer.write(b"S" if tls else b"N")
            await writer.drain()
            if tls:
                await writer.start_tls(certificates.context())
            first = await reader.read(1000)
        if first:
            writer.write(b"R\x00\x00\x00\x08\x00\x00\x00\x03")
            heard.append(await reader.read(1000))
        writer.write(error_response("28P01", "thank you"))

    async def attempt(*, tls: bool, **options: str) -> list[bytes]:
        heard.clear()
        async with rogue(functools.partial(listen, tls=tls)) as port:
            dsn = Cluster.dsn(f"localhost:{port}", password=CANARY, **options)
            async with AsyncConnectionManager(dsn, connect_timeout_seconds=2) as manager:
                await failure_of(by_connection(manager))
        return [message for message in heard if CANARY.encode() in message]

    strict = {"sslmode": "verify-full", "sslrootcert": str(certificates.other_authority)}
    assert await attempt(tls=True, **strict) == []
    assert await attempt(tls=False, **strict) == []
    assert await attempt(tls=False, sslmode="require") == []
    assert await attempt(tls=True, sslmode="require")
    assert await attempt(tls=False, sslmode="prefer")


def test_the_environment_is_left_as_it_is() -> None:
    before = dict(os.environ)
    init_db(GOOD)
    assert dict(os.environ) == before
