"""Where keys come from: the protocol, and the two sources outside of the database, the environment and a file.

The latter are written alike, one key as `kid:base64`, several with commas or line breaks between them::

    2026-11:4ZkV…=            # the first one is current, the others only open
    2026-05:9aTq…=

or with states spelled out, `kid:base64:state`, so that a key can be handed to every process as `pending` before it becomes `current`. A destroyed key
may stay, as `kid::destroyed`, so that errors can say so. Behind a `#` is a comment.

Nothing here keeps time or gets over outages: that is the `Keyring`'s business.
"""

import asyncio
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from car_control_plane.encryption.envelope import Key
from car_control_plane.encryption.values import KeyState, is_kid
from car_control_plane.errors import ConfigurationError, KeyUnavailableError, UnknownKeyError

_MAX_FILE_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """A key as a provider lists it, without its bytes."""

    kid: str
    state: KeyState


class KeyProvider(Protocol):
    """Where keys come from. Ours are `StaticKeys`, `FileKeys` and `WrappedKeys`; a `Keyring` takes any.

    A keyring asks different things at once, but never the same thing twice at once, and gives up, by cancelling, only when it is closed: a provider
    limits by itself how long an answer may take. What it raises, when it is not an `EncryptionError` or a `ConfigurationError` of ours, counts as an
    outage.
    """

    @property
    def name(self) -> str:
        """What messages call this source, `environment` or `file` for example."""
        ...

    async def list(self) -> Sequence[KeyInfo]:
        """Return every key there is, at most one of them current; asks the source anew.

        Raises:
            KeyUnavailableError: The source does not answer.
            ConfigurationError: What it holds is not acceptable.
        """
        ...

    async def get(self, kid: str) -> Key:
        """Return one of the listed keys that are not destroyed.

        Raises:
            KeyUnavailableError: The source does not answer.
            UnknownKeyError: There is no such key any more.
        """
        ...

    async def close(self) -> None:
        """Let go of connections. Idempotent."""
        ...


class StaticKeys:
    """Keys given as text: from the environment, or by a program.

    Args:
        text: `kid:base64`, several with commas or line breaks between them.
        name: What messages call the source.

    Raises:
        ConfigurationError: The text is not of this form, or a key is not acceptable or there twice; the error names the entry by its number. Neither
            the error nor a frame of it holds the text.
    """

    def __init__(self, text: str, *, name: str = "environment") -> None:
        self.name = name
        outcome = _parsed(text, name)
        del text
        if isinstance(outcome, ConfigurationError):
            raise outcome
        self._infos, self._keys = outcome

    def __repr__(self) -> str:
        return f"<StaticKeys {self.name}: {', '.join(info.kid for info in self._infos)}>"

    async def list(self) -> Sequence[KeyInfo]:
        """Return the keys in the order written."""
        return self._infos

    async def get(self, kid: str) -> Key:
        """Return one of them.

        Raises:
            UnknownKeyError: There is none of this name, or it was destroyed.
        """
        if kid not in self._keys:
            raise UnknownKeyError(f"{self.name} has no key {kid!r}", details={"kid": kid})
        return self._keys[kid]

    async def close(self) -> None:
        """Nothing to let go of."""


class FileKeys:
    """Keys in a file that only its owner can read; read again when it has changed.

    Write a new file and rename it over the old one, so that no reader sees half of it. A symbolic link is followed: orchestrators mount secrets
    like that.

    Args:
        path: The file, of UTF-8 text; nothing is read before keys are asked for.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = "file"
        self._path = Path(path).absolute()  # a daemon may change its directory
        self._read: tuple[StaticKeys, FileStamp] | None = None

    def __repr__(self) -> str:
        return f"<FileKeys {self._path}>"

    async def list(self) -> Sequence[KeyInfo]:
        """Return the keys in the order written.

        Raises:
            ConfigurationError: The file is not of the form, or not its owner's alone (mode 0600 or 0400).
            KeyUnavailableError: It cannot be read.
        """
        return await (await self._keys()).list()

    async def get(self, kid: str) -> Key:
        """Return one of them.

        Raises:
            UnknownKeyError: There is none of this name, or it was destroyed.
            ConfigurationError: As for `list`.
            KeyUnavailableError: As for `list`.
        """
        return await (await self._keys()).get(kid)

    async def close(self) -> None:
        """Forget what was read. Idempotent."""
        self._read = None

    async def _keys(self) -> StaticKeys:
        known, stamp = self._read or (None, None)
        outcome = await asyncio.to_thread(_reread, self._path, known, stamp)
        if isinstance(outcome, ConfigurationError):
            raise outcome
        self._read = outcome
        return outcome[0]


FileStamp = tuple[int, ...]
"""Tells whether a file is the one read before."""


def read_secret_file(path: Path, *, unless: FileStamp | None = None) -> tuple[str | None, FileStamp]:
    """Read a file of secrets, and what tells whether it has changed since; None for the text when that is `unless`.

    Raises:
        ConfigurationError: Others than its owner may read it, it is no plain file, is too large for one, or is not UTF-8.
        KeyUnavailableError: It cannot be read.
    """
    problem: ConfigurationError | KeyUnavailableError
    try:
        # Opened first, so that what is checked is what is read; without waiting, for a pipe has no end.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            facts = os.fstat(descriptor)
            stamp = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_mode)
            fault = _file_fault(facts)
            if not fault and stamp == unless:
                return None, stamp
            if not fault:
                with os.fdopen(descriptor, "rb", closefd=False) as file:
                    return file.read(_MAX_FILE_BYTES).decode("utf-8-sig"), stamp
        finally:
            os.close(descriptor)
        problem = ConfigurationError(
            f"the key file {path} {fault}",
            hint="It must be a file of mode 0600 or 0400 of the user this process runs as.",
        )
    except UnicodeDecodeError:
        problem = ConfigurationError(f"the key file {path} is not UTF-8 text")
    except OSError as error:
        problem = KeyUnavailableError(
            f"the key file {path} cannot be read: {os.strerror(error.errno or 0)}", hint="Check the path and its owner."
        )
    raise problem


def _file_fault(facts: os.stat_result) -> str:
    if not stat.S_ISREG(facts.st_mode):
        return "is not a plain file"
    if facts.st_size > _MAX_FILE_BYTES:
        return "is too large to be one"
    if os.name == "posix" and facts.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        return f"can be read or written by others (mode {stat.S_IMODE(facts.st_mode):04o})"
    if os.name == "posix" and facts.st_uid not in {os.geteuid(), 0}:
        return "belongs to another user"
    return ""


def _reread(
    path: Path, known: StaticKeys | None, stamp: FileStamp | None
) -> tuple[StaticKeys, FileStamp] | ConfigurationError:
    text, stamp = read_secret_file(path, unless=stamp)
    if text is None and known is not None:
        return known, stamp
    try:
        return StaticKeys(text or "", name=f"the file {path}"), stamp
    except ConfigurationError as error:
        return error.with_traceback(None)  # from here on no frame has seen the text


def _parsed(text: str, name: str) -> tuple[tuple[KeyInfo, ...], dict[str, Key]] | ConfigurationError:
    try:
        return _parse(text)
    except ConfigurationError as error:
        return ConfigurationError(
            f"{name}: {error.message}",
            hint="Write kid:base64 for each key, the current one first; or for each kid:base64:state (pending, current, retired). "
            "Destroyed ones are kid::destroyed. Make a key with car-cp key generate.",
        )


def _parse(text: str) -> tuple[tuple[KeyInfo, ...], dict[str, Key]]:
    if not isinstance(text, str):
        raise ConfigurationError("the keys are not text")
    entries = [entry.strip() for line in text.splitlines() for entry in line.partition("#")[0].split(",")]
    entries = [entry for entry in entries if entry]
    if not entries:
        raise ConfigurationError("there is no key")
    infos: dict[str, KeyInfo] = {}
    keys: dict[str, Key] = {}
    stated: set[bool] = set()
    for number, entry in enumerate(entries, 1):
        kid, material, word = (part.strip() for part in [*entry.split(":", 2), "", ""][:3])
        if fault := _entry_fault(kid, material, word):
            raise ConfigurationError(f"entry {number} {fault}")
        if kid in infos:
            raise ConfigurationError(f"the key {kid!r} is there twice")
        if (
            word == KeyState.DESTROYED
        ):  # may stand among keys of either form: that is how the last step of a rotation is written
            infos[kid] = KeyInfo(kid, KeyState.DESTROYED)
            continue
        stated.add(bool(word))
        infos[kid] = KeyInfo(kid, KeyState(word) if word else KeyState.RETIRED if keys else KeyState.CURRENT)
        keys[kid] = _unlike(Key.from_base64(kid, material), keys)
    if len(stated) > 1:
        raise ConfigurationError("either every key has its state, or none has")
    if sum(info.state is KeyState.CURRENT for info in infos.values()) != 1:
        raise ConfigurationError("exactly one key must be current")
    return tuple(infos.values()), keys


def _entry_fault(kid: str, material: str, word: str) -> str:
    """Say what is wrong with an entry, without a piece of it: what is mistyped may be the key itself."""
    if not is_kid(kid):
        return "does not begin with an id (1 to 32 of a-z, 0-9 and -) and a colon"
    if word and word not in set(KeyState):
        return f"has a state that is none of {', '.join(KeyState)}"
    if word == KeyState.DESTROYED and material:
        return "is destroyed but still has its bytes: leave them out"
    return ""


def _unlike(key: Key, others: dict[str, Key]) -> Key:
    """Refuse a key whose bytes another one has: retiring one of them would then retire nothing."""
    if any(key.has_bytes_of(other) for other in others.values()):
        raise ConfigurationError(f"the key {key.kid!r} has the same bytes as one before it")
    return key
