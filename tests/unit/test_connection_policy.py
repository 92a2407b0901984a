"""What a tenant's connection string may say, where it may lead, in which words it is refused, and that no spelling gets around it."""

import ipaddress
import os
import socket
import traceback
import uuid
from random import Random
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given, settings, strategies as st
from pydantic import SecretStr

from car_control_plane import dsn as dsns
from car_control_plane.dialing import ConnectionPolicy, Destination, attempts, refuse_internal_hosts
from car_control_plane.dsn import Dsn, Host
from car_control_plane.encryption.values import ConnectionString
from car_control_plane.errors import AccessDeniedError, ControlPlaneError, InvalidDataError
from car_control_plane.settings import TenantConnectionRight, load_settings

SECRET = "Zq7-Wk3-Jx9"
TENANT = uuid.UUID("01890a5d-ac96-774b-bcce-b302099a8057")
EVERYTHING: frozenset[TenantConnectionRight] = frozenset(
    {"sockets", "files", "several-hosts", "service", "internal-hosts", "weak-tls"}
)


@pytest.fixture(autouse=True)
def _hostile_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands here must not stand in for what a tenant leaves out."""
    for name in ("HOST", "PORT", "USER", "DATABASE", "PASSWORD", "SSLMODE", "SERVICE"):
        monkeypatch.setenv(f"PG{name}", "6666" if name == "PORT" else "ours")


def admit(text: str, *rights: TenantConnectionRight, environment: str = "production") -> Dsn:
    policy = ConnectionPolicy(allow=frozenset(rights))
    return policy.admit(SecretStr(text), tenant_id=TENANT, environment=environment)


def refusal(
    text: Any, *rights: TenantConnectionRight, environment: str = "production", policy: ConnectionPolicy | None = None
) -> ControlPlaneError:
    """Return the error for a text, after looking for the secret in everything it carries."""
    policy = policy or ConnectionPolicy(allow=frozenset(rights))
    given = SecretStr(text) if isinstance(text, str) else text
    with pytest.raises(ControlPlaneError) as caught:
        policy.admit(given, tenant_id=TENANT, environment=environment)
    error = caught.value
    assert error.__cause__ is None
    assert error.__context__ is None
    told = [str(error), repr(error), repr(error.args), repr(vars(error))]
    frames = [
        frame for frame, _ in traceback.walk_tb(error.__traceback__) if "car_control_plane" in frame.f_code.co_filename
    ]
    told += [repr(frame.f_locals) for frame in frames if "/tests/" not in frame.f_code.co_filename]
    assert not [text for text in told if SECRET in text]
    return error


# --- what is taken ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("postgresql://u:p@db.example.com/d", Host("db.example.com", 5432)),
        ("postgresql://u@db.example.com:6432/d", Host("db.example.com", 6432)),
        ("postgresql+asyncpg://u:p@db.example.com./d?sslmode=verify-full", Host("db.example.com.", 5432)),
        ("host=my_db user=u dbname=d", Host("my_db", 5432)),
        ("hostaddr=192.0.2.1 user=u dbname=d", Host("192.0.2.1", 5432)),
        ("postgresql://u:p@10.1.2.3/d", Host("10.1.2.3", 5432)),
        ("postgresql://u:p@172.16.0.1/d", Host("172.16.0.1", 5432)),
        ("postgresql://u:p@192.168.0.1/d", Host("192.168.0.1", 5432)),
        ("postgresql://u:p@100.64.0.1/d", Host("100.64.0.1", 5432)),
        ("postgresql://u:p@[2001:db8::1]/d", Host("2001:db8::1", 5432)),
        ("postgresql://u:p@[fd12:3456::1]:1/d", Host("fd12:3456::1", 1)),
        ("postgresql://u:p@[::ffff:10.0.0.1]/d", Host("::ffff:10.0.0.1", 5432)),
        ("postgresql://u:p@xn--bcher-kva.example/d", Host("xn--bcher-kva.example", 5432)),
        ("postgresql://u:p@localhost.example.com/d", Host("localhost.example.com", 5432)),
        ("postgresql://u:p@1.example.com/d", Host("1.example.com", 5432)),
        ("postgresql://u:p@0x7f.example/d", Host("0x7f.example", 5432)),
        ("postgresql://u:p@4f5e6a7b8c9d/d", Host("4f5e6a7b8c9d", 5432)),
        (f"postgresql://u:p@{'a' * 63}.example/d", Host(f"{'a' * 63}.example", 5432)),
        ("postgresql://u:p@db/d?sslrootcert=system", Host("db", 5432)),
        ("postgresql://u:p@db/d?ssl_min_protocol_version=TLSv1.3&ssl_max_protocol_version=TLSv1.3", Host("db", 5432)),
        ("postgresql://u:p@db/d?ssl_min_protocol_version=TLSv1.2&connect_timeout=5", Host("db", 5432)),
        ("postgresql://u:p@db/d?sslmode=verify-full&sslnegotiation=direct", Host("db", 5432)),
        (
            "postgresql://u:p@db/d?application_name=a&search_path=x,y&TimeZone=UTC&statement_timeout=5s",
            Host("db", 5432),
        ),
        ("postgresql://u:p@db/d?target_session_attrs=read-only&client_encoding=latin1", Host("db", 5432)),
    ],
)
def test_a_plain_connection_string_is_taken(text: str, host: Host) -> None:
    dsn = admit(text)
    assert dsn.hosts == (host,)
    assert (dsn.user, dsn.database) == ("u", "d")


def test_an_opened_connection_string_is_taken_as_well() -> None:
    text = "postgresql://u:p@db.example.com/d"
    opened = ConnectionPolicy().admit(ConnectionString(text), tenant_id=TENANT, environment="production")
    assert opened == admit(text)
    assert opened.password == "p"


@pytest.mark.parametrize("environment", ["development", "production"])
def test_the_policy_of_the_settings(environment: str) -> None:
    chosen = ConnectionPolicy.from_settings(load_settings(tenant_connections_allow={"sockets", "weak-tls"}))
    assert chosen == ConnectionPolicy(allow=frozenset({"sockets", "weak-tls"}))
    assert ConnectionPolicy.from_settings(load_settings()) == ConnectionPolicy()
    dsn = chosen.admit(
        SecretStr("postgresql://u@/d?host=/run&sslmode=disable"), tenant_id=TENANT, environment=environment
    )
    assert dsn.hosts == (Host("/run", 5432),)


# --- forms that are refused, and the right that takes each ------------------------------------------------------------

FORMS: list[tuple[str, str, str, TenantConnectionRight | None]] = [
    # text, words of the message, words of the hint, the right
    (f"mysql://u:{SECRET}@db/d", "does not start with postgresql://", "postgresql://user", None),
    (f"postgresql://u:{SECRET}@db@x/d", "more than one '@'", "percent-encode", None),
    (f"postgresql://u:p@db/d?sslmod={SECRET}", "unknown option", "sslmode", None),
    (f"postgresql://u:{SECRET}@db:a/d", "has a port that is not a number", "postgresql://", None),
    ("", "is empty", "postgresql://", None),
    ("embedded:", "does not start with postgresql://", "postgresql://", None),
    (f"postgresql://u:{SECRET}@/d", "names no host", "postgresql://user", None),
    (f"postgresql://u:{SECRET}@:7/d", "names no host", "postgresql://user", None),
    (f"user=u password={SECRET} dbname=d", "names no host", "postgresql://user", None),
    ("postgresql://db/d", "names no user", "ours is not used", None),
    (f"postgresql://:{SECRET}@db/d", "names no user", "ours is not used", None),
    ("host=db user='' dbname=d", "names no user", "ours is not used", None),
    (f"postgresql://u:{SECRET}@db", "names no database", "Name it", None),
    (f"postgresql://u:{SECRET}@db/", "names no database", "Name it", None),
    (f"postgresql://u:{SECRET}@a,b/d", "names several hosts", "Name one", "several-hosts"),
    (f"host=a,b user=u password={SECRET} dbname=d", "names several hosts", "Name one", "several-hosts"),
    (f"postgresql+asyncpg://u:{SECRET}@/d?host=a&host=b", "names several hosts", "Name one", "several-hosts"),
    (f"postgresql://u:{SECRET}@/d?host=/run/postgresql", "directory of a socket", "Name a host", "sockets"),
    (f"postgresql://u:{SECRET}@%2Frun%2Fpostgresql/d", "directory of a socket", "Name a host", "sockets"),
    (f"postgresql://u:{SECRET}@db/d?service=x", "names a service", "Write out", "service"),
    ("postgresql:///?service=x", "names a service", "Write out", None),
    (f"postgresql://u:{SECRET}@db/d?sslrootcert=/x", "(sslrootcert)", "Leave it out", "files"),
    (f"postgresql://u:{SECRET}@db/d?sslmode=verify-ca&sslrootcert=x", "(sslrootcert)", "Leave it out", "files"),
    (f"postgresql://u:{SECRET}@db/d?sslcert=/a&sslkey=/b", "(sslcert, sslkey)", "Leave it out", "files"),
    (f"postgresql://u@db/d?sslcert=/a&sslkey=/b&sslpassword={SECRET}", "(sslcert, sslkey)", "Leave it out", "files"),
    (f"postgresql://u@db/d?sslpassword={SECRET}", "has an sslpassword", "password=", None),
    (f"postgresql://u:{SECRET}@db/d?sslcrl=/x&sslrootcert=system", "(sslcrl)", "Leave it out", "files"),
    ("postgresql://u@db/d?passfile=/x", "(passfile)", "a password goes into the connection string", "files"),
    (f"postgresql://u:{SECRET}@db/d?krbsrvname=x", "Kerberos", "password", None),
    (f"postgresql://u:{SECRET}@db/d?gsslib=gssapi", "gsslib", "password", None),
    (f"postgresql://u:{SECRET}@db/d?options=-c%20a%3Db", "not taken here (options)", "ALTER ROLE", None),
    (f"postgresql://u:{SECRET}@db/d?role=admin", "not taken here (role)", "ALTER ROLE", None),
    (f"postgresql://u:{SECRET}@db/d?row_security=off&jit=off", "(jit, row_security)", "ALTER ROLE", None),
    (f"postgresql://u:p@db/d?app.{SECRET.replace('-', '_')}=1", "(of an extension)", "ALTER ROLE", None),
    (f"postgresql://u:{SECRET}@db/d?session_authorization=x", "unknown option", "", None),
    (f"postgresql://u:{SECRET}@db/d?replication=database", "unknown option", "", None),
    (f"postgresql://u:{SECRET}@db/d?ssl_min_protocol_version=TLSv1", "older than 1.2", "Leave", None),
    (f"postgresql://u:{SECRET}@db/d?ssl_max_protocol_version=TLSv1.1", "older than 1.2", "Leave", None),
    (f"postgresql://u:{SECRET}@db/d?sslmode=disable", "has sslmode=disable", "verify-full", "weak-tls"),
    (f"postgresql://u:{SECRET}@db/d?sslmode=allow", "has sslmode=allow", "verify-full", "weak-tls"),
    (f"postgresql://u:{SECRET}@db/d?sslmode=prefer", "has sslmode=prefer", "verify-full", "weak-tls"),
    (f"postgresql://u:{SECRET}@db/d?sslmode=require", "has sslmode=require", "verify-full", "weak-tls"),
    (f"postgresql://u:{SECRET}@db/d?ssl=true", "has sslmode=require", "verify-full", "weak-tls"),
    (f"postgresql://u:{SECRET}@db/d?sslmode=verify-ca", "has sslmode=verify-ca", "verify-full", "weak-tls"),
    (f"postgresql://u:{SECRET}@-a.example/d", "is no name of the DNS", "xn--", None),
    (f"postgresql://u:{SECRET}@a..example/d", "is no name of the DNS", "xn--", None),
    (f"postgresql://u:{SECRET}@.example/d", "is no name of the DNS", "xn--", None),
    (f"postgresql://u:{SECRET}@example../d", "is no name of the DNS", "xn--", None),
    (f"postgresql://u:{SECRET}@{'a' * 64}.example/d", "is no name of the DNS", "xn--", None),
    (f"postgresql://u:{SECRET}@{'a.' * 127}a/d", "is no name of the DNS", "xn--", None),
    (f"postgresql://u:{SECRET}@bücher.example/d", "is no name of the DNS", "xn--", None),
    (f"postgresql://u:{SECRET}@\uff11\uff12\uff17.\uff10.\uff10.\uff11/d", "is no name of the DNS", "xn--", None),
    (f"postgresql://u:{SECRET}@\uff4cocalhost/d", "is no name of the DNS", "xn--", None),
    (f"postgresql://u:{SECRET}@[fe80::1%25eth0]/d?sslmode=disable", "has sslmode=disable", "verify-full", None),
]


@pytest.mark.parametrize(("text", "words", "hint", "right"), FORMS)
def test_a_form_that_is_refused(text: str, words: str, hint: str, right: TenantConnectionRight | None) -> None:
    others: tuple[TenantConnectionRight, ...] = tuple(EVERYTHING - {right}) if right else ()
    for error in (refusal(text), refusal(text, *others)):
        assert type(error) is InvalidDataError
        assert words in error.message
        assert hint in error.hint
        assert "PGHOST" not in error.message
    if right is not None:
        assert isinstance(admit(text, right), Dsn)


@pytest.mark.parametrize("text", [f"postgresql://u:{SECRET}@db/d", None, 1, f"postgresql://u:{SECRET}@db/d".encode()])
def test_a_text_that_is_not_wrapped_is_refused(text: Any) -> None:
    with pytest.raises(InvalidDataError, match="SecretStr") as caught:
        ConnectionPolicy().admit(text, tenant_id=TENANT, environment="production")
    assert SECRET not in str(caught.value)


def test_verify_ca_needs_an_authority_of_ones_own() -> None:
    own = "postgresql://u@db/d?sslmode=verify-ca&sslrootcert=/ca.crt"
    assert admit(own, "files").sslmode == "verify-ca"
    assert "verify-ca" in refusal("postgresql://u@db/d?sslmode=verify-ca", "files").message


def test_development_may_use_any_sslmode_and_internal_hosts_and_nothing_else() -> None:
    for mode in ("disable", "allow", "prefer", "require", "verify-ca"):
        assert admit(f"postgresql://u@localhost/d?sslmode={mode}", environment="development").sslmode == mode
    for text in ("u@a,b/d", "u@/d?host=/run", "u@a/d?service=x", "u@a/d?sslcert=x", "a/d", "u@a", "u@a/d?role=x"):
        assert type(refusal(f"postgresql://{text}", environment="development")) is InvalidDataError
    for environment in ("staging", "Development", "dev", ""):
        assert type(refusal("postgresql://u@localhost/d", environment=environment)) is AccessDeniedError


# --- hosts that are refused -------------------------------------------------------------------------------------------

HOSTS = [
    # host, word of the reason
    ("localhost", "this machine"),
    ("LOCALHOST", "this machine"),
    ("localhost.", "this machine"),
    ("db.localhost", "this machine"),
    ("a.b.LocalHost.", "this machine"),
    ("127.0.0.1", "loopback"),
    ("127.255.255.254", "loopback"),
    ("0.0.0.0", "unspecified"),
    ("0.1.2.3", "unspecified"),
    ("169.254.1.1", "link-local"),
    ("169.254.169.254", "metadata"),
    ("100.100.100.200", "metadata"),
    ("168.63.129.16", "metadata"),
    ("192.0.0.192", "metadata"),
    ("224.0.0.1", "multicast"),
    ("239.255.255.255", "multicast"),
    ("240.0.0.1", "reserved"),
    ("255.255.255.255", "reserved"),
    ("[::1]", "loopback"),
    ("[0:0:0:0:0:0:0:1]", "loopback"),
    ("[::1%25lo]", "loopback"),
    ("[::]", "unspecified"),
    ("[fe80::1]", "link-local"),
    ("[FE80::1%25eth0]", "link-local"),
    ("[febf::1]", "link-local"),
    ("[ff02::1]", "multicast"),
    ("[fd00:ec2::254]", "metadata"),
    ("[fd00:ec2::23]", "metadata"),
    ("[fd20:ce::254]", "metadata"),
    ("[::ffff:127.0.0.1]", "loopback"),
    ("[::ffff:7f00:1]", "loopback"),
    ("[::ffff:a9fe:a9fe]", "metadata"),
    ("[::127.0.0.1]", "loopback"),
    ("[::ffff:0:127.0.0.1]", "loopback"),
    ("[64:ff9b::127.0.0.1]", "loopback"),
    ("[64:ff9b::a9fe:a9fe]", "metadata"),
    ("[64:ff9b:1::a9fe:a9fe]", "metadata"),
    ("[64:ff9b:1:a9fe:a9:fe00::]", "metadata"),  # behind 48 bits
    ("[64:ff9b:1:2a9:fe:a9fe::]", "metadata"),  # behind 56 bits
    ("[64:ff9b:1:2:a9:fea9:fe00:0]", "metadata"),  # behind 64 bits
    ("[2002:7f00:1::]", "loopback"),
    ("[2002:a9fe:a9fe::1]", "metadata"),
    ("[2001:0:7f00:1::]", "loopback"),  # Teredo's server
    ("[2001:0:4136:e378:8000:63bf:80ff:fffe]", "loopback"),  # Teredo's client, inverted
    ("[2001:db8::5efe:127.0.0.1]", "loopback"),  # ISATAP
    ("[2001:db8::200:5efe:127.0.0.1]", "loopback"),
]


@pytest.mark.parametrize(("host", "word"), HOSTS)
def test_a_host_that_is_refused(host: str, word: str) -> None:
    text = f"postgresql://u:{SECRET}@{host}:5432/d"
    error = refusal(text, *(EVERYTHING - {"internal-hosts"}))
    assert type(error) is AccessDeniedError
    assert word in error.message
    written = host.strip("[]").replace("%25", "%")
    assert error.message.startswith(f"the host {written}")
    assert error.details["host"] == written
    assert admit(text, "internal-hosts").hosts[0].name == written
    assert admit(text, environment="development").hosts[0].name == written


SPELLINGS = (
    "127.1",
    "127.0.1",
    "0x7f000001",
    "0x7F.0.0.1",
    "2130706433",
    "017700000001",
    "0177.0.0.1",
    "0177.0.0.0x1",
    "00000177.1",
    "127.0.0.01",
    "127.0.0.1.",
    "0",
    "0x",
    "0.0",
    "127.0.0.256",
    "256.256.256.256",
    "1.2.3.4.5",
    "10.0.0.1.",
    "0xA9FEA9FE",
    "169.254.43518",
    "example.1",
    "example.0x1",
    "99999999999999999999",
)


@pytest.mark.parametrize("host", SPELLINGS)
def test_an_address_in_an_unusual_spelling_is_refused_whatever_it_means(host: str) -> None:
    for text in (f"postgresql://u:p@{host}/d", f"host={host} user=u dbname=d", f"postgresql://u@/d?host={host}"):
        error = refusal(text, *EVERYTHING, environment="development")
        assert type(error) is InvalidDataError
        assert "unusual spelling" in error.message


# --- the rule about hosts ---------------------------------------------------------------------------------------------


def test_a_rule_is_told_everything_and_its_reason_is_given() -> None:
    asked: list[Destination] = []

    def rule(destination: Destination) -> str | None:
        asked.append(destination)
        return "not in our network" if destination.address == ipaddress.ip_address("10.0.0.1") else None

    policy = ConnectionPolicy(host_refusal=rule)
    error = refusal(f"postgresql://u:{SECRET}@[::ffff:10.0.0.1]:7/d", policy=policy, environment="staging")
    assert type(error) is AccessDeniedError
    assert error.message == "the host ::ffff:10.0.0.1 (10.0.0.1) is refused: not in our network"
    assert error.details == {"host": "::ffff:10.0.0.1", "port": 7, "address": "::ffff:a00:1"}
    mapped = ipaddress.ip_address("::ffff:10.0.0.1")
    one = Destination(TENANT, "staging", "::ffff:10.0.0.1", 7, mapped)
    two = Destination(TENANT, "staging", "::ffff:10.0.0.1", 7, ipaddress.ip_address("10.0.0.1"))
    assert asked == [one, two]
    asked.clear()
    policy.admit(SecretStr("postgresql://u@db/d"), tenant_id=TENANT, environment="development")
    assert asked == [Destination(TENANT, "development", "db", 5432, None, internal_allowed=True)]


def test_a_rule_is_asked_about_every_host() -> None:
    policy = ConnectionPolicy(
        allow=frozenset({"several-hosts", "sockets"}), host_refusal=lambda d: "no" if d.host == "/run" else None
    )
    error = refusal("host=a,/run user=u dbname=d", policy=policy)
    assert error.message == "the host /run is refused: no"


def test_a_rule_that_raises_refuses() -> None:
    def rule(destination: Destination) -> str | None:
        raise RuntimeError(SECRET)

    error = refusal("postgresql://u@db/d", policy=ConnectionPolicy(host_refusal=rule))
    assert type(error) is AccessDeniedError
    assert error.message == "the host db is refused: the rule about hosts failed (RuntimeError)"


@pytest.mark.parametrize("answer", [True, False, 0, b"", object()])
def test_a_rule_that_answers_something_else_refuses(answer: Any) -> None:
    error = refusal("postgresql://u@db/d", policy=ConnectionPolicy(host_refusal=lambda _: answer))
    assert type(error) is AccessDeniedError
    assert f"answered with {type(answer).__name__}" in error.message


def test_an_empty_reason_is_one() -> None:
    assert type(refusal("postgresql://u@db/d", policy=ConnectionPolicy(host_refusal=lambda _: ""))) is AccessDeniedError


def test_a_rule_of_ones_own_goes_before_the_default_one() -> None:
    """The example of the docstring."""
    databases = ipaddress.ip_network("10.20.0.0/16")

    def only_our_databases(destination: Destination) -> str | None:
        if destination.address is not None and destination.address.is_private and destination.address not in databases:
            return "it is in the private network, and not among the databases"
        return refuse_internal_hosts(destination)

    policy = ConnectionPolicy(host_refusal=only_our_databases)
    assert "not among" in refusal("postgresql://u@10.21.0.1/d", policy=policy).message
    assert "not among" in refusal("postgresql://u@[::ffff:10.21.0.1]/d", policy=policy).message
    assert "link-local" in refusal("postgresql://u@169.254.0.1/d", policy=ConnectionPolicy()).message
    admitted = policy.admit(SecretStr("postgresql://u@10.20.1.1/d"), tenant_id=TENANT, environment="production")
    assert admitted.hosts[0].name == "10.20.1.1"


# --- 10,000 hostile spellings -----------------------------------------------------------------------------------------

FORBIDDEN_V4 = tuple(
    ipaddress.ip_network(text)
    for text in (
        "127.0.0.0/8",
        "0.0.0.0/8",
        "169.254.0.0/16",
        "224.0.0.0/3",
        "169.254.169.254/32",
        "100.100.100.200/32",
        "168.63.129.16/32",
        "192.0.0.192/32",
    )
)
FORBIDDEN_V6 = tuple(ipaddress.ip_network(t) for t in ("::1/128", "::/128", "fe80::/10", "ff00::/8", "fd00:ec2::/32"))
WIDE = {ord(each): ord(each) + 0xFEE0 for each in "0123456789abcdefx."}
"""Full-width forms, which IDNA turns back into the plain ones."""


# Drawn with a generator of their own, and not by Hypothesis, which needs a minute for as many: the same in every run, the ends of a network often.


def within(chance: Random, network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> int:
    last = network.num_addresses - 1
    return int(network.network_address) + chance.choice([0, last, chance.randint(0, last), chance.randint(0, last)])


def forbidden_v4(chance: Random) -> int:
    return within(chance, chance.choice(FORBIDDEN_V4))


def spell_number(chance: Random, number: int) -> str:
    zeros = "0" * chance.randint(0, 3)
    how = chance.choice("dohX")
    return {"d": f"{number}", "o": f"0{zeros}{number:o}", "h": f"0x{zeros}{number:x}", "X": f"0X{zeros}{number:X}"}[how]


def spelled_v4(chance: Random) -> str:
    """Write a forbidden IPv4 address as inet_aton reads it: in one to four parts, each in its own base."""
    number = forbidden_v4(chance)
    parts = chance.randint(1, 4)
    leading = [(number >> 24 - 8 * place) & 0xFF for place in range(parts - 1)]
    last = number & (1 << 32 - 8 * (parts - 1)) - 1
    return ".".join(spell_number(chance, each) for each in [*leading, last])


def holding_v6(chance: Random) -> ipaddress.IPv6Address:
    """Make an IPv6 address that is forbidden, or holds an IPv4 address that is."""
    if chance.random() < 0.5:
        return ipaddress.IPv6Address(within(chance, chance.choice(FORBIDDEN_V6)))
    low = forbidden_v4(chance)
    noise = chance.choice([0, 2**32 - 1, chance.randint(0, 2**32 - 1), chance.randint(0, 2**32 - 1)])
    return ipaddress.IPv6Address(
        chance.choice(
            [
                low,
                0xFFFF << 32 | low,
                0xFFFF << 48 | low,
                0x64FF9B << 96 | low,
                0x64FF9B0001 << 80 | (low if low >> 24 else 0x7F000001),
                0x64FF9B0001 << 80 | noise << 48 & ~(0xFF << 56) | (low if low >> 24 else 0x7F000001),
                0x2002 << 112 | low << 80 | noise,
                0x20010000 << 96 | low << 64 | noise,
                0x20010000 << 96 | noise << 64 | ~low & 0xFFFFFFFF,
                0x20010DB8 << 96 | 0x5EFE << 32 | low,
                0x20010DB8 << 96 | 0x02005EFE << 32 | low,
            ]
        )
    )


def spelled_v6(chance: Random) -> str:
    address = holding_v6(chance)
    number = int(address)
    high = ipaddress.IPv6Address(number >> 32 << 32).exploded.rsplit(":", 2)[0]
    text = chance.choice(
        [str(address), address.exploded, f"{high}:{ipaddress.IPv4Address(number & 0xFFFFFFFF)}", f"{number:032x}"]
    )
    if "." not in text and ":" not in text:
        text = ":".join(text[place : place + 4] for place in range(0, 32, 4))
    text = chance.choice([text, text.upper()])
    return text + chance.choice(["", "", "%1", "%lo", "%eth0"])


def hostile(chance: Random) -> str:
    """Write a connection string that leads to a forbidden address."""
    kind = chance.randint(0, 4)
    if kind == 0:
        host = spelled_v6(chance)
        escaped = host.replace("%", "%25")
        forms = [
            f"postgresql://u:p@[{escaped}]:5432/d",
            f"postgresql://u:p@/d?host=[{escaped}]",
            f"host='{host}' user=u dbname=d",
            f"hostaddr={host} user=u dbname=d",
        ]
    else:
        if kind == 1:
            prefix = chance.choice(["", "db.", "a.b."])
            name = "".join(chance.choice([c, c.upper()]) for c in "localhost")
            host = prefix + name
        else:
            host = spelled_v4(chance)
        host += chance.choice(["", "", "."])
        host = chance.choice([host, host, host.lower().translate(WIDE)])
        forms = [
            f"postgresql://u:p@{host}:5432/d",
            f"postgresql://u:p@{quote(host)}/d",
            f"postgresql://u:p@{''.join(f'%{each:02X}' for each in host.encode())}/d",
            f"postgresql+asyncpg://u:p@/d?host={host}",
            f"host={host} user=u dbname=d",
            f"hostaddr='{host}' user=u dbname=d sslmode=verify-full",
        ]
    return chance.choice(forms)


def test_no_spelling_of_a_forbidden_address_is_admitted() -> None:
    """Each kind is refused as an address, and as a form."""
    chance, policy = Random(20240229), ConnectionPolicy()
    refused = {AccessDeniedError: 0, InvalidDataError: 0}
    for _ in range(10_000):
        text = hostile(chance)
        try:
            policy.admit(SecretStr(text), tenant_id=TENANT, environment="production")
        except (AccessDeniedError, InvalidDataError) as error:
            refused[type(error)] += 1
        else:
            pytest.fail(f"admitted: {text}")
    assert min(refused.values()) > 500


def test_the_spellings_are_what_the_system_connects_to() -> None:
    """The test above is worth something only where the system would have understood."""
    for text in ("127.1", "0x7f000001", "2130706433", "0177.0.0.1"):
        assert socket.getaddrinfo(text, 5432, socket.AF_INET, socket.SOCK_STREAM)[0][4][0] == "127.0.0.1"


def test_what_a_name_resolves_to_is_judged_alike() -> None:
    chance, policy, host = Random(20240229), ConnectionPolicy(), Host("db.example.com", 5432)
    for number in range(2_000):
        address = holding_v6(chance) if number % 2 else ipaddress.IPv4Address(forbidden_v4(chance))
        with pytest.raises(AccessDeniedError, match=r"the host db\.example\.com \("):
            policy.judge(host, address, tenant_id=TENANT, environment="production")


@settings(max_examples=1_000)
@given(st.integers(0, 2**32 - 1))
def test_any_other_address_is_admitted(number: int) -> None:
    address = ipaddress.IPv4Address(number)
    forbidden = any(address in network for network in FORBIDDEN_V4)
    text = f"postgresql://u@{address}/d"
    if forbidden:
        assert type(refusal(text)) is AccessDeniedError
    else:
        assert admit(text).hosts[0].name == str(address)


# --- the order of attempts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgresql://a/d", [("any", "a")]),
        ("postgresql://a,b/d", [("read-write", "a"), ("read-write", "b")]),
        ("postgresql://a,b/d?target_session_attrs=any", [("any", "a"), ("any", "b")]),
        (
            "postgresql://a,b/d?target_session_attrs=prefer-standby",
            [("standby", "a"), ("standby", "b"), ("any", "a"), ("any", "b")],
        ),
    ],
)
def test_hosts_are_tried_in_order(text: str, expected: list[tuple[str, str]]) -> None:
    assert [(role, host.name) for role, host in attempts(dsns.parse(text))] == expected


def test_the_environment_was_hostile() -> None:
    assert os.environ["PGHOST"] == "ours"
    assert dsns.parse("postgresql:///d").hosts == (Host("ours", 6666),)
    assert dsns.parse("postgresql:///d", environment=False).hosts == (Host("", 5432),)
