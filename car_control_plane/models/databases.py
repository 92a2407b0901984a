"""Tenant databases: where a tenant's data lives, and the sealed way in."""

import uuid
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, ClassVar

import sqlalchemy
from pydantic import MISSING, AwareDatetime, SecretStr, StringConstraints
from pydantic.json_schema import SkipJsonSchema
from sqlalchemy import CheckConstraint, Index, TypeDecorator, UniqueConstraint, inspect, text
from sqlalchemy.orm import relationship
from sqlmodel import Field

from car_control_plane.encryption.values import SealedConnectionString
from car_control_plane.errors import InvalidDataError
from car_control_plane.models.base import Model, Name, Stamps, Text, Versioned, enum_type, uuid7

Purpose = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,62}$")]
"""What a tenant uses a database for: 1 to 63 of a-z, 0-9, _ and -, beginning with a letter."""


class TenantDatabaseStatus(StrEnum):
    """Whether a tenant database may be used."""

    ACTIVE = "active"
    INACTIVE = "inactive"
    MIGRATING = "migrating"
    ERROR = "error"


class SealedText(TypeDecorator[SealedConnectionString]):
    """A text column that takes sealed connection strings only, and gives back whatever it holds.

    What was put there by other means may be damaged. It loads all the same, so that one bad row stops no listing and can be repaired; it is its
    opening that fails.
    """

    impl = sqlalchemy.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> str | None:
        """Return the text of a sealed value.

        Raises:
            InvalidDataError: It is something else: text, even sealed text, has not said that it is sealed.
        """
        sealed = value if isinstance(value, SealedConnectionString) else None
        refused = sealed is None and value is not None
        del value  # error trackers print the variables of every frame an error passes
        if refused:
            raise InvalidDataError(
                "connection_string_encrypted takes a SealedConnectionString only",
                hint="Seal it with Keyring.seal(); SealedConnectionString.parse() takes what is sealed already.",
            )
        return sealed.text if sealed is not None else None

    def process_result_value(self, value: Any, dialect: Any) -> SealedConnectionString | None:
        """Return what is stored, whatever it is."""
        return None if value is None else SealedConnectionString(value)


class TenantDatabaseBase(Model):
    """The seed's columns, in the seed's order."""

    id: uuid.UUID = Field(default_factory=uuid7, primary_key=True)
    tenant_id: uuid.UUID = Field(
        foreign_key="control_plane.tenants.tenant_id", ondelete="RESTRICT", nullable=False, index=True
    )
    connection_string_encrypted: SkipJsonSchema[SealedConnectionString] = Field(
        sa_type=SealedText, nullable=False, repr=False, exclude=True
    )
    database_name: Name
    host: Name
    port: int = Field(default=5432, ge=1, le=65535, sa_column_kwargs={"server_default": text("5432")})
    status: TenantDatabaseStatus = Field(
        default=TenantDatabaseStatus.ACTIVE,
        sa_type=enum_type(TenantDatabaseStatus, "tenant_database_status"),
        sa_column_kwargs={"server_default": text("'active'")},
        index=True,
    )


class TenantDatabaseExtras(Model):
    """What the seed's table does not have: what the database is for, and the Alembic revision it was last seen at."""

    purpose: Purpose = Field(default="primary", max_length=63, sa_column_kwargs={"server_default": text("'primary'")})
    revision: Text | None = Field(default=None, max_length=255)


class TenantDatabaseVerification(Model):
    """What was found when the database was last connected to; all None before."""

    verified_at: AwareDatetime | None = None
    server_version: Text | None = Field(default=None, max_length=63)
    tls_version: Text | None = Field(default=None, max_length=63)
    verification_error: Text | None = Field(default=None, sa_type=sqlalchemy.Text)


class TenantDatabase(
    TenantDatabaseVerification, Versioned, TenantDatabaseExtras, Stamps, TenantDatabaseBase, table=True
):
    """A database of a tenant; a row of `control_plane.tenant_databases`.

    The way in is stored sealed only, and its column stays out of repr, dumps, JSON Schema and OpenAPI; so does its name, here as well.
    """

    __tablename__: ClassVar[str] = "tenant_databases"
    __table_args__ = (
        UniqueConstraint("tenant_id", "purpose"),
        CheckConstraint("port BETWEEN 1 AND 65535", name="port"),
        CheckConstraint("purpose ~ '^[a-z][a-z0-9_-]{0,62}$'", name="purpose"),
        CheckConstraint("connection_string_encrypted ~ '^ccp1:[a-z0-9-]{1,32}:[A-Za-z0-9_-]+$'", name="sealed"),
        Index(None, "created_at", "id"),  # keyset listing
        # What is sealed with which key: a rotation goes along it, and a kill of it loses nothing.
        Index("idx_tenant_databases_kid_id", text("split_part(connection_string_encrypted, ':', 2)"), "id"),
    )


# Never read. Without it SQLAlchemy does not know that, in one flush, a tenant must be inserted before its databases and deleted after them.
inspect(TenantDatabase).add_property("_tenant", relationship("Tenant", lazy="raise"))


class TenantDatabaseCreate(Model):
    """What is needed to register a tenant database; host, port and database name are read from the connection string."""

    connection_string: SecretStr
    purpose: Purpose = "primary"


class TenantDatabaseUpdate(Model):
    """What may be changed of a tenant database; a field that is left out stays, `null` is refused."""

    connection_string: SecretStr | MISSING = MISSING
    purpose: Purpose | MISSING = MISSING


class TenantDatabasePublic(Model):
    """A tenant database as an API shows it: where it is, never how to get in."""

    model_config = {"extra": "ignore", "from_attributes": True}  # noqa: RUF012 -- forbid would break clients when a field is added

    id: uuid.UUID
    tenant_id: uuid.UUID
    database_name: str
    host: str
    port: int
    status: TenantDatabaseStatus
    purpose: str
    revision: str | None
    verified_at: datetime | None
    server_version: str | None
    tls_version: str | None
    verification_error: str | None
    created_at: datetime
    updated_at: datetime
    version: int
