"""What a connection string may look like, what is refused and in which words, and that no secret shows."""

import copy
import dataclasses
import pickle
import pprint
import traceback
from collections.abc import Iterator
from typing import Any

import pytest

from car_control_plane.dsn import Dsn, Host, embedded_path, is_embedded, parse
from car_control_plane.errors import ConfigurationError

SECRET = "Zq7-Wk3-Jx9"
ESCAPING = "urllib.parse.quote("


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PGHOST", "PGPORT"):
        monkeypatch.delenv(name, raising=False)


def refusal(text: Any) -> ConfigurationError:
    """Return the error for a text, after looking for the secret in everything it carries."""
    with pytest.raises(ConfigurationError) as caught:
        parse(text)
    error = caught.value
    assert error.__cause__ is None
    assert error.__context__ is None
    told = [str(error), repr(error), repr(error.args), error.hint, repr(error.details), repr(vars(error))]
    frames = [
        each for each, _ in traceback.walk_tb(error.__traceback__) if each.f_globals["__name__"] == parse.__module__
    ]
    assert frames
    told += [repr(frame.f_locals) for frame in frames]
    for piece in SECRET.split("-"):
        assert not [text for text in told if piece.lower() in text.lower()]
    return error


# Forms that are read. Each is what the text says: hosts, then whatever else it says.

ONE = (Host("db.example", 5432),)
FORMS: list[tuple[str, tuple[Host, ...], dict[str, Any]]] = [
    # the schemes in use
    ("postgresql://db.example/app", ONE, {"database": "app"}),
    ("postgres://db.example/app", ONE, {"database": "app"}),
    ("postgresql+asyncpg://db.example/app", ONE, {"database": "app"}),
    ("postgresql+psycopg://db.example/app", ONE, {"database": "app"}),
    ("postgresql+psycopg2://db.example/app", ONE, {"database": "app"}),
    ("postgres+psycopg_async://db.example/app", ONE, {"database": "app"}),
    ("PostgreSQL://db.example/app", ONE, {"database": "app"}),
    # credentials
    (
        "postgresql://me:secret@db.example:5433/app",
        (Host("db.example", 5433),),
        {"user": "me", "password": "secret", "database": "app"},
    ),
    ("postgresql://me@db.example", ONE, {"user": "me"}),
    ("postgresql://:secret@db.example", ONE, {"password": "secret"}),
    ("postgresql://me:@db.example", ONE, {"user": "me"}),
    ("postgresql://@db.example/", ONE, {}),
    (
        "postgresql://m%40e:p%40%3A%2F%3F%23%25%20%2B+!@db.example/a%2Fb",
        ONE,
        {"user": "m@e", "password": "p@:/?#% ++!", "database": "a/b"},
    ),
    ("postgresql://me:a:b@db.example", ONE, {"user": "me", "password": "a:b"}),
    ("postgresql://me:p[a]ss@db.example", ONE, {"user": "me", "password": "p[a]ss"}),
    ("postgresql://j%C3%B6rg:ü🔑@db.example/größe", ONE, {"user": "jörg", "password": "ü🔑", "database": "größe"}),
    ("postgresql://me:%09%0A@db.example", ONE, {"user": "me", "password": "\t\n"}),
    (
        "postgresql://db.example?user=me&password=s%26t&dbname=app",
        ONE,
        {"user": "me", "password": "s&t", "database": "app"},
    ),
    ("postgresql://db.example?database=app", ONE, {"database": "app"}),
    ("postgresql://db.example/a/b", ONE, {"database": "a/b"}),
    # hosts
    ("postgresql://10.0.0.1:6432/app", (Host("10.0.0.1", 6432),), {"database": "app"}),
    ("postgresql://[::1]/app", (Host("::1", 5432),), {"database": "app"}),
    ("postgresql://[fe80::1%25eth0]:5433/app", (Host("fe80::1%eth0", 5433),), {"database": "app"}),
    ("postgresql://a:1,b,[::1]:3/app", (Host("a", 1), Host("b", 5432), Host("::1", 3)), {"database": "app"}),
    ("postgresql://a,b/app?port=1,2", (Host("a", 1), Host("b", 2)), {"database": "app"}),
    ("postgresql://a,b/app?port=7", (Host("a", 7), Host("b", 7)), {"database": "app"}),
    ("postgresql:///app?host=a,b&port=1,", (Host("a", 1), Host("b", 5432)), {"database": "app"}),
    ("postgresql:///app?host=a:1,b:2", (Host("a", 1), Host("b", 2)), {"database": "app"}),
    ("postgresql:///app?host=::1,[::2]:3", (Host("::1", 5432), Host("::2", 3)), {"database": "app"}),
    ("postgresql:///app?hostaddr=10.0.0.1", (Host("10.0.0.1", 5432),), {"database": "app"}),
    ("postgresql+asyncpg:///app?host=a:1&host=b:2", (Host("a", 1), Host("b", 2)), {"database": "app"}),
    ("postgresql://_db-1.example.:1", (Host("_db-1.example.", 1),), {}),
    ("postgresql://bücher.example", (Host("bücher.example", 5432),), {}),
    # unix sockets
    ("postgresql:///app?host=/run/pg", (Host("/run/pg", 5432),), {"database": "app"}),
    ("postgresql://me@/app?host=/run/pg&port=5433", (Host("/run/pg", 5433),), {"user": "me", "database": "app"}),
    ("postgresql://me@:5433/app?host=/run/pg", (Host("/run/pg", 5433),), {"user": "me", "database": "app"}),
    ("postgresql://%2Frun%2Fpg:5433/app", (Host("/run/pg", 5433),), {"database": "app"}),
    (
        "postgresql:///app?host=/cloudsql/project:region:name",
        (Host("/cloudsql/project:region:name", 5432),),
        {"database": "app"},
    ),
    ("postgresql://%2Fsocket%3Adir:1,b:2", (Host("/socket:dir", 1), Host("b", 2)), {}),
    ("postgresql:///app?host=/with space/ü", (Host("/with space/ü", 5432),), {"database": "app"}),
    # no host: asyncpg's default
    ("postgresql://", (Host("", 5432),), {}),
    ("postgresql:///app", (Host("", 5432),), {"database": "app"}),
    ("postgresql://:5433/app", (Host("", 5433),), {"database": "app"}),
    ("postgresql://:/app?port=5433", (Host("", 5433),), {"database": "app"}),
    ("postgresql://?service=app", (Host("", 0),), {"service": "app"}),
    ("postgresql://?service=app&port=5433", (Host("", 5433),), {"service": "app"}),
    ("postgresql://db.example?service=app", ONE, {"service": "app"}),
    # options
    ("postgresql://db.example?sslmode=require&channel_binding=require", ONE, {"sslmode": "require"}),
    ("postgresql://db.example?ssl=true", ONE, {"sslmode": "require"}),
    ("postgresql+asyncpg://db.example?ssl=verify-full", ONE, {"sslmode": "verify-full"}),
    ("postgresql://db.example?sslrootcert=system", ONE, {"sslmode": "verify-full", "sslrootcert": "system"}),
    (
        "postgresql://db.example?sslmode=verify-ca&sslrootcert=/a&sslcert=/b&sslkey=/c&sslpassword=d&sslcrl=/e&sslnegotiation=direct"
        "&ssl_min_protocol_version=TLSv1.2&ssl_max_protocol_version=TLSv1.3",
        ONE,
        {
            "sslmode": "verify-ca",
            "sslrootcert": "/a",
            "sslcert": "/b",
            "sslkey": "/c",
            "sslpassword": "d",
            "sslcrl": "/e",
        }
        | {"sslnegotiation": "direct", "ssl_min_protocol_version": "TLSv1.2", "ssl_max_protocol_version": "TLSv1.3"},
    ),
    (
        "postgresql://db.example?passfile=/p&krbsrvname=k&gsslib=sspi",
        ONE,
        {"passfile": "/p", "krbsrvname": "k", "gsslib": "sspi"},
    ),
    ("postgresql://db.example?connect_timeout=10", ONE, {"connect_timeout_seconds": 10.0}),
    ("postgresql://db.example?connect_timeout=2.5", ONE, {"connect_timeout_seconds": 2.5}),
    ("postgresql://db.example?connect_timeout=0", ONE, {}),
    ("postgresql://db.example?connect_timeout=-1", ONE, {}),
    ("postgresql://db.example?connect_timeout=", ONE, {}),
    ("postgresql://db.example?target_session_attrs=prefer-standby", ONE, {"target_session_attrs": "prefer-standby"}),
    ("postgresql://db.example?", ONE, {}),
    (
        "postgresql://db.example?keepalives=1&keepalives_idle=30&gssencmode=disable&sslcompression=0&client_encoding=latin1"
        "&load_balance_hosts=random&tcp_user_timeout=5&sslsni=1&gssdelegation=0&sslcertmode=allow",
        ONE,
        {},
    ),
    # server settings
    ("postgresql://db.example?application_name=a%20b", ONE, {"server_settings": {"application_name": "a b"}}),
    ("postgresql://db.example?fallback_application_name=x", ONE, {"server_settings": {"application_name": "x"}}),
    (
        "postgresql://db.example?fallback_application_name=x&application_name=y",
        ONE,
        {"server_settings": {"application_name": "y"}},
    ),
    ("postgresql://db.example?application_name=", ONE, {}),
    ("postgresql://db.example?options=-c%20geqo%3Doff", ONE, {"server_settings": {"options": "-c geqo=off"}}),
    ("postgresql://db.example?options=-c geqo=off", ONE, {"server_settings": {"options": "-c geqo=off"}}),
    ("postgresql+asyncpg://db.example?options=-c+geqo%3Doff", ONE, {"server_settings": {"options": "-c geqo=off"}}),
    ("postgresql://db.example?TimeZone=Etc/GMT+5", ONE, {"server_settings": {"TimeZone": "Etc/GMT+5"}}),
    (
        "postgresql://db.example?timezone=UTC&SEARCH_PATH=a,b",
        ONE,
        {"server_settings": {"TimeZone": "UTC", "search_path": "a,b"}},
    ),
    ("postgresql://db.example?my_app.Tenant=x", ONE, {"server_settings": {"my_app.Tenant": "x"}}),
    # libpq's other notation
    ("host=db.example dbname=app", ONE, {"database": "app"}),
    ("dbname = app", (Host("", 5432),), {"database": "app"}),
    (
        "host=a,/run/pg port=1,2\n user='m e' password='it\\'s \\\\' dbname=app sslmode=require application_name=''",
        (Host("a", 1), Host("/run/pg", 2)),
        {"user": "m e", "password": "it's \\", "database": "app", "sslmode": "require"},
    ),
    ("host=db.example password=a\\ b\\'c'd@e://f", ONE, {"password": "a b'c'd@e://f"}),
    ("user= ", (Host("", 5432),), {}),
    # what surrounds it
    (" \n postgresql://db.example/app\r\n", ONE, {"database": "app"}),
    ("\ufeffpostgresql://db.example/app\n", ONE, {"database": "app"}),
]


@pytest.mark.parametrize(("text", "hosts", "stated"), FORMS, ids=[text for text, _, _ in FORMS])
def test_a_form_is_read(text: str, hosts: tuple[Host, ...], stated: dict[str, Any]) -> None:
    dsn = parse(text)
    assert dsn.hosts == hosts
    names = [field.name.lstrip("_") for field in dataclasses.fields(Dsn) if field.name != "hosts"]
    assert {name: value for name in names if (value := getattr(dsn, name))} == stated


@pytest.mark.parametrize("text", [text for text, _, _ in FORMS])
def test_the_canonical_text_is_read_back_to_an_equal_dsn(text: str) -> None:
    dsn = parse(text)
    again = parse(dsn.reveal())
    assert again == dsn
    assert hash(again) == hash(dsn)
    assert again.reveal() == dsn.reveal()


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("postgres://me:s%40t@db.example/app?connect_timeout=10&sslmode=require", "postgresql://me:s%40t@db.example:5432/app?sslmode=require&connect_timeout=10"),
        ("host=/run/pg dbname='a b' user=me", "postgresql://me@/a%20b?host=/run/pg&port=5432"),
        ("postgresql://a:1,[::1]:2?target_session_attrs=standby", "postgresql://a:1,[::1]:2?target_session_attrs=standby"),
        ("postgresql:///app?host=/s,::1&port=1,2", "postgresql:///app?host=/s,::1&port=1,2"),
        ("postgresql://?service=x", "postgresql://?service=x"),
        ("postgresql://h?options=-c+a", "postgresql://h:5432?options=-c%2Ba"),
        ("postgresql://h?connect_timeout=2.5", "postgresql://h:5432?connect_timeout=2.5"),
    ],
)  # fmt: skip
def test_the_canonical_text_is_what_people_know(text: str, written: str) -> None:
    assert parse(text).reveal() == written


def test_the_text_for_one_host_leaves_out_what_asyncpg_gets_as_arguments() -> None:
    dsn = parse(
        f"postgresql://me:{SECRET}@a:1,b:2/app?sslmode=require&sslkey=/k&sslpassword=phrase&connect_timeout=3"
        "&target_session_attrs=primary&channel_binding=require&application_name=x"
    )
    text = dsn.for_host(dsn.hosts[1])
    assert text == "postgresql://me@b:2/app?sslmode=require&sslkey=/k&sslpassword=phrase&application_name=x"
    assert (
        parse("postgresql://:s@/app?host=/run/pg").for_host(Host("/run/pg", 7))
        == "postgresql:///app?host=/run/pg&port=7"
    )
    assert parse("postgresql://").for_host(Host("::1", 5)) == "postgresql://[::1]:5"


def test_system_roots_are_told_to_the_caller() -> None:
    assert parse("postgresql://h?sslrootcert=system&sslmode=verify-full").system_roots
    assert not parse("postgresql://h?sslrootcert=/ca.pem&sslmode=verify-full").system_roots


def test_another_database_of_the_same_server() -> None:
    dsn = parse("postgresql://me:s@h/app?sslmode=require")
    other = dsn.replace(database="a@b/c d")
    assert (other.database, other.password, other.hosts, other.sslmode) == ("a@b/c d", "s", dsn.hosts, "require")
    assert dsn.database == "app"


@pytest.mark.parametrize("name", ["", "a\0b", "a\nb", "a\ud800b", "postgresql://u:p@h/d"])
def test_a_name_no_database_can_have_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"database|control character"):
        parse("postgresql://h").replace(database=name)


def test_a_socket_is_told_from_a_host() -> None:
    assert Host("/run/pg", 5432).is_socket
    assert not Host("db.example", 5432).is_socket
    assert not Host("", 5432).is_socket


# The environment


@pytest.mark.parametrize(
    ("text", "host", "port", "hosts"),
    [
        ("postgresql://", "a", "", [("a", 5432)]),
        ("postgresql://", "a,/s", "1,2", [("a", 1), ("/s", 2)]),
        ("postgresql://", "::1", "6", [("::1", 6)]),
        ("postgresql://", "", "6", [("", 6)]),
        ("postgresql://:7", "a,b", "6", [("a", 7), ("b", 7)]),
        ("postgresql://b", "a", "6", [("b", 6)]),
        ("postgresql://b:1,c", "a", "6", [("b", 1), ("c", 6)]),
        ("postgresql://b:1", "a", "no number, and not asked", [("b", 1)]),
        ("postgresql:///?host=/s", "a", "6", [("/s", 6)]),
        ("postgresql:///?service=x", "a", "6", [("", 0)]),
        ("postgresql:///?service=x&port=7", "a,b", "6", [("", 7)]),
    ],
)
def test_the_environment_fills_in_host_and_port(
    monkeypatch: pytest.MonkeyPatch, text: str, host: str, port: str, hosts: list[tuple[str, int]]
) -> None:
    monkeypatch.setenv("PGHOST", host)
    monkeypatch.setenv("PGPORT", port)
    assert parse(text).hosts == tuple(Host(*each) for each in hosts)


@pytest.mark.parametrize(
    ("name", "value"), [("PGPORT", "http"), ("PGPORT", "1,2"), ("PGHOST", "a b"), ("PGHOST", "a,")]
)
def test_a_wrong_environment_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert name in refusal("postgresql://").message


# What is refused: the text, words of the message, words of the hint

REFUSED: list[tuple[Any, str, str]] = [
    (None, "must be text", "postgresql://"),
    (b"postgresql://h", "must be text", "postgresql://"),
    ("", "is empty", "postgresql://user:password@host:5432/database"),
    (" \n\ufeff ", "is empty", "postgresql://"),
    (f'"postgresql://u:{SECRET}@h/d"', "in quotes", "Remove"),
    (f"'postgresql://u:{SECRET}@h/d'", "in quotes", "Remove"),
    # another kind of address
    (f"mysql://u:{SECRET}@h/d", "does not start with postgresql://", "postgresql://"),
    (f"http://u:{SECRET}@h/d", "does not start with postgresql://", "postgresql://"),
    ("sqlite:///app.db", "does not start with postgresql://", "postgresql://"),
    (f"{SECRET}", "does not start with postgresql://", "postgresql://"),
    (f"DATABASE_URL=postgresql://u:{SECRET}@h/d", "does not start with postgresql://", "No name"),
    (f"psql postgresql://u:{SECRET}@h/d?sslmode=require", "does not start with postgresql://", "psql"),
    (f"jdbc:postgresql://h/d?user=u&password={SECRET}", "does not start with postgresql://", "jdbc"),
    (f"postgresql:/u:{SECRET}@h", "does not start with postgresql://", "postgresql://"),
    ("embedded:", "does not start with postgresql://", "postgresql://"),
    # a password that is not escaped
    (f"postgresql://u:{SECRET}@{SECRET}@h/d", "more than one '@'", ESCAPING),
    (f"postgresql://u:{SECRET}@h/d@{SECRET}", "more than one '@'", ESCAPING),
    (f"postgresql://u:p/{SECRET}@h/d", "unescaped '/' or '?' before the '@'", ESCAPING),
    (f"postgresql://u:1/{SECRET}@h/d", "unescaped '/' or '?' before the '@'", ESCAPING),
    (f"postgresql://u:1?{SECRET}=x@h/d", "unescaped '/' or '?' before the '@'", ESCAPING),
    (f"postgresql://h/{SECRET}@", "unescaped '@' after the host", ESCAPING),
    (f"postgresql://u:{SECRET}#{SECRET}@h/d", "unescaped '#'", ESCAPING),
    (f"postgresql://u:{SECRET} x@h/d", "unescaped space", ESCAPING),
    (f"postgresql://u:{SECRET}\u00a0x@h/d", "unescaped space", ESCAPING),
    (f"postgresql://u:p@h/d {SECRET}", "unescaped space", ESCAPING),
    (f"postgresql://u:{SECRET}\n@h/d", "line break", ESCAPING),
    (f"postgresql://u:{SECRET}\x07@h/d", "control character", ESCAPING),
    (f"postgresql://u:{SECRET}%zz@h/d", "'%' that two hexadecimal digits do not follow", ESCAPING),
    (f"postgresql://u:{SECRET}%@h/d", "'%' that two hexadecimal digits do not follow", ESCAPING),
    (f"postgresql://u:{SECRET}%00@h/d", "percent-encoded NUL", "UTF-8"),
    (f"postgresql://u:{SECRET}%ff@h/d", "not UTF-8", "UTF-8"),
    (f"postgresql://u:{SECRET}\ud800@h/d", "not UTF-8", ESCAPING),
    (f"postgresql://u:{SECRET}\0@h/d", "NUL", ESCAPING),
    (f"postgresql://u:{SECRET}/d", "port that is not a number", ESCAPING),
    # hosts and ports
    (f"postgresql://h:{SECRET}", "port that is not a number", "postgresql://"),
    ("postgresql://h:0", "port that is not a number from 1 to 65535", "postgresql://"),
    ("postgresql://h:65536", "port that is not a number from 1 to 65535", "postgresql://"),
    ("postgresql://h:5432x", "port that is not a number", "postgresql://"),
    ("postgresql://h:٣", "port that is not a number", "postgresql://"),
    ("postgresql://h:-1", "port that is not a number", "postgresql://"),
    ("postgresql://::1:5432", "port that is not a number", "postgresql://"),
    ("postgresql://[::1]:x", "port that is not a number", "postgresql://"),
    ("postgresql:///?port=x", "port that is not a number", "postgresql://"),
    ("postgresql:///?service=x&port=x", "port that is not a number", "postgresql://"),
    ("postgresql://a,b,c?port=1,2", "another number of ports than of hosts", "one for all hosts"),
    ("postgresql://?port=1,2", "another number of ports than of hosts", "one for all hosts"),
    ("postgresql://a,,b", "host that is no name", ESCAPING),
    ("postgresql:///?host=a,", "host that is no name", ESCAPING),
    ("postgresql://[]", "host that is no name", ESCAPING),
    ("postgresql://[::1", "host that is no name", ESCAPING),
    ("postgresql://[a.example]", "host that is no name", ESCAPING),
    ("postgresql://[/run]", "host that is no name", ESCAPING),
    ("postgresql://[1:2:3]", "host that is no name", ESCAPING),
    ("postgresql://[fe80::1%25a%40b]", "host that is no name", ESCAPING),
    (f"postgresql://h%20{SECRET}", "host that is no name", ESCAPING),
    ("postgresql://%2Fa%2Cb", "host that is no name", ESCAPING),
    ("postgresql://%2Fa%0A", "host that is no name", ESCAPING),
    ("postgresql:///?host=1:2:x", "host that is no name", ESCAPING),
    (f"postgresql://{'h' * 256}", "host that is no name", ESCAPING),
    # ambiguous
    ("postgresql://u@h?user=v", "states something twice", "user"),
    (f"postgresql://u:{SECRET}@h?password={SECRET}", "states something twice", "password"),
    ("postgresql://h/d?dbname=e", "states something twice", "dbname"),
    ("postgresql://localhost/d?host=/run/pg", "states something twice", "host"),
    ("postgresql://h/d?hostaddr=10.0.0.1", "states something twice", "host"),
    ("postgresql://h:1/d?port=2", "states something twice", "port"),
    ("postgresql://:1/d?port=2", "states something twice", "port"),
    ("postgresql:///d?host=a:1&port=2", "states something twice", "port"),
    ("postgresql:///d?host=a&host=b", "states something twice", "host"),
    ("postgresql://h?sslmode=require&sslmode=disable", "states something twice", "sslmode"),
    ("postgresql://h?ssl=true&sslmode=disable", "states something twice", "sslmode"),
    ("postgresql://h?search_path=a&search_path=b", "states something twice", "setting"),
    (f"postgresql://h?{SECRET.replace('-', '_')}.a=1&{SECRET.replace('-', '_')}.a=2", "states something twice", "setting"),
    ("dbname=a dbname=b", "states something twice", "dbname"),
    # options
    ("postgresql://h?require_auth=scram-sha-256", "demands require_auth", "verify-full"),
    ("host=/run requirepeer=postgres", "demands requirepeer", "verify-full"),
    ("postgresql://h?sslmod=require", "unknown option (number 1)", "Did you mean sslmode?"),
    ("postgresql://u@h?user_=x", "unknown option (number 1)", "Did you mean user?"),
    ("postgresql://h/d?application_name=x&sslMode=require", "unknown option (number 2)", "Did you mean sslmode?"),
    ("postgresql://:5/d?SSLMODE=require", "unknown option (number 1)", "Did you mean sslmode?"),
    ("postgresql://h?ssl_mode=require", "unknown option (number 1)", "Did you mean sslmode?"),
    ("postgresql://h?sslrootcrt=/x", "unknown option (number 1)", "Did you mean sslrootcert?"),
    ("postgresql://h?passwd=x", "unknown option (number 1)", "Did you mean password?"),
    ("postgresql://h?statement_timout=5", "unknown option (number 1)", "Did you mean statement_timeout?"),
    ("postgresql://h?sslcrldir=/x", "unknown option (number 1)", "Did you mean sslcrl?"),
    ("postgresql://h?geqo=off", "unknown option (number 1)", "options=-c%20"),
    (f"postgresql://h?password=x&{SECRET}=y", "unknown option (number 2)", "options=-c%20"),
    ("host=h sslmod=require", "unknown option (number 2)", "Did you mean sslmode?"),
    (f"postgresql://h?password=x&{SECRET}", "not name=value", "%26"),
    ("postgresql://h?sslmode=require&", "not name=value", "%26"),
    ("postgresql://h?=x", "not name=value", "%26"),
    ("postgresql://h?sslmode=requre", "unknown sslmode", "Did you mean require?"),
    ("postgresql://h?sslmode=verify_full", "unknown sslmode", "Did you mean verify-full?"),
    ("postgresql://h?sslmode=", "unknown sslmode", "disable, allow, prefer, require, verify-ca, verify-full"),
    (f"postgresql://h?sslmode={SECRET}", "unknown sslmode", "It is one of"),
    ("postgresql://h?ssl=false", "unknown sslmode", "It is one of"),
    ("postgresql://h?sslnegotiation=fast&sslmode=require", "unknown sslnegotiation", "postgres, direct"),
    ("postgresql://h?ssl_min_protocol_version=SSLv3", "unknown ssl_min_protocol_version", "TLSv1.3"),
    ("postgresql://h?target_session_attrs=master", "unknown target_session_attrs", "primary"),
    ("postgresql://h?gsslib=x", "unknown gsslib", "gssapi"),
    ("postgresql://h?gssencmode=require", "unknown gssencmode", "disable"),
    ("postgresql://h?connect_timeout=soon", "connect_timeout", "connect_timeout=10"),
    ("postgresql://h?connect_timeout=inf", "connect_timeout", "connect_timeout=10"),
    ("postgresql://h?sslrootcert=system&sslmode=require", "needs sslmode=verify-full", "Leave sslmode out"),
    ("postgresql://h?sslnegotiation=direct", "needs TLS", "verify-full"),
    ("postgresql://h?sslnegotiation=direct&sslmode=prefer", "needs TLS", "verify-full"),
    ("postgresql://h?ssl_min_protocol_version=TLSv1.3&ssl_max_protocol_version=TLSv1.2", "above", "Swap"),
    ("postgresql://u%0A@h", "control character", ESCAPING),
    ("postgresql://h/d%1b", "control character", ESCAPING),
    ("postgresql://h?application_name=a%7F", "control character", ESCAPING),
    (f"postgresql://h?dbname=postgresql://u:{SECRET}%40h/d", "connection string for a database", "Pass that one"),
    # libpq's other notation
    (f"host=h password={SECRET} {SECRET} dbname=d", "not a sequence of keyword=value", "''"),
    (f"host=h password='{SECRET}", "not a sequence of keyword=value", "''"),
    (f"host=h password='a'{SECRET}'", "not a sequence of keyword=value", "''"),
    (f"host=h password={SECRET}\\", "not a sequence of keyword=value", "''"),
    (f"host=h ={SECRET}", "not a sequence of keyword=value", "''"),
    ("host=h user='a\nb'", "control character", ESCAPING),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message", "hint"), REFUSED, ids=[ascii(text) for text, _, _ in REFUSED])
def test_a_wrong_text_is_refused_in_words_that_hold_no_secret(text: Any, message: str, hint: str) -> None:
    error = refusal(text)
    assert error.message.startswith("the connection string")
    assert message in error.message
    assert hint in error.hint


# No secret shows


def shown(value: object) -> Iterator[str]:
    yield from (repr(value), str(value), f"{value}", format(value), pprint.pformat(value), ascii(value))
    yield from ("%s" % (value,), "%r" % (value,))  # noqa: UP031 -- logging does it like this


def test_no_way_to_print_a_dsn_shows_its_secrets() -> None:
    dsn = parse(f"postgresql://me:{SECRET}@h/app?sslkey=/k&sslpassword={SECRET}")
    fields = [getattr(dsn, field.name) for field in dataclasses.fields(dsn)]
    for value in (
        dsn,
        [dsn],
        dataclasses.asdict(dsn),
        dataclasses.astuple(dsn),
        fields,
        copy.copy(dsn),
        copy.deepcopy([dsn]),
    ):
        for text in shown(value):
            assert SECRET not in text
    assert str(dsn) == "postgresql://me:***@h:5432/app?sslkey=/k&sslpassword=***"
    assert repr(dsn) == f"Dsn({str(dsn)!r})"
    assert dsn.redacted() == str(dsn)
    with pytest.raises(TypeError):
        vars(dsn)


def test_a_dsn_without_secrets_shows_no_mask() -> None:
    assert str(parse("postgresql://me@h/app")) == "postgresql://me@h:5432/app"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_dsn_and_its_parts_refuse_to_be_pickled(protocol: int) -> None:
    dsn = parse(f"postgresql://me:{SECRET}@h/app")
    for value in (dsn, dataclasses.asdict(dsn)):
        with pytest.raises(TypeError, match="not pickled") as caught:
            pickle.dumps(value, protocol)
        assert SECRET not in str(caught.value)


def test_copies_keep_the_password() -> None:
    dsn = parse(f"postgresql://me:{SECRET}@h/app")
    assert copy.copy(dsn).password == copy.deepcopy(dsn).password == SECRET
    assert dataclasses.replace(dsn, user="you").password == SECRET


def test_a_dsn_cannot_be_changed() -> None:
    dsn = parse("postgresql://h?search_path=a")
    with pytest.raises(dataclasses.FrozenInstanceError):
        dsn.user = "me"  # type: ignore[misc]  # that is the point
    with pytest.raises(TypeError):
        dsn.server_settings["search_path"] = "b"  # type: ignore[index]  # that is the point


def test_secrets_count_when_two_are_compared() -> None:
    one, two = parse("postgresql://u:a@h"), parse("postgresql://u:b@h")
    assert one != two
    assert one == parse("postgresql://u@h?password=a")
    assert one != parse("postgresql://u@h")
    assert {one, two, parse("postgresql://u:a@h")} == {one, two}
    assert parse("postgresql://h?jit=off&role=a") == parse("postgresql://h?role=a&jit=off")


# embedded:


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("embedded:", None),
        ("embedded://", None),
        (" embedded: \n", None),
        ("EMBEDDED:data", "data"),
        ("embedded:data/control plane", "data/control plane"),
        ("embedded:./a%20b", "./a%20b"),
        ("embedded:/var/lib/x", "/var/lib/x"),
        ("embedded:///var/lib/x", "/var/lib/x"),
        ("embedded:C:\\data", "C:\\data"),
        ("embedded: data\n", "data"),
        ("embedded:größe", "größe"),
    ],
)
def test_an_embedded_address_names_a_path_or_none(text: str, path: str | None) -> None:
    assert is_embedded(text)
    assert embedded_path(text) == path


@pytest.mark.parametrize(
    "text", ["", "postgresql://h", "embedded", "embedded://host/data", "embedded:a\nb", "embedded:a\ud800"]
)
def test_what_is_no_embedded_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="no embedded: address") as caught:
        embedded_path(text)
    assert "embedded:PATH" in caught.value.hint


@pytest.mark.parametrize("text", ["", "postgresql://h/embedded:", "embedded", "/embedded:"])
def test_other_texts_are_not_embedded(text: str) -> None:
    assert not is_embedded(text)


def test_somebody_elses_string_is_read_without_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", "ours")
    monkeypatch.setenv("PGPORT", "not even a port")
    assert parse("postgresql:///d", environment=False).hosts == (Host("", 5432),)
    assert parse("dbname=d", environment=False).hosts == (Host("", 5432),)
    assert parse("postgresql://a,b:1/d", environment=False).hosts == (Host("a", 5432), Host("b", 1))
    assert parse("postgresql:///d?service=x", environment=False).hosts == (Host("", 0),)


def test_one_string_fills_in_what_another_leaves_out() -> None:
    one = parse("postgresql://u@a:1/d?application_name=x")
    other = parse(f"postgresql://v:{SECRET}@b:2/e?application_name=y&TimeZone=UTC&sslmode=require")
    filled = one.filled(other)
    assert filled == parse(f"postgresql://u:{SECRET}@a:1/d?application_name=x&TimeZone=UTC&sslmode=require")
    assert SECRET not in repr(filled)
    assert other.filled(one) == other
