"""The format `ccp1`: known answers, an implementation of its own beside ours, and what a `Key` takes and shows.

`tests/vectors/ccp1.json` is what implementations in other languages are tested with. It was made with `Elsewhere`, below, which shares no line
with the library: a change of bytes is a failure here.
"""

import base64
import copy
import dataclasses
import hashlib
import hmac
import json
import math
import pickle
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from pydantic import BaseModel, create_model

from car_control_plane.encryption import Key
from car_control_plane.encryption.envelope import _sealed, connection_string_context, lp, seal, unseal
from car_control_plane.errors import ConfigurationError, DecryptionError, InvalidDataError
from tests.fixtures.leaks import failure_of_call, leaks, shows

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "vectors" / "ccp1.json").read_text(encoding="utf-8"))
CONTEXT = connection_string_context(uuid.UUID(int=1), uuid.UUID(int=2))
MATERIAL = bytes(range(100, 132))
CANARY = "c4naryc4naryc4nary"


# --- the format, from its description -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Elsewhere:
    """Seals as the description says, step by step, with nothing but HMAC and AES in counter mode with its tag."""

    kid: str
    key: bytes
    context: bytes
    salt: bytes

    @property
    def header(self) -> bytes:
        return b"ccp1:" + self.kid.encode("ascii")

    @property
    def okm(self) -> bytes:
        extracted = hmac.new(self.salt, self.key, hashlib.sha512).digest()
        return expanded(extracted, prefixed(b"car-control-plane", self.header, self.context), 76)

    @property
    def derived_key(self) -> bytes:
        return self.okm[:32]

    @property
    def nonce(self) -> bytes:
        return self.okm[32:44]

    @property
    def commitment(self) -> bytes:
        return self.okm[44:]

    def encrypted(self, padded: bytes, associated: bytes | None = None) -> bytes:
        encryptor = Cipher(algorithms.AES(self.derived_key), modes.GCM(self.nonce)).encryptor()
        encryptor.authenticate_additional_data(
            prefixed(self.header, self.context) if associated is None else associated
        )
        return encryptor.update(padded) + encryptor.finalize() + encryptor.tag

    def sealed(self, padded: bytes, **other: bytes) -> str:
        body = self.salt + other.get("commitment", self.commitment) + self.encrypted(padded, other.get("associated"))
        return f"ccp1:{self.kid}:{base64.b64encode(body, altchars=b'-_').decode().replace('=', '')}"


def expanded(extracted: bytes, info: bytes, length: int) -> bytes:
    """HKDF's second step, RFC 5869 section 2.3."""
    blocks = [b""]
    for number in range(1, math.ceil(length / 64) + 1):
        blocks.append(hmac.new(extracted, blocks[-1] + info + bytes([number]), hashlib.sha512).digest())
    return b"".join(blocks)[:length]


def prefixed(*parts: bytes) -> bytes:
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def padded(text: str) -> bytes:
    plain = text.encode() + b"\x80"
    return plain.ljust(math.ceil(len(plain) / 64) * 64, b"\0")


def elsewhere(vector: dict[str, str], salt: str = "00" * 32) -> Elsewhere:
    place = (uuid.UUID(vector["tenant_id"]).bytes, uuid.UUID(vector["database_id"]).bytes)
    context = prefixed(b"tenant_databases.connection_string", *place)
    return Elsewhere(vector["kid"], bytes.fromhex(vector["key"]), context, bytes.fromhex(vector.get("salt", salt)))


# --- known answers --------------------------------------------------------------------------------------------------------


def named(kind: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("vector", VECTORS[kind], ids=lambda vector: vector["name"])


def ours(vector: dict[str, str]) -> tuple[Key, bytes]:
    key = Key(vector["kid"], bytes.fromhex(vector["key"]))
    return key, connection_string_context(uuid.UUID(vector["tenant_id"]), uuid.UUID(vector["database_id"]))


@named("sealed")
def test_a_known_answer(vector: dict[str, str]) -> None:
    key, context = ours(vector)
    assert _sealed(key, vector["text"].encode(), context, bytes.fromhex(vector["salt"])) == vector["sealed"]
    assert unseal(key, vector["sealed"], context) == vector["text"]


@named("sealed")
def test_a_known_answer_step_by_step(vector: dict[str, str]) -> None:
    other = elsewhere(vector)
    steps = ("derived_key", "nonce", "commitment", "context")
    assert {step: getattr(other, step).hex() for step in steps} == {step: vector[step] for step in steps}
    assert padded(vector["text"]).hex() == vector["padded"]
    assert other.sealed(padded(vector["text"])) == vector["sealed"]


@named("refused")
def test_a_known_refusal(vector: dict[str, str]) -> None:
    key, context = ours(vector)
    with pytest.raises(DecryptionError):
        unseal(key, vector["sealed"], context)


@named("check_values")
def test_a_known_check_value(vector: dict[str, str]) -> None:
    key = bytes.fromhex(vector["key"])
    assert Key(vector["kid"], key).check_value == vector["check_value"]
    extracted = hmac.new(bytes(64), key, hashlib.sha512).digest()
    info = prefixed(b"car-control-plane key check", vector["kid"].encode())
    assert expanded(extracted, info, 16).hex() == vector["check_value"]


def test_the_file_of_vectors_says_first_what_it_is() -> None:
    assert next(iter(VECTORS)) == "description"
    assert {len(vector["padded"]) // 128 for vector in VECTORS["sealed"]} >= {1, 2, 6}
    assert all(vector["reason"] for vector in VECTORS["refused"])


def test_hkdf_of_the_other_implementation_is_that_of_the_rfc() -> None:
    """RFC 5869 has no answers for SHA-512, so a third implementation is asked."""
    from cryptography.hazmat.primitives.hashes import SHA512
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    key, salt, info = bytes(range(32)), bytes(range(32, 64)), b"info"
    extracted = hmac.new(salt, key, hashlib.sha512).digest()
    for length in (16, 64, 76, 200):
        assert expanded(extracted, info, length) == HKDF(SHA512(), length, salt, info).derive(key)


# --- sealing and opening --------------------------------------------------------------------------------------------------


def test_what_was_sealed_elsewhere_opens_here_and_the_other_way_around() -> None:
    other = Elsewhere("k", MATERIAL, CONTEXT, bytes(range(32)))
    assert unseal(Key("k", MATERIAL), other.sealed(padded("päss")), CONTEXT) == "päss"
    raw = base64.urlsafe_b64decode(seal(Key("k", MATERIAL), "päss", CONTEXT).split(":")[2] + "==")
    assert raw[32:] == dataclasses.replace(other, salt=raw[:32]).commitment + dataclasses.replace(
        other, salt=raw[:32]
    ).encrypted(padded("päss"))


def test_every_value_has_a_salt_of_its_own() -> None:
    key = Key("k", MATERIAL)
    values = {seal(key, "text", CONTEXT) for _ in range(1000)}
    assert len(values) == len({value[:40] for value in values}) == 1000


def test_the_length_of_a_value_tells_only_how_many_blocks_there_are() -> None:
    key = Key("k", MATERIAL)
    lengths = [len(seal(key, "x" * size, CONTEXT)) for size in range(129)]
    assert len(set(lengths[:64])) == len(set(lengths[64:128])) == 1
    assert lengths[63] < lengths[64] == lengths[127] < lengths[128]


@pytest.mark.parametrize("text", ["", "\0", "\0" * 64, "\x80", "x" * 63, "x" * 64, "🔑" * 16, "a\nb", "x" * 100_000])
def test_any_text_comes_back(text: str) -> None:
    key = Key.generate("2026-11")
    assert unseal(key, seal(key, text, CONTEXT), CONTEXT) == text


@pytest.mark.parametrize("text", [CANARY + "\ud800", CANARY.encode(), None])
def test_what_is_no_text_is_refused_and_not_shown(text: Any) -> None:
    error = failure_of_call(lambda: seal(Key("k", MATERIAL), text, CONTEXT))
    assert isinstance(error, InvalidDataError)
    assert list(leaks(error, CANARY)) == []


@pytest.mark.parametrize("text", [CANARY, f"postgresql://u:{CANARY}@h/d", f"ccp1:k:{CANARY}", f"ccp1:k:{'A' * 4}"])
def test_what_does_not_open_is_not_shown(text: str) -> None:
    error = failure_of_call(lambda: unseal(Key("k", MATERIAL), text, CONTEXT))
    assert isinstance(error, DecryptionError)
    assert list(leaks(error, CANARY)) == []


def test_a_text_that_opens_into_something_else_is_not_shown() -> None:
    """The last step fails: it was deciphered, and is no UTF-8."""
    inner = CANARY.encode() + b"\xff\x80"
    value = Elsewhere("k", MATERIAL, CONTEXT, bytes(32)).sealed(inner.ljust(64, b"\0"))
    error = failure_of_call(lambda: unseal(Key("k", MATERIAL), value, CONTEXT))
    assert isinstance(error, DecryptionError)
    assert list(leaks(error, CANARY)) == []


def test_parts_are_joined_so_that_no_others_join_to_the_same() -> None:
    assert lp(b"ab", b"c") != lp(b"a", b"bc") != lp(b"abc") != lp(b"abc", b"")
    assert lp(b"ab", b"") == b"\0\0\0\2ab\0\0\0\0"


def test_tenant_and_database_do_not_change_places() -> None:
    one, other = uuid.UUID(int=1), uuid.UUID(int=2)
    assert connection_string_context(one, other) != connection_string_context(other, one)


# --- keys -------------------------------------------------------------------------------------------------------------------


def test_a_key_comes_back_from_its_text() -> None:
    key = Key.generate("2026-11")
    assert Key.from_base64("2026-11", key.to_base64()) == key
    assert base64.b64decode(key.to_base64()) != MATERIAL
    assert len({Key.generate("k").to_base64() for _ in range(100)}) == 100


def test_keys_are_equal_when_name_and_bytes_are() -> None:
    key = Key("a", MATERIAL)
    assert key == Key("a", MATERIAL)
    assert hash(key) == hash(Key("a", MATERIAL))
    assert key != Key("b", MATERIAL)
    assert key != Key("a", MATERIAL[::-1])
    assert key != "a"
    assert key.has_bytes_of(Key("b", MATERIAL))
    assert not key.has_bytes_of(Key("a", MATERIAL[::-1]))


def test_the_check_value_tells_keys_and_names_apart() -> None:
    values = [Key(kid, material).check_value for kid in ("a", "b") for material in (MATERIAL, MATERIAL[::-1])]
    assert len(set(values)) == 4
    assert all(len(value) == 32 and int(value, 16) for value in values)


@pytest.mark.parametrize(
    ("kid", "material", "fault"),
    [
        ("", MATERIAL, "id of a key"),
        ("A", MATERIAL, "id of a key"),
        ("a_b", MATERIAL, "id of a key"),
        ("a\n", MATERIAL, "id of a key"),
        ("ä", MATERIAL, "id of a key"),
        ("x" * 33, MATERIAL, "id of a key"),
        (None, MATERIAL, "id of a key"),
        ("k", MATERIAL[:31], "31 bytes"),
        ("k", MATERIAL + b"\0", "33 bytes"),
        ("k", b"", "0 bytes"),
        ("k", bytes(32), "one byte repeated"),
        ("k", b"correct horse battery staple 123", "is text"),
        ("k", b"0123456789abcdef0123456789abcdef", "is text"),
        ("k", "x" * 32, "not the base64"),
        ("k", None, "not the base64"),
        ("k", 32, "not the base64"),
    ],
)
def test_a_key_is_32_random_bytes_with_a_name(kid: Any, material: Any, fault: str) -> None:
    with pytest.raises(ConfigurationError, match=fault) as caught:
        Key(kid, material)
    assert "car-cp key generate" in caught.value.hint


@pytest.mark.parametrize("kid", ["x" * 32, "a", "-", "2026-11", "0"])
def test_names_of_keys(kid: str) -> None:
    assert Key.generate(kid).kid == kid


STANDARD = base64.b64encode(b"\xfb\xff" * 8 + MATERIAL[:16]).decode()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (STANDARD.rstrip("="), "not the base64"),
        (STANDARD.replace("+", "-").replace("/", "_"), "not the base64"),
        (STANDARD + "\n", "not the base64"),
        (STANDARD[:10] + " " + STANDARD[10:], "not the base64"),
        (STANDARD[:-2] + chr(ord(STANDARD[-2]) + 1) + "=", "not the base64"),  # bits behind the last byte
        ("ä" + STANDARD, "not the base64"),
        ("", "0 bytes"),
        (MATERIAL.hex(), "48 bytes"),
        (STANDARD.encode(), "not the base64"),
        (None, "not the base64"),
        (base64.b64encode(b"correct horse battery staple 123").decode(), "is text"),
    ],
)
def test_the_text_of_a_key_is_exactly_its_base64(text: Any, fault: str) -> None:
    assert Key.from_base64("k", STANDARD).to_base64() == STANDARD
    with pytest.raises(ConfigurationError, match=fault):
        Key.from_base64("k", text)


@pytest.mark.parametrize(
    "call",
    [
        lambda: Key("k", CANARY.encode()),
        lambda: Key(CANARY + "!", MATERIAL),
        lambda: Key("k", CANARY),  # type: ignore[arg-type]  # what is refused
        lambda: Key.from_base64("k", CANARY),
        lambda: Key.from_base64("k", CANARY.encode()),  # type: ignore[arg-type]  # what is refused
        lambda: Key.from_base64(CANARY + "!", STANDARD),
        lambda: Key.from_base64("k", base64.b64encode(CANARY.encode()).decode()),
    ],
)
def test_a_refused_key_is_not_shown(call: Any) -> None:
    error = failure_of_call(call)
    assert isinstance(error, ConfigurationError)
    assert list(leaks(error, CANARY)) == []


def test_a_key_is_written_as_its_name_only() -> None:
    key = Key("k", b"\x01" + CANARY.encode().ljust(31, b"\xff"))
    assert repr(key) == str(key) == f"{key}" == "<Key k>"
    assert f"{key:>9}" == "  <Key k>"
    assert list(shows(key, CANARY)) == []
    assert list(shows({"key": [key]}, CANARY)) == []


def test_a_key_is_neither_copied_nor_written_out() -> None:
    key = Key("k", MATERIAL)
    holder = dataclasses.make_dataclass("Holder", ["key"])(key)
    refusals: list[Any] = [
        *(lambda protocol=protocol: pickle.dumps(key, protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)),
        lambda: copy.copy(key),
        lambda: copy.deepcopy(key),
        lambda: copy.deepcopy([key]),
        lambda: json.dumps(key),
        lambda: vars(key),
        lambda: dataclasses.asdict(holder),
        key.__getstate__,
        lambda: create_model("Model", key=(Key, ...)),
        lambda: create_model("Model", key=(Key, ...), __config__={"arbitrary_types_allowed": True}),
    ]
    for refused in refusals:
        with pytest.raises(TypeError):
            refused()


def test_a_key_cannot_be_changed() -> None:
    key = Key("k", MATERIAL)
    for name in ("kid", "_material", "other"):
        with pytest.raises(AttributeError):
            setattr(key, name, "x")


class Loose(BaseModel):
    anything: Any


def test_a_model_that_takes_anything_does_not_write_a_key() -> None:
    model = Loose(anything=Key("k", b"\x01" + CANARY.encode().ljust(31, b"\xff")))
    assert list(shows(model, CANARY)) == []
