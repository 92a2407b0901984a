"""Runs statements: what a repository wants from the database, kept apart from the way it is run.

Repositories build statements and hand them to an executor. `SessionExecutor` runs them in the caller's session: in its transaction and with its
identity map. `DirectExecutor` runs each as a transaction of its own through a manager: no ORM session, no BEGIN, one round trip. There a statement is
compiled once by SQLAlchemy; after that its text and its parameters go straight to asyncpg, and rows become detached instances, equal to what the ORM
would have loaded. Whatever goes wrong leaves either as one of our errors, free of the driver's. Neither commits what is the caller's.

Sources: `docs/adr/0011-repositories-over-an-executor.md`, `docs/adr/0018-the-direct-door.md`.
"""

import asyncio
import contextvars
import copy
import functools
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, Final, LiteralString, Protocol, TypeVar, TypeVarTuple, cast, overload

from sqlalchemy import ARRAY, Delete, Insert, Select, Table, Update, any_, bindparam, inspect
from sqlalchemy.dialects.postgresql.dml import OnConflictDoUpdate
from sqlalchemy.engine.result import ScalarResult, TupleResult
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSessionTransaction
from sqlalchemy.orm import FromStatement, Mapper, configure_mappers, make_transient_to_detached
from sqlalchemy.orm.attributes import instance_state, set_committed_value
from sqlalchemy.sql import visitors
from sqlalchemy.types import TypeEngine
from sqlalchemy.util import LRUCache
from sqlmodel import SQLModel, select
from sqlmodel.ext.asyncio.session import AsyncSession
from sqlmodel.sql.expression import Select as SelectOfRows, SelectOfScalar
from sqlmodel.sql.sqltypes import UTCDateTime

from car_control_plane.dialect import ControlPlaneDialect
from car_control_plane.errors import (
    AccessDeniedError,
    ClosedError,
    ControlPlaneError,
    PermissionDeniedError,
    SchemaOutdatedError,
    WrongEventLoopError,
    refusal,
)

M = TypeVar("M", bound=SQLModel)
T = TypeVar("T")
Ts = TypeVarTuple("Ts")

Statement = Select[Any] | Insert | Update | Delete | FromStatement[Any]


class AsyncReadSession(Protocol):
    """A session that only reads: what `get_read_session()` yields.

    A function that takes an `AsyncReadSession` accepts a SQLModel `AsyncSession` as well; one that takes an `AsyncSession` does not accept a read
    session, as a type checker tells. The server holds to it too: the transaction is READ ONLY.
    """

    @overload
    async def exec(
        self,
        statement: SelectOfRows[*Ts],
        *,
        params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = ...,
        execution_options: Mapping[str, Any] = ...,
    ) -> TupleResult[tuple[*Ts]]: ...

    @overload
    async def exec(
        self,
        statement: SelectOfScalar[T],
        *,
        params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = ...,
        execution_options: Mapping[str, Any] = ...,
    ) -> ScalarResult[T]: ...

    async def get(self, entity: type[T], ident: Any) -> T | None:
        """Return the row with this primary key, from the identity map or by one query."""
        ...

    async def scalar(self, statement: Select[Any], params: Any = ...) -> Any:
        """Return the first column of the first row, or None."""
        ...

    async def connection(self) -> AsyncConnection:
        """Return the connection of the session's transaction."""
        ...


class ReadSession(AsyncSession):
    """What an `AsyncReadSession` is at run time: refuses objects to write at once, not at the flush."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise AccessDeniedError("this session only reads", hint="Write in get_session().")

    add = add_all = delete = merge = delete_all = merge_all = _refuse


class Executor(Protocol):
    """Runs a repository's statements. Every method is one round trip and may be cancelled."""

    async def one_or_none(self, statement: Statement, params: Mapping[str, Any] | None = None) -> Any:
        """Return the first entity or value of the statement, or None."""
        ...

    async def all(self, statement: Statement, params: Mapping[str, Any] | None = None) -> list[Any]:
        """Return every entity or value of the statement, in its order."""
        ...

    async def rows(self, statement: SelectOfRows[*Ts], params: Mapping[str, Any] | None = None) -> Sequence[tuple[*Ts]]:
        """Return every row of the statement, in its order."""
        ...

    async def get(self, model: type[M], key_column: Any, key: Any) -> M | None:
        """Return the row with this primary key, or None."""
        ...

    async def find(self, model: type[M], column: Any, value: Any) -> M | None:
        """Return the row with this value in a unique column, or None."""

    def forget(self, model: type[M], key: Any) -> None:
        """Let go of a row that was deleted."""

    def atomic(self) -> "AbstractAsyncContextManager[SessionExecutor]":
        """Make several statements one unit: those of the executor it gives. All of them are stored, or none."""
        ...

    def require_writable(self) -> None:
        """Return unless what is behind this only reads.

        Raises:
            AccessDeniedError: It does.
        """


ENDED: Final = "ended"
"""In a session's `info`: its block is over."""


class SessionExecutor:
    """Runs a repository's statements in a session; every method is one round trip and may be cancelled."""

    def __init__(self, session: AsyncSession | AsyncReadSession) -> None:
        # Both are SQLAlchemy's AsyncSession at run time; the protocol only hides the writing half from type checkers.
        self._session: AsyncSession = session  # type: ignore[assignment]

    async def one_or_none(self, statement: Statement, params: Mapping[str, Any] | None = None) -> Any:
        """Return the first entity or value of the statement, or None. Rows already in the session take the statement's values if it writes."""
        found = await self._scalars(statement, params)
        return found.first()

    async def all(self, statement: Statement, params: Mapping[str, Any] | None = None) -> list[Any]:
        """Return every entity or value of the statement, in its order."""
        found = await self._scalars(statement, params)
        return list(found.all())

    async def rows(self, statement: SelectOfRows[*Ts], params: Mapping[str, Any] | None = None) -> Sequence[tuple[*Ts]]:
        """Return every row of the statement, in its order."""
        found = await self._run(self._session.exec(statement, params=params), cast("Select[Any]", statement))
        return found.all()

    async def get(self, model: type[M], key_column: Any, key: Any) -> M | None:
        """Return the row with this primary key, or None; no round trip when the session holds a fresh one."""
        sync = self._session.sync_session
        if len(sync.identity_map):  # most often the session is new, and a key is not worth making
            row = sync.identity_map.get(sync.identity_key(model, key))
            if row is not None and not instance_state(row).expired_attributes:
                return cast("M", row)
        return await self.find(model, key_column, key)

    async def find(self, model: type[M], column: Any, value: Any) -> M | None:
        """Return the row with this value in a unique column, or None."""
        place: Any = model, column.key
        return cast("M | None", await self.one_or_none(_one_by(*place), {"key": value}))

    def forget(self, model: type[M], key: Any) -> None:
        """Take a deleted row out of the session's identity map."""
        sync = self._session.sync_session
        if (row := sync.identity_map.get(sync.identity_key(model, key))) is not None:
            sync.expunge(row)

    async def fetch(self, sql: LiteralString, *arguments: Any, writes: type[SQLModel]) -> Sequence[Any]:
        """Run one positional statement (`$1`, `$2` …) that inserts into a table; return its rows."""
        self.require_writable()
        needs = Insert(writes.__table__)  # type: ignore[attr-defined]  # SQLAlchemy sets it on mapped classes
        connection = await self._run(self._session.connection(), needs)
        return (await self._run(connection.exec_driver_sql(sql, arguments), needs)).all()

    @asynccontextmanager
    async def atomic(self) -> AsyncGenerator["SessionExecutor"]:
        """Make everything inside one unit: a savepoint, released at the end, rolled back on any exception.

        Yields:
            This executor.
        """
        self.require_writable()
        savepoint: AsyncSessionTransaction = await self._run(_begin_nested(self._session), None)
        try:
            yield self
            await self._run(savepoint.commit(), None)
        except BaseException:
            # Also when a flush has failed, for until then the session refuses everything. What cannot be rolled back is gone already.
            with suppress(SQLAlchemyError):
                await savepoint.rollback()
            raise

    async def _scalars(self, statement: Statement, params: Mapping[str, Any] | None = None) -> ScalarResult[Any]:
        options: Mapping[str, Any] = {}
        if not isinstance(statement, Select):
            self.require_writable()
            options = _WRITING
        exec_: Any = self._session.exec
        result: Any = await self._run(exec_(statement, params=params, execution_options=options), statement)
        return result if isinstance(result, ScalarResult) else cast("ScalarResult[Any]", result.scalars())

    def require_writable(self) -> None:
        """Return unless the session only reads.

        Raises:
            AccessDeniedError: It does.
        """
        if isinstance(self._session, ReadSession):
            raise AccessDeniedError("this session only reads; nothing was written", hint="Write in get_session().")

    async def _run(self, call: Awaitable[T], statement: Statement | None) -> T:
        try:
            return await call
        except Exception as problem:
            if self._session.info.get(ENDED):
                error: ControlPlaneError | None = ClosedError(
                    "the session has ended", hint="Use it inside of its block; open another one for later work."
                )
            else:
                error = refusal(problem)
            if error is None or error is problem:
                raise
        if isinstance(error, PermissionDeniedError) and statement is not None:
            error.hint = grants_for(statement, role=self._session.info.get("role"))
        raise error  # outside of the except block: the driver's error, and what it holds, is on no __context__


# --- the direct door --------------------------------------------------------------------------------------------------


class Door(Protocol):
    """What lets single statements in: `AsyncConnectionManager`.

    Attributes:
        coalescers: The gets under way, by model and column; kept here because every repository of a manager shares them.
    """

    coalescers: "dict[tuple[type[Any], str], Coalescer]"

    @property
    def role(self) -> str | None:
        """As whom the statements run, for hints."""
        ...

    async def fetch(self, sql: str, arguments: Sequence[Any], *, repeat: bool) -> list[Any]:
        """Run one statement as its own transaction and return its rows; with `repeat` again on another connection when the first is lost."""
        ...

    def get_session(self) -> AbstractAsyncContextManager[AsyncSession]:
        """Give a session whose work is one transaction."""
        ...


class DirectExecutor:
    """Runs each statement as a transaction of its own; every method is one round trip and may be cancelled.

    Safe to share. Reads are repeated when their connection is lost, writes never. Rows come as detached instances, each caller's his own; listeners to
    SQLAlchemy's `load` event are not told of them.
    """

    def __init__(self, door: Door) -> None:
        self._door = door

    async def one_or_none(self, statement: Statement, params: Mapping[str, Any] | None = None) -> Any:
        """Return the first entity or value of the statement, or None."""
        prepared, arguments = _prepared(statement, params)
        rows = await self.fetch(prepared, arguments)
        return prepared.read_all(rows[:1])[0] if rows else None

    async def all(self, statement: Statement, params: Mapping[str, Any] | None = None) -> list[Any]:
        """Return every entity or value of the statement, in its order."""
        prepared, arguments = _prepared(statement, params)
        return prepared.read_all(await self.fetch(prepared, arguments))

    async def rows(self, statement: SelectOfRows[*Ts], params: Mapping[str, Any] | None = None) -> Sequence[tuple[*Ts]]:
        """Return every row of the statement, in its order."""
        prepared, arguments = _prepared(cast("Select[Any]", statement), params)
        return cast("list[tuple[*Ts]]", prepared.read_rows(await self.fetch(prepared, arguments)))

    async def get(self, model: type[M], key_column: Any, key: Any) -> M | None:
        """Return the row with this primary key, or None. Gets of one turn of the event loop share a statement."""
        return await self.find(model, key_column, key)

    async def find(self, model: type[M], column: Any, value: Any) -> M | None:
        """Return the row with this value in a unique column, or None; shares statements as `get` does."""
        place = model, column.key
        if (coalescer := self._door.coalescers.get(place)) is None:
            coalescer = self._door.coalescers[place] = Coalescer(self, *place)
        found: M | None = await coalescer.get(value)
        return found

    def forget(self, model: type[M], key: Any) -> None:
        """Do nothing: there is no identity map."""

    def require_writable(self) -> None:
        """Return: the direct door writes."""

    @asynccontextmanager
    async def atomic(self) -> AsyncGenerator[SessionExecutor]:
        """Make several statements one transaction, in a session of their own.

        Yields:
            An executor in that session.
        """
        async with self._door.get_session() as session:
            yield SessionExecutor(session)

    async def fetch(self, prepared: "Prepared", arguments: Sequence[Any]) -> list[Any]:
        """Run a compiled statement and return its rows, as the driver has them."""
        try:
            return await self._door.fetch(prepared.sql, arguments, repeat=prepared.reads)
        except PermissionDeniedError as error:
            error.hint = grants_for(prepared.statement, role=self._door.role)
            raise


class Coalescer:
    """Gets of one model by one unique column: those of one turn of the event loop become one statement with `= ANY ($1)`.

    A get that finds nothing under way goes alone, at once. Every key is sent after its caller's call began, so an answer is as fresh as that of a
    statement of its own; every caller gets an object of his own, and an error of his own; one who is cancelled stops waiting, and disturbs nobody.

    Belongs to the event loop that used it first; in a forked child it starts afresh.
    """

    def __init__(self, executor: DirectExecutor, model: Any, column: str) -> None:
        self._executor = executor
        self._one, self._many = Prepared(_one_by(model, column)), Prepared(many_by(model, column))
        self._position = self._one.column_of(getattr(model, column))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._process = 0

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._loop is not None and self._process == os.getpid():
            raise WrongEventLoopError
        self._loop, self._process = loop, os.getpid()
        self._waiting: _Waiting = {}
        self._under_way = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def get(self, key: Any) -> Any:
        """Return the row with this key, or None.

        Raises:
            WrongEventLoopError: Another event loop has used it before.
        """
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._begin(loop)
        if self._under_way == 0:
            self._under_way += 1
            try:
                rows = await self._executor.fetch(self._one, (key,))
            finally:
                self._under_way -= 1
        else:
            if not self._waiting:
                loop.call_soon(self._send, context=contextvars.Context())  # nobody's: what it sends is for several
            future: asyncio.Future[Any] = loop.create_future()
            self._waiting.setdefault(key, []).append(future)
            rows = await future
            if rows is None:
                rows = await self._executor.fetch(self._one, (key,))
        return self._one.read_all(rows)[0] if rows else None

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, {}
        batch = {key: alive for key, futures in waiting.items() if (alive := [f for f in futures if not f.done()])}
        if batch:
            self._under_way += 1
            task = asyncio.get_running_loop().create_task(self._ask(batch))
            self._tasks.add(task)
            task.add_done_callback(functools.partial(self._asked, batch))

    async def _ask(self, batch: "_Waiting") -> None:
        answers: dict[Any, tuple[Any, ...]] = {}
        refused: ControlPlaneError | None = None
        try:
            for row in await self._executor.fetch(self._many, (list(batch),)):
                answers[row[self._position]] = (row,)
        except ControlPlaneError as problem:
            refused = problem
        for key, futures in batch.items():
            answer = answers.get(key, ())
            for future in futures:
                if not future.done():
                    if refused is None:
                        future.set_result(answer)
                    else:  # one object raised in several tasks would gather the tracebacks of all
                        future.set_exception(copy.copy(refused))

    def _asked(self, batch: "_Waiting", task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        self._under_way -= 1
        failed = not task.cancelled() and task.exception() is not None
        for futures in batch.values():
            for future in futures:
                if not future.done():
                    if failed:
                        future.set_result(
                            None
                        )  # a mistake, and no error of ours: each asks for himself, and meets his own
                    else:
                        future.cancel()  # cancelled by whoever ends the loop, maybe before it began


_Waiting = dict[Any, list[asyncio.Future[Any]]]


# --- compiled once ----------------------------------------------------------------------------------------------------

_DIALECT: Final = ControlPlaneDialect()
_MOST_SHAPES: Final = 500

_shapes: LRUCache[Any, "Prepared"] = LRUCache(_MOST_SHAPES)
_built: dict[Statement, "Prepared"] = {}

Processor = Callable[[Any], Any]


def _prepared(statement: Statement, params: Mapping[str, Any] | None) -> "tuple[Prepared, Sequence[Any]]":
    """Return a statement's compiled form and the values of its parameters.

    A statement that is run with parameters is built once and found by identity; others by SQLAlchemy's cache key, which takes longer.
    """
    if params is not None:
        if (prepared := _built.get(statement)) is None:
            prepared = _built[statement] = Prepared(statement)
        return prepared, prepared.arguments(params)
    key = _inner(statement)._generate_cache_key()
    if (prepared := _shapes.get(key.key)) is None:
        prepared = _shapes[key.key] = Prepared(statement, key)
    values = prepared.compiled.construct_params(extracted_parameters=key.bindparams)
    return prepared.expanded(values) if prepared.expands else (prepared, prepared.arguments(values))


def _inner(statement: Statement) -> Any:
    return statement.element if isinstance(statement, FromStatement) else statement


class Prepared:
    """A statement as SQLAlchemy compiled it.

    Attributes:
        statement: What was compiled.
        sql: Its text.
        reads: Whether it only reads.
        expands: Whether it has an `IN`, whose text depends on how many values there are: see `expanded`.
    """

    def __init__(self, statement: Statement, cache_key: Any = None) -> None:
        inner = _inner(statement)
        compiled = inner.compile(dialect=_DIALECT, cache_key=cache_key)
        self.statement = statement
        self.compiled: Any = compiled
        self.sql = str(compiled)
        self.reads = isinstance(inner, Select)
        self.expands = bool(compiled.post_compile_params)
        self._names: tuple[str, ...] = tuple(compiled.positiontup or ())
        self._given = {name: bind.effective_value for bind, name in compiled.bind_names.items() if not bind.required}
        processors: Mapping[str, Processor] = compiled._bind_processors
        self._processors = [(index, processors[name]) for index, name in enumerate(self._names) if name in processors]
        self._defaults = {column.key: column.default.arg for column in getattr(compiled, "insert_prefetch", ())}
        self._columns: list[Any] = list(compiled._result_columns)
        self._readers = tuple(self._parts(inner))

    def arguments(self, params: Mapping[str, Any]) -> list[Any]:
        """Return the values of `$1`, `$2`, ... as asyncpg takes them."""
        if self._given:
            params = {**self._given, **params}
        if self._defaults:
            made = {name: default(None) if callable(default) else default for name, default in self._defaults.items()}
            params = {**params, **{name: value for name, value in made.items() if params.get(name) is None}}
        values = [params[name] for name in self._names]
        for index, process in self._processors:
            values[index] = process(values[index])
        return values

    def expanded(self, params: Mapping[str, Any]) -> "tuple[Prepared, Sequence[Any]]":
        """Return the statement with as many parameters as its `IN` has values, and the values of all."""
        state = self.compiled._process_parameters_for_postcompile(params)
        processors = {**self.compiled._bind_processors, **state.processors}
        given = {**params, **state.parameters}
        values = [(given[name], processors.get(name)) for name in state.positiontup]
        statement = copy.copy(self)
        statement.sql = state.statement
        return statement, [value if process is None else process(value) for value, process in values]

    def read_all(self, rows: Sequence[Any]) -> list[Any]:
        """Return the first entity or value of each row.

        Raises:
            SchemaOutdatedError: A row holds what this version does not know. The message says so when it was written for good.
        """
        read = self._readers[0]
        try:
            return [read(row) for row in rows]
        except Exception as problem:
            if self.reads:
                raise
            refused = _stored_unread(problem)
        raise refused  # outside of the except block: the first error may show the value

    def read_rows(self, rows: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Return the entities and values of each row of a statement that reads."""
        return [tuple([read(row) for read in self._readers]) for row in rows]

    def column_of(self, key_column: Any) -> int:
        """Return where in a row a column is."""
        wanted = inspect(key_column).property.columns[0]
        return next(index for index, entry in enumerate(self._columns) if wanted in _table_columns(entry))

    def _parts(self, statement: Any) -> Iterator[Callable[[Any], Any]]:
        """Yield for each entity or value of a row how it is read."""
        position = 0
        for model in _returned(statement, len(self._columns)):
            if model is None:
                yield _value_reader(position, self._columns[position].type)
                position += 1
            else:
                mapper: Mapper[Any] = inspect(model)
                entries = self._columns[position : position + len(mapper.columns)]
                keys = [mapper.get_property_by_column(_mapped(mapper, entry)).key for entry in entries]
                yield builder(model, keys, [entry.type for entry in entries], position)
                position += len(entries)
        assert position == len(self._columns), "a column stands twice among what is returned"  # noqa: S101 -- a mistake in a repository


def _returned(statement: Any, columns: int) -> list[type[SQLModel] | None]:
    """Say of what a row is made: entities, and None for single values."""
    if isinstance(statement, Select):
        described = statement.column_descriptions
        return [d["expr"] if isinstance(d["expr"], type) else None for d in described]
    entity: type[SQLModel] = statement.entity_description["entity"]
    return [entity] if columns == len(inspect(entity).columns) else [None] * columns


def _table_columns(entry: Any) -> list[Any]:
    return [thing for thing in entry.objects if isinstance(getattr(thing, "table", None), Table)]


def _mapped(mapper: Mapper[Any], entry: Any) -> Any:
    return next(column for column in _table_columns(entry) if column in mapper.columns.values())


def _result_processor(kind: TypeEngine[Any]) -> Processor | None:
    """Return what SQLAlchemy does to a value of this type, where asyncpg has not done it."""
    if isinstance(kind, UTCDateTime):
        return None  # asyncpg's are in UTC
    return kind.dialect_impl(_DIALECT).result_processor(_DIALECT, None)


def _value_reader(position: int, kind: TypeEngine[Any]) -> Callable[[Any], Any]:
    process = _result_processor(kind)
    if process is None:
        return lambda row: row[position]
    return lambda row: process(row[position])


def builder(
    model: type[M], keys: Sequence[str], types: Sequence[TypeEngine[Any]], offset: int = 0
) -> Callable[[Any], M]:
    """Make a function from a row to a detached instance, as the ORM would have loaded it: identity key, nothing changed, every field set.

    A `Model(**row)` would validate what the database holds already, and take seven times as long.

    Args:
        model: What a row becomes.
        keys: Its fields, in the order of the row's columns.
        types: The columns' types.
        offset: Where in the row they begin.
    """
    configure_mappers()
    mapper: Any = inspect(model)
    manager = mapper.class_manager
    # What the ORM's own loading uses too. It is private; a test guards it, and should it go, all that is lost is speed.
    new_state = getattr(manager, "_state_constructor", None)
    if new_state is None:
        return public_builder(model, keys, types, offset)
    processors = [(index, process) for index, kind in enumerate(types) if (process := _result_processor(kind))]
    identities = [keys.index(mapper.get_property_by_column(column).key) for column in mapper.primary_key]
    identity, one = identities[0], len(identities) == 1
    names, fields, end = tuple(keys), frozenset(model.model_fields), offset + len(keys)
    identity_class = mapper.class_
    new, set_attribute = object.__new__, object.__setattr__

    def build(row: Any) -> M:
        values = list(row[offset:end]) if offset or len(row) != end else list(row)
        for index, process in processors:
            values[index] = process(values[index])
        instance: M = new(model)
        # What pydantic documents of an instance, and what SQLModel.__new__ does at four times the cost.
        set_attribute(instance, "__pydantic_fields_set__", set(fields))
        set_attribute(instance, "__pydantic_extra__", None)
        set_attribute(instance, "__pydantic_private__", None)
        attributes: Any = instance.__dict__
        attributes.update(zip(names, values))  # noqa: B905 -- as many as columns; asking again takes half as long again
        attributes["_sa_instance_state"] = state = new_state(instance, manager)
        state.key = (identity_class, (values[identity],) if one else tuple([values[i] for i in identities]), None)
        return instance

    return build


def public_builder(
    model: type[M], keys: Sequence[str], types: Sequence[TypeEngine[Any]], offset: int = 0
) -> Callable[[Any], M]:
    """Do what `builder` does by what SQLAlchemy documents, in three times the time."""
    manager: Any = inspect(model).class_manager
    columns = [
        (offset + index, key, _result_processor(kind))
        for index, (key, kind) in enumerate(zip(keys, types, strict=True))
    ]
    fields = frozenset(model.model_fields)

    def build(row: Any) -> M:
        instance: M = manager.new_instance()
        for index, key, process in columns:
            set_committed_value(instance, key, row[index] if process is None else process(row[index]))
        object.__setattr__(instance, "__pydantic_fields_set__", set(fields))
        make_transient_to_detached(instance)
        return instance

    return build


def _stored_unread(problem: Exception) -> ControlPlaneError:
    """Say that a change was made although what came back cannot be read: whoever thinks that it failed makes it twice."""
    said = "the change was made, but the row as it is now cannot be read"
    if not isinstance(problem, SchemaOutdatedError):
        return ControlPlaneError(said, details={"stored": True})
    return SchemaOutdatedError(
        f"{said}: {problem.message}", hint=problem.hint, details={**problem.details, "stored": True}
    )


# --- what both have ---------------------------------------------------------------------------------------------------


async def _begin_nested(session: AsyncSession) -> AsyncSessionTransaction:
    return await session.begin_nested()


# What RETURNING brings is newer than what the session holds, and there is nothing else to bring into line.
_WRITING: Mapping[str, Any] = {"populate_existing": True, "synchronize_session": False}


# Built once: building a statement, and looking up its compiled form, costs more than running it.


@functools.cache
def _one_by(model: Any, column: str) -> Select[Any]:
    """Select the row with the value `key` in a unique column."""
    return select(model).where(getattr(model, column) == bindparam("key"))


@functools.cache
def many_by(model: Any, column: str) -> Select[Any]:
    """Select the rows that have one of the values `keys` in a unique column."""
    attribute: Any = getattr(model, column)
    return select(model).where(attribute == any_(bindparam("keys", type_=ARRAY(attribute.type))))


_WRITES = {Insert: "INSERT", Update: "UPDATE", Delete: "DELETE"}


def grants_for(statement: Statement, *, role: str | None = None) -> str:
    """Say which GRANTs let a role run the statement, and no more than that."""
    to = '"' + role.replace('"', '""') + '"' if role else "<your role>"
    inner: Any = statement.element if isinstance(statement, FromStatement) else statement
    nodes = list(visitors.iterate(inner))
    tables = {str(node) for node in nodes if isinstance(node, Table)}
    written = set() if isinstance(inner, Select) else {str(inner.table)}
    schemas = sorted({table.partition(".")[0] for table in tables | written})
    grants = [f"GRANT USAGE ON SCHEMA {', '.join(schemas)} TO {to};"]
    if written:
        verb = next(verb for kind, verb in _WRITES.items() if isinstance(inner, kind))
        replaces = any(isinstance(node, OnConflictDoUpdate) for node in nodes)
        grants.append(f"GRANT SELECT, {verb}{', UPDATE' if replaces else ''} ON {', '.join(written)} TO {to};")
    if tables - written:
        grants.append(f"GRANT SELECT ON {', '.join(sorted(tables - written))} TO {to};")
    return f"As the owner of the schema run: {' '.join(grants)}"
