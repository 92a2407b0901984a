"""Keys wrapped by Vault's transit engine: hvac over real HTTP, against a server that answers as Vault documents."""

import asyncio
import base64
import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hvac
import pytest

from car_control_plane.connection import AsyncConnectionManager
from car_control_plane.encryption import (
    Key,
    Keyring,
    KeyState,
    VaultTransitWrapper,
    WrappedKeys,
    keyring as keyring_module,
    vault,
    wrapping,
)
from car_control_plane.errors import (
    ConfigurationError,
    ControlPlaneError,
    DecryptionError,
    KeyUnavailableError,
    MissingExtraError,
    UnknownKeyError,
)
from car_control_plane.repositories import EncryptionKeyRepository, EncryptionKeyStore
from car_control_plane.settings import load_settings
from tests.fixtures.leaks import failure_of, failure_of_call
from tests.fixtures.outer_services import Answer, MemoryStore, Request, Service, Transit, key_leaks, service

TOKEN = "hvs.c4naryc4nary"
PLACE = {"tenant_id": uuid.UUID(int=1), "database_id": uuid.UUID(int=2)}


@pytest.fixture
def engine() -> Transit:
    """A transit engine with one key, `tenants`."""
    engine = Transit(token=TOKEN)
    engine.rotate("tenants")
    return engine


@pytest.fixture
def server(engine: Transit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Service]:
    """The engine on HTTP, named by the variables Vault's clients read."""
    with service(engine) as server:
        monkeypatch.setenv("VAULT_ADDR", server.url)
        monkeypatch.setenv("VAULT_TOKEN", TOKEN)
        monkeypatch.delenv("VAULT_NAMESPACE", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("USERPROFILE", str(tmp_path))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server


def keyring(store: MemoryStore, **settings: Any) -> Keyring:
    chosen = load_settings(encryption_key_wrapper="vault-transit", encryption_vault_key="tenants", **settings)
    return Keyring.from_settings(chosen, store=store)


async def refused(work: Any, kind: type[ControlPlaneError], *secrets: Key | str) -> ControlPlaneError:
    error = await failure_of(work)
    assert type(error) is kind, repr(error)
    assert key_leaks(error, TOKEN, *secrets) == []
    return error


# --- wrapping and opening ---------------------------------------------------------------------------------------------


async def test_a_key_is_wrapped_under_its_id_and_opens_again(server: Service) -> None:
    wrapper, key = VaultTransitWrapper("tenants"), Key.generate("2026-11")
    wrapped, kek_ref = await wrapper.wrap(key)
    assert wrapped.startswith("vault:v1:")
    assert kek_ref == "tenants:v1"
    assert await wrapper.unwrap("2026-11", wrapped, kek_ref) == key
    assert [request.path for request in server.requests] == [
        "/v1/transit/encrypt/tenants",
        "/v1/transit/decrypt/tenants",
    ]
    for request in server.requests:
        assert base64.b64decode(request.body["associated_data"]) == b"2026-11"
        assert request.headers["X-Vault-Request"] == "true"
    await wrapper.close()
    await wrapper.close()


async def test_a_wrapped_key_opens_under_no_other_id(server: Service) -> None:
    wrapper, key = VaultTransitWrapper("tenants"), Key.generate("a")
    wrapped, kek_ref = await wrapper.wrap(key)
    error = await refused(wrapper.unwrap("b", wrapped, kek_ref), DecryptionError, key)
    assert "'b'" in error.message
    assert error.details == {"kid": "b"}


@pytest.mark.parametrize("status", [400, 500], ids=["as documented", "as Vault 1.6 had it"])
@pytest.mark.parametrize("alter", ["altered", "cut", "plain", "characters", "reference", "path"])
async def test_an_altered_row_is_damage_and_no_outage(
    server: Service, engine: Transit, alter: str, status: int
) -> None:
    engine.status_of_forgery = status
    wrapper, key = VaultTransitWrapper("tenants"), Key.generate("a")
    wrapped, kek_ref = await wrapper.wrap(key)
    other = "A" if wrapped[20] != "A" else "B"
    wrapped, kek_ref = {
        "altered": (wrapped[:20] + other + wrapped[21:], kek_ref),
        "cut": (wrapped[:40], kek_ref),
        "plain": (key.to_base64(), kek_ref),
        "characters": (wrapped[:20] + "§" + wrapped[21:], kek_ref),
        "reference": (wrapped, ""),
        "path": (wrapped, "../../sys/raw:v1"),
    }[alter]
    before = len(server.requests)
    await refused(wrapper.unwrap("a", wrapped, kek_ref), DecryptionError, key)
    assert len(server.requests) - before == (1 if alter in {"altered", "cut"} else 0)


async def test_what_vault_opens_must_be_a_key(server: Service) -> None:
    server.answer = lambda _: Transit._data(plaintext=base64.b64encode(b"c4naryc4nary").decode())
    error = await refused(VaultTransitWrapper("tenants").unwrap("a", "vault:v1:AAAA", "tenants:v1"), DecryptionError)
    assert key_leaks(error, "c4naryc4nary", base64.b64encode(b"c4naryc4nary").decode()) == []


# --- the transit key changes ------------------------------------------------------------------------------------------


async def test_a_new_version_wraps_and_the_former_opens_until_it_is_disallowed(
    server: Service, engine: Transit
) -> None:
    wrapper, key = VaultTransitWrapper("tenants"), Key.generate("a")
    wrapped, kek_ref = await wrapper.wrap(key)
    engine.rotate("tenants")
    again, newer_ref = await wrapper.wrap(key)
    assert (kek_ref, newer_ref) == ("tenants:v1", "tenants:v2")
    assert again.startswith("vault:v2:")
    assert await wrapper.unwrap("a", wrapped, kek_ref) == await wrapper.unwrap("a", again, newer_ref) == key
    engine.least_version["tenants"] = 2
    error = await refused(wrapper.unwrap("a", wrapped, kek_ref), UnknownKeyError, key)
    assert error.details == {"kid": "a", "kek_ref": "tenants:v1"}
    assert await wrapper.unwrap("a", again, newer_ref) == key


async def test_after_a_change_of_the_setting_the_former_key_still_opens(server: Service, engine: Transit) -> None:
    key = Key.generate("a")
    wrapped, kek_ref = await VaultTransitWrapper("tenants").wrap(key)
    engine.rotate("newer")
    assert await VaultTransitWrapper("newer").unwrap("a", wrapped, kek_ref) == key
    del engine.versions["tenants"]
    await refused(VaultTransitWrapper("newer").unwrap("a", wrapped, kek_ref), UnknownKeyError, key)


async def test_a_ciphertext_of_a_version_vault_does_not_have_names_an_unknown_key(server: Service) -> None:
    wrapped, _ = await VaultTransitWrapper("tenants").wrap(Key.generate("a"))
    newer = wrapped.replace("vault:v1:", "vault:v7:")
    await refused(VaultTransitWrapper("tenants").unwrap("a", newer, "tenants:v7"), UnknownKeyError)


async def test_the_transit_key_is_changed_while_a_process_runs(
    server: Service, engine: Transit, manager: AsyncConnectionManager
) -> None:
    """The steps of docs/how-to/keys-in-vault.md, on the table."""
    wrapper, store, key = VaultTransitWrapper("tenants"), EncryptionKeyStore(manager), Key.generate("a")
    async with manager.get_session() as session:
        await EncryptionKeyRepository(session).create(key, wrapper, state=KeyState.CURRENT)
    process = WrappedKeys(wrapper, store)
    assert await process.get("a") == key

    engine.rotate("tenants")
    engine.rotate("newer")
    for name in ("tenants", "newer"):
        async with manager.get_session() as session:
            assert await EncryptionKeyRepository(session).rewrap(VaultTransitWrapper(name)) == 1
        (row,) = await store.load()
        assert row.kek_ref == f"{name}:v{len(engine.versions[name])}"
        assert await process.get("a") == key  # whose own setting is the former one

    del engine.versions["tenants"]
    assert await process.get("a") == key
    engine.sealed = True
    await refused(process.get("a"), KeyUnavailableError, key)


async def test_keys_are_opened_side_by_side(server: Service) -> None:
    wrapper, keys = VaultTransitWrapper("tenants"), [Key.generate(f"key-{number}") for number in range(8)]
    wrapped = await asyncio.gather(*(wrapper.wrap(key) for key in keys))
    opened = await asyncio.gather(*(wrapper.unwrap(key.kid, *row) for key, row in zip(keys, wrapped, strict=True)))
    assert opened == keys


# --- what is set up wrongly -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "a/b", "../a", "a b", ".a", "ä"])
def test_a_name_vault_does_not_take_is_refused_at_once(name: str) -> None:
    with pytest.raises(ConfigurationError, match="name of a transit key"):
        VaultTransitWrapper(name)


@pytest.mark.parametrize("mount", ["", "/", "a//b", "a/../b", "..", "a b"])
def test_a_mount_point_vault_does_not_take_is_refused_at_once(mount: str) -> None:
    with pytest.raises(ConfigurationError, match="mount point"):
        VaultTransitWrapper("a", mount_point=mount)


async def test_the_mount_point_and_the_namespace_are_used(
    server: Service, engine: Transit, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.mount, engine.namespace = "platform/keys", "team"
    monkeypatch.setenv("VAULT_NAMESPACE", "team")
    wrapper, key = VaultTransitWrapper("tenants", mount_point="/platform/keys/"), Key.generate("a")
    assert repr(wrapper) == "<VaultTransitWrapper platform/keys/tenants>"
    assert await wrapper.unwrap("a", *await wrapper.wrap(key)) == key


async def test_another_mount_point_is_said_to_be_none(server: Service) -> None:
    wrapper, key = VaultTransitWrapper("tenants", mount_point="other"), Key.generate("a")
    assert "'other'" in (await refused(wrapper.wrap(key), ConfigurationError, key)).message
    error = await refused(wrapper.unwrap("a", "vault:v1:AAAA", "tenants:v1"), ConfigurationError, key)
    assert "'other'" in error.message


@pytest.mark.parametrize("variable", ["VAULT_ADDR", "VAULT_TOKEN"])
async def test_a_missing_variable_is_named(server: Service, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.delenv(variable)
    error = await refused(VaultTransitWrapper("tenants").wrap(Key.generate("a")), ConfigurationError)
    assert variable in error.message
    assert server.requests == []


async def test_the_token_of_the_home_directory_is_read_for_every_call(
    server: Service, engine: Transit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("VAULT_TOKEN")
    wrapper, key = VaultTransitWrapper("tenants"), Key.generate("a")
    (tmp_path / ".vault-token").write_text(TOKEN)
    wrapped = await wrapper.wrap(key)
    engine.token = "hvs.renewed"
    await refused(wrapper.unwrap("a", *wrapped), KeyUnavailableError, key)
    (tmp_path / ".vault-token").write_text("hvs.renewed")
    assert await wrapper.unwrap("a", *wrapped) == key


@pytest.mark.parametrize(
    ("variable", "value"),
    [("VAULT_ADDR", "vault.example"), ("VAULT_ADDR", "http://[::"), ("VAULT_TOKEN", f"{TOKEN}\nx")],
)
async def test_an_unusable_address_or_token_is_a_matter_of_configuration(
    server: Service, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    key = Key.generate("a")
    await refused(VaultTransitWrapper("tenants").wrap(key), ConfigurationError, key)


async def test_a_bundle_of_certificates_that_is_not_there_is_a_matter_of_configuration(
    server: Service, tmp_path: Path
) -> None:
    client = hvac.Client(url="https://127.0.0.1:1", token=TOKEN, verify=str(tmp_path / "none.pem"))
    error = await refused(VaultTransitWrapper("tenants", client=client).wrap(Key.generate("a")), ConfigurationError)
    assert "VAULT_CACERT" in error.hint


async def test_a_key_that_cannot_wrap_is_said_to_be_unfit(server: Service, engine: Transit) -> None:
    engine.without_aead.add("tenants")
    key = Key.generate("a")
    error = await refused(VaultTransitWrapper("tenants").wrap(key), ConfigurationError, key)
    assert "aes256-gcm96" in error.hint


async def test_a_client_of_the_caller_is_used_and_left_open(server: Service) -> None:
    client = hvac.Client(url=server.url, token=TOKEN)
    wrapper, key = VaultTransitWrapper("tenants", client=client), Key.generate("a")
    wrapped = await wrapper.wrap(key)
    await wrapper.close()
    assert await wrapper.unwrap("a", *wrapped) == key
    client.adapter.close()


def test_without_hvac_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hvac", None)
    monkeypatch.delitem(sys.modules, "car_control_plane.encryption.vault")
    settings = load_settings(encryption_key_wrapper="vault-transit", encryption_vault_key="tenants")
    error = failure_of_call(lambda: Keyring.from_settings(settings, store=MemoryStore()))
    assert type(error) is MissingExtraError
    assert error.hint == 'pip install "car-control-plane[vault]"'


# --- Vault says no, or nothing ----------------------------------------------------------------------------------------


def html(_: Request) -> Answer:
    return 200, b"<html>a proxy</html>"


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ((403, {"errors": ["permission denied"]}), KeyUnavailableError),
        ((404, {"errors": []}), ConfigurationError),
        ((405, {"errors": ["unsupported operation"]}), KeyUnavailableError),
        ((412, {"errors": ["required index state not present"]}), KeyUnavailableError),
        ((429, {"errors": ["request path rate limit quota exceeded"]}), KeyUnavailableError),
        ((473, b""), KeyUnavailableError),
        ((500, {"errors": ["internal error"]}), KeyUnavailableError),
        ((500, {"errors": [1]}), KeyUnavailableError),
        ((500, [1]), KeyUnavailableError),
        ((501, {"errors": ["Vault is not initialized"]}), KeyUnavailableError),
        ((502, b"<html>"), KeyUnavailableError),
        ((503, {"errors": ["Vault is sealed"]}), KeyUnavailableError),
        ((200, b"<html>a proxy</html>"), KeyUnavailableError),
        ((200, {}), KeyUnavailableError),
        ((200, {"data": None}), KeyUnavailableError),
        ((200, {"data": {"ciphertext": "c4naryc4nary", "other": 1}}), KeyUnavailableError),
        ((204, b""), KeyUnavailableError),
    ],
)
async def test_every_answer_becomes_an_error_of_ours_that_repeats_nothing_of_it(
    server: Service, answer: Answer, kind: type[ControlPlaneError]
) -> None:
    wrapper, key = VaultTransitWrapper("tenants"), Key.generate("a")

    def echo(request: Request) -> Answer:
        status, body = answer
        if isinstance(body, dict) and body.get("errors"):
            body = {"errors": [*body["errors"], request.body.get("plaintext", "")]}
        return status, body

    server.answer = echo
    await refused(wrapper.wrap(key), kind, key, "c4naryc4nary")
    await refused(wrapper.unwrap("a", "vault:v1:AAAA", "tenants:v1"), kind, key, "c4naryc4nary")


async def test_a_refusal_says_which_path_to_allow(server: Service, engine: Transit) -> None:
    wrapper, key = VaultTransitWrapper("tenants"), Key.generate("a")
    engine.may = {"transit/decrypt/tenants"}
    error = await refused(wrapper.wrap(key), KeyUnavailableError, key)
    assert "transit/encrypt/tenants" in error.hint


async def test_an_untrusted_certificate_is_not_talked_to(server: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server speaks no TLS at all, which is the same to a client that wants it."""
    monkeypatch.setenv("VAULT_ADDR", server.url.replace("http:", "https:"))
    error = await refused(VaultTransitWrapper("tenants").wrap(Key.generate("a")), KeyUnavailableError)
    assert "certificate" in error.message
    assert server.requests == []


@pytest.mark.parametrize("limit", ["of an attempt", "of the call"])
async def test_silence_ends_with_the_time_limit(server: Service, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    if limit == "of an attempt":
        monkeypatch.setattr(vault, "_ATTEMPT_SECONDS", 0.2)
    else:
        monkeypatch.setattr(wrapping, "CALL_SECONDS", 0.2)
    server.speaks.clear()
    key = Key.generate("a")
    error = await refused(VaultTransitWrapper("tenants").wrap(key), KeyUnavailableError, key)
    assert ("has not answered" in error.message) is (limit == "of the call")
    # A call given up goes on, and must not turn to the server of another test.
    assert await asyncio.to_thread(server.asked.wait, 60)
    server.speaks.set()
    assert await VaultTransitWrapper("tenants").wrap(key)


async def test_over_an_outage_opened_keys_open_and_nothing_is_sealed(
    server: Service, engine: Transit, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, clock = MemoryStore(), [0.0]
    monkeypatch.setattr(keyring_module, "_now", lambda: clock[0])
    await store.add(Key.generate("used"), VaultTransitWrapper("tenants"))
    await store.add(Key.generate("idle"), VaultTransitWrapper("tenants"), KeyState.RETIRED)
    async with keyring(store, encryption_cache_seconds=300, encryption_outage_seconds=3600) as keys:
        sealed = await keys.seal("postgresql://u:c4naryc4nary@h/d", **PLACE)
        engine.sealed = True
        clock[0] = 299
        await keys.seal("postgresql://u:c4naryc4nary@h/d", **PLACE)
        clock[0] = 301
        assert (await keys.unseal(sealed, **PLACE)).reveal() == "postgresql://u:c4naryc4nary@h/d"
        error = await refused(keys.seal("x", **PLACE), KeyUnavailableError)
        assert "sealed" in error.message
        await refused(keys.get("idle"), KeyUnavailableError)
        clock[0] = 3899
        await keys.unseal(sealed, **PLACE)
        clock[0] = 3901
        await refused(keys.unseal(sealed, **PLACE), KeyUnavailableError)
        engine.sealed = False
        clock[0] = 4000
        await keys.unseal(sealed, **PLACE)
        assert (await keys.seal("x", **PLACE)).kid == "used"


async def test_a_vault_that_is_gone_is_an_outage(server: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    await store.add(Key.generate("a"), VaultTransitWrapper("tenants"))
    monkeypatch.setenv("VAULT_ADDR", "http://127.0.0.1:1")
    error = await refused(keyring(store).open(), KeyUnavailableError)
    assert "cannot be reached" in error.message


async def test_nothing_of_a_key_or_token_is_logged(server: Service, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    key = Key.generate("a")
    wrapper = VaultTransitWrapper("tenants")
    assert await wrapper.unwrap("a", *await wrapper.wrap(key)) == key
    assert "/v1/transit/decrypt/tenants" in caplog.text  # what is looked at is what the client wrote
    assert key.to_base64() not in caplog.text
    assert TOKEN not in caplog.text


def test_the_environment_of_this_test_is_its_own(server: Service) -> None:
    assert os.environ["VAULT_ADDR"] == server.url
