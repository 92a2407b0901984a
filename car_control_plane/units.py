"""Units of work: run as a whole, repeated as a whole, and a lost COMMIT decided.

A unit is a function of a session. Its transaction also stores the id of the operation, in a unique column, so that the id is there exactly if the
work is. When the connection breaks between COMMIT and its answer, the next attempt stores the id first: PostgreSQL makes it wait for a former
attempt that is still half alive, and refuses it when that one was committed. Nothing else is a safe way to know: after a crash the server hands
out transaction ids again, and `pg_xact_status()` then speaks of somebody else's transaction.

This module knows when to repeat and when not to. How a session is opened, closed and translated is its caller's.

Sources: `docs/adr/0019-units-of-work.md`; PostgreSQL manual, "Serialization Failure Handling".
"""

import asyncio
import inspect
import json
import logging
import math
import random
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from typing import Any, Final, Literal, NoReturn, Protocol, TypeVar, cast, get_args

from sqlalchemy import bindparam, event, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session, SessionTransaction
from sqlmodel import col
from sqlmodel.ext.asyncio.session import AsyncSession

from car_control_plane.errors import (
    ConfigurationError,
    ConflictError,
    ConnectionUnavailableError,
    ControlPlaneError,
    InvalidDataError,
    OutcomeUnknownError,
    PoolTimeoutError,
)
from car_control_plane.models import CompletedOperation
from car_control_plane.poolers import leads_through_pooler

__all__ = ["IsolationLevel", "Sessions", "Unit", "UnitSession", "run_unit"]

T = TypeVar("T")

Unit = Callable[[AsyncSession], Awaitable[T]]
"""A unit of work: whatever it does, it does in this session, and may do it several times."""

IsolationLevel = Literal["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]

_FIRST_PAUSE: Final = 0.02
_LONGEST_PAUSE: Final = 1.0
_REPEATED: Final = frozenset({"40001", "40P01"})
_LOCK_TIMEOUT: Final = "55P03"

_log = logging.getLogger("car_control_plane.units")


class UnitSession(AsyncSession):
    """The session of a unit: it is committed for it, and ends with it."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise ConfigurationError(
            "a unit of work does not end its own transaction",
            hint="Return to commit, raise to roll back; for a part of it: async with session.begin_nested().",
        )

    commit = rollback = reset = close = invalidate = begin = _refuse


class Sessions(Protocol):
    """What runs units: `AsyncConnectionManager`."""

    def unit_session(self) -> AbstractAsyncContextManager[UnitSession]:
        """Give a session that is rolled back unless it was stored; errors of the database leave its block as ours."""
        ...

    async def store(self, session: UnitSession) -> None:
        """Commit, uninterrupted; errors of the database are ours."""
        ...

    def repeating(self, problem: ControlPlaneError) -> None:
        """Learn that a unit is run again."""
        ...


async def run_unit(
    sessions: Sessions,
    unit: Unit[T],
    *,
    operation_id: uuid.UUID | str | None,
    deadline: float,
    isolation_level: IsolationLevel | None,
) -> T:
    """Run a unit of work until it is committed; see `AsyncConnectionManager.run`.

    Raises:
        OutcomeUnknownError: A COMMIT was lost, and could not be decided in time.
        ControlPlaneError: What the last attempt failed with; nothing was written.
        ConfigurationError: An argument is not acceptable.
    """
    operation = _Operation(unit, operation_id, isolation_level)
    until = time.monotonic() + _seconds(deadline)
    pause = _FIRST_PAUSE
    while True:
        try:
            return cast("T", await operation.attempt(sessions))
        except ControlPlaneError as problem:
            if operation.failed_itself or not (operation.in_doubt or _passes(problem)):
                raise
            error = problem
        pause = min(pause * 2, _LONGEST_PAUSE)
        wait = pause * random.uniform(0.5, 1.0)  # noqa: S311 -- so that those who met do not meet again
        if time.monotonic() + wait >= until:
            raise operation.given_up(error)
        sessions.repeating(error)
        _log.info(
            "a unit of work is run again: %s",
            error.message,
            extra={"event": "unit.repeated", "operation_id": str(operation.id), "error": error.code},
        )
        await asyncio.sleep(wait)


@dataclass(frozen=True, slots=True)
class _Doubt:
    """A commit nobody answered: what the unit had returned, and the server process that had it."""

    result: Any
    pid: int | None


class _Operation:
    def __init__(self, unit: Unit[Any], operation_id: uuid.UUID | str | None, isolation_level: str | None) -> None:
        if not callable(unit):
            raise ConfigurationError(f"a unit of work is an async function of a session, and not {type(unit).__name__}")
        self._unit = unit
        if isolation_level is not None and isolation_level not in get_args(IsolationLevel):
            raise ConfigurationError(f"isolation_level must be one of {', '.join(get_args(IsolationLevel))}")
        self._asked = operation_id is not None
        self.id = uuid.uuid4() if operation_id is None else _operation_id(operation_id)
        self._isolation_level = isolation_level
        self._doubt: _Doubt | None = None
        self._waited_for_another = False
        self.attempts = 0
        self.failed_itself = False

    @property
    def in_doubt(self) -> bool:
        """Whether a commit of an attempt may have been done."""
        return self._doubt is not None

    async def attempt(self, sessions: Sessions) -> Any:
        """Run the unit once, or find out that it was done."""
        self.attempts += 1
        self.failed_itself = False
        async with sessions.unit_session() as session:
            event.listen(session.sync_session, "after_transaction_end", _note_the_end)
            if self._isolation_level is not None:
                await session.connection(execution_options={"isolation_level": self._isolation_level})
            first = self._asked or self.in_doubt
            if first and not await self._claim(session):
                return self._doubt.result if self._doubt is not None else await self._recorded(session)
            self._doubt = None  # the id is ours now, so no former attempt was committed
            result = await self._work(session)
            if first and not await _in_transaction(session):
                _refuse_ended()
            outcome = self._outcome(result)
            if first:
                if outcome is not None:
                    await session.scalar(_RECORD, {"id": self.id, "value": outcome})
            elif not session.in_transaction():
                return result  # it asked for nothing
            else:
                await session.flush()
                if not await _in_transaction(session):
                    _refuse_ended()
                await session.scalar(_CLAIM, {"id": self.id, "value": None})
            await self._commit(sessions, session, result)
            return result

    async def _claim(self, session: UnitSession) -> bool:
        """Store the id; false when it is there. Waits for whoever is about to store it."""
        try:
            stored = await session.scalar(_CLAIM, {"id": self.id, "value": None})
        except Exception as problem:
            if _sqlstate(problem) != _LOCK_TIMEOUT:
                raise
            self._waited_for_another = True
        else:
            return stored is not None
        if self._doubt is not None and self._doubt.pid is not None:
            await self._end_former(session, self._doubt.pid)
        raise ConflictError(
            "another run of this operation has not ended",
            hint="Ask again with the same operation_id.",
            details={"operation_id": str(self.id), "sqlstate": _LOCK_TIMEOUT},
            retryable=True,
        )

    async def _end_former(self, session: UnitSession, pid: int) -> None:
        """End the server's half of an attempt whose connection is lost: it holds the id, and would until the server notices by itself."""
        with suppress(Exception):  # without the right to do so we wait
            async with session.bind.connect() as connection:  # type: ignore[union-attr]  # a unit's session has an engine
                await connection.execute(_END_FORMER, {"pid": pid})

    async def _recorded(self, session: UnitSession) -> Any:
        return await session.scalar(_OUTCOME, {"id": self.id})

    async def _work(self, session: UnitSession) -> Any:
        try:
            working = self._unit(session)
            if not inspect.isawaitable(working):
                raise ConfigurationError("a unit of work is an async function of a session, and this one is not async")
            result = await working
        except ControlPlaneError as problem:
            # Ours, and the unit may have made it: it is repeated only if it is one of those that pass.
            self.failed_itself = not _passes(problem)
            raise
        if session.info.get(_ENDED):
            self.failed_itself = True
            _refuse_ended()
        return result

    def _outcome(self, result: Any) -> Any:
        """Return what is recorded of a result: of an operation whose id the caller chose, what came of it."""
        if not self._asked or result is None:
            return None
        try:
            kept = json.loads(json.dumps(result, allow_nan=False))
        except (TypeError, ValueError, RecursionError):
            kept = None
        if kept != result:
            raise InvalidDataError(
                "what a unit with an operation_id returns is recorded, and must be a JSON value; nothing was written",
                hint="Return plain JSON values, ids as text, or nothing.",
            )
        return kept

    async def _commit(self, sessions: Sessions, session: UnitSession, result: Any) -> None:
        driver: Any = (await (await session.connection()).get_raw_connection()).driver_connection
        pid = None if leads_through_pooler(driver) else driver.get_server_pid()  # a pooler's are made up
        try:
            await sessions.store(session)
        except ConnectionUnavailableError:
            self._doubt = _Doubt(result, pid)
            raise

    def given_up(self, error: ControlPlaneError) -> ControlPlaneError:
        """Return what to say when there is no time for another attempt."""
        if self.in_doubt:
            return OutcomeUnknownError(
                f"the connection was lost during COMMIT, and its outcome could not be found out in time: {error.message}",
                details={"operation_id": str(self.id), "attempts": self.attempts},
            )
        error.details = {**error.details, "attempts": self.attempts}
        return error.with_traceback(None)


_ID = bindparam("id", type_=col(CompletedOperation.operation_id).type)  # type: ignore[attr-defined]  # a mapped column has one
_VALUE = bindparam("value", type_=col(CompletedOperation.outcome).type)  # type: ignore[attr-defined]  # a mapped column has one
_CLAIM = (
    insert(CompletedOperation)
    .values(operation_id=_ID, outcome=_VALUE)
    .on_conflict_do_nothing()
    .returning(col(CompletedOperation.operation_id))
)
_RECORD = (
    update(CompletedOperation)
    .where(col(CompletedOperation.operation_id) == _ID)
    .values(outcome=_VALUE)
    .returning(col(CompletedOperation.operation_id))
    .execution_options(synchronize_session=False)
)
_OUTCOME = select(col(CompletedOperation.outcome)).where(col(CompletedOperation.operation_id) == _ID)
_END_FORMER = text(
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = :pid AND usename = current_user AND datname = current_database()"
    " AND application_name = current_setting('application_name') AND state LIKE 'idle in transaction%'"
)


_ENDED: Final = "transaction ended"


def _note_the_end(session: Session, transaction: SessionTransaction) -> None:
    """Remember that the outermost transaction has ended: also what is called inside of `run_sync` ends it."""
    if transaction.parent is None and not transaction.nested:
        session.info[_ENDED] = True


def _refuse_ended() -> NoReturn:
    raise ConfigurationError(
        "the unit of work has ended its own transaction",
        hint="Return to commit, raise to roll back; for a part of it: async with session.begin_nested().",
    )


async def _in_transaction(session: UnitSession) -> bool:
    """Whether the server is still in the transaction: SQL as text may have ended it behind our back."""
    driver: Any = (await (await session.connection()).get_raw_connection()).driver_connection
    return bool(driver.is_in_transaction())


def _passes(problem: ControlPlaneError) -> bool:
    """Whether the same unit can succeed on another attempt."""
    if isinstance(problem, ConnectionUnavailableError):
        return not isinstance(problem, PoolTimeoutError)
    return problem.details.get("sqlstate") in _REPEATED | {_LOCK_TIMEOUT} and problem.retryable


def _sqlstate(problem: BaseException) -> Any:
    return getattr(getattr(problem, "orig", problem), "sqlstate", None)


def _operation_id(given: object) -> uuid.UUID:
    if isinstance(given, uuid.UUID):
        return given
    if isinstance(given, str):
        with suppress(ValueError):
            return uuid.UUID(given)
    raise ConfigurationError("operation_id must be a UUID, or the text of one")


def _seconds(given: object) -> float:
    if isinstance(given, int | float) and not isinstance(given, bool) and given > 0 and math.isfinite(given):
        return float(given)
    raise ConfigurationError("deadline must be a number of seconds above 0")
