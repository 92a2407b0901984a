"""Keys wrapped by AWS KMS.

Hides boto3: its threads, its time limits, its errors, and what it would write to the log. Knows nothing of the table the wrapped keys are in.

A wrapped key is bound to its id by the encryption context, so that one cannot be passed off as another, and CloudTrail shows which key was opened.
The reference in a row is the ARN the service answered, for people. It decides nothing: whoever can write the table could name a KMS key of his
own there. Only the KMS keys this process is told of are asked to open.

Sources: AWS KMS API reference, Encrypt and Decrypt; `docs/how-to/keys-in-aws-kms.md`.
"""

import base64
import binascii
import logging
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Final

from pydantic import SecretStr

from car_control_plane.encryption.envelope import Key
from car_control_plane.encryption.wrapping import T, ask, damaged
from car_control_plane.errors import (
    ConfigurationError,
    ControlPlaneError,
    KeyUnavailableError,
    MissingExtraError,
    UnknownKeyError,
)

try:
    import boto3.session
    from botocore import exceptions as botocore_errors
    from botocore.config import Config
except ImportError as missing:
    raise MissingExtraError(
        "keys in AWS KMS need boto3, which is not installed", hint='pip install "car-control-plane[aws]"'
    ) from missing

_SERVICE: Final = "AWS KMS"
_GUIDE: Final = "see docs/how-to/keys-in-aws-kms.md"

# Two attempts within the limit of `ask`: a lost packet is got over, an outage is reported while the caller still waits.
_LIMITS: Final = Config(connect_timeout=3, read_timeout=5, retries={"mode": "standard", "total_max_attempts": 2})

_asking: ContextVar[bool] = ContextVar("asking AWS KMS", default=False)


class _Hush(logging.Filter):
    """Drops what botocore logs of our calls: at level DEBUG it writes out requests and answers, the keys in them, and session tokens."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not _asking.get()


for _name in ("botocore.auth", "botocore.endpoint", "botocore.parsers"):
    logging.getLogger(_name).addFilter(_Hush())


class AwsKmsWrapper:
    """An outer key in AWS KMS: symmetric, for encryption and decryption.

    The constructor does no I/O: what is wrong with region, credentials or key shows at the first use. Calls run in threads, for seconds at most.

    Args:
        key_id: Id, ARN or alias of the KMS key that wraps. Behind a comma, those that wrapped before it, to open what has not been rewrapped.
        client: A boto3 client of `kms` to use instead of one that finds region and credentials as every AWS client does. It stays the caller's to close.
    """

    name = "aws-kms"

    def __init__(self, key_id: str, *, client: Any = None) -> None:
        self._key_ids = [one for part in key_id.split(",") if (one := part.strip())] or [key_id]
        self._key_id = self._key_ids[0]
        self._given = client
        self._made: Any = None
        self._making = threading.Lock()

    def __repr__(self) -> str:
        return f"<AwsKmsWrapper {self._key_id}>"

    async def wrap(self, key: Key) -> tuple[str, str]:
        """Have KMS encrypt a key; the reference is the ARN of the KMS key.

        Raises:
            KeyUnavailableError: KMS does not answer, refuses, or the KMS key is disabled.
            UnknownKeyError: There is no such KMS key.
            ConfigurationError: Region or credentials are missing, or the KMS key is not one for encryption.
        """

        def call() -> tuple[str, str]:
            answer = self._client().encrypt(
                KeyId=self._key_id, Plaintext=base64.b64decode(key.to_base64()), EncryptionContext=_context(key.kid)
            )
            return base64.b64encode(answer["CiphertextBlob"]).decode(), str(answer["KeyId"])

        return await self._ask(call, lambda problem: _explained(problem, "Encrypt", self._key_id))

    async def unwrap(self, kid: str, wrapped: str, kek_ref: str) -> Key:
        """Have KMS decrypt a wrapped key, with one of the KMS keys this wrapper was told of; one call for each until one fits.

        Raises:
            KeyUnavailableError: KMS does not answer, refuses, or the KMS key is disabled.
            UnknownKeyError: There is no such KMS key any more.
            DecryptionError: The ciphertext was altered, belongs to another key id, or none of these KMS keys has wrapped it.
            ConfigurationError: Region or credentials are missing.
        """
        sealed = SecretStr(wrapped)
        del wrapped  # may be a plain key that got into the column

        asked: list[str] = []

        def call() -> Key:
            blob = base64.b64decode(sealed.get_secret_value().encode(), validate=True)
            first: Exception | None = None
            for key_id in self._key_ids:
                try:
                    answer = self._client().decrypt(KeyId=key_id, CiphertextBlob=blob, EncryptionContext=_context(kid))
                except botocore_errors.ClientError as problem:
                    if first is None or _code(first) == _ANOTHER_KEY:  # what says more than "not me"
                        first, asked[:] = problem, [key_id]
                else:
                    return Key(kid, answer["Plaintext"])
            raise first or AssertionError

        def explain(problem: Exception) -> ControlPlaneError:
            if _is_damage(problem):
                return damaged(kid, f"{', '.join(map(repr, self._key_ids))} (the row says: {kek_ref!r})")
            return _explained(problem, "Decrypt", asked[0] if asked else self._key_id)

        return await self._ask(call, explain)

    async def close(self) -> None:
        """Close the client, unless it was given. Idempotent."""
        client, self._made = self._made, None
        if client is not None:
            client.close()

    async def _ask(self, call: Callable[[], T], explain: Callable[[Exception], ControlPlaneError]) -> T:
        def hushed() -> T:
            _asking.set(True)  # in the thread's own context
            return call()

        return await ask(_SERVICE, hushed, explain)

    def _client(self) -> Any:
        if self._given is not None:
            return self._given
        with self._making:  # making one takes a while and reads files; boto3 does not say that two threads may
            if self._made is None:
                self._made = boto3.session.Session().client("kms", config=_LIMITS)
            return self._made


def _context(kid: str) -> dict[str, str]:
    return {"car-control-plane:kid": kid}


_DISABLED = {"DisabledException", "KMSInvalidStateException"}
_IDENTITY = {
    "ExpiredTokenException",
    "IncompleteSignature",
    "InvalidClientTokenId",
    "InvalidSignatureException",
    "MissingAuthenticationTokenException",
    "UnrecognizedClientException",
}
_UNFIT = {"InvalidKeyUsageException", "UnsupportedOperationException", "ValidationException"}
_ANOTHER_KEY = "IncorrectKeyException"
_DAMAGE = {"IncorrectKeyException", "InvalidCiphertextException", "ValidationException"}
_SETUP: dict[type[Exception], str] = {
    botocore_errors.NoRegionError: "no region is set: AWS_DEFAULT_REGION, or region in ~/.aws/config",
    botocore_errors.NoCredentialsError: "there are no credentials: give this process a role, or set a profile",
    botocore_errors.PartialCredentialsError: "the credentials are incomplete",
    botocore_errors.ProfileNotFound: "there is no profile of the name in AWS_PROFILE",
    botocore_errors.ConfigParseError: "~/.aws/config cannot be read",
    botocore_errors.InvalidRegionError: "the region has no valid name",
    botocore_errors.ParamValidationError: "the id of the KMS key is not acceptable",
    ValueError: "the endpoint or another setting of the AWS client is not acceptable",
}


def _code(problem: Exception) -> str:
    """Return what AWS calls the error. Its message is never shown: it may quote what was sent."""
    if not isinstance(problem, botocore_errors.ClientError):
        return ""
    code = str(problem.response.get("Error", {}).get("Code", ""))
    return code if code.isidentifier() and len(code) <= 64 else "an unknown error"  # noqa: PLR2004 -- a name, not a text


def _is_damage(problem: Exception) -> bool:
    """Whether the row is at fault: not base64, not 32 bytes, not what KMS takes, or not sealed for this id."""
    ours = (binascii.Error, ConfigurationError, botocore_errors.ParamValidationError)
    return isinstance(problem, ours) or _code(problem) in _DAMAGE


def _explained(problem: Exception, action: str, key_id: str) -> ControlPlaneError:
    if code := _code(problem):
        return _refused(code, action, key_id)
    for kind, text in _SETUP.items():
        if isinstance(problem, kind):
            return ConfigurationError(f"the client of AWS KMS cannot work: {text}", hint=f"To set it up {_GUIDE}.")
    return KeyUnavailableError(
        f"AWS KMS cannot be reached: {type(problem).__name__}", hint="Check network, region and endpoint."
    )


def _refused(code: str, action: str, key_id: str) -> ControlPlaneError:
    if code == "AccessDeniedException":
        return KeyUnavailableError(
            f"AWS KMS does not let this process use the KMS key {key_id!r}",
            hint=f"Allow kms:{action} for this key to its role: {_GUIDE}.",
        )
    if code == "NotFoundException":
        return UnknownKeyError(
            f"there is no KMS key {key_id!r} in this account and region", details={"kek_ref": key_id}
        )
    if code in _DISABLED:
        return KeyUnavailableError(
            f"the KMS key {key_id!r} is disabled or about to be deleted", hint="Cancel its deletion, and enable it."
        )
    if code in _IDENTITY:
        return KeyUnavailableError(f"AWS does not accept the credentials ({code})", hint="Renew them; check the clock.")
    if code in _UNFIT:
        return ConfigurationError(
            f"the KMS key {key_id!r} cannot wrap keys ({code})",
            hint="It must be symmetric, with the usage ENCRYPT_DECRYPT.",
        )
    return KeyUnavailableError(f"AWS KMS answers with an error ({code})")
