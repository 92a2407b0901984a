"""Tenants: find, list, register, change, walk through their life cycle.

Reads and changes are one statement each. A change says in its WHERE what must be true (the version, the statuses it may start from); when it
touches no row, one more query finds out why. So nothing is locked between reading and writing, and the common case costs one round trip.
"""

import functools
import json
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, Unpack

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    bindparam,
    delete,
    exists,
    func,
    or_,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import FromStatement, aliased
from sqlmodel import col, select
from sqlmodel.sql.expression import SelectOfScalar

from car_control_plane.errors import (
    AlreadyExistsError,
    ControlPlaneError,
    InvalidDataError,
    InvalidTransitionError,
    ProtectedError,
    StillReferencedError,
    TenantNotFoundError,
)
from car_control_plane.execution import SessionExecutor, Statement
from car_control_plane.models import (
    SYSTEM_ADMIN_ID,
    SYSTEM_ADMIN_NAME,
    Tenant,
    TenantCreate,
    TenantDatabase,
    TenantEnvironment,
    TenantStatus,
    TenantUpdate,
    sources_of,
)
from car_control_plane.models.base import check_text
from car_control_plane.models.tenants import MAX_REASON
from car_control_plane.repositories.base import (
    Page,
    Repository,
    as_uuid,
    begins_with,
    check_version,
    members,
    normal_text,
    stale,
    validated,
)

if TYPE_CHECKING:
    import builtins  # the repository has a `list` of its own

T = TypeVar("T")
E = TypeVar("E", bound=StrEnum)

BATCH_ROWS = 10_000
"""Rows of one statement in `create_many`: large enough that a round trip is free, small enough that memory stays flat."""

MAX_CONFLICTS = 1_000
"""Conflicts `create_many` reports one by one; beyond, it counts."""


_ORDER = (col(Tenant.created_at), col(Tenant.tenant_id))


class TenantFilter(TypedDict, total=False):
    """Which tenants: those that fulfil every condition given.

    Attributes:
        status: One status, or any of several.
        environment: One environment, or any of several.
        name_prefix: What the name begins with; upper and lower case differ.
        labels: Labels the tenant has with exactly these values.
    """

    status: TenantStatus | Iterable[TenantStatus] | None
    environment: TenantEnvironment | Iterable[TenantEnvironment] | None
    name_prefix: str | None
    labels: Mapping[str, str] | None


@dataclass(frozen=True, slots=True)
class Conflict:
    """A tenant that was not created because its name or id is taken.

    Attributes:
        index: Its position in the input, from 0.
        tenant_id: The id it would have had.
        name: Its name.
    """

    index: int
    tenant_id: uuid.UUID
    name: str


@dataclass(frozen=True, slots=True)
class CreateManyResult:
    """What `create_many` did.

    Attributes:
        created: How many tenants were created.
        skipped: How many were not, because their name or id is taken.
        conflicts: The first 1,000 of those, in input order.
    """

    created: int
    skipped: int
    conflicts: tuple[Conflict, ...]


class TenantRepository(Repository):
    """The tenants of the control plane.

    Every verb is one round trip unless it says otherwise; a change that is refused costs one more, to find out why. Refused changes write
    nothing and leave the session usable.
    """

    # --- finding ------------------------------------------------------------------------------------------------------

    async def get(self, tenant_id: uuid.UUID) -> Tenant:
        """Return the tenant with this id; no round trip when the session holds it already.

        Raises:
            TenantNotFoundError: There is none.
            InvalidDataError: `tenant_id` is not a UUID.
        """
        tenant = await self.get_or_none(tenant_id)
        if tenant is None:
            error = _not_found(tenant_id)
            raise error
        return tenant

    async def get_or_none(self, tenant_id: uuid.UUID) -> Tenant | None:
        """Return the tenant with this id, or None; no round trip when the session holds it already.

        Raises:
            InvalidDataError: `tenant_id` is not a UUID.
        """
        return await self._executor.get(Tenant, col(Tenant.tenant_id), as_uuid(tenant_id, "tenant_id"))

    async def get_many(self, tenant_ids: Iterable[uuid.UUID]) -> dict[uuid.UUID, Tenant]:
        """Return the tenants with these ids by id; ids without a tenant are left out. One query however many ids.

        Raises:
            InvalidDataError: One of them is not a UUID.
        """
        ids = [as_uuid(tenant_id, "tenant_id") for tenant_id in tenant_ids]
        return await self._many(Tenant, "tenant_id", ids)

    async def get_by_name(self, name: str) -> Tenant:
        """Return the tenant with this name; upper and lower case differ.

        Raises:
            TenantNotFoundError: There is none.
        """
        wanted = normal_text(name, "the name")
        tenant = await self._executor.find(Tenant, col(Tenant.name), wanted)
        if tenant is None:
            raise TenantNotFoundError(f"there is no tenant named {name!r}", details={"name": name})
        return tenant

    async def exists(self, tenant_id: uuid.UUID) -> bool:
        """Tell whether there is a tenant with this id.

        Raises:
            InvalidDataError: `tenant_id` is not a UUID.
        """
        wanted = as_uuid(tenant_id, "tenant_id")
        return bool(await self._executor.one_or_none(_EXISTS, {"key": wanted}))

    async def count(self, **which: Unpack[TenantFilter]) -> int:
        """Count the tenants that fulfil the filters; reads every one of them (tens of milliseconds for a million).

        Raises:
            InvalidDataError: A filter's value is not acceptable.
        """
        return int(
            await self._executor.one_or_none(select(func.count()).select_from(Tenant).where(*_conditions(which)))
        )

    async def list(self, *, limit: int = 50, after: str | None = None, **which: Unpack[TenantFilter]) -> Page[Tenant]:
        """Return one page of the tenants that fulfil the filters, oldest first.

        Ordered by `(created_at, tenant_id)`. However deep the page, the work is one range scan of the index on that pair: a page at the end costs
        what the first one does. No tenant is on two pages; one that is created meanwhile comes at the end.

        Args:
            limit: Rows of the page, 1 to 500.
            after: `next_cursor` of the previous page. Filters may differ from page to page; a cursor is a position, nothing else.
            **which: See `TenantFilter`.

        Raises:
            InvalidDataError: `limit` is out of range, `after` is not a cursor, or a filter's value is not acceptable.

        Source: PostgreSQL manual, "Row Constructor Comparison" (keyset paging).
        """
        return await self._page(_selected(which), _ORDER, limit=limit, after=after)

    def stream(self, **which: Unpack[TenantFilter]) -> AsyncIterator[Tenant]:
        """Iterate over all tenants that fulfil the filters, oldest first, in memory that does not grow.

        One query for every 1,000 rows. Rows are not kept by the session once you let go of them.

        Args:
            **which: See `TenantFilter`.

        Returns:
            Tenants ordered by `(created_at, tenant_id)`.

        Raises:
            InvalidDataError: A filter's value is not acceptable.
        """
        return self._stream(_selected(which), _ORDER)

    # --- creating -----------------------------------------------------------------------------------------------------

    async def create(self, tenant: TenantCreate) -> Tenant:
        """Register one tenant and return it as stored.

        Raises:
            AlreadyExistsError: The name or the id is taken; nothing was written, the session stays usable.
            InvalidDataError: `tenant` is not a valid `TenantCreate` (a mapping is taken as one).
        """
        new = validated(TenantCreate, tenant)
        values = new.model_dump()
        row: Tenant | None = await self._executor.one_or_none(
            _insert_statement(tuple(values)), {f"new_{field}": value for field, value in values.items()}
        )
        if row is None:
            taken = await self.exists(new.tenant_id)
            what = f"the id {new.tenant_id}" if taken else f"the name {new.name!r}"
            raise AlreadyExistsError(
                f"a tenant with {what} exists already", details={"name": new.name, "tenant_id": str(new.tenant_id)}
            )
        return row

    async def create_many(
        self,
        tenants: Iterable[TenantCreate | Mapping[str, Any]] | AsyncIterable[TenantCreate | Mapping[str, Any]],
        *,
        on_conflict: Literal["raise", "skip"] = "raise",
    ) -> CreateManyResult:
        """Register any number of tenants, all or none, in memory that does not grow.

        One statement for every 10,000 tenants inside one savepoint. Two of these running at once over the same names in different order can
        deadlock; PostgreSQL then ends one of them (`ConflictError`, retryable).

        Args:
            tenants: `TenantCreate`s or mappings of their fields; read once, lazily.
            on_conflict: What to do with a tenant whose name or id is taken, in the table or earlier in the input.

        Raises:
            AlreadyExistsError: `on_conflict` is "raise" and something is taken; `details["conflicts"]` names the first of them. Nothing was written.
            InvalidDataError: An item is not a valid `TenantCreate` (`details["index"]` says which), or `on_conflict` is neither. Nothing was
                written.
        """
        if on_conflict not in {"raise", "skip"}:
            raise InvalidDataError("on_conflict must be 'raise' or 'skip'")
        skipped = seen = 0
        conflicts: builtins.list[Conflict] = []
        async with self._executor.atomic() as executor:
            async for batch in _batches(tenants):
                found = await _insert(executor, batch, seen)
                if found and on_conflict == "raise":
                    error = _taken(found)
                    raise error
                skipped += len(found)
                seen += len(batch)
                conflicts += found[: MAX_CONFLICTS - len(conflicts)]
        return CreateManyResult(created=seen - skipped, skipped=skipped, conflicts=tuple(conflicts))

    # --- changing -----------------------------------------------------------------------------------------------------

    async def update(
        self, tenant_id: uuid.UUID, changes: TenantUpdate, *, expected_version: int | None = None
    ) -> Tenant:
        """Change what `changes` contains and return the tenant as stored; an empty change writes nothing.

        Raises:
            TenantNotFoundError: There is no such tenant.
            StaleWriteError: Its version is not `expected_version`.
            AlreadyExistsError: The new name is taken.
            ProtectedError: `system_admin` would be renamed.
            InvalidDataError: `changes` is not a valid `TenantUpdate` (a mapping is taken as one).
        """
        values = validated(TenantUpdate, changes).model_dump()
        if not values:
            tenant = await self.get(tenant_id)
            if check_version(expected_version) not in {None, tenant.version}:
                error = stale(f"tenant {tenant.name!r}", expected_version or 0, tenant.version)
                raise error
            return tenant
        return await self._change(tenant_id, values, expected_version=expected_version)

    async def rename(self, tenant_id: uuid.UUID, name: str, *, expected_version: int | None = None) -> Tenant:
        """Give the tenant another name.

        Raises:
            TenantNotFoundError: There is no such tenant.
            StaleWriteError: Its version is not `expected_version`.
            AlreadyExistsError: The name is taken.
            ProtectedError: The tenant is `system_admin`.
            InvalidDataError: The name is not acceptable.
        """
        return await self.update(tenant_id, validated(TenantUpdate, {"name": name}), expected_version=expected_version)

    async def activate(self, tenant_id: uuid.UUID, *, expected_version: int | None = None) -> Tenant:
        """Let a pending, suspended or inactive tenant be used; clears the reason.

        Raises:
            TenantNotFoundError: There is no such tenant.
            InvalidTransitionError: It is active already.
            StaleWriteError: Its version is not `expected_version`.
        """
        return await self._transition(tenant_id, TenantStatus.ACTIVE, None, expected_version)

    async def suspend(
        self, tenant_id: uuid.UUID, *, reason: str | None = None, expected_version: int | None = None
    ) -> Tenant:
        """Stop an active tenant from being used, for now.

        Args:
            tenant_id: Which tenant.
            reason: Why; up to 1,000 characters, kept in `status_reason`.
            expected_version: Change it only at this version.

        Raises:
            TenantNotFoundError: There is no such tenant.
            InvalidTransitionError: It is not active.
            StaleWriteError: Its version is not `expected_version`.
            ProtectedError: The tenant is `system_admin`.
            InvalidDataError: The reason is too long or has control characters.
        """
        return await self._transition(tenant_id, TenantStatus.SUSPENDED, reason, expected_version)

    async def deactivate(
        self, tenant_id: uuid.UUID, *, reason: str | None = None, expected_version: int | None = None
    ) -> Tenant:
        """Take a pending, active or suspended tenant out of use.

        Args:
            tenant_id: Which tenant.
            reason: Why; up to 1,000 characters, kept in `status_reason`.
            expected_version: Change it only at this version.

        Raises:
            TenantNotFoundError: There is no such tenant.
            InvalidTransitionError: It is inactive already.
            StaleWriteError: Its version is not `expected_version`.
            ProtectedError: The tenant is `system_admin`.
            InvalidDataError: The reason is too long or has control characters.
        """
        return await self._transition(tenant_id, TenantStatus.INACTIVE, reason, expected_version)

    async def delete(self, tenant_id: uuid.UUID, *, expected_version: int | None = None) -> None:
        """Forget a tenant that owns no database.

        Raises:
            TenantNotFoundError: There is no such tenant.
            StaleWriteError: Its version is not `expected_version`.
            StillReferencedError: It still owns a database; a database is never silently forgotten.
            ProtectedError: The tenant is `system_admin`.
        """
        key = _changeable(tenant_id, "deleted")
        versioned = check_version(expected_version) is not None
        params = {"key": key} | ({"expected_version": expected_version} if versioned else {})
        if await self._executor.one_or_none(_delete_statement(versioned=versioned), params) is None:
            raise await self._refusal(key, expected_version) or StillReferencedError(
                "the tenant still owns a database",
                hint="Delete its databases first.",
                details={"tenant_id": str(key)},
            )
        self._executor.forget(Tenant, key)

    async def _transition(
        self, tenant_id: uuid.UUID, target: TenantStatus, reason: str | None, expected_version: int | None
    ) -> Tenant:
        if target is not TenantStatus.ACTIVE:
            _changeable(tenant_id, "suspended or deactivated")
        values = {"status": target, "status_reason": _checked_reason(reason)}
        return await self._change(tenant_id, values, expected_version=expected_version)

    async def _change(self, tenant_id: uuid.UUID, values: Mapping[str, Any], *, expected_version: int | None) -> Tenant:
        """Run one UPDATE that states what must be true; when it touches nothing, find out what is not."""
        key = _changeable(tenant_id, "renamed") if "name" in values else as_uuid(tenant_id, "tenant_id")
        target, versioned = values.get("status"), check_version(expected_version) is not None
        params = {"key": key, **{f"new_{field}": value for field, value in values.items()}}
        if versioned:
            params["expected_version"] = expected_version
        statement = _change_statement(tuple(values), target, versioned=versioned)
        tenant: Tenant | None = await self._executor.one_or_none(statement, params)
        if tenant is not None:
            return tenant
        name = values.get("name")
        raise await self._refusal(key, expected_version, target=target) or AlreadyExistsError(
            f"a tenant with the name {name!r} exists already", details={"name": name}
        )

    async def _refusal(
        self, key: uuid.UUID, expected_version: int | None, *, target: TenantStatus | None = None
    ) -> ControlPlaneError | None:
        """Say why a change touched no row; None when neither existence, version nor status explains it."""
        rows = await self._executor.rows(_FACTS, {"key": key})
        if not rows:
            return _not_found(key)
        name, version, status = rows[0]
        if expected_version is not None and version != expected_version:
            return stale(f"tenant {name!r}", expected_version, version)
        if target is not None:
            return InvalidTransitionError(
                f"a tenant cannot change from {status} to {target}",
                hint=f"To become {target}, a tenant must be {' or '.join(sources_of(target))}.",
                details={"tenant_id": str(key), "from": str(status), "to": str(target)},
            )
        return None


# --- statements -------------------------------------------------------------------------------------------------------

# Built once: building one, and looking up its compiled form, costs more than running it.
_FACTS = select(Tenant.name, Tenant.version, Tenant.status).where(Tenant.tenant_id == bindparam("key"))
_EXISTS = select(exists().where(col(Tenant.tenant_id) == bindparam("key")))

# One statement inserts a batch and says which of its rows were left out: those that are not among the returned ones, and repetitions within
# the batch. Names and ids together identify a row of the batch, because either may be what is taken.
_INSERT_MANY = """
WITH input AS MATERIALIZED (
    SELECT * FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[]) WITH ORDINALITY
        AS u(tenant_id, name, environment, status, labels, status_reason, position)
), created AS (
    INSERT INTO control_plane.tenants (tenant_id, name, environment, status, labels, status_reason)
    SELECT tenant_id, name, environment::control_plane.tenant_environment, status::control_plane.tenant_status, labels::jsonb, status_reason
    FROM input ORDER BY position
    ON CONFLICT DO NOTHING
    RETURNING tenant_id, name
)
SELECT i.position
FROM (SELECT tenant_id, name, position, row_number() OVER (PARTITION BY tenant_id, name ORDER BY position) AS occurrence FROM input) AS i
LEFT JOIN created AS c ON c.tenant_id = i.tenant_id AND c.name = i.name
WHERE c.tenant_id IS NULL OR i.occurrence > 1
ORDER BY i.position
"""


async def _insert(executor: SessionExecutor, batch: list[TenantCreate], offset: int) -> list[Conflict]:
    """Insert what is free; return what is not."""
    rows = await executor.fetch(_INSERT_MANY, *_columns(batch), writes=Tenant)
    left_out = ((position - 1, batch[position - 1]) for (position,) in rows)
    return [Conflict(offset + index, tenant.tenant_id, tenant.name) for index, tenant in left_out]


def _columns(batch: list[TenantCreate]) -> Iterator[list[Any]]:
    yield [tenant.tenant_id for tenant in batch]
    yield [tenant.name for tenant in batch]
    yield [tenant.environment.value for tenant in batch]
    yield [tenant.status.value for tenant in batch]
    yield [json.dumps(tenant.labels) if tenant.labels else "{}" for tenant in batch]
    yield [tenant.status_reason for tenant in batch]


async def _batches(
    tenants: Iterable[TenantCreate | Mapping[str, Any]] | AsyncIterable[TenantCreate | Mapping[str, Any]],
) -> AsyncIterator[list[TenantCreate]]:
    """Validate the input and cut it into batches."""
    batch: list[TenantCreate] = []
    index = 0
    async for item in _each(tenants):
        batch.append(item if type(item) is TenantCreate else validated(TenantCreate, item, index=index))
        index += 1
        if len(batch) == BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


async def _each(items: Iterable[T] | AsyncIterable[T]) -> AsyncIterator[T]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


def _selected(which: TenantFilter) -> SelectOfScalar[Tenant]:
    return select(Tenant).where(*_conditions(which))


def _conditions(which: TenantFilter) -> Iterator[ColumnElement[bool]]:
    if unknown := sorted(which.keys() - TenantFilter.__annotations__.keys()):
        raise InvalidDataError(
            f"there is no filter {unknown[0]!r}", hint=f"Filters: {', '.join(TenantFilter.__annotations__)}."
        )
    if (statuses := which.get("status")) is not None:
        yield col(Tenant.status).in_(members(TenantStatus, statuses, "status"))
    if (environments := which.get("environment")) is not None:
        yield col(Tenant.environment).in_(members(TenantEnvironment, environments, "environment"))
    if prefix := which.get("name_prefix"):
        yield from begins_with(col(Tenant.name), prefix)
    if (labels := which.get("labels")) is not None:
        yield col(Tenant.labels).contains(validated(TenantUpdate, {"labels": labels}).labels)


@functools.cache
def _insert_statement(fields: tuple[str, ...]) -> FromStatement[Any]:
    """Build the INSERT of these fields, for parameters `new_` with a field's name; it inserts nothing where a name or id is taken."""
    new: dict[str, BindParameter[Any]] = {field: bindparam(f"new_{field}") for field in fields}
    return FromStatement([Tenant], insert(Tenant).values(new).on_conflict_do_nothing().returning(Tenant))


@functools.cache
def _delete_statement(*, versioned: bool) -> Statement:
    """Build the DELETE of a tenant without databases, for parameters `key` and `expected_version`."""
    owned = exists().where(col(TenantDatabase.tenant_id) == bindparam("key"))
    statement = delete(Tenant).where(col(Tenant.tenant_id) == bindparam("key"), ~owned)
    if versioned:
        statement = statement.where(col(Tenant.version) == bindparam("expected_version"))
    return statement.returning(col(Tenant.tenant_id))


@functools.cache
def _change_statement(fields: tuple[str, ...], target: TenantStatus | None, *, versioned: bool) -> FromStatement[Any]:
    """Build the UPDATE of these fields, for parameters `key`, `expected_version`, and `new_` with a field's name.

    Run as it is, the ORM would annotate it each time, and with that look it up anew; inside a FromStatement it is found at once.
    """
    key: BindParameter[uuid.UUID] = bindparam("key")
    new: dict[str, BindParameter[Any]] = {field: bindparam(f"new_{field}") for field in fields}
    statement = update(Tenant).where(col(Tenant.tenant_id) == key).values(new)
    if versioned:
        statement = statement.where(col(Tenant.version) == bindparam("expected_version"))
    if target is not None:
        statement = statement.where(or_(*(col(Tenant.status) == source for source in sources_of(target))))
    if "name" in new:  # asked here, because a unique violation would cost the caller the transaction
        other = aliased(Tenant)
        statement = statement.where(~exists().where(col(other.name) == new["name"], col(other.tenant_id) != key))
    return FromStatement([Tenant], statement.returning(Tenant))


# --- what callers pass, and what they are told ------------------------------------------------------------------------


def _changeable(tenant_id: uuid.UUID, done: str) -> uuid.UUID:
    key = as_uuid(tenant_id, "tenant_id")
    if key == SYSTEM_ADMIN_ID:
        raise ProtectedError(f"the tenant {SYSTEM_ADMIN_NAME} cannot be {done}")
    return key


def _checked_reason(reason: str | None) -> str | None:
    if reason is None:
        return None
    try:
        text = check_text(reason)
        problem = f"must have at most {MAX_REASON} characters" if len(text) > MAX_REASON else ""
    except (ValueError, TypeError) as refused:
        text, problem = "", str(refused)
    if problem:
        raise InvalidDataError(f"the reason {problem}")
    return text


def _not_found(tenant_id: uuid.UUID) -> TenantNotFoundError:
    return TenantNotFoundError(f"there is no tenant with the id {tenant_id}", details={"tenant_id": str(tenant_id)})


def _taken(conflicts: list[Conflict]) -> AlreadyExistsError:
    names = ", ".join(repr(conflict.name) for conflict in conflicts[:3])
    more = f" and {len(conflicts) - 3} more" if len(conflicts) > 3 else ""  # noqa: PLR2004 -- three names fit a line
    return AlreadyExistsError(
        f"the name or id of {names}{more} is taken; nothing was written",
        hint="Pass on_conflict='skip' to create the others.",
        details={
            "conflicts": [
                {"index": one.index, "tenant_id": str(one.tenant_id), "name": one.name}
                for one in conflicts[:MAX_CONFLICTS]
            ]
        },
    )
