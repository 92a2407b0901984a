"""Opens single connections: `dial` to the control plane's own database, `connect_tenant` to a tenant's, within what `ConnectionPolicy` allows.

The two differ in whose words they follow. Our own connection string comes from the operator: asyncpg reads it with everything libpq's users expect
(PG* variables, the password file, client certificates). A tenant's string is somebody else's, and we follow it from inside our network: it is read
without our environment, its options are on a list, its names are resolved once, every address is judged, and the connection goes to a judged
address and nowhere else, while TLS checks the name. Nothing of ours goes along.

Both return or raise errors of ours that hold no secret: asyncpg's frames have the password in their variables, so no error carries them.

This module keeps no connection, pools nothing, runs no SQL, and cannot tell who uses an address inside a private network.

Sources: `docs/adr/0006-dsn-goes-to-asyncpg.md`, `docs/adr/0016-tenant-hosts-are-checked-when-connecting.md`; asyncpg 0.32, `connect_utils`;
RFC 6890 and RFC 6052 (special addresses, IPv4 inside IPv6).
"""

import asyncio
import configparser
import os
import re
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Any, Final, Self, cast
from uuid import UUID

import asyncpg
from pydantic import SecretStr

from car_control_plane import dsn as dsns
from car_control_plane.dsn import Dsn, Host
from car_control_plane.encryption.values import ConnectionString
from car_control_plane.errors import (
    AccessDeniedError,
    ConfigurationError,
    ConnectionUnavailableError,
    ControlPlaneError,
    InvalidDataError,
    SchemaOutdatedError,
    translate,
)
from car_control_plane.poolers import (
    UNSUPPORTED,
    FramedConnection,
    Poolers,
    startup_settings,
)
from car_control_plane.settings import ControlPlaneSettings, TenantConnectionRight

__all__ = [
    "MINIMUM_SERVER",
    "ConnectionPolicy",
    "Destination",
    "attempts",
    "connect_tenant",
    "dial",
    "none_accepted",
    "refuse_internal_hosts",
    "tls_version",
]

MINIMUM_SERVER = (12, 0)
"""What the control plane's own server must be; a tenant's may be older."""

Address = IPv4Address | IPv6Address


# --- one host ---------------------------------------------------------------------------------------------------------


class _Connection(asyncpg.Connection):  # type: ignore[misc]  # asyncpg has no types
    """Tells a commit that committed nothing.

    The server answers COMMIT with ROLLBACK, and without an error, when a statement of the transaction has failed. A block that swallowed that
    error would end as if everything were stored.
    """

    async def execute(self, query: str, *args: Any, **how: Any) -> str:
        """Run a statement and return the server's answer to it.

        Raises:
            InFailedSQLTransactionError: The statement was a COMMIT, and the server has rolled back.
        """
        answer: str = await super().execute(query, *args, **how)
        if answer == "ROLLBACK" and query.startswith("COMMIT"):
            raise asyncpg.InFailedSQLTransactionError(
                "the transaction was rolled back, for a statement of it had failed"
            )
        return answer


class _FramedConnection(FramedConnection, _Connection):
    """Both, for a connection through a pooler."""


async def dial(
    dsn: Dsn,
    host: Host,
    *,
    timeout: float,  # noqa: ASYNC109 -- what libpq calls connect_timeout
    poolers: Poolers,
    server_settings: Mapping[str, str],
    **how: Any,
) -> tuple[Any, ControlPlaneError]:
    """Try one host of our own connection string; what it leaves out comes from the environment, as in libpq.

    Args:
        dsn: The connection string; its `connect_timeout` wins over `timeout`.
        host: One of its hosts.
        timeout: Seconds until the host must have accepted the connection.
        poolers: Which hosts lead through a connection pooler, as far as is known; one that is found is noted, and connected to once more.
        server_settings: Run-time parameters, those of the connection string included; through a pooler they are settings of every transaction.
        **how: Further arguments of `asyncpg.connect`.

    Returns:
        The connection, a `FramedConnection` if it leads through a pooler, or None and what went wrong: returned and not raised, for the caller may
        have more hosts to try. Cancelled, it leaves no connection.
    """
    limit = dsn.connect_timeout_seconds or timeout
    how["dsn"] = dsn.without_settings().for_host(host)
    if dsn.password is not None:
        how["password"] = dsn.password
    if dsn.system_roots:
        how["ssl"] = True
    attempt = _Attempt(host, limit)
    try:
        connection, error, pooled = await _plain(attempt, how, server_settings, poolers)
        if pooled:
            connection, error = await _framed(attempt, how, server_settings)
    finally:
        how.clear()  # it holds the password
    if connection is not None and pooled:
        poolers.remember(host)
    if connection is not None and (version := connection.get_server_version()) < MINIMUM_SERVER:
        connection.terminate()
        return None, ConfigurationError(
            f"the server is PostgreSQL {version.major}; the control plane needs PostgreSQL 12 or newer"
        )
    return connection, error


class _Attempt:
    """A host, and the time it may take altogether."""

    def __init__(self, host: Host, limit: float) -> None:
        self.host = host
        self.limit = limit
        self.until = asyncio.get_running_loop().time() + limit

    async def open(self, how: dict[str, Any], kind: type[asyncpg.Connection]) -> tuple[Any, ControlPlaneError]:
        """Connect as `_open` does, in the time that is left; empties `how`, which holds the password."""
        left = max(self.until - asyncio.get_running_loop().time(), 0.001)
        how |= {"timeout": left, "connection_class": kind}
        return await _open(self.host, self.limit, how)

    async def ask(self, connection: Any, question: Awaitable[bool]) -> tuple[Any, ControlPlaneError, bool]:
        """Ask something of a new connection; if that fails there is none, and its error is returned, as `open` does."""
        try:
            async with asyncio.timeout_at(self.until):
                return connection, ConnectionUnavailableError(), await question
        except Exception as problem:
            connection.terminate()
            return None, _connect_error(problem, self.host, self.limit), False
        except BaseException:
            connection.terminate()
            raise


async def _plain(
    attempt: _Attempt, how: dict[str, Any], settings: Mapping[str, str], poolers: Poolers
) -> tuple[Any, ControlPlaneError, bool]:
    """Connect as to a server, and tell whether it is a pooler, to which one connects in another way. Nothing is tried where one is known to be."""
    if poolers.expect(attempt.host):
        return None, ConnectionUnavailableError(), True
    connection, error = await attempt.open(how | {"server_settings": dict(settings)}, _Connection)
    if not poolers.may_exist:
        return connection, error, False
    if connection is None:
        return None, error, error.details.get("sqlstate") == UNSUPPORTED
    connection, error, pooled = await attempt.ask(connection, poolers.find(attempt.host, connection))
    if pooled:
        connection.terminate()
        return None, error, True
    return connection, error, False


async def _framed(attempt: _Attempt, how: dict[str, Any], settings: Mapping[str, str]) -> tuple[Any, ControlPlaneError]:
    """Connect as to a pooler."""
    more = {"server_settings": startup_settings(settings), "statement_cache_size": 0}
    connection, error = await attempt.open(how | more, _FramedConnection)
    if connection is not None:
        connection, error, _ = await attempt.ask(
            connection, connection.frame_with(settings, how.get("command_timeout"))
        )
    return connection, error


async def _open(host: Host, limit: float, how: dict[str, Any]) -> tuple[Any, ControlPlaneError]:
    """Connect. Returns the failure instead of raising it: asyncpg's frames hold the password, and must be gone when it is raised.

    Empties `how`, which holds the password as well.
    """
    try:
        connection = await asyncpg.connect(**({"timeout": limit, "connection_class": _Connection} | how))
    except Exception as problem:  # anything may come out of a connect; each becomes one of ours
        return None, _connect_error(problem, host, limit)
    except BaseException as stop:  # cancelled: asyncpg's frames, and those of an attempt before, go no further
        stop.__context__ = None
        raise stop.with_traceback(None) from None
    finally:
        how.clear()
    return connection, ConnectionUnavailableError()


def attempts(dsn: Dsn) -> list[tuple[str, Host]]:
    """Return which hosts to ask for which role, in order; `prefer-standby` asks all for a standby first and then takes any.

    With several hosts and nothing asked for: one that takes writes.
    """
    wanted = dsn.target_session_attrs or ("any" if len(dsn.hosts) == 1 else "read-write")
    rounds = ["standby", "any"] if wanted == "prefer-standby" else [wanted]
    return [(role, host) for role in rounds for host in dsn.hosts]


def none_accepted(failures: list[ControlPlaneError]) -> ControlPlaneError:
    """Make one error of what the attempts, at least one, failed with."""
    if len(failures) == 1:
        return failures[0]
    return ConnectionUnavailableError(
        f"none of {len(failures)} hosts accepted the connection: {'; '.join(f.message for f in failures)}",
        details={"hosts": [dict(f.details) for f in failures]},
    )


def tls_version(connection: asyncpg.Connection) -> str | None:
    """Return the version of TLS a connection speaks, `TLSv1.3` for example; None when it is not encrypted."""
    session = connection._transport.get_extra_info("ssl_object")  # asyncpg shows it nowhere else
    version: str | None = session.version() if session is not None else None
    return version


# --- why a connect failed ---------------------------------------------------------------------------------------------


def _connect_error(problem: Exception, host: Host, limit: float) -> ControlPlaneError:
    """Say what went wrong on one host, in words that hold no secret."""
    where = _where(host)
    details: dict[str, Any] = {"host": host.name, "port": host.port}
    if (tls := _tls_reason(problem, host)) is not None:
        return _tls_error(tls, host)
    known = translate(problem)
    if isinstance(
        known, SchemaOutdatedError | InvalidDataError
    ):  # an undefined object or a bad value while connecting is a setting
        return ConfigurationError(
            f"{where} does not take a run-time parameter of the connection string",
            hint="Check the part behind the '?'.",
            details={**known.details, **details},
        )
    if known is not None and not isinstance(known, ConnectionUnavailableError):
        known.details = {**known.details, **details}
        return known
    if isinstance(problem, asyncpg.TargetServerAttributeNotMatched):
        text = f"{where} does not have the role target_session_attrs asks for"
    elif isinstance(problem, TimeoutError):
        text = f"{where} did not answer within {limit:g} s"
    elif known is not None:
        text = f"{where} is not available: {known.message}"
        details = {**known.details, **details}
    else:
        text = f"cannot connect to {where}: {_system_reason(problem)}"
    hint = _POOLER_SAYS if details.get("sqlstate") == UNSUPPORTED else None
    return ConnectionUnavailableError(text, hint=hint, details=details)


_POOLER_SAYS: Final = (
    "PgBouncer says this of a database it does not know, a setting it does not take, and a server it cannot reach: its log has the reason. "
    "Behind it, leave the setting `pooler` as it is, or set it to transaction."
)


def _tls_error(reason: str, host: Host) -> ConfigurationError:
    return ConfigurationError(
        f"no TLS connection to {_where(host)}: {reason}",
        hint="Check sslmode and sslrootcert in the connection string, and the server's certificate. See docs/how-to/connect-securely.md.",
        details={"host": host.name, "port": host.port},
    )


def _where(host: Host) -> str:
    return host.name if host.is_socket else f"{host.name}:{host.port}" if host.name else "the default host"


def _tls_reason(problem: Exception, host: Host) -> str | None:
    """Say why there is no TLS; None when that is not the problem. Reads the driver's own words where it has no class for them."""
    if isinstance(problem, ssl.SSLCertVerificationError):
        return f"its certificate was not accepted ({problem.verify_message})"
    if isinstance(problem, ssl.SSLError):
        return f"the handshake failed ({problem.reason or 'OpenSSL does not say why'})"
    if type(problem) is ConnectionError and "rejected SSL upgrade" in str(problem):
        return _NOT_OFFERED
    if isinstance(problem, asyncpg.ClientConfigurationError) and "root certificate file" in str(problem):
        return "the root certificate file (sslrootcert) does not exist or cannot be read"
    if isinstance(problem, FileNotFoundError) and not host.is_socket:
        return "a file named in the connection string (sslrootcert, sslcert, sslkey, sslcrl) does not exist"
    return None


_NOT_OFFERED: Final = "the server does not offer TLS"


def _system_reason(problem: Exception) -> str:
    """Return the system's own text: "Connection refused", "Name or service not known"."""
    if isinstance(problem, socket.gaierror):
        return problem.strerror or "the name is not known"
    if type(problem) is ConnectionError:
        return "the server closed the connection"
    if isinstance(problem, OSError):  # asyncio joins what several addresses of a name answered, and drops the numbers
        return os.strerror(problem.errno) if problem.errno else "none of its addresses accepts connections"
    return type(problem).__name__


# --- what a tenant's connection string may do -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a tenant's connection string leads: what a rule about hosts is asked about.

    Attributes:
        tenant_id: Whose connection string it is.
        environment: The tenant's environment: `development`, `staging` or `production`.
        host: As the tenant wrote it: a name, an address, or the directory of a socket.
        port: 1 to 65535.
        address: The address to connect to. None for a name that is not resolved yet (at registration) and for a socket. An IPv6 address that holds
            an IPv4 address (mapped, NAT64, 6to4, Teredo, ...) is asked about as it is, and once more as each address it holds.
        internal_allowed: Whether the tenant may use internal hosts: it is in development, or `internal-hosts` is allowed.
    """

    tenant_id: UUID
    environment: str
    host: str
    port: int
    address: Address | None
    internal_allowed: bool = False


_INTERNAL: Final[tuple[tuple[IPv4Network | IPv6Network, str], ...]] = tuple(
    (ip_network(network), f"it is {what}")
    for what, networks in {
        "the address of a cloud's metadata service": (
            "169.254.169.254/32",
            "100.100.100.200/32",  # Alibaba
            "168.63.129.16/32",  # Azure's other one
            "192.0.0.192/32",  # Oracle
            "fd00:ec2::/32",  # AWS
            "fd20:ce::254/128",  # Google
            "fd00:c1::a9fe:a9fe/128",  # Oracle
            "fd00:42::42/128",  # Scaleway
        ),
        "a loopback address": ("127.0.0.0/8", "::1/128"),
        "an unspecified address, which is this machine": ("0.0.0.0/8", "::/128"),
        "a link-local address": ("169.254.0.0/16", "fe80::/10"),
        "a multicast address": ("224.0.0.0/4", "ff00::/8"),
        "a reserved address": ("240.0.0.0/4",),
    }.items()
    for network in networks
)


def refuse_internal_hosts(destination: Destination) -> str | None:
    """Refuse what only this machine and its cloud should reach; the default rule about hosts.

    Refused are loopback, link-local, unspecified, multicast and reserved addresses, the metadata services of clouds, and the name `localhost`, unless
    `destination.internal_allowed`. Private networks (RFC 1918, unique local IPv6) are not: there the databases live. A platform whose network holds
    more than databases states its own rule::

        DATABASES = ipaddress.ip_network("10.20.0.0/16")


        def only_our_databases(destination: Destination) -> str | None:
            if destination.address is not None and destination.address.is_private and destination.address not in DATABASES:
                return "it is in the private network, and not among the databases"
            return refuse_internal_hosts(destination)


        policy = ConnectionPolicy(host_refusal=only_our_databases)

    Without such a rule a tenant can learn from the errors which private addresses answer.

    Returns:
        Why the host is refused, as the end of a sentence; None when it is not.
    """
    if destination.internal_allowed:
        return None
    if destination.address is None:
        name = destination.host.lower().rstrip(".")
        return "it is this machine" if name == "localhost" or name.endswith(".localhost") else None
    return next((why for network, why in _INTERNAL if destination.address in network), None)


_PLAIN_SETTINGS: Final = frozenset(
    {
        "DateStyle",
        "IntervalStyle",
        "TimeZone",
        "application_name",
        "default_transaction_deferrable",
        "default_transaction_isolation",
        "default_transaction_read_only",
        "extra_float_digits",
        "idle_in_transaction_session_timeout",
        "idle_session_timeout",
        "lock_timeout",
        "search_path",
        "statement_timeout",
        "transaction_timeout",
    }
)
_FILES: Final = ("sslrootcert", "sslcert", "sslkey", "sslcrl", "passfile")
_LABEL: Final = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME: Final = re.compile(rf"(?=.{{1,254}}\Z){_LABEL}(?:\.{_LABEL})*\.?", re.ASCII | re.IGNORECASE)
_NUMERIC: Final = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)\.?", re.ASCII | re.IGNORECASE)
_FORM: Final = "The form is postgresql://user:password@host:5432/database."


@dataclass(frozen=True, slots=True)
class ConnectionPolicy:
    """What connection strings of tenants may say, and where they may lead. Immutable; share one.

    A string is looked at twice: `admit` at registration, and `connect_tenant` before each connection, where names have become addresses. What was
    registered under a laxer policy is therefore refused when used.

    Attributes:
        allow: Rights beyond naming one remote host with verified TLS: `sockets`, `files`, `several-hosts`, `service`, `internal-hosts`, `weak-tls`.
        host_refusal: Says why a destination is refused, or None. It is asked at registration and when connecting, about every address, before
            anything is sent. It must not block. When it raises, or returns something else, the destination is refused.
    """

    allow: frozenset[TenantConnectionRight] = frozenset()
    host_refusal: Callable[[Destination], str | None] = refuse_internal_hosts

    @classmethod
    def from_settings(cls, settings: ControlPlaneSettings) -> Self:
        """Return the policy of `tenant_connections_allow`, with the default rule about hosts."""
        return cls(allow=settings.tenant_connections_allow)

    def admit(self, connection_string: SecretStr | ConnectionString, *, tenant_id: UUID, environment: str) -> Dsn:
        """Read a tenant's connection string as it comes in; nothing is resolved and nothing connected.

        Our own environment fills nothing in: host, user and database are in the text or it is refused. An address is judged here, a name when it has
        become one.

        Returns:
            The connection string taken apart.

        Raises:
            InvalidDataError: It is malformed, leaves out host, user or database, or has something `allow` would have to name. The error repeats
                nothing of the text but the names of libpq's options.
            AccessDeniedError: It leads to a host that is refused.
        """
        outcome = _parse(connection_string)
        if isinstance(outcome, InvalidDataError):
            raise outcome
        self.check(outcome, tenant_id=tenant_id, environment=environment)
        return outcome

    def check(self, dsn: Dsn, *, tenant_id: UUID, environment: str) -> None:
        """Judge a connection string that is already taken apart, as `admit` does.

        Raises:
            InvalidDataError: As for `admit`.
            AccessDeniedError: As for `admit`.
        """
        for refused, fault, hint in self._faults(dsn, environment):
            if refused:
                raise InvalidDataError(f"the connection string {fault}", hint=hint)
        for host in dsn.hosts:
            address = None if host.is_socket else _literal(host.name)
            self.judge(host, address, tenant_id=tenant_id, environment=environment)

    def judge(self, host: Host, address: Address | None, *, tenant_id: UUID, environment: str) -> None:
        """Ask the rule about one host, and about the address it has.

        Raises:
            AccessDeniedError: It is refused, or the rule failed.
        """
        internal = environment == "development" or "internal-hosts" in self.allow
        for each in (None,) if address is None else _addresses_in(address):
            reason = self._ask(Destination(tenant_id, environment, host.name, host.port, each, internal))
            if reason is None:
                continue
            shown = "" if each is None or str(each) == host.name else f" ({each})"
            raise AccessDeniedError(
                f"the host {host.name}{shown} is refused: {reason}",
                hint="Give the database's own address. What tenants may reach is the operator's to say: tenant_connections_allow, "
                "or ConnectionPolicy(host_refusal=...).",
                details={"host": host.name, "port": host.port, "address": None if address is None else str(address)},
            )

    def _ask(self, destination: Destination) -> str | None:
        try:
            reason = cast("object", self.host_refusal(destination))
        except Exception as problem:  # whatever a rule raises, nobody has said that the host is fine
            return f"the rule about hosts failed ({type(problem).__name__})"
        if reason is None or isinstance(reason, str):
            return reason
        return f"the rule about hosts answered with {type(reason).__name__}, neither a reason nor None"

    def _faults(self, dsn: Dsn, environment: str) -> Iterator[tuple[bool, str, str]]:
        """Yield (whether it is so, what is wrong, what to do), in the order to say it."""
        allow, lax = self.allow, environment == "development" or "weak-tls" in self.allow
        yield (
            dsn.service is not None and "service" not in allow,
            "names a service of this machine (service=)",
            "Write out what the service stands for.",
        )
        yield not all(host.name for host in dsn.hosts), "names no host", f"Name it. {_FORM}"
        yield dsn.user is None, "names no user", f"Name one; ours is not used in its place. {_FORM}"
        yield dsn.database is None, "names no database", f"Name it. {_FORM}"
        yield (
            len(dsn.hosts) > 1 and "several-hosts" not in allow,
            "names several hosts",
            "Name one: the one that takes writes, or a proxy in front of them.",
        )
        yield (
            any(host.is_socket for host in dsn.hosts) and "sockets" not in allow,
            "names the directory of a socket on this machine",
            f"Name a host. {_FORM}",
        )
        for host in dsn.hosts:
            yield _spelling(host)
        files = [name for name in _FILES if getattr(dsn, name) is not None]
        if dsn.system_roots:
            files.remove("sslrootcert")
        yield (
            bool(files) and "files" not in allow,
            f"names a file of this machine ({', '.join(files)})",
            "Leave it out: a password goes into the connection string, and certificates are checked against the system's authorities.",
        )
        yield (
            dsn.sslpassword is not None and dsn.sslkey is None,
            "has an sslpassword and no sslkey to open with it",
            "Leave it out; the user's password is password=.",
        )
        kerberos = [name for name in ("krbsrvname", "gsslib") if getattr(dsn, name) is not None]
        yield (
            bool(kerberos),
            f"has {' and '.join(kerberos)}, which would have us show our own Kerberos ticket",
            "Leave it out and give the user a password.",
        )
        strange = sorted(dsn.server_settings.keys() - _PLAIN_SETTINGS)
        shown = [name for name in strange if "." not in name]  # a name with a dot is the writer's own text
        yield (
            bool(strange),
            f"has settings that are not taken here ({', '.join(shown) or 'of an extension'})",
            f"Taken are {', '.join(sorted(_PLAIN_SETTINGS))}. Make others the role's own: ALTER ROLE ... SET.",
        )
        versions = (dsn.ssl_min_protocol_version, dsn.ssl_max_protocol_version)
        yield (
            any(version in {"TLSv1", "TLSv1.1"} for version in versions),
            "asks for a version of TLS older than 1.2",
            "Leave ssl_min_protocol_version and ssl_max_protocol_version out.",
        )
        yield (
            not lax and not _is_verified(dsn),
            f"has sslmode={dsn.sslmode}, which does not make sure of the server",
            "Leave sslmode out, or write sslmode=verify-full.",
        )


def _parse(connection_string: SecretStr | ConnectionString) -> Dsn | InvalidDataError:
    try:
        if isinstance(connection_string, SecretStr):
            return dsns.parse(connection_string.get_secret_value(), environment=False)
        text: object = connection_string
        if isinstance(text, ConnectionString):
            return dsns.parse(text.reveal(), environment=False)
    except ConfigurationError as problem:
        return InvalidDataError(re.sub(r"\(or PG[A-Z]+\) ", "", problem.message), hint=problem.hint)
    del connection_string, text  # it may be in clear
    return InvalidDataError(
        "a connection string must be a SecretStr or a ConnectionString", hint="Wrap it: SecretStr(text)."
    )


def _spelling(host: Host) -> tuple[bool, str, str]:
    """Judge how a host is written. Two programs that read one text differently are how a check is got around, so there is one way to write each."""
    if host.is_socket or ":" in host.name or not host.name:
        return False, "", ""
    if _NUMERIC.fullmatch(
        host.name
    ):  # no top-level domain is a number; inet_aton reads 127.1, 0x7f.1, 0177.0.0.1 and 2130706433
        plain = re.fullmatch(r"(?:(?:0|[1-9][0-9]{0,2})(?:\.|\Z)){4}(?<!\.)", host.name, re.ASCII)
        fine = plain is not None and all(int(part) <= 255 for part in host.name.split("."))  # noqa: PLR2004 -- of a byte
        return (
            not fine,
            "has a host that is an IPv4 address in an unusual spelling",
            "Write four decimal numbers, without leading zeros: 192.0.2.1.",
        )
    return (
        _NAME.fullmatch(host.name) is None,
        "has a host that is no name of the DNS",
        "Labels of up to 63 letters, digits and hyphens, with dots between them; other alphabets in their xn-- form.",
    )


def _literal(name: str) -> Address | None:
    """Return the address a host's name is, if it is one; `_spelling` has found it well written."""
    try:
        return ip_address(name)
    except ValueError:
        return None


def _says_here(host: Host) -> bool:
    """Whether the string itself, and not the answer of a name server, says that the host is this machine."""
    return _literal(host.name) is not None or host.name.rstrip(".").lower() == "localhost"


def _is_verified(dsn: Dsn) -> bool:
    """Whether the server has to prove that it is the one that was named.

    verify-ca does not compare names: fine with an authority of one's own, which signs nobody else, and no check at all with the public ones.
    """
    if dsn.sslmode == "verify-ca":
        return dsn.sslrootcert is not None
    return dsn.sslmode in {None, "verify-full"}


_NAT64_LOCAL: Final = ip_network("64:ff9b:1::/48")
_LAST_32_BITS: Final = tuple(
    IPv6Network(text) for text in ("::/96", "::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96")
)
_6TO4: Final = ip_network("2002::/16")
_TEREDO: Final = ip_network("2001::/32")
_ISATAP: Final = 0x5EFE


def _addresses_in(address: Address) -> Iterator[Address]:
    """Yield an address without its zone, and the IPv4 addresses it stands for on a network that translates."""
    if isinstance(address, IPv4Address):
        yield address
        return
    number = int(address)
    address = IPv6Address(number)
    yield address
    found = list[int]()
    if any(address in network for network in _LAST_32_BITS):
        found = [number]
    elif address in _6TO4:
        found = [number >> 80]
    elif address in _TEREDO:
        found = [number >> 64, ~number]  # the server, and the client
    elif address in _NAT64_LOCAL:  # RFC 6052: behind a prefix of 96, 64, 56 or 48 bits, around the byte 8
        upper, lower = number >> 64, number & (1 << 56) - 1
        found = [(upper & 0xFFFF) << 16 | lower >> 40, (upper & 0xFF) << 24 | lower >> 32, lower >> 24, number]
        found = [each for each in found if each & 0xFF00_0000] or [number]  # a place without an address has zeros
    elif number >> 32 & 0xFDFF_FFFF == _ISATAP:
        found = [number]
    for each in found:
        yield IPv4Address(each & 0xFFFF_FFFF)


# --- connecting to a tenant's database --------------------------------------------------------------------------------


async def connect_tenant(
    dsn: Dsn,
    *,
    tenant_id: UUID,
    environment: str,
    policy: ConnectionPolicy,
    timeout: float,  # noqa: ASYNC109 -- one cause for one error: a caller's own time limit would say less
) -> asyncpg.Connection:
    """Connect to a tenant's database; the caller closes the connection.

    Each name is resolved once, all addresses are judged before the first packet, and only those are connected to. A name that has a refused address
    among others is refused as a whole: that is what DNS rebinding looks like, and whether it works must not depend on the order of an answer.

    TLS is `verify-full` with the system's authorities unless the string says otherwise, and checks the name as the tenant wrote it. A socket, and a
    loopback address where no sslmode is written, go without. `prefer` and `allow` (with `weak-tls`, or in development) encrypt where the server
    offers it. Nothing of ours goes along: no PG* variable, password file, client certificate or Kerberos ticket.

    The session has the tenant's own settings, its `search_path` too: write schemas out in SQL. The server may be of any version, behind a pooler,
    and a liar: fetch few rows, under a time limit.

    Args:
        dsn: As `ConnectionPolicy.admit` returned it, or parsed with `environment=False`.
        tenant_id: Whose it is; for the rule about hosts.
        environment: The tenant's environment.
        policy: What the string may do; it is checked again.
        timeout: Seconds for everything together: names, files, and all addresses, each of which gets an equal share of what is left.

    Raises:
        InvalidDataError: The policy does not admit the string.
        AccessDeniedError: A host or address is refused; nothing was sent.
        ConfigurationError: The server refuses user, password or database, or TLS does not come about.
        ConnectionUnavailableError: No address accepted the connection in time.
    """
    policy.check(dsn, tenant_id=tenant_id, environment=environment)
    try:
        async with asyncio.timeout(timeout):
            judge = partial(policy.judge, tenant_id=tenant_id, environment=environment)
            if dsn.service is not None or dsn.passfile is not None:
                dsn = await _with_files(dsn)
                policy.check(dsn, tenant_id=tenant_id, environment=environment)
            connection, error = await _connect(dsn, await _resolve(dsn, judge), timeout)
            if connection is not None:
                return connection
    except TimeoutError:
        error = ConnectionUnavailableError(
            f"{', '.join(map(_where, dsn.hosts))} did not answer within {timeout:g} s",
            details={"host": dsn.hosts[0].name, "port": dsn.hosts[0].port},
        )
    raise error


_Place = tuple[Host, str, Address | None]
"""A host, one of its addresses as the driver takes it (for a socket its directory), and as it was judged."""


async def _resolve(dsn: Dsn, judge: Callable[[Host, Address | None], None]) -> list[_Place | ControlPlaneError]:
    """Return the addresses of every host, all of them judged, and why a host has none."""
    found = list[_Place | ControlPlaneError]()
    for host in dsn.hosts:
        literal = None if host.is_socket else _literal(host.name)
        # A zone belongs to a link-local address; elsewhere the system takes it for a piece of a name.
        texts = [host.name if literal is None or literal.is_link_local else host.name.partition("%")[0]]
        if not host.is_socket and literal is None:
            try:
                answers = await asyncio.get_running_loop().getaddrinfo(host.name, host.port, type=socket.SOCK_STREAM)
            except (OSError, UnicodeError) as problem:
                found.append(_connect_error(problem, host, 0))
                continue
            texts = list(dict.fromkeys(str(where[0]) for *_, where in answers))
        for text in texts:
            address = None if host.is_socket else ip_address(text)
            judge(host, address)
            found.append((host, text, address))
    return found


async def _connect(dsn: Dsn, places: list[_Place | ControlPlaneError], seconds: float) -> tuple[Any, ControlPlaneError]:
    """Try the places in order, each for an equal share of the time that is left."""
    clock = asyncio.get_running_loop().time
    end = clock() + seconds
    failures = [place for place in places if isinstance(place, ControlPlaneError)]
    good = [place for place in places if not isinstance(place, ControlPlaneError)]
    tries = [(role, place) for role, host in attempts(dsn) for place in good if place[0] == host]
    for number, (role, place) in enumerate(tries):
        share = max(end - clock(), 0.01) / (len(tries) - number)
        connection, error = await _attempt(dsn, place, role, min(share, dsn.connect_timeout_seconds or share))
        if connection is not None or not isinstance(error, ConnectionUnavailableError):
            return connection, error
        failures.append(error)
    return None, none_accepted(failures)


async def _attempt(dsn: Dsn, place: _Place, role: str, limit: float) -> tuple[Any, ControlPlaneError]:
    """Connect to one address that was judged. Returns the failure, as `dial` does."""
    host, _, address = place
    limit = float(f"{limit:.2g}")  # an error shows it
    mode = dsn.sslmode or (
        "disable" if address is None or (address.is_loopback and _says_here(host)) else "verify-full"
    )
    context: _TlsContext | None = None
    if address is not None and mode != "disable":
        built = await asyncio.to_thread(_tls_context, dsn, host, mode)
        if isinstance(built, ControlPlaneError):
            return None, built
        context = built
    connection, error = await _watched(dsn, place, role, limit, context)
    if mode in {"prefer", "allow"} and error.message == _tls_error(_NOT_OFFERED, host).message:
        connection, error = await _watched(dsn, place, role, limit, None)
    return connection, error


async def _watched(
    dsn: Dsn, place: _Place, role: str, limit: float, context: "_TlsContext | None"
) -> tuple[Any, ControlPlaneError]:
    """Connect, and hang up on a server that would harm us."""
    host, watch = place[0], _Watch()
    if context is not None:
        context.watch = watch
    loop = None if context is not None else _WatchingLoop(watch)
    connection, error = await _open(host, limit, _arguments(dsn, place, role, context) | {"loop": loop})
    if watch.fault is None:
        return connection, error
    return None, ConnectionUnavailableError(
        f"the connection to {_where(host)} was given up: {watch.fault}",
        hint="This is no PostgreSQL server, or not one that asks for a password as they usually do.",
        details={"host": host.name, "port": host.port},
        retryable=False,
    )


def _arguments(dsn: Dsn, place: _Place, role: str, context: ssl.SSLContext | None) -> dict[str, Any]:
    """Return what to tell asyncpg. All of it: what it is not told it looks for in our environment and home directory."""
    return {
        "host": place[1],
        "port": place[0].port,
        "user": dsn.user,
        "password": dsn.password or "",
        "database": dsn.database,
        "ssl": context or False,
        "direct_tls": dsn.sslnegotiation == "direct",
        "server_settings": {"application_name": "car-control-plane", **dsn.server_settings},
        "target_session_attrs": role,
        # A server may ask for Kerberos. Of the two libraries this names the one that systems like ours do not have, and a service nobody has.
        "gsslib": "gssapi" if os.name == "nt" else "sspi",
        "krbsrvname": "nobody",
        "statement_cache_size": 0,  # the server may be a pooler
    }


# --- what a tenant's server says --------------------------------------------------------------------------------------


_FRAME = struct.Struct("!Bi")  # a message's kind, and its length with these four bytes but without the kind
_NO_POSTGRESQL = "it does not speak PostgreSQL's protocol"


class _Watch:
    """Watches what a server says, and finds what would harm us.

    asyncpg is made for servers one trusts. Asked to continue a SCRAM that has not begun, it crashes the process. It computes as many rounds of SCRAM
    as a server asks for: the most there can be stop the event loop for a quarter of an hour. It keeps a message of any length in memory. It answers a
    server that asks for Kerberos with our ticket. A connection to a server that says no version it never closes. And a message whose length is
    negative makes it read what is not there, or loop for ever, at any time in a connection's life.

    So the messages until the server is ready are judged one by one, and of later ones the kind and the length.

    Attributes:
        fault: What was wrong, None as long as nothing is.
    """

    _KINDS = b"RSKNEZ"
    _LATER = b"123ACDEGHINSTVWZcdnst"  # and none that belongs to the beginning
    _MOST_BYTES = 1 << 16
    _MOST_LATER = 1 << 30  # PostgreSQL's own limit
    _MOST_ROUNDS = 1_000_000
    _SCRAM_CONTINUE = 11
    _FIRST = frozenset({0, 3, 5, 10})  # signed in, password in clear, as MD5, SCRAM
    _NEXT: Final = {0: frozenset[int](), 3: {0}, 5: {0}, 10: {11}, 11: {12}, 12: {0}}

    def __init__(self) -> None:
        self.fault: str | None = None
        self._ready = False
        self._pending = b""
        self._skip = 0
        self._bytes = 0
        self._version = b""
        self._expected: Set[int] = self._FIRST

    def feed(self, data: bytes) -> None:
        """Look at what came in.

        Raises:
            ConnectionAbortedError: It must not reach the driver; `fault` says why.
        """
        if not self._ready:
            data = self._until_ready(data)
        if self._ready and self.fault is None:
            self._after(data)
        if self.fault is not None:
            raise ConnectionAbortedError(self.fault)

    def _until_ready(self, data: bytes) -> bytes:
        """Judge whole messages, and return what came after the last of the beginning."""
        self._bytes += len(data)
        self._pending += data
        while self.fault is None and not self._ready and len(self._pending) >= _FRAME.size:
            kind, length = _FRAME.unpack_from(self._pending)
            if kind not in self._KINDS or not 4 <= length <= self._MOST_BYTES:  # noqa: PLR2004 -- counts itself
                self.fault = _NO_POSTGRESQL
            elif len(self._pending) <= length:
                break
            else:
                self.fault = self._judge(chr(kind), self._pending[5 : length + 1])
                self._ready = kind == ord("Z")
                self._pending = self._pending[length + 1 :]
        if self.fault is None and not self._ready:
            if self._bytes > self._MOST_BYTES:
                self.fault = "it says too much before it is ready"
            return b""
        data, self._pending = self._pending, b""
        return data

    def _after(self, data: bytes) -> None:
        """Step from message to message: a header may be cut anywhere, what is in between is not looked at."""
        if self._pending:
            data = self._pending + data
        at, end, unpack, kinds = self._skip, len(data), _FRAME.unpack_from, self._LATER
        while at + 5 <= end:
            kind, length = unpack(data, at)
            if kind not in kinds or not 4 <= length <= self._MOST_LATER:  # noqa: PLR2004 -- counts itself
                self.fault = _NO_POSTGRESQL
                return
            at += length + 1
        self._pending, self._skip = (data[at:], 0) if at < end else (b"", at - end)

    def _judge(self, kind: str, body: bytes) -> str | None:
        if kind == "R":
            return self._judge_request(int.from_bytes(body[:4]), body)
        if kind == "S" and body.startswith(b"server_version\0"):
            self._version = body
        if kind == "Z" and not re.fullmatch(rb"\D*[0-9]{1,9}(?:\D.*)?", self._version, re.DOTALL):
            return "it does not say which version it is"
        return None

    def _judge_request(self, code: int, body: bytes) -> str | None:
        if code not in self._expected:
            return "it asks for something else than a password, or out of turn"
        self._expected = self._NEXT[code]
        rounds = re.search(rb",i=(\d+)", body) if code == self._SCRAM_CONTINUE else None
        if rounds and (len(rounds[1]) > len(str(self._MOST_ROUNDS)) or int(rounds[1]) > self._MOST_ROUNDS):
            return f"it asks for more than {self._MOST_ROUNDS:,} rounds of SCRAM"
        return None


class _WatchedProtocol(asyncio.Protocol):
    """Stands before the driver's protocol."""

    def __init__(self, inner: asyncio.Protocol, watch: _Watch) -> None:
        self.inner, self._watch = inner, watch
        self.connection_lost, self.eof_received = inner.connection_lost, inner.eof_received  # type: ignore[method-assign]  # as they are
        self.pause_writing, self.resume_writing = inner.pause_writing, inner.resume_writing  # type: ignore[method-assign]  # as they are

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self.inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        try:
            self._watch.feed(data)
        except ConnectionAbortedError:
            self._transport.abort()
            return
        self.inner.data_received(data)


class _WatchingLoop:
    """The running event loop, but that connections without TLS are watched; asyncpg has no other way in."""

    def __init__(self, watch: _Watch) -> None:
        self._loop, self._watch = asyncio.get_running_loop(), watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    async def create_connection(self, factory: Callable[[], asyncio.Protocol], *where: Any) -> tuple[Any, Any]:
        """Connect to an address, as the loop does."""
        return await self._watched(self._loop.create_connection, factory, *where)

    async def create_unix_connection(self, factory: Callable[[], asyncio.Protocol], *where: Any) -> tuple[Any, Any]:
        """Connect to a socket, as the loop does."""
        return await self._watched(self._loop.create_unix_connection, factory, *where)

    async def _watched(self, connect: Any, factory: Callable[[], asyncio.Protocol], *where: Any) -> tuple[Any, Any]:
        protocol = _WatchedProtocol(factory(), self._watch)
        transport, _ = await connect(lambda: protocol, *where)
        return transport, protocol.inner


# --- TLS to a tenant's server -----------------------------------------------------------------------------------------


class _Session(ssl.SSLObject):
    """Shows what it decrypts to the context's `_Watch`."""

    def read(self, len: int = 1024, buffer: Any = None) -> Any:
        """Decrypt what came in, as ssl does.

        Raises:
            ConnectionAbortedError: It must not reach the driver.
        """
        result: Any = super().read(len, buffer)
        cast("_TlsContext", self.context).watch.feed(result if buffer is None else bytes(memoryview(buffer)[:result]))
        return result


class _TlsContext(ssl.SSLContext):
    """Checks the certificate against the name of a host while the connection goes to its address. For one connection at a time."""

    sslobject_class = _Session
    name: str
    watch: _Watch

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        """Begin TLS, as ssl does, for the name instead of the address."""
        return super().wrap_bio(incoming, outgoing, server_side, self.name, session)


def _tls_context(dsn: Dsn, host: Host, mode: str) -> _TlsContext | ControlPlaneError:
    """Build what TLS needs, from the connection string alone. Reads files."""
    context = _TlsContext(ssl.PROTOCOL_TLS_CLIENT)
    context.name = host.name.partition("%")[0].rstrip(".")
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["postgresql"])
    authority = None if dsn.system_roots else dsn.sslrootcert
    if mode != "verify-full":
        context.check_hostname = False
    if mode in {"prefer", "allow"} or (mode == "require" and authority is None):
        context.verify_mode = ssl.CERT_NONE
    try:
        if dsn.ssl_min_protocol_version == "TLSv1.3":
            context.minimum_version = ssl.TLSVersion.TLSv1_3
        if dsn.ssl_max_protocol_version == "TLSv1.2":
            context.maximum_version = ssl.TLSVersion.TLSv1_2
        if authority is not None:
            context.load_verify_locations(cafile=authority)
        elif context.verify_mode is not ssl.CERT_NONE:
            context.load_default_certs()
        if dsn.sslcrl is not None:
            context.load_verify_locations(cafile=dsn.sslcrl)
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN
        if dsn.sslcert is not None:
            context.load_cert_chain(dsn.sslcert, dsn.sslkey, password=lambda: dsn.sslpassword or "")
    except (OSError, ValueError) as problem:  # of the second: a passphrase that is too long
        return _tls_error(_file_reason(problem), host)
    return context


def _file_reason(problem: Exception) -> str:
    names = "sslrootcert, sslcert, sslkey, sslcrl"
    if isinstance(problem, OSError) and not isinstance(problem, ssl.SSLError):
        return f"a file named in the connection string ({names}) does not exist or cannot be read"
    return (
        f"a file named in the connection string ({names}) is not what its name says, in PEM, or the passphrase is wrong"
    )


# --- files a tenant's connection string may name ----------------------------------------------------------------------


async def _with_files(dsn: Dsn) -> Dsn:
    """Fill in what the named service and the named password file say; the connection string wins."""
    outcome = await asyncio.to_thread(_read_files, dsn)
    if isinstance(outcome, ControlPlaneError):
        raise outcome
    return outcome


def _read_files(dsn: Dsn) -> Dsn | ControlPlaneError:
    try:
        if dsn.service is not None:
            file = Path(os.environ.get("PGSERVICEFILE") or Path.home() / ".pg_service.conf")
            services = configparser.RawConfigParser()
            services.read_string(file.read_text(encoding="utf-8"))
            dsn = dsn.filled(_from_pairs(dict(services[dsn.service])))
        if dsn.passfile is not None and dsn.password is None:
            lines = Path(dsn.passfile).read_text(encoding="utf-8").splitlines()
            password = next(_passwords(lines, dsn), "")
            dsn = dsn.filled(_from_pairs({"password": password}))
    except ConfigurationError as problem:
        return problem.with_traceback(None)
    except (OSError, ValueError, LookupError, RuntimeError, configparser.Error):
        return ConfigurationError(
            "the service or the password file named in the connection string cannot be read",
            hint="Services stand in the file PGSERVICEFILE names, or in ~/.pg_service.conf, under [name].",
        )
    return dsn


def _from_pairs(pairs: Mapping[str, str]) -> Dsn:
    quoted = {name: re.sub(r"([\\'])", r"\\\1", value) for name, value in pairs.items()}
    return dsns.parse(" ".join(f"{name}='{value}'" for name, value in quoted.items()), environment=False)


def _passwords(lines: Iterable[str], dsn: Dsn) -> Iterator[str]:
    """Yield the passwords of the lines `host:port:database:user:password` that fit."""
    host = dsn.hosts[0]
    wanted = ("localhost" if host.is_socket else host.name, str(host.port), dsn.database, dsn.user)
    for line in lines:
        *where, password = (re.sub(r"\\(.)", r"\1", field) for field in re.split(r"(?<!\\):", line, maxsplit=4))
        fits = len(where) == len(wanted) and all(f in {"*", w} for f, w in zip(where, wanted, strict=True))
        if fits and not line.startswith("#"):
            yield password
