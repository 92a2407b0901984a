"""Connecting to tenants' databases: only to judged addresses, only with verified TLS, with nothing of ours, whatever the server does."""

import asyncio
import gc
import ipaddress
import logging
import os
import socket
import ssl
import struct
import uuid
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from pydantic import SecretStr

from car_control_plane import dialing, dsn as dsns
from car_control_plane.dialing import ConnectionPolicy, Destination, connect_tenant, tls_version
from car_control_plane.errors import (
    AccessDeniedError,
    ConfigurationError,
    ConnectionUnavailableError,
    ControlPlaneError,
    InvalidDataError,
)
from car_control_plane.settings import TenantConnectionRight
from tests.fixtures.leaks import failure_of, leaks
from tests.fixtures.servers import (
    CANARY,
    DATABASE,
    PASSWORD,
    USER,
    Certificates,
    Cluster,
    error_response,
    front,
    has_ipv6,
    pass_both_ways,
    rogue,
    unused_port,
)

TENANT = uuid.UUID("01890a5d-ac96-774b-bcce-b302099a8057")
OURS = "0ur-own-s3cret"
READY = b"Z\x00\x00\x00\x05I"
TRUSTED = b"R\x00\x00\x00\x08\x00\x00\x00\x00"
EVERYTHING: frozenset[TenantConnectionRight] = frozenset(
    {"sockets", "files", "several-hosts", "service", "internal-hosts", "weak-tls"}
)


@pytest.fixture(autouse=True)
def _own_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, certificates: Certificates) -> None:
    """Put a credential of ours wherever a driver looks for one."""
    home = tmp_path / "home"
    (home / ".postgresql").mkdir(parents=True)
    (home / ".postgresql" / "root.crt").write_bytes(certificates.authority.read_bytes())
    (home / ".postgresql" / "postgresql.crt").write_bytes(certificates.server.read_bytes())
    (home / ".postgresql" / "postgresql.key").write_bytes(certificates.server_key.read_bytes())
    (home / ".postgresql" / "postgresql.key").chmod(0o600)
    passwords = home / ".pgpass"
    passwords.write_text(f"*:*:*:*:{OURS}\n", encoding="utf-8")
    passwords.chmod(0o600)
    (home / ".pg_service.conf").write_text(f"[ours]\nuser={OURS}\npassword={OURS}\n", encoding="utf-8")
    monkeypatch.setenv("HOME", str(home))
    for name, value in {
        "PGHOST": "ours.invalid",
        "PGPORT": "1",
        "PGUSER": OURS,
        "PGPASSWORD": OURS,
        "PGDATABASE": OURS,
        "PGPASSFILE": str(passwords),
        "PGSERVICE": "ours",
        "PGSSLMODE": "disable",
        "PGSSLCERT": str(certificates.server),
        "PGSSLKEY": str(certificates.server_key),
        "PGSSLROOTCERT": str(certificates.authority),
        "PGSSLNEGOTIATION": "direct",
        "PGTARGETSESSIONATTRS": "standby",
        "PGKRBSRVNAME": OURS,
        "PGGSSLIB": "gssapi",
        "PGOPTIONS": f"-c app.x={OURS}",
        "PGAPPNAME": OURS,
    }.items():
        monkeypatch.setenv(name, value)


def allowing(*rights: TenantConnectionRight) -> ConnectionPolicy:
    return ConnectionPolicy(allow=frozenset(rights))


async def connect(
    text: str,
    *rights: TenantConnectionRight,
    environment: str = "production",
    policy: ConnectionPolicy | None = None,
    timeout: float = 10,  # noqa: ASYNC109 -- of the function under test
) -> Any:
    return await connect_tenant(
        dsns.parse(text, environment=False),
        tenant_id=TENANT,
        environment=environment,
        policy=policy or allowing(*rights),
        timeout=timeout,
    )


async def refusal(text: str, *rights: TenantConnectionRight, **how: Any) -> ControlPlaneError:
    """Return the error of connecting, after looking for secrets in everything it carries."""
    error = await failure_of(connect(text, *rights, **how))
    assert isinstance(error, ControlPlaneError), repr(error)
    assert error.__cause__ is None
    assert error.__context__ is None
    assert list(leaks(error, CANARY)) == []
    assert list(leaks(error, OURS)) == []
    return error


@contextmanager
def answers(monkeypatch: pytest.MonkeyPatch, **names: list[list[str]]) -> Iterator[list[str]]:
    """Have these names (dots as underscores) resolve, each time it is asked, to the next list; give what was asked."""
    asked: list[str] = []
    waiting = {name.replace("_", "."): list(lists) for name, lists in names.items()}
    real = socket.getaddrinfo

    def resolve(host: Any, port: Any, *more: Any, **how: Any) -> Any:
        if host not in waiting:
            return real(host, port, *more, **how)
        asked.append(host)
        found = waiting[host].pop(0)
        return [answer for each in found for answer in real(each, port, type=socket.SOCK_STREAM)]

    with monkeypatch.context() as patched:
        patched.setattr(socket, "getaddrinfo", resolve)
        yield asked


class Listener:
    """Listens, and tells how many connections came."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.setblocking(False)
        self.port: int = self._socket.getsockname()[1]

    def connections(self) -> int:
        count = 0
        while True:
            try:
                self._socket.accept()[0].close()
            except BlockingIOError:
                return count
            count += 1

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    listening = Listener()
    yield listening
    listening.close()


# --- the address that is judged is the address connected to -----------------------------------------------------------


async def test_the_listener_sees_a_connection(listener: Listener) -> None:
    """What the tests below rely on."""
    await refusal(f"postgresql://u@127.0.0.1:{listener.port}/d", "internal-hosts", timeout=1)
    assert listener.connections() == 1


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1", "0x7f000001", "0.0.0.0", "[::ffff:127.0.0.1]"])
async def test_a_forbidden_host_is_refused_before_anything_is_sent(host: str, listener: Listener) -> None:
    error = await refusal(f"postgresql://u:{CANARY}@{host}:{listener.port}/d")
    assert isinstance(error, AccessDeniedError | InvalidDataError)
    assert listener.connections() == 0


@pytest.mark.parametrize(
    "found",
    [
        ["127.0.0.1"],
        ["127.0.0.1", "192.0.2.1"],
        ["192.0.2.1", "127.0.0.1"],
        ["::ffff:127.0.0.1"],
        ["0.0.0.0"],
        ["::1"],
        ["64:ff9b::7f00:1"],
        ["169.254.169.254"],
    ],
)
async def test_a_name_that_resolves_to_a_forbidden_address_is_refused_before_anything_is_sent(
    found: list[str], listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One among several too: the others get nothing either."""
    with answers(monkeypatch, db_example_com=[found]) as asked:
        error = await refusal(f"postgresql://u:{CANARY}@db.example.com:{listener.port}/d")
    assert type(error) is AccessDeniedError
    assert error.message.startswith("the host db.example.com (")
    assert asked == ["db.example.com"]
    assert listener.connections() == 0


async def test_all_names_are_judged_before_the_first_is_connected_to(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rule(destination: Destination) -> str | None:
        return "no" if destination.address == ipaddress.ip_address("192.0.2.1") else None

    policy = ConnectionPolicy(allow=frozenset({"several-hosts"}), host_refusal=rule)
    with answers(monkeypatch, a_example=[["127.0.0.1"]], b_example=[["192.0.2.1"]]):
        error = await refusal(f"host=a.example,b.example port={listener.port} user=u dbname=d", policy=policy)
    assert error.message == "the host b.example (192.0.2.1) is refused: no"
    assert listener.connections() == 0


async def test_the_system_is_asked_about_a_name(listener: Listener) -> None:
    """With the machine's own resolver: its name for loopback, which no rule about names knows."""
    name = socket.gethostname() if os.environ.get("CI") else "localhost"
    policy = ConnectionPolicy(host_refusal=lambda d: dialing.refuse_internal_hosts(d) if d.address else None)
    error = await refusal(f"postgresql://u@{name}:{listener.port}/d", policy=policy)
    assert type(error) is AccessDeniedError or name != "localhost"
    assert listener.connections() == 0


async def test_a_name_is_resolved_once_and_the_judged_address_is_connected_to(
    cluster: Cluster, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second answer is what DNS rebinding hopes for."""
    judged = []

    def rule(destination: Destination) -> str | None:
        judged.append(str(destination.address))
        return None if str(destination.address) in {"None", "127.0.0.1"} else "no"

    policy = ConnectionPolicy(allow=frozenset({"weak-tls"}), host_refusal=rule)
    async with front(cluster.primary) as port:
        with answers(monkeypatch, db_example_com=[["127.0.0.1"], ["127.0.0.2"]]) as asked:
            connection = await connect(cluster.dsn(f"db.example.com:{port}", sslmode="prefer"), policy=policy)
        assert connection._transport.get_extra_info("peername")[0] == "127.0.0.1"
        assert asked == ["db.example.com"]
        assert judged == ["None", "127.0.0.1"]
        await connection.close()


async def test_every_address_of_a_name_is_tried(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    async with front(cluster.primary, host="127.0.0.1") as port:
        with answers(monkeypatch, db_example_com=[["127.0.0.2", "127.0.0.1", "127.0.0.1"]]):
            text = cluster.dsn(f"db.example.com:{port}", sslmode="disable")
            connection = await connect(text, "internal-hosts", "weak-tls")
    assert connection._transport.get_extra_info("peername")[0] == "127.0.0.1"
    await connection.close()


async def test_an_address_that_is_silent_leaves_time_for_the_next(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = asyncio.Event()
    silent.set()
    async with front(cluster.primary) as port, front(cluster.primary, silent=silent, host="127.0.0.2") as other:
        text = cluster.dsn(f"127.0.0.2:{other},127.0.0.1:{port}", target_session_attrs="any")
        connection = await connect(text, "several-hosts", "internal-hosts", timeout=4)
    await connection.close()


async def test_the_errors_of_all_addresses_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    port = unused_port()
    with answers(monkeypatch, db_example_com=[["127.0.0.2", "127.0.0.1"]]):
        error = await refusal(f"postgresql://u:{CANARY}@db.example.com:{port}/d", "internal-hosts")
    assert type(error) is ConnectionUnavailableError
    assert error.message.startswith("none of 2 hosts accepted the connection: ")
    assert "127.0.0" not in error.message


async def test_a_name_that_is_not_known() -> None:
    error = await refusal(f"postgresql://u:{CANARY}@db.invalid/d")
    assert type(error) is ConnectionUnavailableError
    assert error.message.startswith("cannot connect to db.invalid:5432: ")


async def test_a_name_that_is_not_known_among_several(cluster: Cluster) -> None:
    async with front(cluster.primary) as port:
        text = cluster.dsn(f"db.invalid:1,127.0.0.1:{port}")
        connection = await connect(text, "several-hosts", "internal-hosts")
        await connection.close()


async def test_a_resolver_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, never = asyncio.get_running_loop(), asyncio.Event()

    async def resolve(*_: Any, **how: Any) -> Any:
        await never.wait()

    with monkeypatch.context() as patched:
        patched.setattr(loop, "getaddrinfo", resolve)
        error = await refusal(f"postgresql://u:{CANARY}@db.example.com/d", timeout=0.2)
    assert type(error) is ConnectionUnavailableError
    assert error.message == "db.example.com:5432 did not answer within 0.2 s"
    assert error.details == {"host": "db.example.com", "port": 5432}


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
async def test_ipv6(cluster: Cluster) -> None:
    async with front(cluster.primary, host="::1") as port:
        for host in ("[::1]", "[::1%25lo]"):
            connection = await connect(cluster.dsn(f"{host}:{port}"), "internal-hosts")
            assert connection._transport.get_extra_info("peername")[0] == "::1"
            await connection.close()


async def test_the_policy_is_asked_again_when_connecting(cluster: Cluster, listener: Listener) -> None:
    text = f"postgresql://u:{CANARY}@127.0.0.1:{listener.port}/d?sslmode=disable"
    admitted = ConnectionPolicy().admit(SecretStr(text), tenant_id=TENANT, environment="development")
    with pytest.raises(InvalidDataError, match="sslmode=disable"):
        await connect_tenant(admitted, tenant_id=TENANT, environment="production", policy=ConnectionPolicy(), timeout=1)
    assert listener.connections() == 0


# --- TLS is verified against the name ---------------------------------------------------------------------------------


def by_name(port: int, authority: Path | str, name: str = "localhost", **options: str) -> str:
    return Cluster.dsn(f"{name}:{port}", sslrootcert=str(authority), **options)


@pytest.mark.parametrize("mode", [None, "verify-full", "verify-ca"])
async def test_the_right_name(
    mode: str | None, cluster: Cluster, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {} if mode is None else {"sslmode": mode}
    async with front(cluster.primary, tls=certificates.context()) as port:
        with answers(monkeypatch, localhost=[["127.0.0.2"]] if mode else [["127.0.0.1"]]):
            text = by_name(port, certificates.authority, **(options or {"sslmode": "verify-full"}))
            if mode is not None:
                with pytest.raises(
                    ConnectionUnavailableError
                ):  # nobody listens there: the judged address is what counts
                    await connect(text, "files", "internal-hosts")
                return
            connection = await connect(text, "files", "internal-hosts")
        assert tls_version(connection) == "TLSv1.3"
        assert await connection.fetchval("SELECT current_user") == USER
        assert connection._transport.get_extra_info("peername")[0] == "127.0.0.1"
        await connection.close()


async def test_without_sslmode_a_remote_host_is_verified(
    cluster: Cluster, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Remote is whatever is not loopback; one of this machine's own addresses stands for it."""
    address = own_address()
    async with front(cluster.primary, tls=certificates.context(), host=address) as port:
        with answers(monkeypatch, localhost=[[address]] * 2, db_example_com=[[address]]):
            connection = await connect(by_name(port, certificates.authority), "files", "internal-hosts")
            assert tls_version(connection) == "TLSv1.3"
            await connection.close()
            error = await refusal(by_name(port, certificates.authority, "db.example.com"), "files")
            assert "Hostname mismatch" in error.message
            system = await refusal(Cluster.dsn(f"localhost:{port}"), "internal-hosts")
            assert "its certificate was not accepted" in system.message
    async with front(cluster.primary, host=address) as port:
        error = await refusal(Cluster.dsn(f"{address}:{port}"))
        assert error.message == f"no TLS connection to {address}:{port}: the server does not offer TLS"


def own_address() -> str:
    """Return an address of this machine that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has no address but loopback")
        return str(probe.getsockname()[0])


async def test_the_name_may_end_with_a_dot(
    cluster: Cluster, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with front(cluster.primary, tls=certificates.context()) as port:
        real = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", lambda host, *more, **how: real(host.rstrip("."), *more, **how))
        text = by_name(port, certificates.authority, "localhost.", sslmode="verify-full")
        connection = await connect(text, "files", "internal-hosts")
        await connection.close()


async def test_the_wrong_name(cluster: Cluster, certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    async with front(cluster.primary, tls=certificates.context()) as port:
        with answers(monkeypatch, db_example_com=[["127.0.0.1"]] * 2):
            text = by_name(port, certificates.authority, "db.example.com", sslmode="verify-full")
            error = await refusal(text, "files", "internal-hosts")
            assert type(error) is ConfigurationError
            assert error.message.startswith(
                f"no TLS connection to db.example.com:{port}: its certificate was not accepted"
            )
            assert "Hostname mismatch" in error.message
            ca_only = by_name(port, certificates.authority, "db.example.com", sslmode="verify-ca")
            connection = await connect(ca_only, "files", "internal-hosts")
            await connection.close()
        text = by_name(port, certificates.authority, "127.0.0.1", sslmode="verify-full")
        assert "IP address mismatch" in (await refusal(text, "files", "internal-hosts")).message


@pytest.mark.parametrize("mode", ["verify-full", "verify-ca", "require"])
async def test_an_unknown_authority(mode: str, cluster: Cluster, certificates: Certificates) -> None:
    async with front(cluster.primary, tls=certificates.context()) as port:
        text = by_name(port, certificates.other_authority, sslmode=mode)
        error = await refusal(text, *EVERYTHING)
        assert type(error) is ConfigurationError
        assert "its certificate was not accepted" in error.message


async def test_the_authorities_of_the_system_do_not_know_ours(
    cluster: Cluster, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither PGSSLROOTCERT nor ~/.postgresql/root.crt counts, and what the system trusts does."""
    async with front(cluster.primary, tls=certificates.context()) as port:
        for text in (
            Cluster.dsn(f"localhost:{port}", sslmode="verify-full"),
            Cluster.dsn(f"localhost:{port}", sslrootcert="system"),
            Cluster.dsn(f"localhost:{port}", sslmode="verify-ca"),
        ):
            error = await refusal(text, "internal-hosts", "weak-tls")
            assert "its certificate was not accepted" in error.message
        monkeypatch.setenv("SSL_CERT_FILE", str(certificates.authority))
        connection = await connect(Cluster.dsn(f"localhost:{port}", sslrootcert="system"), "internal-hosts")
        await connection.close()


@pytest.mark.parametrize("mode", ["verify-full", "verify-ca", "require"])
async def test_tls_that_is_stripped(mode: str, cluster: Cluster, certificates: Certificates) -> None:
    async with front(cluster.primary) as port:
        text = by_name(port, certificates.authority, sslmode=mode)
        error = await refusal(text, *EVERYTHING)
        assert error.message == f"no TLS connection to localhost:{port}: the server does not offer TLS"


@pytest.mark.parametrize("mode", ["verify-full", "verify-ca", "require"])
async def test_tls_at_once(mode: str, cluster: Cluster, certificates: Certificates) -> None:
    async with direct(cluster.primary, certificates) as port:
        text = by_name(port, certificates.authority, sslmode=mode, sslnegotiation="direct")
        connection = await connect(text, *EVERYTHING)
        assert tls_version(connection) == "TLSv1.3"
        await connection.close()
        wrong = by_name(port, certificates.authority, "127.0.0.1", sslmode=mode, sslnegotiation="direct")
        if mode == "verify-full":
            assert "mismatch" in (await refusal(wrong, *EVERYTHING)).message
        unknown = by_name(port, certificates.other_authority, sslmode=mode, sslnegotiation="direct")
        assert "not accepted" in (await refusal(unknown, *EVERYTHING)).message


@asynccontextmanager
async def direct(directory: Path, certificates: Certificates) -> AsyncIterator[int]:
    """Give the server in this directory a port that speaks TLS from the first byte, and only with the protocol's name."""
    context = certificates.context()
    context.set_alpn_protocols(["postgresql"])

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner = await asyncio.open_unix_connection(str(directory / ".s.PGSQL.5432"))
        await pass_both_ways((reader, writer), inner)

    async with rogue(behave, tls=context) as port:
        yield port


@pytest.mark.parametrize("mode", ["prefer", "allow"])
async def test_weak_modes_encrypt_where_the_server_offers_it(
    mode: str, cluster: Cluster, certificates: Certificates
) -> None:
    async with front(cluster.primary, tls=certificates.context()) as port:
        connection = await connect(Cluster.dsn(port, sslmode=mode), environment="development")
        assert tls_version(connection) == "TLSv1.3"
        await connection.close()
    async with front(cluster.primary) as port:
        connection = await connect(Cluster.dsn(port, sslmode=mode), environment="development")
        assert tls_version(connection) is None
        await connection.close()
        wrong = await refusal(Cluster.dsn(port, sslmode=mode, password=CANARY), environment="development")
        assert type(wrong) is ConfigurationError


async def test_versions_of_tls(cluster: Cluster, certificates: Certificates) -> None:
    async with front(cluster.primary, tls=certificates.context()) as port:
        for options, version in (
            ({"ssl_max_protocol_version": "TLSv1.2"}, "TLSv1.2"),
            ({"ssl_min_protocol_version": "TLSv1.3"}, "TLSv1.3"),
        ):
            text = by_name(port, certificates.authority, sslmode="verify-full", **options)
            connection = await connect(text, "files", "internal-hosts")
            assert tls_version(connection) == version
            await connection.close()
    old = certificates.context()
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    async with front(cluster.primary, tls=old) as port:
        text = by_name(port, certificates.authority, sslmode="verify-full", ssl_min_protocol_version="TLSv1.3")
        error = await refusal(text, "files", "internal-hosts")
        assert isinstance(error, ConfigurationError | ConnectionUnavailableError)  # the server's alert may get lost


async def test_a_certificate_of_the_tenants_own(cluster: Cluster, certificates: Certificates, tmp_path: Path) -> None:
    """With the right to files, it is shown; the passphrase of its key is in no error."""
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(certificates.server_key.read_bytes(), None)
    locked = tmp_path / "locked.key"
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(CANARY.encode()),
        )
    )
    context = certificates.context()
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(certificates.authority)
    async with front(cluster.primary, tls=context) as port:
        base = by_name(port, certificates.authority, sslmode="verify-full")
        own = f"{base}&sslcert={certificates.server}&sslkey={locked}"
        connection = await connect(f"{own}&sslpassword={CANARY}", "files", "internal-hosts")
        await connection.close()
        for text in (f"{own}&sslpassword=no-{CANARY}", own, f"{own}&sslpassword={CANARY * 100}"):
            error = await refusal(text, "files", "internal-hosts")
            assert type(error) is ConfigurationError
            assert "or the passphrase is wrong" in error.message
        for option in ("sslcert=/nowhere", f"sslcrl={tmp_path / 'no.crl'}", f"sslcert={tmp_path}"):
            error = await refusal(f"{base}&{option}", "files", "internal-hosts")
            assert "does not exist or cannot be read" in error.message
        error = await refusal(f"{base}&sslcrl={certificates.authority}", "files", "internal-hosts")
        assert "unable to get certificate CRL" in error.message


# --- sockets, several hosts, files, services --------------------------------------------------------------------------


async def test_a_socket_with_the_right(cluster: Cluster) -> None:
    text = cluster.dsn(cluster.primary)
    assert type(await refusal(text)) is InvalidDataError
    connection = await connect(text, "sockets")
    assert tls_version(connection) is None
    assert await connection.fetchval("SELECT current_user") == USER
    await connection.close()


async def test_several_hosts_with_the_right(cluster: Cluster) -> None:
    async with front(cluster.standby) as standby, front(cluster.primary) as primary:
        place = f"127.0.0.1:{standby},127.0.0.1:{primary}"
        assert type(await refusal(cluster.dsn(place), environment="development")) is InvalidDataError
        for role, recovery in (("", False), ("standby", True), ("prefer-standby", True), ("primary", False)):
            options = {"target_session_attrs": role} if role else {}
            connection = await connect(cluster.dsn(place, **options), "several-hosts", environment="development")
            assert await connection.fetchval("SELECT pg_is_in_recovery()") is recovery
            await connection.close()


async def test_a_password_that_is_wrong_ends_the_attempts(cluster: Cluster) -> None:
    async with front(cluster.primary) as port:
        text = cluster.dsn(f"127.0.0.1:{port},127.0.0.1:{unused_port()}", password=CANARY)
        error = await refusal(text, "several-hosts", environment="development")
        assert type(error) is ConfigurationError
        assert error.details["host"] == "127.0.0.1"


async def test_a_password_file_with_the_right(cluster: Cluster, tmp_path: Path) -> None:
    file = tmp_path / "passwords"
    escaped = PASSWORD.replace("\\", "\\\\").replace(":", "\\:")
    file.write_text(
        f"# *:*:*:*:{OURS}\n\nlocalhost:*:*:other:{OURS}\nshort:line\nlocalhost:5432:{DATABASE}:{USER}:{escaped}\n",
        encoding="utf-8",
    )
    text = cluster.dsn(cluster.primary, password=None, passfile=str(file))
    connection = await connect(text, "sockets", "files")
    await connection.close()
    file.write_text("", encoding="utf-8")
    error = await refusal(text, "sockets", "files")
    assert type(error) is ConfigurationError
    connection = await connect(cluster.dsn(cluster.primary, passfile=str(file)), "sockets", "files")
    await connection.close()
    file.unlink()
    error = await refusal(text, "sockets", "files")
    assert "password file named in the connection string cannot be read" in error.message


async def test_a_service_with_the_right(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fills in what the text leaves out; where to connect to is always in the text."""
    file = tmp_path / "services"
    monkeypatch.setenv("PGSERVICEFILE", str(file))
    file.write_text(
        f"[mine]\nhost=ours.invalid\nport=1\nuser={OURS}\npassword={PASSWORD}\napplication_name=served\n"
        f"[odd]\nrole=x\n[broken]\nsslmode={CANARY}\n",
        encoding="utf-8",
    )
    base = cluster.dsn(cluster.primary, password=None)
    connection = await connect(f"{base}&service=mine", "sockets", "service")
    assert await connection.fetchval("SELECT current_setting('application_name')") == "served"
    await connection.close()
    assert "(role)" in (await refusal(f"{base}&service=odd", "sockets", "service")).message
    assert "unknown sslmode" in (await refusal(f"{base}&service=broken", "sockets", "service")).message
    assert "cannot be read" in (await refusal(f"{base}&service=none", "sockets", "service")).message
    monkeypatch.delenv("PGSERVICEFILE")
    error = await refusal(f"{base}&service=ours", "sockets", "service")
    assert type(error) is ConfigurationError or OURS not in str(error)


# --- nothing of ours goes along ---------------------------------------------------------------------------------------


def message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!i", len(body) + 4) + body


def request(code: int, body: bytes = b"") -> bytes:
    return message(b"R", struct.pack("!i", code) + body)


class Rogue:
    """A server that records all it gets, and answers what it is told to; then it waits for the client to go, or hangs up."""

    def __init__(
        self, *replies: bytes, tls: ssl.SSLContext | None = None, plain: bytes = b"N", hangs_up: bool = False
    ) -> None:
        self.seen = b""
        self.connections = 0
        self.certificate: Any = None
        self._replies, self._tls, self._plain, self._hangs_up = list(replies), tls, plain, hangs_up

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        first = await self._read(reader)
        if first[4:8] == b"\x04\xd2\x16\x2f":
            writer.write(b"S" if self._tls else self._plain)
            if self._tls:
                await writer.start_tls(self._tls)
                self.certificate = writer.get_extra_info("peercert")
            first = await self._read(reader)
        for reply in self._replies:
            writer.write(reply)
            await writer.drain()
            await self._read(reader)
        while not self._hangs_up and await self._read(reader):
            pass

    async def _read(self, reader: asyncio.StreamReader) -> bytes:
        got = await reader.read(65536)
        self.seen += got
        return got


VERSION = message(b"S", b"server_version\x0018.4\0")
GREETINGS = {
    "clear text": (request(3),),
    "md5": (request(5, b"salt"),),
    "scram": (request(10, b"SCRAM-SHA-256\0\0"),),
    "kerberos": (request(7),),
    "sspi": (request(9),),
    "trust": (TRUSTED + VERSION + READY,),
}


@pytest.mark.parametrize("greeting", GREETINGS)
@pytest.mark.parametrize("encrypted", [False, True])
async def test_a_rogue_server_gets_nothing_of_ours(greeting: str, encrypted: bool, certificates: Certificates) -> None:
    tls = certificates.context()
    tls.verify_mode = ssl.CERT_OPTIONAL  # asks for a client's certificate
    tls.load_verify_locations(certificates.authority)
    server = Rogue(*GREETINGS[greeting], tls=tls if encrypted else None, hangs_up=greeting != "trust")
    async with rogue(server) as port:
        text = f"postgresql://tenant@localhost:{port}/theirs"
        text += f"?sslmode=verify-full&sslrootcert={certificates.authority}" if encrypted else "?sslmode=disable"
        if greeting == "trust":
            (await connect(text, *EVERYTHING, timeout=30)).terminate()
        else:
            await refusal(text, *EVERYTHING, timeout=30)
    assert b"user\0tenant\0" in server.seen
    assert b"database\0theirs\0" in server.seen
    assert b"application_name\0car-control-plane\0" in server.seen
    assert OURS.encode() not in server.seen
    assert not server.certificate
    if greeting == "clear text":
        assert server.seen.endswith(b"p\x00\x00\x00\x05\x00")  # the empty password


@pytest.mark.parametrize("encrypted", [False, True])
async def test_the_drivers_own_ways_would_give_ours_away(encrypted: bool, certificates: Certificates) -> None:
    """What the test above looks for is there to be found."""
    tls = certificates.context()
    tls.verify_mode = ssl.CERT_OPTIONAL
    tls.load_verify_locations(certificates.authority)
    server = Rogue(request(3), tls=tls if encrypted else None, hangs_up=True)
    async with rogue(server) as port:
        with pytest.raises((asyncpg.PostgresError, OSError, TimeoutError, asyncpg.InterfaceError)):
            await asyncpg.connect(
                f"postgresql://tenant@localhost:{port}/theirs?sslmode={'require' if encrypted else 'disable'}"
                "&sslnegotiation=postgres&target_session_attrs=any",
                timeout=30,
            )
    assert OURS.encode() in server.seen
    assert bool(server.certificate) is encrypted


async def test_the_tenants_password_goes_out_on_verified_tls_only(certificates: Certificates) -> None:
    text = f"postgresql://tenant:{CANARY}@localhost:{{}}/d?sslmode=verify-full&sslrootcert={{}}"
    for tls, authority in ((None, certificates.authority), (certificates.context(), certificates.other_authority)):
        server = Rogue(request(3), tls=tls)
        async with rogue(server) as port:
            await refusal(text.format(port, authority), "files", "internal-hosts", timeout=30)
        assert server.connections == 1
        assert b"tenant" not in server.seen
        assert CANARY.encode() not in server.seen
    server = Rogue(request(3), tls=certificates.context(), hangs_up=True)
    async with rogue(server) as port:
        await refusal(text.format(port, certificates.authority), "files", "internal-hosts", timeout=30)
    assert CANARY.encode() in server.seen


# --- servers that are no help -----------------------------------------------------------------------------------------


class Scram(Rogue):
    """Asks for this many rounds of SCRAM."""

    def __init__(self, rounds: int, **how: Any) -> None:
        super().__init__(request(10, b"SCRAM-SHA-256\0\0"), b"", **how)
        self._rounds = rounds

    async def _read(self, reader: asyncio.StreamReader) -> bytes:
        got = await super()._read(reader)
        if b"SCRAM-SHA-256" in got:
            nonce = got.rpartition(b"r=")[2] + b"x"
            self._replies[1:] = [request(11, b"r=%b,s=c2FsdA==,i=%d" % (nonce, self._rounds))]
        return got


@pytest.mark.parametrize("encrypted", [False, True])
async def test_scram_with_too_many_rounds_does_not_stop_the_loop(encrypted: bool, certificates: Certificates) -> None:
    """The most there can be take a quarter of an hour, during which nothing else of the process runs."""
    for rounds, refused in ((4096, False), (1_000_001, True), (2**31 - 1, True), (10**30, True)):
        server = Scram(rounds, tls=certificates.context() if encrypted else None, hangs_up=True)
        async with rogue(server) as port:
            text = f"postgresql://tenant:{CANARY}@localhost:{port}/d"
            text += f"?sslmode=verify-full&sslrootcert={certificates.authority}" if encrypted else "?sslmode=disable"
            error = await refusal(text, *EVERYTHING, timeout=30)
        assert ("rounds of SCRAM" in error.message) is refused
        assert (b"p=" in server.seen) is not refused


LIARS: dict[str, tuple[bytes, ...]] = {
    "garbage": (b"\xff" * 50_000,),
    "http": (b"HTTP/1.1 400 Bad Request\r\n\r\n",),
    "1 GiB": (b"R\x40\x00\x00\x00" + b"x" * 100_000,),
    "negative": (b"R\xff\xff\xff\xff",),
    "endless notices": (message(b"N", b"SWARNING\0C01000\0Mx\0\0") * 10_000,),
    "kerberos": (request(7),),
    "unknown authentication": (request(99),),
    "half a message": (b"R\x00\x00",),
    "scram with nothing": (request(11, b"x"),),
    "scram at the end": (request(12, b"v=x"),),
    "scram without words": (request(10, b"SCRAM-SHA-256\0\0"), request(11, b"x")),
    "scram by halves": (request(10, b"SCRAM-SHA-256\0\0"), request(12, b"v=x")),
    "scram of another kind": (request(10, b"SCRAM-SHA-512\0\0"),),
    "signed in twice": (TRUSTED + TRUSTED,),
    "short messages": (b"R\x00\x00\x00\x04",),
    "short key": (TRUSTED + message(b"K", b"") + READY,),
    "short setting": (TRUSTED + message(b"S", b"x") + READY,),
    "short error": (message(b"E", b"S"),),
    "rows": (TRUSTED + message(b"D", b"\0\1\0\0\0\1x"),),
    "no version": (TRUSTED + READY,),
    "a version too long": (TRUSTED + message(b"S", b"server_version\0" + b"9" * 5000 + b"\0") + READY,),
    "an encoding nobody knows": (TRUSTED + VERSION + message(b"S", b"client_encoding\0x\0") + READY,),
    "a version that is none": (TRUSTED + message(b"S", b"server_version\0nonsense\0") + READY,),
    "error with the password": (request(3), error_response("28P01", f"{CANARY} is wrong")),
    "error at once": (error_response("XX000", CANARY),),
    "unknown error": (error_response("ZZZZZ", CANARY),),
    "silence": (),
}


@pytest.mark.parametrize("lie", LIARS)
@pytest.mark.parametrize("encrypted", [False, True])
async def test_a_liar_is_left_in_time(
    lie: str, encrypted: bool, certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server = Rogue(*LIARS[lie], tls=certificates.context() if encrypted else None)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        async with rogue(server) as port:
            text = f"postgresql://tenant:{CANARY}@localhost:{port}/d"
            text += f"?sslmode=verify-full&sslrootcert={certificates.authority}" if encrypted else "?sslmode=disable"
            async with asyncio.timeout(60):
                error = await refusal(text, *EVERYTHING, timeout=0.5)
        gc.collect()
    assert isinstance(error, ConnectionUnavailableError | ConfigurationError)
    assert error.details["host"] == "localhost"
    assert CANARY not in caplog.text
    assert not [warning for warning in warned if CANARY in str(warning.message)]


@pytest.mark.parametrize("answer", [b"", b"X", b"SS", b"E\x00\x00\x00\x08", b"S" * 10_000, b"S\x16\x03\x01garbage"])
async def test_a_liar_before_tls(answer: bytes, certificates: Certificates) -> None:
    server = Rogue(plain=answer)
    async with rogue(server) as port:
        text = by_name(port, certificates.authority, sslmode="verify-full")
        error = await refusal(text, "files", "internal-hosts", timeout=0.5)
    assert isinstance(error, ConnectionUnavailableError | ConfigurationError)
    assert server.seen[8:16] != b"\x00\x03\x00\x00"


LATER_LIES = {
    "length below zero": b"D\x96\x60\xda\xba" + bytes(range(256)),
    "an unknown message below zero": b"\xb2\xff\x3b\xaa\x94" + bytes(range(256)),
    "length of zero": b"C\x00\x00\x00\x00" + READY,
    "length of three": b"C\x00\x00\x00\x03" + READY,
    "length of more than there can be": b"D\x40\x00\x00\x01x",
    "an unknown message": message(b"\x00", b"x") + READY,
    "signing in again": request(11, b"r=x,s=c2FsdA==,i=4096") + READY,
    "another key": message(b"K", bytes(8)) + READY,
    "http": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "after an answer": message(b"N", b"\0") + b"D\xff\xff\xff\xff",
}


@pytest.mark.parametrize("lie", LATER_LIES)
@pytest.mark.parametrize("encrypted", [False, True])
async def test_a_liar_that_begins_well(lie: str, encrypted: bool, certificates: Certificates) -> None:
    """Several of these make the driver loop for ever or read what is not there; both stop the process, not the connection."""
    server = Rogue(TRUSTED + VERSION + READY, LATER_LIES[lie], tls=certificates.context() if encrypted else None)
    async with rogue(server) as port:
        text = f"postgresql://tenant@localhost:{port}/d"
        text += f"?sslmode=verify-full&sslrootcert={certificates.authority}" if encrypted else "?sslmode=disable"
        connection = await connect(text, *EVERYTHING, timeout=30)
        with pytest.raises((asyncpg.ConnectionDoesNotExistError, ConnectionAbortedError)):
            await connection.fetch("SELECT 1", timeout=30)
        assert connection.is_closed()


@pytest.mark.parametrize("size", [1, 2, 4, 5, 6, 7, 4096])
def test_messages_are_followed_however_they_arrive(size: int) -> None:
    answers = READY + message(b"T", b"") + message(b"D", bytes(5000)) * 2 + message(b"C", b"SELECT 2\0") + READY
    said = TRUSTED + VERSION + answers
    watch = dialing._Watch()
    for at in range(0, len(said), size):
        watch.feed(said[at : at + size])
    assert watch.fault is None
    lie = b"D\x00\x00\x00\x05x" + b"D\xff\xff\xff\xff"
    for at in range(0, len(lie) - size, size):
        watch.feed(lie[at : at + size])
    last = (len(lie) - 1) // size * size
    with pytest.raises(ConnectionAbortedError):
        watch.feed(lie[last:])


async def test_a_server_of_any_version_is_connected_to(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialing, "MINIMUM_SERVER", (99, 0))
    connection = await connect(cluster.dsn(cluster.primary), "sockets")
    await connection.close()


async def test_the_tenants_settings_are_set(cluster: Cluster) -> None:
    text = cluster.dsn(cluster.primary, application_name="theirs", search_path="x", statement_timeout="7s")
    connection = await connect(text, "sockets")
    assert await connection.fetchval("SELECT current_setting('application_name')") == "theirs"
    assert await connection.fetchval("SELECT current_setting('statement_timeout')") == "7s"
    await connection.close()
    error = await refusal(cluster.dsn(cluster.primary, DateStyle="nonsense"), "sockets")
    assert type(error) is ConfigurationError


async def test_a_connection_that_was_watched_is_an_ordinary_one(cluster: Cluster, certificates: Certificates) -> None:
    """Statements, transactions, a statement cut off (which takes a connection of its own), and the end."""
    async with front(cluster.primary) as plain, front(cluster.primary, tls=certificates.context()) as tls:
        for text in (
            cluster.dsn(cluster.primary),
            cluster.dsn(plain),
            by_name(tls, certificates.authority, sslmode="verify-full"),
        ):
            connection = await connect(text, *EVERYTHING)
            async with connection.transaction():
                rows = await connection.fetch("SELECT repeat('x', 100000) FROM generate_series(1, $1::int)", 20)
                assert len(rows) == 20
            with pytest.raises(TimeoutError):
                await connection.execute("SELECT pg_sleep(60)", timeout=0.1)
            assert await connection.fetchval("SELECT 1") == 1
            await connection.close(timeout=30)
            assert connection.is_closed()


# --- cut off ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["resolving", "connecting", "TLS", "signing in"])
@pytest.mark.parametrize("how", ["cancelled", "timed out"])
async def test_connecting_that_is_cut_off_leaves_no_connection_and_no_secret(
    stage: str,
    how: str,
    certificates: Certificates,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    reached, gone = asyncio.Event(), asyncio.Event()

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readexactly(8)
            if stage != "connecting":
                writer.write(b"S")
            if stage == "signing in":
                await writer.start_tls(certificates.context())
            if stage != "connecting":
                await reader.read(1)
            reached.set()
            while await reader.read(1000):
                pass
        finally:
            gone.set()

    async def never(*_: Any, **__: Any) -> Any:
        reached.set()
        gone.set()
        await asyncio.Event().wait()

    with monkeypatch.context() as patched:
        async with rogue(behave) as port, asyncio.timeout(60):
            if stage == "resolving":
                patched.setattr(asyncio.get_running_loop(), "getaddrinfo", never)
            text = f"postgresql://tenant:{CANARY}@localhost:{port}/d"
            text += f"?sslmode=verify-full&sslrootcert={certificates.authority}"
            limit = asyncio.timeout(None)

            async def work() -> None:
                async with limit:
                    await connect(text, "files", "internal-hosts", timeout=60)

            task = asyncio.ensure_future(work())
            await reached.wait()
            if how == "timed out":
                limit.reschedule(asyncio.get_running_loop().time())
                error = await failure_of(task)
                assert isinstance(error, TimeoutError)
            else:
                task.cancel()
                error = await failure_of(task)
                assert isinstance(error, asyncio.CancelledError)
            assert list(leaks(error, CANARY)) == []
            await gone.wait()
    gc.collect()
    assert CANARY not in caplog.text
