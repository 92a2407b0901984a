"""`TenantDatabaseRepository` against real PostgreSQL: every verb, every refusal, what each costs, and what a row that was tampered with gives away."""

import asyncio
import base64
import logging
import os
import random
import re
import struct
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from pydantic import SecretStr
from sqlalchemy import event
from sqlmodel.ext.asyncio.session import AsyncSession

from car_control_plane import dsn as dsns
from car_control_plane.connection import AsyncConnectionManager
from car_control_plane.dialing import ConnectionPolicy
from car_control_plane.encryption import ConnectionString, Keyring, StaticKeys
from car_control_plane.errors import (
    AccessDeniedError,
    AlreadyExistsError,
    ConfigurationError,
    ConnectionUnavailableError,
    ControlPlaneError,
    DecryptionError,
    InvalidDataError,
    StaleWriteError,
    StillReferencedError,
    TenantDatabaseNotFoundError,
    TenantNotFoundError,
    UnknownKeyError,
)
from car_control_plane.models import (
    TenantCreate,
    TenantDatabase,
    TenantDatabaseCreate,
    TenantDatabaseStatus,
    TenantDatabaseUpdate,
    TenantEnvironment,
    TenantUpdate,
    uuid7,
)
from car_control_plane.repositories import TenantDatabaseRepository, TenantRepository, base
from car_control_plane.repositories.databases import TenantDatabaseParts
from tests.fixtures.doors import on_both
from tests.fixtures.leaks import failure_of, leaks
from tests.fixtures.servers import (
    CANARY,
    DATABASE,
    PASSWORD,
    USER,
    Certificates,
    Cluster,
    black_hole,
    front,
    rogue,
    unused_port,
)

DEVELOPMENT, PRODUCTION = TenantEnvironment.DEVELOPMENT, TenantEnvironment.PRODUCTION
ANY = ConnectionPolicy(allow=frozenset({"sockets", "files", "several-hosts", "service", "internal-hosts", "weak-tls"}))
Verb = Callable[[TenantDatabaseRepository, uuid.UUID], Awaitable[Any]]


def key_text(kid: str) -> str:
    return f"{kid}:{base64.b64encode(os.urandom(32)).decode()}"


def keyring_of(*keys: str) -> Keyring:
    return Keyring(StaticKeys(",".join(keys)))


def dsn(host: str = "db.example", password: str = CANARY, database: str = "acme") -> SecretStr:
    return SecretStr(f"postgresql://acme:{quote(password, safe='')}@{host}/{database}?sslmode=verify-full")


def new(purpose: str = "primary", **how: Any) -> TenantDatabaseCreate:
    return TenantDatabaseCreate(connection_string=dsn(**how), purpose=purpose)


async def tenant_of(
    session: AsyncSession, name: str = "acme", environment: TenantEnvironment = DEVELOPMENT
) -> uuid.UUID:
    return (await TenantRepository(session).create(TenantCreate(name=name, environment=environment))).tenant_id


async def sql(session: AsyncSession, text: str, *arguments: Any) -> Any:
    return await (await session.connection()).exec_driver_sql(text, arguments)


@contextmanager
def counting(session: AsyncSession) -> Iterator[list[tuple[str, Any]]]:
    """The statements the session sends while the block runs, and their parameters."""
    sent: list[tuple[str, Any]] = []

    def note(_conn: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if not statement.startswith(("SAVEPOINT", "RELEASE")):  # the fixture's
            sent.append((statement, parameters))

    engine = session.sync_session.get_bind().engine
    event.listen(engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        event.remove(engine, "before_cursor_execute", note)


@pytest.fixture
def keyring() -> Keyring:
    return keyring_of(key_text("2026-11"))


@pytest.fixture
def databases(where: Any, keyring: Keyring) -> TenantDatabaseRepository:
    return TenantDatabaseRepository(where, keyring, actor="the tests")


@pytest.fixture
async def tenant(where: Any) -> uuid.UUID:
    return await tenant_of(where)


# --- registering


@on_both
async def test_what_is_registered_is_described_sealed_and_opens_again(
    databases: TenantDatabaseRepository, tenant: uuid.UUID
) -> None:
    row = await databases.register(tenant, new())
    assert (row.tenant_id, row.host, row.port, row.database_name) == (tenant, "db.example", 5432, "acme")
    assert (row.purpose, row.status) == ("primary", TenantDatabaseStatus.ACTIVE)
    assert (row.verified_at, row.server_version, row.tls_version, row.verification_error) == (None,) * 4
    assert row.version > 0
    assert row.connection_string_encrypted.kid == "2026-11"
    assert CANARY not in row.connection_string_encrypted.text
    secret = await databases.connection_string(row.id)
    assert type(secret) is ConnectionString
    assert secret.dsn == dsns.parse(dsn().get_secret_value())
    assert await databases.get(row.id) == row
    assert await databases.get_or_none(str(row.id)) == row  # type: ignore[arg-type]  # what a web framework hands over


async def test_registering_costs_two_round_trips_and_one_more_for_a_new_key(
    session: AsyncSession, databases: TenantDatabaseRepository, tenant: uuid.UUID
) -> None:
    with counting(session) as sent:
        await databases.register(tenant, new())
    first = len(sent)
    with counting(session) as sent:
        await databases.register(tenant, new("second"))
    assert len(sent) == 2
    assert first > 2, "the key's check value goes on record"


async def test_a_key_that_is_not_the_one_on_record_seals_nothing(
    session: AsyncSession, databases: TenantDatabaseRepository, tenant: uuid.UUID
) -> None:
    row = await databases.register(tenant, new())
    other = TenantDatabaseRepository(session, keyring_of(key_text("2026-11")))
    with pytest.raises(ConfigurationError, match="2026-11"):
        await other.register(tenant, new("second"))
    with pytest.raises(ConfigurationError, match="2026-11"):
        await other.update_connection_string(row.id, dsn("other.example"))
    assert [one.id for one in await databases.list_for_tenant(tenant)] == [row.id]
    assert (await databases.connection_string(row.id)).dsn.password == CANARY


async def test_two_keys_of_one_name_do_not_both_seal(shared_manager: AsyncConnectionManager) -> None:
    kid = f"k-{uuid.uuid4().hex[:12]}"
    keyrings = [keyring_of(key_text(kid)) for _ in range(2)]
    async with shared_manager.get_session() as session:
        tenant = await tenant_of(session)

    async def register(keyring: Keyring, purpose: str) -> TenantDatabase:
        async with shared_manager.get_session() as session:
            return await TenantDatabaseRepository(session, keyring).register(tenant, new(purpose))

    calls = (register(keyring, purpose) for keyring, purpose in zip(keyrings, ("a", "b"), strict=True))
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["ConfigurationError", "TenantDatabase"]


async def test_a_purpose_is_taken_once_for_each_tenant(
    session: AsyncSession, databases: TenantDatabaseRepository, tenant: uuid.UUID
) -> None:
    await databases.register(tenant, new("billing"))
    with pytest.raises(AlreadyExistsError, match="'billing'") as caught:
        await databases.register(tenant, new("billing"))
    assert caught.value.details == {"tenant_id": str(tenant), "purpose": "billing"}
    await databases.register(tenant, new("reports"))
    await databases.register(await tenant_of(session, "globex"), new("billing"))
    assert await databases.count() == 3


async def test_two_register_the_same_purpose_at_once_and_one_succeeds(shared_manager: AsyncConnectionManager) -> None:
    keyring = keyring_of(key_text(f"k-{uuid.uuid4().hex[:12]}"))
    async with shared_manager.get_session() as session:
        tenant = await tenant_of(session)

    async def register() -> TenantDatabase:
        async with shared_manager.get_session() as session:
            return await TenantDatabaseRepository(session, keyring).register(tenant, new())

    outcomes = await asyncio.gather(*(register() for _ in range(4)), return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["AlreadyExistsError"] * 3 + ["TenantDatabase"]
    async with shared_manager.get_read_session() as reading:
        assert await TenantDatabaseRepository(reading).count() == 1


async def test_a_tenant_with_a_database_is_not_forgotten(
    session: AsyncSession, databases: TenantDatabaseRepository, tenant: uuid.UUID
) -> None:
    row = await databases.register(tenant, new())
    with pytest.raises(StillReferencedError):
        await TenantRepository(session).delete(tenant)
    await databases.delete(row.id)
    await TenantRepository(session).delete(tenant)


@on_both
async def test_a_database_of_nobody_is_refused(databases: TenantDatabaseRepository) -> None:
    nobody = uuid7()
    with pytest.raises(TenantNotFoundError, match=str(nobody)):
        await databases.register(nobody, new())
    with pytest.raises(InvalidDataError, match="must be a UUID"):
        await databases.register("nobody", new())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("create", "says"),
    [
        (f"postgresql://u:{CANARY}@h/d", "TenantDatabaseCreate"),
        (SecretStr(f"postgresql://u:{CANARY}@h/d"), "TenantDatabaseCreate"),
        (None, "TenantDatabaseCreate"),
        ({"connection_string": f"postgresql://u:{CANARY}@h/d", "purpose": CANARY.upper()}, "purpose"),
        ({"connection_string": f"postgresql://u:{CANARY}@h/d", "pupose": "primary"}, "pupose"),
        ({"connection_sting": f"postgresql://u:{CANARY}@h/d"}, "connection_sting"),
        ({"connection_string": CANARY}, "connection string"),
        ({"connection_string": f"postgresql://u:{CANARY}@h"}, "database"),
        ({"connection_string": f"postgresql://u:{CANARY}@h/{'d' * 64}?sslmode=verify-full"}, "database_name"),
        ({"connection_string": f"postgresql://u:{CANARY}@h/{'%E2%82%AC' * 22}?sslmode=verify-full"}, "database_name"),
        ({"connection_string": f"postgresql://u:{CANARY}@h/a%E2%80%A8b?sslmode=verify-full"}, "U\\+2028"),
        ({"host": "h", "database": "d", "user": "u", "password": CANARY, "port": 0}, "port"),
        ({"host": "h", "database": "d", "user": "u", "password": f"\0{CANARY}"}, "NUL"),
        ({"host": "h", "database": "d", "user": "u", "options": {"password": CANARY}}, "password"),
        ({"host": "h", "database": "d", "user": "u", "options": {"sslpassword": CANARY}}, "sslpassword"),
        ({"host": "a,b", "database": "d", "user": "u", "password": CANARY}, "host"),
        ({"host": "h", "user": "u", "password": CANARY}, "database"),
    ],
    ids=lambda value: value if isinstance(value, str) and CANARY not in value else "",
)
async def test_what_cannot_be_registered_is_refused_without_a_trace_of_the_secret(
    session: AsyncSession, databases: TenantDatabaseRepository, tenant: uuid.UUID, create: Any, says: str
) -> None:
    error = await failure_of(databases.register(tenant, create))
    assert isinstance(error, InvalidDataError)
    assert [*leaks(error, CANARY)] == []
    with pytest.raises(InvalidDataError, match=says):
        raise error
    assert await databases.count() == 0
    assert await session.scalar(_select_one()) == 1


def _select_one() -> Any:
    from sqlalchemy import select

    return select(1)


async def test_the_policy_decides_what_a_tenant_may_say(
    session: AsyncSession, databases: TenantDatabaseRepository
) -> None:
    production = await tenant_of(session, "prod", PRODUCTION)
    with pytest.raises(AccessDeniedError):
        await databases.register(production, new(host="127.0.0.1"))
    weak = TenantDatabaseCreate(connection_string=SecretStr(f"postgresql://u:{CANARY}@db.example/d?sslmode=disable"))
    with pytest.raises(InvalidDataError):
        await databases.register(production, weak)
    row = await databases.register(production, new())
    with pytest.raises(AccessDeniedError):
        await databases.update_connection_string(row.id, dsn("[::1]"))
    assert (await databases.get(row.id)).host == "db.example"
    allowed = TenantDatabaseRepository(session, databases._keyring, policy=ANY)
    assert (await allowed.update_connection_string(row.id, dsn("[::1]"))).host == "::1"


async def test_a_socket_is_described_by_its_directory_and_several_hosts_by_the_first(
    session: AsyncSession, keyring: Keyring, tenant: uuid.UUID
) -> None:
    allowed = TenantDatabaseRepository(session, keyring, policy=ANY)
    socket = SecretStr(f"postgresql://u:{CANARY}@/d?host=/run/postgresql&port=5433")
    row = await allowed.register(tenant, TenantDatabaseCreate(connection_string=socket, purpose="socket"))
    assert (row.host, row.port, row.database_name) == ("/run/postgresql", 5433, "d")
    several = SecretStr(f"postgresql://u:{CANARY}@one.example:1,two.example:2/d?sslmode=verify-full")
    row = await allowed.register(tenant, TenantDatabaseCreate(connection_string=several, purpose="several"))
    assert (row.host, row.port) == ("one.example", 1)
    assert [host.port for host in (await allowed.connection_string(row.id)).dsn.hosts] == [1, 2]


@on_both
async def test_parts_need_no_escaping(databases: TenantDatabaseRepository, tenant: uuid.UUID) -> None:
    parts = TenantDatabaseParts(
        host="db.example",
        port=6432,
        database="a b/ü?#",
        user="o'@:/?#%+ ü",
        password=SecretStr(PASSWORD),
        options={"sslmode": "verify-full", "application_name": "a&b=c d+e"},
    )
    row = await databases.register(tenant, parts)
    assert (row.host, row.port, row.database_name) == ("db.example", 6432, "a b/ü?#")
    opened = (await databases.connection_string(row.id)).dsn
    assert (opened.user, opened.password, opened.database) == ("o'@:/?#%+ ü", PASSWORD, "a b/ü?#")
    assert opened.server_settings["application_name"] == "a&b=c d+e"
    assert CANARY not in repr(parts)


@on_both
async def test_parts_may_be_an_address_of_ipv6_and_have_no_password(
    databases: TenantDatabaseRepository, tenant: uuid.UUID
) -> None:
    row = await databases.register(tenant, {"host": "2001:db8::1", "database": "d", "user": "u", "purpose": "v6"})
    assert (row.host, row.purpose) == ("2001:db8::1", "v6")
    assert (await databases.connection_string(row.id)).dsn.password is None


async def test_parts_may_be_a_socket(session: AsyncSession, keyring: Keyring, tenant: uuid.UUID) -> None:
    allowed = TenantDatabaseRepository(session, keyring, policy=ANY)
    row = await allowed.register(tenant, {"host": "/run/a b", "port": 7, "database": "d", "user": "u"})
    assert (row.host, row.port) == ("/run/a b", 7)


@on_both
@given(
    password=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40),
    user=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_password_comes_back_as_it_was(
    databases: TenantDatabaseRepository, tenant: uuid.UUID, password: str, user: str
) -> None:
    parts = TenantDatabaseParts(host="db.example", database="d", user=user, password=SecretStr(password))
    row = await databases.register(tenant, parts)
    opened = (await databases.connection_string(row.id)).dsn
    assert (opened.user, opened.password) == (user, password)
    await databases.delete(row.id)


# --- finding


@on_both
async def test_absence_is_said_in_the_way_asked_for(databases: TenantDatabaseRepository) -> None:
    nothing = uuid7()
    assert await databases.get_or_none(nothing) is None
    assert await databases.list_for_tenant(nothing) == []
    verbs: list[Verb] = [
        lambda repository, key: repository.get(key),
        lambda repository, key: repository.connection_string(key),
        lambda repository, key: repository.verify(key),
        lambda repository, key: repository.update(key, TenantDatabaseUpdate()),
        lambda repository, key: repository.update(key, TenantDatabaseUpdate(purpose="other")),
        lambda repository, key: repository.update_connection_string(key, dsn()),
        lambda repository, key: repository.set_status(key, TenantDatabaseStatus.ERROR),
        lambda repository, key: repository.set_status(key, TenantDatabaseStatus.ERROR, expected_version=1),
        lambda repository, key: repository.delete(key),
    ]
    for verb in verbs:
        with pytest.raises(TenantDatabaseNotFoundError, match=str(nothing)) as caught:
            await verb(databases, nothing)
        assert caught.value.details == {"database_id": str(nothing)}
        with pytest.raises(InvalidDataError, match="must be a UUID"):
            await verb(databases, "nothing")  # type: ignore[arg-type]


async def test_filters_narrow_and_combine(
    session: AsyncSession, databases: TenantDatabaseRepository, tenant: uuid.UUID
) -> None:
    other = await tenant_of(session, "globex")
    a = await databases.register(tenant, new())
    b = await databases.register(tenant, new("reports", host="replica.example"))
    c = await databases.register(other, new())
    newer = TenantDatabaseRepository(session, keyring_of(key_text("2026-12")))
    d = await newer.register(other, new("reports"))
    await databases.set_status(c.id, TenantDatabaseStatus.MIGRATING)

    async def found(**which: Any) -> set[uuid.UUID]:
        listed = {row.id for row in await databases.list(**which)}
        assert listed == {row.id async for row in databases.stream(**which)}
        assert len(listed) == await databases.count(**which)
        return listed

    assert await found() == {a.id, b.id, c.id, d.id}
    assert await found(tenant_id=tenant) == {a.id, b.id}
    assert await found(tenant_id=str(other), purpose="reports") == {d.id}
    assert await found(status="migrating") == {c.id}
    assert await found(status=["migrating", TenantDatabaseStatus.ACTIVE]) == {a.id, b.id, c.id, d.id}
    assert await found(host="replica.example") == {b.id}
    assert await found(kid="2026-12") == {d.id}
    assert await found(kid="2026-11", host="db.example") == {a.id, c.id}
    assert await found(kid="nothing") == set()
    assert [row.id for row in await databases.list_for_tenant(tenant)] == [a.id, b.id]


@on_both
@pytest.mark.parametrize(
    ("which", "says"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 501}, "limit"),
        ({"after": "x"}, "not a cursor"),
        ({"tenant_id": "x"}, "tenant_id"),
        ({"status": "broken"}, "status"),
        ({"status": 5}, "status"),
        ({"purpose": 5}, "purpose"),
        ({"host": "a\0"}, "host"),
        ({"kid": "Ümlaut"}, "key"),
        ({"kid": ""}, "key"),
        ({"damaged": True}, "damaged"),
    ],
)
async def test_bad_listing_arguments_are_refused(
    databases: TenantDatabaseRepository, which: dict[str, Any], says: str
) -> None:
    with pytest.raises(InvalidDataError, match=says):
        await databases.list(**which)


@on_both
async def test_pages_follow_each_other_and_stream_crosses_their_borders(
    databases: TenantDatabaseRepository, tenant: uuid.UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [(await databases.register(tenant, new(f"p{number}"))).id for number in range(7)]
    seen: list[uuid.UUID] = []
    after: str | None = None
    while True:
        page = await databases.list(limit=3, after=after)
        seen += [row.id for row in page]
        after = page.next_cursor
        if after is None:
            break
    assert seen == sorted(made)  # one transaction: one created_at, so the ids decide
    assert (await databases.list(limit=7)).next_cursor is None
    monkeypatch.setattr(base, "STREAM_ROWS", 3)
    assert [row.id async for row in databases.stream()] == sorted(made)


async def test_listing_walks_along_an_index(session: AsyncSession, databases: TenantDatabaseRepository) -> None:
    await sql(
        session,
        "INSERT INTO control_plane.tenants (tenant_id, name, environment) "
        "SELECT md5(n::text)::uuid, 't' || n, 'staging' FROM generate_series(1, 4000) n",
    )
    await sql(
        session,
        "INSERT INTO control_plane.tenant_databases (id, tenant_id, connection_string_encrypted, database_name, host, created_at) "
        "SELECT md5('d' || n)::uuid, md5(n::text)::uuid, 'ccp1:k' || n % 1000 || ':AAAA', 'd', 'h', now() + n * interval '1 second' "
        "FROM generate_series(1, 4000) n",
    )
    await sql(session, "ANALYZE control_plane.tenant_databases")
    middle = (await databases.list(limit=500)).next_cursor

    async def plan(**which: Any) -> str:
        """The plan PostgreSQL keeps for any values, which asyncpg comes to use."""
        with counting(session) as sent:
            await databases.list(limit=10, **which)
        statement, parameters = sent[0]
        await sql(session, "SET LOCAL plan_cache_mode = force_generic_plan")
        await sql(session, f"PREPARE listing AS {statement}")
        values = ", ".join(f"'{value}'" for value in parameters)
        rows = await sql(session, f"EXPLAIN EXECUTE listing ({values})")
        await sql(session, "DEALLOCATE listing")
        return "\n".join(line for (line,) in rows)

    assert "idx_tenant_databases_created_at_id" in await plan(after=middle)
    assert "Sort" not in await plan(after=middle)
    assert "idx_tenant_databases_kid_id" in await plan(kid="k7")
    assert re.search("(idx|uq)_tenant_databases_tenant_id", await plan(tenant_id=uuid7()))


# --- changing


async def test_a_new_connection_string_replaces_the_description_and_forgets_what_was_verified(
    session: AsyncSession, databases: TenantDatabaseRepository, tenant: uuid.UUID
) -> None:
    row = await databases.register(tenant, new())
    await sql(
        session,
        "UPDATE control_plane.tenant_databases SET verified_at = now(), server_version = '18.4', tls_version = 'TLSv1.3', "
        "verification_error = 'x'",
    )
    await session.refresh(row)
    version, sealed = row.version, row.connection_string_encrypted
    with counting(session) as sent:
        changed = await databases.update_connection_string(row.id, dsn("new.example:6000", "other", "next"))
    assert len(sent) == 2
    assert changed is row
    assert (row.host, row.port, row.database_name) == ("new.example", 6000, "next")
    assert (row.verified_at, row.server_version, row.tls_version, row.verification_error) == (None,) * 4
    assert row.version > version
    assert row.connection_string_encrypted != sealed
    assert (await databases.connection_string(row.id)).dsn.password == "other"


@on_both
async def test_a_connection_string_is_taken_masked_only(databases: TenantDatabaseRepository, tenant: uuid.UUID) -> None:
    row = await databases.register(tenant, new())
    for value in (dsn().get_secret_value(), None, 5, dsn().get_secret_value().encode()):
        error = await failure_of(databases.update_connection_string(row.id, value))  # type: ignore[arg-type]
        assert isinstance(error, InvalidDataError)
        assert [*leaks(error, CANARY)] == []
    opened = await databases.connection_string(row.id)
    again = await databases.update_connection_string(row.id, opened)
    assert await databases.connection_string(again.id) == opened


async def test_update_changes_purpose_connection_string_or_both(
    session: AsyncSession, databases: TenantDatabaseRepository, tenant: uuid.UUID
) -> None:
    row = await databases.register(tenant, new())
    await databases.register(tenant, new("taken"))
    await databases.register(await tenant_of(session, "globex"), new("archive"))  # in nobody's way
    with counting(session) as sent:
        row = await databases.update(row.id, TenantDatabaseUpdate(purpose="archive"), expected_version=row.version)
    assert (len(sent), row.purpose, row.host) == (1, "archive", "db.example")
    row = await databases.update(
        row.id, {"purpose": "reports", "connection_string": dsn("new.example").get_secret_value()}
    )
    assert (row.purpose, row.host) == ("reports", "new.example")
    row = await databases.update(row.id, TenantDatabaseUpdate(connection_string=dsn("newer.example")))
    assert (row.purpose, row.host) == ("reports", "newer.example")
    version = row.version
    with pytest.raises(AlreadyExistsError, match="'taken'"):
        await databases.update(row.id, TenantDatabaseUpdate(purpose="taken"))
    with pytest.raises(AlreadyExistsError, match="'taken'"):
        await databases.update(row.id, {"purpose": "taken", "connection_string": dsn()}, expected_version=version)
    assert (await databases.update(row.id, TenantDatabaseUpdate(purpose="reports"))).version == version  # its own
    assert (await databases.update(row.id, TenantDatabaseUpdate())).version == version
    for changes in ({"purpose": None}, {"purpose": "A"}, {"connection_string": None}, {"host": "x"}, None, "x"):
        with pytest.raises(InvalidDataError):
            await databases.update(row.id, changes)  # type: ignore[arg-type]
    assert (await databases.get(row.id)).version == version


@on_both
async def test_a_refused_change_shows_no_secret(databases: TenantDatabaseRepository, tenant: uuid.UUID) -> None:
    row = await databases.register(tenant, new())
    text = f"postgresql://u:{CANARY}@h"
    for changes in (
        {"connection_string": text, "purpose": "A"},
        {"connection_string": text},
        {"connection_sting": text},
        text,
    ):
        error = await failure_of(databases.update(row.id, changes))  # type: ignore[arg-type]
        assert isinstance(error, InvalidDataError)
        assert [*leaks(error, CANARY)] == []


async def test_any_status_may_follow_any_other(
    session: AsyncSession, databases: TenantDatabaseRepository, tenant: uuid.UUID
) -> None:
    row = await databases.register(tenant, new())
    for status in (*TenantDatabaseStatus, *reversed(TenantDatabaseStatus)):
        with counting(session) as sent:
            assert (await databases.set_status(row.id, status)).status is status
        assert len(sent) == 1
    assert (await databases.set_status(row.id, "inactive")).status is TenantDatabaseStatus.INACTIVE  # type: ignore[arg-type]
    for word in ("broken", "ACTIVE", "", None, 5, ["active"]):
        with pytest.raises(InvalidDataError, match="'active' or 'inactive' or 'migrating' or 'error'"):
            await databases.set_status(row.id, word)  # type: ignore[arg-type]


async def test_a_change_that_expects_another_version_is_refused(
    session: AsyncSession, databases: TenantDatabaseRepository, tenant: uuid.UUID
) -> None:
    row = await databases.register(tenant, new())
    old = row.version
    current = (await databases.set_status(row.id, TenantDatabaseStatus.INACTIVE, expected_version=old)).version
    verbs: list[Verb] = [
        lambda repository, key: repository.set_status(key, TenantDatabaseStatus.ERROR, expected_version=old),
        lambda repository, key: repository.update(key, TenantDatabaseUpdate(purpose="other"), expected_version=old),
        lambda repository, key: repository.update(key, TenantDatabaseUpdate(), expected_version=old),
        lambda repository, key: repository.update_connection_string(key, dsn("x.example"), expected_version=old),
        lambda repository, key: repository.delete(key, expected_version=old),
    ]
    for verb in verbs:
        with pytest.raises(StaleWriteError) as caught:
            await verb(databases, row.id)
        assert caught.value.details == {"expected_version": old, "version": current}
    with pytest.raises(InvalidDataError, match="expected_version"):
        await databases.delete(row.id, expected_version=-1)
    assert (row.status, row.host, row.version) == (TenantDatabaseStatus.INACTIVE, "db.example", current)
    with counting(session) as sent:
        await databases.delete(row.id, expected_version=current)
    assert len(sent) == 1
    assert await databases.get_or_none(row.id) is None


# --- opening


async def test_opening_is_one_round_trip_and_reads_the_row_anew(
    session: AsyncSession, databases: TenantDatabaseRepository, tenant: uuid.UUID
) -> None:
    row = await databases.register(tenant, new())
    await databases.update_connection_string(row.id, dsn(password="second"))
    later = row.connection_string_encrypted.text
    await databases.update_connection_string(row.id, dsn(password="third"))
    # Behind the session's back, as another process would.
    await sql(session, "UPDATE control_plane.tenant_databases SET connection_string_encrypted = $1", later)
    with counting(session) as sent:
        assert (await databases.connection_string(row.id)).dsn.password == "second"
    assert len(sent) == 1


async def test_a_read_session_may_open_and_changes_nothing(
    shared_manager: AsyncConnectionManager, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    keyring = keyring_of(key_text(f"k-{uuid.uuid4().hex[:12]}"))
    async with shared_manager.get_session() as session:
        row = await TenantDatabaseRepository(session, keyring).register(await tenant_of(session), new())
    async with shared_manager.get_read_session() as reading:
        repository = TenantDatabaseRepository(reading, keyring)
        assert (await repository.connection_string(row.id)).dsn.password == CANARY
        with pytest.raises(AccessDeniedError):
            await repository.set_status(row.id, TenantDatabaseStatus.ERROR)
        with pytest.raises(AccessDeniedError):
            await repository.update_connection_string(row.id, dsn())
        caplog.clear()
        with pytest.raises(AccessDeniedError):
            await repository.verify(row.id)
        assert not [record for record in caplog.records if record.name == "car_control_plane.secrets"]


async def test_without_a_keyring_nothing_is_sealed_or_opened(
    session: AsyncSession, databases: TenantDatabaseRepository, tenant: uuid.UUID
) -> None:
    row = await databases.register(tenant, new())
    lister = TenantDatabaseRepository(session, None)
    assert [one.id for one in await lister.list()] == [row.id]
    for call in (
        lister.register(tenant, new("x")),
        lister.update_connection_string(row.id, dsn()),
        lister.connection_string(row.id),
        lister.verify(row.id),
    ):
        with pytest.raises(ConfigurationError, match="keyring"):
            await call
    assert (await lister.update(row.id, TenantDatabaseUpdate(purpose="x"))).purpose == "x"
    await lister.delete(row.id)


async def test_the_log_says_who_opens_what_and_never_the_secret(
    session: AsyncSession, databases: TenantDatabaseRepository, tenant: uuid.UUID, caplog: pytest.LogCaptureFixture
) -> None:
    row = await databases.register(tenant, new())
    role = await session.scalar(_current_user())
    caplog.set_level(logging.DEBUG)
    await databases.connection_string(row.id)
    (record,) = (record for record in caplog.records if record.name == "car_control_plane.secrets")
    facts = {
        "database_id": str(row.id),
        "tenant_id": str(tenant),
        "purpose": "primary",
        "kid": "2026-11",
        "role": role,
        "actor": "the tests",
    }
    assert record.levelno == logging.INFO
    assert {name: vars(record)[name] for name in facts} == facts
    assert all(repr(fact) in record.getMessage() for fact in facts.values())

    caplog.clear()
    await sql(session, "UPDATE control_plane.tenant_databases SET host = 'evil.example'")
    with pytest.raises(DecryptionError):
        await databases.connection_string(row.id)
    (record,) = (record for record in caplog.records if record.name == "car_control_plane.secrets")
    assert record.levelno == logging.WARNING
    assert "(decryption)" in record.getMessage()
    assert str(row.id) in record.getMessage()
    assert CANARY not in caplog.text


def _current_user() -> Any:
    from sqlalchemy import func, select

    return select(func.current_user())


@pytest.mark.parametrize("actor", ["a\nb", "a\x1b[2J", 5])
def test_an_actor_that_would_forge_the_log_is_refused(session: AsyncSession, actor: Any) -> None:
    with pytest.raises(InvalidDataError, match="the actor"):
        TenantDatabaseRepository(session, actor=actor)


async def test_swapped_rows_both_refuse_and_the_third_opens(
    session: AsyncSession, databases: TenantDatabaseRepository, tenant: uuid.UUID
) -> None:
    other = await tenant_of(session, "globex")
    one = await databases.register(tenant, new(password="one"))
    two = await databases.register(other, new(password="two"))
    three = await databases.register(tenant, new("third", password="three"))
    await sql(
        session,
        "UPDATE control_plane.tenant_databases a SET connection_string_encrypted = b.connection_string_encrypted "
        "FROM control_plane.tenant_databases b WHERE (a.id, b.id) IN (($1, $2), ($2, $1))",
        one.id,
        two.id,
    )
    for row in (one, two):
        with pytest.raises(DecryptionError) as caught:
            await databases.connection_string(row.id)
        assert caught.value.details == {"database_id": str(row.id)}
        assert [*leaks(caught.value, "one@"), *leaks(caught.value, "two@")] == []
    assert (await databases.connection_string(three.id)).dsn.password == "three"
    await databases.update_connection_string(one.id, dsn(password="mended"))
    assert (await databases.connection_string(one.id)).dsn.password == "mended"


async def test_a_value_moved_between_two_databases_of_one_tenant_does_not_open(
    session: AsyncSession, databases: TenantDatabaseRepository, tenant: uuid.UUID
) -> None:
    one = await databases.register(tenant, new())
    two = await databases.register(tenant, new("second"))
    sealed = one.connection_string_encrypted.text
    await sql(
        session,
        "UPDATE control_plane.tenant_databases SET connection_string_encrypted = $1 WHERE id = $2",
        sealed,
        two.id,
    )
    with pytest.raises(DecryptionError):
        await databases.connection_string(two.id)
    assert (await databases.connection_string(one.id)).dsn.password == CANARY


@pytest.mark.parametrize(
    ("change", "columns"),
    [
        ("host = 'evil.example'", ["host"]),
        ("port = 5433", ["port"]),
        ("database_name = 'other'", ["database_name"]),
        ("host = 'DB.EXAMPLE', port = 1, database_name = 'x'", ["host", "port", "database_name"]),
    ],
)
async def test_a_row_whose_description_is_not_the_strings_is_not_opened(
    session: AsyncSession,
    databases: TenantDatabaseRepository,
    tenant: uuid.UUID,
    change: str,
    columns: list[str],
) -> None:
    row = await databases.register(tenant, new())
    await sql(session, "UPDATE control_plane.tenant_databases SET " + change)
    with pytest.raises(DecryptionError, match="does not match") as caught:
        await databases.connection_string(row.id)
    assert caught.value.details == {"database_id": str(row.id), "columns": columns}
    assert [*leaks(caught.value, CANARY)] == []
    assert "evil" not in str(caught.value)


async def test_damaged_rows_stop_no_other(manager: AsyncConnectionManager) -> None:
    keys = [key_text("old"), key_text("lost")]
    good = keyring_of(keys[0])
    async with manager.get_session() as session:
        tenant = await tenant_of(session)
        repository = TenantDatabaseRepository(session, good)
        rows = {
            purpose: await repository.register(tenant, new(purpose)) for purpose in ("good", "plain", "cut", "moved")
        }
        rows["lost"] = await TenantDatabaseRepository(session, keyring_of(keys[1])).register(tenant, new("lost"))
        await sql(session, "ALTER TABLE control_plane.tenant_databases DROP CONSTRAINT ck_tenant_databases_sealed")
        for text, purpose in (
            (dsn().get_secret_value(), "plain"),
            (rows["cut"].connection_string_encrypted.text[:-1], "cut"),
        ):
            await sql(
                session,
                "UPDATE control_plane.tenant_databases SET connection_string_encrypted = $1 WHERE purpose = $2",
                text,
                purpose,
            )
        await sql(session, "UPDATE control_plane.tenant_databases SET port = 1 WHERE purpose = 'moved'")
    async with manager.get_session() as session:
        repository = TenantDatabaseRepository(session, good)
        for purpose, kind in (
            ("plain", DecryptionError),
            ("cut", DecryptionError),
            ("moved", DecryptionError),
            ("lost", UnknownKeyError),
        ):
            error = await failure_of(repository.connection_string(rows[purpose].id))
            assert type(error) is kind
            assert error.details["database_id"] == str(rows[purpose].id)
            assert error.details.get("kid") == ("lost" if purpose == "lost" else None)
            assert [*leaks(error, CANARY)] == []
        assert (await repository.connection_string(rows["good"].id)).dsn.password == CANARY
        everything = {row.id for row in rows.values()}
        assert {row.id for row in await repository.list()} == everything
        assert {row.id for row in await repository.list_for_tenant(tenant)} == everything
        assert {row.id async for row in repository.stream()} == everything
        assert CANARY not in repr((await repository.list()).items)
        for row in await repository.list(kid="lost"):
            assert row.purpose == "lost"
        mended = await repository.update_connection_string(rows["plain"].id, dsn())
        assert (await repository.connection_string(mended.id)).dsn.password == CANARY
        await repository.set_status(rows["cut"].id, TenantDatabaseStatus.ERROR)
        await repository.delete(rows["cut"].id)


async def test_another_key_of_the_same_name_opens_nothing(
    session: AsyncSession, databases: TenantDatabaseRepository, tenant: uuid.UUID
) -> None:
    row = await databases.register(tenant, new())
    impostor = TenantDatabaseRepository(session, keyring_of(key_text("2026-11")))
    with pytest.raises(DecryptionError) as caught:
        await impostor.connection_string(row.id)
    assert caught.value.details == {"database_id": str(row.id)}


async def test_the_statement_log_shows_no_secret(
    session: AsyncSession,
    databases: TenantDatabaseRepository,
    tenant: uuid.UUID,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with counting(session) as sent, caplog.at_level(logging.DEBUG, "sqlalchemy"):
        row = await databases.register(tenant, new())
        await databases.update_connection_string(row.id, dsn("other.example"))
        await databases.connection_string(row.id)
        await databases.verify(row.id, timeout=0.01)
    assert len(sent) > 5
    assert CANARY not in repr(sent)
    assert CANARY not in caplog.text


# --- verifying


def local(port: int, *, password: str = PASSWORD, host: str = "127.0.0.1", **options: str) -> TenantDatabaseParts:
    return TenantDatabaseParts(
        host=host, port=port, database=DATABASE, user=USER, password=SecretStr(password), options=options
    )


async def test_verify_connects_and_records_what_it_found(
    session: AsyncSession, databases: TenantDatabaseRepository, tenant: uuid.UUID, cluster: Cluster
) -> None:
    async with front(cluster.primary) as port:
        row = await databases.register(tenant, local(port, sslmode="disable"))
        before = row.version
        with counting(session) as sent:
            result = await databases.verify(row.id)
    assert len(sent) == 2
    assert (result.error, result.ok, bool(result)) == (None, True, True)
    assert result.database is row
    assert result.latency_seconds > 0
    assert result.server_version == row.server_version
    assert row.server_version is not None
    assert row.server_version[0].isdigit()
    assert (result.tls_version, row.tls_version, row.verification_error) == (None, None, None)
    assert row.verified_at is not None
    assert abs(row.verified_at - datetime.now(UTC)) < timedelta(minutes=10)
    assert row.status is TenantDatabaseStatus.ACTIVE
    assert row.version > before


async def test_verify_says_which_tls_it_was(
    session: AsyncSession, keyring: Keyring, cluster: Cluster, certificates: Certificates
) -> None:
    production = await tenant_of(session, "prod", PRODUCTION)
    databases = TenantDatabaseRepository(session, keyring, policy=ANY)
    async with front(cluster.primary, tls=certificates.context()) as port:
        trusted = local(port, host="localhost", sslmode="verify-full", sslrootcert=str(certificates.authority))
        row = await databases.register(production, trusted)
        result = await databases.verify(row.id)
        assert (result.error, result.ok) == (None, True)
        assert result.tls_version == row.tls_version
        assert row.tls_version in {"TLSv1.2", "TLSv1.3"}

        foreign = local(port, host="localhost", sslmode="verify-full", sslrootcert=str(certificates.other_authority))
        await databases.update_connection_string(row.id, foreign.connection_string())
        result = await databases.verify(row.id)
        assert not result
        assert isinstance(result.error, ConfigurationError)
        assert (result.database.tls_version, result.database.server_version) == (None, None)
        assert row.verification_error == result.error.message
        assert [*leaks(result.error, CANARY)] == []

        # A policy that has become stricter since: judged anew when connecting.
        files = ConnectionPolicy(allow=frozenset({"files"}))
        result = await TenantDatabaseRepository(session, keyring, policy=files).verify(row.id)
        assert isinstance(result.error, AccessDeniedError)
        assert row.verification_error == result.error.message


@on_both
async def test_verify_records_a_refusal_as_a_finding(
    databases: TenantDatabaseRepository, tenant: uuid.UUID, cluster: Cluster
) -> None:
    async with front(cluster.primary) as port:
        row = await databases.register(tenant, local(port, password="wrong" + CANARY))
        result = await databases.verify(row.id)
        assert isinstance(result.error, ConfigurationError)
        assert (result.ok, bool(result)) == (False, False)
        assert result.database.verification_error == result.error.message
        assert result.database.verified_at is not None
        assert [*leaks(result.error, CANARY)] == []
        assert result.error.__traceback__ is None

        await databases.update_connection_string(row.id, local(port).connection_string())
        assert (result := await databases.verify(row.id))
        assert result.database.verification_error is None


async def test_verify_judges_by_the_environment_the_tenant_has_now(
    session: AsyncSession, databases: TenantDatabaseRepository, tenant: uuid.UUID, cluster: Cluster
) -> None:
    async with front(cluster.primary) as port:
        row = await databases.register(tenant, local(port))
        assert await databases.verify(row.id)
        await TenantRepository(session).update(tenant, TenantUpdate(environment=PRODUCTION))
        result = await databases.verify(row.id)
    assert isinstance(result.error, AccessDeniedError)
    assert result.database.server_version is None


@on_both
async def test_verify_finds_nobody_there(databases: TenantDatabaseRepository, tenant: uuid.UUID) -> None:
    row = await databases.register(tenant, local(unused_port()))
    result = await databases.verify(row.id)
    assert isinstance(result.error, ConnectionUnavailableError)
    assert result.database.verification_error == result.error.message


@on_both
async def test_verify_does_not_wait_for_ever(databases: TenantDatabaseRepository, tenant: uuid.UUID) -> None:
    with black_hole() as port:
        row = await databases.register(tenant, local(port))
        result = await databases.verify(row.id, timeout=0.2)
    assert isinstance(result.error, ConnectionUnavailableError)
    assert result.database.verification_error == result.error.message


def message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!i", len(body) + 4) + body


WELCOME = message(b"R", struct.pack("!i", 0)) + message(b"S", b"server_version\x0018.4 \x1b[2J\0") + message(b"Z", b"I")
"""What a server says whose version is none to print."""

NOISE = random.Random(0).randbytes(4096)


@on_both
@pytest.mark.parametrize(
    ("answer", "then"),
    [
        (b"", None),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", None),
        (NOISE, None),
        (WELCOME, None),
        (WELCOME, b""),
        (WELCOME, NOISE),
        (WELCOME, message(b"C", b"SHOW\0") + message(b"Z", b"I")),
    ],
    ids=["nothing", "http", "noise", "only a welcome", "silence later", "noise later", "strange version"],
)
async def test_verify_survives_a_server_that_is_none(
    databases: TenantDatabaseRepository, tenant: uuid.UUID, answer: bytes, then: bytes | None
) -> None:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(4096)
        writer.write(answer)
        if then is not None:
            await reader.read(4096)
            writer.write(then)
        await writer.drain()
        if then == b"":
            await reader.read()  # until the client gives up

    async with rogue(behave) as port:
        row = await databases.register(tenant, local(port, sslmode="disable"))
        result = await asyncio.wait_for(databases.verify(row.id, timeout=1), 60)  # or it would wait for ever
    assert isinstance(result.error, ControlPlaneError)
    assert result.database.verification_error == result.error.message
    assert result.database.server_version is None
    assert [*leaks(result.error, CANARY)] == []


async def test_verify_does_not_record_that_a_row_cannot_be_opened(
    session: AsyncSession, databases: TenantDatabaseRepository, tenant: uuid.UUID
) -> None:
    """It may be this process's key, and no fault of the database."""
    row = await databases.register(tenant, new())
    version = row.version
    stranger = TenantDatabaseRepository(session, keyring_of(key_text("other")))
    result = await stranger.verify(row.id)
    assert not result
    assert isinstance(result.error, UnknownKeyError)
    await session.refresh(row)
    assert (row.version, row.verified_at, row.verification_error) == (version, None, None)
    await sql(session, "UPDATE control_plane.tenant_databases SET host = 'evil.example'")
    result = await databases.verify(row.id)
    assert isinstance(result.error, DecryptionError)
    await session.refresh(row)
    assert (row.verified_at, row.verification_error) == (None, None)


@on_both
@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 301, "1", True])
async def test_a_time_limit_that_is_none_is_refused(databases: TenantDatabaseRepository, seconds: Any) -> None:
    with pytest.raises(InvalidDataError, match="timeout"):
        await databases.verify(uuid7(), timeout=seconds)


@pytest.mark.parametrize("event_", ["changed", "deleted"])
async def test_what_was_verified_is_not_recorded_for_a_row_that_has_changed(
    shared_manager: AsyncConnectionManager, event_: str
) -> None:
    keyring = keyring_of(key_text(f"k-{uuid.uuid4().hex[:12]}"))

    async def behave(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read(8)
        async with shared_manager.get_session() as other:
            repository = TenantDatabaseRepository(other, keyring)
            if event_ == "changed":
                await repository.update_connection_string(row.id, dsn("new.example"))
            else:
                await repository.delete(row.id)

    async with rogue(behave) as port:
        async with shared_manager.get_session() as session:
            row = await TenantDatabaseRepository(session, keyring).register(
                await tenant_of(session), local(port, sslmode="disable")
            )
        kind = StaleWriteError if event_ == "changed" else TenantDatabaseNotFoundError
        async with shared_manager.get_session() as session:
            with pytest.raises(kind):
                await TenantDatabaseRepository(session, keyring).verify(row.id)
    async with shared_manager.get_read_session() as reading:
        left = await TenantDatabaseRepository(reading).get_or_none(row.id)
    assert (left is None) == (event_ == "deleted")
    if left is not None:
        assert (left.host, left.verified_at, left.verification_error) == ("new.example", None, None)


@pytest.mark.parametrize("greeting", [b"", WELCOME], ids=["while connecting", "while asking"])
async def test_a_cancelled_verification_leaves_no_connection_and_no_secret(
    shared_manager: AsyncConnectionManager, greeting: bytes
) -> None:
    keyring = keyring_of(key_text(f"k-{uuid.uuid4().hex[:12]}"))
    reached, gone = asyncio.Event(), asyncio.Event()

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(4096)
        if greeting:
            writer.write(greeting)
            await reader.read(4096)
        reached.set()
        while await reader.read(4096):
            pass
        gone.set()

    async with rogue(behave) as port:
        async with shared_manager.get_session() as session:
            row = await TenantDatabaseRepository(session, keyring).register(
                await tenant_of(session), local(port, sslmode="disable")
            )

        async def verify() -> None:
            async with shared_manager.get_session() as session:
                await TenantDatabaseRepository(session, keyring).verify(row.id)

        task = asyncio.create_task(verify())
        await reached.wait()
        task.cancel()
        error = await failure_of(task)
        await asyncio.wait_for(gone.wait(), 60)
    assert isinstance(error, asyncio.CancelledError)
    assert [*leaks(error, CANARY)] == []
    assert shared_manager.pool_status().in_use == 0
