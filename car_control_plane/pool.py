"""Physical connections to one database: `DirectPool`, one bounded set of asyncpg connections with two doors.

SQLAlchemy's door is an ordinary pool's: sessions, events, invalidation and recycling work as its users know them. The direct door gives a connection
straight to a coroutine, for single statements: no greenlet, no proxy objects, no reset round trip. Both share the connections, the limit, the queue
(first come, first served), the rules of life, and the figures.

What it hides is how a connection is known to be alive without asking. The event loop tells when a server hangs up, so a look at the connection is a
free ping. Only one that has been idle is asked, and may take a second to answer; one that is silent condemns its whole generation, because a
network that lost one connection without a word has lost the others of that age too. A statement that ran into the client's time limit does the same.

A pool belongs to the event loop that used it first. In a forked child it forgets its connections without touching them: they are the parent's.

Sources: `docs/adr/0023-one-pool-with-two-doors.md`; SQLAlchemy 2.1, `sqlalchemy.pool`, whose private names it uses are guarded by a test.
"""

import asyncio
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, Self, cast

import asyncpg
from sqlalchemy import event
from sqlalchemy.engine import Engine, ExceptionContext
from sqlalchemy.pool import ConnectionPoolEntry, Pool
from sqlalchemy.pool.base import _ConnectionRecord
from sqlalchemy.util.concurrency import await_, greenlet_spawn, in_greenlet

from car_control_plane.errors import ClosedError, PoolTimeoutError, WrongEventLoopError
from car_control_plane.telemetry import PoolStatus

__all__ = ["DirectPool", "PoolStatus", "recognise_lost_connections"]

CLOSE_SECONDS: Final = 2.0
"""How long the server may take over a connection's polite end before the connection is cut."""

_log = logging.getLogger("car_control_plane.pool")
_now = time.monotonic


class _Waiter(asyncio.Future[ConnectionPoolEntry | None]):
    """Waits for a connection; None stands for a place in which to open one."""

    since: float


@dataclass(frozen=True, slots=True)
class _Life:
    """Of a connection: how many times the pool had been condemned when it was opened, and when that was, by the monotonic clock.

    SQLAlchemy compares times of day, and a clock that is set back would make it replace every connection at every use.
    """

    generation: int
    born: float


class DirectPool(Pool):
    """A SQLAlchemy pool that also hands its asyncpg connections straight to coroutines.

    Made by `create_async_engine(..., poolclass=DirectPool)`. Every method may be cancelled at any point: a connection, or the place of one, is then
    with its next user or back in the pool.

    Args:
        creator: Opens a connection; SQLAlchemy's.
        pool_size: Connections kept open, at most.
        max_overflow: Connections beyond those, at most; closed when given back and not waited for.
        timeout: Seconds a caller waits for a connection.
        recycle: Seconds after which a connection is replaced when next used; -1 is never.
        ping_after: Seconds a connection may have been idle without being asked whether it is alive.
        ping_timeout: Seconds its answer may take.
        on_wait: Told the seconds that a caller who got a connection had waited for it.
        **options: Those of every SQLAlchemy pool.
    """

    _is_asyncio = True  # pyright: ignore[reportAssignmentType]  # as every asyncio pool of SQLAlchemy has it
    _sqla_logger_namespace = "sqlalchemy.pool.DirectPool"  # found where one looks for a pool's log

    def __init__(  # noqa: PLR0917 -- SQLAlchemy looks for the names among the positional ones
        self,
        creator: Any,
        pool_size: int = 5,
        max_overflow: int = 5,
        timeout: float = 5.0,
        recycle: float = -1,
        ping_after: float = 0.5,
        ping_timeout: float = 1.0,
        on_wait: Callable[[float], None] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(creator, **options)
        self._size = pool_size
        self._limit = pool_size + max_overflow
        self._timeout = timeout
        self._most_seconds = recycle if recycle >= 0 else float("inf")
        self._ping_after = ping_after
        self._ping_timeout = ping_timeout
        self._on_wait = on_wait
        self._closed = False
        self._generation = 0
        self._waited = self._connects = self._lost = self._pings = self._timeouts = 0
        self._foreign: frozenset[ConnectionPoolEntry] = frozenset()
        self._start_afresh()
        _pools.add(self)

    def _start_afresh(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0
        self._open = 0
        self._idle: deque[tuple[ConnectionPoolEntry, float]] = deque()
        self._lives: dict[ConnectionPoolEntry, _Life] = {}
        self._waiters: deque[_Waiter] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Task[None]] = set()

    # --- the direct door ----------------------------------------------------------------------------------------------

    async def acquire(self) -> ConnectionPoolEntry:
        """Take a connection that is alive, as far as can be known; give it back with `release`.

        Its `driver_connection` is asyncpg's. Nothing may be left behind on it: no transaction, no setting, no listener.

        Raises:
            PoolTimeoutError: None came free in time.
            ClosedError: The pool is closed.
            WrongEventLoopError: The pool belongs to another event loop.
            ControlPlaneError: A connection had to be opened and could not be; whatever the creator raises.
        """
        self._check()
        if self._idle:
            entry, since = self._idle.pop()
        elif self._open < self._limit:
            self._open += 1
            return await self._grown()
        elif (handed := await self._wait()) is None:
            return await self._grown()
        else:
            entry, since = handed, _now()
        if self._usable(entry) and _now() - since <= self._ping_after:
            return entry
        return await self._checked(entry)

    def release(self, entry: ConnectionPoolEntry) -> None:
        """Give a connection back; one that is closed is replaced when next needed. Never waits, and so cannot be cancelled."""
        if self._foreign and entry in self._foreign:
            return
        if not self._usable(entry):
            self._cut(entry)
        elif self._closed:
            self._end(entry)
        elif not self._hand_on(entry):
            if len(self._idle) < self._size:
                self._idle.append((entry, _now()))
            else:
                self._part_later(entry)

    async def fetch(self, sql: str, arguments: Sequence[Any]) -> list[asyncpg.Record]:
        """Run one statement, which is its own transaction, and return its rows.

        Raises:
            BaseException: Whatever asyncpg raises, or `acquire`. The connection is kept after an error of the server's or a bad argument; after
                anything else nobody knows what it is doing, and it is cut.
        """
        entry = await self.acquire()
        driver: Any = entry.dbapi_connection._connection  # type: ignore[union-attr]  # `driver_connection`, at a third of its cost
        try:
            return cast("list[asyncpg.Record]", await driver.fetch(sql, *arguments))
        except BaseException as problem:
            self.judge(entry, problem)
            raise
        finally:
            self.release(entry)

    @asynccontextmanager
    async def connection(self) -> AsyncGenerator[asyncpg.Connection]:
        """Lend an asyncpg connection; after an error that leaves its state unknown it is cut, as in `fetch`.

        Yields:
            The connection. Nothing may be left behind on it.
        """
        entry = await self.acquire()
        driver: Any = entry.driver_connection
        try:
            yield driver
        except BaseException as problem:
            self.judge(entry, problem)
            raise
        finally:
            self.release(entry)

    def judge(self, entry: ConnectionPoolEntry, problem: BaseException) -> None:
        """Cut a connection whose state nobody knows after this error; the client's time limit condemns the connections of its age."""
        if _harmless(problem):
            return
        driver: Any = entry.driver_connection
        if not driver.is_closed():
            driver.terminate()
        if isinstance(problem, TimeoutError):
            self._condemn_age(entry, "a statement was not answered in time")

    def condemn(self, why: str) -> None:
        """Drop every connection there is now: idle ones at once, those in use when they are given back."""
        self._generation += 1
        dropped = [entry for entry, _ in self._idle]
        self._idle.clear()
        for entry in dropped:
            self._cut(entry)
        _log.warning("connections given up: %s", why, extra={"event": "pool.condemned", "connections": len(dropped)})

    def _condemn_age(self, entry: ConnectionPoolEntry | None, why: str) -> None:
        """Drop the connections of the age of this one; unless they are dropped already, for then those there are now are younger."""
        life = self._lives.get(entry) if entry is not None else None
        if life is None or life.generation == self._generation:
            self.condemn(why)

    # --- SQLAlchemy's door: runs inside its greenlet ------------------------------------------------------------------

    def _do_get(self) -> ConnectionPoolEntry:
        self._check()
        if self._idle:  # without the switch of greenlets that waiting takes
            entry, since = self._idle[-1]
            if _now() - since <= self._ping_after and self._usable(entry):
                self._idle.pop()
                return entry
        return await_(self.acquire())

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        if self._foreign and record in self._foreign:
            return
        if self._loop is not None and self._thread != threading.get_ident():
            # The garbage collector has found a session nobody closed, in a thread that is not the loop's.
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self.release, record)
        elif (self._closed or len(self._idle) >= self._size) and in_greenlet() and self._usable(record):
            await_(self._part(record))
        else:
            self.release(record)

    def _invalidate(self, connection: Any, exception: BaseException | None = None, _checkin: bool = True) -> None:
        """Drop the generation of a connection that was found dead: what SQLAlchemy calls after an error that tells of more than this one."""
        self._condemn_age(getattr(connection, "_connection_record", None), "a statement found the server gone")
        if _checkin and getattr(connection, "is_valid", False):
            connection.invalidate(exception)

    def recreate(self) -> Self:
        """Make a pool like this one, without connections."""
        return type(self)(
            self._creator,
            pool_size=self._size,
            max_overflow=self._limit - self._size,
            timeout=self._timeout,
            recycle=self._most_seconds,
            ping_after=self._ping_after,
            ping_timeout=self._ping_timeout,
            on_wait=self._on_wait,
            echo=self.echo,
            logging_name=self._orig_logging_name,
            reset_on_return=self._reset_on_return,
            pre_ping=self._pre_ping,
            _dispatch=self.dispatch,
            dialect=self._dialect,
        )

    def dispose(self) -> None:
        """Close the pool, as `close` does; SQLAlchemy makes a new one in its place."""
        if in_greenlet():
            await_(self.close())
        else:
            self._closed = True
            self.condemn("the engine was disposed of outside of its event loop")

    def status(self) -> str:
        """Return the figures as text."""
        return repr(self.figures())

    # --- life ---------------------------------------------------------------------------------------------------------

    def figures(self) -> PoolStatus:
        """Return the figures; no I/O."""
        return PoolStatus(
            limit=self._limit,
            opened=self._open,
            in_use=self._open - len(self._idle),
            waiting=sum(not waiter.done() for waiter in list(self._waiters)),  # a copy: others ask from their threads
            waited=self._waited,
            connects=self._connects,
            lost=self._lost,
            pings=self._pings,
            timeouts=self._timeouts,
        )

    async def close(self) -> None:
        """Close every idle connection, and those in use when they are given back; whoever waits gets a ClosedError. Idempotent.

        Takes `CLOSE_SECONDS` at most.

        Raises:
            WrongEventLoopError: The pool belongs to another event loop, which still exists.
        """
        self.require_closable()
        self._closed = True
        if self._loop is not None and self._loop.is_closed():
            self._idle.clear()  # their sockets went with the loop
            self._open = 0
        while self._waiters:
            if not (waiter := self._waiters.popleft()).done():
                waiter.set_exception(ClosedError())
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        idle = [entry for entry, _ in self._idle]
        self._idle.clear()
        for entry in idle:
            self._part_later(entry)
        if self._closing:
            await asyncio.wait(list(self._closing))

    def require_closable(self) -> None:
        """Return when the pool can be closed from here.

        Raises:
            WrongEventLoopError: It belongs to another event loop, which still exists.
        """
        if self._loop is not None and self._loop is not asyncio.get_running_loop() and not self._loop.is_closed():
            raise WrongEventLoopError

    def forget(self) -> None:
        """Let go of everything without touching it: this process is a fork, and sockets and selector are its parent's."""
        self._foreign |= self._lives.keys()
        # Kept for good: a collected transport would close a socket, and a collected loop take its parent's out of the selector.
        _inherited.append((self._loop, self._idle, self._lives, self._waiters, self._timer, self._closing))
        self._start_afresh()

    def _check(self) -> None:
        if self._closed:
            raise ClosedError
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            if self._loop is not None:
                raise WrongEventLoopError
            self._loop, self._thread = loop, threading.get_ident()

    # --- one connection -----------------------------------------------------------------------------------------------

    async def _grown(self) -> ConnectionPoolEntry:
        """Open a connection in a place that is counted already."""
        return await greenlet_spawn(self._grow)

    def _grow(self) -> ConnectionPoolEntry:
        life = _Life(self._generation, _now())
        entry = _ConnectionRecord(self, connect=False)
        try:
            entry.get_connection()
        except BaseException:
            if entry.dbapi_connection is not None:  # it was there already: a listener failed, or was cancelled
                entry.dbapi_connection._connection.terminate()
            self._free()
            raise
        self._connects += 1
        self._lives[entry] = life
        return entry

    def _usable(self, entry: Any) -> bool:
        """Whether a connection is alive and of the right age: a ping that costs nothing, for the loop has told asyncpg when the server hung up."""
        connection = entry.dbapi_connection
        if connection is None or connection._connection.is_closed():
            return False
        life = self._lives.get(entry)
        return (
            life is not None
            and life.generation == self._generation
            and _now() - life.born <= self._most_seconds
            and entry._soft_invalidate_time <= entry.starttime
        )

    async def _checked(self, entry: ConnectionPoolEntry) -> ConnectionPoolEntry:
        """Return an idle connection that answers, or a new one in its place."""
        try:
            if self._usable(entry):
                if await self._answers(entry):
                    return entry
            else:
                await self._farewell(entry)
        except BaseException:
            self._end(entry)
            raise
        del self._lives[entry]
        entry.invalidate()
        return await self._grown()

    async def _answers(self, entry: ConnectionPoolEntry) -> bool:
        """Ask a connection that has been idle whether it is alive; if it keeps silent, all connections of its age are dropped."""
        self._pings += 1
        driver: Any = entry.driver_connection
        try:
            async with asyncio.timeout(self._ping_timeout):
                await driver.execute("SELECT 1")
        except TimeoutError:
            driver.terminate()
            self._lost += 1
            self._condemn_age(entry, "an idle connection does not answer")
            return False
        except Exception:
            driver.terminate()
            self._lost += 1
            return False
        return True

    def _cut(self, entry: ConnectionPoolEntry) -> None:
        """End a connection that is dead, condemned or too old without a word."""
        self._lost += 1
        self._end(entry)

    def _end(self, entry: ConnectionPoolEntry) -> None:
        """Cut a connection and free its place."""
        connection: Any = entry.dbapi_connection
        if connection is not None:
            connection._connection.terminate()
            if in_greenlet():  # SQLAlchemy would wait there
                self._loop.call_soon(entry.invalidate)  # type: ignore[union-attr]  # who has a connection has a loop
            else:
                entry.invalidate()
        if self._lives.pop(entry, None) is not None:
            self._free()

    async def _part(self, entry: ConnectionPoolEntry) -> None:
        """End a connection politely, and free its place."""
        try:
            await self._farewell(entry)
        finally:
            self._end(entry)

    async def _farewell(self, entry: ConnectionPoolEntry) -> None:
        driver: Any = entry.driver_connection
        if driver.is_closed():
            self._lost += 1
            return
        try:
            await driver.close(timeout=CLOSE_SECONDS)
        except Exception:
            driver.terminate()

    def _part_later(self, entry: ConnectionPoolEntry) -> None:
        task = asyncio.get_running_loop().create_task(self._part(entry))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    # --- waiting ------------------------------------------------------------------------------------------------------

    async def _wait(self) -> ConnectionPoolEntry | None:
        """Wait for the next connection to come back; None stands for a place in which to open one."""
        self._waited += 1
        loop = asyncio.get_running_loop()
        waiter = _Waiter(loop=loop)
        waiter.since = loop.time()
        self._waiters.append(waiter)
        if (
            self._timer is None
        ):  # one for the whole queue, whose head is the first to expire: one each costs a fifth at 64 callers
            self._timer = loop.call_at(waiter.since + self._timeout, self._expire, loop)
        try:
            handed = await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                # It was handed to us while we were being cancelled: hand it on.
                if (entry := waiter.result()) is not None:
                    self.release(entry)
                else:
                    self._free()
            raise
        if self._on_wait is not None:
            self._on_wait(loop.time() - waiter.since)
        return handed

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        last = loop.time() - self._timeout
        while self._waiters and (self._waiters[0].done() or self._waiters[0].since <= last):
            if not (waiter := self._waiters.popleft()).done():
                self._timeouts += 1
                limits = {"limit": self._limit, "waited_seconds": self._timeout}
                waiter.set_exception(PoolTimeoutError(details=limits))
        self._timer = None
        if self._waiters:
            self._timer = loop.call_at(self._waiters[0].since + self._timeout, self._expire, loop)

    def _free(self) -> None:
        """Give a place to whoever waits, or back."""
        if not self._hand_on(None):
            self._open -= 1

    def _hand_on(self, entry: ConnectionPoolEntry | None) -> bool:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(entry)
                return True
        return False


def _harmless(problem: BaseException) -> bool:
    """Whether a connection is fit for its next user after this error: the server's own ERROR leaves it so, and an argument asyncpg refused to send."""
    severity = getattr(problem, "severity_en", None)  # None: the error is asyncpg's own
    if isinstance(problem, asyncpg.PostgresError) and severity is not None:
        return bool(severity == "ERROR")
    return isinstance(problem, asyncpg.DataError)


# --- SQLAlchemy's errors ----------------------------------------------------------------------------------------------


def recognise_lost_connections(engine: Engine) -> None:
    """Teach an engine which errors mean that the connection is gone, and which that all of its age are.

    SQLAlchemy asks whether the socket is closed, and it may not be yet: a killed backend's FATAL comes before its end of file, and asyncpg in
    between says only that it "cannot switch to state". On the other hand it drops the whole pool when one connection is lost; we look at each.
    """
    event.listen(engine, "handle_error", _judge)


def _judge(context: ExceptionContext) -> None:
    problem: Any = context.original_exception
    cause = problem.__cause__ or problem
    if isinstance(problem, TimeoutError):
        context.is_disconnect = context.invalidate_pool_on_disconnect = True
        # SQLAlchemy does not wrap it, and only this tells it from a TimeoutError of the caller's own, and from one of a COMMIT.
        problem.connection_invalidated = True  # type: ignore[attr-defined]  # as SQLAlchemy marks its own
        problem.statement = context.statement  # type: ignore[attr-defined]  # as above
        return
    if isinstance(cause, asyncpg.InternalClientError) or (
        isinstance(cause, asyncpg.PostgresError) and not _harmless(cause)
    ):
        context.is_disconnect = True
    context.invalidate_pool_on_disconnect = False


# --- forks ------------------------------------------------------------------------------------------------------------

_pools: weakref.WeakSet[DirectPool] = weakref.WeakSet()
_inherited: list[Any] = []


def _forget() -> None:
    for pool in list(_pools):
        pool.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
