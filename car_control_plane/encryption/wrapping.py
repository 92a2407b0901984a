"""Keys in the database, each wrapped by an outer key that is not there.

The table `encryption_keys` holds every key as ciphertext; a `KeyWrapper` opens it: with a key in a file, in AWS KMS, or in HashiCorp Vault. Changing
the outer key then rewraps a handful of rows instead of sealing a million connection strings anew.

This module knows nothing of the table: it is handed a `WrappedKeyStore`.
"""

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from pydantic import SecretStr

from car_control_plane.encryption.envelope import Key, lp, seal, unseal
from car_control_plane.encryption.providers import FileKeys, KeyInfo
from car_control_plane.encryption.values import KeyState
from car_control_plane.errors import (
    ConfigurationError,
    ControlPlaneError,
    DecryptionError,
    KeyUnavailableError,
    UnknownKeyError,
)

CALL_SECONDS = 20.0
"""How long one call to an outer service may take, its attempts, name resolution and finding of credentials included."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class WrappedKey:
    """A key as the table has it.

    Attributes:
        kid: Its id.
        state: What it may be used for.
        wrapper: Name of the `KeyWrapper` that opens it.
        kek_ref: Which outer key wraps it, in the wrapper's words.
        wrapped: The key as ciphertext; None once it is destroyed.
        check_value: `Key.check_value` of the key inside.
    """

    kid: str
    state: KeyState
    wrapper: str
    kek_ref: str
    wrapped: str | None = field(repr=False)
    check_value: str


class WrappedKeyStore(Protocol):
    """Where wrapped keys are kept: `EncryptionKeyStore`, over the table `encryption_keys`."""

    async def load(self) -> Sequence[WrappedKey]:
        """Return every wrapped key there is.

        Raises:
            ControlPlaneError: The database does not answer; whatever error that is.
        """
        ...


class KeyWrapper(Protocol):
    """An outer key, wherever it is: wraps keys and opens them again."""

    @property
    def name(self) -> str:
        """What the table calls this kind of wrapper: `local`, `aws-kms`, `vault-transit`."""
        ...

    async def wrap(self, key: Key) -> tuple[str, str]:
        """Return the key as ciphertext that opens for its id only, and which outer key did it.

        Raises:
            KeyUnavailableError: The outer service does not answer, or refuses.
        """
        ...

    async def unwrap(self, kid: str, wrapped: str, kek_ref: str) -> Key:
        """Open a wrapped key.

        Raises:
            KeyUnavailableError: The outer service does not answer, or refuses.
            UnknownKeyError: There is no such outer key any more.
            DecryptionError: The ciphertext was altered, or belongs to another key id.
        """
        ...

    async def close(self) -> None:
        """Let go of connections. Idempotent."""
        ...


class WrappedKeys:
    """Keys kept in the database, opened by an outer key. Keeps none: that is the `Keyring`'s business.

    Keys of another wrapper are listed, so that `car-cp key status` shows them, but not opened.

    Args:
        wrapper: The outer key; closed with this provider.
        store: Where the wrapped keys are.
    """

    def __init__(self, wrapper: KeyWrapper, store: WrappedKeyStore) -> None:
        self._wrapper = wrapper
        self._store = store

    @property
    def name(self) -> str:
        """The wrapper's name."""
        return self._wrapper.name

    def __repr__(self) -> str:
        return f"<WrappedKeys {self._wrapper!r}>"

    async def list(self) -> Sequence[KeyInfo]:
        """Return the keys of the table.

        Raises:
            ControlPlaneError: The database does not answer; whatever error that is.
        """
        return tuple(KeyInfo(row.kid, row.state) for row in await self._store.load())

    async def get(self, kid: str) -> Key:
        """Read one of them from the table, and have it opened.

        Raises:
            UnknownKeyError: There is no such key, it was destroyed, or the outer key that wraps it is gone.
            ConfigurationError: Another wrapper has wrapped it.
            DecryptionError: The row was altered, or holds another key than the one its check value was recorded for.
            KeyUnavailableError: The outer service does not answer, or refuses.
            ControlPlaneError: The database does not answer; whatever error that is.
        """
        row = next((row for row in await self._store.load() if row.kid == kid), None)
        if row is None or row.wrapped is None:
            raise UnknownKeyError(
                f"the key {kid!r} {'is not in the table of keys' if row is None else 'was destroyed'}",
                details={"kid": kid},
            )
        if row.wrapper != self._wrapper.name:
            raise ConfigurationError(
                f"the key {kid!r} is wrapped by {row.wrapper!r}, and this process opens keys with {self._wrapper.name!r}",
                hint="Set CAR_CONTROL_PLANE_ENCRYPTION_KEY_WRAPPER to the former, or rewrap the keys: car-cp key rewrap --from FORMER",
                details={"kid": kid},
            )
        key = await self._wrapper.unwrap(kid, row.wrapped, row.kek_ref)
        if key.check_value != row.check_value:
            raise DecryptionError(
                f"the table holds another key under the name {kid!r} than the one recorded for it",
                hint="Check the outer key of this process first. If it is the right one, restore the row of control_plane.encryption_keys from a backup.",
                details={"kid": kid},
            )
        return key

    async def close(self) -> None:
        """Close the wrapper. Idempotent."""
        await self._wrapper.close()


class LocalKeyWrapper:
    """Outer keys in a file of the same form and with the same checks as `FileKeys`: the current one wraps, all of them open.

    Args:
        path: The file; read again when it has changed.
    """

    name = "local"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._file = FileKeys(path)

    def __repr__(self) -> str:
        return f"<LocalKeyWrapper {self._file!r}>"

    async def wrap(self, key: Key) -> tuple[str, str]:
        """Wrap a key with the file's current one, whose id is the reference.

        Raises:
            ConfigurationError: The file is not of the form, or not its owner's alone.
            KeyUnavailableError: It cannot be read.
        """
        outer = next(info.kid for info in await self._file.list() if info.state is KeyState.CURRENT)
        return seal(await self._file.get(outer), key.to_base64(), _context(key.kid)), outer

    async def unwrap(self, kid: str, wrapped: str, kek_ref: str) -> Key:
        """Open a wrapped key with the outer key that wrapped it.

        Raises:
            UnknownKeyError: The file has no such outer key.
            DecryptionError: The ciphertext was altered, belongs to another key id, or the outer key is another one of the same name.
            ConfigurationError: As for `wrap`.
            KeyUnavailableError: As for `wrap`.
        """
        sealed = SecretStr(wrapped)
        del wrapped  # may be a plain key that got into the column
        if kek_ref not in {info.kid for info in await self._file.list() if info.state is not KeyState.DESTROYED}:
            raise UnknownKeyError(
                f"the key {kid!r} is wrapped by the outer key {kek_ref!r}, which the file {self._path} does not have",
                hint="Put the former outer key into the file again, below the current one, until the keys are rewrapped.",
                details={"kid": kid, "kek_ref": kek_ref},
            )
        key = _opened(await self._file.get(kek_ref), kid, sealed.get_secret_value())
        if key is None:
            problem = damaged(kid, f"the outer key {kek_ref!r}")
            raise problem
        return key

    async def close(self) -> None:
        """Forget what was read. Idempotent."""
        await self._file.close()


def _context(kid: str) -> bytes:
    return lp(b"encryption_keys.wrapped", kid.encode())


def _opened(outer: Key, kid: str, wrapped: str) -> Key | None:
    try:
        return Key.from_base64(kid, unseal(outer, wrapped, _context(kid)))
    except (DecryptionError, ConfigurationError):
        return None


def damaged(kid: str, outer: str) -> DecryptionError:
    """Say that a wrapped key does not open, though its outer key is there."""
    return DecryptionError(
        f"the wrapped key {kid!r} does not open with {outer}: that is another key than the one that wrapped it, or the row was altered",
        hint="Restore its row of control_plane.encryption_keys from a backup.",
        details={"kid": kid},
    )


async def ask(service: str, call: Callable[[], T], explain: Callable[[Exception], ControlPlaneError]) -> T:
    """Make a blocking call to an outer service in a thread, for `CALL_SECONDS` at most; a call given up ends by its own limits.

    Args:
        service: What messages call the service.
        call: Does it. Its result must print no secret.
        explain: Turns what `call` raises into one of ours. What was raised is dropped: its frames hold keys.
    """

    def guarded() -> T | ControlPlaneError:
        try:
            return call()
        except Exception as problem:
            return explain(problem)

    try:
        async with asyncio.timeout(CALL_SECONDS):
            outcome = await asyncio.to_thread(guarded)
    except TimeoutError:
        outcome = KeyUnavailableError(f"{service} has not answered for {CALL_SECONDS:g} seconds")
    if isinstance(outcome, ControlPlaneError):
        raise outcome
    return outcome
