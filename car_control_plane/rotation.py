"""Seals every connection string anew with the current key, while the platform runs.

What is left to do stands in the data: the id of the key in each sealed value, which is indexed. So there is nothing to lose: a rotation that was
killed, cancelled or cut off is started again and goes on. Each batch is read, opened and sealed outside of any transaction, and then stored by
one statement that replaces only values still as they were read; a value somebody else has changed meanwhile is theirs. It waits for no row, and
it pauses when the server slows down, so that writers hardly notice.

A rotation is no change of a row: versions, `updated_at`, the change log and its notifications stay as they are (the schema has a marker for it).

One session both holds the lock that keeps a second rotation out and does the writing, so that a rotator without the lock cannot write. Behind a
pooler in transaction mode such a lock does not hold: connect directly.

Not done here: making, promoting or destroying keys (`EncryptionKeyRepository`), and outer keys, whose rotation touches no row of a tenant.

Sources: PostgreSQL manual, "Explicit Locking" and "SELECT, The Locking Clause"; `docs/adr/0017-rotation-leaves-no-trace-in-the-change-log.md`,
`docs/how-to/rotate-keys.md`.
"""

import asyncio
import functools
import logging
import math
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Final, TypeVar, cast

import asyncpg
from sqlmodel import update

from car_control_plane.connection import AsyncConnectionManager
from car_control_plane.encryption.envelope import Key, connection_string_context, seal, unseal
from car_control_plane.encryption.keyring import Keyring
from car_control_plane.encryption.values import SealedConnectionString
from car_control_plane.errors import (
    ConfigurationError,
    ConflictError,
    ConnectionUnavailableError,
    ControlPlaneError,
    DecryptionError,
    InvalidDataError,
    PermissionDeniedError,
    StatementTimeoutError,
    UnknownKeyError,
    translate,
)
from car_control_plane.execution import grants_for
from car_control_plane.models import TenantDatabase
from car_control_plane.repositories.keys import EncryptionKeyRepository

__all__ = ["RotationProgress", "RotationResult", "rotate_keys"]

_log = logging.getLogger("car_control_plane.rotation")

T = TypeVar("T")

LISTED_FAILURES: Final = 1_000
"""How many rows that cannot be opened are listed by id; the others are counted."""

_MOST_ROWS = 10_000
# "ccprotat". Any number will do, as long as every version of the library uses this one.
_LOCK_KEY = 0x63_63_70_72_6F_74_61_74

# Half a minute, with the attempts in between: a failover is over by then.
_DELAYS_SECONDS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0)

_COUNT_SECONDS = 120  # reads an index entry for each row
_LONGEST_PAUSE_SECONDS = 1.0
_SLOWER_ANYWAY = 1.5  # than the best is what batches are on a server without other work
_LOWEST_ID = uuid.UUID(int=0)

# A batch takes some 0.1 s. It waits for no row, so a lock it waits for is one of the whole table, with a queue of writers behind it.
_LIMITS = {"statement_timeout": "5s", "lock_timeout": "500ms"}
_ANSWER_SECONDS = 8.0


@dataclass(frozen=True, slots=True)
class RotationProgress:
    """How far a rotation is, after each batch.

    Attributes:
        done: Rows dealt with by this run: sealed anew, changed by somebody else, or not to be opened.
        total: Rows to deal with, as far as is known; grows when more turn up.
        failed: Those of them that cannot be opened.
        rows_per_second: `done` over the time since the run began.
    """

    done: int
    total: int
    failed: int
    rows_per_second: float


@dataclass(frozen=True, slots=True)
class RotationResult:
    """What a rotation did.

    Attributes:
        kid: The key that is current at its end.
        rotated: Rows sealed anew.
        lost_races: How often a row was left alone because somebody else had changed it, or was about to. Such rows are looked at once more
            before the end; most of them have the current key already.
        failed: The id of each row that cannot be opened, and the `code` of the error: `unknown-key`, `decryption`, or
            `configuration` when this process is not set up to open its key. The first 1,000 of them.
        failed_count: How many there are.
        remaining: Rows of another key than the current one, counted at the very end, those that cannot be opened included. When it is 0, and
            no process seals with a former key any more, no row needs one.
    """

    kid: str
    rotated: int
    lost_races: int
    failed: tuple[tuple[uuid.UUID, str], ...]
    failed_count: int
    remaining: int


async def rotate_keys(
    manager: AsyncConnectionManager,
    keyring: Keyring,
    *,
    batch_rows: int = 1_000,
    progress: Callable[[RotationProgress], None] | None = None,
) -> RotationResult:
    """Seal every connection string that another key sealed with the current one; online, and to be called again if it did not get to its end.

    Rows that cannot be opened stay as they are, are reported, and stop no others. May be cancelled: what is stored stays, the batch under way is
    rolled back, the lock is let go. Which key is current is asked for each batch, so a promotion meanwhile takes effect at once. Memory does not
    grow with the number of rows.

    Args:
        manager: Where; one connection of its own, outside of the pool.
        keyring: The keys, those to open with and the current one.
        batch_rows: Rows of one transaction, 1 to 10,000.
        progress: Called when the rows are counted, and after each batch.

    Raises:
        ConflictError: Another rotation of this database is under way; or a lock on the table was in the way too long.
        KeyUnavailableError: The source of the keys does not answer; what is stored stays.
        ConfigurationError: No key is current, or the current one is not the one on record under its id; nothing was sealed with it.
        ConnectionUnavailableError: The database was lost, and could not be reached again within half a minute; what is stored stays.
        StatementTimeoutError: The database does not get a batch done; what is stored stays.
        SchemaError: The schema is not at the revision of this version of the library, or the role may not; nothing was done.
        InvalidDataError: `batch_rows` is not a number from 1 to 10,000.
    """
    _check_batch(batch_rows)
    await manager.require_schema()  # an older one would log a million changes
    async with _turn(manager) as turn:
        return await _Rotation(manager, keyring, turn, batch_rows, progress).run()


def _check_batch(rows: object) -> None:
    if not isinstance(rows, int) or isinstance(rows, bool) or not 1 <= rows <= _MOST_ROWS:
        raise InvalidDataError(f"batch_rows must be a whole number from 1 to {_MOST_ROWS:,}")


# --- the statements ---------------------------------------------------------------------------------------------------

_TRY_LOCK = "SELECT pg_try_advisory_lock($1)"

_LOCK_HOLDER = """
SELECT pid FROM pg_locks
WHERE locktype = 'advisory' AND granted AND objsubid = 1
  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND (classid::bigint << 32 | objid::bigint) = $1
"""

# From PostgreSQL 14 on a server may end sessions that idle, as this one does during a pause.
_KEEP_IDLE_SESSION = "SELECT set_config(name, '0', false) FROM pg_settings WHERE name = 'idle_session_timeout'"

# From key to key through the index: as many steps as there are keys, however many rows each has.
_OTHER_KEYS = """
WITH RECURSIVE found (kid) AS (
    (SELECT split_part(connection_string_encrypted, ':', 2) AS kid FROM control_plane.tenant_databases ORDER BY 1 LIMIT 1)
    UNION ALL
    SELECT (SELECT split_part(connection_string_encrypted, ':', 2) FROM control_plane.tenant_databases
            WHERE split_part(connection_string_encrypted, ':', 2) > found.kid ORDER BY 1 LIMIT 1)
    FROM found WHERE found.kid IS NOT NULL
)
SELECT kid, (SELECT count(*) FROM control_plane.tenant_databases WHERE split_part(connection_string_encrypted, ':', 2) = found.kid) AS rows
FROM found WHERE kid <> $1
"""

# What is counted is what is to be read anyway. A scan of the whole table for each key, a few rows of which are left, is not.
_BEFORE_COUNTING = "SELECT set_config('statement_timeout', $1, true), set_config('enable_seqscan', 'off', true)"

# Not "= $1 ORDER BY id": the planner might walk the primary key then, and near the end of a rotation that is the whole table for nothing.
_READ = """
SELECT id, tenant_id, connection_string_encrypted FROM control_plane.tenant_databases
WHERE (split_part(connection_string_encrypted, ':', 2), id) > ($1, $2) AND split_part(connection_string_encrypted, ':', 2) <= $1
ORDER BY split_part(connection_string_encrypted, ':', 2), id LIMIT $3
"""

_MARK = "SELECT set_config('control_plane.resealing', 'on', true)"

# A row that is locked is being changed: waiting for it would keep the locks on all others, against which its owner may run.
_REPLACE = """
WITH free AS (
    SELECT t.id, u.new
    FROM unnest($1::uuid[], $2::text[], $3::text[]) AS u (id, old, new)
    JOIN control_plane.tenant_databases t ON t.id = u.id AND t.connection_string_encrypted = u.old
    FOR NO KEY UPDATE OF t SKIP LOCKED
)
UPDATE control_plane.tenant_databases t SET connection_string_encrypted = free.new FROM free WHERE t.id = free.id
"""


# --- the session that may rotate --------------------------------------------------------------------------------------


class _Turn:
    """The one connection that reads and writes, and holds the lock for as long as it lives; replaced when it is lost."""

    def __init__(self, manager: AsyncConnectionManager) -> None:
        self._manager = manager
        self._connection: asyncpg.Connection | None = None

    async def take(self) -> None:
        """Take the lock.

        Raises:
            ConflictError: Somebody has it.
            ControlPlaneError: Whatever the server refuses.
        """
        _, problem = await self._try(_nothing)
        if problem is not None:
            raise problem

    async def do(self, work: Callable[[asyncpg.Connection], Awaitable[T]]) -> T:
        """Do something that may be done twice; again, and on a new connection if need be, when what stopped it may pass.

        Raises:
            ControlPlaneError: It would not pass, or has not for half a minute.
        """
        delays = iter(_DELAYS_SECONDS)
        while True:
            done, problem = await self._try(work)
            if problem is None:
                return cast("T", done)
            delay = next(delays, None) if _may_pass(problem) else None
            if delay is None:
                raise problem
            facts = {"event": "rotation.repeated", "error": problem.code}
            _log.warning("rotation: %s; trying again", problem.message, extra=facts)
            if isinstance(problem, ConnectionUnavailableError):
                await self.drop()
            await asyncio.sleep(delay)

    async def drop(self) -> None:
        """Let go of the lock, with the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(OSError, asyncpg.InterfaceError):  # gone already, or not answering
                await connection.close(timeout=self._manager.settings.connect_timeout_seconds)

    async def _try(
        self, work: Callable[[asyncpg.Connection], Awaitable[T]]
    ) -> tuple[T | None, ControlPlaneError | None]:
        """Return the failure instead of raising it, so that the driver's error, and what its frames hold, hangs on nothing."""
        try:
            return await work(self._connection or await self._claim()), None
        except Exception as error:
            problem = translate(error, io=True)
            if problem is None:
                raise
        if isinstance(problem, PermissionDeniedError):
            problem.hint = grants_for(update(TenantDatabase))
        return None, problem

    async def _claim(self) -> asyncpg.Connection:
        connection = await self._manager.connect_direct(
            server_settings=_LIMITS, command_timeout=_ANSWER_SECONDS, activity="rotate"
        )
        try:
            if await connection.fetchval(_TRY_LOCK, _LOCK_KEY):
                await connection.execute(_KEEP_IDLE_SESSION)
                self._connection = connection
                return connection
            pid = await connection.fetchval(_LOCK_HOLDER, _LOCK_KEY)
        finally:
            if self._connection is None:
                connection.terminate()
        raise ConflictError(
            f"a rotation is running already{f' (server process {pid})' if pid else ''}",
            hint="Wait for it to end; then `car-cp key status` says whether anything is left to do.",
            details={"pid": pid} if pid else {},
            retryable=True,
        )


@asynccontextmanager
async def _turn(manager: AsyncConnectionManager) -> AsyncIterator[_Turn]:
    turn = _Turn(manager)
    try:
        await turn.take()
        yield turn
    finally:
        await turn.drop()


async def _nothing(_: asyncpg.Connection) -> None: ...


def _may_pass(problem: ControlPlaneError) -> bool:
    return isinstance(problem, StatementTimeoutError) or (
        isinstance(problem, ConnectionUnavailableError | ConflictError) and problem.retryable
    )


# --- rotating ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Row:
    id: uuid.UUID
    tenant_id: uuid.UUID
    sealed: SealedConnectionString  # prints masked: a damaged one may be plain text


@dataclass(slots=True)
class _Batch:
    """Values that were opened, and the same ones sealed anew; and the rows that could not be opened."""

    ids: list[uuid.UUID] = field(default_factory=list)
    old: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    failed: list[tuple[uuid.UUID, str]] = field(default_factory=list)


class _Rotation:
    def __init__(
        self,
        manager: AsyncConnectionManager,
        keyring: Keyring,
        turn: _Turn,
        batch_rows: int,
        progress: Callable[[RotationProgress], None] | None,
    ) -> None:
        self._manager = manager
        self._keyring = keyring
        self._turn = turn
        self._batch_rows = batch_rows
        self._progress = progress
        self._pace = _Pace()
        self._started = time.monotonic()
        self._confirmed: Key | None = None
        self._rotated = self._lost = self._done = self._total = 0
        self._failed: list[tuple[uuid.UUID, str]] = []
        self._failed_count = 0

    async def run(self) -> RotationResult:
        """Go through the rows of other keys until a look finds none but those that cannot be opened."""
        kid, others = await self._look()
        for delay in (0.0, *_DELAYS_SECONDS):
            if not others:
                break
            await asyncio.sleep(delay)  # for rows that somebody is changing, or goes on sealing with a former key
            settled, before = await self._pass(others), kid
            kid, others = await self._look()
            if not settled and kid == before:
                break
        if not others:
            self._failed, self._failed_count = [], 0  # repaired, or gone, since
        return RotationResult(
            kid=kid,
            rotated=self._rotated,
            lost_races=self._lost,
            failed=tuple(self._failed),
            failed_count=self._failed_count,
            remaining=sum(others.values()),
        )

    async def _look(self) -> tuple[str, dict[str, int]]:
        """Return the current key's id and, for every other one that rows have, how many."""
        # Asks anew: sealing with a key that is current no more would undo somebody else's rotation.
        await self._keyring.list()
        kid = (await self._current()).kid
        return kid, await self._turn.do(functools.partial(_other_keys, kid=kid))

    async def _current(self) -> Key:
        key = await self._keyring.current()
        if key != self._confirmed:
            async with self._manager.get_session() as session:
                await EncryptionKeyRepository(session).confirm(key, self._keyring.provider.name)
            self._confirmed = key
        return key

    async def _pass(self, others: Mapping[str, int]) -> int:
        """Rotate the rows of these keys; return how many need not be looked at again."""
        before = self._rotated + self._lost
        self._done -= self._failed_count  # they are tried once more
        self._total = self._done + sum(others.values())
        self._failed, self._failed_count = [], 0
        self._tell()
        async with aclosing(self._walk(others)) as walk:
            async for rows in walk:
                # One after the other, though sealing could go on while the server stores: so one core is busy with this, and not two, which on a
                # small machine the writers would feel.
                await self._store(await self._resealed(rows))
        return self._rotated + self._lost - before

    async def _walk(self, others: Mapping[str, int]) -> AsyncGenerator[list[_Row]]:
        for kid in others:
            last: uuid.UUID = _LOWEST_ID
            while rows := await self._turn.do(functools.partial(_read, kid=kid, after=last, limit=self._batch_rows)):
                yield rows
                last = rows[-1].id

    async def _resealed(self, rows: Sequence[_Row]) -> _Batch:
        """Open the rows, all of one key, and seal them for the current one, in a thread."""
        current = await self._current()
        kid = next((kid for row in rows if (kid := row.sealed.kid) is not None), None)
        if kid == current.kid:  # promoted a moment ago
            return _Batch()
        code = DecryptionError.code
        if kid is not None:
            try:
                former = await self._keyring.get(kid)
                return await asyncio.to_thread(_reseal, former, current, rows)
            except (UnknownKeyError, DecryptionError, ConfigurationError) as refusal:  # of this one key
                code = refusal.code
        return _Batch(failed=[(row.id, code) for row in rows])

    async def _store(self, batch: _Batch) -> None:
        replaced, took = 0, 0.0
        if batch.ids:
            replaced, took = await self._turn.do(functools.partial(_replace, batch=batch))
        self._rotated += replaced
        self._lost += len(batch.ids) - replaced
        self._failed += batch.failed[: LISTED_FAILURES - len(self._failed)]
        self._failed_count += len(batch.failed)
        self._done += len(batch.ids) + len(batch.failed)
        self._tell()
        await asyncio.sleep(self._pace.pause(took, len(batch.ids)))

    def _tell(self) -> None:
        self._total = max(self._total, self._done)
        if self._progress is not None:
            rate = self._done / max(time.monotonic() - self._started, 1e-9)
            self._progress(RotationProgress(self._done, self._total, self._failed_count, rate))


class _Pace:
    """Gives way: the slower the server is against its best, the longer it is left alone."""

    def __init__(self) -> None:
        self._best = math.inf

    def pause(self, took: float, rows: int) -> float:
        """Return how long to wait after so many rows took so many seconds."""
        if not rows:
            return 0.0
        self._best = min(self._best, took / rows)
        lost = took - self._best * rows * _SLOWER_ANYWAY
        return min(max(lost, 0.0), _LONGEST_PAUSE_SECONDS)


def _reseal(former: Key, current: Key, rows: Sequence[_Row]) -> _Batch:
    batch = _Batch()
    for row in rows:
        context = connection_string_context(row.tenant_id, row.id)
        try:
            # Nested, so that no variable of this frame holds what is in between.
            new = seal(current, unseal(former, row.sealed.text, context), context)
        except DecryptionError as refusal:
            batch.failed.append((row.id, refusal.code))
        else:
            batch.ids.append(row.id)
            batch.old.append(row.sealed.text)
            batch.new.append(new)
    return batch


async def _other_keys(connection: asyncpg.Connection, *, kid: str) -> dict[str, int]:
    async with connection.transaction():
        await connection.execute(_BEFORE_COUNTING, f"{_COUNT_SECONDS}s")
        rows = await connection.fetch(_OTHER_KEYS, kid, timeout=_COUNT_SECONDS + _ANSWER_SECONDS)
    return dict(rows)


async def _read(connection: asyncpg.Connection, *, kid: str, after: uuid.UUID, limit: int) -> list[_Row]:
    rows = await connection.fetch(_READ, kid, after, limit)
    return [_Row(id, tenant, SealedConnectionString(text)) for id, tenant, text in rows]


async def _replace(connection: asyncpg.Connection, *, batch: _Batch) -> tuple[int, float]:
    """Store what is sealed anew; return how many rows took it, and how many seconds they needed."""
    started = time.monotonic()
    async with connection.transaction(isolation="read_committed"):
        await connection.execute(_MARK)
        answer = await connection.execute(_REPLACE, batch.ids, batch.old, batch.new)
    return int(answer.removeprefix("UPDATE ")), time.monotonic() - started
