"""Keys wrapped by AWS KMS: boto3 over real HTTP against moto's server, and against one that answers what moto cannot."""

import asyncio
import base64
import logging
import re
import sys
import uuid
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import boto3.session
import pytest
from botocore.config import Config
from moto.server import ThreadedMotoServer

from car_control_plane.encryption import AwsKmsWrapper, Key, Keyring, KeyState, aws, keyring as keyring_module, wrapping
from car_control_plane.errors import (
    ConfigurationError,
    ControlPlaneError,
    DecryptionError,
    KeyUnavailableError,
    MissingExtraError,
    UnknownKeyError,
)
from car_control_plane.settings import load_settings
from tests.fixtures.leaks import failure_of, failure_of_call
from tests.fixtures.outer_services import Answer, MemoryStore, Request, Service, key_leaks, service

SECRET = "c4naryc4narySecretAccessKey"
SESSION = "c4naryc4narySessionToken"
PLACE = {"tenant_id": uuid.UUID(int=1), "database_id": uuid.UUID(int=2)}
LIMITS = aws._LIMITS
ARN = "arn:aws:kms:eu-central-1:123456789012:key/7d0a55d8-10b7-4d3c-bfda-ce87c6e07221"


@pytest.fixture(autouse=True)
def account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Credentials and region in the environment; nothing of this machine's user, and no service of its network."""
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", SESSION)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """Moto's server, on a port of its own; what it writes about requests is not for the log of the tests."""
    log = logging.getLogger("werkzeug")
    level = log.level
    log.setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()
    log.setLevel(level)


@pytest.fixture
def kms(moto: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An administrator's client; the clients of the programs under test find the same server in the environment."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", moto)
    client = boto3.session.Session().client("kms")
    yield client
    client.close()


@pytest.fixture
def key_id(kms: Any) -> str:
    """The id of a KMS key."""
    return str(kms.create_key()["KeyMetadata"]["KeyId"])


@pytest.fixture
async def wrapper(key_id: str) -> Any:
    wrapper = AwsKmsWrapper(key_id)
    yield wrapper
    await wrapper.close()


def keyring(store: MemoryStore, **settings: Any) -> Keyring:
    chosen = load_settings(encryption_key_wrapper="aws-kms", **{"encryption_kms_key_id": ARN, **settings})
    return Keyring.from_settings(chosen, store=store)


async def refused(work: Any, kind: type[ControlPlaneError], *secrets: Key | str) -> ControlPlaneError:
    error = await failure_of(work)
    assert type(error) is kind, repr(error)
    assert key_leaks(error, SECRET, SESSION, *secrets) == []
    return error


# --- wrapping and opening ---------------------------------------------------------------------------------------------


async def test_a_key_is_wrapped_and_opens_again(wrapper: AwsKmsWrapper, key_id: str) -> None:
    key = Key.generate("2026-11")
    wrapped, kek_ref = await wrapper.wrap(key)
    assert kek_ref == f"arn:aws:kms:eu-central-1:123456789012:key/{key_id}"
    assert await wrapper.unwrap("2026-11", wrapped, kek_ref) == key
    assert repr(wrapper) == f"<AwsKmsWrapper {key_id}>"


async def test_a_wrapped_key_opens_under_no_other_id(wrapper: AwsKmsWrapper) -> None:
    key = Key.generate("a")
    wrapped, kek_ref = await wrapper.wrap(key)
    error = await refused(wrapper.unwrap("b", wrapped, kek_ref), DecryptionError, key)
    assert "'b'" in error.message
    assert error.details == {"kid": "b"}


@pytest.mark.parametrize("alter", ["altered", "cut", "empty", "characters", "plain"])
async def test_an_altered_row_is_damage(wrapper: AwsKmsWrapper, alter: str) -> None:
    key = Key.generate("a")
    wrapped, kek_ref = await wrapper.wrap(key)
    forged, reference = {
        "altered": (base64.b64encode(base64.b64decode(wrapped)[:-1] + b"?").decode(), kek_ref),
        "cut": (wrapped[:12], kek_ref),
        "empty": ("", kek_ref),
        "characters": ("§", kek_ref),
        "plain": (key.to_base64(), kek_ref),
    }[alter]
    await refused(wrapper.unwrap("a", forged, reference), DecryptionError, key)


async def test_after_an_alias_has_moved_the_former_key_opens_when_it_is_named(kms: Any, key_id: str) -> None:
    newer = kms.create_key()["KeyMetadata"]["KeyId"]
    alias, key = f"alias/{key_id}", Key.generate("a")
    kms.create_alias(AliasName=alias, TargetKeyId=key_id)
    wrapper = AwsKmsWrapper(alias)
    wrapped, kek_ref = await wrapper.wrap(key)
    kms.update_alias(AliasName=alias, TargetKeyId=newer)
    await failure_of(wrapper.unwrap("a", wrapped, kek_ref))
    both = AwsKmsWrapper(f"{alias}, {kek_ref}")
    assert await both.unwrap("a", wrapped, kek_ref) == key
    again, newer_ref = await both.wrap(key)
    assert newer_ref.endswith(newer)
    assert await both.unwrap("a", again, newer_ref) == key
    assert await wrapper.unwrap("a", again, newer_ref) == key
    await both.close()
    await wrapper.close()


async def test_what_a_row_says_of_the_kms_key_decides_nothing(kms: Any, wrapper: AwsKmsWrapper) -> None:
    """Whoever can write the table could name a KMS key of his own there, and have new values sealed with a key he knows."""
    theirs = kms.create_key()["KeyMetadata"]["Arn"]
    foreign, ours = AwsKmsWrapper(theirs), Key.generate("a")
    planted, kek_ref = await foreign.wrap(Key.generate("a"))
    await failure_of(wrapper.unwrap("a", planted, kek_ref))
    wrapped, _ = await wrapper.wrap(ours)
    assert await wrapper.unwrap("a", wrapped, theirs) == ours
    await foreign.close()


async def test_the_refusal_that_says_most_is_reported(scripted: Service) -> None:
    """Of several KMS keys most answer that another one is meant; what counts is why that one does not open."""
    codes = iter(["IncorrectKeyException", "DisabledException", "IncorrectKeyException"])
    scripted.answer = lambda _: (400, {"__type": next(codes)})
    wrapper = AwsKmsWrapper("alias/new,alias/former,alias/first")
    error = await refused(wrapper.unwrap("a", "AAAA", ARN), KeyUnavailableError)
    assert "'alias/former' is disabled" in error.message
    scripted.answer = lambda _: (400, {"__type": "IncorrectKeyException"})
    error = await refused(wrapper.unwrap("a", "AAAA", ARN), DecryptionError)
    assert "'alias/new', 'alias/former', 'alias/first'" in error.message


async def test_a_kms_key_that_is_not_there_is_named(kms: Any) -> None:
    wrapper, key = AwsKmsWrapper(ARN), Key.generate("a")
    assert ARN in (await refused(wrapper.wrap(key), UnknownKeyError, key)).message
    error = await refused(wrapper.unwrap("a", "AAAA", ARN), UnknownKeyError, key)
    assert error.details == {"kek_ref": ARN}
    await wrapper.close()


async def test_a_client_of_the_caller_is_used_and_left_open(
    kms: Any, key_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed, key = list[bool](), Key.generate("a")
    monkeypatch.setattr(kms, "close", lambda: closed.append(True))
    monkeypatch.delenv("AWS_ENDPOINT_URL_KMS")  # another client would not find the server
    wrapper = AwsKmsWrapper(key_id, client=kms)
    assert await wrapper.unwrap("a", *await wrapper.wrap(key)) == key
    await wrapper.close()
    assert closed == []


async def test_a_closed_wrapper_connects_again_when_used(wrapper: AwsKmsWrapper) -> None:
    key = Key.generate("a")
    wrapped = await wrapper.wrap(key)
    await wrapper.close()
    await wrapper.close()
    assert await wrapper.unwrap("a", *wrapped) == key


async def test_keys_are_opened_side_by_side(key_id: str) -> None:
    wrapper, keys = AwsKmsWrapper(key_id), [Key.generate(f"key-{number}") for number in range(8)]
    wrapped = await asyncio.gather(*(wrapper.wrap(key) for key in keys))
    opened = await asyncio.gather(*(wrapper.unwrap(key.kid, *row) for key, row in zip(keys, wrapped, strict=True)))
    assert opened == keys
    await wrapper.close()


# --- what the request holds, and what KMS may answer -----------------------------------------------------------------


def fault(code: str) -> Answer:
    return 400, {"__type": code, "message": "c4naryc4nary"}


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """A server whose answers a test chooses: moto checks neither policies nor whether a key is enabled."""
    with service(lambda _: fault("NotFoundException"), content_type="application/x-amz-json-1.1") as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", server.url)
        monkeypatch.setattr(aws, "_LIMITS", LIMITS.merge(Config(retries={"mode": "standard", "total_max_attempts": 1})))
        yield server


async def test_the_id_is_the_encryption_context_and_the_key_is_named_in_both_directions(scripted: Service) -> None:
    key = Key.generate("a")

    def kms(request: Request) -> Answer:
        if request.headers["X-Amz-Target"] == "TrentService.Encrypt":
            return 200, {"CiphertextBlob": base64.b64encode(b"blob").decode(), "KeyId": ARN}
        return 200, {"Plaintext": key.to_base64(), "KeyId": ARN}

    scripted.answer = kms
    wrapper = AwsKmsWrapper("alias/tenants")
    assert await wrapper.unwrap("a", *await wrapper.wrap(key)) == key
    wrapped, opened = (request.body for request in scripted.requests)
    assert wrapped["EncryptionContext"] == opened["EncryptionContext"] == {"car-control-plane:kid": "a"}
    assert (wrapped["KeyId"], opened["KeyId"]) == ("alias/tenants", "alias/tenants")
    await wrapper.close()


@pytest.mark.parametrize(
    ("code", "wrapping_kind", "opening_kind", "says"),
    [
        ("AccessDeniedException", KeyUnavailableError, KeyUnavailableError, "Allow kms:"),
        ("DisabledException", KeyUnavailableError, KeyUnavailableError, "disabled"),
        ("KMSInvalidStateException", KeyUnavailableError, KeyUnavailableError, "about to be deleted"),
        ("NotFoundException", UnknownKeyError, UnknownKeyError, "no KMS key"),
        ("ExpiredTokenException", KeyUnavailableError, KeyUnavailableError, "Renew"),
        ("InvalidSignatureException", KeyUnavailableError, KeyUnavailableError, "clock"),
        ("InvalidKeyUsageException", ConfigurationError, ConfigurationError, "ENCRYPT_DECRYPT"),
        ("ValidationException", ConfigurationError, DecryptionError, "cannot wrap|altered"),
        ("InvalidCiphertextException", KeyUnavailableError, DecryptionError, "InvalidCiphertext|altered"),
        ("IncorrectKeyException", KeyUnavailableError, DecryptionError, "IncorrectKey|altered"),
        ("KMSInternalException", KeyUnavailableError, KeyUnavailableError, "KMSInternalException"),
        ("ThrottlingException", KeyUnavailableError, KeyUnavailableError, "ThrottlingException"),
        ("c4naryc4nary and so on", KeyUnavailableError, KeyUnavailableError, "an unknown error"),
    ],
)
async def test_every_error_of_kms_becomes_one_of_ours_without_its_text(
    scripted: Service,
    code: str,
    wrapping_kind: type[ControlPlaneError],
    opening_kind: type[ControlPlaneError],
    says: str,
) -> None:
    scripted.answer = lambda _: fault(code)
    wrapper, key = AwsKmsWrapper(ARN), Key.generate("a")
    assert re.search(says, str(await refused(wrapper.wrap(key), wrapping_kind, key, "c4naryc4nary")))
    assert re.search(says, str(await refused(wrapper.unwrap("a", "AAAA", ARN), opening_kind, key, "c4naryc4nary")))
    await wrapper.close()


async def test_the_permission_that_lacks_is_named(scripted: Service) -> None:
    scripted.answer = lambda _: fault("AccessDeniedException")
    wrapper = AwsKmsWrapper(ARN)
    assert "kms:Encrypt" in (await refused(wrapper.wrap(Key.generate("a")), KeyUnavailableError)).hint
    assert "kms:Decrypt" in (await refused(wrapper.unwrap("a", "AAAA", ARN), KeyUnavailableError)).hint
    await wrapper.close()


@pytest.mark.parametrize(
    "answer", [(200, {}), (200, b"<html>"), (503, b"<html>"), (200, [1])], ids=["empty", "html", "503", "list"]
)
async def test_an_answer_that_is_none_is_an_outage(scripted: Service, answer: Answer) -> None:
    scripted.answer = lambda _: answer
    wrapper, key = AwsKmsWrapper(ARN), Key.generate("a")
    await refused(wrapper.wrap(key), KeyUnavailableError, key)
    await refused(wrapper.unwrap("a", "AAAA", ARN), KeyUnavailableError, key)
    await wrapper.close()


async def test_what_kms_opens_must_be_a_key(scripted: Service) -> None:
    scripted.answer = lambda _: (200, {"Plaintext": base64.b64encode(b"c4naryc4nary").decode(), "KeyId": ARN})
    wrapper = AwsKmsWrapper(ARN)
    await refused(wrapper.unwrap("a", "AAAA", ARN), DecryptionError, "c4naryc4nary")
    await wrapper.close()


# --- what is set up wrongly -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"AWS_DEFAULT_REGION": None}, "no region"),
        ({"AWS_DEFAULT_REGION": "not a region"}, "region has no valid name"),
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "no credentials"),
        ({"AWS_SECRET_ACCESS_KEY": None}, "incomplete"),
        ({"AWS_PROFILE": "nobody"}, "no profile"),
        ({"AWS_ENDPOINT_URL_KMS": "nonsense"}, "endpoint"),
    ],
)
async def test_what_lacks_in_the_environment_is_said(
    scripted: Service, monkeypatch: pytest.MonkeyPatch, change: dict[str, str | None], says: str
) -> None:
    for name, value in change.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    wrapper, key = AwsKmsWrapper(ARN), Key.generate("a")
    assert says in (await refused(wrapper.wrap(key), ConfigurationError, key)).message
    assert says in (await refused(wrapper.unwrap("a", "AAAA", ARN), ConfigurationError, key)).message
    assert scripted.requests == []


async def test_a_broken_configuration_file_is_said(scripted: Service, tmp_path: Path) -> None:
    (tmp_path / "config").write_text("c4naryc4nary")
    assert (
        "config"
        in (await refused(AwsKmsWrapper(ARN).wrap(Key.generate("a")), ConfigurationError, "c4naryc4nary")).message
    )


async def test_a_key_id_of_no_form_is_said(scripted: Service) -> None:
    error = await refused(AwsKmsWrapper("").wrap(Key.generate("a")), ConfigurationError)
    assert "id of the KMS key" in error.message


def test_without_boto3_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3.session", None)
    monkeypatch.delitem(sys.modules, "car_control_plane.encryption.aws")
    error = failure_of_call(lambda: keyring(MemoryStore()))
    assert type(error) is MissingExtraError
    assert error.hint == 'pip install "car-control-plane[aws]"'


# --- KMS does not answer ----------------------------------------------------------------------------------------------


async def test_a_kms_that_is_gone_is_an_outage(scripted: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", "http://127.0.0.1:1")
    key = Key.generate("a")
    error = await refused(AwsKmsWrapper(ARN).wrap(key), KeyUnavailableError, key)
    assert "cannot be reached" in error.message


@pytest.mark.parametrize("limit", ["of an attempt", "of the call"])
async def test_silence_ends_with_the_time_limit(scripted: Service, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    if limit == "of an attempt":
        monkeypatch.setattr(aws, "_LIMITS", aws._LIMITS.merge(Config(read_timeout=0.2)))
    else:
        monkeypatch.setattr(wrapping, "CALL_SECONDS", 0.2)
    scripted.speaks.clear()
    wrapper, key = AwsKmsWrapper(ARN), Key.generate("a")
    error = await refused(wrapper.wrap(key), KeyUnavailableError, key)
    assert ("has not answered" in error.message) is (limit == "of the call")
    # A call given up goes on, and must not turn to the server of another test.
    assert await asyncio.to_thread(scripted.asked.wait, 60)


async def test_a_second_attempt_is_made_and_no_third(scripted: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aws, "_LIMITS", LIMITS)
    scripted.answer = lambda _: (500, {"__type": "KMSInternalException"})
    await refused(AwsKmsWrapper(ARN).wrap(Key.generate("a")), KeyUnavailableError)
    assert len(scripted.requests) == 2


async def test_over_an_outage_opened_keys_open_and_nothing_is_sealed(
    kms: Any, key_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service is a server that is stopped, and started again on the same port; moto's keys are of the process."""
    clock, store = [0.0], MemoryStore()
    monkeypatch.setattr(keyring_module, "_now", lambda: clock[0])
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", f"http://{host}:{port}")
    settings = {"encryption_kms_key_id": key_id, "encryption_cache_seconds": 300, "encryption_outage_seconds": 3600}
    async with AsyncExitStack() as stack:
        administrator = AwsKmsWrapper(key_id)
        stack.push_async_callback(administrator.close)
        await store.add(Key.generate("used"), administrator)
        await store.add(Key.generate("idle"), administrator, KeyState.RETIRED)
        keys = await stack.enter_async_context(keyring(store, **settings))
        sealed = await keys.seal("postgresql://u:c4naryc4nary@h/d", **PLACE)

        server.stop()
        clock[0] = 299
        assert (await keys.seal("x", **PLACE)).kid == "used"
        clock[0] = 301
        assert (await keys.unseal(sealed, **PLACE)).reveal() == "postgresql://u:c4naryc4nary@h/d"
        await refused(keys.seal("postgresql://u:c4naryc4nary@h/d", **PLACE), KeyUnavailableError, "u:c4naryc4nary")
        await refused(keys.get("idle"), KeyUnavailableError)
        clock[0] = 3899
        await keys.unseal(sealed, **PLACE)
        clock[0] = 3901
        await refused(keys.unseal(sealed, **PLACE), KeyUnavailableError)

        server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
        server.start()
        stack.callback(server.stop)
        clock[0] = 4000
        await keys.unseal(sealed, **PLACE)
        assert (await keys.seal("x", **PLACE)).kid == "used"


# --- the log ----------------------------------------------------------------------------------------------------------


async def test_nothing_of_a_key_is_logged_though_botocore_logs_all_it_sends(
    kms: Any, wrapper: AwsKmsWrapper, key_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    key = Key.generate("a")
    assert await wrapper.unwrap("a", *await wrapper.wrap(key)) == key
    assert "botocore" in caplog.text
    assert key.to_base64() not in caplog.text
    assert SESSION not in caplog.text

    kms.encrypt(KeyId=key_id, Plaintext=base64.b64decode(key.to_base64()))  # anybody else's calls are logged as before
    assert key.to_base64() in caplog.text
    assert SESSION in caplog.text
