"""Writes files of keys: adds a key to one, makes another key current.

Hides the form of the file, and how it is replaced: a new file of mode 0600, renamed over the old one, so that a process that reads meanwhile sees the
one or the other. Whoever writes makes that file first; a second writer finds it and is refused. Reading keys to use them is `FileKeys`' business.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import SecretStr

import car_control_plane as library
from car_control_plane.errors import AlreadyExistsError, ConfigurationError, ConflictError, UnknownKeyError

__all__ = ["add", "promote"]

_ENTRY = re.compile(r"([a-z0-9-]+)\s*:\s*([A-Za-z0-9+/=]*)(?::[a-z]*)?")
"""A key of a file that `FileKeys` has read."""


async def add(path: Path, key: "library.Key") -> "library.KeyState":
    """Add a key to a file, which is made when absent: as its current key when it is the first, else as a pending one.

    Every key of the file has its state spelled out afterwards; comments stay.

    Args:
        path: The file; a symbolic link is followed.
        key: The key.

    Returns:
        The key's state.

    Raises:
        AlreadyExistsError: The file has a key of this id.
        ConfigurationError: The file is not of the form, or not its owner's alone; or its directory is not there, or takes no new file.
        KeyUnavailableError: It cannot be read.
        ConflictError: Another process writes the file now.
        OSError: It cannot be written. As with every other error, the file is as it was.
    """
    with _writing(path) as (target, write):
        states = await _states(target)
        if key.kid in states:
            raise AlreadyExistsError(f"{path} has a key {key.kid!r} already", hint="Choose another --kid.")
        state = library.KeyState.PENDING if states else library.KeyState.CURRENT
        text = _restated(target, states) if states else SecretStr("")
        gap = "" if not states or text.get_secret_value().endswith("\n") else "\n"
        write(SecretStr(f"{text.get_secret_value()}{gap}{key.kid}:{key.to_base64()}:{state}\n"))
    return state


async def promote(path: Path, kid: str) -> str:
    """Make a key of a file the current one, and the one that was current a retired one.

    Args:
        path: The file; a symbolic link is followed.
        kid: The key's id.

    Returns:
        The id of the key that was current; `kid` itself when it was, and nothing is written.

    Raises:
        UnknownKeyError: The file has no such key, or it was destroyed.
        ConfigurationError: The file is not of the form, or not its owner's alone; or its directory is not there, or takes no new file.
        KeyUnavailableError: It cannot be read.
        ConflictError: Another process writes the file now.
        OSError: It cannot be written. As with every other error, the file is as it was.
    """
    with _writing(path) as (target, write):
        states = await _states(target)
        if states.get(kid, library.KeyState.DESTROYED) is library.KeyState.DESTROYED:
            raise UnknownKeyError(f"{path} has no key {kid!r}", details={"kid": kid})
        former = next(each for each, state in states.items() if state is library.KeyState.CURRENT)
        if former != kid:
            changes = {former: library.KeyState.RETIRED, kid: library.KeyState.CURRENT}
            write(_restated(target, {**states, **changes}))
    return former


async def _states(path: Path) -> dict[str, "library.KeyState"]:
    return {} if _is_new(path) else {info.kid: info.state for info in await library.FileKeys(path).list()}


def _is_new(path: Path) -> bool:
    """Whether there is no such file, or an empty one that was made for it."""
    return not path.exists() or (path.is_file() and path.stat().st_size == 0)


def _restated(path: Path, states: Mapping[str, "library.KeyState"]) -> SecretStr:
    """Return the text of the file with these states."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        entries, hash_, comment = line.partition("#")
        lines.append(_ENTRY.sub(lambda entry: f"{entry[1]}:{entry[2]}:{states[entry[1]]}", entries) + hash_ + comment)
    return SecretStr("".join(lines))


@contextmanager
def _writing(path: Path) -> Iterator[tuple[Path, Callable[[SecretStr], None]]]:
    """Keep other writers out, and give the file meant and what replaces its text."""
    target = path.resolve()
    new = target.with_name(f".{target.name}.new")
    fault = ""
    try:
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        descriptor = -1
    except OSError as problem:  # in its own words it names a file that nobody has asked for
        descriptor, fault = -1, problem.strerror or type(problem).__name__
    if fault and not target.parent.is_dir():
        raise ConfigurationError(
            f"{path} cannot be written: there is no directory {target.parent}",
            hint=f"Make it first, for its owner alone: mkdir -m 700 {target.parent}",
        )
    if fault:
        raise ConfigurationError(
            f"{path} cannot be written: {fault}",
            hint=f"Whoever changes keys needs the right to make files in {target.parent}.",
        )
    if descriptor < 0:
        raise ConflictError(
            f"another process is writing {path}", hint=f"If there is none, it was killed; remove {new} then."
        )
    file = os.fdopen(descriptor, "wb")
    ours = True

    def write(text: SecretStr) -> None:
        nonlocal ours
        library.StaticKeys(text.get_secret_value(), name=target.name)  # what could not be read is not written
        file.write(text.get_secret_value().encode())
        file.flush()
        os.fsync(descriptor)
        file.close()
        new.replace(target)
        ours = False  # from here on a file of this name is another writer's
        _settle(target.parent)

    try:
        yield target, write
    finally:
        file.close()
        if ours:
            with suppress(OSError):
                new.unlink()


def _settle(directory: Path) -> None:
    """Have the new name of the file survive a power failure, where directories can be synced."""
    if os.name == "posix":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
