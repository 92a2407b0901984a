"""Keys by name: `Keyring` seals with the current one and opens with any it has.

Where keys come from is a `KeyProvider`'s business. The keyring asks it once, keeps what it got for a limited time, asks again when a value names
a key it has not heard of, and gets over an outage of the provider: for a bounded time opened keys go on opening, while nothing new is sealed,
because nobody can tell then which key is current. Trouble with one key stays with that key.

A key is `pending` (opens; every process may learn of it before it is used), then `current` (seals; there is exactly one), then `retired` (opens),
then `destroyed` (its bytes are gone; what it sealed stays closed).
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar

from car_control_plane.dsn import Dsn
from car_control_plane.encryption.envelope import Key, connection_string_context, seal, unseal
from car_control_plane.encryption.providers import KeyInfo, KeyProvider
from car_control_plane.encryption.sources import KeySettings, provider_from_settings
from car_control_plane.encryption.values import ConnectionString, KeyState, SealedConnectionString
from car_control_plane.encryption.wrapping import WrappedKeyStore
from car_control_plane.errors import (
    ClosedError,
    ConfigurationError,
    ControlPlaneError,
    DecryptionError,
    EncryptionError,
    InvalidDataError,
    KeyUnavailableError,
    UnknownKeyError,
)

T = TypeVar("T")

RETRY_SECONDS: Final = 5.0
"""How long a failure, or the answer "there is no such key", is believed before the provider is asked again."""

PATIENCE_SECONDS: Final = 2.0
"""How long the provider may take to answer before those who can go on with what it said last do so."""

_NEVER: Final = float("-inf")
_log = logging.getLogger("car_control_plane.encryption")
_now = time.monotonic


class Keyring:
    """Seals and opens connection strings.

    Share one per process and event loop; all methods may be called concurrently and may be cancelled. The constructor does no I/O. Without I/O a
    value is sealed or opened in some 20 microseconds; I/O happens at the first use, every `cache_seconds`, and for unknown keys, once for all who
    wait. While the provider fails it is asked every `RETRY_SECONDS` at most.

    Args:
        provider: Where the keys come from; closed with the keyring.
        cache_seconds: How long keys are used before the provider is asked again.
        outage_seconds: How much longer keys open, but do not seal, while the provider cannot be asked.

    Raises:
        ConfigurationError: A time is negative or not a number.
    """

    def __init__(self, provider: KeyProvider, *, cache_seconds: float = 300.0, outage_seconds: float = 3600.0) -> None:
        if not (cache_seconds >= 0 and outage_seconds >= 0):
            raise ConfigurationError("cache_seconds and outage_seconds of a keyring must be zero or more")
        self._provider = provider
        self._cache_seconds = cache_seconds
        self._outage_seconds = outage_seconds
        self._listed = _Question(provider, self._ask_list)
        self._keys: dict[str, _Question[Key]] = {}
        self._reloaded_at = _NEVER
        self._closed = False

    @classmethod
    def from_settings(cls, settings: KeySettings, *, store: WrappedKeyStore | None = None) -> Self:
        """Make a keyring with the keys the settings name.

        Args:
            settings: `ControlPlaneSettings`.
            store: Where wrapped keys are kept; needed with `encryption_key_wrapper`, otherwise unused.

        Raises:
            ConfigurationError: No source of keys is set or more than one, it lacks a setting, or what it holds is not acceptable.
            MissingExtraError: The library of the outer service is not installed.
        """
        provider = provider_from_settings(settings, store)
        return cls(
            provider,
            cache_seconds=settings.encryption_cache_seconds,
            outage_seconds=settings.encryption_outage_seconds,
        )

    @property
    def provider(self) -> KeyProvider:
        """Where the keys come from."""
        return self._provider

    def __repr__(self) -> str:
        return f"<Keyring {self._provider.name}{' (closed)' if self._closed else ''}>"

    # --- life ---------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Ask the provider, so that what is wrong shows at start and not at the first use. Idempotent; optional.

        Raises:
            ClosedError: The keyring was closed.
            KeyUnavailableError: The provider does not answer.
            ConfigurationError: What it holds is not acceptable, or not exactly one key is current.
            EncryptionError: The current key cannot be had: its wrapped form does not open.
        """
        await self.current()

    async def close(self) -> None:
        """Forget all keys and close the provider; whoever waits for a key gets a ClosedError. Idempotent; a keyring is not reopened."""
        self._closed = True
        on_their_way = [self._listed.forget(), *(question.forget() for question in self._keys.values())]
        self._keys.clear()
        if asking := [task for task in on_their_way if task is not None]:
            await asyncio.wait(asking)
        await self._provider.close()

    async def __aenter__(self) -> Self:
        try:
            await self.open()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # --- sealing and opening ------------------------------------------------------------------------------------------

    async def seal(
        self, text: str | Dsn | ConnectionString, *, tenant_id: uuid.UUID, database_id: uuid.UUID
    ) -> SealedConnectionString:
        """Seal a connection string for one row of `tenant_databases`, with the current key.

        Raises:
            InvalidDataError: It is no text, or text that UTF-8 cannot write.
            KeyUnavailableError: The provider has not confirmed for `cache_seconds` which key is current.
            ConfigurationError: Not exactly one key is current.
            EncryptionError: The current key cannot be had: its wrapped form does not open.
            ClosedError: The keyring was closed.
        """
        if isinstance(text, str):
            text = ConnectionString(text)  # error trackers print the variables of every frame an error passes
        elif not isinstance(text, ConnectionString | Dsn):
            del text
            raise InvalidDataError("a connection string is sealed from text, a ConnectionString or a Dsn")
        key = await self.current()
        return SealedConnectionString(seal(key, text.reveal(), connection_string_context(tenant_id, database_id)))

    async def unseal(
        self, sealed: SealedConnectionString, *, tenant_id: uuid.UUID, database_id: uuid.UUID
    ) -> ConnectionString:
        """Open the connection string of one row.

        Raises:
            DecryptionError: It was altered, belongs to another row, was sealed with another key of the same name, or was never sealed.
            UnknownKeyError: The key that sealed it is not here, or was destroyed; `details["kid"]` names it.
            KeyUnavailableError: The provider cannot be asked for the key, or has not been for too long.
            ClosedError: The keyring was closed.
        """
        if (kid := sealed.kid) is None:
            raise DecryptionError("the column holds something that is not a sealed connection string")
        key = await self.get(kid)
        return ConnectionString(unseal(key, sealed.text, connection_string_context(tenant_id, database_id)))

    # --- keys ---------------------------------------------------------------------------------------------------------

    async def current(self) -> Key:
        """Return the key that seals.

        Raises:
            KeyUnavailableError: The provider has not confirmed for `cache_seconds` which one it is.
            ConfigurationError: Not exactly one is, or what the provider holds is not acceptable.
            EncryptionError: It cannot be had: its wrapped form does not open.
            ClosedError: The keyring was closed.
        """
        if (infos := self._fresh(self._listed)) is None:
            infos = await self._answer(self._listed, grace_seconds=0.0)
        current = [kid for kid, info in infos.items() if info.state is KeyState.CURRENT]
        if len(current) != 1:
            found = f"several keys are current: {', '.join(current)}" if current else "no key is current"
            raise ConfigurationError(
                f"{found} ({self._provider.name})", hint="Exactly one key must be: see docs/how-to/rotate-keys.md."
            )
        question = self._key(current[0])
        if (key := self._fresh(question)) is None:
            key = await self._answer(question, grace_seconds=0.0)
        return key

    async def get(self, kid: str) -> Key:
        """Return a key by its id, to open with. For one that is not known the provider is asked again, every `RETRY_SECONDS` at most.

        Raises:
            UnknownKeyError: There is no such key, or it was destroyed.
            KeyUnavailableError: The provider cannot be asked, or has not been for too long.
            DecryptionError: Its wrapped form does not open.
            ConfigurationError: What the provider holds is not acceptable.
            ClosedError: The keyring was closed.
        """
        asked = self._listed.times_asked
        if (infos := self._fresh(self._listed)) is None:
            infos = await self._answer(self._listed, grace_seconds=self._outage_seconds)
        if kid not in infos:
            infos = await self._reloaded(asked_already=self._listed.times_asked > asked)
        info = infos.get(kid)
        if info is None or info.state is KeyState.DESTROYED:
            unknown = _unknown(kid, destroyed=info is not None)
            raise unknown
        question = self._key(kid)
        if (key := self._fresh(question)) is None:
            key = await self._answer(question, grace_seconds=self._outage_seconds)
        return key

    async def list(self) -> tuple[KeyInfo, ...]:
        """Return every key the provider lists, asked anew; in an outage, for as long as keys open, what it said last.

        Raises:
            KeyUnavailableError: It cannot be asked, and has not been for too long.
            ConfigurationError: What it holds is not acceptable, and has not been for too long.
            ClosedError: The keyring was closed.
        """
        await self._ask_anew()
        infos = await self._answer(self._listed, grace_seconds=self._outage_seconds)
        return tuple(infos.values())

    # --- asking the provider ------------------------------------------------------------------------------------------

    def _fresh(self, question: "_Question[T]") -> T | None:
        """Return an answer not older than the cache's limit, if there is one: without the coroutines that asking takes."""
        return question.answer if question.answered_within(self._cache_seconds) else None

    async def _answer(self, question: "_Question[T]", *, grace_seconds: float) -> T:
        """Return an answer not older than the cache's limit; when the provider fails or is slow, one not older than that and so much more."""
        limit = self._cache_seconds + grace_seconds
        if not question.answered_within(self._cache_seconds):
            await self._ask(question, patience=PATIENCE_SECONDS if question.answered_within(limit) else None)
        if self._closed:
            raise ClosedError("the keyring is closed", hint="Make a new one.")
        if question.answer is None or (question.failure is not None and not question.answered_within(limit)):
            failure = (question.failure or _INTERRUPTED).error()
            raise failure
        return question.answer

    async def _ask(self, question: "_Question[Any]", *, patience: float | None = None) -> None:
        if not (self._closed or question.failed_lately):
            question.ask()
            await question.settled(patience)

    async def _ask_anew(self) -> None:
        """Have the list asked for after this call: a question on its way may have been answered before it."""
        await self._listed.settled()
        await self._ask(self._listed)

    async def _reloaded(self, *, asked_already: bool) -> Mapping[str, KeyInfo]:
        """Return the list asked anew because a key is not in it; not for every such key, for anybody can make up ids of keys."""
        if not asked_already and _now() - self._reloaded_at >= RETRY_SECONDS:
            self._reloaded_at = _now()
            await self._ask_anew()
        else:
            await self._listed.settled()
        if not self._closed and self._listed.failure is not None:  # whether the key exists cannot be told
            failure = self._listed.failure.error()
            raise failure
        return await self._answer(self._listed, grace_seconds=self._outage_seconds)

    def _key(self, kid: str) -> "_Question[Key]":
        if (question := self._keys.get(kid)) is None:
            question = self._keys[kid] = _Question(self._provider, partial(self._ask_key, kid))
        return question

    async def _ask_list(self) -> Mapping[str, KeyInfo]:
        infos = {info.kid: info for info in await self._provider.list()}
        for kid in [kid for kid in self._keys if kid not in infos or infos[kid].state is KeyState.DESTROYED]:
            self._keys.pop(kid).forget()
        return infos

    async def _ask_key(self, kid: str) -> Key:
        key = await self._provider.get(kid)
        if key.kid != kid:
            raise KeyUnavailableError("another key was given than the one asked for")
        return key


class _Question(Generic[T]):
    """Something the provider is asked again and again: what it answered last, and how it failed since.

    A task of its own asks, one at a time: callers wait for it together, and one who is cancelled stops waiting, not asking.
    """

    def __init__(self, provider: KeyProvider, put: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self.answer: T | None = None
        self.failure: _Failure | None = None
        self._asking: asyncio.Task[T] | None = None
        self.times_asked = 0
        self._provider = provider
        self._put = put
        self._asked_at = self._answered_at = self._failed_at = _NEVER

    def answered_within(self, seconds: float) -> bool:
        return self.answer is not None and _now() - self._answered_at < seconds

    @property
    def failed_lately(self) -> bool:
        return self.failure is not None and _now() - self._failed_at < RETRY_SECONDS

    def ask(self) -> None:
        if self._asking is None:
            self.times_asked += 1
            self._asked_at = _now()
            self._asking = asyncio.create_task(self._put())
            self._asking.add_done_callback(self._settle)

    async def settled(self, patience: float | None = None) -> None:
        """Wait until nothing is on its way, or, with patience, until that takes too long: in an outage, which is known already, not at all."""
        if self._asking is not None:
            if patience is not None:
                patience = 0.0 if self.failure is not None else max(0.0, patience - (_now() - self._asked_at))
            # This neither cancels what we wait for when we are cancelled, nor raises what it raises.
            await asyncio.wait((self._asking,), timeout=patience)

    def forget(self) -> "asyncio.Task[T] | None":
        """Drop the answer, and whatever is on its way; return the task to wait for, if there is one."""
        asking, self._asking, self.answer = self._asking, None, None
        if asking is not None:
            asking.cancel()
        return asking

    def _settle(self, asking: "asyncio.Task[T]") -> None:
        failure = _INTERRUPTED if asking.cancelled() else _Failure.of(asking.exception(), self._provider.name)
        if self._asking is not asking:
            return  # forgotten meanwhile
        self._asking = None
        if failure is None:
            if self.failure is not None:
                facts = {"event": "keys.confirmed", "provider": self._provider.name}
                _log.info("keys (%s): the source answers again", self._provider.name, extra=facts)
            self.answer, self.failure, self._answered_at = asking.result(), None, self._asked_at
            return
        if self.failure is None and self.answer is not None:
            _log.warning(
                "keys (%s) cannot be confirmed, opening goes on for a while: %s",
                self._provider.name,
                failure.message,
                extra={"event": "keys.unconfirmed", "provider": self._provider.name, "error": failure.kind.code},
            )
        self.failure, self._failed_at = failure, _now()
        if failure.kind is UnknownKeyError:
            self.answer = None  # this is no outage


@dataclass(frozen=True, slots=True)
class _Failure:
    """What to raise, again and again: an error that is kept would gather the tracebacks, and with them the frames, of all its callers."""

    kind: type[ControlPlaneError]
    message: str
    hint: str | None = None
    details: Mapping[str, Any] | None = None
    retryable: bool | None = None

    @classmethod
    def of(cls, problem: BaseException | None, source: str) -> "_Failure | None":
        if problem is None:
            return None
        if not isinstance(problem, ControlPlaneError):
            return cls(KeyUnavailableError, f"no keys from {source}: {type(problem).__name__}")
        facts = (problem.hint, problem.details, problem.retryable)
        if not isinstance(problem, EncryptionError | ConfigurationError):
            return cls(KeyUnavailableError, f"no keys from {source}: {problem.message}", *facts)
        kind = next(kind for kind in type(problem).__mro__ if kind.__module__ == ControlPlaneError.__module__)
        return cls(kind, problem.message, *facts)

    def error(self) -> ControlPlaneError:
        return self.kind(self.message, hint=self.hint, details=self.details, retryable=self.retryable)


_INTERRUPTED: Final = _Failure(KeyUnavailableError, "asking for the keys was interrupted")


def _unknown(kid: str, *, destroyed: bool) -> UnknownKeyError:
    if destroyed:
        return UnknownKeyError(
            f"the key {kid!r} was destroyed", hint="What it sealed cannot be opened any more.", details={"kid": kid}
        )
    return UnknownKeyError(
        f"the value is sealed with the key {kid!r}, which this process does not have",
        hint="Give it the key: see docs/how-to/rotate-keys.md.",
        details={"kid": kid},
    )
