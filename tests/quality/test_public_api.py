"""The public names: what is exported is decided here, so that a name neither slips in nor gets lost."""

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

import car_control_plane
from car_control_plane import errors

MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(car_control_plane.__path__, "car_control_plane.")
    if not info.name.endswith("__main__")
)

PUBLIC = {
    *("AsyncConnectionManager", "AsyncReadSession", "HealthStatus", "PoolStatus", "get_connection_manager", "init_db"),
    *("Dsn", "EmbeddedPostgres", "ControlPlaneSettings", "load_settings"),
    *("Tenant", "TenantBase", "TenantCreate", "TenantPublic", "TenantUpdate", "TenantEnvironment", "TenantStatus"),
    *("TenantDatabase", "TenantDatabaseCreate", "TenantDatabasePublic", "TenantDatabaseUpdate", "TenantDatabaseStatus"),
    *("SystemConfig", "SystemConfigCreate", "SystemConfigPublic", "SystemConfigUpdate"),
    *(
        "ChangeLogEntry",
        "ChangeLogEntryPublic",
        "ChangeOperation",
        "CompletedOperation",
        "SYSTEM_ADMIN_ID",
        "metadata",
        "uuid7",
    ),
    *("TenantRepository", "TenantFilter", "SystemConfigRepository", "Page", "Conflict", "CreateManyResult"),
    *(
        "Keyring",
        "Key",
        "KeyInfo",
        "KeyState",
        "KeyProvider",
        "StaticKeys",
        "FileKeys",
        "KeyWrapper",
        "LocalKeyWrapper",
    ),
    *("WrappedKey", "WrappedKeys", "WrappedKeyStore", "AwsKmsWrapper", "VaultTransitWrapper"),
    *("ConnectionString", "SealedConnectionString", "ConnectionPolicy", "Destination"),
    *("EncryptionKey", "EncryptionKeyPublic", "EncryptionKeyRepository", "EncryptionKeyStore", "KeyFinding"),
    *("TenantDatabaseRepository", "TenantDatabaseFilter", "TenantDatabaseParts", "DatabaseVerification"),
    *("rotate_keys", "RotationProgress", "RotationResult"),
    "__version__",
}
ERRORS = {name for name in errors.__all__ if name.endswith("Error")}


def test_the_public_names_are_these() -> None:
    assert set(car_control_plane.__all__) == PUBLIC | ERRORS
    assert len(car_control_plane.__all__) == len(PUBLIC | ERRORS)


def test_every_public_name_resolves() -> None:
    for name in car_control_plane.__all__:
        assert getattr(car_control_plane, name) is not None


def test_type_checkers_see_the_names_that_exist() -> None:
    """They read the imports under TYPE_CHECKING; the interpreter does not."""
    tree = ast.parse(Path(car_control_plane.__file__).read_text(encoding="utf-8"))
    seen = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module != "typing"
        for alias in node.names
    }
    assert set(seen) == set(car_control_plane.__all__) - {"__version__"}
    for name, home in seen.items():
        module, _, original = home.rpartition(".")
        assert getattr(car_control_plane, name) is getattr(importlib.import_module(module), original)


def test_the_package_lists_its_names_to_completion() -> None:
    assert set(car_control_plane.__all__) <= set(dir(car_control_plane))


def test_an_unknown_name_is_an_ordinary_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        importlib.import_module("car_control_plane").no_such_name  # noqa: B018 -- the access is what is tested


@pytest.mark.parametrize("name", MODULES)
def test_a_module_has_what_it_exports(name: str) -> None:
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", [])
    assert [name for name in exported if not hasattr(module, name)] == []
    assert len(set(exported)) == len(exported)
