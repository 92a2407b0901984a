"""Which source of keys the settings choose, and what they lack."""

import os
from pathlib import Path

import pytest

from car_control_plane.encryption import FileKeys, Key, Keyring, StaticKeys, WrappedKeys
from car_control_plane.encryption.sources import KeySettings, provider_from_settings, wrapper_from_settings
from car_control_plane.errors import ConfigurationError, KeyUnavailableError, MissingExtraError
from car_control_plane.settings import PREFIX, ControlPlaneSettings, load_settings
from tests.fixtures.leaks import failure_of, failure_of_call
from tests.fixtures.outer_services import MemoryStore, key_leaks

WRAPPERS = {
    "local": ("encryption_outer_key_file", "/run/secrets/outer", "LocalKeyWrapper", "<FileKeys /run/secrets/outer>"),
    "aws-kms": ("encryption_kms_key_id", "alias/tenants", "AwsKmsWrapper", "alias/tenants"),
    "vault-transit": ("encryption_vault_key", "tenants", "VaultTransitWrapper", "transit/tenants"),
}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable of ours, and a working directory without a `.env` file."""
    for name in list(os.environ):
        if name.upper().startswith(PREFIX):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def settings(**values: object) -> ControlPlaneSettings:
    return load_settings(**values)


def test_the_settings_of_the_program_are_the_ones_a_keyring_takes() -> None:
    taken: KeySettings = settings()  # mypy compares them too
    names = {name for name in vars(KeySettings) if name.startswith("encryption_")}
    assert names == {name for name in ControlPlaneSettings.model_fields if name.startswith("encryption_")}
    assert all(hasattr(taken, name) for name in names)


# --- each source ------------------------------------------------------------------------------------------------------


async def test_keys_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    key = Key.generate("2026-11")
    monkeypatch.setenv("CAR_CONTROL_PLANE_ENCRYPTION_KEYS", f"2026-11:{key.to_base64()}")
    async with Keyring.from_settings(settings()) as keys:
        assert isinstance(keys.provider, StaticKeys)
        assert keys.provider.name == "environment"
        assert await keys.current() == key


async def test_keys_of_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    key, path = Key.generate("2026-11"), tmp_path / "keys"
    path.write_text(f"2026-11:{key.to_base64()}\n")
    path.chmod(0o600)
    monkeypatch.setenv("CAR_CONTROL_PLANE_ENCRYPTION_KEY_FILE", str(path))
    async with Keyring.from_settings(settings()) as keys:
        assert isinstance(keys.provider, FileKeys)
        assert await keys.current() == key


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_keys(monkeypatch: pytest.MonkeyPatch, wrapper: str) -> None:
    companion, value, kind, shown = WRAPPERS[wrapper]
    monkeypatch.setenv("CAR_CONTROL_PLANE_ENCRYPTION_KEY_WRAPPER", wrapper)
    monkeypatch.setenv(f"CAR_CONTROL_PLANE_{companion.upper()}", value)
    keys = Keyring.from_settings(settings(), store=MemoryStore())
    assert isinstance(keys.provider, WrappedKeys)
    assert keys.provider.name == wrapper
    assert repr(keys.provider) == f"<WrappedKeys <{kind} {shown}>>"
    assert repr(wrapper_from_settings(settings())) == f"<{kind} {shown}>"


def test_the_mount_point_of_vault() -> None:
    chosen = settings(
        encryption_key_wrapper="vault-transit", encryption_vault_key="tenants", encryption_vault_mount="platform/keys"
    )
    assert repr(wrapper_from_settings(chosen)) == "<VaultTransitWrapper platform/keys/tenants>"


# --- what is set wrongly ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", [False, True], ids=["unset", "empty"])
def test_no_source_at_all_names_the_three(monkeypatch: pytest.MonkeyPatch, empty: bool) -> None:
    names = [f"CAR_CONTROL_PLANE_ENCRYPTION_{name}" for name in ("KEYS", "KEY_FILE", "KEY_WRAPPER")]
    if empty:  # a manifest with `value: ""` means none
        monkeypatch.setenv(names[0], "")
        monkeypatch.setenv(names[1], "")
    error = failure_of_call(lambda: Keyring.from_settings(settings()))
    assert type(error) is ConfigurationError
    assert all(name in error.hint for name in names)


@pytest.mark.parametrize("left_out", ["encryption_keys", "encryption_key_file", "encryption_key_wrapper", None])
def test_two_sources_are_refused_and_both_named(left_out: str | None) -> None:
    key = Key.generate("a")
    given = {
        "encryption_keys": f"a:{key.to_base64()}",
        "encryption_key_file": "keys",
        "encryption_key_wrapper": "local",
        "encryption_outer_key_file": "outer",
    }
    given.pop(left_out or "", None)
    error = failure_of_call(lambda: Keyring.from_settings(settings(**given), store=MemoryStore()))
    assert type(error) is ConfigurationError
    for name in ("encryption_keys", "encryption_key_file", "encryption_key_wrapper"):
        assert (f"CAR_CONTROL_PLANE_{name.upper()}" in error.message.split(": ")[1].split(" and ")) is (
            name != left_out
        )
    assert key_leaks(error, key) == []


@pytest.mark.parametrize("value", [None, ""], ids=["unset", "empty"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_setting_a_wrapper_lacks_is_named(wrapper: str, value: str | None) -> None:
    companion = WRAPPERS[wrapper][0]
    chosen = settings(encryption_key_wrapper=wrapper, **({} if value is None else {companion: value}))
    error = failure_of_call(lambda: Keyring.from_settings(chosen, store=MemoryStore()))
    assert type(error) is ConfigurationError
    assert f"CAR_CONTROL_PLANE_{companion.upper()}" in error.message


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_needs_its_table(wrapper: str) -> None:
    companion, value, *_ = WRAPPERS[wrapper]
    chosen = settings(encryption_key_wrapper=wrapper, **{companion: value})
    error = failure_of_call(lambda: provider_from_settings(chosen))
    assert type(error) is ConfigurationError
    assert "EncryptionKeyStore" in error.hint


def test_no_wrapper_is_made_when_none_is_set() -> None:
    with pytest.raises(ConfigurationError, match="ENCRYPTION_KEY_WRAPPER is not set"):
        wrapper_from_settings(settings())


def test_keys_that_are_none_are_refused_at_once_and_not_shown() -> None:
    chosen = settings(encryption_keys="2026-11:c4naryc4nary")
    error = failure_of_call(lambda: Keyring.from_settings(chosen))
    assert type(error) is ConfigurationError
    assert key_leaks(error, "c4naryc4nary") == []


async def test_a_file_that_is_not_there_shows_when_the_keyring_is_opened(tmp_path: Path) -> None:
    keys = Keyring.from_settings(settings(encryption_key_file=tmp_path / "none"))
    error = await failure_of(keys.open())
    assert type(error) is KeyUnavailableError
    assert "none" in error.message


def test_the_error_of_a_missing_library_is_an_import_error_too() -> None:
    assert issubclass(MissingExtraError, ImportError)
