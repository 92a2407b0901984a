"""Reads, normalises and redacts PostgreSQL connection strings.

libpq (psql, hosted PostgreSQL), SQLAlchemy (`postgresql+driver://`) and asyncpg each misread some of the others' texts. `parse` reads what any
of them writes and refuses what two of them read differently; `Dsn.for_host` writes what asyncpg reads right. Two rules keep the password in:
a `Dsn` holds its secrets masked, and an error is made of our own words only. It repeats not one character of the text, for where an `@` or
`/` is not escaped a piece of the password looks like a host or an option.

Options read: `host`, `hostaddr` (as a host), `port`, `user`, `password`, `dbname` or `database`, `connect_timeout`, `ssl` (`true` means
`sslmode=require`), `fallback_application_name`, and the fields of `Dsn`. Accepted and dropped, for asyncpg has nothing like them: `_DROPPED`.
Passed on to the server: `options`, the usual settings (`_SETTINGS`) and those of extensions (names with a dot). Anything else is refused with
the nearest known name: `sslmod=require` dropped, or taken for a setting, would be a connection without TLS.

What a text leaves out comes from PGHOST and PGPORT here (unless `parse` is told otherwise), and from PGUSER, PGDATABASE, PGPASSWORD, PGSSLMODE, the password file and so on when
asyncpg connects. This module opens no file and no connection, and does not judge whether an address may be connected to.

Source: PostgreSQL manual, libpq, "Connection Strings" and "Parameter Key Words"; asyncpg 0.32, `connect_utils`; SQLAlchemy 2.1, `engine.url`.
"""

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from ipaddress import IPv6Address
from types import MappingProxyType
from typing import Final, Never
from urllib.parse import quote, unquote, urlencode

from car_control_plane.errors import ConfigurationError

__all__ = ["Dsn", "Host", "embedded_path", "is_embedded", "parse"]

_STRONG_MODES: Final = ("require", "verify-ca", "verify-full")
_TLS_VERSIONS: Final = ("TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3")
_CHOICES: Final[dict[str, tuple[str, ...]]] = {
    "gssencmode": ("disable", "prefer"),  # asyncpg cannot keep the promise of "require"
    "gsslib": ("gssapi", "sspi"),
    "sslmode": ("disable", "allow", "prefer", *_STRONG_MODES),
    "sslnegotiation": ("postgres", "direct"),
    "ssl_max_protocol_version": _TLS_VERSIONS,
    "ssl_min_protocol_version": _TLS_VERSIONS,
    "target_session_attrs": ("any", "read-write", "read-only", "primary", "standby", "prefer-standby"),
}
_ALIASES: Final = {"database": "dbname", "hostaddr": "host", "ssl": "sslmode"}
_SECRETS: Final = frozenset({"password", "sslpassword"})
# fmt: off
_FIELDS: Final = (
    "target_session_attrs", "sslmode", "sslrootcert", "sslcert", "sslkey", "sslcrl", "sslnegotiation", "ssl_min_protocol_version",
    "ssl_max_protocol_version", "passfile", "service", "krbsrvname", "gsslib",
)
_READ: Final = _SECRETS | {"host", "port", "user", "dbname", "connect_timeout", "fallback_application_name", *_FIELDS}
_DROPPED: Final = frozenset({
    "channel_binding", "client_encoding", "gssdelegation", "gssencmode", "keepalives", "keepalives_count", "keepalives_idle",
    "keepalives_interval", "load_balance_hosts", "sslcertmode", "sslcompression", "sslsni", "tcp_user_timeout",
})
_UNMET: Final = frozenset({"require_auth", "requirepeer"})  # demands: to drop them quietly would be less safe than asked for
_SETTINGS: Final = {name.lower(): name for name in (
    "DateStyle", "IntervalStyle", "TimeZone", "application_name", "client_connection_check_interval", "client_min_messages",
    "default_transaction_deferrable", "default_transaction_isolation", "default_transaction_read_only", "extra_float_digits",
    "idle_in_transaction_session_timeout", "idle_session_timeout", "jit", "lock_timeout", "maintenance_work_mem", "options",
    "plan_cache_mode", "role", "row_security", "search_path", "statement_timeout", "synchronous_commit", "temp_buffers",
    "transaction_timeout", "work_mem",
)}
# fmt: on
_KNOWN: Final = tuple(sorted(_READ | _DROPPED | set(_ALIASES) | set(_SETTINGS)))

_SCHEME: Final = re.compile(r"postgres(?:ql)?(\+\w+)?://", re.ASCII | re.IGNORECASE)
_URI: Final = re.compile(r"(?:([^/?@]*)@)?([^/?]*)/?([^?]*)\??(.*)")  # credentials, hosts, database, query
_PAIR: Final = re.compile(r"\s*+(\w[\w.]*+)\s*+=\s*+('(?:[^'\\]|\\.)*+'|(?!')(?:[^\s\\]|\\.)*+)(?=\s|\Z)", re.DOTALL)
_PLACE: Final = re.compile(r"/[^,\x00-\x1f\x7f-\x9f]*|[\w.-]{1,255}")  # directory or host name
_IPV6: Final = re.compile(r"[0-9a-f:.]+(%[\w.-]+)?", re.ASCII | re.IGNORECASE)
_CUSTOM_SETTING: Final = re.compile(r"[a-z_][\w$]*(\.[a-z_][\w$]*)+", re.ASCII | re.IGNORECASE)
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_UNENCODABLE: Final = re.compile("[\x00\ud800-\udfff]")  # a lone surrogate stands for a byte that is not UTF-8
_URI_FAULTS: Final = (
    (_CONTROL, "holds a line break or another control character"),
    (re.compile("#"), "holds an unescaped '#'"),
    (re.compile("@.*@"), "holds more than one '@'"),
    (re.compile("[/?].*@"), "holds an unescaped '/' or '?' before the '@', or an unescaped '@' after the host"),
    (re.compile(r"\A[^?]*\s"), "holds an unescaped space"),
    (re.compile("%(?![0-9A-Fa-f]{2})"), "holds a '%' that two hexadecimal digits do not follow"),
)
_FORM: Final = "The form is postgresql://user:password@host:5432/database."
_ESCAPE: Final = (
    "In user, password and database percent-encode @ : / ? # % and spaces: urllib.parse.quote(text, safe=''); @ is %40."
)
_OPTIONS: Final = "Options are libpq's; a less usual setting of the server is written options=-c%20name=value."


@dataclass(frozen=True, slots=True)
class Host:
    """One place where a server may listen.

    Attributes:
        name: Host name, address (IPv6 without brackets) or directory of a unix socket; empty for asyncpg's default (a service file's
            host, the usual socket directories, localhost).
        port: 1 to 65535; 0 only when a service file decides.
    """

    name: str
    port: int

    @property
    def is_socket(self) -> bool:
        """Whether this is the directory of a unix socket."""
        return self.name.startswith("/")


class _Masked:
    """A secret that neither repr, `vars`, `dataclasses.asdict`, a copy nor a pickle shows."""

    __slots__ = ("value",)

    def __init__(self, value: str) -> None:
        self.value = value

    def __repr__(self) -> str:
        return "'***'"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Masked) and self.value == other.value

    def __hash__(self) -> int:
        return hash(self.value)

    def __deepcopy__(self, memo: object) -> "_Masked":
        return self

    def __reduce_ex__(self, protocol: object) -> Never:
        raise TypeError("a Dsn is not pickled, for its password would be; hand on the sealed text")


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Dsn:
    """A connection string, taken apart; made by `parse` and `replace`.

    Immutable, hashable, equal when everything is, secrets included. Prints as `redacted`. Copies share the masked secrets, pickling is a
    TypeError, and `dataclasses.asdict` shows the secrets masked. There is at least one host, and they are in the order to try. None is what
    the text does not say; for `connect_timeout_seconds` also zero and below, libpq's words for "no limit".
    """

    hosts: tuple[Host, ...]
    user: str | None = None
    database: str | None = None
    connect_timeout_seconds: float | None = None
    target_session_attrs: str | None = None
    sslmode: str | None = None
    sslrootcert: str | None = None
    sslcert: str | None = None
    sslkey: str | None = None
    sslcrl: str | None = None
    sslnegotiation: str | None = None
    ssl_min_protocol_version: str | None = None
    ssl_max_protocol_version: str | None = None
    passfile: str | None = None
    service: str | None = None
    krbsrvname: str | None = None
    gsslib: str | None = None
    _password: _Masked | None = None
    _sslpassword: _Masked | None = None
    _server_settings: tuple[tuple[str, str], ...] = ()

    @property
    def password(self) -> str | None:
        """The password in clear text."""
        return self._password.value if self._password else None

    @property
    def sslpassword(self) -> str | None:
        """The passphrase of `sslkey` in clear text."""
        return self._sslpassword.value if self._sslpassword else None

    @property
    def server_settings(self) -> Mapping[str, str]:
        """What the server is told at the start of a session: application_name, options, search_path, ..."""
        return MappingProxyType(dict(self._server_settings))

    @property
    def system_roots(self) -> bool:
        """Whether `sslrootcert=system`: asyncpg needs `ssl=True` then, which means the same; by itself it takes the word for a file."""
        return self.sslrootcert == "system"

    def __repr__(self) -> str:
        return f"Dsn({self.redacted()!r})"

    def __deepcopy__(self, memo: object = None) -> "Dsn":
        return self

    __copy__ = __deepcopy__

    def __reduce_ex__(self, protocol: object) -> Never:
        _Masked("").__reduce_ex__(protocol)

    def redacted(self) -> str:
        """Write the whole connection string with its secrets masked, safe to print."""
        password, sslpassword = ("***" if secret else None for secret in (self._password, self._sslpassword))
        return self._write(self.hosts, password, sslpassword, whole=True)

    __str__ = redacted

    def reveal(self) -> str:
        """Write the whole connection string, secrets in clear text; `parse` reads it back to an equal `Dsn`, and libpq reads it alike."""
        return self._write(self.hosts, self.password, self.sslpassword, whole=True)

    def for_host(self, host: Host) -> str:
        """Write what asyncpg needs to try one host.

        Without the password, which is handed over as its own argument (an sslpassword stays: asyncpg takes it from nowhere else), and
        without connect_timeout and target_session_attrs, which are the caller's to keep.
        """
        return self._write((host,), None, self.sslpassword, whole=False)

    def replace(self, *, database: str) -> "Dsn":
        """Return the same connection string for another database.

        Raises:
            ConfigurationError: No database can have this name.
        """
        if not database:
            raise ConfigurationError("the name of the database is empty")
        _check("dbname", database)
        return replace(self, database=database)

    def without_settings(self) -> "Dsn":
        """Return this connection string without its `server_settings`, for who hands them over in another way."""
        return replace(self, _server_settings=())

    def filled(self, other: "Dsn") -> "Dsn":
        """Return this connection string with what it leaves out, but for hosts and ports, taken from another one."""
        missing = {
            field.name: getattr(other, field.name) for field in fields(self) if getattr(self, field.name) is None
        }
        settings = dict(other._server_settings) | dict(self._server_settings)
        return replace(self, _server_settings=tuple(sorted(settings.items())), **missing)

    def _write(self, hosts: Sequence[Host], password: str | None, sslpassword: str | None, *, whole: bool) -> str:
        authority, options = "", dict[str, str | None]()
        if all(host.name and not host.is_socket for host in hosts):
            names = (f"[{quote(host.name, safe=':')}]" if ":" in host.name else quote(host.name) for host in hosts)
            authority = ",".join(f"{name}:{host.port}" for name, host in zip(names, hosts, strict=True))
        else:  # people know a socket as ?host=/directory
            options["host"] = ",".join(host.name for host in hosts)
            options["port"] = ",".join(str(host.port or "") for host in hosts)
        if self.user is not None or password is not None:
            secret = "" if password is None else ":" + quote(password, safe="*")
            authority = f"{quote(self.user or '', safe='')}{secret}@{authority}"
        # No database is no slash: asyncpg reads a bare one as the database named "".
        path = "" if self.database is None else "/" + quote(self.database, safe="")
        options |= {name: getattr(self, name) for name in _FIELDS} | {"sslpassword": sslpassword}
        options["connect_timeout"] = str(self.connect_timeout_seconds or "").removesuffix(".0")
        options |= self._server_settings
        options |= {} if whole else {"connect_timeout": None, "target_session_attrs": None}
        # A "+" must not stay one: asyncpg reads it as a space.
        query = urlencode({name: value for name, value in options.items() if value}, quote_via=quote, safe="/,:*")
        return f"postgresql://{authority}{path}{'?' if query else ''}{query}"


def parse(text: str, *, environment: bool = True) -> Dsn:
    """Read a connection string: a URI as libpq, SQLAlchemy or asyncpg writes it, or libpq's `host=... dbname=...`; blanks around it are dropped.

    Args:
        text: The connection string.
        environment: Whether PGHOST and PGPORT stand in for what the text leaves out; otherwise that is no host (`Host("", ...)`) and port 5432.
            A string of somebody else must not mean another server on each machine.

    Raises:
        ConfigurationError: The text is empty, is no connection string, could be read in more than one way, or has an option or value that is
            not known. Neither the error nor, from here on, a frame of its traceback holds anything of the text.
    """
    outcome = _attempt(text, os.environ if environment else {})
    del text  # error trackers print the variables of every frame an error passes
    if isinstance(outcome, Dsn):
        return outcome
    raise outcome


def is_embedded(text: str) -> bool:
    """Tell whether this is `embedded:` or `embedded:PATH`, a server of our own, rather than a connection string."""
    return text.strip().lower().startswith("embedded:")


def embedded_path(text: str) -> str | None:
    """Return the path of `embedded:PATH` or `embedded:///absolute`, as written; None for `embedded:`, a server whose data goes when it stops.

    Raises:
        ConfigurationError: The text is not `embedded:...`, names a host, or holds a control character.
    """
    path = text.strip().partition(":")[2]
    if not is_embedded(text) or re.match("//[^/]", path) or _CONTROL.search(path) or _UNENCODABLE.search(path):
        raise ConfigurationError("this is no embedded: address", hint="Write embedded:PATH or embedded:///absolute.")
    return path.removeprefix("//").strip() or None


def _attempt(text: str, environment: Mapping[str, str]) -> Dsn | ConfigurationError:
    try:
        return _read(text, environment)
    except ConfigurationError as error:
        return error.with_traceback(None)


def _refuse(fault: str, hint: str = _ESCAPE) -> Never:
    raise ConfigurationError(f"the connection string {fault}", hint=hint)


def _read(text: str, environment: Mapping[str, str]) -> Dsn:
    if not isinstance(text, str):
        _refuse("must be text", _FORM)
    text = text.strip().strip("\ufeff").strip()
    if not text:
        _refuse("is empty", _FORM)
    if text[0] in "\"'`":
        _refuse("is in quotes, and they are part of it", "Remove them.")
    if _UNENCODABLE.search(text):
        _refuse("holds a NUL character or is not UTF-8")
    if scheme := _SCHEME.match(text):
        return _read_uri(text[scheme.end() :], environment, sqlalchemy=scheme[1] is not None)
    if re.match(r"[a-z_]+\s*=", text):
        return _read_pairs(text, environment)
    _refuse("does not start with postgresql:// or postgres://", f"{_FORM} No name, psql or jdbc: stands before it.")


def _read_uri(rest: str, environment: Mapping[str, str], *, sqlalchemy: bool) -> Dsn:
    for pattern, fault in _URI_FAULTS:
        if pattern.search(rest):
            _refuse(fault)
    credentials, hosts, database, query = _URI.fullmatch(rest).groups("")  # type: ignore[union-attr]  # it matches any line
    if sqlalchemy:  # writes and reads a space in the query as "+"; in libpq a "+" is a "+"
        query = query.replace("+", " ")
    items = [item.partition("=") for item in query.split("&")] if query else []
    if not all(name and separator for name, separator, _ in items):
        _refuse("has something after its '?' that is not name=value", f"Write & in a value as %26. {_ESCAPE}")
    pairs = [(_decode(name), _decode(value)) for name, _, value in items]
    if sqlalchemy and (several := [value for name, value in pairs if name == "host"]):  # its way to list hosts
        pairs = [("host", ",".join(several)), *(pair for pair in pairs if pair[0] != "host")]
    user, _, password = credentials.partition(":")
    named = [("user", _decode(user)), ("password", _decode(password)), ("dbname", _decode(database))]
    places = _split_hosts(hosts, _decode)
    if len(places) == 1 and not places[0][0]:  # "//:5433/" is a port and no host
        named.append(("port", places.pop()[1]))
    return _build(named + pairs, environment, places, first=1 - len(named))


def _read_pairs(text: str, environment: Mapping[str, str]) -> Dsn:
    found = list(_PAIR.finditer(text))
    if "".join(pair[0] for pair in found) != text:
        _refuse(
            "is not a sequence of keyword=value", "A value with a space goes in '', with \\\\ for \\ and \\' for '."
        )
    values = (pair[2][1:-1] if pair[2].startswith("'") else pair[2] for pair in found)
    plain = (re.sub(r"\\(.)", r"\1", value, flags=re.DOTALL) for value in values)
    return _build(zip((pair[1] for pair in found), plain, strict=True), environment)


def _build(
    pairs: Iterable[tuple[str, str]],
    environment: Mapping[str, str],
    places: Sequence[tuple[str, str]] = (),
    first: int = 1,
) -> Dsn:
    """Bring together what a text states, under libpq's names; `places` are the hosts of a URI, `first` is the number of the first pair."""
    stated: dict[str, str] = {}
    for number, (name, text) in enumerate(pairs, first):
        setting = _SETTINGS.get(name.lower()) or (name if _CUSTOM_SETTING.fullmatch(name) else None)
        key = setting or _ALIASES.get(name, name)
        if name in _UNMET:
            _refuse(
                f"demands {name}, which asyncpg cannot check",
                "Leave it out; sslmode=verify-full makes sure of the server.",
            )
        if setting is None and key not in _READ | _DROPPED:
            _refuse(f"has an unknown option (number {number})", f"{_guess(name, _KNOWN)}{_OPTIONS}")
        value = "require" if (name, text) == ("ssl", "true") else text
        _check(key, value)
        if key in stated or (key == "host" and places):  # libpq would take the later, asyncpg the earlier
            _refuse("states something twice", f"State {key if key in _READ else 'each setting'} once.")
        if value and key not in _DROPPED:
            stated[key] = value
    stated.setdefault("application_name", stated.pop("fallback_application_name", ""))
    if stated.get("sslrootcert") == "system" and stated.setdefault("sslmode", "verify-full") != "verify-full":
        _refuse("has sslrootcert=system, which needs sslmode=verify-full", "Leave sslmode out.")
    if stated.get("sslnegotiation") == "direct" and stated.get("sslmode") not in _STRONG_MODES:
        _refuse("has sslnegotiation=direct, which needs TLS", f"Set sslmode, to one of {', '.join(_STRONG_MODES)}.")
    if stated.get("ssl_min_protocol_version", "") > stated.get("ssl_max_protocol_version", _TLS_VERSIONS[-1]):
        _refuse("has an ssl_min_protocol_version above its ssl_max_protocol_version", "Swap them.")
    return Dsn(
        hosts=_hosts(places, stated, environment),
        user=stated.get("user"),
        database=stated.get("dbname"),
        connect_timeout_seconds=max(0.0, float(stated.get("connect_timeout", 0))) or None,
        _password=_Masked(stated["password"]) if "password" in stated else None,
        _sslpassword=_Masked(stated["sslpassword"]) if "sslpassword" in stated else None,
        _server_settings=tuple(sorted((name, value) for name, value in stated.items() if value and name not in _READ)),
        **{name: stated.get(name) for name in _FIELDS},
    )


def _hosts(
    places: Sequence[tuple[str, str]], stated: Mapping[str, str], environment: Mapping[str, str]
) -> tuple[Host, ...]:
    """Bring hosts and ports together; what the text leaves out comes from PGHOST and PGPORT, as in libpq."""
    places = places or _split_hosts(stated.get("host", ""))
    by_service = not places and "service" in stated
    places = places or _split_hosts("" if by_service else environment.get("PGHOST", "")) or [("", "")]
    names, ports = [name for name, _ in places], [port for _, port in places]
    if "port" in stated:
        if any(ports):
            _refuse("states something twice", "State port once.")
        ports = _spread(stated["port"], len(names))
    if by_service and not any(ports):
        return (Host("", 0),)
    if not all(ports):
        defaults = _spread(environment.get("PGPORT") or "5432", len(names))
        ports = [port or default for port, default in zip(ports, defaults, strict=True)]
    return tuple(Host(name, _port(port)) for name, port in zip(names, ports, strict=True))


def _split_hosts(text: str, decode: Callable[[str], str] = str) -> list[tuple[str, str]]:
    """Names and ports (or ""). `decode` marks a URI's authority, where names are encoded and IPv6 needs its brackets."""
    places = []
    for place in text.split(",") if text else ():
        bracketed = re.fullmatch(r"\[(.*)\](?::(.*))?", place)
        if bracketed:
            name, port = bracketed[1], bracketed[2] or ""
        elif place.startswith("/") or (decode is str and place.count(":") > 1):
            name, port = place, ""
        else:
            name, _, port = place.partition(":")
        name = decode(name)
        if (name or bracketed or place != text) and not _is_host(name, address=bracketed is not None):
            _refuse("(or PGHOST) has a host that is no name, no directory and no address (IPv6 in brackets)")
        places.append((name, port))
    return places


def _is_host(name: str, *, address: bool) -> bool:
    if not address and (name.startswith("/") or ":" not in name):
        return _PLACE.fullmatch(name) is not None
    with suppress(ValueError):
        IPv6Address(name)
        return _IPV6.fullmatch(name) is not None
    return False


def _spread(ports: str, hosts: int) -> list[str]:
    listed = ports.split(",")
    if len(listed) not in {1, hosts}:
        _refuse("(or PGPORT) has another number of ports than of hosts", "Name one for all hosts, or one for each.")
    return listed * hosts if len(listed) == 1 else listed


def _port(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or not 1 <= int(text) <= 65535:  # noqa: PLR2004 -- the largest port there is
        _refuse("(or PGPORT) has a port that is not a number from 1 to 65535", f"{_FORM} {_ESCAPE}")
    return int(text)


def _decode(text: str) -> str:
    decoded = unquote(text, errors="surrogateescape")
    if _UNENCODABLE.search(decoded):
        _refuse("holds a percent-encoded NUL, or is not UTF-8 once decoded", "Percent-encode the bytes of UTF-8.")
    return decoded


def _check(name: str, value: str) -> None:
    choices = _CHOICES.get(name)
    if choices and value not in choices:
        _refuse(f"has an unknown {name}", f"{_guess(value, choices)}It is one of {', '.join(choices)}.")
    if _UNENCODABLE.search(value) or (name not in _SECRETS and _CONTROL.search(value)):
        _refuse("holds a control character, or something that is not UTF-8, in a name or value")
    if name == "connect_timeout" and not re.fullmatch(r"(-?[0-9]{1,9}(\.[0-9]{1,3})?)?", value):
        _refuse("has a connect_timeout that is not a number of seconds", "For example connect_timeout=10.")
    if name == "dbname" and _SCHEME.match(value):
        _refuse("has a connection string for a database", "Pass that one instead.")


def _guess(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word.lower(), known, 1, 0.7)
    return f"Did you mean {near[0]}? " if near else ""
