"""The choice of a source of keys: what the settings say, as a `KeyProvider`.

Hides which modules the sources live in, and imports the library of an outer service only for those who use that service. Reads no key: what is
wrong with the keys themselves shows when the keyring is opened.
"""

from pathlib import Path
from typing import Literal, Protocol, TypeVar

from pydantic import SecretStr

from car_control_plane.encryption.providers import FileKeys, KeyProvider, StaticKeys
from car_control_plane.encryption.wrapping import KeyWrapper, LocalKeyWrapper, WrappedKeys, WrappedKeyStore
from car_control_plane.errors import ConfigurationError

_T = TypeVar("_T")
_PREFIX = "CAR_CONTROL_PLANE_"  # the environment's names, for messages; settings is a sibling and not imported


class KeySettings(Protocol):
    """The settings a keyring is made from; `ControlPlaneSettings` has them, and says more of each."""

    @property
    def encryption_keys(self) -> SecretStr | None:
        """Keys as text."""
        ...

    @property
    def encryption_key_file(self) -> Path | None:
        """A file of keys."""
        ...

    @property
    def encryption_key_wrapper(self) -> Literal["local", "aws-kms", "vault-transit"] | None:
        """What wraps keys that are kept in the database."""
        ...

    @property
    def encryption_outer_key_file(self) -> Path | None:
        """For `local`: a file of outer keys."""
        ...

    @property
    def encryption_kms_key_id(self) -> str | None:
        """For `aws-kms`: the KMS key."""
        ...

    @property
    def encryption_vault_key(self) -> str | None:
        """For `vault-transit`: the transit key."""
        ...

    @property
    def encryption_vault_mount(self) -> str:
        """For `vault-transit`: where the engine is mounted."""
        ...

    @property
    def encryption_cache_seconds(self) -> float:
        """How long keys are used before their source is asked again."""
        ...

    @property
    def encryption_outage_seconds(self) -> float:
        """How much longer they open, but do not seal, while it does not answer."""
        ...


def provider_from_settings(settings: KeySettings, store: WrappedKeyStore | None = None) -> KeyProvider:
    """Make the one provider the settings name. Does no I/O.

    Args:
        settings: `ControlPlaneSettings`.
        store: Where wrapped keys are kept; needed with `encryption_key_wrapper`, otherwise unused.

    Raises:
        ConfigurationError: No source is set or more than one, it lacks a setting or its store, or the keys given as text are not acceptable.
        MissingExtraError: The library of the outer service is not installed.
    """
    chosen = [name for name in _SOURCES if _given(settings, name)]
    if len(chosen) != 1:
        problem = _choice(chosen)
        raise problem
    if (text := settings.encryption_keys) is not None and chosen == ["encryption_keys"]:
        return StaticKeys(text.get_secret_value())
    if (path := settings.encryption_key_file) is not None and chosen == ["encryption_key_file"]:
        return FileKeys(path)
    wrapper = wrapper_from_settings(settings)
    if store is None:
        raise ConfigurationError(
            f"the setting {_PREFIX}ENCRYPTION_KEY_WRAPPER needs the table the wrapped keys are in",
            hint="Pass it: Keyring.from_settings(settings, store=EncryptionKeyStore(manager)).",
        )
    return WrappedKeys(wrapper, store)


def wrapper_from_settings(settings: KeySettings) -> KeyWrapper:
    """Make the outer key the settings name. Does no I/O.

    Raises:
        ConfigurationError: `encryption_key_wrapper` is not set, or lacks the setting that says which outer key.
        MissingExtraError: The library of the outer service is not installed.
    """
    match settings.encryption_key_wrapper:
        case "local":
            path = settings.encryption_outer_key_file
            return LocalKeyWrapper(_companion(path if path != Path() else None, "encryption_outer_key_file"))
        case "aws-kms":
            key_id = _companion(settings.encryption_kms_key_id, "encryption_kms_key_id")
            from car_control_plane.encryption.aws import AwsKmsWrapper  # noqa: PLC0415 -- boto3 only for those who use it

            return AwsKmsWrapper(key_id)
        case "vault-transit":
            key_name = _companion(settings.encryption_vault_key, "encryption_vault_key")
            from car_control_plane.encryption.vault import VaultTransitWrapper  # noqa: PLC0415 -- hvac likewise

            return VaultTransitWrapper(key_name, mount_point=settings.encryption_vault_mount)
        case _:
            raise ConfigurationError(
                f"the setting {_PREFIX}ENCRYPTION_KEY_WRAPPER is not set",
                hint="Set it to local, aws-kms or vault-transit.",
            )


_SOURCES = ("encryption_keys", "encryption_key_file", "encryption_key_wrapper")


def _given(settings: KeySettings, name: str) -> bool:
    """Whether a source is set; an empty variable, which a container's manifest easily makes, is none."""
    value: object = getattr(settings, name)
    return bool(value.get_secret_value() if isinstance(value, SecretStr) else value) and value != Path()


def _choice(chosen: list[str]) -> ConfigurationError:
    names = [f"{_PREFIX}{name.upper()}" for name in chosen or _SOURCES]
    if chosen:
        return ConfigurationError(
            f"there is more than one source of keys: {' and '.join(names)}", hint="Keep one and unset the other."
        )
    return ConfigurationError(
        "there is no source of keys for connection strings",
        hint=f"Set one of {', '.join(names)}; car-cp key generate makes a key.",
    )


def _companion(value: _T | None, name: str) -> _T:
    if not value:
        raise ConfigurationError(
            f"the setting {_PREFIX}{name.upper()} is required with this {_PREFIX}ENCRYPTION_KEY_WRAPPER"
        )
    return value
