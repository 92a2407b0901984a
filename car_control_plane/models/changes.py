"""The change log: one entry for every changed row of the control plane, written by triggers."""

import uuid
from datetime import datetime
from enum import StrEnum
from typing import ClassVar

from pydantic import AwareDatetime
from sqlalchemy import BigInteger, CheckConstraint, Text
from sqlmodel import Field

from car_control_plane.models.base import Model


class ChangeOperation(StrEnum):
    """What happened to a row."""

    INSERT = "insert"
    UPDATE = "update"
    DELETE = "delete"


class ChangeLogEntry(Model, table=True):
    """One changed row; a row of `control_plane.change_log`. Written by the database's triggers, never by clients."""

    __tablename__: ClassVar[str] = "change_log"
    __table_args__ = (CheckConstraint("operation IN ('insert', 'update', 'delete')", name="operation"),)

    version: int = Field(sa_type=BigInteger, primary_key=True, sa_column_kwargs={"autoincrement": False})
    table_name: str = Field(sa_type=Text, nullable=False)
    row_id: str = Field(sa_type=Text, nullable=False)
    tenant_id: uuid.UUID | None = None
    operation: ChangeOperation = Field(sa_type=Text, nullable=False)
    transaction_id: int = Field(sa_type=BigInteger, nullable=False)
    changed_at: AwareDatetime


class ChangeLogEntryPublic(Model):
    """An entry of the change log as an API shows it."""

    model_config = {"extra": "ignore", "from_attributes": True}  # noqa: RUF012 -- forbid would break clients when a field is added

    version: int
    table_name: str
    row_id: str
    tenant_id: uuid.UUID | None
    operation: ChangeOperation
    changed_at: datetime
