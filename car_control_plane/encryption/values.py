"""What needs no cryptography: the two forms of a connection string, sealed as it is stored and opened as it is used, and the states of a key.

The models name these, and stay cheap to import. Nothing here seals or opens.
"""

import re
from collections.abc import Callable
from enum import StrEnum
from typing import Any, Final, Never, TypeVar, final

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from car_control_plane import dsn as dsns
from car_control_plane.dsn import Dsn
from car_control_plane.errors import DecryptionError

T = TypeVar("T")

FORMAT: Final = "ccp1"
"""Names the one set of algorithms there is; another set would be another name, so that nothing is negotiated."""

KID: Final = "[a-z0-9-]{1,32}"
"""What the name of a key looks like."""

_KID = re.compile(KID)
_FORM = re.compile(rf"{FORMAT}:({KID}):[A-Za-z0-9_-]+")


def is_kid(text: object) -> bool:
    """Tell whether this can be the name of a key. Show no other: what was mistyped may be the key itself."""
    return isinstance(text, str) and _KID.fullmatch(text) is not None


def hidden(value: T) -> Callable[[], T]:
    """Keep a secret where a debugger or an error tracker that walks through attributes finds a function."""
    return lambda: value


class KeyState(StrEnum):
    """What a key may be used for."""

    PENDING = "pending"
    CURRENT = "current"
    RETIRED = "retired"
    DESTROYED = "destroyed"


@final
class ConnectionString:
    """An opened connection string. Prints masked; `reveal()` is the one way to its text.

    It cannot be pickled, copied, written as JSON, or made a field of a model: each is a TypeError. Keep it for as long as a connection takes, not
    longer; Python cannot wipe it from memory. Immutable and hashable; equal when the texts are.
    """

    __slots__ = ("_text",)

    _text: Callable[[], str]

    def __init__(self, text: str) -> None:
        object.__setattr__(self, "_text", hidden(text))

    def reveal(self) -> str:
        """Return the whole connection string, its password in clear."""
        return self._text()

    @property
    def dsn(self) -> Dsn:
        """The connection string taken apart; prints masked as well.

        Raises:
            ConfigurationError: It is not one this version of the library reads.
        """
        return dsns.parse(self._text())

    def __setattr__(self, name: str, value: object) -> Never:
        raise AttributeError("a connection string cannot be changed")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConnectionString) and self._text() == other._text()

    def __hash__(self) -> int:
        return hash(self._text())

    def __repr__(self) -> str:
        return "ConnectionString('***')"

    def __str__(self) -> str:
        return "***"

    def __format__(self, spec: str) -> str:
        return format("***", spec)

    def _refuse(self, *_: object) -> Never:
        raise TypeError("a connection string is neither copied nor written out; reveal() gives its text")

    __copy__ = __deepcopy__ = __reduce_ex__ = __reduce__ = __getstate__ = _refuse

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        raise TypeError("an opened connection string belongs into no model; take it as SecretStr, store it sealed")


@final
class SealedConnectionString:
    """A connection string as it is stored: `ccp1:<key id>:<sealed text>`; the only thing its column takes.

    Made by `Keyring.seal`, by `parse`, and by reading a row. A row's text is taken as it is, so that a damaged one can be loaded, listed and
    repaired: it is opening it that fails. What is damaged may be plain text: it prints as its key id or as damaged, and a damaged one is pickled
    without its text. Immutable and hashable; equal when the texts are.
    """

    __slots__ = ("_text",)

    _text: Callable[[], str]

    def __init__(self, text: str) -> None:
        object.__setattr__(self, "_text", hidden(text))

    @classmethod
    def parse(cls, text: str) -> "SealedConnectionString":
        """Take text that has the form of a sealed connection string; whether it can be opened is not looked at.

        Raises:
            DecryptionError: It has another form, plain text for example; neither the error nor a frame of it holds the text.
        """
        sealed = cls(text)
        del text
        if sealed.kid is None:
            raise DecryptionError("this is not a sealed connection string", hint="Seal it first: Keyring.seal().")
        return sealed

    @property
    def kid(self) -> str | None:
        """The id of the key that opens it; None when the text is not of the form."""
        form = _FORM.fullmatch(self._text())
        return form[1] if form else None

    @property
    def text(self) -> str:
        """The text as stored."""
        return self._text()

    def __setattr__(self, name: str, value: object) -> Never:
        raise AttributeError("a sealed connection string cannot be changed")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SealedConnectionString) and self._text() == other._text()

    def __hash__(self) -> int:
        return hash(self._text())

    def __repr__(self) -> str:
        return f"<SealedConnectionString {f'key {kid}' if (kid := self.kid) else 'damaged'}>"

    def __reduce__(self) -> tuple[type["SealedConnectionString"], tuple[str]]:
        return SealedConnectionString, (self._text() if self.kid else "",)

    def __copy__(self) -> "SealedConnectionString":
        return self

    def __deepcopy__(self, memo: object) -> "SealedConnectionString":
        return self

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        # An instance and nothing else: text of whatever form stays out of the column by accident.
        return core_schema.is_instance_schema(cls)
