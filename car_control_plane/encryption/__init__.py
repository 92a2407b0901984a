"""Sealed connection strings: the format, the keys, and where keys come from.

`Keyring.from_settings` is what most programs need. A keyring seals a connection string for one row (its tenant and its id), so that a value copied
into another row, or changed in any bit, does not open. Inside: `envelope` is the format `ccp1` alone, `values` the two forms of a connection
string, `keyring` the cache of keys, `providers` and `wrapping` where they come from, `aws` and `vault` two services that
wrap them, `sources` the choice between all these.

Each name is imported when it is first used: cryptography, and the services' libraries, cost only those who seal.

Sources: `docs/adr/0014-sealed-connection-strings.md`, `docs/explanation/security-model.md`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from car_control_plane.encryption.values import ConnectionString, KeyState, SealedConnectionString

if TYPE_CHECKING:
    from car_control_plane.encryption.aws import AwsKmsWrapper
    from car_control_plane.encryption.envelope import Key
    from car_control_plane.encryption.keyring import Keyring
    from car_control_plane.encryption.providers import FileKeys, KeyInfo, KeyProvider, StaticKeys
    from car_control_plane.encryption.vault import VaultTransitWrapper
    from car_control_plane.encryption.wrapping import (
        KeyWrapper,
        LocalKeyWrapper,
        WrappedKey,
        WrappedKeys,
        WrappedKeyStore,
    )

__all__ = [
    "AwsKmsWrapper",
    "ConnectionString",
    "FileKeys",
    "Key",
    "KeyInfo",
    "KeyProvider",
    "KeyState",
    "KeyWrapper",
    "Keyring",
    "LocalKeyWrapper",
    "SealedConnectionString",
    "StaticKeys",
    "VaultTransitWrapper",
    "WrappedKey",
    "WrappedKeyStore",
    "WrappedKeys",
]

_HOMES = {
    "AwsKmsWrapper": "aws",
    "FileKeys": "providers",
    "Key": "envelope",
    "KeyInfo": "providers",
    "KeyProvider": "providers",
    "KeyWrapper": "wrapping",
    "Keyring": "keyring",
    "LocalKeyWrapper": "wrapping",
    "StaticKeys": "providers",
    "VaultTransitWrapper": "vault",
    "WrappedKey": "wrapping",
    "WrappedKeyStore": "wrapping",
    "WrappedKeys": "wrapping",
}

if not TYPE_CHECKING:  # pragma: no branch

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        return value
