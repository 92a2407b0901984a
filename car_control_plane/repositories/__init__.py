"""Repositories: the common operations on the control plane's tables, one class for each table."""

from car_control_plane.repositories.base import Page, Repository
from car_control_plane.repositories.config import SystemConfigRepository
from car_control_plane.repositories.databases import (
    DatabaseVerification,
    TenantDatabaseFilter,
    TenantDatabaseParts,
    TenantDatabaseRepository,
)
from car_control_plane.repositories.keys import EncryptionKeyRepository, EncryptionKeyStore, KeyFinding
from car_control_plane.repositories.tenants import Conflict, CreateManyResult, TenantFilter, TenantRepository

__all__ = [
    "Conflict",
    "CreateManyResult",
    "DatabaseVerification",
    "EncryptionKeyRepository",
    "EncryptionKeyStore",
    "KeyFinding",
    "Page",
    "Repository",
    "SystemConfigRepository",
    "TenantDatabaseFilter",
    "TenantDatabaseParts",
    "TenantDatabaseRepository",
    "TenantFilter",
    "TenantRepository",
]
