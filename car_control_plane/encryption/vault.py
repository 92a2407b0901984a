"""Keys wrapped by the transit engine of HashiCorp Vault, or of OpenBao, which answers alike.

Hides hvac: its blocking calls, its environment, its errors. Knows nothing of the table the wrapped keys are in.

A wrapped key is bound to its id by the engine's associated data (Vault 1.9 and later). The reference is name and version of the transit key, such as
`tenants:v3`: after a change of the setting, what the former key has wrapped still opens. Only the name is taken from it, and the mount never, so
that what the database says leads to no other path of Vault.

Sources: Vault's API documentation, "Transit secrets engine" and "Status codes"; `docs/how-to/keys-in-vault.md`.
"""

import base64
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from pydantic import SecretStr

from car_control_plane.encryption.envelope import Key
from car_control_plane.encryption.wrapping import ask, damaged
from car_control_plane.errors import (
    ConfigurationError,
    ControlPlaneError,
    KeyUnavailableError,
    MissingExtraError,
    UnknownKeyError,
)

try:
    import hvac
    import requests
    from hvac import exceptions as hvac_errors
except ImportError as missing:
    raise MissingExtraError(
        "keys in Vault need hvac, which is not installed", hint='pip install "car-control-plane[vault]"'
    ) from missing

_SERVICE: Final = "Vault"
_GUIDE: Final = "see docs/how-to/keys-in-vault.md"
_ATTEMPT_SECONDS: Final = 5

_NAME = re.compile(r"\w(?:[\w.-]*\w)?", re.ASCII)
_MOUNT = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)*", re.ASCII)
_REFERENCE = re.compile(rf"({_NAME.pattern}):v[0-9]+", re.ASCII)
_CIPHERTEXT = re.compile(r"vault:(v[0-9]+):[A-Za-z0-9+/=]+", re.ASCII)


class VaultTransitWrapper:
    """An outer key in Vault's transit engine, of a type with authenticated encryption (`aes256-gcm96`, the default, for one).

    The constructor does no I/O: what is wrong with address, token or key shows at the first use. Calls run in threads, for seconds at most.

    Args:
        key_name: Name of the transit key that wraps; those of the same mount that have wrapped before open too.
        mount_point: Where the engine is mounted.
        client: An hvac client to use, and to close, by the caller. Without it one is made for every call, from `VAULT_ADDR`, `VAULT_TOKEN` (or
            `~/.vault-token`, where an agent renews it) and `VAULT_NAMESPACE`; `VAULT_CACERT` is trusted.

    Raises:
        ConfigurationError: Key name or mount point is none that Vault takes.
    """

    name = "vault-transit"

    def __init__(self, key_name: str, *, mount_point: str = "transit", client: Any = None) -> None:
        self._key_name = key_name
        self._mount = mount_point.strip("/")
        self._given = client
        if not _NAME.fullmatch(key_name):
            raise ConfigurationError(f"{key_name!r} cannot be the name of a transit key")
        if not _MOUNT.fullmatch(self._mount):
            raise ConfigurationError(f"{mount_point!r} cannot be the mount point of a transit engine")

    def __repr__(self) -> str:
        return f"<VaultTransitWrapper {self._mount}/{self._key_name}>"

    async def wrap(self, key: Key) -> tuple[str, str]:
        """Have Vault encrypt a key; the reference is name and version of the transit key.

        Raises:
            KeyUnavailableError: Vault does not answer, is sealed, or refuses.
            ConfigurationError: Address or token is missing, there is no such engine or key, or it is not of a fit type.
        """

        def call() -> tuple[str, str]:
            with self._client() as client:
                answer = client.secrets.transit.encrypt_data(
                    self._key_name,
                    plaintext=key.to_base64(),
                    associated_data=_associated(key.kid),
                    mount_point=self._mount,
                )
            wrapped = str(answer["data"]["ciphertext"])
            form = _CIPHERTEXT.fullmatch(wrapped)
            if form is None:
                raise TypeError  # not an answer of Vault
            return wrapped, f"{self._key_name}:{form[1]}"

        def explain(problem: Exception) -> ControlPlaneError:
            if isinstance(problem, hvac_errors.InvalidRequest):
                return ConfigurationError(
                    f"Vault cannot wrap keys with the transit key {self._key_name!r}",
                    hint=f"It must exist, not be derived, and be of a type such as aes256-gcm96: {_GUIDE}.",
                )
            return self._explained(problem, "encrypt", self._key_name)

        return await ask(_SERVICE, call, explain)

    async def unwrap(self, kid: str, wrapped: str, kek_ref: str) -> Key:
        """Have Vault decrypt a wrapped key, with the transit key of the reference and with no other.

        Raises:
            KeyUnavailableError: Vault does not answer, is sealed, or refuses.
            UnknownKeyError: There is no such transit key any more, or not in this version.
            DecryptionError: The ciphertext or the reference was altered, or belongs to another key id.
            ConfigurationError: Address or token is missing, or there is no such engine.
        """
        reference = _REFERENCE.fullmatch(kek_ref)
        altered = damaged(kid, f"the transit key {kek_ref!r}")
        sealed = SecretStr(wrapped)
        del wrapped  # may be a plain key that got into the column
        if reference is None or not _CIPHERTEXT.fullmatch(sealed.get_secret_value()):
            raise altered

        def call() -> Key:
            with self._client() as client:
                answer = client.secrets.transit.decrypt_data(
                    reference[1],
                    ciphertext=sealed.get_secret_value(),
                    associated_data=_associated(kid),
                    mount_point=self._mount,
                )
            return Key.from_base64(kid, answer["data"]["plaintext"])

        def explain(problem: Exception) -> ControlPlaneError:
            said = " ".join(map(str, getattr(problem, "errors", None) or ()))  # looked at, and not passed on
            if _GONE.search(said):
                return UnknownKeyError(
                    f"the key {kid!r} is wrapped by the transit key {kek_ref!r}, which Vault does not have any more",
                    hint="If it is there: lower its min_decryption_version until the keys are rewrapped.",
                    details={"kid": kid, "kek_ref": kek_ref},
                )
            if isinstance(problem, hvac_errors.InvalidRequest | ConfigurationError) or _ALTERED in said:
                return altered
            return self._explained(problem, "decrypt", reference[1])

        return await ask(_SERVICE, call, explain)

    async def close(self) -> None:
        """Nothing to let go of: connections end with each call."""

    @contextmanager
    def _client(self) -> Iterator[Any]:
        if self._given is not None:
            yield self._given
            return
        if not (address := os.environ.get("VAULT_ADDR")):  # hvac would turn to localhost, without TLS
            raise _UnsetError("VAULT_ADDR")
        client = hvac.Client(url=address, namespace=os.environ.get("VAULT_NAMESPACE"), timeout=_ATTEMPT_SECONDS)
        try:
            if not client.token:
                raise _UnsetError("VAULT_TOKEN")
            yield client
        finally:
            client.adapter.close()

    def _explained(self, problem: Exception, action: str, key_name: str) -> ControlPlaneError:
        """Say what is wrong, without Vault's text: it may quote what was sent."""
        name = type(problem).__name__
        cases: list[tuple[type[Exception] | tuple[type[Exception], ...], ControlPlaneError]] = [
            (
                _UnsetError,
                ConfigurationError(f"{problem} is not set, so Vault cannot be asked", hint=f"To set it up {_GUIDE}."),
            ),
            (
                hvac_errors.Forbidden,
                KeyUnavailableError(
                    "Vault does not accept the token, or its policy does not allow this",
                    hint=f"Renew the token, and allow update on {self._mount}/{action}/{key_name}; "
                    f"a transit key that is not there looks the same: {_GUIDE}.",
                ),
            ),
            (
                hvac_errors.InvalidPath,
                ConfigurationError(
                    f"Vault has no transit engine at {self._mount!r}",
                    hint="Check CAR_CONTROL_PLANE_ENCRYPTION_VAULT_MOUNT and VAULT_NAMESPACE.",
                ),
            ),
            (
                (hvac_errors.VaultDown, hvac_errors.VaultNotInitialized),
                KeyUnavailableError("Vault is sealed, not initialised, or down for maintenance"),
            ),
            (
                (hvac_errors.VaultError, AttributeError, KeyError, TypeError),
                KeyUnavailableError(f"Vault gives no answer that can be used ({name})"),
            ),
            (
                requests.exceptions.SSLError,
                KeyUnavailableError("Vault's certificate is not trusted", hint="Set VAULT_CACERT."),
            ),
            (
                ValueError,  # an address or a token of no valid form
                ConfigurationError(f"Vault cannot be asked like that ({name})", hint="Check VAULT_ADDR and the token."),
            ),
            (
                requests.exceptions.RequestException,
                KeyUnavailableError(f"Vault cannot be reached ({name})", hint="Check VAULT_ADDR and the network."),
            ),
        ]
        other = ConfigurationError(f"the client of Vault cannot work ({name})", hint="Check VAULT_CACERT.")
        return next((error for kinds, error in cases if isinstance(problem, kinds)), other)


class _UnsetError(Exception):
    """A variable of the environment is missing."""


_GONE = re.compile(r"(?:encryption key|policy) not found|disallowed by policy|version is too new")
"""What Vault says, with status 400, when a transit key or a version of it is not there."""

_ALTERED: Final = "message authentication failed"
"""What Vault says when a ciphertext is not authentic: with status 400 or, from 1.4 on, 500 (hashicorp/vault#10842)."""


def _associated(kid: str) -> str:
    return base64.b64encode(kid.encode()).decode()
