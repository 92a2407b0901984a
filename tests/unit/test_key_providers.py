"""Where keys come from outside of the database: what is taken, what is refused, and that no refusal shows a key."""

import base64
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from car_control_plane.encryption import FileKeys, Key, KeyInfo, KeyState, StaticKeys
from car_control_plane.encryption.providers import read_secret_file
from car_control_plane.errors import ConfigurationError, KeyUnavailableError, UnknownKeyError
from tests.fixtures.leaks import failure_of, failure_of_call, leaks, shows

A, B, C = (base64.b64encode(bytes(range(start, start + 32))).decode() for start in (0, 100, 200))
CANARY = base64.b64encode(b"c4naryc4nary" + bytes(range(20))).decode()


async def states(keys: StaticKeys | FileKeys) -> list[str]:
    return [f"{info.kid}:{info.state}" for info in await keys.list()]


# --- text -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"a:{A}", ["a:current"]),
        (f"a:{A},b:{B},c:{C}", ["a:current", "b:retired", "c:retired"]),
        (f"a:{A}\nb:{B}\r\nc:{C}\n", ["a:current", "b:retired", "c:retired"]),
        (f"  a : {A} ,,\n\n # b:{B}\n b:{B} # the one before\n,", ["a:current", "b:retired"]),
        (f"a:{A}:pending, b:{B}:current, c:{C}:retired", ["a:pending", "b:current", "c:retired"]),
        (f"a:{A}:current\nb::destroyed\nc : : destroyed", ["a:current", "b:destroyed", "c:destroyed"]),
    ],
)
async def test_keys_as_text(text: str, expected: list[str]) -> None:
    keys = StaticKeys(text)
    assert await states(keys) == expected
    for info in await keys.list():
        if info.state is not KeyState.DESTROYED:
            assert await keys.get(info.kid) == Key.from_base64(info.kid, {"a": A, "b": B, "c": C}[info.kid])
    await keys.close()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "there is no key"),
        (" \n,, # a comment", "there is no key"),
        ("a", "the key 'a' has 0 bytes"),
        ("a:", "the key 'a' has 0 bytes"),
        (A, "entry 1 does not begin with an id"),
        (f":{A}", "entry 1 does not begin with an id"),
        (f"A:{A}", "entry 1 does not begin with an id"),
        (f"a:{A},{B}:b", "entry 2 does not begin with an id"),
        (f"a={A}", "entry 1 does not begin with an id"),
        ("a:" + base64.b64encode(bytes(range(31))).decode(), "'a' has 31 bytes"),
        ("a:" + base64.b64encode(bytes(range(33))).decode(), "'a' has 33 bytes"),
        ("a:" + A.rstrip("="), "'a' is not the base64"),
        ("a:" + A.replace("=", "!"), "'a' is not the base64"),
        ("a:" + A[:8] + " " + A[8:], "'a' is not the base64"),
        ("a:correct horse battery staple", "'a' is not the base64"),
        ("a:" + base64.b64encode(b"correct horse battery staple 123").decode(), "'a' is text, a passphrase"),
        ("a:" + base64.b64encode(bytes(32)).decode(), "'a' is one byte repeated"),
        (f"a:{A},a:{B}", "'a' is there twice"),
        (f"a:{A},a:{A}", "'a' is there twice"),
        (f"a:{A}:current,a::destroyed", "'a' is there twice"),
        (f"a:{A},b:{A}", "'b' has the same bytes"),
        (f"a:{A}:current,b:{B}:retired,c:{A}:pending", "'c' has the same bytes"),
        (f"a:{A}:current,b:{B}:current", "exactly one key must be current"),
        (f"a:{A}:pending,b:{B}:retired", "exactly one key must be current"),
        ("a::destroyed", "exactly one key must be current"),
        (f"a:{A}:current,b:{B}", "either every key has its state, or none"),
        (f"a:{A},b:{B}:retired", "either every key has its state, or none"),
        (f"a:{A}:current,b:{B}:", "either every key has its state, or none"),
        (f"a:{A}:Current", "entry 1 has a state that is none of pending, current, retired, destroyed"),
        (f"a:{A}:current:x", "entry 1 has a state that is none of"),
        (f"a:{A}:current,b:{B}:destroyed", "entry 2 is destroyed but still has its bytes"),
        (f"a::current,b:{B}:retired", "'a' has 0 bytes"),
        (None, "the keys are not text"),
        (SecretStr(f"a:{A}"), "the keys are not text"),
        (f"a:{A}".encode(), "the keys are not text"),
    ],
)
def test_keys_that_are_refused(text: Any, fault: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^source: .*{fault}") as caught:
        StaticKeys(text, name="source")
    assert "car-cp key generate" in caught.value.hint


@pytest.mark.parametrize(
    "text",
    [
        CANARY,
        f"a{CANARY}",
        f"a:{CANARY[:-4]}",
        f"{CANARY}:a",
        f"a:{CANARY},b:{CANARY}",
        f"a:{CANARY},a:{CANARY}",
        f"a:{A}:{CANARY}",
        f"a:{CANARY}:destroyed,b:{B}:current",
        f"a:{CANARY}:current,b:{B}",
        f"a:{CANARY}".encode(),
        SecretStr(CANARY),
    ],
)
def test_a_refusal_shows_no_key(text: Any) -> None:
    error = failure_of_call(lambda: StaticKeys(text))
    assert isinstance(error, ConfigurationError)
    assert error.__context__ is None
    for secret in (CANARY[:-4], "c4naryc4nary"):
        assert list(leaks(error, secret)) == []


async def test_keys_are_shown_by_name_only() -> None:
    keys = StaticKeys(f"a:{CANARY},b:{B}", name="program")
    assert repr(keys) == "<StaticKeys program: a, b>"
    for thing in (keys, vars(keys), await keys.list(), await keys.get("a")):
        for secret in (CANARY, "c4naryc4nary"):
            assert list(shows(thing, secret)) == []


async def test_a_key_that_is_not_there_is_unknown() -> None:
    keys = StaticKeys(f"a:{A}:current,b::destroyed")
    for kid in ("b", "c"):
        with pytest.raises(UnknownKeyError, match=f"environment has no key '{kid}'") as caught:
            await keys.get(kid)
        assert caught.value.details == {"kid": kid}


# --- a file -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "keys", f"a:{A}\nb:{B}\n")


def write(path: Path, text: str | bytes, mode: int = 0o600) -> Path:
    """Write a new file and rename it over the old one, as the documentation says."""
    new = path.with_name("new")
    new.write_bytes(text if isinstance(text, bytes) else text.encode())
    new.chmod(mode)
    return new.rename(path)


@contextmanager
def another_user() -> Iterator[None]:
    """Root may read every file; be somebody else for a while."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700])
async def test_keys_in_a_file(path: Path, mode: int) -> None:
    path.chmod(mode)
    keys = FileKeys(path)
    assert await states(keys) == ["a:current", "b:retired"]
    assert await keys.get("b") == Key.from_base64("b", B)
    assert (keys.name, repr(keys)) == ("file", f"<FileKeys {path}>")
    with pytest.raises(UnknownKeyError, match="no key 'c'"):
        await keys.get("c")
    for thing in (keys, vars(keys)):
        assert list(shows(thing, B)) == []


async def test_a_file_with_a_byte_order_mark(path: Path) -> None:
    write(path, f"\ufeffa:{A}\r\n")
    assert await states(FileKeys(str(path))) == ["a:current"]


async def test_the_file_is_found_after_a_change_of_directory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    keys = FileKeys(path.name)
    monkeypatch.chdir("/")
    assert len(await keys.list()) == 2


async def test_a_symbolic_link_is_followed_to_where_it_points_now(path: Path, tmp_path: Path) -> None:
    link, other = tmp_path / "link", write(tmp_path / "other", f"c:{C}")
    link.symlink_to(path)
    keys = FileKeys(link)
    assert await states(keys) == ["a:current", "b:retired"]
    link.unlink()
    link.symlink_to(other)
    assert await states(keys) == ["c:current"]


async def test_a_replaced_file_is_read_again_and_an_unchanged_one_is_not(path: Path) -> None:
    keys = FileKeys(path)
    first = await keys.get("a")
    assert await keys.get("a") is first
    write(path, f"a:{A}:retired\nc:{C}:current")
    assert await states(keys) == ["a:retired", "c:current"]
    assert await keys.get("a") == first
    assert await keys.get("a") is not first
    await keys.close()
    assert keys._read is None
    assert await keys.get("c") == Key.from_base64("c", C)


async def test_a_file_changed_in_its_place_to_the_same_size_is_read_again(path: Path) -> None:
    keys = FileKeys(path)
    assert await states(keys) == ["a:current", "b:retired"]
    before = path.stat()
    path.write_text(f"b:{B}\na:{A}\n", encoding="utf-8")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert await states(keys) == ["b:current", "a:retired"]


async def test_a_file_that_vanishes_is_an_outage_and_one_that_comes_back_is_not(path: Path) -> None:
    keys = FileKeys(path)
    await keys.list()
    away = path.rename(path.with_name("away"))
    for ask in (keys.list, lambda: keys.get("a")):
        with pytest.raises(KeyUnavailableError, match="No such file") as caught:
            await ask()
        assert caught.value.retryable
    away.rename(path)
    assert await states(keys) == ["a:current", "b:retired"]


async def test_a_file_whose_mode_changes_is_refused_at_once(path: Path) -> None:
    keys = FileKeys(path)
    await keys.list()
    path.chmod(0o640)
    with pytest.raises(ConfigurationError, match="mode 0640"):
        await keys.list()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o610, 0o601, 0o602, 0o660, 0o666, 0o644, 0o777])
async def test_a_file_that_others_can_reach_is_refused(path: Path, mode: int) -> None:
    path.chmod(mode)
    with pytest.raises(ConfigurationError, match=f"{path} can be read or written by others .mode {mode:04o}") as caught:
        await FileKeys(path).list()
    assert "0600" in caught.value.hint


async def test_a_file_of_another_user_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user = os.geteuid()
    if user == 0:
        os.chown(path, 65534, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    with pytest.raises(ConfigurationError, match="belongs to another user"):
        await FileKeys(path).list()


async def test_a_file_that_cannot_be_read_is_an_outage(path: Path) -> None:
    path.chmod(0)
    with another_user(), pytest.raises(KeyUnavailableError, match="Permission denied"):
        read_secret_file(path)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir(0o700)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (directory, "is not a plain file"),
        (pipe, "is not a plain file"),
        (lambda path: write(path, b"#" * 1_000_001), "is too large"),
        (lambda path: write(path, b"a:\xff"), "is not UTF-8"),
        (lambda path: write(path, f"a:{A}".encode("utf-16")), "is not UTF-8"),
        (lambda path: write(path, ""), "there is no key"),
        (lambda path: write(path, f"a:{A}\nb:{A}"), "same bytes"),
    ],
)
async def test_what_is_no_file_of_keys(path: Path, spoil: Callable[[Path], object], fault: str) -> None:
    spoil(path)
    with pytest.raises(ConfigurationError, match=f"{path}.* {fault}"):
        await FileKeys(path).list()


async def test_a_file_of_the_largest_size_is_read(path: Path) -> None:
    write(path, f"a:{A}\n".ljust(1_000_000, "#"))
    assert len(await FileKeys(path).list()) == 1


async def test_devices_are_refused() -> None:
    for device in ("/dev/null", "/dev/zero"):
        with pytest.raises(ConfigurationError, match="is not a plain file"):
            await FileKeys(device).list()


@pytest.mark.parametrize(
    "content",
    [
        CANARY.encode(),
        f"a:{CANARY}\nb:{CANARY}".encode(),
        f"a:{CANARY}:nonsense".encode(),
        f"a:{CANARY}\n".encode() + b"\xff",
    ],
)
async def test_a_refusal_of_a_file_shows_no_key(path: Path, content: bytes) -> None:
    write(path, content)
    keys = FileKeys(path)
    for work in (keys.list(), keys.get("a")):
        error = await failure_of(work)
        assert isinstance(error, ConfigurationError)
        for secret in (CANARY, "c4naryc4nary"):
            assert list(leaks(error, secret)) == []


def test_a_secret_file_is_read_once_per_change(path: Path) -> None:
    text, stamp = read_secret_file(path)
    assert text == path.read_text(encoding="utf-8")
    assert read_secret_file(path, unless=stamp) == (None, stamp)
    write(path, "other")
    assert read_secret_file(path, unless=stamp)[0] == "other"


def test_key_infos_are_plain_facts() -> None:
    assert KeyInfo("a", KeyState.CURRENT) == KeyInfo("a", KeyState("current"))
    assert [*KeyState] == ["pending", "current", "retired", "destroyed"]


@pytest.mark.parametrize("place", ["before", "after"])
async def test_a_destroyed_key_may_stand_among_keys_without_a_state(place: str) -> None:
    """The last step of a rotation is one line, whatever form the others have."""
    kept, gone = f"new:{Key.generate('new').to_base64()}", "former::destroyed"
    keys = StaticKeys("\n".join([gone, kept] if place == "before" else [kept, gone]))
    states = {info.kid: info.state for info in await keys.list()}
    assert states == {"new": KeyState.CURRENT, "former": KeyState.DESTROYED}


def test_destroyed_keys_alone_are_none() -> None:
    with pytest.raises(ConfigurationError, match="exactly one key must be current"):
        StaticKeys("a::destroyed, b::destroyed")
