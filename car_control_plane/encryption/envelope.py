"""The format `ccp1`: seals a text so that it opens with one key in one place, and nowhere else.

::

    ccp1:<kid>:<base64url without padding of  salt (32) || commitment (32) || AES-256-GCM ciphertext || tag (16)>

    LP(a, b, …)  = each part as its length (4 bytes, big-endian) and its bytes
    header       = "ccp1:" + kid
    context      = LP(what it is, where it belongs …), chosen by the caller
    okm          = HKDF-SHA512(key, salt, info = LP("car-control-plane", header, context), 76 bytes)
    key || nonce || commitment = okm[0:32] || okm[32:44] || okm[44:76]
    plaintext    = text as UTF-8 || 0x80 || zeros up to a multiple of 64 bytes, as few as possible
    AEAD data    = LP(header, context)

A salt of 256 random bits gives every value a key and a nonce of its own: no nonce to repeat, no limit on how many values a key may seal. The
commitment says "another key or another place" before anything is decrypted; AES-GCM alone would let one ciphertext open under two keys. Text has
one form only: what does not encode back to itself is refused. The padding hides the length of a password.

Nothing here does I/O, keeps state or knows about rows: call it from any thread. `tests/vectors/ccp1.json` holds known answers for implementations
in other languages.

Sources: RFC 5869 (HKDF), NIST SP 800-38D (GCM), RFC 4648 section 5 (base64url), ISO/IEC 9797-1 padding method 2;
`docs/adr/0014-sealed-connection-strings.md`.
"""

import base64
import hmac
import os
import struct
import uuid
from collections.abc import Callable
from typing import Final, Never, final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from car_control_plane.encryption.values import FORMAT, hidden, is_kid
from car_control_plane.errors import ConfigurationError, DecryptionError, InvalidDataError

KEY_BYTES: Final = 32
_SALT, _COMMITMENT, _NONCE, _TAG, _BLOCK = 32, 32, 12, 16, 64
_CHECK_BYTES = 16
_LENGTH = struct.Struct(">I")
_STANDARD = bytes.maketrans(b"-_", b"+/")
_HASH = SHA512()
_MAKE_ONE = "Make a key: car-cp key generate."


def lp(*parts: bytes) -> bytes:
    """Join parts so that no other parts join to the same bytes."""
    return b"".join([_LENGTH.pack(len(part)) + part for part in parts])


_LABEL = lp(b"car-control-plane")
_COLUMN = lp(b"tenant_databases.connection_string")


@final
class Key:
    """32 random bytes with a name. Prints its name only.

    It cannot be pickled, copied, written as JSON, or made a field of a model: each is a TypeError. Immutable and hashable; equal when name and
    bytes are.

    Raises:
        ConfigurationError: The name is not 1 to 32 of a-z, 0-9 and -; or it is not 32 bytes; or they are no random ones: one byte repeated, or text
            (a passphrase, hexadecimal digits). Neither the error nor a frame of it holds the bytes, nor a name that is none.
    """

    __slots__ = ("_material", "kid")

    kid: str
    _material: Callable[[], bytes]

    def __init__(self, kid: str, material: bytes) -> None:
        if fault := _fault(kid, material):
            del kid, material
            raise ConfigurationError(fault, hint=_MAKE_ONE)
        object.__setattr__(self, "kid", kid)
        object.__setattr__(self, "_material", hidden(material))

    @classmethod
    def generate(cls, kid: str) -> "Key":
        """Make a key of random bytes from the system.

        Raises:
            ConfigurationError: The name is not acceptable.
        """
        return cls(kid, os.urandom(KEY_BYTES))

    @classmethod
    def from_base64(cls, kid: str, text: str) -> "Key":
        """Read a key from the base64 (RFC 4648 section 4, padded) of its 32 bytes.

        Raises:
            ConfigurationError: The name or the text is not acceptable; neither the error nor a frame of it holds the text.
        """
        material = _decoded(text, urlsafe=False)
        del text
        key, fault = None, _fault(kid, material)
        if material is not None and not fault:
            key = cls(kid, material)
        del kid, material
        if key is None:
            raise ConfigurationError(fault, hint=_MAKE_ONE)
        return key

    def to_base64(self) -> str:
        """Return the key in clear, as `from_base64` reads it."""
        return base64.b64encode(self._material()).decode()

    @property
    def check_value(self) -> str:
        """32 hexadecimal digits that tell this key from any other of the same name, and give nothing of it away: safe to store and to show."""
        info = lp(b"car-control-plane key check", self.kid.encode())
        return HKDF(_HASH, _CHECK_BYTES, None, info).derive(self._material()).hex()

    def has_bytes_of(self, other: "Key") -> bool:
        """Tell whether another key is the same one, whatever its name."""
        return hmac.compare_digest(self._material(), other._material())

    def _derive(self, salt: bytes, place: bytes) -> tuple[bytes, bytes, bytes]:
        """Return key, nonce and commitment of one value."""
        okm = HKDF(_HASH, KEY_BYTES + _NONCE + _COMMITMENT, salt, _LABEL + place).derive(self._material())
        return okm[:KEY_BYTES], okm[KEY_BYTES : KEY_BYTES + _NONCE], okm[KEY_BYTES + _NONCE :]

    def __setattr__(self, name: str, value: object) -> Never:
        raise AttributeError("a key cannot be changed")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and self.kid == other.kid and self.has_bytes_of(other)

    def __hash__(self) -> int:
        return hash(self.kid)

    def __repr__(self) -> str:
        return f"<Key {self.kid}>"

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)

    def _refuse(self, *_: object) -> Never:
        raise TypeError("a key is neither copied nor written out; to_base64() gives its text")

    __copy__ = __deepcopy__ = __reduce_ex__ = __reduce__ = __getstate__ = _refuse

    @classmethod
    def __get_pydantic_core_schema__(cls, *_: object) -> Never:
        raise TypeError("a key belongs into no model")


def connection_string_context(tenant_id: uuid.UUID, database_id: uuid.UUID) -> bytes:
    """Say where a connection string belongs: to this row of `tenant_databases`, of this tenant."""
    return _COLUMN + lp(tenant_id.bytes, database_id.bytes)


def seal(key: Key, text: str, context: bytes) -> str:
    """Seal a text for one place.

    Args:
        key: What opens it again.
        text: Any text that UTF-8 can write.
        context: Where it belongs; must be given again to open it.

    Raises:
        InvalidDataError: UTF-8 cannot write it; neither the error nor a frame of it holds the text.
    """
    plain = _encoded(text)
    del text
    if plain is None:
        raise InvalidDataError("what is to be sealed is not text that UTF-8 can write")
    return _sealed(key, plain, context, os.urandom(_SALT))


def unseal(key: Key, sealed: str, context: bytes) -> str:
    """Open what `seal` has sealed with this key for this place.

    Raises:
        DecryptionError: The text is not of the form, was altered, or was sealed with another key or for another place. Neither the error nor a
            frame of it holds the text.
    """
    text = _opened(key, sealed, context)
    del sealed  # may be plain text that got into the column
    if text is None:
        raise DecryptionError
    return text


def _sealed(key: Key, plain: bytes, context: bytes, salt: bytes) -> str:
    """Seal with a salt of the caller's, who must never use one twice."""
    header = f"{FORMAT}:{key.kid}"
    place = lp(header.encode(), context)
    derived, nonce, commitment = key._derive(salt, place)
    ciphertext = AESGCM(derived).encrypt(nonce, _pad(plain), place)
    return f"{header}:{_base64url(salt + commitment + ciphertext).decode()}"


def _opened(key: Key, sealed: str, context: bytes) -> str | None:
    header = f"{FORMAT}:{key.kid}"
    raw = _decoded(sealed[len(header) + 1 :], urlsafe=True) if sealed.startswith(f"{header}:") else None
    if raw is None or not _has_blocks(len(raw) - _SALT - _COMMITMENT - _TAG):
        return None
    place = lp(header.encode(), context)
    derived, nonce, commitment = key._derive(raw[:_SALT], place)
    if not hmac.compare_digest(commitment, raw[_SALT : _SALT + _COMMITMENT]):
        return None
    try:
        return _unpadded(AESGCM(derived).decrypt(nonce, raw[_SALT + _COMMITMENT :], place)).decode()
    except (InvalidTag, ValueError):
        return None


def _has_blocks(size: int) -> bool:
    return size >= _BLOCK and size % _BLOCK == 0


def _pad(plain: bytes) -> bytes:
    return plain + b"\x80" + bytes(-(len(plain) + 1) % _BLOCK)


def _unpadded(padded: bytes) -> bytes:
    marked = padded.rstrip(b"\0")
    if not marked.endswith(b"\x80") or len(padded) - len(marked) >= _BLOCK:
        raise ValueError("no padding")
    return marked[:-1]


def _encoded(text: str) -> bytes | None:
    try:
        return text.encode()
    except (UnicodeEncodeError, AttributeError):  # either shows the text
        return None


def _base64url(raw: bytes) -> bytes:
    return base64.urlsafe_b64encode(raw).rstrip(b"=")


def _decoded(text: str, *, urlsafe: bool) -> bytes | None:
    """Read base64, or base64url without padding; None when its bytes would not be written like that, character by character."""
    encode = _base64url if urlsafe else base64.b64encode
    try:
        encoded = text.encode()
        standard = encoded.translate(_STANDARD) + b"=" * (-len(encoded) % 4) if urlsafe else encoded
        raw = base64.b64decode(standard)
    except (ValueError, AttributeError):
        return None
    return raw if encode(raw) == encoded else None


def _fault(kid: str, material: bytes | None) -> str:
    if not is_kid(kid):
        return "the id of a key must be 1 to 32 of a-z, 0-9 and -"
    if not isinstance(material, bytes):
        return f"the key {kid!r} is not the base64 of bytes (with + and /, and padded)"
    if len(material) != KEY_BYTES:
        return f"the key {kid!r} has {len(material)} bytes; it must have {KEY_BYTES}"
    if len(set(material)) == 1:
        return f"the key {kid!r} is one byte repeated, not a random key"
    if material.isascii() and material.decode().isprintable():  # of random keys, one in 10**13
        return f"the key {kid!r} is text, a passphrase or digits, not a random key"
    return ""
