"""Names: whatever text is offered, it is refused or stored in one form, the same on every way in."""

import unicodedata
import uuid
from collections.abc import Callable

import pytest
from hypothesis import assume, example, given, settings, strategies as st
from pydantic import ValidationError

from car_control_plane.encryption import SealedConnectionString
from car_control_plane.models import (
    SystemConfig,
    SystemConfigCreate,
    Tenant,
    TenantCreate,
    TenantDatabase,
    TenantUpdate,
)
from car_control_plane.models.base import check_name, check_text
from car_control_plane.models.tenants import TenantEnvironment

PRODUCTION = TenantEnvironment.PRODUCTION
BIDI_OVERRIDES = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
CONTROLS = [chr(n) for n in (*range(0x20), *range(0x7F, 0xA0))] + ["\u2028", "\u2029", *BIDI_OVERRIDES]
BLANKS = [chr(n) for n in range(0x3001) if chr(n).isspace() and chr(n) not in CONTROLS]

WAYS_IN: dict[str, Callable[[str], str]] = {
    "Tenant": lambda name: Tenant(name=name, environment=PRODUCTION).name,
    "TenantCreate": lambda name: TenantCreate(name=name, environment=PRODUCTION).name,
    "TenantUpdate": lambda name: TenantUpdate(name=name).model_dump()["name"],
    "SystemConfig": lambda name: SystemConfig(key=name, value=None).key,
    "SystemConfigCreate": lambda name: SystemConfigCreate(key=name, value=None).key,
    "TenantDatabase": lambda name: (
        TenantDatabase(
            tenant_id=uuid.UUID(int=7 << 76 | 2 << 62),
            connection_string_encrypted=SealedConnectionString("ccp1:k1:c2VhbGVk"),
            database_name="x",
            host=name,
        ).host
    ),
}

relaxed = settings(deadline=None)

# Much of Unicode, with what is special about names made frequent.
special = st.sampled_from(
    [*CONTROLS, *BLANKS, "\ud800", "\udfff", "\u0301", "\u0958", "\ufb2c", "\u212b", "\u200b", "\u200d"]
)
anything = st.text(st.characters() | special, max_size=300)
ordinary = st.characters(
    exclude_categories=["Cc", "Cs", "Zl", "Zp", "Zs", "Cn", "Co"], exclude_characters=BIDI_OVERRIDES
)


def outcomes(text: str) -> dict[str, str | None]:
    """Return what each way in makes of a text; None is a refusal."""
    found: dict[str, str | None] = {}
    for way, enter in WAYS_IN.items():
        try:
            found[way] = enter(text)
        except ValidationError:
            found[way] = None
    return found


@settings(deadline=None, max_examples=400)
@given(anything)
@example("")
@example("a" * 255)
@example("a" * 256)
@example("\u0958" * 127)
@example("\u0958" * 128)
@example("e\u0301" * 127)
@example("e\u0301" * 128)
@example("\u212b")
@example("\u0301")
@example("\U0001f469\u200d\U0001f680")
def test_every_way_in_draws_the_same_line(text: str) -> None:
    found = set(outcomes(text).values())
    assert len(found) == 1
    (name,) = found
    if name is None:
        return
    assert 1 <= len(name) <= 255
    assert unicodedata.is_normalized("NFC", name)
    assert name == unicodedata.normalize("NFC", text)
    assert name == name.strip()
    assert not [c for c in name if unicodedata.category(c) in {"Cc", "Cs", "Zl", "Zp"}]
    assert not set(name) & set(BIDI_OVERRIDES)
    name.encode()


@relaxed
@given(anything)
def test_what_was_accepted_once_is_accepted_again_unchanged(text: str) -> None:
    """Otherwise a row could be read and not written back."""
    name = WAYS_IN["Tenant"]
    try:
        first = name(text)
    except ValidationError:
        assume(False)
    assert name(first) == first


@relaxed
@given(st.text(ordinary, min_size=1, max_size=127))
def test_ordinary_text_is_a_name(text: str) -> None:
    """Up to 127 characters: U+FB2C and others have three in normal form C, and what is not stored must not be offered either."""
    normal = unicodedata.normalize("NFC", text)
    assume(len(normal) <= 255)
    assert set(outcomes(text).values()) == {normal}


@relaxed
@given(st.text(ordinary, max_size=20), st.sampled_from(CONTROLS), st.text(ordinary, max_size=20))
def test_a_control_character_anywhere_is_refused_by_its_number(before: str, control: str, after: str) -> None:
    with pytest.raises(ValueError, match=f"U\\+{ord(control):04X}"):
        check_name(before + control + after)
    with pytest.raises(ValueError, match=f"U\\+{ord(control):04X}"):
        check_text(before + control + after)
    assert set(outcomes(before + control + after).values()) == {None}


@relaxed
@given(st.text(ordinary, max_size=20), st.characters(categories=["Cs"]), st.text(ordinary, max_size=20))
def test_a_lone_surrogate_anywhere_is_refused(before: str, surrogate: str, after: str) -> None:
    assert set(outcomes(before + surrogate + after).values()) == {None}
    with pytest.raises(ValueError, match="control characters"):
        check_text(before + surrogate + after)


@relaxed
@given(
    st.text(ordinary, min_size=1, max_size=20), st.text(st.sampled_from(BLANKS), min_size=1, max_size=3), st.booleans()
)
def test_blanks_are_refused_around_a_name_and_kept_inside(text: str, blanks: str, in_front: bool) -> None:
    around = blanks + text if in_front else text + blanks
    assert set(outcomes(around).values()) == {None}
    inside = text + blanks + text
    assert set(outcomes(inside).values()) == {unicodedata.normalize("NFC", inside)}


def test_the_blanks_are_those_of_unicode() -> None:
    assert {" ", "\u00a0", "\u2003", "\u3000"} <= set(BLANKS)


@pytest.mark.parametrize("character", ["\u061c", "\u200b", "\u200d", "\u200e", "\u200f", "\ufeff", "\u0301", "\ue000"])
def test_what_scripts_and_emoji_need_is_allowed(character: str) -> None:
    assert check_name(f"a{character}b") == unicodedata.normalize("NFC", f"a{character}b")


@relaxed
@given(st.text(ordinary, max_size=300))
def test_text_may_be_empty_and_of_any_length(text: str) -> None:
    assert check_text(text) == unicodedata.normalize("NFC", text)
    assert check_text(f" {text} ") == unicodedata.normalize("NFC", f" {text} ")
