"""The password of a tenant's database is nowhere but in the opened string: not in what is stored, logged, dumped, shown, raised or answered.

One journey does with two passwords everything that can be done with them, and everything that can go wrong. Each test looks into one kind of
place for what the journey has left there. Each place is first shown to be one where a secret would be found.
"""

import asyncio
import base64
import functools
import gc
import io
import json
import logging
import os
import pickle
import secrets
import socket
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import EllipsisType
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.encoders import jsonable_encoder
from fastapi.responses import JSONResponse
from pydantic import BaseModel, SecretStr, TypeAdapter, ValidationError
from sqlalchemy import text, update
from sqlalchemy.ext.asyncio import create_async_engine
from sqlmodel import col

from car_control_plane import dsn as dsns
from car_control_plane.connection import AsyncConnectionManager
from car_control_plane.dialing import ConnectionPolicy, connect_tenant
from car_control_plane.embedded import EmbeddedPostgres
from car_control_plane.encryption import ConnectionString, FileKeys, Key, Keyring, SealedConnectionString, StaticKeys
from car_control_plane.errors import (
    AccessDeniedError,
    AlreadyExistsError,
    ClosedError,
    ConfigurationError,
    ConnectionUnavailableError,
    ControlPlaneError,
    DecryptionError,
    EncryptionError,
    InvalidDataError,
    KeyUnavailableError,
    StaleWriteError,
    TenantDatabaseNotFoundError,
    TenantNotFoundError,
    UnknownKeyError,
)
from car_control_plane.migrations import upgrade
from car_control_plane.models import (
    EncryptionKey,
    EncryptionKeyPublic,
    TenantCreate,
    TenantDatabase,
    TenantDatabaseCreate,
    TenantDatabasePublic,
    TenantDatabaseUpdate,
    TenantEnvironment,
    uuid7,
)
from car_control_plane.repositories import (
    EncryptionKeyRepository,
    TenantDatabaseParts,
    TenantDatabaseRepository,
    TenantRepository,
)
from car_control_plane.rotation import rotate_keys
from tests.fixtures.leaks import failure_of, failure_of_call, holds, leaks, shows
from tests.fixtures.postgres import create_database, drop_database
from tests.fixtures.programs import postgres_program
from tests.fixtures.servers import CANARY, Cluster, black_hole, front, rogue, unused_port

LOUD = ("sqlalchemy", "asyncpg", "asyncio", "httpx", "car_control_plane", "")


# --- keys, and what is sealed with them -------------------------------------------------------------------------------


def key(kid: str) -> Key:
    return Key.generate(kid)


def keys(*kids: str) -> str:
    """Keys as a setting has them; the first one is current."""
    return ",".join(f"{kid}:{key(kid).to_base64()}" for kid in kids)


@pytest.mark.parametrize("secret", [CANARY])
def test_the_finder_finds_a_secret_however_it_is_written(secret: str) -> None:
    """The proof for everything below."""
    for before in range(4):
        for behind in range(4):
            raw = secrets.token_bytes(before) + secret.encode() + secrets.token_bytes(behind)
            assert holds(raw, secret)
            assert holds(base64.b64encode(raw), secret)
            assert holds(base64.urlsafe_b64encode(raw).rstrip(b"=").decode(), secret)
            assert holds(raw.hex(), secret)
    assert not holds(secrets.token_hex(10_000), secret)
    assert len(list(shows({"password": secret}, secret))) > 5
    assert "SecretStr: pickle" in shows(SecretStr(secret), secret)  # pydantic's own


def test_what_is_opened_prints_masked_and_can_be_written_nowhere() -> None:
    opened = ConnectionString(f"postgresql://u:{CANARY}@h/d")
    assert holds(opened.reveal(), CANARY)
    assert list(shows(opened, CANARY)) == []
    assert list(shows(opened.dsn, CANARY)) == []
    assert list(shows([opened], CANARY)) == []
    for write in (pickle.dumps, json.dumps, TypeAdapter(Any).dump_json, vars):
        assert list(leaks(failure_of_call(functools.partial(write, opened)), CANARY)) == []

    def field_of_a_model() -> None:
        type("Careless", (BaseModel,), {"__annotations__": {"secret": ConnectionString}})

    assert isinstance(failure_of_call(field_of_a_model), TypeError)


def test_keys_print_their_names_only() -> None:
    material = bytes(range(32))
    spoken = base64.b64encode(material).decode()
    one = Key("k1", material)
    assert one.to_base64() == spoken
    for thing in (one, [one], {"key": one}, StaticKeys(f"k1:{spoken}"), Keyring(StaticKeys(f"k1:{spoken}"))):
        assert list(shows(thing, spoken)) == []
        assert repr(material) not in f"{thing!r} {getattr(thing, '__dict__', '')!r}"
    assert not holds(one.check_value, spoken)


@pytest.mark.parametrize(
    "bad",
    [
        "{key}",
        "k1={key}",
        "K1:{key}",
        "k 1:{key}",
        "{key}:k1",
        "k1:{key}:{key}",
        "k1:{key}:curent",
        "k1:{key},k1:{key}",
        "k1:{key},k2:{key}",
        "k1:{key}x",
        "k1:{key}\x00",
        "k1:{key},k2",
        "k1:{key},:",
        "k1:{key}:retired",
        "k1:{key}:pending,k2:{key}",
        "postgresql://k1:{key}@h/d",
    ],
)
async def test_a_refused_list_of_keys_is_not_shown(bad: str, tmp_path: Path) -> None:
    material = secrets.token_bytes(32)
    spoken = base64.b64encode(material).decode()
    written = bad.format(key=spoken)
    error = failure_of_call(functools.partial(StaticKeys, written))
    assert isinstance(error, ConfigurationError)
    assert list(leaks(error, spoken[:-1])) == []
    file = tmp_path / "keys"
    file.write_text(written, encoding="utf-8")
    file.chmod(0o600)
    error = await failure_of(FileKeys(file).list())
    assert isinstance(error, ConfigurationError)
    assert list(leaks(error, spoken[:-1])) == []


@pytest.mark.parametrize("kid", ["k1", "K1"])
def test_a_key_that_is_none_is_not_shown(kid: str) -> None:
    material = secrets.token_bytes(31)
    spoken = base64.b64encode(material).decode()
    for make in (
        functools.partial(Key, kid, material),
        functools.partial(Key.from_base64, kid, spoken),
        functools.partial(Key.from_base64, spoken, kid),  # the other way round
    ):
        error = failure_of_call(make)
        assert isinstance(error, ConfigurationError)
        assert list(leaks(error, spoken[:-2])) == []
        assert list(leaks(error, repr(material)[2:20])) == []


@pytest.mark.parametrize("bad", [chr(0xDC80), chr(0xD800)], ids=["low", "high"])
async def test_text_that_cannot_be_sealed_is_not_shown(bad: str) -> None:
    """UnicodeEncodeError carries the whole text it could not write."""
    plain = failure_of_call(f"{CANARY}{bad}".encode)
    assert any("variables" in place or "args" in place for place in leaks(plain, CANARY))
    async with Keyring(StaticKeys(keys("k1"))) as keyring:
        for secret in (f"postgresql://u:{CANARY}{bad}@h/d", ConnectionString(f"postgresql://u:{CANARY}{bad}@h/d")):
            error = await failure_of(keyring.seal(secret, tenant_id=uuid7(), database_id=uuid7()))
            del secret
            assert isinstance(error, ControlPlaneError)
            assert list(leaks(error, CANARY)) == []


async def test_what_does_not_open_is_not_shown() -> None:
    tenant, database = uuid7(), uuid7()
    async with Keyring(StaticKeys(keys("k1"))) as keyring, Keyring(StaticKeys(keys("k1"))) as same_name:
        good = await keyring.seal(f"postgresql://u:{CANARY}@h/d", tenant_id=tenant, database_id=database)
        assert not holds(good.text, CANARY)
        body = good.text.rpartition(":")[2]
        for opener, stored, of_tenant, of_database, expected in (
            (keyring, good.text, uuid7(), database, DecryptionError),
            (keyring, good.text, tenant, uuid7(), DecryptionError),
            (same_name, good.text, tenant, database, DecryptionError),
            (keyring, f"postgresql://u:{CANARY}@h/d", tenant, database, DecryptionError),
            (keyring, f"ccp1:k1:{CANARY}", tenant, database, DecryptionError),
            (keyring, f"ccp1:k1:{body}{CANARY}", tenant, database, DecryptionError),
            (keyring, f"ccp1:k1:{body}:{CANARY}", tenant, database, DecryptionError),
            (keyring, f"{CANARY}:k1:{body}", tenant, database, DecryptionError),
            (keyring, f"ccp1:k2:{CANARY}", tenant, database, UnknownKeyError),
        ):
            sealed = SealedConnectionString(stored)
            error = await failure_of(opener.unseal(sealed, tenant_id=of_tenant, database_id=of_database))
            assert isinstance(error, expected)
            assert list(leaks(error, CANARY)) == []


# --- the journey ------------------------------------------------------------------------------------------------------


class Journey:
    """Everything that is done, and what is left of it: every error raised, every object handed out, what was logged.

    The password that works holds the canary, and so does the one that does not.
    """

    own: TenantDatabase
    second: TenantDatabase
    foreign: TenantDatabase
    remote: TenantDatabase

    def __init__(
        self, manager: AsyncConnectionManager, cluster: Cluster, port: int, first: Keyring, both: Keyring
    ) -> None:
        self.manager, self.cluster, self.first, self.both = manager, cluster, first, both
        self.works = SecretStr(cluster.dsn(port, sslmode="disable"))
        self.wrong = SecretStr(cluster.dsn(port, password=CANARY, sslmode="disable"))
        self.no_tls = SecretStr(cluster.dsn(port, sslmode="require"))
        self.far = SecretStr(f"postgresql://u:{CANARY}@db.example/d?sslmode=verify-full")
        self.errors: list[tuple[str, BaseException]] = []
        self.things: list[Any] = [first, both, first.provider]
        self.log = ""

    @classmethod
    async def made(cls, manager: AsyncConnectionManager, cluster: Cluster) -> "Journey":
        """Make it from its beginning to its end."""
        first = Keyring(StaticKeys(text_of_k1 := keys("k1")))
        both = Keyring(StaticKeys(f"{keys('k2')},{text_of_k1}"))
        async with first, both, front(cluster.primary) as port:
            journey = cls(manager, cluster, port, first, both)
            await journey.what_works()
            await journey.what_servers_refuse()
            await journey.what_policies_refuse()
            await journey.what_is_no_form()
            await journey.what_conflicts()
            await journey.what_others_do_to_the_rows()
            await journey.another_key()
            return journey

    async def do(self, verb: str, *args: Any, keyring: Keyring | EllipsisType | None = ..., **how: Any) -> Any:
        async with self.manager.get_session() as session:
            repository = TenantDatabaseRepository(session, self.first if keyring is ... else keyring)
            return await getattr(repository, verb)(*args, **how)

    async def fails(self, kind: type[BaseException] | tuple[type[BaseException], ...], work: Awaitable[object]) -> None:
        error = await failure_of(work)
        assert isinstance(error, kind), f"{error!r}"
        self.errors.append((f"{len(self.errors)} {error}", error))

    async def found(self, kind: type[BaseException] | tuple[type[BaseException], ...], **how: Any) -> None:
        """Verify a database that fails: a result with an error, which is kept in the row."""
        result = await self.do("verify", self.second.id, **how)
        assert isinstance(result.error, kind), f"{result.error!r}"
        self.things += [result, await self.do("get", self.second.id)]
        self.errors.append((f"{len(self.errors)} {result.error}", result.error))

    async def sql(self, statement: str, **values: Any) -> None:
        async with self.manager.get_session() as session:
            await _sql(session, statement, **values)

    async def what_works(self) -> None:
        tenants = []
        for name in ("own", "other", "strict"):
            environment = TenantEnvironment.PRODUCTION if name == "strict" else TenantEnvironment.DEVELOPMENT
            async with self.manager.get_session() as session:
                tenants.append(await TenantRepository(session).create(TenantCreate(name=name, environment=environment)))
        own, other, strict = (tenant.tenant_id for tenant in tenants)
        create = TenantDatabaseCreate(connection_string=self.works)
        self.own = await self.do("register", own, create)
        self.second = await self.do(
            "register", own, TenantDatabaseCreate(connection_string=self.works, purpose="second")
        )
        self.foreign = await self.do("register", other, create)
        self.remote = await self.do("register", strict, {"connection_string": self.far.get_secret_value()})
        opened = await self.do("connection_string", self.own.id)
        assert holds(opened.reveal(), CANARY)
        verified = await self.do("verify", self.own.id)
        assert verified
        self.things += [self.own, self.second, self.foreign, self.remote, opened, opened.dsn, verified]
        self.things += [TenantDatabasePublic.model_validate(verified.database)]
        self.things += [await self.do("list", host="127.0.0.1"), await self.do("list_for_tenant", own)]
        self.things += [await self.do("update", self.own.id, {"connection_string": self.works.get_secret_value()})]
        self.things += [await self.do("set_status", self.own.id, "inactive")]

    async def what_servers_refuse(self) -> None:
        nobody = SecretStr(self.cluster.dsn(unused_port(), sslmode="disable"))
        for secret, kind in (
            (self.wrong, ConfigurationError),
            (nobody, ConnectionUnavailableError),
            (self.no_tls, ConfigurationError),
        ):
            await self.do("update_connection_string", self.second.id, secret)
            await self.found(kind)
        with black_hole() as silent:
            secret = SecretStr(self.cluster.dsn(silent, sslmode="disable"))
            await self.do("update_connection_string", self.second.id, secret)
            await self.found(ConnectionUnavailableError, timeout=0.2)
        arrived = asyncio.Event()

        async def say_nothing(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
            arrived.set()
            await reader.read()

        async with rogue(say_nothing) as silent:
            secret = SecretStr(self.cluster.dsn(silent, sslmode="disable"))
            await self.do("update_connection_string", self.second.id, secret)
            task = asyncio.ensure_future(self.do("verify", self.second.id))
            await arrived.wait()
            task.cancel()
            await self.fails(asyncio.CancelledError, task)
        await self.do("update_connection_string", self.second.id, self.works)
        for environment in ("production", "development"):  # what was taken in one is not connected to in the other
            await self.sql(
                "UPDATE control_plane.tenants SET environment = CAST(:new AS control_plane.tenant_environment) "
                "WHERE name = 'own'",
                new=environment,
            )
            if environment == "production":
                await self.found((InvalidDataError, AccessDeniedError))
        assert await self.do("verify", self.second.id)

    async def what_policies_refuse(self) -> None:
        refused = (InvalidDataError, AccessDeniedError)
        strict = self.remote.tenant_id
        for bad in REFUSED_STRINGS:
            create = TenantDatabaseCreate(connection_string=SecretStr(bad), purpose="new")
            await self.fails(refused, self.do("register", strict, create))
            await self.fails(refused, self.do("register", strict, {"connection_string": bad, "purpose": "new"}))
            await self.fails(refused, self.do("update_connection_string", self.remote.id, SecretStr(bad)))
            await self.fails(refused, self.do("update", self.remote.id, {"connection_string": bad}))
        for place in REFUSED_PLACES:
            secret = SecretStr(f"postgresql://u:{CANARY}@{place}/d?sslmode=verify-full")
            await self.fails(AccessDeniedError, self.do("update_connection_string", self.remote.id, secret))

    async def what_is_no_form(self) -> None:
        text = self.works.get_secret_value()
        for form in (
            {"connection_string": text, "purpose": f"{CANARY}!"},
            {"connection_string": text, "purpos": "new"},
            {"connection_string": text, "purpose": None},
            {"connection_string": [text]},
            {"connection_string": text.encode() + b"\xff"},
            {"connection_string": {"password": CANARY}},
            {"host": "db.example", "database": "d", "user": "u", "password": CANARY, "port": CANARY},
            {"host": f"db.example/{CANARY}", "database": "d", "user": "u", "password": CANARY},
            {"host": "db.example", "database": "d", "user": "u", "options": {"password": CANARY}},
            {"host": "db.example", "database": "d", "user": "u", "password": [CANARY]},
            text,
            text.encode(),
            None,
        ):
            await self.fails(InvalidDataError, self.do("register", self.own.tenant_id, form))
            await self.fails(InvalidDataError, self.do("update", self.own.id, form))
            await self.fails(InvalidDataError, self.do("update_connection_string", self.own.id, form))
        for careful in (
            functools.partial(TenantDatabaseUpdate, connection_string=self.works, purpose="!"),
            functools.partial(_row_of, self.own, self.works),
            functools.partial(setattr, self.own, "connection_string_encrypted", self.works),
        ):
            await self.fails(ValidationError, _call(careful))

    async def what_conflicts(self) -> None:
        good = TenantDatabaseCreate(connection_string=self.works)
        own, change = self.own.id, "update_connection_string"
        await self.fails(TenantNotFoundError, self.do("register", uuid7(), good))
        await self.fails(AlreadyExistsError, self.do("register", self.own.tenant_id, good))
        await self.fails(StaleWriteError, self.do(change, own, self.works, expected_version=1))
        await self.fails(TenantDatabaseNotFoundError, self.do(change, uuid7(), self.works))
        await self.fails(TenantDatabaseNotFoundError, self.do("connection_string", uuid7()))
        await self.fails(ConfigurationError, self.do("register", self.own.tenant_id, good, keyring=None))
        for provider, kind in ((Broken(), KeyUnavailableError), (StaticKeys(keys("k1")), EncryptionError)):
            keyring = Keyring(provider)
            refused = KeyUnavailableError if kind is KeyUnavailableError else ConfigurationError
            await self.fails(refused, self.do("register", self.foreign.tenant_id, good, keyring=keyring))
            await self.fails(refused, self.do(change, own, self.works, keyring=keyring))
            await self.fails(kind, self.do("connection_string", own, keyring=keyring))
            await keyring.close()
            await self.fails(ClosedError, self.do(change, own, self.works, keyring=keyring))

    async def what_others_do_to_the_rows(self) -> None:
        for harm in (
            "host = 'evil.example'",
            "database_name = 'other'",
            "connection_string_encrypted = (SELECT connection_string_encrypted FROM control_plane.tenant_databases"
            " WHERE id = :other)",
            "connection_string_encrypted = connection_string_encrypted || 'AAAA'",
            "connection_string_encrypted = 'ccp1:k1:AAAA'",
            "connection_string_encrypted = 'ccp1:k0:AAAA'",
        ):
            where = "WHERE id = :id AND CAST(:other AS uuid) IS NOT NULL"
            ids = {"id": self.second.id, "other": self.foreign.id}
            await self.sql(f"UPDATE control_plane.tenant_databases SET {harm} {where}", **ids)
            await self.fails(EncryptionError, self.do("connection_string", self.second.id))
            await self.found(EncryptionError)
            await self.do("update_connection_string", self.second.id, self.works)

    async def another_key(self) -> None:
        self.things.append(await rotate_keys(self.manager, self.both))
        await self.fails(UnknownKeyError, self.do("connection_string", self.own.id))
        assert holds((await self.do("connection_string", self.own.id, keyring=self.both)).reveal(), CANARY)


class Broken:
    """A source of keys that is down, and says too much about it."""

    name = "broken"

    async def list(self) -> Any:
        raise OSError(f"postgresql://u:{CANARY}@h/d")

    async def get(self, kid: str) -> Key:
        raise OSError(f"{kid} postgresql://u:{CANARY}@h/d")

    async def close(self) -> None: ...


REFUSED_STRINGS = (
    CANARY,
    f"mysql://u:{CANARY}@db.example/d",
    f"postgresql://u:p@{CANARY}@db.example/d",
    f"postgresql://u:p/{CANARY}@db.example/d",
    f"postgresql://u:{CANARY}@db.example:port/d",
    f"postgresql://u:{CANARY}@db.example/d?sslmod=verify-full",
    f"postgresql://u@db.example/d?passwort={CANARY}",
    f"postgresql://u:{CANARY}@db.example/d?sslmode={CANARY}",
    f"postgresql://u:%zz{CANARY}@db.example/d",
    f"postgresql://u:{CANARY}\udc80@db.example/d?sslmode=verify-full",
    f"host=db.example password='{CANARY}",
    f"embedded:{CANARY}",
    f"postgresql://u:{CANARY}@/d?host=/run/postgresql",
    f"postgresql://u:{CANARY}@/d?service=other",
    f"postgresql://u:{CANARY}@one.example,two.example/d?sslmode=verify-full",
    f"postgresql://u:{CANARY}@db.example/d?sslmode=verify-full&sslrootcert=/etc/ca.pem",
    f"postgresql://u:{CANARY}@db.example/d?sslmode=verify-full&sslkey=/etc/key&sslpassword={CANARY}",
    f"postgresql://u:{CANARY}@db.example/d?sslmode=verify-full&passfile=/etc/passwords",
    f"postgresql://u:{CANARY}@db.example/d?sslmode=require",
    f"postgresql://u:{CANARY}@db.example/d?sslmode=disable",
    f"postgresql://u:{CANARY}@db.example?sslmode=verify-full",
    f"postgresql://:{CANARY}@db.example/d?sslmode=verify-full",
    f"postgresql://u:{CANARY}@{'h' * 300}.example/d?sslmode=verify-full",
    f"postgresql://u:{CANARY}@db.example/{'d' * 64}?sslmode=verify-full",
)
REFUSED_PLACES = ("127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "169.254.169.254", "0.0.0.0", "[fe80::1]", "localhost")


async def _call(work: Callable[[], object]) -> None:
    work()


async def _sql(session: Any, statement: str, **values: Any) -> None:
    await (await session.connection()).execute(text(statement), values)


def _row_of(row: TenantDatabase, plain: Any) -> TenantDatabase:
    return TenantDatabase(
        tenant_id=row.tenant_id, connection_string_encrypted=plain, database_name="d", host="h", purpose="careless"
    )


async def _store_plain_text(manager: AsyncConnectionManager, row: TenantDatabase, secret: SecretStr) -> None:
    async with manager.get_session() as session:
        statement = update(TenantDatabase).where(col(TenantDatabase.id) == row.id)
        await session.exec(statement.values(connection_string_encrypted=secret.get_secret_value()))


Travelled = tuple[Journey, AsyncConnectionManager, str]


async def test_plain_text_for_the_column_is_refused_and_not_shown(travelled: Travelled) -> None:
    """By SQLAlchemy's own way, past the models: its error has the parameters, `hide_parameters` or not."""
    journey, manager, _ = travelled
    error = await failure_of(_store_plain_text(manager, journey.own, SecretStr(f"postgresql://u:{CANARY}@h/d")))
    assert isinstance(error, InvalidDataError)
    assert list(leaks(error, CANARY)) == []


@pytest.fixture(scope="module")
async def travelled(server_dsn: str, template_database: str, cluster: Cluster) -> AsyncIterator[Travelled]:
    """The journey, made once on the server under test; its database is still there."""
    name = f"car_cp_secrets_{secrets.token_hex(6)}"
    dsn = await create_database(server_dsn, name, template_database)
    said = io.StringIO()
    listener = logging.StreamHandler(said)
    listener.setFormatter(logging.Formatter("%(name)s %(levelname)s %(message)s %(extra)s", defaults={"extra": ""}))
    levels = {each: logging.getLogger(each).level for each in LOUD}
    loop = asyncio.get_running_loop()
    loop.set_debug(True)
    try:
        for each in LOUD:
            logging.getLogger(each).setLevel(logging.DEBUG)
        logging.getLogger().addHandler(listener)
        async with AsyncConnectionManager(dsn) as manager:
            journey = await Journey.made(manager, cluster)
            gc.collect()
            journey.log = said.getvalue()
            yield journey, manager, dsn
    finally:
        loop.set_debug(False)
        logging.getLogger().removeHandler(listener)
        for each, level in levels.items():
            logging.getLogger(each).setLevel(level)
        await drop_database(server_dsn, name)


def test_no_error_shows_it(travelled: Travelled) -> None:
    """Texts, causes, contexts, pickles, and the variables of every frame of ours and of every library underneath."""
    errors = travelled[0].errors
    assert len(errors) > 150
    assert "\n".join(f"{label}: {place}" for label, error in errors for place in leaks(error, CANARY)) == ""


def test_no_validation_error_shows_it(travelled: Travelled) -> None:
    """Not in what pydantic and FastAPI make of it either; a plain text stays in the frames it was handed through, as in the caller's own."""
    row = travelled[0].own
    plain = f"postgresql://u:{CANARY}@h/d"
    create: Any = TenantDatabaseCreate
    change: Any = TenantDatabaseUpdate
    parts: Any = TenantDatabaseParts
    for careless in (
        functools.partial(create, connection_string=[plain]),
        functools.partial(create, connection_string=plain, purpose=plain),
        functools.partial(create, connection_string=plain, purpos="primary"),
        functools.partial(change, connection_string=None, purpose=plain),
        functools.partial(TenantDatabaseCreate.model_validate, {"connection_string": {"url": plain}}),
        functools.partial(TenantDatabaseCreate.model_validate_json, json.dumps({"connection_string": [plain]})),
        functools.partial(TypeAdapter(TenantDatabaseCreate).validate_python, plain),
        functools.partial(parts, host="h", database="d", user="u", password=[plain]),
        functools.partial(_row_of, row, plain),
        functools.partial(setattr, row, "connection_string_encrypted", plain),
        functools.partial(row.sqlmodel_update, {"connection_string_encrypted": plain}),
    ):
        error = failure_of_call(careless)
        assert isinstance(error, ValidationError)
        assert [place for place in leaks(error, CANARY) if " in " not in place] == []
        for told in (repr(error.errors()), error.json(), repr(error.errors(include_input=True))):
            assert not holds(told, CANARY)

    class Stock(BaseModel):  # what pydantic does by itself
        secret: SecretStr
        purpose: int

    stock = failure_of_call(functools.partial(Stock, secret=[CANARY], purpose=1))
    assert isinstance(stock, ValidationError)
    assert holds(stock.json(), CANARY)


def test_nothing_handed_out_shows_it(travelled: Travelled) -> None:
    things = travelled[0].things
    assert len(things) > 15
    assert [way for thing in things for way in shows(thing, CANARY)] == []
    assert not any(holds(repr(thing), CANARY) for thing in travelled[1].settings.__dict__.values())


def test_no_log_shows_it(travelled: Travelled) -> None:
    """SQLAlchemy at its loudest (what `echo=True` prints), asyncpg, asyncio's debug mode, ours."""
    log = travelled[0].log
    for logger in ("sqlalchemy.engine", "sqlalchemy.pool", "asyncio", "car_control_plane.secrets"):
        assert logger in log
    assert "UPDATE control_plane.tenant_databases" in log
    assert "opened a connection string" in log
    assert "refused to open a connection string" in log
    assert not holds(log, CANARY)


async def test_a_log_of_another_engine_would(travelled: Travelled, caplog: pytest.LogCaptureFixture) -> None:
    manager = travelled[1]
    engine = create_async_engine("postgresql+asyncpg://", async_creator=manager.connect, echo=True)
    async with engine.connect() as connection:
        await connection.execute(text("SELECT :secret"), {"secret": CANARY})
    await engine.dispose()
    assert holds(caplog.text, CANARY)


# --- what a tenant's server is sent -----------------------------------------------------------------------------------


@pytest.mark.parametrize("environment", ["production", "development"])
async def test_an_answer_of_the_dns_does_not_turn_tls_off(environment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name is verified by its certificate wherever it leads; that its address is this machine's is somebody else's word."""
    heard = b""

    async def ask_for_the_password(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal heard
        first = await reader.read(1000)
        writer.write(b"N" if first[4:8] == SSL_REQUEST else b"R\x00\x00\x00\x08\x00\x00\x00\x03")
        await writer.drain()
        heard += first + await reader.read(1000)

    async def resolve(_: str, port: int, **__: Any) -> Any:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    policy = ConnectionPolicy(allow=frozenset({"internal-hosts"}))
    who: dict[str, Any] = {"tenant_id": uuid7(), "environment": environment, "policy": policy, "timeout": 5.0}
    async with rogue(ask_for_the_password) as port:
        for host, told in (("db.example", False), ("127.0.0.1", True)):  # the second one asks for it, in so many words
            dsn = dsns.parse(f"postgresql://u:{CANARY}@{host}:{port}/d", environment=False)
            with monkeypatch.context() as patch:
                patch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
                error = await failure_of(connect_tenant(dsn, **who))
            assert list(leaks(error, CANARY)) == []
            assert holds(heard, CANARY) == told, host


SSL_REQUEST = b"\x04\xd2\x16\x2f"


# --- what the server sees ---------------------------------------------------------------------------------------------


def dumped(dsn: str, *options: str) -> bytes:
    """Dump a database as people do: the password, if there is one, in the environment."""
    return postgres_program("pg_dump", dsn, *options)


async def test_a_dump_shows_nothing(travelled: Travelled) -> None:
    _, manager, dsn = travelled
    for options in ((), ("--inserts",), ("-Fc", "-Z0"), ("-Ft",)):
        dump = await asyncio.to_thread(dumped, dsn, *options)
        assert b"ccp1:k2:" in dump
        assert not holds(dump, CANARY)
    for reason, found in ((CANARY, True), (None, False)):
        async with manager.get_session() as session:
            await _sql(session, "UPDATE control_plane.tenants SET status_reason = :new WHERE name = 'own'", new=reason)
        assert holds(await asyncio.to_thread(dumped, dsn), CANARY) == found


async def test_the_servers_own_log_shows_nothing(cluster: Cluster, tmp_path: Path) -> None:
    """Every statement with every parameter, every plan, every connection."""
    settings = {
        "log_min_duration_statement": "0",
        "log_statement": "all",
        "log_min_messages": "debug1",
        "log_min_error_statement": "debug5",
        "log_error_verbosity": "verbose",
        "log_connections": "on",
        "log_parameter_max_length_on_error": "-1",
    }
    server = EmbeddedPostgres(durable=False, settings=settings)
    await asyncio.to_thread(server.start)
    try:
        await asyncio.to_thread(server.create_database, "control_plane")
        async with AsyncConnectionManager(server.dsn("control_plane")) as manager:
            await upgrade(manager)
            await Journey.made(manager, cluster)
            log = server.log_path.read_bytes()
            assert b"ccp1:k1:" in log  # parameters are there
            assert b"resealing" in log
            assert not holds(log, CANARY)
            connection = await manager.connect()
            await connection.fetchval("SELECT $1::text", CANARY)
            await connection.close()
        assert holds(server.log_path.read_bytes(), CANARY)
    finally:
        await asyncio.to_thread(server.stop)


async def test_running_statements_show_nothing(travelled: Travelled, cluster: Cluster) -> None:
    """`pg_stat_activity` while everything waits for a lock."""
    journey, manager, dsn = travelled
    own, second = journey.own.id, journey.second.id

    async def do(name: str, *args: Any) -> None:
        async with Keyring(StaticKeys(keys("k9"))) as keyring, patient.get_session() as session:
            await getattr(TenantDatabaseRepository(session, keyring), name)(*args)

    works = SecretStr(cluster.dsn(5432, sslmode="disable"))
    async with AsyncConnectionManager(dsn, lock_timeout_seconds=0) as patient:
        watcher, blocker = await manager.connect(), await manager.connect()
        try:
            transaction = blocker.transaction()
            await transaction.start()
            await blocker.execute("LOCK TABLE control_plane.tenant_databases IN ACCESS EXCLUSIVE MODE")
            waiting = [
                asyncio.ensure_future(do("update_connection_string", own, works)),
                asyncio.ensure_future(do("connection_string", second)),
                asyncio.ensure_future(do("verify", second)),
                asyncio.ensure_future(do("list")),
            ]
            while await watcher.fetchval(_WAITING) < len(waiting):
                assert not any(task.done() for task in waiting)
            seen = await watcher.fetch("SELECT a::text FROM pg_stat_activity a")
            await transaction.rollback()
            await asyncio.gather(*waiting, return_exceptions=True)
            assert any("tenant_databases" in row[0] for row in seen)
            assert not any(holds(row[0], CANARY) for row in seen)
            await blocker.fetchval(f"SELECT '{CANARY}'")
            seen = await watcher.fetch("SELECT a::text FROM pg_stat_activity a")
            assert any(holds(row[0], CANARY) for row in seen)
        finally:
            await watcher.close()
            await blocker.close()


_WAITING = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"


# --- what a web application answers -----------------------------------------------------------------------------------


def application(manager: AsyncConnectionManager, keyring: Keyring) -> FastAPI:
    """Ours as they are: schemas as bodies and answers, rows as answers by mistake, errors let through, debug on."""
    app = FastAPI(debug=True)

    @app.exception_handler(ControlPlaneError)
    async def answer(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ControlPlaneError)
        told = {"code": error.code, "message": str(error), "details": dict(error.details)}
        return JSONResponse(jsonable_encoder(told), error.http_status)

    @asynccontextmanager
    async def databases() -> AsyncIterator[TenantDatabaseRepository]:
        async with manager.get_session() as session:
            yield TenantDatabaseRepository(session, keyring)

    @app.post("/tenants/{tenant_id}/databases", status_code=201, response_model=TenantDatabasePublic)
    async def register(tenant_id: uuid.UUID, body: TenantDatabaseCreate) -> TenantDatabase:
        async with databases() as repository:
            return await repository.register(tenant_id, body)

    @app.post("/parts/{tenant_id}", status_code=201)
    async def register_parts(tenant_id: uuid.UUID, body: TenantDatabaseParts) -> TenantDatabasePublic:
        async with databases() as repository:
            return TenantDatabasePublic.model_validate(await repository.register(tenant_id, body))

    @app.patch("/databases/{database_id}")
    async def change(database_id: uuid.UUID, patch: TenantDatabaseUpdate) -> TenantDatabasePublic:
        async with databases() as repository:
            return TenantDatabasePublic.model_validate(await repository.update(database_id, patch))

    @app.post("/echo")
    async def echo(body: TenantDatabaseCreate) -> TenantDatabaseCreate:
        return body

    @app.get("/rows")
    async def rows() -> list[TenantDatabase]:
        async with databases() as repository:
            return list(await repository.list())

    @app.get("/keys")
    async def list_keys() -> list[EncryptionKeyPublic]:
        async with manager.get_read_session() as session:
            return [EncryptionKeyPublic.model_validate(row) for row in await EncryptionKeyRepository(session).list()]

    @app.get("/key-rows")
    async def key_rows() -> list[EncryptionKey]:
        async with manager.get_read_session() as session:
            return await EncryptionKeyRepository(session).list()

    @app.post("/rows")
    async def take_a_row(row: TenantDatabase) -> None:
        del row

    @app.get("/opened/{database_id}", response_model=None)
    async def opened(database_id: uuid.UUID) -> Any:
        async with databases() as repository:
            return await repository.connection_string(database_id)

    @app.get("/broken/{database_id}")
    async def broken(database_id: uuid.UUID) -> None:
        async with databases() as repository:
            secret = await repository.connection_string(database_id)
            raise RuntimeError(f"{secret} {secret!r} {secret.dsn}")

    return app


async def test_no_answer_of_a_web_application_shows_it(travelled: Travelled, cluster: Cluster) -> None:
    journey, manager, _ = travelled
    plain = f"postgresql://u:{CANARY}@127.0.0.1/d?sslmode=disable"
    async with manager.get_session() as session:
        tenants = TenantRepository(session)
        tenant = (await tenants.create(TenantCreate(name="web", environment=TenantEnvironment.DEVELOPMENT))).tenant_id
        strict = await tenants.get_by_name("strict")
    place = f"/tenants/{tenant}/databases"
    asked: list[tuple[int, str, str, Any]] = [
        (201, "POST", place, {"connection_string": plain}),
        (409, "POST", place, {"connection_string": plain}),
        (422, "POST", place, {"connection_string": [plain]}),
        (422, "POST", place, {"connection_string": plain, "purpose": plain}),
        (422, "POST", place, {"connection_string": plain, plain[:10]: 1}),
        (422, "POST", place, plain),
        (422, "POST", place, {"connection_string": plain + "&sslmod=x", "purpose": "other"}),
        (422, "POST", f"/tenants/{strict.tenant_id}/databases", {"connection_string": plain, "purpose": "other"}),
        (404, "POST", f"/tenants/{uuid7()}/databases", {"connection_string": plain}),
        (422, "POST", f"/parts/{tenant}", {"host": "h", "database": "d", "user": "u", "password": [CANARY]}),
        (422, "POST", f"/parts/{tenant}", {"host": "h", "database": "d", "user": "u", "options": {"password": CANARY}}),
        (404, "PATCH", f"/databases/{uuid7()}", {"connection_string": plain}),
        (422, "PATCH", f"/databases/{uuid7()}", {"connection_string": plain, "purpose": "!"}),
        (422, "PATCH", f"/databases/{uuid7()}", {"connection_string": None}),
        (200, "POST", "/echo", {"connection_string": plain}),
        (422, "POST", "/rows", {"connection_string_encrypted": plain, "host": "h"}),
        (200, "GET", "/rows", None),
        (200, "GET", "/keys", None),
        (200, "GET", "/key-rows", None),
        (200, "GET", "/openapi.json", None),
    ]
    async with Keyring(StaticKeys(keys("web"))) as keyring:
        transport = httpx.ASGITransport(app=application(manager, keyring), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for status, method, path, body in asked:
                answer = await client.request(method, path, json=body)
                assert answer.status_code == status, answer.text
                assert not holds(answer.content, CANARY), (method, path, body)
                if path != "/openapi.json":  # where the column's name must not be either
                    assert "ccp1:" not in answer.text
                else:
                    assert "connection_string_encrypted" not in answer.text
                    assert '"wrapped"' not in answer.text
            # A page with the traceback: of the source, not of the variables; but of the message.
            (registered,) = [row["id"] for row in (await client.get("/rows")).json() if row["tenant_id"] == str(tenant)]
            for path, status in ((f"/opened/{registered}", 500), (f"/broken/{registered}", 500)):
                answer = await client.get(path)
                assert answer.status_code == status
                assert "Traceback" in answer.text
                assert not holds(answer.content, CANARY)
            answer = await client.get(f"/opened/{journey.own.id}")  # of a key this application does not have
            assert (answer.status_code, answer.json()["code"]) == (500, "unknown-key")
            assert not holds(answer.content, CANARY)


async def test_an_application_that_is_careless_shows_it() -> None:
    app = FastAPI(debug=True)

    class Body(BaseModel):
        secret: SecretStr
        purpose: int

    @app.post("/")
    async def register(body: Body) -> None:
        raise RuntimeError(body.secret.get_secret_value())

    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        refused = await client.post("/", json={"secret": [CANARY], "purpose": 1})
        broken = await client.post("/", json={"secret": CANARY, "purpose": 1})
    assert (refused.status_code, broken.status_code) == (422, 500)
    assert holds(refused.content, CANARY)
    assert holds(broken.content, CANARY)


def test_what_is_opened_cannot_be_declared_as_an_answer() -> None:
    def declare() -> None:
        FastAPI().get("/")(_opened_answer)

    assert list(leaks(failure_of_call(declare), CANARY)) == []


async def _opened_answer() -> ConnectionString:
    return ConnectionString(CANARY)


# --- command lines ----------------------------------------------------------------------------------------------------


def command_lines() -> bytes:
    """The command line of every process of this machine, as everybody on it can read them."""
    if not Path("/proc/self/cmdline").exists():
        return subprocess.run(["ps", "-A", "-ww", "-o", "args="], capture_output=True, check=True).stdout
    found = b""
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # ended meanwhile
            found += process.read_bytes().replace(b"\0", b" ") + b"\n"
    return found


async def running(*arguments: str, **environment: str) -> asyncio.subprocess.Process:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CAR_CONTROL_PLANE", "PG"))}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**kept, **environment},
    )


async def test_a_command_line_shows_what_is_on_it() -> None:
    canary = secrets.token_hex(12)
    process = await running("-c", "input()", f"postgresql://u:{canary}@h/d")
    try:
        assert holds(command_lines(), canary)
    finally:
        await process.communicate(b"\n")


def environments() -> bytes:
    """The environment of every other process of this machine that we may look into."""
    found = b""
    for process in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # ended meanwhile, or somebody else's
            found += process.read_bytes() if process.parent.name != str(os.getpid()) else b""
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="only Linux shows environments")
async def test_processes_we_start_do_not_inherit_it(monkeypatch: pytest.MonkeyPatch) -> None:
    canary = secrets.token_hex(12)  # one of its own: other tests run beside this one
    for name in (
        "DATABASE_URL",
        "CAR_CONTROL_PLANE_ENCRYPTION_KEYS",
        "TENANT_DATABASE_URL",
        "PGPASSWORD",
        "VAULT_TOKEN",
    ):
        monkeypatch.setenv(name, canary)
    server = EmbeddedPostgres(durable=False)
    await asyncio.to_thread(server.start)
    try:
        await asyncio.to_thread(server.create_database, "control_plane")
        assert b"LC_ALL=C" in environments()
        assert not holds(environments(), canary)
        process = await running("-c", "input()", SECRET=canary)
        assert holds(environments(), canary)
        await process.communicate(b"\n")
    finally:
        await asyncio.to_thread(server.stop)


async def test_no_command_line_or_output_of_ours_shows_it(travelled: Travelled) -> None:
    """The command line tool while it waits: for its input, and for a tenant's server that never answers."""
    _, manager, dsn = travelled
    canary = secrets.token_hex(12)
    arrived = asyncio.Event()

    async def say_nothing(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        arrived.set()
        await reader.read()

    async with manager.get_session() as session:
        new = TenantCreate(name="typed", environment=TenantEnvironment.DEVELOPMENT)
        await TenantRepository(session).create(new)
    key = keys("cli")
    tool = functools.partial(
        running, "-m", "car_control_plane", DATABASE_URL=dsn, CAR_CONTROL_PLANE_ENCRYPTION_KEYS=key
    )
    said = b""
    async with rogue(say_nothing) as port:
        secret = f"postgresql://u:{canary}@127.0.0.1:{port}/d?sslmode=disable"
        process = await tool("database", "register", "typed", "-")
        assert b"register" in command_lines()
        assert not holds(command_lines(), canary)
        output, _ = await process.communicate(secret.encode())
        assert process.returncode == 0, output.decode()
        said += output
        async with manager.get_read_session() as reading:
            tenant = await TenantRepository(reading).get_by_name("typed")
            (row,) = await TenantDatabaseRepository(reading).list_for_tenant(tenant.tenant_id)
        process = await tool("database", "verify", str(row.id))
        ended = asyncio.ensure_future(process.communicate())
        await asyncio.wait([ended, asyncio.ensure_future(arrived.wait())], return_when=asyncio.FIRST_COMPLETED)
        assert arrived.is_set(), (await ended)[0].decode()
        assert not holds(command_lines(), canary)
        process.terminate()
        said += (await ended)[0]
    for arguments in (
        ("database", "connection-string", str(row.id)),
        ("-o", "json", "database", "list"),
        ("doctor",),
        ("database", "register", "typed", f"postgresql://u:{canary}@h/d"),
    ):
        output, _ = await (await tool(*arguments)).communicate()
        assert not holds(output, canary), (arguments, output.decode())
        said += output
    assert b"typed" in said
    output, _ = await (await tool("database", "connection-string", str(row.id), "--reveal")).communicate()
    assert holds(output, canary)
