"""Completed operations: which units of work were committed, and what they returned."""

import uuid
from typing import ClassVar

from pydantic import AwareDatetime, JsonValue
from sqlalchemy import func
from sqlalchemy.dialects.postgresql import JSONB
from sqlmodel import Field

from car_control_plane.models.base import Model


class CompletedOperation(Model, table=True):
    """A unit of work that was committed; a row of `control_plane.completed_operations`, stored in the unit's own transaction.

    `outcome` is what the unit returned; None also when nobody asked for it to be kept. No row of it is in the change log, for it changes no answer.
    """

    __tablename__: ClassVar[str] = "completed_operations"

    operation_id: uuid.UUID = Field(primary_key=True)
    outcome: JsonValue = Field(default=None, sa_type=JSONB(none_as_null=True), nullable=True)
    completed_at: AwareDatetime = Field(default=None, index=True, sa_column_kwargs={"server_default": func.now()})
