"""The error tree is written three times, for three readers; here it is one."""

import re

import pytest

from car_control_plane import errors
from car_control_plane.errors import ControlPlaneError
from tests.quality.programs import ROOT

PAGE = ROOT / "docs" / "reference" / "errors.md"
GUIDE = ROOT / "docs" / "how-to" / "troubleshoot.md"

ALL = [ControlPlaneError]
for _error in ALL:
    ALL += [cls for cls in _error.__subclasses__() if cls.__module__ == errors.__name__]  # other tests make their own

SEED_SENTENCES = (
    "DATABASE_URL environment variable is required",
    "relation does not exist",
    "schema 'control_plane' does not exist",
    "permission denied",
)


def drawn_tree() -> dict[str, tuple[str | None, str | None]]:
    """Read the picture in the module's docstring: class -> (parent, builtin in parentheses)."""
    tree: dict[str, tuple[str | None, str | None]] = {}
    above: list[str] = []
    for match in re.finditer(r"^    ([│├└─ ]*)(\w+Error)(?: \((\w+)\))?$", errors.__doc__ or "", re.MULTILINE):
        depth = len(match[1]) // 4
        above[depth:] = [match[2]]
        tree[match[2]] = (above[depth - 1] if depth else None, match[3])
    return tree


def test_the_picture_shows_the_classes() -> None:
    assert drawn_tree() == {
        cls.__name__: (
            next((base.__name__ for base in cls.__bases__ if issubclass(base, ControlPlaneError)), None),
            next(
                (b.__name__ for b in cls.__bases__ if not issubclass(b, ControlPlaneError) and b is not Exception), None
            ),
        )
        for cls in ALL
    }


def test_every_class_is_exported() -> None:
    assert {cls.__name__ for cls in ALL} == {name for name in errors.__all__ if name.endswith("Error")}


def test_codes_are_kebab_case_and_unique() -> None:
    codes = [cls.code for cls in ALL]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", code) for code in codes)


def test_the_page_has_one_entry_per_class() -> None:
    entries = re.findall(r"^## (\w+) \{ #([\w-]+) \}$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(entries) == sorted((cls.__name__, cls.code) for cls in ALL)


@pytest.mark.parametrize("sentence", SEED_SENTENCES)
def test_the_seeds_sentences_stand_in_the_guide_word_for_word(sentence: str) -> None:
    assert sentence in GUIDE.read_text(encoding="utf-8")
