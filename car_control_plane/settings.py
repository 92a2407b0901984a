"""Settings: what the environment says about the control plane, read once and frozen.

Every setting is read from `CAR_CONTROL_PLANE_<NAME>` in the environment or in a `.env` file of the working directory; the connection string also
from `DATABASE_URL`, as the seed guide has it. A bad value is a `ConfigurationError` that names the setting and never shows the value.
"""

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from car_control_plane.errors import ConfigurationError

PREFIX = "CAR_CONTROL_PLANE_"

TenantConnectionRight = Literal["sockets", "files", "several-hosts", "service", "internal-hosts", "weak-tls"]
"""What a connection string of a tenant may be allowed to do."""

_MAX_SERVER_SECONDS = 2_147_483
"""The longest time limit the server takes: it counts milliseconds in 32 bits."""

_URL_HINT = (
    'Set it: export DATABASE_URL="postgresql://user:password@localhost:5432/control_plane" '
    '(PowerShell: $env:DATABASE_URL="..."), or write it into a .env file. '
    "To try things out without a server: DATABASE_URL=embedded:"
)


class ControlPlaneSettings(BaseSettings):
    """The settings of a control plane; frozen. Build them with `load_settings`, whose errors hold no secret."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_file=".env",
        extra="ignore",  # a .env file is shared with other programs
        frozen=True,
        populate_by_name=True,
        use_attribute_docstrings=True,
        hide_input_in_errors=True,
    )

    database_url: SecretStr | None = Field(
        default=None, validation_alias=AliasChoices(f"{PREFIX}DATABASE_URL", "DATABASE_URL", "database_url")
    )
    """Connection string of the control plane's database: any form libpq takes, or `embedded:` (a temporary server), or `embedded:PATH`
    (a server that keeps its data in PATH). Recommended for anything but loopback: `?sslmode=verify-full`."""

    direct_database_url: SecretStr | None = None
    """Behind a connection pooler: connection string of the same database that leads to the server itself. Migrations, the rotation of keys and
    whatever else needs a session of its own connect there."""

    pooler: Literal["detect", "none", "transaction"] = "detect"
    """Whether `database_url` leads through a connection pooler in transaction mode. `detect` asks a new connection once a minute, one round trip;
    `none` trusts that it does not; `transaction` is for a pooler that cannot be told from a server."""

    application_name: str = Field(default="car-control-plane", pattern="^[ -~]{1,63}$")
    """How our connections begin their name in `pg_stat_activity`: printable ASCII characters. `/`, what the connection is for, `/` and the process
    id follow; of the 63 characters PostgreSQL keeps, these have precedence. An `application_name` in the connection string is taken as it is."""

    pool_size: int = Field(default=5, ge=1, le=1000)
    """Connections kept open, at most."""

    max_overflow: int = Field(default=5, ge=0, le=1000)
    """Connections opened beyond `pool_size` under load, at most; closed when given back."""

    pool_timeout_seconds: float = Field(default=5.0, gt=0, le=3600)
    """How long a caller waits for a connection of the pool before `PoolTimeoutError`."""

    pool_recycle_seconds: float = Field(default=1800.0, gt=0)
    """Connections older than this are replaced when next used."""

    pool_ping_after_seconds: float = Field(default=0.5, ge=0)
    """A connection idle for longer than this is asked whether it is alive before it is used; 0 asks always, which costs about a quarter."""

    pool_ping_timeout_seconds: float = Field(default=1.0, gt=0, le=3600)
    """How long its answer may take. If there is none, the network has lost the connection, and all others of the pool are replaced as well."""

    read_retry_seconds: float = Field(default=5.0, ge=0, le=3600)
    """For how long a repository bound to the manager repeats a read whose connection is lost, before `ConnectionUnavailableError`; 0 is never."""

    connect_timeout_seconds: float = Field(default=3.0, gt=0, le=3600)
    """How long one host may take to accept a connection; `connect_timeout` in the connection string wins."""

    command_timeout_seconds: float = Field(default=12.0, gt=0)
    """How long the client waits for the answer to one statement. Keep it above `statement_timeout_seconds`: a statement that is merely slow
    is then ended by the server, which keeps the connection, and this one means a dead server or network."""

    statement_timeout_seconds: float = Field(default=10.0, ge=0, le=_MAX_SERVER_SECONDS)
    """How long the server lets one statement run; 0 is no limit."""

    lock_timeout_seconds: float = Field(default=3.0, ge=0, le=_MAX_SERVER_SECONDS)
    """How long a statement, of a migration too, waits for a lock; 0 is no limit."""

    idle_in_transaction_timeout_seconds: float = Field(default=30.0, ge=0, le=_MAX_SERVER_SECONDS)
    """After how long without a statement the server ends an open transaction; 0 is never."""

    unit_deadline_seconds: float = Field(default=30.0, gt=0, le=3600)
    """For how long `run` repeats a unit of work; its last attempt may end later, by the limits of its calls."""

    operation_retention_seconds: float = Field(default=604_800.0, ge=3600, le=315_360_000)
    """For how long the ids of completed operations are kept: within that time a unit with the same id is not done twice."""

    migration_lock_timeout_seconds: float = Field(default=600.0, gt=0)
    """How long a migration waits for another process that is migrating the same database."""

    encryption_keys: SecretStr | None = None
    """The keys that seal connection strings: `kid:base64`, several with commas between them; the first one is current, the others only open.
    Set one of `encryption_keys`, `encryption_key_file` and `encryption_key_wrapper`; `car-cp key generate` makes a key."""

    encryption_key_file: Path | None = None
    """A file with the keys, one `kid:base64` a line, that only its owner can read; read again when it has changed."""

    encryption_key_wrapper: Literal["local", "aws-kms", "vault-transit"] | None = None
    """Keys are kept in the table `encryption_keys`, wrapped by an outer key: one in a file (`local`), in AWS KMS, or in HashiCorp Vault's
    transit engine."""

    encryption_outer_key_file: Path | None = None
    """For `local`: a file with the outer key, `kid:base64`, that only its owner can read; after a change of outer keys the former ones below it."""

    encryption_kms_key_id: str | None = None
    """For `aws-kms`: id, ARN or alias of the KMS key; behind a comma the former ones, until their keys are rewrapped. Region and credentials are
    found as by every AWS client."""

    encryption_vault_key: str | None = None
    """For `vault-transit`: name of the transit key. Address and token are found as by every Vault client (`VAULT_ADDR`, `VAULT_TOKEN`,
    `VAULT_NAMESPACE`)."""

    encryption_vault_mount: str = "transit"
    """For `vault-transit`: where the transit engine is mounted."""

    encryption_cache_seconds: float = Field(default=300.0, gt=0, le=86_400)
    """How long keys are used before their source is asked again."""

    encryption_outage_seconds: float = Field(default=3600.0, ge=0, le=604_800)
    """How much longer keys open connection strings, but seal none, while their source does not answer."""

    tenant_connections_allow: Annotated[frozenset[TenantConnectionRight], NoDecode] = frozenset()
    """What connection strings of tenants may do beyond naming one remote host with verified TLS; with commas: `internal-hosts,weak-tls`.
    `sockets`, `files` (certificates and keys on this machine), `several-hosts`, `service`, `internal-hosts` (loopback, link-local and metadata
    addresses), `weak-tls` (any `sslmode`). Tenants in development may use internal hosts and any `sslmode` anyway."""

    @field_validator("tenant_connections_allow", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """Read words with commas between them, as the environment has them."""
        return [word for part in value.split(",") if (word := part.strip())] if isinstance(value, str) else value

    def require_database_url(self) -> str:
        """Return the connection string in clear.

        Raises:
            ConfigurationError: None is set.
        """
        url = self.database_url.get_secret_value().strip() if self.database_url is not None else ""
        if not url:
            raise ConfigurationError("DATABASE_URL environment variable is required", hint=_URL_HINT)
        return url


def load_settings(**overrides: Any) -> ControlPlaneSettings:
    """Read the settings from the environment and `.env`; `overrides` win.

    Raises:
        ConfigurationError: A value is not acceptable, a name in `overrides` is unknown, or `.env` cannot be read as UTF-8.
    """
    for name in SECRETS & overrides.keys():
        overrides[name] = conceal(overrides[name])
    unknown = sorted(overrides.keys() - ControlPlaneSettings.model_fields.keys())
    if unknown:
        near = difflib.get_close_matches(unknown[0].lower(), ControlPlaneSettings.model_fields, n=1)
        raise ConfigurationError(
            f"there is no setting {unknown[0]!r}",
            hint=f"Did you mean {near[0]!r}?" if near else "See docs/reference/settings.md.",
        )
    try:
        return ControlPlaneSettings(**overrides)
    except ValidationError as error:
        # The locations and messages only: pydantic's own text and `.errors()` hold the refused input.
        problems = [
            (_environment_name(str(problem["loc"][0])), problem["msg"])
            for problem in error.errors(include_input=False, include_url=False, include_context=False)
        ]
        refusal = ConfigurationError(
            "; ".join(f"{name}: {text}" for name, text in problems),
            hint="Correct the environment or the .env file.",
            details={"settings": [name for name, _ in problems]},
        )
    except UnicodeDecodeError:
        refusal = ConfigurationError(
            "the .env file is not UTF-8",
            hint="PowerShell 5 writes UTF-16 with `>`: save it as UTF-8 (Set-Content -Encoding utf8 .env ...).",
        )
    except OSError as problem:
        refusal = ConfigurationError(
            f"the .env file cannot be read: {problem.strerror}", hint="Let this user read it, or remove it."
        )
    raise refusal  # outside of the except block: the first error, which holds what was read, is no context of it


SECRETS = frozenset({"database_url", "direct_database_url", "encryption_keys"})
"""The settings that hold secrets."""


def conceal(value: Any) -> Any:
    """Wrap a secret, so that repr, and with it an error tracker's list of variables, does not show it."""
    return SecretStr(value) if isinstance(value, str) else value


def _environment_name(name: str) -> str:
    if name.upper() in {"DATABASE_URL", f"{PREFIX}DATABASE_URL"}:
        return "DATABASE_URL"
    return name if name.upper().startswith(PREFIX) else f"{PREFIX}{name.upper()}"


def unknown_environment() -> dict[str, str]:
    """Return the variables of the environment that begin with our prefix but are no setting, each with the nearest name that is one."""
    known = {f"{PREFIX}{name.upper()}" for name in ControlPlaneSettings.model_fields}
    strangers = sorted(name for name in os.environ if name.upper().startswith(PREFIX) and name.upper() not in known)
    return {name: next(iter(difflib.get_close_matches(name.upper(), known, n=1)), "") for name in strangers}
