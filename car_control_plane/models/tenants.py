"""Tenants: who is served, in which environment, and whether they may be used now."""

import uuid
from datetime import datetime
from enum import StrEnum
from typing import Annotated, ClassVar

import sqlalchemy
from pydantic import MISSING, AfterValidator
from sqlalchemy import CheckConstraint, Index, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlmodel import Field

from car_control_plane.models.base import Model, Name, Stamps, Text, Versioned, check_name, check_text, enum_type, uuid7

SYSTEM_ADMIN_ID = uuid.UUID("00000000-0000-7000-8000-000000000001")
"""The id of the seeded tenant `system_admin`, the same in every control plane."""

SYSTEM_ADMIN_NAME = "system_admin"

MAX_LABELS = 64
MAX_LABEL_KEY = 63
MAX_LABEL_VALUE = 255
MAX_REASON = 1000


class TenantEnvironment(StrEnum):
    """Where a tenant lives."""

    DEVELOPMENT = "development"
    STAGING = "staging"
    PRODUCTION = "production"


class TenantStatus(StrEnum):
    """Whether a tenant may be used."""

    ACTIVE = "active"
    INACTIVE = "inactive"
    SUSPENDED = "suspended"
    PENDING = "pending"


TRANSITIONS: dict[TenantStatus, frozenset[TenantStatus]] = {
    TenantStatus.PENDING: frozenset({TenantStatus.ACTIVE, TenantStatus.INACTIVE}),
    TenantStatus.ACTIVE: frozenset({TenantStatus.SUSPENDED, TenantStatus.INACTIVE}),
    TenantStatus.SUSPENDED: frozenset({TenantStatus.ACTIVE, TenantStatus.INACTIVE}),
    TenantStatus.INACTIVE: frozenset({TenantStatus.ACTIVE}),
}
"""From each status, the statuses a tenant can change to. The database enforces the same (trigger `tenants_20_life_cycle`)."""


def sources_of(target: TenantStatus) -> tuple[TenantStatus, ...]:
    """Return the statuses from which a tenant can change to `target`, in the enum's order."""
    return tuple(source for source in TenantStatus if target in TRANSITIONS[source])


def _check_labels(labels: dict[str, str]) -> dict[str, str]:
    if len(labels) > MAX_LABELS:
        msg = f"must have at most {MAX_LABELS} labels"
        raise ValueError(msg)
    checked: dict[str, str] = {}
    for key, value in labels.items():
        name = check_name(key)
        if len(name) > MAX_LABEL_KEY:
            msg = f"a label's key must have at most {MAX_LABEL_KEY} characters"
            raise ValueError(msg)
        if name in checked:
            msg = f"two labels have the same key {name!r} in Unicode normal form C"
            raise ValueError(msg)
        checked[name] = check_text(value)
        if len(checked[name]) > MAX_LABEL_VALUE:
            msg = f"the value of label {name!r} must have at most {MAX_LABEL_VALUE} characters"
            raise ValueError(msg)
    return checked


Labels = Annotated[dict[str, str], AfterValidator(_check_labels)]
"""Up to 64 labels; keys are names of 1 to 63 characters, values texts of up to 255."""


class TenantKey(Model):
    """What identifies a tenant."""

    tenant_id: uuid.UUID = Field(default_factory=uuid7, primary_key=True)


class TenantBase(Model):
    """What a tenant is, in the seed's order of columns. Extend this, not the table, in a schema of your own."""

    name: Name
    environment: TenantEnvironment = Field(sa_type=enum_type(TenantEnvironment, "tenant_environment"))
    status: TenantStatus = Field(
        default=TenantStatus.PENDING,
        sa_type=enum_type(TenantStatus, "tenant_status"),
        sa_column_kwargs={"server_default": text("'pending'")},
        index=True,
    )


class TenantExtras(Model):
    """What the seed's table does not have: free labels, and why the tenant has its status."""

    labels: Labels = Field(
        default_factory=dict, sa_type=JSONB, nullable=False, sa_column_kwargs={"server_default": text("'{}'::jsonb")}
    )
    status_reason: Text | None = Field(default=None, max_length=MAX_REASON, sa_type=sqlalchemy.Text)


class Tenant(Versioned, TenantExtras, Stamps, TenantBase, TenantKey, table=True):
    """A tenant of the platform; a row of `control_plane.tenants`."""

    __tablename__: ClassVar[str] = "tenants"
    __table_args__ = (
        UniqueConstraint("name"),
        CheckConstraint(r"name <> '' AND name = btrim(name) AND name !~ '[\x01-\x1f\x7f]'", name="name"),
        CheckConstraint("jsonb_typeof(labels) = 'object'", name="labels"),
        Index(None, "created_at", "tenant_id"),  # keyset listing
        Index("idx_tenants_name_prefix", "name", postgresql_ops={"name": "varchar_pattern_ops"}),
        Index("idx_tenants_labels", "labels", postgresql_using="gin", postgresql_ops={"labels": "jsonb_path_ops"}),
    )


class TenantCreate(TenantExtras, TenantBase, TenantKey):
    """What is needed to register a tenant. Send `tenant_id` to make a repeated request recognisable."""


class TenantUpdate(Model):
    """What may be changed of a tenant; a field that is left out stays, `null` is refused. Status has verbs of its own."""

    name: Name | MISSING = MISSING
    environment: TenantEnvironment | MISSING = MISSING
    labels: Labels | MISSING = MISSING


class TenantPublic(Model):
    """A tenant as an API shows it."""

    model_config = {"extra": "ignore", "from_attributes": True}  # noqa: RUF012 -- forbid would break clients when a field is added

    tenant_id: uuid.UUID
    name: str
    environment: TenantEnvironment
    status: TenantStatus
    status_reason: str | None
    labels: dict[str, str]
    created_at: datetime
    updated_at: datetime
    version: int
