"""A sealed value opens as it was sealed, in its place, with its key; everything else is refused without a word of what is inside."""

import asyncio
import base64
import itertools
import random
import string
import uuid
from collections.abc import Iterator

import pytest
from hypothesis import given, strategies as st

from car_control_plane.encryption import Key, Keyring, SealedConnectionString, StaticKeys
from car_control_plane.encryption.envelope import _sealed, connection_string_context, seal, unseal
from car_control_plane.errors import DecryptionError, UnknownKeyError
from tests.fixtures.leaks import failure_of, failure_of_call, leaks

CANARY = "c4naryc4nary"
TEXT = f"postgresql://app:{CANARY}@db.example.com:5432/tenant_0001?sslmode=verify-full"
TENANT, DATABASE = uuid.UUID("01890a5d-ac96-774b-bcce-b302099a8057"), uuid.UUID("01890a5d-ac97-7b3c-9d2e-5f6a7b8c9d0e")
CONTEXT = connection_string_context(TENANT, DATABASE)
KEY, OTHER = Key("2026-11", bytes(range(100, 132))), Key("2026-05", bytes(range(32)))
NAMESAKE = Key(KEY.kid, bytes(range(200, 232)))
ALPHABET = string.ascii_uppercase + string.ascii_lowercase + string.digits + "-_"

SEALED = _sealed(KEY, TEXT.encode(), CONTEXT, bytes(range(32)))
HEAD, BODY = SEALED.rsplit(":", 1)
RAW = base64.urlsafe_b64decode(BODY + "=" * (-len(BODY) % 4))
SALT, COMMITMENT, CIPHERTEXT, TAG = RAW[:32], RAW[32:64], RAW[64:-16], RAW[-16:]


def written(raw: bytes, head: str = HEAD) -> str:
    return f"{head}:{base64.urlsafe_b64encode(raw).decode().rstrip('=')}"


# --- mutations --------------------------------------------------------------------------------------------------------------


def changed_bytes() -> Iterator[str]:
    """Every bit of every byte."""
    for at, bit in itertools.product(range(len(RAW)), range(8)):
        yield written(RAW[:at] + bytes([RAW[at] ^ 1 << bit]) + RAW[at + 1 :])


def changed_characters() -> Iterator[str]:
    for at in range(len(SEALED)):
        for character in {"A", "-", ":", "=", "+", "/", "\n", "\0", "é", SEALED[at].swapcase()} - {SEALED[at]}:
            yield SEALED[:at] + character + SEALED[at + 1 :]


def cut() -> Iterator[str]:
    """At each length, from either end, of the text and of the bytes; and with a character or a byte left out or doubled."""
    for at in range(len(SEALED)):
        yield from (SEALED[:at], SEALED[at + 1 :], SEALED[:at] + SEALED[at + 1 :], SEALED[: at + 1] + SEALED[at:])
    for at in range(len(RAW)):
        yield from (written(RAW[:at]), written(RAW[at + 1 :]), written(RAW[:at] + RAW[at + 1 :]))
        yield written(RAW[: at + 1] + RAW[at:])


def encoded_otherwise() -> Iterator[str]:
    """Texts that a lenient decoder reads as the same bytes."""
    padding = "=" * (-len(BODY) % 4)
    last = ALPHABET.index(BODY[-1])
    yield from (
        f"{HEAD}:{BODY[:-1]}{ALPHABET[last | bits]}" for bits in range(1, 2 ** (2 * len(padding))) if bits & ~last
    )
    yield from (SEALED + padding, SEALED + "=", SEALED + "====", f"{HEAD}:{padding}{BODY}")
    yield f"{HEAD}:{base64.b64encode(RAW).decode()}"
    yield f"{HEAD}:{base64.b64encode(RAW).decode().rstrip('=')}"
    yield from (f"{HEAD}:{way(RAW).decode()}" for way in (base64.b16encode, base64.b32encode, base64.b85encode))
    yield f"{HEAD}:{RAW.hex()}"
    for blank in (" ", "\n", "\r\n", "\t", "\0", "\ufeff", "\u200b"):
        yield from (SEALED + blank, blank + SEALED, f"{HEAD}:{blank}{BODY}", f"{HEAD}:{BODY[:7]}{blank}{BODY[7:]}")


def other_headers() -> Iterator[str]:
    formats = [
        "ccp2",
        "ccp0",
        "ccp",
        "ccp11",
        "CCP1",
        "Ccp1",
        "ccp1 ",
        "",
        "fernet",
        "v1",
        "ccp\uff11",
        "\u0441\u0441\u04401",
    ]
    yield from (f"{name}:{KEY.kid}:{BODY}" for name in formats)
    kids = ["", "2026-12", "2026-1", "2026-111", "2026_11", " 2026-11", "2026-11 ", "2026-11\n", "x" * 32, "x" * 33, "\uff12026-11", OTHER.kid, "2026\u201011"]  # fmt: skip
    yield from (f"ccp1:{kid}:{BODY}" for kid in kids)
    yield from (
        f"{HEAD}::{BODY}",
        f"{HEAD}:x:{BODY}",
        f":{SEALED}",
        f"{SEALED}:",
        HEAD,
        BODY,
        f"{HEAD}:",
        f"{HEAD}{BODY}",
    )


def rearranged() -> Iterator[str]:
    """The parts of the value in another order, doubled, left out, and mixed with those of other values of the same row."""
    parts = (SALT, COMMITMENT, CIPHERTEXT, TAG)
    for count in range(6):
        for some in itertools.product(parts, repeat=count):
            if some != parts:
                yield written(b"".join(some))
    twin = base64.urlsafe_b64decode(seal(KEY, TEXT, CONTEXT).rsplit(":", 1)[1] + "==")
    twins = (twin[:32], twin[32:64], twin[64:-16], twin[-16:])
    for choice in itertools.product((0, 1), repeat=4):
        if 0 < sum(choice) < 4:
            yield written(b"".join((parts, twins)[which][at] for at, which in enumerate(choice)))
    other = seal(OTHER, TEXT, CONTEXT)
    yield from (
        SEALED + SEALED,
        SEALED + other,
        f"{SEALED}\n{other}",
        f"{SEALED},{other}",
        f"{HEAD}:{other.rsplit(':', 1)[1]}",
    )
    blocks = [CIPHERTEXT[at : at + 64] for at in range(0, len(CIPHERTEXT), 64)]
    yield from (
        written(SALT + COMMITMENT + b"".join(order) + TAG)
        for order in itertools.permutations(blocks)
        if list(order) != blocks
    )


def random_values() -> Iterator[str]:
    chance = random.Random(1)
    for size in range(0, 300, 2):
        yield written(chance.randbytes(size))
        yield written(SALT + COMMITMENT + chance.randbytes(size))
        yield "".join(chance.choices(string.printable, k=size))
    for blocks in range(1, 40):
        yield written(chance.randbytes(80 + 64 * blocks))
        yield written(SALT + COMMITMENT + chance.randbytes(64 * blocks + 16))


def look_alikes() -> Iterator[str]:
    """Characters that look like others, or become others when normalised or written small."""
    likes = {"a": "\u0430", "c": "\u0441", "e": "\u0435", "o": "\u043e", "p": "\u0440", "x": "\u0445", "K": "\u212a", "s": "\u017f", "i": "\u0131", "-": "\u2010", "_": "\uff3f", ":": "\uff1a"}  # fmt: skip
    likes |= {character: chr(ord(character) + 0xFEE0) for character in string.digits}
    for at, character in enumerate(SEALED):
        if character in likes:
            yield SEALED[:at] + likes[character] + SEALED[at + 1 :]
    yield "".join(likes.get(character, character) for character in SEALED)


MUTATIONS = (
    changed_bytes,
    changed_characters,
    cut,
    encoded_otherwise,
    other_headers,
    rearranged,
    random_values,
    look_alikes,
)


def test_there_are_enough_mutations_and_the_original_opens() -> None:
    assert unseal(KEY, SEALED, CONTEXT) == TEXT
    texts = [text for mutation in MUTATIONS for text in mutation()]
    assert len(set(texts)) > 3000
    assert SEALED not in texts
    assert all(len(list(mutation())) >= 30 for mutation in MUTATIONS)


@pytest.mark.parametrize("mutation", MUTATIONS)
async def test_no_mutation_opens(mutation: type[Iterator[str]]) -> None:
    accepted = []
    async with Keyring(StaticKeys(f"{KEY.kid}:{KEY.to_base64()},{OTHER.kid}:{OTHER.to_base64()}")) as keys:
        for text in mutation():
            try:
                await keys.unseal(SealedConnectionString(text), tenant_id=TENANT, database_id=DATABASE)
            except (DecryptionError, UnknownKeyError):
                continue
            accepted.append(text)
    assert accepted == []


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_no_mutation_opens_with_the_key_at_hand(mutation: type[Iterator[str]]) -> None:
    """Without the keyring, which has looked at the key id before."""
    for text in mutation():
        with pytest.raises(DecryptionError):
            unseal(KEY, text, CONTEXT)


async def test_no_value_opens_in_another_place_or_with_another_key() -> None:
    ids = [TENANT, DATABASE, uuid.UUID(int=0), uuid.UUID(int=TENANT.int ^ 1), uuid.UUID(int=DATABASE.int ^ 1 << 127)]
    places = [place for place in itertools.product(ids, ids) if place != (TENANT, DATABASE)]
    columns = [
        b"",
        CONTEXT[:-1],
        CONTEXT + b"\0",
        CONTEXT.replace(b"connection_string", b"connection_strinh"),
        CONTEXT[4:],
    ]
    keys = Keyring(StaticKeys(f"{KEY.kid}:{KEY.to_base64()}"))
    for tenant, database in places:
        with pytest.raises(DecryptionError):
            await keys.unseal(SealedConnectionString(SEALED), tenant_id=tenant, database_id=database)
    for context in columns:
        with pytest.raises(DecryptionError):
            unseal(KEY, SEALED, context)
    for key in (NAMESAKE, OTHER, Key("2026-12", bytes(range(100, 132)))):
        with pytest.raises(DecryptionError):
            unseal(key, SEALED, CONTEXT)
    renamed = SEALED.replace(KEY.kid, "2026-12")
    with pytest.raises(DecryptionError):
        unseal(Key("2026-12", bytes(range(100, 132))), renamed, CONTEXT)
    with pytest.raises(UnknownKeyError, match="2026-12"):
        await keys.unseal(SealedConnectionString(renamed), tenant_id=TENANT, database_id=DATABASE)
    await keys.close()


@pytest.mark.parametrize("mutation", MUTATIONS)
async def test_no_refusal_shows_what_is_inside_or_was_given(mutation: type[Iterator[str]]) -> None:
    """The canary is inside of the value, and in the text given where that is plain: forty of each kind are looked through."""
    texts = list(mutation())
    keys = Keyring(StaticKeys(f"{KEY.kid}:{KEY.to_base64()}"))
    for text in [*texts[:: max(1, len(texts) // 40)], TEXT, f"ccp1:{KEY.kid}:{CANARY}", f"ccp1:{CANARY.upper()}:x"]:
        value = SealedConnectionString(text)
        for error in (
            failure_of_call(lambda text=text: unseal(KEY, text, CONTEXT)),  # type: ignore[misc]  # mypy does not know the default
            await failure_of(keys.unseal(value, tenant_id=TENANT, database_id=DATABASE)),
        ):
            assert isinstance(error, DecryptionError | UnknownKeyError)
            assert list(leaks(error, CANARY)) == []
            assert list(leaks(error, KEY.to_base64())) == []
    await keys.close()


# --- round trips ------------------------------------------------------------------------------------------------------------


kids = st.from_regex("[a-z0-9-]{1,32}", fullmatch=True)
materials = st.binary(min_size=32, max_size=32).filter(lambda raw: len(set(raw)) > 1 and not raw.isascii())


@given(kids, materials, st.text(), st.binary())
def test_any_text_opens_as_it_was_sealed(kid: str, material: bytes, text: str, context: bytes) -> None:
    key = Key(kid, material)
    assert unseal(key, seal(key, text, context), context) == text


@given(st.text(), st.uuids(), st.uuids(), st.uuids(), st.uuids())
def test_a_value_opens_in_its_place_only(text: str, t1: uuid.UUID, d1: uuid.UUID, t2: uuid.UUID, d2: uuid.UUID) -> None:
    sealed = seal(KEY, text, connection_string_context(t1, d1))
    try:
        opened = unseal(KEY, sealed, connection_string_context(t2, d2))
    except DecryptionError:
        assert (t1, d1) != (t2, d2)
    else:
        assert ((t1, d1), text) == ((t2, d2), opened)


@given(st.text())
def test_any_text_passes_through_a_keyring(text: str) -> None:
    async def there_and_back() -> str:
        async with Keyring(StaticKeys(f"{KEY.kid}:{KEY.to_base64()}")) as keys:
            sealed = await keys.seal(text, tenant_id=TENANT, database_id=DATABASE)
            return (await keys.unseal(sealed, tenant_id=TENANT, database_id=DATABASE)).reveal()

    assert asyncio.run(there_and_back()) == text


@given(st.text(st.sampled_from(ALPHABET + ":=+/ \n\0é"), max_size=400))
def test_text_of_the_alphabet_does_not_open(text: str) -> None:
    for value in (text, f"{HEAD}:{text}"):
        with pytest.raises(DecryptionError):
            unseal(KEY, value, CONTEXT)
