"""What operators see: metrics by the real OpenTelemetry SDK, log records, and the names of connections."""

import asyncio
import dataclasses
import logging
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, get_args

import pytest
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, NumberDataPoint
from sqlmodel import select

from car_control_plane import AsyncConnectionManager, Tenant, TenantRepository, dsn as dsns
from car_control_plane.errors import (
    AlreadyExistsError,
    ConnectionUnavailableError,
    InvalidDataError,
    PoolTimeoutError,
    TenantNotFoundError,
)
from car_control_plane.migrations import check
from car_control_plane.models import TenantCreate, TenantEnvironment, uuid7
from car_control_plane.telemetry import ACTIVITIES, EVENTS, METRICS, Activity, Telemetry
from tests.quality.programs import ROOT

PID = "SELECT pg_backend_pid()"
ABSENT = "import sys; sys.modules['opentelemetry'] = None\n"

Attributes = Mapping[str, Any]


@pytest.fixture(scope="session")
def reader() -> InMemoryMetricReader:
    """Set up the SDK for this process; nobody can take it away again."""
    Telemetry([], None).watch(lambda: pytest.fail("watched for nothing"))  # the instruments are there before the SDK is
    reader = InMemoryMetricReader()
    metrics.set_meter_provider(MeterProvider([reader], shutdown_on_exit=False))
    return reader


class Seen:
    """The metrics about one database."""

    def __init__(self, reader: InMemoryMetricReader, dsn: str) -> None:
        self._reader = reader
        self.dsn = dsn
        self.database = dsns.parse(dsn).database or ""

    def points(self, name: str) -> dict[frozenset[tuple[str, Any]], Any]:
        """Return what a metric holds now: how often for a histogram, otherwise its value, by what its attributes say beyond the database."""
        data = self._reader.get_metrics_data()
        found = {}
        for metric in data.resource_metrics[0].scope_metrics[0].metrics if data else ():
            for point in metric.data.data_points if metric.name == name else ():
                if (told := self.told(point.attributes or {})) is not None:
                    found[frozenset(told.items())] = point.value if isinstance(point, NumberDataPoint) else point.count
        return found

    def told(self, attributes: Attributes) -> Attributes | None:
        known = {"db.system.name", "db.namespace", "server.address", "server.port", "db.client.connection.pool.name"}
        ours = attributes.get("db.namespace") == self.database
        ours |= str(attributes.get("db.client.connection.pool.name")).endswith(f"/{self.database}")
        return {key: value for key, value in attributes.items() if key not in known} if ours else None

    def value(self, name: str, **attributes: Any) -> Any:
        wanted = {key.replace("__", "."): value for key, value in attributes.items()}
        return self.points(name).get(frozenset(wanted.items()))

    def everything(self) -> str:
        data = self._reader.get_metrics_data()
        return data.to_json() if data else ""


@pytest.fixture
def seen(reader: InMemoryMetricReader, own_database: str) -> Seen:
    return Seen(reader, own_database)


@pytest.fixture
async def make(own_database: str) -> AsyncIterator[Callable[..., AsyncConnectionManager]]:
    managers: list[AsyncConnectionManager] = []

    def make(**settings: Any) -> AsyncConnectionManager:
        managers.append(AsyncConnectionManager(own_database, **settings))
        return managers[-1]

    yield make
    for manager in managers:
        await manager.close()


Make = Callable[..., AsyncConnectionManager]


# --- statements and sessions ------------------------------------------------------------------------------------------


async def test_a_statement_is_timed_with_what_it_is_and_how_it_ended(make: Make, seen: Seen) -> None:
    manager = make()
    for _ in range(3):
        await manager.fetch("SELECT 1", [], repeat=True)
    await manager.fetch("VALUES (1)", [], repeat=True)
    with pytest.raises(InvalidDataError):
        await manager.fetch("SELECT $1::int / 0", [1], repeat=True)
    assert seen.points("db.client.operation.duration") == {
        frozenset({("db.operation.name", "SELECT")}): 3,
        frozenset(): 1,
        frozenset({("db.operation.name", "SELECT"), ("error.type", "22012"), ("db.response.status_code", "22012")}): 1,
    }


async def test_sessions_are_timed_by_kind_and_by_the_error_that_ended_them(make: Make, seen: Seen) -> None:
    manager = make()
    tenant = TenantCreate(name="one", environment=TenantEnvironment.STAGING)
    for _ in range(2):
        async with manager.get_read_session() as session:
            await session.exec(select(Tenant.name))
    async with manager.get_session() as writing:
        await TenantRepository(writing).create(tenant)
    with pytest.raises(AlreadyExistsError):
        async with manager.get_session() as writing:
            await TenantRepository(writing).create(tenant)
    with pytest.raises(TenantNotFoundError):
        async with manager.get_read_session() as session:
            await TenantRepository(session).get(uuid7())

    async def long() -> None:
        async with manager.get_session() as session:
            await session.connection()
            await asyncio.sleep(60)

    task = asyncio.create_task(long())
    async with asyncio.timeout(60):
        while not manager.pool_status().in_use:  # noqa: ASYNC110 -- until it is in the block
            await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    kind = "car_control_plane.session.kind"
    assert seen.points("car_control_plane.session.duration") == {
        frozenset({(kind, "read")}): 2,
        frozenset({(kind, "write")}): 1,
        frozenset({(kind, "write"), ("error.type", "AlreadyExistsError")}): 1,
        frozenset({(kind, "read"), ("error.type", "TenantNotFoundError")}): 1,
        frozenset({(kind, "write"), ("error.type", "CancelledError")}): 1,
    }


class OddError(Exception):
    """An error of the caller's that answers to names it does not know what they mean."""

    details = staticmethod(lambda: {"sqlstate": "secret"})
    sqlstate = property(lambda self: 1 / 0)


@pytest.mark.parametrize("problem", [OddError("secret"), KeyboardInterrupt(), ExceptionGroup("secret", [OddError()])])
def test_a_callers_error_passes_unchanged(reader: InMemoryMetricReader, problem: BaseException) -> None:
    database = f"nowhere {type(problem).__qualname__}"
    telemetry = Telemetry([], database)
    with pytest.raises(type(problem)) as raised, telemetry.session("read"):
        raise problem
    assert raised.value is problem
    seen = Seen(reader, f"dbname='{database}'")
    (told,) = seen.points("car_control_plane.session.duration")
    assert dict(told)["error.type"] == type(problem).__qualname__


# --- the pool ---------------------------------------------------------------------------------------------------------


def state(seen: Seen) -> tuple[Any, Any, Any, Any]:
    name = "db.client.connection.count"
    return (
        seen.value(name, db__client__connection__state="idle"),
        seen.value(name, db__client__connection__state="used"),
        seen.value("db.client.connection.max"),
        seen.value("db.client.connection.pending_requests"),
    )


async def test_the_pools_figures_are_there_when_somebody_asks(make: Make, seen: Seen) -> None:
    manager = make(pool_size=2, max_overflow=1, pool_timeout_seconds=60)
    assert state(seen) == (None, None, None, None)
    async with manager.engine.connect(), manager.engine.connect():
        assert state(seen) == (0, 2, 3, 0)
        async with manager.engine.connect():
            waiting = asyncio.create_task(manager.fetch("SELECT 1", [], repeat=True))
            async with asyncio.timeout(60):
                while not manager.pool_status().waiting:  # noqa: ASYNC110 -- until it waits
                    await asyncio.sleep(0.001)
            assert state(seen) == (0, 3, 3, 1)
        await waiting
    assert state(seen) == (2, 0, 3, 0)
    assert seen.value("car_control_plane.connection.waits") == 1
    assert seen.value("car_control_plane.connection.opened") == 3
    assert seen.value("db.client.connection.wait_time") == 1
    assert seen.value("db.client.connection.create_time") == 3
    assert seen.value("db.client.connection.timeouts") == 0
    assert seen.value("car_control_plane.connection.pings") == 0


async def test_a_call_that_waits_in_vain_is_counted(make: Make, seen: Seen) -> None:
    manager = make(pool_size=1, max_overflow=0, pool_timeout_seconds=0.05)
    async with manager.engine.connect():
        with pytest.raises(PoolTimeoutError):
            await manager.fetch("SELECT 1", [], repeat=True)
    assert seen.value("db.client.connection.timeouts") == 1
    assert seen.value("car_control_plane.connection.waits") == 1
    assert seen.value("db.client.connection.wait_time") is None


async def test_a_lost_connection_and_what_is_repeated_are_counted(
    make: Make, seen: Seen, caplog: pytest.LogCaptureFixture
) -> None:
    manager = make(read_retry_seconds=2)
    suicide = "SELECT pg_terminate_backend(pg_backend_pid())"
    with caplog.at_level(logging.INFO, "car_control_plane"), pytest.raises(ConnectionUnavailableError):
        await manager.fetch(suicide, [], repeat=True)
    repeats = seen.value(
        "car_control_plane.repeats", car_control_plane__repeat__of="read", error__type="ConnectionUnavailableError"
    ) or seen.points("car_control_plane.repeats")
    records = [record.__dict__ for record in caplog.records if record.name == "car_control_plane.connection"]
    assert [record["attempt"] for record in records] == [*range(2, len(records) + 2)]
    assert {record["event"] for record in records} == {"statement.repeated"}
    assert {record["error"] for record in records} == {"connection-unavailable"}
    total = sum(repeats.values()) if isinstance(repeats, dict) else repeats
    assert total == len(records) >= 1
    assert seen.value("car_control_plane.connection.lost") == len(records) + 1


async def test_what_was_counted_stays_counted_and_managers_of_one_database_add_up(make: Make, seen: Seen) -> None:
    opened, limit = "car_control_plane.connection.opened", "db.client.connection.max"
    first, second = make(pool_size=1, max_overflow=0), make(pool_size=2, max_overflow=0)
    for manager in (first, second):
        await manager.fetch("SELECT 1", [], repeat=True)
    assert (seen.value(opened), seen.value(limit)) == (2, 3)
    await first.close()
    await first.close()
    assert (seen.value(opened), seen.value(limit)) == (2, 2)
    await second.close()
    assert (seen.value(opened), seen.value(limit)) == (2, None)
    await make().fetch("SELECT 1", [], repeat=True)
    assert seen.value(opened) == 3


async def test_figures_can_be_asked_for_from_another_thread(
    make: Make, seen: Seen, caplog: pytest.LogCaptureFixture
) -> None:
    manager = make(pool_size=1, max_overflow=1, pool_timeout_seconds=60)
    over = threading.Event()
    rounds = 0

    def ask() -> None:
        nonlocal rounds
        while not over.is_set() or not rounds:
            seen.points("db.client.connection.pending_requests")
            rounds += 1

    asking = asyncio.create_task(asyncio.to_thread(ask))
    try:
        for _ in range(20):
            await asyncio.gather(*(manager.fetch("SELECT 1", [], repeat=True) for _ in range(50)))
    finally:
        over.set()
        await asking
    assert rounds
    assert [record for record in caplog.records if record.name.startswith("opentelemetry")] == []


# --- what is in it ----------------------------------------------------------------------------------------------------


async def test_nothing_told_is_anybodys_secret_and_all_is_documented(
    reader: InMemoryMetricReader, own_database: str
) -> None:
    seen = Seen(reader, own_database)
    async with AsyncConnectionManager(own_database, pool_size=1, max_overflow=0, read_retry_seconds=0.1) as manager:
        async with manager.get_session() as session:
            await TenantRepository(session).create(
                TenantCreate(name="zebra-4711", environment=TenantEnvironment.STAGING)
            )
        await manager.fetch("SELECT name FROM control_plane.tenants WHERE name = $1", ["zebra-4711"], repeat=True)
        with pytest.raises(ConnectionUnavailableError):
            await manager.fetch("SELECT pg_terminate_backend(pg_backend_pid())", [], repeat=True)
        data = reader.get_metrics_data()
        assert data is not None
        text = data.to_json()
    assert "zebra" not in text
    assert "tenants" not in text
    known = {metric.name: metric for metric in METRICS}
    told = {}
    for metric in data.resource_metrics[0].scope_metrics[0].metrics:
        keys = {key for point in metric.data.data_points for key in point.attributes or {}}
        assert keys <= {*known[metric.name].attributes}, metric.name
        assert (metric.unit, metric.description) == (known[metric.name].unit, known[metric.name].text)
        told[metric.name] = keys
    assert {name for name in told if name.startswith("db.client.connection")} >= {"db.client.connection.count"}
    assert seen.database in text


@pytest.mark.parametrize(
    ("hosts", "database", "pool", "server"),
    [
        ([("db.example", 5432)], "cp", "db.example:5432/cp", {"db.namespace": "cp", "server.address": "db.example"}),
        ([("a", 1), ("b", 2)], "cp", "a:1,b:2/cp", {"db.namespace": "cp"}),
        ([("/run/pg", 6000)], None, "/run/pg:6000", {"server.address": "/run/pg", "server.port": 6000}),
        ([("embedded:", 0)], "cp", "embedded:/cp", {"db.namespace": "cp", "server.address": "embedded:"}),
    ],
)
def test_how_a_pool_and_its_server_are_named(
    hosts: list[tuple[str, int]], database: str | None, pool: str, server: dict[str, Any]
) -> None:
    telemetry = Telemetry(hosts, database)
    assert telemetry.pool_name == pool
    assert telemetry._server == {"db.system.name": "postgresql", **server}


def test_nobody_who_logs_in_is_named() -> None:
    manager = AsyncConnectionManager("postgresql://me:secret@db.example:6432/cp?sslpassword=secret")
    assert manager.telemetry.pool_name == "db.example:6432/cp"
    assert manager.telemetry._server == {
        "db.system.name": "postgresql",
        "db.namespace": "cp",
        "server.address": "db.example",
        "server.port": 6432,
    }


def test_names_are_those_of_the_conventions() -> None:
    from opentelemetry.semconv._incubating.attributes import db_attributes as developing
    from opentelemetry.semconv._incubating.metrics import db_metrics as pools
    from opentelemetry.semconv.attributes import db_attributes, error_attributes, server_attributes
    from opentelemetry.semconv.metrics import db_metrics

    given = {metric.name for metric in METRICS if metric.name.startswith("db.")}
    assert given <= {getattr(module, name) for module in (db_metrics, pools) for name in vars(module) if name.isupper()}
    modules = (db_attributes, developing, error_attributes, server_attributes)
    known = {getattr(module, name) for module in modules for name in vars(module) if name.isupper()}
    attributes = {key for metric in METRICS for key in metric.attributes}
    assert {key for key in attributes if not key.startswith("car_control_plane.")} <= known


# --- without OpenTelemetry, or with a broken one ----------------------------------------------------------------------

PROGRAM = """
import asyncio, logging, sys
from car_control_plane import AsyncConnectionManager
logging.basicConfig(format="%(levelname)s %(event)s %(error)s", level=logging.WARNING)
async def main():
    async with AsyncConnectionManager(sys.argv[1], pool_size=1, max_overflow=0) as manager:
        async with manager.get_session() as session:
            await session.connection()
            waiting = asyncio.create_task(manager.fetch("SELECT 7", [], repeat=True))
            await asyncio.sleep(0.01)
        print((await waiting)[0][0], manager.pool_status())
    print(sorted(name for name in sys.modules if name.startswith("opentelemetry.") and sys.modules[name]))
asyncio.run(main())
"""


def run(program: str, dsn: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program, dsn],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


async def test_without_opentelemetry_everything_works(own_database: str) -> None:
    done = await asyncio.to_thread(run, ABSENT + PROGRAM, own_database)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0].startswith("7 PoolStatus(limit=1, opened=1, in_use=0")
    assert done.stdout.splitlines()[1] == "[]"


async def test_an_opentelemetry_that_cannot_be_set_up_stops_nobody(own_database: str) -> None:
    done = await asyncio.to_thread(run, PROGRAM, own_database, OTEL_PYTHON_METER_PROVIDER="none there")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("7 ")
    assert "WARNING telemetry.unavailable" in done.stderr


# --- names of connections ---------------------------------------------------------------------------------------------

SHOW = "SHOW application_name"


async def test_a_connection_says_what_it_is_for_and_in_which_process(make: Make) -> None:
    manager = make()
    assert (await manager.fetch(SHOW, [], repeat=True))[0][0] == f"car-control-plane/app/{os.getpid()}"
    for activity in get_args(Activity):
        connection = await manager.connect(activity=activity)
        assert await connection.fetchval(SHOW) == f"car-control-plane/{activity}/{os.getpid()}"
        await connection.close()
    engine = manager.create_engine(activity="migrate")
    async with engine.connect() as connected:
        assert (await connected.exec_driver_sql(SHOW)).scalar() == f"car-control-plane/migrate/{os.getpid()}"
    await engine.dispose()
    assert get_args(Activity) == tuple(ACTIVITIES)


async def test_a_long_name_leaves_room_for_what_follows(make: Make) -> None:
    manager = make(application_name="x" * 63)
    (row,) = await manager.fetch(SHOW, [], repeat=True)
    assert len(row[0]) == 63
    assert row[0].startswith("xxxx")
    assert row[0].endswith(f"x/app/{os.getpid()}")


async def test_a_name_in_the_connection_string_is_taken_as_it_is(own_database: str) -> None:
    named = f"{own_database}{'&' if '?' in own_database else '?'}application_name=theirs"
    async with AsyncConnectionManager(named, application_name="ours") as manager:
        connection = await manager.connect(activity="migrate")
        assert await connection.fetchval(SHOW) == "theirs"
        await connection.close()


async def test_migrations_have_their_own_name(own_database: str, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "car_control_plane.connection"):
        await check(own_database)
    opened = [record.__dict__ for record in caplog.records if record.__dict__.get("event") == "connection.opened"]
    assert opened
    assert {record["activity"] for record in opened} == {"migrate"}


# --- log records ------------------------------------------------------------------------------------------------------


async def test_hosts_that_are_passed_over_are_told(own_database: str, caplog: pytest.LogCaptureFixture) -> None:
    parsed = dsns.parse(own_database)
    dead = dsns.Host("/nowhere", 5432)
    several = dataclasses.replace(parsed, hosts=(dead, *parsed.hosts)).reveal()
    async with AsyncConnectionManager(several) as manager:
        with caplog.at_level(logging.DEBUG, "car_control_plane.connection"):
            await manager.fetch("SELECT 1", [], repeat=True)
    known = {event.name: event for event in EVENTS}
    records = [record.__dict__ for record in caplog.records if record.name == "car_control_plane.connection"]
    assert [record["event"] for record in records] == ["connection.host_skipped", "connection.opened"]
    assert [record["host"] for record in records] == ["/nowhere", parsed.hosts[0].name]
    for record in records:
        assert {*known[record["event"]].keys} <= record.keys()
        assert record["levelname"] == known[record["event"]].level
