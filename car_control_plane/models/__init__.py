"""The tables of the control plane and their API schemas: SQLModel classes that are both ORM rows and validated data.

`XCreate`, `XUpdate` and `XPublic` are the schemas of table `X`. `metadata` holds the tables, apart from the host application's own.
"""

from car_control_plane.models.base import REVISIONS, SCHEMA, Model, metadata, uuid7
from car_control_plane.models.changes import ChangeLogEntry, ChangeLogEntryPublic, ChangeOperation
from car_control_plane.models.config import SystemConfig, SystemConfigCreate, SystemConfigPublic, SystemConfigUpdate
from car_control_plane.models.databases import (
    TenantDatabase,
    TenantDatabaseCreate,
    TenantDatabasePublic,
    TenantDatabaseStatus,
    TenantDatabaseUpdate,
)
from car_control_plane.models.keys import EncryptionKey, EncryptionKeyPublic
from car_control_plane.models.operations import CompletedOperation
from car_control_plane.models.tenants import (
    SYSTEM_ADMIN_ID,
    SYSTEM_ADMIN_NAME,
    TRANSITIONS,
    Tenant,
    TenantBase,
    TenantCreate,
    TenantEnvironment,
    TenantPublic,
    TenantStatus,
    TenantUpdate,
    sources_of,
)

__all__ = [
    "REVISIONS",
    "SCHEMA",
    "SYSTEM_ADMIN_ID",
    "SYSTEM_ADMIN_NAME",
    "TRANSITIONS",
    "ChangeLogEntry",
    "ChangeLogEntryPublic",
    "ChangeOperation",
    "CompletedOperation",
    "EncryptionKey",
    "EncryptionKeyPublic",
    "Model",
    "SystemConfig",
    "SystemConfigCreate",
    "SystemConfigPublic",
    "SystemConfigUpdate",
    "Tenant",
    "TenantBase",
    "TenantCreate",
    "TenantDatabase",
    "TenantDatabaseCreate",
    "TenantDatabasePublic",
    "TenantDatabaseStatus",
    "TenantDatabaseUpdate",
    "TenantEnvironment",
    "TenantPublic",
    "TenantStatus",
    "TenantUpdate",
    "metadata",
    "sources_of",
    "uuid7",
]
