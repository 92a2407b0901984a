"""Encryption keys: which there are, what they may be used for, and how to tell a wrong one. Never the keys themselves, but wrapped."""

from datetime import datetime
from typing import Annotated, ClassVar

import sqlalchemy
from pydantic import StringConstraints
from pydantic.json_schema import SkipJsonSchema
from sqlalchemy import CheckConstraint, Index, text
from sqlmodel import Field

from car_control_plane.encryption.values import KeyState
from car_control_plane.models.base import Model, Stamps, Text, Versioned, enum_type

Kid = Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,32}$")]
"""Name of a key: 1 to 32 of a-z, 0-9 and -."""

CheckValue = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
"""`Key.check_value`: 32 hexadecimal digits."""


class EncryptionKeyBase(Model):
    """The columns but the stamps, in their order."""

    kid: Kid = Field(primary_key=True, max_length=32)
    provider: Text = Field(min_length=1, max_length=63)
    kek_ref: Text | None = Field(default=None, sa_type=sqlalchemy.Text)
    wrapped: SkipJsonSchema[Text | None] = Field(default=None, sa_type=sqlalchemy.Text, repr=False, exclude=True)
    state: KeyState | None = Field(default=None, sa_type=enum_type(KeyState, "encryption_key_state"))
    check_value: CheckValue = Field(max_length=32)


class EncryptionKey(Versioned, Stamps, EncryptionKeyBase, table=True):
    """A key that seals connection strings; a row of `control_plane.encryption_keys`.

    Of a key that is kept outside of the database there is the check value only: `state`, `kek_ref` and `wrapped` are None. The others have a
    state, name the outer key that wraps them, and have their wrapped bytes until they are destroyed. `wrapped` stays out of repr, dumps, JSON
    Schema and OpenAPI.
    """

    __tablename__: ClassVar[str] = "encryption_keys"
    __table_args__ = (
        CheckConstraint("kid ~ '^[a-z0-9-]{1,32}$'", name="kid"),
        CheckConstraint("provider <> ''", name="provider"),
        CheckConstraint("check_value ~ '^[0-9a-f]{32}$'", name="check_value"),
        CheckConstraint(
            "CASE WHEN state IS NULL THEN kek_ref IS NULL AND wrapped IS NULL"
            " ELSE kek_ref IS NOT NULL AND (wrapped IS NULL) = (state = 'destroyed') END",
            name="wrapped",
        ),
        Index("uq_encryption_keys_current", "state", unique=True, postgresql_where=text("state = 'current'")),
    )


class EncryptionKeyPublic(Model):
    """An encryption key as an API shows it."""

    model_config = {"extra": "ignore", "from_attributes": True}  # noqa: RUF012 -- forbid would break clients when a field is added

    kid: str
    provider: str
    kek_ref: str | None
    state: KeyState | None
    check_value: str
    created_at: datetime
    updated_at: datetime
    version: int
