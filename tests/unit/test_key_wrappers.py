"""Wrapped keys: what a table of them opens, and the outer keys in a file."""

import os
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from car_control_plane.encryption import (
    Key,
    KeyInfo,
    Keyring,
    KeyState,
    LocalKeyWrapper,
    WrappedKeys,
    keyring as keyring_module,
)
from car_control_plane.encryption.envelope import lp, seal
from car_control_plane.encryption.wrapping import ask
from car_control_plane.errors import (
    ConfigurationError,
    ConnectionUnavailableError,
    ControlPlaneError,
    DecryptionError,
    KeyUnavailableError,
    UnknownKeyError,
)
from car_control_plane.settings import load_settings
from tests.fixtures.leaks import failure_of
from tests.fixtures.outer_services import MemoryStore, key_leaks

PLACE = {"tenant_id": uuid.UUID(int=1), "database_id": uuid.UUID(int=2)}


def written(path: Path, *keys: Key, mode: int = 0o600) -> Path:
    path.unlink(missing_ok=True)
    path.write_text("".join(f"{key.kid}:{key.to_base64()}\n" for key in keys))
    path.chmod(mode)
    return path


@pytest.fixture
def outer() -> Key:
    return Key.generate("outer-1")


@pytest.fixture
def file(tmp_path: Path, outer: Key) -> Path:
    return written(tmp_path / "outer.keys", outer)


@pytest.fixture
def wrapper(file: Path) -> LocalKeyWrapper:
    return LocalKeyWrapper(file)


def keyring(store: MemoryStore, file: Path) -> Keyring:
    settings = load_settings(
        encryption_key_wrapper="local",
        encryption_outer_key_file=file,
        encryption_cache_seconds=300,
        encryption_outage_seconds=3600,
    )
    return Keyring.from_settings(settings, store=store)


async def refused(work: Any, kind: type[ControlPlaneError], *keys: Key | str) -> ControlPlaneError:
    error = await failure_of(work)
    assert type(error) is kind, repr(error)
    assert key_leaks(error, *keys) == []
    return error


# --- outer keys in a file ---------------------------------------------------------------------------------------------


async def test_a_key_is_wrapped_with_the_current_outer_key_and_opens_again(
    wrapper: LocalKeyWrapper, file: Path
) -> None:
    key = Key.generate("a")
    wrapped, kek_ref = await wrapper.wrap(key)
    assert kek_ref == "outer-1"
    assert wrapped.startswith("ccp1:outer-1:")
    assert key.to_base64() not in wrapped
    assert await wrapper.unwrap("a", wrapped, kek_ref) == key
    assert str(file) in repr(wrapper)


async def test_every_wrapping_is_another_ciphertext(wrapper: LocalKeyWrapper) -> None:
    key = Key.generate("a")
    assert (await wrapper.wrap(key))[0] != (await wrapper.wrap(key))[0]


async def test_a_former_outer_key_opens_and_the_new_one_wraps(wrapper: LocalKeyWrapper, file: Path, outer: Key) -> None:
    key, newer = Key.generate("a"), Key.generate("outer-2")
    wrapped, kek_ref = await wrapper.wrap(key)
    written(file, newer, outer)
    assert (await wrapper.wrap(key))[1] == "outer-2"
    assert await wrapper.unwrap("a", wrapped, kek_ref) == key
    written(file, newer)
    error = await refused(wrapper.unwrap("a", wrapped, kek_ref), UnknownKeyError, key, outer, newer)
    assert error.details == {"kid": "a", "kek_ref": "outer-1"}
    assert "'outer-1'" in error.message


async def test_the_outer_key_that_is_current_wraps_wherever_it_stands(wrapper: LocalKeyWrapper, file: Path) -> None:
    states = {"outer-1": "retired", "outer-2": "pending", "outer-3": "current"}
    file.write_text("".join(f"{kid}:{Key.generate(kid).to_base64()}:{state}\n" for kid, state in states.items()))
    key = Key.generate("a")
    wrapped, kek_ref = await wrapper.wrap(key)
    assert kek_ref == "outer-3"
    assert await wrapper.unwrap("a", wrapped, kek_ref) == key


async def test_a_closed_wrapper_has_forgotten_its_keys(wrapper: LocalKeyWrapper) -> None:
    await wrapper.wrap(Key.generate("a"))
    assert "outer-1" in repr(vars(wrapper._file))
    await wrapper.close()
    await wrapper.close()
    assert "outer-1" not in repr(vars(wrapper._file))


async def test_a_destroyed_outer_key_is_unknown(wrapper: LocalKeyWrapper, file: Path) -> None:
    wrapped, kek_ref = await wrapper.wrap(Key.generate("a"))
    file.write_text(f"outer-2:{Key.generate('x').to_base64()}:current\nouter-1::destroyed\n")
    error = await refused(wrapper.unwrap("a", wrapped, kek_ref), UnknownKeyError)
    assert error.details == {"kid": "a", "kek_ref": "outer-1"}


@pytest.mark.parametrize(
    "case", ["another id", "altered", "plain", "empty", "another key", "no key", "another context"]
)
async def test_what_does_not_open_is_damage(wrapper: LocalKeyWrapper, file: Path, outer: Key, case: str) -> None:
    key = Key.generate("a")
    wrapped, kek_ref = await wrapper.wrap(key)
    if case == "another key":
        written(file, Key.generate("outer-1"))
    context = lp(b"encryption_keys.wrapped", b"a")
    wrapped = {
        "altered": wrapped[:-2] + ("A" if wrapped[-2] != "A" else "B") + wrapped[-1],
        "plain": key.to_base64(),
        "empty": "",
        "no key": seal(outer, "c4naryc4nary", context),
        "another context": seal(outer, key.to_base64(), lp(b"tenant_databases.connection_string", b"a")),
    }.get(case, wrapped)
    work = wrapper.unwrap("b" if case == "another id" else "a", wrapped, kek_ref)
    error = await refused(work, DecryptionError, key, outer, "c4naryc4nary")
    assert error.details == {"kid": "b" if case == "another id" else "a"}


async def test_the_outer_key_wraps_under_the_documented_context(wrapper: LocalKeyWrapper, outer: Key) -> None:
    key = Key.generate("a")
    sealed = seal(outer, key.to_base64(), lp(b"encryption_keys.wrapped", b"a"))
    assert await wrapper.unwrap("a", sealed, "outer-1") == key


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
async def test_a_file_others_can_read_is_refused(wrapper: LocalKeyWrapper, file: Path, outer: Key, mode: int) -> None:
    key = Key.generate("a")
    wrapped, kek_ref = await wrapper.wrap(key)
    file.chmod(mode)
    assert f"{mode:04o}" in (await refused(wrapper.wrap(key), ConfigurationError, key, outer)).message
    await refused(wrapper.unwrap("a", wrapped, kek_ref), ConfigurationError, key, outer)


@pytest.mark.parametrize("text", ["", "outer-1", "outer-1:c4naryc4nary", "# nothing\n"])
async def test_a_file_without_a_key_is_refused(wrapper: LocalKeyWrapper, file: Path, text: str) -> None:
    file.write_text(text)
    await refused(wrapper.wrap(Key.generate("a")), ConfigurationError, "c4naryc4nary")


async def test_a_file_that_is_not_there_is_an_outage(tmp_path: Path) -> None:
    await refused(LocalKeyWrapper(tmp_path / "none").wrap(Key.generate("a")), KeyUnavailableError)


# --- a table of wrapped keys ------------------------------------------------------------------------------------------


async def test_the_keys_of_the_table_are_listed_with_their_states(wrapper: LocalKeyWrapper) -> None:
    store = MemoryStore()
    keys = WrappedKeys(wrapper, store)
    assert await keys.list() == ()
    for state in KeyState:
        await store.add(Key.generate(state), wrapper, state)
    assert await keys.list() == tuple(KeyInfo(state, state) for state in KeyState)
    assert (keys.name, repr(keys)) == ("local", f"<WrappedKeys {wrapper!r}>")


async def test_a_key_of_the_table_is_opened(wrapper: LocalKeyWrapper) -> None:
    store, key = MemoryStore(), Key.generate("a")
    await store.add(key, wrapper)
    keys = WrappedKeys(wrapper, store)
    assert await keys.get("a") == key
    await keys.close()
    await keys.close()


async def test_a_change_of_the_table_is_seen_at_once(wrapper: LocalKeyWrapper, file: Path) -> None:
    store, key = MemoryStore(), Key.generate("a")
    row = await store.add(key, wrapper)
    keys = WrappedKeys(wrapper, store)
    await keys.list()
    written(file, Key.generate("outer-2"))
    await refused(keys.get("a"), UnknownKeyError, key)
    store.rows["a"] = replace(row, wrapped=(await wrapper.wrap(key))[0], kek_ref="outer-2")
    assert await keys.get("a") == key


async def test_a_key_that_is_not_there_or_destroyed_is_unknown(wrapper: LocalKeyWrapper) -> None:
    store, key = MemoryStore(), Key.generate("gone")
    row = await store.add(key, wrapper, KeyState.DESTROYED)
    store.rows["gone"] = replace(row, wrapped=None)
    keys = WrappedKeys(wrapper, store)
    assert "not in the table" in (await refused(keys.get("none"), UnknownKeyError)).message
    error = await refused(keys.get("gone"), UnknownKeyError)
    assert "destroyed" in error.message
    assert error.details == {"kid": "gone"}


async def test_a_key_of_another_wrapper_is_listed_and_not_opened(wrapper: LocalKeyWrapper) -> None:
    store, key = MemoryStore(), Key.generate("a")
    store.rows["a"] = replace(await store.add(key, wrapper), wrapper="aws-kms")
    keys = WrappedKeys(wrapper, store)
    assert await keys.list() == (KeyInfo("a", KeyState.CURRENT),)
    error = await refused(keys.get("a"), ConfigurationError, key)
    assert "'aws-kms'" in error.message
    assert "'local'" in error.message
    assert error.details == {"kid": "a"}


async def test_another_key_than_the_one_recorded_is_refused(wrapper: LocalKeyWrapper) -> None:
    """Whoever can write the table, and wrap, cannot put a key of theirs under the name of ours unnoticed."""
    store, key = MemoryStore(), Key.generate("a")
    row = await store.add(key, wrapper)
    other = Key.generate("a")
    store.rows["a"] = replace(row, wrapped=(await wrapper.wrap(other))[0])
    error = await refused(WrappedKeys(wrapper, store).get("a"), DecryptionError, key, other)
    assert "'a'" in error.message
    assert error.details == {"kid": "a"}


async def test_a_row_prints_no_ciphertext(wrapper: LocalKeyWrapper) -> None:
    row = await MemoryStore().add(Key.generate("a"), wrapper)
    assert str(row.wrapped) not in repr(row)


async def test_a_table_that_does_not_answer_passes_its_error_on(wrapper: LocalKeyWrapper) -> None:
    store = MemoryStore()
    store.failure = ConnectionUnavailableError()
    keys = WrappedKeys(wrapper, store)
    await refused(keys.list(), ConnectionUnavailableError)
    await refused(keys.get("a"), ConnectionUnavailableError)


# --- with a keyring on top --------------------------------------------------------------------------------------------


async def test_a_keyring_seals_with_wrapped_keys(wrapper: LocalKeyWrapper, file: Path) -> None:
    store = MemoryStore()
    await store.add(Key.generate("2026-05"), wrapper, KeyState.RETIRED)
    await store.add(Key.generate("2026-11"), wrapper)
    async with keyring(store, file) as keys:
        sealed = await keys.seal("postgresql://u:p@h/d", **PLACE)
        assert sealed.kid == "2026-11"
        assert (await keys.unseal(sealed, **PLACE)).reveal() == "postgresql://u:p@h/d"
        assert (await keys.get("2026-05")).kid == "2026-05"


async def test_a_bad_key_of_the_table_does_not_stop_the_others(wrapper: LocalKeyWrapper, file: Path) -> None:
    store = MemoryStore()
    store.rows["bad"] = replace(await store.add(Key.generate("bad"), wrapper, KeyState.RETIRED), wrapped="ccp1:x:AAAA")
    await store.add(Key.generate("good"), wrapper)
    async with keyring(store, file) as keys:
        await refused(keys.get("bad"), DecryptionError)
        assert (await keys.seal("x", **PLACE)).kid == "good"


@pytest.mark.parametrize("lost", ["table", "mode", "file"])
async def test_over_an_outage_opened_keys_open_and_nothing_is_sealed(
    wrapper: LocalKeyWrapper, file: Path, outer: Key, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    clock, store, key = [0.0], MemoryStore(), Key.generate("a")
    monkeypatch.setattr(keyring_module, "_now", lambda: clock[0])
    await store.add(key, wrapper)
    async with keyring(store, file) as keys:
        sealed = await keys.seal("postgresql://u:c4naryc4nary@h/d", **PLACE)
        if lost == "table":
            store.failure = ConnectionUnavailableError()
        elif lost == "file":
            file.unlink()
        else:
            file.chmod(0o644)
        kind = ConfigurationError if lost == "mode" else KeyUnavailableError
        clock[0] = 301
        assert (await keys.unseal(sealed, **PLACE)).reveal() == "postgresql://u:c4naryc4nary@h/d"
        await refused(keys.seal("postgresql://u:c4naryc4nary@h/d", **PLACE), kind, key, outer, "c4naryc4nary")
        clock[0] = 3901
        await refused(keys.unseal(sealed, **PLACE), kind, key, outer)
        store.failure = None
        written(file, outer)
        clock[0] = 4000
        await keys.unseal(sealed, **PLACE)
        assert (await keys.seal("x", **PLACE)).kid == "a"


# --- asking a service -------------------------------------------------------------------------------------------------


async def test_what_a_call_raises_is_explained_and_dropped() -> None:
    def call() -> None:
        secret = "c4naryc4nary"  # noqa: F841 -- in a frame of the error
        raise OSError("c4naryc4nary")

    error = await refused(
        ask("X", call, lambda problem: KeyUnavailableError(type(problem).__name__)), KeyUnavailableError
    )
    assert (str(error), error.__context__, error.__cause__) == ("OSError", None, None)
