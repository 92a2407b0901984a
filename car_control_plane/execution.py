"""Runs statements: what a repository wants from the database, kept apart from the way it is run.

Repositories build statements and hand them to an executor. `SessionExecutor` runs them in the caller's session: in its transaction and with its
identity map. Whatever goes wrong leaves it as one of our errors, free of the driver's. It never commits.
"""

from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, LiteralString, Protocol, TypeVar, TypeVarTuple, cast, overload

from sqlalchemy import Delete, Insert, Select, Table, Update, bindparam
from sqlalchemy.dialects.postgresql.dml import OnConflictDoUpdate
from sqlalchemy.engine.result import ScalarResult, TupleResult
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSessionTransaction
from sqlalchemy.orm import FromStatement
from sqlalchemy.orm.attributes import instance_state
from sqlalchemy.sql import visitors
from sqlmodel import SQLModel, select
from sqlmodel.ext.asyncio.session import AsyncSession
from sqlmodel.sql.expression import Select as SelectOfRows, SelectOfScalar

from car_control_plane.errors import AccessDeniedError, PermissionDeniedError, translate

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


class SessionExecutor:
    """Runs a repository's statements in a session; every method is one round trip and may be cancelled."""

    def __init__(self, session: AsyncSession | AsyncReadSession) -> None:
        # Both are SQLAlchemy's AsyncSession at run time; the protocol only hides the writing half from type checkers.
        self._session: AsyncSession = session  # type: ignore[assignment]

    async def one_or_none(self, statement: Statement, params: Mapping[str, Any] | None = None) -> Any:
        """Return the first entity or value of the statement, or None. Rows already in the session take the statement's values if it writes."""
        return (await self._scalars(statement, params)).first()

    async def all(self, statement: Statement) -> list[Any]:
        """Return every entity or value of the statement, in its order."""
        return list(await self._scalars(statement))

    async def rows(self, statement: SelectOfRows[*Ts]) -> Sequence[tuple[*Ts]]:
        """Return every row of the statement, in its order."""
        return (await self._run(self._session.exec(statement), cast("Select[Any]", statement))).all()

    async def get(self, model: type[M], key_column: Any, key: Any) -> M | None:
        """Return the row with this primary key, or None; no round trip when the session holds a fresh one."""
        sync = self._session.sync_session
        if len(sync.identity_map):  # most often the session is new, and a key is not worth making
            row = sync.identity_map.get(sync.identity_key(model, key))
            if row is not None and not instance_state(row).expired_attributes:
                return cast("M", row)
        # Built once for each model: building and looking up the statement costs more than reading the row.
        if (statement := _GET.get(model)) is None:
            statement = _GET[model] = select(model).where(key_column == bindparam("key"))
        return (await self._scalars(statement, {"key": key})).first()

    def forget(self, model: type[M], key: Any) -> None:
        """Take a deleted row out of the session's identity map."""
        sync = self._session.sync_session
        if (row := sync.identity_map.get(sync.identity_key(model, key))) is not None:
            sync.expunge(row)

    async def fetch(self, sql: LiteralString, *arguments: Any, writes: type[SQLModel]) -> Sequence[Any]:
        """Run one positional statement (`$1`, `$2` …) that inserts into a table; return its rows."""
        self._refuse_read_session()
        needs = Insert(writes.__table__)  # type: ignore[attr-defined]  # SQLAlchemy sets it on mapped classes
        connection = await self._run(self._session.connection(), needs)
        return (await self._run(connection.exec_driver_sql(sql, arguments), needs)).all()

    @asynccontextmanager
    async def atomic(self) -> AsyncGenerator[None]:
        """Make everything inside one unit: a savepoint, released at the end, rolled back on any exception."""
        self._refuse_read_session()
        savepoint: AsyncSessionTransaction = await self._run(_begin_nested(self._session), None)
        try:
            yield
            await self._run(savepoint.commit(), None)
        except BaseException:
            # Also when a flush has failed, for until then the session refuses everything. What cannot be rolled back is gone already.
            with suppress(SQLAlchemyError):
                await savepoint.rollback()
            raise

    async def _scalars(self, statement: Statement, params: Mapping[str, Any] | None = None) -> ScalarResult[Any]:
        options: Mapping[str, Any] = {}
        if not isinstance(statement, Select):
            self._refuse_read_session()
            options = _WRITING
        exec_: Any = self._session.exec
        result: Any = await self._run(exec_(statement, params=params, execution_options=options), statement)
        return result if isinstance(result, ScalarResult) else cast("ScalarResult[Any]", result.scalars())

    def _refuse_read_session(self) -> None:
        if isinstance(self._session, ReadSession):
            raise AccessDeniedError("this session only reads; nothing was written", hint="Write in get_session().")

    async def _run(self, call: Awaitable[T], statement: Statement | None) -> T:
        try:
            return await call
        except Exception as problem:
            error = translate(problem, io=True)
            if error is None or error is problem:
                raise
        if isinstance(error, PermissionDeniedError) and statement is not None:
            error.hint = grants_for(statement, role=self._session.info.get("role"))
        raise error  # outside of the except block: the driver's error, and what it holds, is on no __context__


async def _begin_nested(session: AsyncSession) -> AsyncSessionTransaction:
    return await session.begin_nested()


# What RETURNING brings is newer than what the session holds, and there is nothing else to bring into line.
_WRITING: Mapping[str, Any] = {"populate_existing": True, "synchronize_session": False}

_GET: dict[type[SQLModel], Select[Any]] = {}
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
