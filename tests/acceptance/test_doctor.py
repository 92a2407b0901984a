"""`examine` finds each thing that can be wrong, calls it by the error a program would get, and says what to do."""

import os
import re
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import asyncpg
import pytest
from pydantic import SecretStr

from car_control_plane import doctor, dsn as dsns
from car_control_plane.connection import AsyncConnectionManager
from car_control_plane.doctor import Finding, examine
from car_control_plane.encryption import Key, Keyring, LocalKeyWrapper, StaticKeys
from car_control_plane.migrations import upgrade
from car_control_plane.models import SYSTEM_ADMIN_ID, TenantCreate, TenantDatabaseCreate, TenantEnvironment
from car_control_plane.repositories import EncryptionKeyRepository, TenantDatabaseRepository, TenantRepository
from tests.fixtures import servers
from tests.fixtures.postgres import create_database, drop_database
from tests.fixtures.servers import Certificates, Cluster, front, unused_port

cluster = servers.cluster
certificates = servers.certificates

AFTER_CONNECTION = {"schema", "privileges", "revision", "drift", "enums", "indexes", "system-admin"}


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith(("CAR_CONTROL_PLANE_", "DATABASE_URL")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


async def findings(url: str | None) -> dict[str, Finding]:
    return {finding.check: finding for finding in await examine(url)}


async def finding(url: str | None, check: str) -> Finding:
    return (await findings(url))[check]


def failed(found: dict[str, Finding]) -> list[str]:
    return [name for name, one in found.items() if one.status == "fail"]


async def execute(url: str, *statements: str) -> None:
    parsed = dsns.parse(url)
    connection = await asyncpg.connect(parsed.for_host(parsed.hosts[0]), password=parsed.password)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


def with_option(url: str, option: str) -> str:
    return f"{url}{'&' if '?' in url else '?'}{option}"


# --- all is well ------------------------------------------------------------------------------------------------------


async def test_a_migrated_database_has_no_failure(own_database: str) -> None:
    found = await findings(own_database)
    assert failed(found) == []
    assert [name for name, one in found.items() if one.status == "skipped"] == []
    assert all(one.message and not one.code for one in found.values())
    assert found["revision"].message.startswith("the schema is at 004_completed_operations")


async def test_an_embedded_server_needs_no_advice() -> None:
    found = await findings("embedded:")
    assert found["database-url"].message == "a temporary server of our own"
    assert found["role"].status == "ok"
    assert found["schema"].code == "schema-missing"


async def test_a_warning_and_a_failure_say_what_to_do(own_database: str) -> None:
    await execute(own_database, "UPDATE control_plane.alembic_version SET version_num = '001_control_plane_schema'")
    found = await findings(with_option(own_database, "TimeZone=Asia/Tokyo"))
    told = [one for one in found.values() if one.status in {"warn", "fail"}]
    assert len(told) >= 2
    assert all(one.hint for one in told)


async def test_nothing_is_changed(own_database: str) -> None:
    async def state() -> str:
        parsed = dsns.parse(own_database)
        connection = await asyncpg.connect(parsed.for_host(parsed.hosts[0]), password=parsed.password)
        try:
            return str(await connection.fetchval("SELECT last_value FROM control_plane.version_seq"))
        finally:
            await connection.close()

    before = await state()
    await examine(own_database)
    assert await state() == before


# --- what is set ------------------------------------------------------------------------------------------------------


async def test_no_database_url_is_the_seed_guides_sentence() -> None:
    found = await findings(None)
    assert found["settings"].message == "DATABASE_URL environment variable is required"
    assert found["settings"].code == "configuration"
    assert found["variables"].status == found["extras"].status == "ok"
    assert {one.status for name, one in found.items() if name not in {"settings", "variables", "extras"}} == {"skipped"}


@pytest.mark.parametrize("place", ["environment", ".env"])
async def test_it_says_where_the_connection_string_comes_from(
    place: str, own_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == "environment":
        monkeypatch.setenv("DATABASE_URL", own_database)
    else:
        Path(".env").write_text(f"DATABASE_URL='{own_database}'\n", encoding="utf-8")
    assert (await finding(None, "settings")).message.endswith(place)


async def test_a_utf16_env_file_is_named() -> None:
    Path(".env").write_bytes("DATABASE_URL=postgresql://localhost/x\n".encode("utf-16"))
    found = await finding(None, "settings")
    assert (found.status, found.message) == ("fail", "the .env file is not UTF-8")
    assert "Set-Content" in found.hint


async def test_a_bad_setting_is_named(own_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAR_CONTROL_PLANE_POOL_SIZE", "many")
    found = await finding(own_database, "settings")
    assert found.code == "configuration"
    assert found.message.startswith("CAR_CONTROL_PLANE_POOL_SIZE: ")


async def test_a_misspelt_variable_is_named_with_the_right_one(
    own_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAR_CONTROL_PLANE_POOLSIZE", "5")
    found = await finding(own_database, "variables")
    assert found.status == "warn"
    assert "CAR_CONTROL_PLANE_POOLSIZE (did you mean CAR_CONTROL_PLANE_POOL_SIZE?)" in found.message


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://user:pa@s3cret@localhost/x", "more than one '@'"),
        ("mysql://user:s3cret@localhost/x", "does not start with postgresql://"),
        ("postgresql://user:s3cret@localhost/x?sslmod=require", "unknown option"),
    ],
)
async def test_a_malformed_connection_string_is_explained_without_its_password(url: str, said: str) -> None:
    found = await findings(url)
    assert failed(found) == ["database-url"]
    assert said in found["database-url"].message
    assert "s3cret" not in repr(found)


async def test_a_good_connection_string_is_shown_without_its_password() -> None:
    found = await findings(f"postgresql://user:s3cret@127.0.0.1:{unused_port()}/x")
    assert "user:***@127.0.0.1" in found["database-url"].message
    assert "s3cret" not in repr(found)


async def test_extras_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (await finding(None, "extras")).message == "installed: cli, embedded, testing"
    monkeypatch.setitem(doctor._EXTRAS, "testing", ("no_such_module",))
    monkeypatch.setenv("CAR_CP_PG_BIN", "/no/such/directory")
    assert (await finding(None, "extras")).message == "installed: cli; not installed: embedded, testing"


# --- the way to the server --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "said"),
    [("127.0.0.1:{port}", "Connection refused"), ("no-such-host.invalid:5432", "no-such-host.invalid")],
)
async def test_a_server_that_is_not_reached(where: str, said: str) -> None:
    found = await findings(f"postgresql://user@{where.format(port=unused_port())}/x")
    assert failed(found) == ["connection"]
    assert found["connection"].code == "connection-unavailable"
    assert said in found["connection"].message
    assert {found[name].status for name in AFTER_CONNECTION} == {"skipped"}


async def test_a_wrong_password(cluster: Cluster) -> None:
    found = await finding(cluster.dsn(cluster.primary, password="wr0ng"), "connection")
    assert (found.code, found.message) == ("configuration", "password authentication failed")


async def test_a_database_that_does_not_exist(server_dsn: str) -> None:
    found = await finding(dsns.parse(server_dsn).replace(database="no such database").reveal(), "connection")
    assert (found.code, found.message) == ("configuration", "the database does not exist")
    assert "CREATE DATABASE" in found.hint


async def test_tls_that_cannot_be_had(cluster: Cluster, certificates: Certificates) -> None:
    async with front(cluster.primary, tls=certificates.context()) as port:
        url = cluster.dsn(f"localhost:{port}", sslmode="verify-full", sslrootcert=str(certificates.other_authority))
        found = await finding(url, "connection")
    assert found.code == "configuration"
    assert "certificate was not accepted" in found.message


async def test_another_machine_without_verify_full_is_a_warning(cluster: Cluster, certificates: Certificates) -> None:
    # 0.0.0.0 leads to this machine without being a loopback address.
    async with front(cluster.primary, host="0.0.0.0") as port:
        plain = await finding(cluster.dsn(f"0.0.0.0:{port}"), "encryption")
    async with front(cluster.primary, host="0.0.0.0", tls=certificates.context()) as port:
        required = await finding(cluster.dsn(f"0.0.0.0:{port}", sslmode="require"), "encryption")
    assert [plain.status, required.status] == ["warn", "warn"]
    assert plain.message == "not encrypted, and nothing proves that this is your server (sslmode=prefer)"
    assert required.message == "encrypted, and nothing proves that this is your server (sslmode=require)"
    assert "sslmode=verify-full" in plain.hint


async def test_a_server_that_proves_its_name_is_fine(
    cluster: Cluster, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_is_local", lambda _: False)  # the certificate is for localhost
    async with front(cluster.primary, tls=certificates.context(), host="localhost") as port:
        url = cluster.dsn(f"localhost:{port}", sslmode="verify-full", sslrootcert=str(certificates.authority))
        assert (await finding(url, "encryption")).status == "ok"


@pytest.mark.parametrize("host", ["", "/run/postgresql", "localhost", "LOCALHOST", "127.0.0.1", "127.9.9.9", "::1"])
def test_this_machine(host: str) -> None:
    assert doctor._is_local(host)


@pytest.mark.parametrize("host", ["db.example", "10.0.0.1", "localhost.example", "fe80::1%eth0", "0.0.0.0"])
def test_another_machine(host: str) -> None:
    assert not doctor._is_local(host)


# --- the server -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("major", "last"), [(12, date(2024, 11, 30)), (15, date(2027, 11, 30)), (18, date(2030, 11, 30))]
)
def test_how_long_a_version_gets_fixes(major: int, last: date) -> None:
    assert doctor._last_release(major) == last


async def test_a_server_without_fixes_is_a_warning(own_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "RELEASE_YEAR_OF_0", 1990)
    found = await finding(own_database, "server")
    assert found.status == "warn"
    assert "has had no fixes since November" in found.message


async def test_a_standby_is_a_warning(cluster: Cluster) -> None:
    found = await finding(cluster.dsn(cluster.standby), "writes")
    assert found.status == "warn"
    assert "standby" in found.message


async def test_read_only_by_default_is_a_warning(own_database: str) -> None:
    found = await finding(with_option(own_database, "default_transaction_read_only=on"), "writes")
    assert found.status == "warn"


async def test_a_database_that_is_not_utf8_is_a_warning(server_dsn: str) -> None:
    name = f"car_cp_ascii_{os.getpid()}"
    await execute(
        server_dsn,
        f"CREATE DATABASE {name} ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0",
    )
    try:
        found = await finding(dsns.parse(server_dsn).replace(database=name).reveal(), "encoding")
    finally:
        await drop_database(server_dsn, name)
    assert found.status == "warn"
    assert "SQL_ASCII" in found.message


@pytest.mark.parametrize(("seconds", "said"), [(60, "ahead of"), (-60, "behind")])
async def test_clocks_that_differ_are_a_warning(
    seconds: int, said: str, own_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = SimpleNamespace(time=lambda: time.time() - seconds, perf_counter=time.perf_counter)
    monkeypatch.setattr(doctor, "time", wrong)
    found = await finding(own_database, "clock")
    assert found.status == "warn"
    told = re.search(rf"([\d.]+) s {said} this one", found.message)
    assert told is not None, found.message
    assert 50 < float(told[1]) < 70, "as exactly as a question and its answer take"


async def test_sessions_in_another_time_zone_are_a_warning(own_database: str) -> None:
    assert (await finding(with_option(own_database, "TimeZone=Asia/Tokyo"), "time-zone")).status == "warn"


async def test_a_pool_larger_than_the_server_is_a_warning(own_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAR_CONTROL_PLANE_POOL_SIZE", "1000")
    found = await finding(own_database, "pool")
    assert found.status == "warn"
    assert "CAR_CONTROL_PLANE_POOL_SIZE" in found.hint


async def test_a_database_with_a_connection_limit_counts(own_database: str) -> None:
    name = dsns.parse(own_database).database
    await execute(own_database, f'ALTER DATABASE "{name}" CONNECTION LIMIT 4')
    found = await finding(own_database, "pool")
    assert found.status == "warn"
    assert "only 4" in found.message


async def test_a_superuser_is_a_warning(own_database: str) -> None:
    assert (await finding(own_database, "role")).status == "warn"


# --- rights -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LimitedRole:
    """A role, and the connection string that works as it."""

    owner: str
    name: str
    url: str

    async def granted(self, *rights: str) -> None:
        await execute(self.owner, *(f"GRANT {right} TO {self.name}" for right in rights))


@pytest.fixture
async def limited(own_database: str) -> AsyncIterator[LimitedRole]:
    """A role without any right, and with a name that must be quoted."""
    role = f'limited "{os.getpid()}'
    quoted = '"' + role.replace('"', '""') + '"'
    await execute(own_database, f"CREATE ROLE {quoted}")
    try:
        yield LimitedRole(own_database, quoted, with_option(own_database, f"role={quote(role)}"))
    finally:
        await execute(own_database, f"DROP OWNED BY {quoted}", f"DROP ROLE {quoted}")


USAGE = "USAGE ON SCHEMA control_plane"
READ = "SELECT ON ALL TABLES IN SCHEMA control_plane"
WRITTEN = "control_plane.tenants, control_plane.tenant_databases, control_plane.system_config, control_plane.completed_operations"
WRITE = f"INSERT, UPDATE ON {WRITTEN}"
RECORD_KEYS = "INSERT ON control_plane.encryption_keys"
DELETE = f"DELETE ON {WRITTEN}"


async def test_a_role_without_rights_gets_the_grants_it_needs_and_they_are_enough(limited: LimitedRole) -> None:
    found = await findings(limited.url)
    assert failed(found) == ["privileges"]
    assert found["privileges"].code == "permission-denied"
    assert found["role"].status == "ok"
    grants = found["privileges"].hint.partition(": ")[2]
    assert limited.name in grants
    await execute(limited.owner, grants)
    found = await findings(limited.url)
    assert failed(found) == []
    assert found["privileges"].status == "ok"


async def test_a_single_missing_right_is_named(limited: LimitedRole) -> None:
    await limited.granted(
        *(USAGE, READ, RECORD_KEYS),
        "INSERT, UPDATE, DELETE ON control_plane.tenants, control_plane.tenant_databases, control_plane.completed_operations",
    )
    found = await finding(limited.url, "privileges")
    assert found.status == "fail"
    assert "DELETE on system_config, INSERT on system_config, UPDATE on system_config" in found.message
    assert f"GRANT INSERT, UPDATE, DELETE ON control_plane.system_config TO {limited.name};" in found.hint


async def test_a_role_that_never_deletes_is_a_choice(limited: LimitedRole) -> None:
    await limited.granted(USAGE, READ, WRITE, RECORD_KEYS)
    found = await finding(limited.url, "privileges")
    assert (found.status, found.code) == ("warn", "")
    await limited.granted(DELETE)
    assert (await finding(limited.url, "privileges")).status == "ok"


async def test_a_role_that_only_reads_is_a_choice(limited: LimitedRole) -> None:
    await limited.granted(
        USAGE,
        "SELECT ON control_plane.tenants, control_plane.system_config, control_plane.change_log, control_plane.alembic_version",
        "SELECT ON control_plane.completed_operations",
        "SELECT (id, tenant_id, status) ON control_plane.tenant_databases",
    )
    found = await findings(limited.url)
    assert failed(found) == []
    assert found["privileges"].status == "warn"


async def test_a_role_that_may_not_migrate_is_told_which_grant(empty_database: str) -> None:
    role = f"newcomer_{os.getpid()}"
    await execute(empty_database, f"CREATE ROLE {role}")
    try:
        found = await finding(with_option(empty_database, f"role={role}"), "schema")
        assert found.code == "schema-missing"
        name = dsns.parse(empty_database).database
        assert f"GRANT CREATE ON DATABASE {name} TO {role};" in found.hint
    finally:
        await execute(empty_database, f"DROP ROLE {role}")


# --- the schema -------------------------------------------------------------------------------------------------------


async def test_an_empty_database_is_the_seed_guides_sentence(empty_database: str) -> None:
    found = await findings(empty_database)
    assert failed(found) == ["schema"]
    assert found["schema"].message == "schema 'control_plane' does not exist"
    assert "alembic upgrade head" in found["schema"].hint


async def test_a_schema_without_migrations(empty_database: str) -> None:
    await execute(empty_database, "CREATE SCHEMA control_plane")
    found = await findings(empty_database)
    assert failed(found) == ["revision"]
    assert found["revision"].code == "schema-missing"


@pytest.mark.parametrize(
    ("revision", "said"), [("001_control_plane_schema", "behind"), ("999_from_the_future", "unknown to this version")]
)
async def test_another_revision(revision: str, said: str, own_database: str) -> None:
    await execute(own_database, f"UPDATE control_plane.alembic_version SET version_num = '{revision}'")
    found = await findings(own_database)
    assert failed(found) == ["revision"]
    assert found["revision"].code == "schema-outdated"
    assert said in found["revision"].message
    assert found["drift"].status == "skipped"


async def test_drift_names_the_objects(own_database: str) -> None:
    await execute(
        own_database,
        "DROP TRIGGER tenants_20_life_cycle ON control_plane.tenants",
        "CREATE TABLE control_plane.stray (id int, more int, again int)",
    )
    found = await findings(own_database)
    assert failed(found) == ["drift"]
    assert found["drift"].code == "schema"
    assert "column stray.again (unexpected)" in found["drift"].message
    assert "and 2 more" in found["drift"].message


async def test_an_enum_value_python_does_not_know(own_database: str) -> None:
    await execute(own_database, "ALTER TYPE control_plane.tenant_status ADD VALUE 'archived'")
    found = await findings(own_database)
    assert failed(found) == ["drift", "enums"]
    assert "tenant_status" in found["enums"].message


async def test_an_invalid_index_is_named_with_its_repair(own_database: str) -> None:
    await execute(
        own_database,
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'control_plane.idx_tenants_status'::regclass",
    )
    found = await findings(own_database)
    assert failed(found) == ["drift", "indexes"]
    repair = found["indexes"].hint.partition(": ")[2]
    assert repair == "REINDEX INDEX CONCURRENTLY control_plane.idx_tenants_status;"
    await execute(own_database, repair)
    assert failed(await findings(own_database)) == []


GUARDS_OFF = "ALTER TABLE control_plane.tenants DISABLE TRIGGER USER"
GUARDS_ON = "ALTER TABLE control_plane.tenants ENABLE TRIGGER USER"


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (f"DELETE FROM control_plane.tenants WHERE tenant_id = '{SYSTEM_ADMIN_ID}'", "is missing"),
        (f"UPDATE control_plane.tenants SET name = 'root' WHERE tenant_id = '{SYSTEM_ADMIN_ID}'", "is renamed"),
    ],
)
async def test_the_hint_repairs_system_admin(harm: str, said: str, own_database: str) -> None:
    await execute(own_database, GUARDS_OFF, harm, GUARDS_ON)
    found = await findings(own_database)
    assert failed(found) == ["system-admin"]
    assert said in found["system-admin"].message
    await execute(own_database, found["system-admin"].hint.partition(": ")[2])
    assert failed(await findings(own_database)) == []


async def test_a_suspended_system_admin(own_database: str) -> None:
    harm = f"UPDATE control_plane.tenants SET status = 'suspended' WHERE tenant_id = '{SYSTEM_ADMIN_ID}'"
    await execute(own_database, GUARDS_OFF, harm, GUARDS_ON)
    found = await finding(own_database, "system-admin")
    assert (found.message, found.hint) == (
        "the tenant system_admin is suspended",
        "Run: car-cp tenant activate system_admin",
    )


# --- keys, and what is sealed -----------------------------------------------------------------------------------------

KEYS = "CAR_CONTROL_PLANE_ENCRYPTION_KEYS"
KEY_FILE = "CAR_CONTROL_PLANE_ENCRYPTION_KEY_FILE"
FORM = "ALTER TABLE control_plane.tenant_databases DROP CONSTRAINT ck_tenant_databases_sealed"


def new_key(kid: str) -> str:
    return f"{kid}:{Key.generate(kid).to_base64()}"


async def register(url: str, keys: str, *names: str) -> list[uuid.UUID]:
    """Register a tenant of each of these names, with a database; the first of the keys seals."""
    registered = []
    async with AsyncConnectionManager(url) as manager, Keyring(StaticKeys(keys)) as keyring:
        for name in names:
            async with manager.get_session() as session:
                new = TenantCreate(name=name, environment=TenantEnvironment.PRODUCTION)
                tenant = await TenantRepository(session).create(new)
                secret = SecretStr(f"postgresql://u:s3cret@db.example/{name}?sslmode=verify-full")
                create = TenantDatabaseCreate(connection_string=secret)
                row = await TenantDatabaseRepository(session, keyring).register(tenant.tenant_id, create)
                registered.append(row.id)
    return registered


async def test_no_keys_and_nothing_sealed_is_fine(own_database: str) -> None:
    found = await findings(own_database)
    assert found["keys"].message == "no keys are configured, and no connection string is sealed"
    assert found["sealed-rows"].message == "0 tenant databases sealed"
    assert {found[name].status for name in ("keys", "key-record", "sealed-rows", "sealed-form", "verifications")} == {
        "ok"
    }


async def test_no_keys_where_they_are_needed_is_a_warning(own_database: str) -> None:
    await register(own_database, new_key("k1"), "acme")
    found = await findings(own_database)
    assert failed(found) == []
    assert found["keys"].status == "warn"
    assert "can neither register nor open one" in found["keys"].message
    assert KEYS in found["keys"].hint
    assert found["sealed-rows"].message == "1 tenant database sealed"


async def test_the_right_keys_are_fine(own_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEYS, keys := f"{new_key('k2')},{new_key('k1')}")
    await register(own_database, keys, "acme", "bolt")
    found = await findings(own_database)
    assert found["keys"].message == "k2 seals, and 1 more open (environment)"
    assert found["key-record"].message == "every key is the one the database knows, or new to it"
    assert found["sealed-rows"].message == "2 tenant databases sealed with the current key"
    assert {found[name].status for name in ("keys", "key-record", "sealed-rows")} == {"ok"}
    for key in keys.split(","):
        assert key.partition(":")[2] not in repr(found)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("{k1}:retired", "exactly one key must be current"),
        ("{k1}x", "the key 'k1' is not"),
        ("{k1},{k1}", "there twice"),
        ("nonsense", "must have 32"),
    ],
)
async def test_keys_that_are_none_are_told(
    keys: str, said: str, own_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEYS, keys.format(k1=(k1 := new_key("k1"))))
    found = await findings(own_database)
    assert failed(found) == ["keys"]
    assert (found["keys"].code, found["key-record"].status) == ("configuration", "skipped")
    assert said in found["keys"].message
    assert k1.partition(":")[2] not in repr(found)


async def test_two_sources_of_keys_are_told(own_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEYS, new_key("k1"))
    monkeypatch.setenv(KEY_FILE, "keys")
    assert "more than one source of keys" in (await finding(own_database, "keys")).message


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX")
async def test_a_key_file_others_can_read_is_told(own_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Path("keys")
    file.write_text(new_key("k1"), encoding="utf-8")
    monkeypatch.setenv(KEY_FILE, str(file.absolute()))
    file.chmod(0o644)
    found = await finding(own_database, "keys")
    assert found.code == "configuration"
    assert "mode 0644" in found.message
    file.chmod(0o600)
    assert (await finding(own_database, "keys")).status == "ok"
    file.unlink()
    assert (await finding(own_database, "keys")).code == "key-unavailable"


async def test_wrapped_keys_without_a_current_one_are_told(own_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outer = Path("outer")
    outer.write_text(new_key("outer"), encoding="utf-8")
    outer.chmod(0o600)
    monkeypatch.setenv("CAR_CONTROL_PLANE_ENCRYPTION_KEY_WRAPPER", "local")
    monkeypatch.setenv("CAR_CONTROL_PLANE_ENCRYPTION_OUTER_KEY_FILE", str(outer.absolute()))
    found = await finding(own_database, "keys")
    assert found.code == "configuration"
    assert "no key is current" in found.message
    async with AsyncConnectionManager(own_database) as manager, manager.get_session() as session:
        await EncryptionKeyRepository(session).create(Key.generate("k1"), LocalKeyWrapper(outer), state="current")
    assert (await finding(own_database, "keys")).message == "k1 seals, and 0 more open (local)"
    outer.write_text(new_key("outer"), encoding="utf-8")  # another one of the same name
    assert failed(await findings(own_database)) == ["keys"]


async def test_another_key_of_the_same_name_is_told(own_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    await register(own_database, new_key("k1"), "acme")
    monkeypatch.setenv(KEYS, new_key("k1"))
    found = await findings(own_database)
    assert failed(found) == ["key-record"]
    assert found["key-record"].code == "configuration"
    assert found["key-record"].message == "not the keys of these names that the database knows: k1"


async def test_rows_on_keys_that_are_not_here_are_counted_and_named(
    own_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await register(own_database, new_key("k1"), "acme", "bolt")
    await register(own_database, new_key("k2"), "cord")
    monkeypatch.setenv(KEYS, new_key("k3"))
    found = await findings(own_database)
    assert failed(found) == ["sealed-rows"]
    assert found["sealed-rows"].code == "unknown-key"
    assert found["sealed-rows"].message == "3 tenant databases sealed with keys that this process does not have: k1, k2"


async def test_a_rotation_that_is_not_finished_is_a_warning(own_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    await register(own_database, k1 := new_key("k1"), "acme")
    await register(own_database, k2 := new_key("k2"), "bolt")
    monkeypatch.setenv(KEYS, f"{k2},{k1}")
    found = await finding(own_database, "sealed-rows")
    assert found.status == "warn"
    assert found.message == "1 tenant database of 2 sealed with keys that are not current: k1"
    assert "car-cp key rotate" in found.hint


async def test_plain_text_is_counted_and_not_shown(own_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = await register(own_database, k1 := new_key("k1"), "acme")
    monkeypatch.setenv(KEYS, k1)
    await execute(
        own_database,
        FORM,
        "UPDATE control_plane.tenant_databases SET connection_string_encrypted = 'postgresql://u:s3cret@h/d'",
    )
    found = await findings(own_database)
    assert failed(found) == ["drift", "sealed-rows", "sealed-form"]
    assert found["sealed-rows"].code == "decryption"
    assert found["sealed-rows"].message.endswith("in 1 tenant database")
    assert "s3cret" not in repr(found)
    parsed = dsns.parse(own_database)
    connection = await asyncpg.connect(parsed.for_host(parsed.hosts[0]), password=parsed.password)
    assert [each["id"] for each in await connection.fetch(found["sealed-rows"].hint.rpartition(": ")[2])] == [row]
    await connection.close()


async def test_a_missing_or_unchecked_constraint_is_told_with_its_repair(own_database: str) -> None:
    await execute(own_database, FORM)
    missing = await finding(own_database, "sealed-form")
    assert "is missing" in missing.message
    repair = missing.hint.partition(": ")[2]
    await execute(own_database, repair.replace(");", ") NOT VALID;"))
    unchecked = await finding(own_database, "sealed-form")
    assert "is not valid" in unchecked.message
    await execute(own_database, unchecked.hint.partition(": ")[2])
    assert failed(await findings(own_database)) == []


async def test_databases_that_failed_their_verification_are_named(own_database: str) -> None:
    rows = await register(own_database, new_key("k1"), "acme", "bolt")
    assert (await finding(own_database, "verifications")).message.startswith("2 tenant databases of 2 never verified")
    await execute(
        own_database,
        "UPDATE control_plane.tenant_databases SET verified_at = now(), verification_error = 'no route to host' "
        f"WHERE id = '{rows[0]}'",
    )
    found = await finding(own_database, "verifications")
    assert found.status == "warn"
    assert found.message == f"1 tenant database could not be used when last verified: {rows[0]}"


# --- the doctor itself ------------------------------------------------------------------------------------------------


async def test_a_check_that_breaks_does_not_keep_the_others_from_being_asked(
    own_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(_: object) -> Finding:
        raise KeyError("s3cret")

    checks = tuple((name, broken if name == "clock" else look, needs) for name, look, needs in doctor._CHECKS)
    monkeypatch.setattr(doctor, "_CHECKS", checks)
    found = await findings(own_database)
    assert failed(found) == ["clock"]
    assert found["clock"].message == "this could not be told: KeyError"
    assert found["system-admin"].status == "ok"


async def test_a_server_that_goes_away_meanwhile_is_told(server_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = await create_database(server_dsn, name := f"car_cp_gone_{os.getpid()}")
    try:
        await upgrade(url)

        async def end(patient: doctor._Patient) -> Finding:
            await execute(
                server_dsn, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
            )
            return await doctor._clock(patient)

        checks = tuple((name, end if name == "clock" else look, needs) for name, look, needs in doctor._CHECKS)
        monkeypatch.setattr(doctor, "_CHECKS", checks)
        found = await findings(url)
        assert found["clock"].code == "connection-unavailable"
    finally:
        await drop_database(server_dsn, name)
