"""Any connection string: read back as written, read alike by asyncpg and libpq, split right or refused, and silent about its secrets."""

import dataclasses
import ipaddress
import os
import traceback
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import quote, unquote

import psycopg.conninfo
import pytest
from asyncpg import connect_utils
from hypothesis import assume, example, given, settings, strategies as st

from car_control_plane.dsn import Dsn, Host, parse
from car_control_plane.errors import ConfigurationError

CANARY = "Zq7Wk3Jx9"
ARGUMENTS = [
    *("host", "port", "user", "password", "passfile", "database", "ssl", "service", "servicefile", "direct_tls"),
    *("server_settings", "target_session_attrs", "krbsrvname", "gsslib"),
]

relaxed = settings(deadline=None)
thorough = settings(deadline=None, max_examples=500)


@pytest.fixture(autouse=True, scope="module")
def _bare_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("PG")]:
            patch.delenv(name)
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # no password file, no certificates
        yield


def asyncpg_reads(text: str, password: str | None = None, **how: Any) -> tuple[Any, Any]:
    """Return the addresses and the parameters asyncpg would connect with."""
    addresses, parameters = connect_utils._parse_connect_dsn_and_args(
        **(dict.fromkeys(ARGUMENTS) | {"dsn": text, "password": password} | how)
    )
    return addresses, parameters


def address(host: Host) -> object:
    return f"{host.name.rstrip('/') or '/'}/.s.PGSQL.{host.port}" if host.is_socket else (host.name, host.port)


# Parts

hostile = st.sampled_from("@:/?#%&=+ '\"\\[],;$~<>{}|^`!*()")
secrets = st.text(hostile | st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)
words = st.text(hostile | st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)
names = words.filter(lambda name: not name.lower().startswith("postgres"))
host_names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True)
addresses = st.ip_addresses().map(str) | st.just("fe80::1%eth0")
sockets = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters=",") | st.sampled_from("@:?#%&=+ []"), min_size=1, max_size=20
).map(lambda path: f"/{path.strip('/') or 'run'}")  # fmt: skip
ports = st.integers(1, 65535)
hosts = st.builds(Host, host_names | addresses | sockets, ports)


@st.composite
def dsns(draw: st.DrawFn) -> dict[str, Any]:
    """What a connection string may state, in libpq's words; hosts apart."""
    parts = {
        "user": names,
        "password": secrets,
        "dbname": names,
        "sslmode": st.sampled_from(["disable", "allow", "prefer", "require"]),
        "application_name": words,
        "options": words,
        "connect_timeout": ports.map(str),
        "target_session_attrs": st.sampled_from(["any", "read-write", "prefer-standby"]),
        "krbsrvname": words,
        "sslpassword": secrets,
    }
    chosen = draw(st.sets(st.sampled_from(sorted(parts))))
    return {name: draw(parts[name]) for name in sorted(chosen)}


def written(stated: dict[str, Any], places: list[Host]) -> str:
    """Write a URI by hand, as the manual describes it, everything percent-encoded."""

    def encoded(text: str) -> str:
        return quote(text, safe="")

    def place(host: Host) -> str:
        return (
            f"[{encoded(host.name)}]:{host.port}"
            if ":" in host.name and not host.is_socket
            else f"{encoded(host.name)}:{host.port}"
        )

    rest = dict(stated)
    credentials = encoded(rest.pop("user", "")) + ":" + encoded(rest.pop("password", "")) + "@"
    path = "/" + encoded(rest.pop("dbname", ""))
    query = "&".join(f"{name}={encoded(value)}" for name, value in rest.items())
    return f"postgresql://{credentials}{','.join(place(host) for host in places)}{path}?{query}"


def stated_by(dsn: Dsn) -> dict[str, Any]:
    seconds = dsn.connect_timeout_seconds
    fields = {
        "user": dsn.user,
        "password": dsn.password,
        "dbname": dsn.database,
        "sslmode": dsn.sslmode,
        "connect_timeout": None if seconds is None else f"{seconds:.0f}",
        "target_session_attrs": dsn.target_session_attrs,
        "krbsrvname": dsn.krbsrvname,
        "sslpassword": dsn.sslpassword,
    }
    return {name: value for name, value in (fields | dict(dsn.server_settings)).items() if value is not None}


# Read as written


@relaxed
@given(dsns(), st.lists(hosts, min_size=1, max_size=3))
def test_what_is_written_is_read(stated: dict[str, Any], places: list[Host]) -> None:
    dsn = parse(written(stated, places))
    assert stated_by(dsn) == stated
    assert list(dsn.hosts) == places


@relaxed
@given(dsns(), st.lists(hosts, min_size=1, max_size=3))
def test_what_is_revealed_is_read_back_to_an_equal_dsn(stated: dict[str, Any], places: list[Host]) -> None:
    dsn = parse(written(stated, places))
    again = parse(dsn.reveal())
    assert again == dsn
    assert hash(again) == hash(dsn)
    assert again.reveal() == dsn.reveal()


@relaxed
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
@example("%40%")
@example("\ufeff \n")
def test_any_password_survives_percent_encoding(password: str) -> None:
    assert parse(f"postgresql://me:{quote(password, safe='')}@h/app").password == password


@relaxed
@given(names)
def test_any_database_can_be_put_in_place(name: str) -> None:
    dsn = parse("postgresql://me:s@h/app?sslmode=require")
    assert parse(dsn.replace(database=name).reveal()) == dataclasses.replace(dsn, database=name)


# Read alike by others


@relaxed
@given(dsns(), hosts)
def test_asyncpg_reads_the_text_for_one_host_alike(stated: dict[str, Any], host: Host) -> None:
    assume(".s.PGSQL." not in host.name)
    dsn = parse(written(stated, [host]))
    text = dsn.for_host(host)
    found, parameters = asyncpg_reads(text, dsn.password)
    assert found == [address(host)]
    assert parameters.password == dsn.password
    assert dsn.user in {None, parameters.user}
    assert dsn.database in {None, parameters.database}
    assert dict(parameters.server_settings or {}) == dict(dsn.server_settings)
    assert dsn.sslmode is None or parameters.sslmode.name == dsn.sslmode
    assert parameters.krbsrvname == dsn.krbsrvname
    assert parameters.target_session_attrs.value == "any"


@relaxed
@given(dsns(), st.lists(st.builds(Host, host_names, ports), min_size=1, max_size=3))
def test_asyncpg_reads_the_whole_text_alike(stated: dict[str, Any], places: list[Host]) -> None:
    dsn = parse(written(stated, places))
    for text in (dsn.reveal(), written(stated, places)):
        found, parameters = asyncpg_reads(text)
        assert found == [address(host) for host in places]
        assert parameters.password == dsn.password
        assert dsn.user in {None, parameters.user}


def test_asyncpg_takes_its_own_default_where_no_host_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    dsn = parse("postgresql://me@:5433/app")
    found, _ = asyncpg_reads(dsn.for_host(dsn.hosts[0]))
    assert ("localhost", 5433) in found
    assert "/tmp/.s.PGSQL.5433" in found or os.name == "nt"


def test_asyncpg_takes_the_host_from_a_service_file(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    services = tmp_path / "services"
    services.write_text("[app]\nhost=db.example\nport=5433\ndbname=app\n", encoding="utf-8")
    monkeypatch.setenv("PGSERVICEFILE", str(services))
    dsn = parse("postgresql://me@?service=app")
    found, parameters = asyncpg_reads(dsn.for_host(dsn.hosts[0]))
    assert (found, parameters.database) == ([("db.example", 5433)], "app")


def test_system_roots_never_end_up_without_tls() -> None:
    dsn = parse("postgresql://me@db.example/app?sslrootcert=system")
    with pytest.raises(FileNotFoundError):  # "system" is a file to asyncpg
        asyncpg_reads(dsn.for_host(dsn.hosts[0]))
    _, parameters = asyncpg_reads(dsn.for_host(dsn.hosts[0]), ssl=True)
    assert parameters.sslmode.name == "verify_full"
    assert parameters.ssl.check_hostname


@relaxed
@given(dsns(), st.lists(hosts, min_size=1, max_size=3))
def test_libpq_reads_the_whole_text_alike(stated: dict[str, Any], places: list[Host]) -> None:
    dsn = parse(written(stated, places))
    read = psycopg.conninfo.conninfo_to_dict(dsn.reveal())
    assert str(read.pop("host")).split(",") == [host.name for host in places]
    assert str(read.pop("port")).split(",") == [str(host.port) for host in places]
    assert read == stated


@relaxed
@given(dsns(), st.lists(st.builds(Host, host_names | sockets, ports), min_size=1, max_size=3))
def test_what_libpq_writes_as_keywords_and_values_is_read(stated: dict[str, Any], places: list[Host]) -> None:
    text = psycopg.conninfo.make_conninfo(
        **stated, host=",".join(host.name for host in places), port=",".join(str(host.port) for host in places)
    )
    assert parse(text) == parse(written(stated, places))


# Silent about secrets


def told(error: ConfigurationError) -> Iterator[str]:
    yield from (str(error), repr(error), repr(error.args), repr(vars(error)))
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_globals["__name__"] == parse.__module__:
            yield repr(frame.f_locals)


def assert_silent(error: ConfigurationError) -> None:
    assert error.__cause__ is None
    assert error.__context__ is None
    everything = "\n".join(told(error)).lower()
    assert not [at for at in range(len(CANARY) - 3) if CANARY[at : at + 4].lower() in everything]


@relaxed
@given(secrets, secrets)
def test_nothing_printed_shows_the_password(before: str, after: str) -> None:
    secret = quote(before + CANARY + after, safe="")
    dsn = parse(f"postgresql://me:{secret}@h/app?sslpassword={secret}&application_name=x")
    shown = [
        repr(dsn),
        str(dsn),
        f"{dsn}",
        repr(dataclasses.asdict(dsn)),
        repr(dataclasses.astuple(dsn)),
        dsn.redacted(),
    ]
    assert not [text for text in shown if CANARY in text]
    assert parse(dsn.redacted()).password == "***"


UNESCAPED = st.text(
    hostile | st.sampled_from("\n\t\0\u00a0\ud800aZ1.") | st.sampled_from("0123456789abcdefF"), max_size=8
)
IN_A_URI = [
    ("postgresql://me:{}@db.example:5432/app?application_name=x", Host("db.example", 5432)),
    ("postgres://me:{}@db.example/app?application_name=x&sslmode=require", Host("db.example", 5432)),
    ("postgresql+asyncpg://me:{}@/app?host=/run/pg&application_name=x", Host("/run/pg", 5432)),
]


@thorough
@given(st.sampled_from(IN_A_URI), UNESCAPED, UNESCAPED)
@example(IN_A_URI[0], "a@", "")
@example(IN_A_URI[0], "1/", "")
@example(IN_A_URI[0], "1?sslmod=", "")
@example(IN_A_URI[0], "a#", "")
@example(IN_A_URI[0], "%zz", "")
@example(IN_A_URI[0], "x@y?application_name=", "&a=")
def test_an_unescaped_password_is_never_split_wrongly(form: tuple[str, Host], before: str, after: str) -> None:
    template, host = form
    raw = before + CANARY + after
    try:
        dsn = parse(template.format(raw))
    except ConfigurationError as error:
        assert_silent(error)
        return
    assert dsn.password == unquote(raw, errors="strict")
    assert (dsn.hosts, dsn.user, dsn.database) == ((host,), "me", "app")
    assert dict(dsn.server_settings) == {"application_name": "x"}
    assert CANARY not in repr(dsn)


ELSEWHERE = [
    *("{}", "postgresql://{}", "postgresql://{}@h", "postgresql://u:p@{}/d", "postgresql://u:p@h:{}/d", "postgresql://u:p@h/{}"),
    *("postgresql://h/d?password={}", "postgresql://h/d?{}", "postgresql://h/d?{}=x", "postgresql://h/d?sslmode={}&a=b"),
    *("host=h password={} dbname=d", "host=h password='{}' dbname=d", "host=h {}=x", "{}=x", "'postgresql://u:{}@h/d'"),
]  # fmt: skip


@thorough
@given(st.sampled_from(ELSEWHERE), UNESCAPED, UNESCAPED)
def test_no_refusal_repeats_the_text(template: str, before: str, after: str) -> None:
    try:
        parse(template.format(before + CANARY + after))
    except ConfigurationError as error:
        assert_silent(error)


# Anything at all

TOKENS = st.sampled_from([
    *("postgresql://", "postgres+x://", "host", "port", "user", "password", "dbname", "sslmode", "require", "application_name", "service"),
    *("a.b", "/run", "::1", "fe80::1%25e", "5432", "99999", "%40", "%zz", "%00", "%ff", "\ud800", "\ufeff", "é", "*", "''"),
    *"@:/?#&=+,[]'\\ \n\t.-_%x0",
])  # fmt: skip


@thorough
@given(st.lists(TOKENS, max_size=14).map("".join), st.booleans())
def test_any_text_is_read_or_refused_by_our_error(text: str, uri: bool) -> None:
    with suppress(ConfigurationError):
        dsn = parse(f"postgresql://{text}" if uri else text)
        assert parse(dsn.reveal()) == dsn
        for host in dsn.hosts:
            found, _ = asyncpg_reads(dsn.for_host(host))
            assert found == [address(host)] or not host.name or ".s.PGSQL." in host.name
            if ":" in host.name and not host.is_socket:
                ipaddress.IPv6Address(host.name)
