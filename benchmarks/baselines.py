"""What the library is compared with: the same table, mapped as people do who have SQLModel, or advanced-alchemy, and nothing else."""

import uuid
from datetime import datetime
from typing import Any, ClassVar

from advanced_alchemy.repository import SQLAlchemyAsyncRepository
from sqlalchemy import BigInteger, Enum, FetchedValue, MetaData, Text, func
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, registry
from sqlmodel import Field, SQLModel

from benchmarks.harness import connect
from car_control_plane.models import SCHEMA, TenantEnvironment, TenantStatus


def _enum(kind: type, name: str) -> Enum:
    return Enum(kind, name=name, schema=SCHEMA, values_callable=lambda members: [member.value for member in members])


_ENVIRONMENT = _enum(TenantEnvironment, "tenant_environment")
_STATUS = _enum(TenantStatus, "tenant_status")


class _PlainModel(SQLModel, registry=registry(metadata=MetaData(schema=SCHEMA))):
    """Stock SQLModel, apart from the registry, which keeps this mapping away from everything else."""


class PlainTenant(_PlainModel, table=True):
    """The tenants as stock SQLModel has them: nothing is validated."""

    __tablename__: ClassVar[Any] = "tenants"

    tenant_id: uuid.UUID = Field(primary_key=True)
    name: str = Field(max_length=255)
    environment: TenantEnvironment = Field(sa_type=_ENVIRONMENT)
    status: TenantStatus = Field(sa_type=_STATUS)
    created_at: datetime = Field(default=None, sa_column_kwargs={"server_default": func.now()})
    updated_at: datetime = Field(default=None, sa_column_kwargs={"server_default": func.now()})
    labels: dict[str, str] = Field(default_factory=dict, sa_type=JSONB)
    status_reason: str | None = Field(default=None, sa_type=Text)
    version: int = Field(default=None, sa_type=BigInteger, sa_column_kwargs={"server_default": FetchedValue()})


class _AlchemyModel(DeclarativeBase):
    metadata = MetaData(schema=SCHEMA)


class AlchemyTenant(_AlchemyModel):
    """The tenants as advanced-alchemy's repository takes them."""

    __tablename__ = "tenants"

    tenant_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    name: Mapped[str]
    environment: Mapped[TenantEnvironment] = mapped_column(_ENVIRONMENT)
    status: Mapped[TenantStatus] = mapped_column(_STATUS)
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    labels: Mapped[dict[str, str]] = mapped_column(JSONB)
    status_reason: Mapped[str | None]
    version: Mapped[int] = mapped_column(BigInteger)


class AlchemyRepository(SQLAlchemyAsyncRepository[AlchemyTenant]):
    model_type = AlchemyTenant
    id_attribute = "tenant_id"


def plain_engine(dsn: str, *, connections: int) -> AsyncEngine:
    """Build an ordinary engine with as many connections as the library is given."""
    return create_async_engine(
        "postgresql+asyncpg://", async_creator=lambda: connect(dsn), pool_size=connections, max_overflow=0
    )
