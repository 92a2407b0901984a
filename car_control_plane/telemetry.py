"""What can be seen from outside: metrics, and the names log records carry.

Metrics go to OpenTelemetry when its API is installed (extra `otel`), wherever the application sends them; without it nothing is imported and
nothing is measured. Their names are those of OpenTelemetry's conventions for database clients where there is one, and begin with
`car_control_plane.` where there is none. `METRICS` and `EVENTS` are the whole vocabulary: `docs/reference/telemetry.md` is written from them.

No attribute holds a value of a statement, a tenant, a user or a secret, and each has a bounded number of values: hosts and database are those of the
control plane's connection string, errors are SQLSTATEs or names of classes.

A `Telemetry` belongs to one manager. Its methods may be called from any thread, and add about half a microsecond to a call.

This module imports the standard library and the errors, and OpenTelemetry's API if it is there.

Source: OpenTelemetry semantic conventions 1.45, "Database client metrics" and "PostgreSQL".
"""

import functools
import logging
import os
import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Final, Literal

from car_control_plane.errors import ControlPlaneError

if TYPE_CHECKING:
    from opentelemetry.metrics import Histogram, Meter, Observation

__all__ = ["ACTIVITIES", "EVENTS", "METRICS", "Activity", "Event", "Metric", "PoolStatus", "Telemetry"]

_log = logging.getLogger("car_control_plane.telemetry")

Kind = Literal["histogram", "counter", "counter, observed", "up-down counter, observed"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: its name, how it counts, and what.

    Attributes:
        name: As it is exported.
        kind: The instrument.
        unit: In UCUM, as OpenTelemetry has units.
        text: What it counts.
        attributes: Names of the attributes it may have.
    """

    name: str
    kind: Kind
    unit: str
    text: str
    attributes: tuple[str, ...]


_SERVER: Final = ("db.system.name", "db.namespace", "server.address", "server.port")
_ERROR: Final = ("error.type", "db.response.status_code")
_POOL: Final = ("db.client.connection.pool.name",)

_STATEMENT: Final = Metric(
    "db.client.operation.duration",
    "histogram",
    "s",
    "Time of one statement at the direct door, the wait for a connection included; each attempt of its own. Statements of sessions are not counted here.",
    (*_SERVER, "db.operation.name", *_ERROR),
)
_CREATE: Final = Metric(
    "db.client.connection.create_time",
    "histogram",
    "s",
    "Time it took to open a connection: all hosts that were tried, and logging in.",
    (*_POOL, *_ERROR),
)
_WAIT: Final = Metric(
    "db.client.connection.wait_time",
    "histogram",
    "s",
    "Time until a connection came free, of calls that had to wait for one.",
    _POOL,
)
_COUNT: Final = Metric(
    "db.client.connection.count",
    "up-down counter, observed",
    "{connection}",
    "Connections of the pool, those being opened included.",
    (*_POOL, "db.client.connection.state"),
)
_MAX: Final = Metric(
    "db.client.connection.max", "up-down counter, observed", "{connection}", "Connections the pool may hold.", _POOL
)
_PENDING: Final = Metric(
    "db.client.connection.pending_requests",
    "up-down counter, observed",
    "{request}",
    "Calls that wait for a connection now.",
    _POOL,
)
_TIMEOUTS: Final = Metric(
    "db.client.connection.timeouts",
    "counter, observed",
    "{timeout}",
    "Calls for which no connection came free in time.",
    _POOL,
)
_WAITS: Final = Metric(
    "car_control_plane.connection.waits",
    "counter, observed",
    "{request}",
    "Calls that had to wait for a connection.",
    _POOL,
)
_OPENED: Final = Metric(
    "car_control_plane.connection.opened", "counter, observed", "{connection}", "Connections the pool opened.", _POOL
)
_LOST: Final = Metric(
    "car_control_plane.connection.lost",
    "counter, observed",
    "{connection}",
    "Connections that were found dead, or were cut because nobody knew what they were doing.",
    _POOL,
)
_PINGS: Final = Metric(
    "car_control_plane.connection.pings",
    "counter, observed",
    "{ping}",
    "Idle connections that were asked whether they are alive.",
    _POOL,
)
_SESSION: Final = Metric(
    "car_control_plane.session.duration",
    "histogram",
    "s",
    "Time from the beginning of a session's block to its end, commit or rollback included.",
    (*_SERVER, "car_control_plane.session.kind", *_ERROR),
)
_UNIT: Final = Metric(
    "car_control_plane.unit.duration",
    "histogram",
    "s",
    "Time of a unit of work, with all its repetitions.",
    (*_SERVER, *_ERROR),
)
_REPEATS: Final = Metric(
    "car_control_plane.repeats",
    "counter",
    "{repeat}",
    "Reads and units of work that were run again, by what had gone wrong.",
    (*_SERVER, "car_control_plane.repeat.of", *_ERROR),
)

METRICS: Final = (
    *(_STATEMENT, _SESSION, _UNIT, _REPEATS, _COUNT, _MAX, _PENDING, _TIMEOUTS, _CREATE, _WAIT),
    *(_WAITS, _OPENED, _LOST, _PINGS),
)
"""Every metric there is."""

_SECONDS: Final = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)
"""Where histograms are cut: the conventions' bounds, and two below them, for a statement may take less than a millisecond."""


@dataclass(frozen=True, slots=True)
class Event:
    """One kind of log record.

    Attributes:
        name: The record's `event`; stays what it is from release to release.
        logger: Name of the logger.
        level: DEBUG, INFO or WARNING.
        keys: Further attributes of the record.
        text: When it is written.
    """

    name: str
    logger: str
    level: Literal["DEBUG", "INFO", "WARNING"]
    keys: tuple[str, ...]
    text: str


_SECRET_KEYS: Final = ("database_id", "tenant_id", "purpose", "kid", "role", "actor")

EVENTS: Final = (
    Event(
        "telemetry.unavailable",
        "car_control_plane.telemetry",
        "WARNING",
        ("error",),
        "OpenTelemetry is installed and cannot be set up; there are no metrics.",
    ),
    Event(
        "connection.opened",
        "car_control_plane.connection",
        "DEBUG",
        ("host", "port", "activity", "seconds"),
        "A connection was opened, in the pool or outside.",
    ),
    Event(
        "connection.host_skipped",
        "car_control_plane.connection",
        "INFO",
        ("host", "port", "error"),
        "One of several hosts does not accept a connection, or has not the role that is asked for; the next one is tried.",
    ),
    Event(
        "statement.repeated",
        "car_control_plane.connection",
        "INFO",
        ("attempt", "error"),
        "A read lost its connection and is run again on another one.",
    ),
    Event(
        "unit.repeated",
        "car_control_plane.units",
        "INFO",
        ("operation_id", "error"),
        "A unit of work is run again as a whole.",
    ),
    Event(
        "pool.condemned",
        "car_control_plane.pool",
        "WARNING",
        ("connections",),
        "A connection was silent: the idle ones of its age, so many, were dropped.",
    ),
    Event(
        "secret.opened",
        "car_control_plane.secrets",
        "INFO",
        _SECRET_KEYS,
        "Somebody opened a tenant's connection string.",
    ),
    Event(
        "secret.refused",
        "car_control_plane.secrets",
        "WARNING",
        (*_SECRET_KEYS, "error"),
        "Somebody was to get a tenant's connection string, and it cannot be opened.",
    ),
    Event(
        "keys.unconfirmed",
        "car_control_plane.encryption",
        "WARNING",
        ("provider", "error"),
        "The source of keys does not answer; those that are known are used for a while.",
    ),
    Event("keys.confirmed", "car_control_plane.encryption", "INFO", ("provider",), "It answers again."),
    Event(
        "rotation.repeated",
        "car_control_plane.rotation",
        "WARNING",
        ("error",),
        "A batch of a rotation failed and is tried again.",
    ),
)
"""Every kind of log record there is."""


Activity = Literal["app", "read", "listen", "migrate", "rotate", "keys", "doctor"]
"""What a connection is for."""

ACTIVITIES: Final[Mapping[Activity, str]] = {
    "app": "The pool: sessions and single statements; and connections taken by `connect()`.",
    "read": "Reads that go to a replica.",
    "listen": "Waiting for notifications.",
    "migrate": "Migrations and checks of the schema.",
    "rotate": "Changing the key of stored connection strings.",
    "keys": "Reading wrapped keys.",
    "doctor": "`car-cp doctor`.",
}
"""How `pg_stat_activity` names them."""


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """How many connections the pool may hold, holds, and has handed out; and what has happened since it was made.

    Attributes:
        limit: Connections at most.
        opened: Connections there are, those being opened included.
        in_use: Of these, how many are handed out or being opened.
        waiting: Callers that wait for one now.
        waited: Calls that had to wait.
        connects: Connections that were opened.
        lost: Connections that were found dead, or were cut because nobody knows what they are doing.
        pings: Idle connections that were asked whether they are alive.
        timeouts: Calls for which none came free in time.
    """

    limit: int
    opened: int
    in_use: int
    waiting: int = field(default=0, compare=False)
    waited: int = field(default=0, compare=False)
    connects: int = field(default=0, compare=False)
    lost: int = field(default=0, compare=False)
    pings: int = field(default=0, compare=False)
    timeouts: int = field(default=0, compare=False)

    @property
    def idle(self) -> int:
        """Connections that wait for a caller."""
        return self.opened - self.in_use


Attributes = Mapping[str, str | int]


class Telemetry:
    """Measures what one manager does.

    Args:
        hosts: Name and port of each host the connections go to; the port is 0 where there is none.
        database: Its name, if it is known.
    """

    def __init__(self, hosts: Sequence[tuple[str, int]], database: str | None) -> None:
        places = ",".join(f"{host}:{port}" if port else host for host, port in hosts)
        self.pool_name = f"{places}/{database}" if database else places
        server: dict[str, str | int] = {"db.system.name": "postgresql"}
        if database:
            server["db.namespace"] = database
        if len(hosts) == 1:
            server["server.address"] = hosts[0][0]
            if hosts[0][1] not in {0, _DEFAULT_PORT}:
                server["server.port"] = hosts[0][1]
        self._pool: Attributes = {"db.client.connection.pool.name": self.pool_name}
        self._server: Attributes = server
        self._statements: dict[str, Attributes] = {
            verb: {**server, "db.operation.name": verb} for verb in ("SELECT", "INSERT", "UPDATE", "DELETE")
        }
        self._sessions = {kind: {**server, "car_control_plane.session.kind": kind} for kind in ("read", "write")}
        self._figures: Callable[[], PoolStatus] | None = None

    def watch(self, figures: Callable[[], PoolStatus]) -> None:
        """Report a pool's figures until `close`; whoever collects metrics asks for them, from a thread of its own."""
        if _instruments() is not None:
            self._figures = figures
            _watched[id(self)] = weakref.ref(self, functools.partial(_forget, id(self)))

    def close(self) -> None:
        """Report the pool no more; what it has counted stays counted. Idempotent."""
        with _lock:
            if _watched.pop(id(self), None) is not None and self._figures is not None:
                figures = self._figures()
                _past[self.pool_name].update({key: getattr(figures, key) for key in _COUNTS.values()})

    def statement(self, sql: str) -> AbstractContextManager[None]:
        """Measure a statement of the direct door."""
        if (instruments := _instruments()) is None:
            return _NOTHING
        return _Timing(instruments.statement, self._statements.get(sql[:6], self._server))

    def session(self, kind: Literal["read", "write"]) -> AbstractContextManager[None]:
        """Measure the block of a session."""
        if (instruments := _instruments()) is None:
            return _NOTHING
        return _Timing(instruments.session, self._sessions[kind])

    def unit(self) -> AbstractContextManager[None]:
        """Measure a unit of work, with all its repetitions."""
        if (instruments := _instruments()) is None:
            return _NOTHING
        return _Timing(instruments.unit, self._server)

    def connecting(self) -> AbstractContextManager[None]:
        """Measure the opening of a connection."""
        if (instruments := _instruments()) is None:
            return _NOTHING
        return _Timing(instruments.create, self._pool)

    def waited(self, seconds: float) -> None:
        """Count a call that got a connection after waiting for it."""
        if (instruments := _instruments()) is not None:
            instruments.wait.record(seconds, self._pool)

    def repeated(self, what: Literal["read", "unit"], problem: BaseException) -> None:
        """Count that something is run again after an error."""
        if (instruments := _instruments()) is not None:
            instruments.repeats.add(1, {**self._server, "car_control_plane.repeat.of": what, **_failure(problem)})


_DEFAULT_PORT: Final = 5432
_NOTHING: Final[AbstractContextManager[None]] = nullcontext()


class _Timing:
    """Records how long its block takes, and which error ends it."""

    __slots__ = ("_attributes", "_histogram", "_started")

    def __init__(self, histogram: "Histogram", attributes: Attributes) -> None:
        self._histogram = histogram
        self._attributes = attributes

    def __enter__(self) -> None:
        self._started = perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = perf_counter() - self._started
        attributes = self._attributes if problem is None else {**self._attributes, **_failure(problem)}
        self._histogram.record(seconds, attributes)


def _failure(problem: BaseException) -> Attributes:
    """Name an error by its SQLSTATE or its class, never by what it says. Only our errors and asyncpg's are asked: others may answer anything."""
    state: object = None
    if isinstance(problem, ControlPlaneError):
        state = problem.details.get("sqlstate")
    elif type(problem).__module__.startswith("asyncpg."):
        state = getattr(problem, "sqlstate", None)
    if isinstance(state, str):
        return {"error.type": state, "db.response.status_code": state}
    return {"error.type": type(problem).__qualname__}


# --- the instruments, one set for the process -------------------------------------------------------------------------


class _Instruments:
    def __init__(self, meter: "Meter") -> None:
        self._meter = meter
        self.statement = self._histogram(_STATEMENT)
        self.session = self._histogram(_SESSION)
        self.unit = self._histogram(_UNIT)
        self.create = self._histogram(_CREATE)
        self.wait = self._histogram(_WAIT)
        self.repeats = meter.create_counter(_REPEATS.name, unit=_REPEATS.unit, description=_REPEATS.text)
        for metric in _STATES:
            watch = functools.partial(_observe_states, metric)
            meter.create_observable_up_down_counter(metric.name, [watch], unit=metric.unit, description=metric.text)
        for metric in _COUNTS:
            watch = functools.partial(_observe_counts, metric)
            meter.create_observable_counter(metric.name, [watch], unit=metric.unit, description=metric.text)

    def _histogram(self, metric: Metric) -> "Histogram":
        return self._meter.create_histogram(
            metric.name,
            unit=metric.unit,
            description=metric.text,
            explicit_bucket_boundaries_advisory=_SECONDS,
        )


@functools.cache
def _instruments() -> _Instruments | None:
    """Make the instruments, if OpenTelemetry's API is installed. They do nothing until the application sets up its SDK, before or after."""
    try:
        from opentelemetry import metrics  # noqa: PLC0415 -- an extra; and only who connects pays for it

        return _Instruments(metrics.get_meter("car_control_plane"))
    except ImportError:
        return None
    except Exception as problem:  # its settings may name what is not there; nobody's work must fail for that
        facts = {"event": "telemetry.unavailable", "error": type(problem).__qualname__}
        _log.warning("nothing is measured: OpenTelemetry cannot be set up", extra=facts)
        return None


# --- what is observed when somebody asks ------------------------------------------------------------------------------

_STATES: Final[Mapping[Metric, Mapping[str, Callable[[PoolStatus], int]]]] = {
    _COUNT: {"idle": lambda figures: figures.idle, "used": lambda figures: figures.in_use},
    _MAX: {"": lambda figures: figures.limit},
    _PENDING: {"": lambda figures: figures.waiting},
}
_COUNTS: Final[Mapping[Metric, str]] = {
    _TIMEOUTS: "timeouts",
    _WAITS: "waited",
    _OPENED: "connects",
    _LOST: "lost",
    _PINGS: "pings",
}

_watched: "dict[int, weakref.ref[Telemetry]]" = {}
_past: defaultdict[str, Counter[str]] = defaultdict(Counter)
"""By name of the pool: what those that are closed have counted. A counter must not fall."""
_lock = threading.Lock()
"""Between a pool that is closed and whoever collects: it must be counted once."""


def _forget(key: int, _: object) -> None:
    _watched.pop(key, None)


def _now() -> list[tuple[str, PoolStatus]]:
    """Return the figures of every pool there is, with its name. Several may have the same one: they are told as one."""
    telemetries = [reference() for reference in list(_watched.values())]
    return [(one.pool_name, one._figures()) for one in telemetries if one is not None and one._figures is not None]


def _observe_states(metric: Metric, _options: object) -> "Iterator[Observation]":
    totals: Counter[tuple[str, str]] = Counter()
    for name, figures in _now():
        for state, read in _STATES[metric].items():
            totals[name, state] += read(figures)
    return (_observation(count, name, state) for (name, state), count in totals.items())


def _observe_counts(metric: Metric, _options: object) -> "Iterator[Observation]":
    key = _COUNTS[metric]
    with _lock:
        totals = Counter({name: counts[key] for name, counts in _past.items()})
        for name, figures in _now():
            totals[name] += getattr(figures, key)
    return (_observation(count, name) for name, count in totals.items())


def _observation(count: int, pool: str, state: str = "") -> "Observation":
    from opentelemetry.metrics import Observation  # noqa: PLC0415 -- who asks has it

    attributes = {"db.client.connection.pool.name": pool}
    return Observation(count, {**attributes, "db.client.connection.state": state} if state else attributes)


def _renew_lock() -> None:
    global _lock  # noqa: PLW0603 -- another thread of the parent may have held it when this process was forked
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)
