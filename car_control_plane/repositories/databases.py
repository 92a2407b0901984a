"""Tenant databases: register them, find them, open the way in, see whether it works.

The table holds a connection string sealed, and beside it what may be seen: host, port and name of the database. Those are written from the
connection string and compared with it whenever it is opened; nobody connects to what the columns say. Plain text is in no row, statement, log or
error of this module: what comes in is a `SecretStr`, what goes out a `ConnectionString`, and between the two it is a `Dsn`, which prints masked.

Reads and changes are one statement each, as in `tenants`: a change says in its WHERE what must be true, and one more query explains a refusal.
Sealing costs one query more, for what it needs to know of the tenant and of the key. A row that cannot be opened can still be listed, changed,
verified and deleted, and stops no other.

Which addresses are acceptable is decided in `dialing`, what a sealed value looks like in `encryption`.
"""

import asyncio
import builtins
import functools
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final, TypedDict, Unpack
from urllib.parse import quote

import sqlalchemy
from pydantic import AfterValidator, Field, SecretStr
from sqlalchemy import (
    BindParameter,
    ColumnElement,
    bindparam,
    delete,
    exists,
    func,
    literal_column,
    null,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import FromStatement, aliased
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession
from sqlmodel.sql.expression import SelectOfScalar

from car_control_plane import dsn as dsns
from car_control_plane.dialing import ConnectionPolicy, connect_tenant, tls_version
from car_control_plane.dsn import Dsn
from car_control_plane.encryption.values import KID, ConnectionString
from car_control_plane.errors import (
    AlreadyExistsError,
    ConfigurationError,
    ConnectionUnavailableError,
    ControlPlaneError,
    DecryptionError,
    EncryptionError,
    InvalidDataError,
    TenantDatabaseNotFoundError,
    TenantNotFoundError,
    translate,
)
from car_control_plane.execution import AsyncReadSession, Door, Statement
from car_control_plane.models import (
    EncryptionKey,
    Model,
    Tenant,
    TenantDatabase,
    TenantDatabaseCreate,
    TenantDatabaseStatus,
    TenantDatabaseUpdate,
    uuid7,
)
from car_control_plane.models.databases import Purpose
from car_control_plane.repositories.base import (
    Page,
    Repository,
    as_uuid,
    check_version,
    members,
    normal_text,
    stale,
    validated,
)
from car_control_plane.repositories.keys import EncryptionKeyRepository

if TYPE_CHECKING:
    from car_control_plane.encryption.keyring import Keyring

_log = logging.getLogger("car_control_plane.secrets")

VERIFY_SECONDS = 10.0
"""How long `verify` waits for a server unless told otherwise."""

MAX_VERIFY_SECONDS = 25.0
"""The longest time limit of `verify`: the caller's transaction waits meanwhile, and after 30 seconds the server ends it unless told otherwise."""

_CLOSE_SECONDS = 2.0

MAX_NAME_BYTES = 63
"""The longest name of a database. PostgreSQL cuts a longer one without a word, and what is left may be the name of another database."""

MAX_HOST = 255


_ORDER = (col(TenantDatabase.created_at), col(TenantDatabase.id))


class TenantDatabaseFilter(TypedDict, total=False):
    """Which tenant databases: those that fulfil every condition given.

    Attributes:
        tenant_id: The tenant they belong to.
        status: One status, or any of several.
        purpose: What they are for.
        kid: The id of the key their connection strings are sealed with.
        host: The host they are on, as the connection string writes it.
    """

    tenant_id: uuid.UUID | None
    status: TenantDatabaseStatus | Iterable[TenantDatabaseStatus] | None
    purpose: str | None
    kid: str | None
    host: str | None


_NAMED: Final = ("host", "hostaddr", "port", "user", "password", "dbname", "database", "sslpassword")


def _check_options(options: dict[str, str]) -> dict[str, str]:
    """Refuse what has a field of its own, and secrets: options are shown."""
    if taken := sorted(options.keys() & set(_NAMED)):
        msg = f"must not have {taken[0]}: it has a field of its own, or goes into a connection string"
        raise ValueError(msg)
    return options


class TenantDatabaseParts(Model):
    """What is needed to register a tenant database, with the connection string in parts: nothing needs to be percent-encoded.

    Attributes:
        host: Name or address of the server, IPv6 without brackets; a directory for a unix socket.
        database: Name of the database.
        user: Who logs in.
        password: With what; None where the server asks for none.
        options: libpq's further parameters, `sslrootcert` and `application_name` for example; no secrets.
    """

    host: str = Field(min_length=1)
    port: int = Field(default=5432, ge=1, le=65535)
    database: str = Field(min_length=1)
    user: str = Field(min_length=1)
    password: SecretStr | None = None
    purpose: Purpose = "primary"
    options: Annotated[dict[str, str], AfterValidator(_check_options)] = Field(default_factory=dict)

    def connection_string(self) -> SecretStr:
        """Write the parts as one connection string."""
        secret = SecretStr("") if self.password is None else self.password
        query = "&".join(f"{_quoted(name)}={_quoted(value)}" for name, value in self.options.items())
        return SecretStr(
            f"postgresql://{_quoted(self.user)}:{_quoted(secret.get_secret_value())}@{_quoted(self.host)}:{self.port}"
            f"/{_quoted(self.database)}?{query}"
        )


@dataclass(frozen=True, slots=True)
class DatabaseVerification:
    """What `verify` found; true when the database could be used.

    Attributes:
        database: The row, with what was found recorded in it.
        ok: Its server was reached, accepted the connection string, and answered.
        latency_seconds: How long connecting and asking took.
        server_version: As the server reports it, `18.4` for example; None when it was not reached.
        tls_version: Of the connection, `TLSv1.3` for example; None without TLS.
        error: Why it is not ok.
    """

    database: TenantDatabase
    ok: bool
    latency_seconds: float
    server_version: str | None
    tls_version: str | None
    error: ControlPlaneError | None

    def __bool__(self) -> bool:
        return self.ok


class TenantDatabaseRepository(Repository):
    """The databases of the tenants.

    Every verb is one round trip unless it says otherwise; a change that is refused costs one more, to find out why. Refused changes write
    nothing and leave the session usable.

    Args:
        where: A session, whose transaction the verbs run in, or a manager.
        keyring: What seals and opens; None for a repository that does neither, and only lists, changes status or deletes.
        policy: What a tenant's connection string may say, and where it may lead; by default one remote host with verified TLS.
        actor: Who is at work, for the log: an account, a request, a job.

    Raises:
        InvalidDataError: `actor` is not text, or has control characters.
    """

    def __init__(
        self,
        where: AsyncSession | AsyncReadSession | Door,
        keyring: "Keyring | None" = None,
        *,
        policy: ConnectionPolicy | None = None,
        actor: str | None = None,
    ) -> None:
        super().__init__(where)
        self._keys = EncryptionKeyRepository(where)
        self._keyring = keyring
        self._policy = policy if policy is not None else ConnectionPolicy()
        self._actor = None if actor is None else normal_text(actor, "the actor")

    # --- finding ------------------------------------------------------------------------------------------------------

    async def get(self, database_id: uuid.UUID) -> TenantDatabase:
        """Return the tenant database with this id; no round trip when the session holds it already.

        Raises:
            TenantDatabaseNotFoundError: There is none.
            InvalidDataError: `database_id` is not a UUID.
        """
        database = await self.get_or_none(database_id)
        if database is None:
            error = _not_found(database_id)
            raise error
        return database

    async def get_or_none(self, database_id: uuid.UUID) -> TenantDatabase | None:
        """Return the tenant database with this id, or None; no round trip when the session holds it already.

        Raises:
            InvalidDataError: `database_id` is not a UUID.
        """
        return await self._executor.get(TenantDatabase, col(TenantDatabase.id), as_uuid(database_id, "database_id"))

    async def get_many(self, database_ids: Iterable[uuid.UUID]) -> dict[uuid.UUID, TenantDatabase]:
        """Return the tenant databases with these ids by id; ids without one are left out. One query however many ids.

        Raises:
            InvalidDataError: One of them is not a UUID.
        """
        ids = [as_uuid(database_id, "database_id") for database_id in database_ids]
        return await self._many(TenantDatabase, "id", ids)

    async def list_for_tenant(self, tenant_id: uuid.UUID) -> builtins.list[TenantDatabase]:
        """Return every database of a tenant, oldest first; none for a tenant that has none, or does not exist.

        Raises:
            InvalidDataError: `tenant_id` is not a UUID.
        """
        return await self._executor.all(_OF_TENANT, {"key": as_uuid(tenant_id, "tenant_id")})

    async def count(self, **which: Unpack[TenantDatabaseFilter]) -> int:
        """Count the tenant databases that fulfil the filters.

        Raises:
            InvalidDataError: A filter's value is not acceptable.
        """
        statement = select(func.count()).select_from(TenantDatabase).where(*_conditions(which))
        return int(await self._executor.one_or_none(statement))

    async def list(
        self, *, limit: int = 50, after: str | None = None, **which: Unpack[TenantDatabaseFilter]
    ) -> Page[TenantDatabase]:
        """Return one page of the tenant databases that fulfil the filters, oldest first.

        Ordered by `(created_at, id)`. However deep the page, the work is one range scan of an index. No row is on two pages; one that is created
        meanwhile comes at the end. Nothing is opened: rows that cannot be are in the list like any other.

        Args:
            limit: Rows of the page, 1 to 500.
            after: `next_cursor` of the previous page. Filters may differ from page to page; a cursor is a position, nothing else.
            **which: See `TenantDatabaseFilter`.

        Raises:
            InvalidDataError: `limit` is out of range, `after` is not a cursor, or a filter's value is not acceptable.

        Source: PostgreSQL manual, "Row Constructor Comparison" (keyset paging).
        """
        return await self._page(_selected(which), _ORDER, limit=limit, after=after)

    def stream(self, **which: Unpack[TenantDatabaseFilter]) -> AsyncIterator[TenantDatabase]:
        """Iterate over all tenant databases that fulfil the filters, oldest first, in memory that does not grow.

        One query for every 1,000 rows. Rows are not kept by the session once you let go of them.

        Args:
            **which: See `TenantDatabaseFilter`.

        Returns:
            Rows ordered by `(created_at, id)`.

        Raises:
            InvalidDataError: A filter's value is not acceptable.
        """
        return self._stream(_selected(which), _ORDER)

    # --- registering and changing -------------------------------------------------------------------------------------

    async def register(
        self, tenant_id: uuid.UUID, create: TenantDatabaseCreate | TenantDatabaseParts | Mapping[str, Any]
    ) -> TenantDatabase:
        """Register a database of a tenant and return it as stored, its connection string sealed for this row.

        Two round trips; two more for the first row that a key seals, because the key's check value goes on record before anything depends on it.
        Host, port and name of the database are taken from the connection string; with several hosts, which the policy must allow, the first host
        stands for all of them.

        Args:
            tenant_id: Whose database it is.
            create: What to register: a connection string or its parts; a mapping of the fields of either.

        Raises:
            TenantNotFoundError: There is no such tenant.
            AlreadyExistsError: The tenant already has a database for this purpose.
            InvalidDataError: `create` is neither, or the connection string is none, or says what the policy does not let a tenant say.
            AccessDeniedError: The policy does not let the tenant's environment use this address.
            ConfigurationError: The repository has no keyring, the keyring no current key, or its key is not the one on record under its id.
            KeyUnavailableError: Nobody can tell now which key is current.
        """
        form = _form_of(create)
        del create  # error trackers print the variables of every frame an error passes
        if isinstance(form, InvalidDataError):
            raise form
        key = as_uuid(tenant_id, "tenant_id")
        kid = (await self._sealing().current()).kid
        rows = await self._executor.rows(_TENANT, {"key": key, "kid": kid})
        if not rows:
            raise TenantNotFoundError(f"there is no tenant with the id {key}", details={"tenant_id": str(key)})
        database_id = uuid7()
        values = await self._sealed(form.connection_string, key, database_id, *rows[0])
        values |= {"id": database_id, "tenant_id": key, "purpose": form.purpose}
        database: TenantDatabase | None = await self._executor.one_or_none(
            _insert_statement(tuple(values)), {f"new_{field}": value for field, value in values.items()}
        )
        if database is None:
            error = _taken(form.purpose, key)
            raise error
        return database

    async def update(
        self,
        database_id: uuid.UUID,
        changes: TenantDatabaseUpdate | Mapping[str, Any],
        *,
        expected_version: int | None = None,
    ) -> TenantDatabase:
        """Change purpose, connection string, or both, and return the row as stored; an empty change writes nothing.

        With a connection string it does what `update_connection_string` does, at the same cost.

        Raises:
            TenantDatabaseNotFoundError: There is no such tenant database.
            StaleWriteError: Its version is not `expected_version`.
            AlreadyExistsError: The tenant already has a database for the new purpose.
            InvalidDataError: `changes` is not a valid `TenantDatabaseUpdate`, or the connection string is not acceptable, as for `register`.
            AccessDeniedError: As for `register`.
            ConfigurationError: As for `register`, with a connection string.
            KeyUnavailableError: As for `register`, with a connection string.
        """
        form = _changes_of(changes)
        del changes
        if isinstance(form, InvalidDataError):
            raise form
        values = form.model_dump()
        secret: SecretStr | None = values.pop("connection_string", None)
        if secret is not None:
            values |= await self._resealed(database_id, secret)
        if not values:
            database = await self.get(database_id)
            if check_version(expected_version) not in {None, database.version}:
                error = stale(f"tenant database {database.id}", expected_version or 0, database.version)
                raise error
            return database
        return await self._change(database_id, values, expected_version=expected_version)

    async def update_connection_string(
        self, database_id: uuid.UUID, secret: SecretStr | ConnectionString, *, expected_version: int | None = None
    ) -> TenantDatabase:
        """Give a tenant database another connection string, with the current key; host, port and name change with it.

        Forgets what was verified, for that was about the former one. Does not open the former one, so it also mends a row that cannot be opened.
        Two round trips, two more for the first row that a key seals.

        Raises:
            TenantDatabaseNotFoundError: There is no such tenant database.
            StaleWriteError: Its version is not `expected_version`.
            InvalidDataError: It is no `SecretStr` or `ConnectionString`, or is not acceptable, as for `register`.
            AccessDeniedError: As for `register`.
            ConfigurationError: As for `register`.
            KeyUnavailableError: As for `register`.
        """
        known = isinstance(secret, SecretStr | ConnectionString)
        if not known:
            del secret
            raise InvalidDataError("a connection string must be given as SecretStr or ConnectionString")
        values = await self._resealed(database_id, secret)
        return await self._change(database_id, values, expected_version=expected_version)

    async def set_status(
        self, database_id: uuid.UUID, status: TenantDatabaseStatus, *, expected_version: int | None = None
    ) -> TenantDatabase:
        """Say whether the database may be used: any status may follow any other.

        Raises:
            TenantDatabaseNotFoundError: There is no such tenant database.
            StaleWriteError: Its version is not `expected_version`.
            InvalidDataError: There is no such status.
        """
        values = {"status": members(TenantDatabaseStatus, [status], "status")[0]}
        return await self._change(database_id, values, expected_version=expected_version)

    async def delete(self, database_id: uuid.UUID, *, expected_version: int | None = None) -> None:
        """Forget a tenant database. The database itself is not touched.

        Raises:
            TenantDatabaseNotFoundError: There is no such tenant database.
            StaleWriteError: Its version is not `expected_version`.
        """
        key = as_uuid(database_id, "database_id")
        versioned = check_version(expected_version) is not None
        params = {"key": key} | ({"expected_version": expected_version} if versioned else {})
        if await self._executor.one_or_none(_delete_statement(versioned=versioned), params) is None:
            raise await self._refusal(key, expected_version)
        self._executor.forget(TenantDatabase, key)

    # --- opening ------------------------------------------------------------------------------------------------------

    async def connection_string(self, database_id: uuid.UUID) -> ConnectionString:
        """Open the connection string of a tenant database.

        Reads the row anew, whatever the session holds. The log `car_control_plane.secrets` gets a line with who opens what: the actor and the
        role in the database; database, tenant, purpose and key; never the secret. A refusal is logged as a warning.

        Raises:
            TenantDatabaseNotFoundError: There is no such tenant database.
            DecryptionError: The value was altered, belongs to another row, was sealed with another key of the same name, or was never sealed; or
                host, port or name in the row are not those of the connection string (`details["columns"]`): somebody has changed the row, and
                one class of errors says so, because what follows is the same.
            UnknownKeyError: The key it is sealed with is not in the keyring; `details["kid"]` names it.
            KeyUnavailableError: The keyring cannot be asked for it now.
            ConfigurationError: The repository has no keyring.
        """
        database, _, role = await self._found(database_id)
        secret, _ = await self._opened(database, role)
        return secret

    async def verify(self, database_id: uuid.UUID, *, timeout: float | None = None) -> DatabaseVerification:  # noqa: ASYNC109 -- part of what is recorded
        """Connect to a tenant database as its users would, and record in its row what came of it.

        Opens the connection string, connects under the policy and the tenant's present environment, asks the server something, and closes. What
        goes wrong there is a result, not an exception: `error` says it, and the row keeps its message. When it is the connection string that
        cannot be opened, nothing is recorded: that may be this process's key, and no fault of the database. The status stays as it is. Two round trips
        to the control plane, whose transaction waits meanwhile, for `idle_in_transaction_timeout_seconds` at most.

        Args:
            database_id: Which tenant database.
            timeout: Seconds to wait for its server, up to 25; 10 by default. Closing takes at most 2 more.

        Raises:
            TenantDatabaseNotFoundError: There is no such tenant database, or it was deleted meanwhile.
            StaleWriteError: The row was changed meanwhile; nothing was recorded, for it might be about another connection string.
            AccessDeniedError: The session only reads; nothing was opened.
            InvalidDataError: `timeout` is no such number.
            ConfigurationError: The repository has no keyring.
        """
        limit = _checked_seconds(timeout)
        self._executor.require_writable()  # now, not when it comes to recording
        database, environment, role = await self._found(database_id)
        started = time.perf_counter()
        try:
            _, dsn = await self._opened(database, role)
        except EncryptionError as problem:
            closed = problem.with_traceback(None)
            return DatabaseVerification(database, False, time.perf_counter() - started, None, None, closed)
        found = await _asked(dsn, database.tenant_id, environment, self._policy, limit)
        latency = time.perf_counter() - started
        error = found.error
        values = {
            "server_version": found.server_version,
            "tls_version": found.tls_version,
            "verification_error": None if error is None else error.message,
        }
        recorded = await self._change(database.id, values, expected_version=database.version)
        return DatabaseVerification(recorded, error is None, latency, found.server_version, found.tls_version, error)

    # --- what the verbs share -----------------------------------------------------------------------------------------

    def _sealing(self) -> "Keyring":
        if self._keyring is None:
            raise ConfigurationError(
                "this repository has no keyring, so it neither seals nor opens connection strings",
                hint="TenantDatabaseRepository(session, Keyring.from_settings(settings)).",
            )
        return self._keyring

    async def _sealed(
        self,
        secret: SecretStr | ConnectionString,
        tenant_id: uuid.UUID,
        database_id: uuid.UUID,
        environment: str,
        check_value: str | None,
    ) -> dict[str, Any]:
        """Return what a row says of a connection string: the sealed text, and the description."""
        dsn = self._policy.admit(secret, tenant_id=tenant_id, environment=environment)
        values = _description(dsn)
        _check_description(values)
        keyring = self._sealing()
        sealed = await keyring.seal(dsn, tenant_id=tenant_id, database_id=database_id)
        key = await keyring.get(sealed.kid or "")
        if key.check_value != check_value:  # not on record yet, or another key
            await self._keys.confirm(key, keyring.provider.name)
        return {"connection_string_encrypted": sealed, **values}

    async def _resealed(self, database_id: uuid.UUID, secret: SecretStr | ConnectionString) -> dict[str, Any]:
        key = as_uuid(database_id, "database_id")
        kid = (await self._sealing().current()).kid
        rows = await self._executor.rows(_OWNER, {"key": key, "kid": kid})
        if not rows:
            raise _not_found(key)
        tenant_id, environment, check_value = rows[0]
        return await self._sealed(secret, tenant_id, key, environment, check_value)

    async def _found(self, database_id: uuid.UUID) -> tuple[TenantDatabase, str, str]:
        """Return the row as it is now, the tenant's environment, and the role this session has in the database."""
        self._sealing()
        key = as_uuid(database_id, "database_id")
        rows = await self._executor.rows(_AS_IT_IS, {"key": key})
        if not rows:
            raise _not_found(key)
        return rows[0]

    async def _opened(self, database: TenantDatabase, role: str) -> tuple[ConnectionString, Dsn]:
        """Open a row's connection string, compare it with the row, and log who did."""
        sealed = database.connection_string_encrypted
        facts = {
            "database_id": str(database.id),
            "tenant_id": str(database.tenant_id),
            "purpose": database.purpose,
            "kid": sealed.kid,
            "role": role,
            "actor": self._actor,
        }
        outcome = await self._attempt(database)
        if isinstance(outcome, EncryptionError):
            _log.warning(
                "refused to open a connection string (%s): %s",
                outcome.code,
                _listed(facts),
                extra={"event": "secret.refused", **facts, "error": outcome.code},
            )
            outcome.details = {**outcome.details, "database_id": str(database.id)}
            raise outcome
        _log.info("opened a connection string: %s", _listed(facts), extra={"event": "secret.opened", **facts})
        return outcome

    async def _attempt(self, database: TenantDatabase) -> tuple[ConnectionString, Dsn] | EncryptionError:
        try:
            secret = await self._sealing().unseal(
                database.connection_string_encrypted, tenant_id=database.tenant_id, database_id=database.id
            )
        except EncryptionError as error:
            return error.with_traceback(None)
        try:
            dsn = dsns.parse(secret.reveal(), environment=False)
        except ConfigurationError:
            return DecryptionError(
                "what the row holds is no connection string this version can read", hint="Write it anew."
            )
        says = _description(dsn)
        if differing := [column for column, value in says.items() if getattr(database, column) != value]:
            return DecryptionError(
                f"the row's description does not match the connection string it holds: {', '.join(differing)}",
                hint="Somebody has changed the row. When you know that the connection string is right, write it anew.",
                details={"columns": differing},
            )
        return secret, dsn

    async def _change(
        self, database_id: uuid.UUID, values: Mapping[str, Any], *, expected_version: int | None
    ) -> TenantDatabase:
        """Run one UPDATE that states what must be true; when it touches nothing, find out what is not."""
        key = as_uuid(database_id, "database_id")
        versioned = check_version(expected_version) is not None
        params = {"key": key, **{f"new_{field}": value for field, value in values.items()}}
        if versioned:
            params["expected_version"] = expected_version
        statement = _change_statement(tuple(values), versioned=versioned)
        database: TenantDatabase | None = await self._executor.one_or_none(statement, params)
        if database is None:
            raise await self._refusal(key, expected_version, purpose=values.get("purpose"))
        return database

    async def _refusal(
        self, key: uuid.UUID, expected_version: int | None, *, purpose: str | None = None
    ) -> ControlPlaneError:
        """Say why a change touched no row."""
        rows = await self._executor.rows(_FACTS, {"key": key})
        if not rows:
            return _not_found(key)
        tenant_id, version = rows[0]
        if purpose is not None and expected_version in {None, version}:
            return _taken(purpose, tenant_id)
        return stale(f"tenant database {key}", expected_version or 0, version)


# --- statements -------------------------------------------------------------------------------------------------------


def _selected(which: TenantDatabaseFilter) -> SelectOfScalar[TenantDatabase]:
    return select(TenantDatabase).where(*_conditions(which))


def _conditions(which: TenantDatabaseFilter) -> Iterator[ColumnElement[bool]]:
    if unknown := sorted(which.keys() - TenantDatabaseFilter.__annotations__.keys()):
        raise InvalidDataError(
            f"there is no filter {unknown[0]!r}", hint=f"Filters: {', '.join(TenantDatabaseFilter.__annotations__)}."
        )
    if (tenant_id := which.get("tenant_id")) is not None:
        yield col(TenantDatabase.tenant_id) == as_uuid(tenant_id, "tenant_id")
    if (statuses := which.get("status")) is not None:
        yield col(TenantDatabase.status).in_(members(TenantDatabaseStatus, statuses, "status"))
    if (purpose := which.get("purpose")) is not None:
        yield col(TenantDatabase.purpose) == normal_text(purpose, "the purpose")
    if (host := which.get("host")) is not None:
        yield col(TenantDatabase.host) == normal_text(host, "the host")
    if (kid := which.get("kid")) is not None:
        if not re.fullmatch(KID, normal_text(kid, "the key id")):
            raise InvalidDataError("the id of a key is 1 to 32 of a-z, 0-9 and -")
        # The constants are written out: with parameters in their place, the expression would not be the index's.
        place = func.split_part(
            col(TenantDatabase.connection_string_encrypted), literal_column("':'"), literal_column("2")
        )
        yield sqlalchemy.type_coerce(place, sqlalchemy.Text) == kid


# Built once: building one, and looking up its compiled form, costs more than running it.
_BY_KEY: Final = col(TenantDatabase.id) == bindparam("key")
_HAS_TENANT: Final = col(Tenant.tenant_id) == col(TenantDatabase.tenant_id)
_CHECK_VALUE: Any = (
    select(EncryptionKey.check_value).where(col(EncryptionKey.kid) == bindparam("kid")).scalar_subquery()
)
_OF_TENANT = select(TenantDatabase).where(col(TenantDatabase.tenant_id) == bindparam("key")).order_by(*_ORDER)
_TENANT = select(Tenant.environment, _CHECK_VALUE).where(col(Tenant.tenant_id) == bindparam("key"))
_OWNER = select(TenantDatabase.tenant_id, Tenant.environment, _CHECK_VALUE).join(Tenant, _HAS_TENANT).where(_BY_KEY)
_FACTS = select(TenantDatabase.tenant_id, TenantDatabase.version).where(_BY_KEY)
_AS_IT_IS = (
    select(TenantDatabase, Tenant.environment, func.current_user())
    .join(Tenant, _HAS_TENANT)
    .where(_BY_KEY)
    .execution_options(populate_existing=True)
)

_FINDINGS: Final = ("verified_at", "server_version", "tls_version", "verification_error")


@functools.cache
def _insert_statement(fields: tuple[str, ...]) -> FromStatement[Any]:
    """Build the INSERT of these fields, for parameters `new_` with a field's name; it inserts nothing where the purpose is taken."""
    new: dict[str, BindParameter[Any]] = {field: bindparam(f"new_{field}") for field in fields}
    statement = insert(TenantDatabase).values(new).on_conflict_do_nothing()
    return FromStatement([TenantDatabase], statement.returning(TenantDatabase))


@functools.cache
def _delete_statement(*, versioned: bool) -> Statement:
    """Build the DELETE of a row, for parameters `key` and `expected_version`."""
    statement = delete(TenantDatabase).where(_BY_KEY)
    if versioned:
        statement = statement.where(col(TenantDatabase.version) == bindparam("expected_version"))
    return statement.returning(col(TenantDatabase.id))


@functools.cache
def _change_statement(fields: tuple[str, ...], *, versioned: bool) -> FromStatement[Any]:
    """Build the UPDATE of these fields, for parameters `key`, `expected_version`, and `new_` with a field's name."""
    key: BindParameter[uuid.UUID] = bindparam("key")
    new: dict[str, Any] = {field: bindparam(f"new_{field}") for field in fields}
    statement = update(TenantDatabase).where(col(TenantDatabase.id) == key)
    if versioned:
        statement = statement.where(col(TenantDatabase.version) == bindparam("expected_version"))
    if "purpose" in new:  # asked here, because a unique violation would cost the caller the transaction
        other = aliased(TenantDatabase)
        statement = statement.where(
            ~exists().where(
                col(other.tenant_id) == col(TenantDatabase.tenant_id),
                col(other.purpose) == new["purpose"],
                col(other.id) != key,
            )
        )
    if "connection_string_encrypted" in new:
        new |= dict.fromkeys(_FINDINGS, null())
    if "verification_error" in fields:
        new["verified_at"] = func.clock_timestamp()
    return FromStatement([TenantDatabase], statement.values(new).returning(TenantDatabase))


# --- what callers pass, and what they are told ------------------------------------------------------------------------


def _form_of(create: Any) -> TenantDatabaseCreate | InvalidDataError:
    """Read what to register; returns the refusal, so that no frame that holds the input is in its traceback."""
    try:
        if isinstance(create, Mapping):
            create = validated(TenantDatabaseParts if "host" in create else TenantDatabaseCreate, dict(create))
        if isinstance(create, TenantDatabaseParts):
            return TenantDatabaseCreate(connection_string=create.connection_string(), purpose=create.purpose)
    except InvalidDataError as error:
        return error.with_traceback(None)
    if isinstance(create, TenantDatabaseCreate):
        return create
    return InvalidDataError("what to register must be a TenantDatabaseCreate or TenantDatabaseParts, or a mapping")


def _changes_of(changes: Any) -> TenantDatabaseUpdate | InvalidDataError:
    try:
        return validated(TenantDatabaseUpdate, changes)
    except InvalidDataError as error:
        return error.with_traceback(None)


def _quoted(text: str) -> str:
    """Percent-encode everything. What is not UTF-8 becomes bytes that are not either, for the parser to refuse."""
    return quote(text, safe="", errors="surrogatepass")


def _description(dsn: Dsn) -> dict[str, Any]:
    """Say what may be seen of a connection string, as the row has it."""
    return {"host": dsn.hosts[0].name, "port": dsn.hosts[0].port, "database_name": dsn.database or ""}


def _check_description(values: Mapping[str, Any]) -> None:
    for column, unit, most in (("host", "characters", MAX_HOST), ("database_name", "bytes", MAX_NAME_BYTES)):
        what, text = f"the {column} of the connection string", values[column]
        normal_text(text, what)
        if not 1 <= len(text.encode() if unit == "bytes" else text) <= most:
            raise InvalidDataError(f"{what} must have 1 to {most} {unit}")


def _checked_seconds(given: object) -> float:
    if given is None:
        return VERIFY_SECONDS
    if isinstance(given, int | float) and not isinstance(given, bool) and 0 < given <= MAX_VERIFY_SECONDS:
        return given
    raise InvalidDataError(f"timeout must be a number of seconds above 0, up to {MAX_VERIFY_SECONDS:g}")


def _listed(facts: Mapping[str, str | None]) -> str:
    return " ".join(f"{name}={value!r}" for name, value in facts.items())


def _not_found(database_id: object) -> TenantDatabaseNotFoundError:
    return TenantDatabaseNotFoundError(
        f"there is no tenant database with the id {database_id}", details={"database_id": str(database_id)}
    )


def _taken(purpose: str, tenant_id: uuid.UUID) -> AlreadyExistsError:
    return AlreadyExistsError(
        f"the tenant already has a database for the purpose {purpose!r}",
        hint="Change that one, or register this one for another purpose.",
        details={"tenant_id": str(tenant_id), "purpose": purpose},
    )


# --- connecting -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Finding:
    server_version: str | None
    tls_version: str | None
    error: ControlPlaneError | None


_NO_SERVER: Final = "the server does not answer as PostgreSQL does"
_VERSION: Final = re.compile(r"[0-9][\w.+~()/: -]{0,62}", re.ASCII)


async def _asked(dsn: Dsn, tenant_id: uuid.UUID, environment: str, policy: ConnectionPolicy, limit: float) -> _Finding:
    """Connect, ask, close. Whatever a server of somebody else's makes the driver raise is a finding."""
    error: ControlPlaneError
    try:
        return await _visit(dsn, tenant_id, environment, policy, limit)
    except ControlPlaneError as problem:
        error = problem.with_traceback(None)
    except TimeoutError:
        error = ConnectionUnavailableError(f"the server did not answer within {limit:g} s")
    except Exception as problem:
        error = translate(problem, io=True) or ConnectionUnavailableError(_NO_SERVER)
    except BaseException as stop:  # cancelled: asyncpg's frames, which hold the password, go no further
        stop.__context__ = None
        raise stop.with_traceback(None) from None
    return _Finding(None, None, error)


async def _visit(dsn: Dsn, tenant_id: uuid.UUID, environment: str, policy: ConnectionPolicy, limit: float) -> _Finding:
    deadline = asyncio.get_running_loop().time() + limit
    connection = await connect_tenant(dsn, tenant_id=tenant_id, environment=environment, policy=policy, timeout=limit)
    try:
        async with asyncio.timeout_at(deadline):
            await connection.execute("SHOW server_version")  # discards the answer, however long a hostile one is
        version = str(connection.get_settings().server_version)
        if not _VERSION.fullmatch(version):
            raise ConnectionUnavailableError(_NO_SERVER)
        return _Finding(version, tls_version(connection), None)
    finally:
        with suppress(Exception):  # asyncpg has dropped it then
            await connection.close(timeout=_CLOSE_SECONDS)
