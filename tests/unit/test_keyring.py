"""What a `Keyring` keeps and for how long: states of keys, time limits, outages, unknown keys, and callers that come together or go away."""

import asyncio
import base64
import copy
import logging
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

import pytest
from pydantic import SecretStr

from car_control_plane import dsn as dsns
from car_control_plane.encryption import (
    ConnectionString,
    Key,
    KeyInfo,
    Keyring,
    KeyState,
    SealedConnectionString,
    StaticKeys,
    WrappedKeys,
    keyring as module,
)
from car_control_plane.errors import (
    ClosedError,
    ConfigurationError,
    ConnectionUnavailableError,
    ControlPlaneError,
    DecryptionError,
    InvalidDataError,
    KeyUnavailableError,
    UnknownKeyError,
)
from car_control_plane.settings import load_settings
from tests.fixtures.leaks import failure_of, leaks, shows

TENANT, DATABASE = uuid.UUID(int=1), uuid.UUID(int=2)
CANARY = "c4naryc4nary"
TEXT = f"postgresql://app:{CANARY}@db.example.com:5432/tenant_0001"
KEYS = {kid: Key(kid, bytes(range(at, at + 32))) for at, kid in enumerate("abcdefgh", 150)}

CACHE, OUTAGE, RETRY = 300.0, 3600.0, module.RETRY_SECONDS

PENDING, CURRENT, RETIRED, DESTROYED = KeyState.PENDING, KeyState.CURRENT, KeyState.RETIRED, KeyState.DESTROYED


class Source:
    """A provider to play with: what it holds, how it fails, whether it waits, and what it was asked."""

    def __init__(self, **states: KeyState) -> None:
        self.states = states or {"a": CURRENT}
        self.problem: BaseException | None = None
        self.problems: dict[str, BaseException] = {}
        self.keys: dict[str, Any] = dict(KEYS)
        self.asked: list[str] = []
        self.closed = self.answering = 0
        self.gate: asyncio.Event | None = None

    name = "source"

    async def list(self) -> Sequence[KeyInfo]:
        await self._answering("list")
        return [KeyInfo(kid, state) for kid, state in self.states.items()]

    async def get(self, kid: str) -> Key:
        await self._answering(kid)
        key: Key = self.keys[kid]
        return key

    async def close(self) -> None:
        assert self.answering == 0
        self.closed += 1

    async def _answering(self, what: str) -> None:
        self.asked.append(what)
        if self.gate is not None:
            self.answering += 1
            try:
                await self.gate.wait()
            finally:
                self.answering -= 1
        if (problem := self.problems.get(what, self.problem)) is not None:
            raise problem

    def take(self) -> "Sequence[str]":
        asked, self.asked = self.asked, []
        return asked


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time stands still until a test moves it."""
    clock = Clock()
    monkeypatch.setattr(module, "_now", clock)
    return clock


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def keys(source: Source, clock: Clock) -> Keyring:
    return Keyring(source, cache_seconds=CACHE, outage_seconds=OUTAGE)


async def seal(keys: Keyring, text: str = TEXT) -> SealedConnectionString:
    return await keys.seal(text, tenant_id=TENANT, database_id=DATABASE)


async def unseal(keys: Keyring, sealed: SealedConnectionString) -> str:
    return (await keys.unseal(sealed, tenant_id=TENANT, database_id=DATABASE)).reveal()


async def sealed_with(kid: str) -> SealedConnectionString:
    return await seal(Keyring(StaticKeys(f"{kid}:{KEYS[kid].to_base64()}")))


async def in_background(work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
    """Start the work, and return when it waits for something."""
    task = asyncio.create_task(work)
    for _ in range(20):
        await asyncio.sleep(0)
    return task


# --- sealing, opening and states --------------------------------------------------------------------------------------------


async def test_what_is_sealed_opens(keys: Keyring) -> None:
    for text in (TEXT, ConnectionString(TEXT), dsns.parse(TEXT)):
        sealed = await keys.seal(text, tenant_id=TENANT, database_id=DATABASE)
        assert sealed.kid == "a"
        opened = await keys.unseal(sealed, tenant_id=TENANT, database_id=DATABASE)
        assert opened.dsn == dsns.parse(TEXT)
    assert await unseal(keys, await seal(keys)) == TEXT


@pytest.mark.parametrize("text", [SecretStr(CANARY), CANARY.encode(), None, CANARY + "\ud800"])
async def test_what_is_no_text_is_not_sealed(keys: Keyring, text: Any) -> None:
    error = await failure_of(seal(keys, text))
    assert isinstance(error, InvalidDataError)
    assert list(leaks(error, CANARY)) == []


@pytest.mark.parametrize("text", ["", TEXT, f"ccp1:A:{CANARY}"])
async def test_what_was_never_sealed_is_not_opened_and_not_asked_for(keys: Keyring, source: Source, text: str) -> None:
    error = await failure_of(unseal(keys, SealedConnectionString(text)))
    assert isinstance(error, DecryptionError)
    assert list(leaks(error, CANARY)) == []
    assert source.asked == []


async def test_a_value_opens_in_its_row_only(keys: Keyring) -> None:
    sealed = await seal(keys)
    for tenant, database in ((DATABASE, TENANT), (TENANT, TENANT), (DATABASE, DATABASE)):
        with pytest.raises(DecryptionError):
            await keys.unseal(sealed, tenant_id=tenant, database_id=database)


async def test_a_key_of_the_same_name_and_other_bytes_does_not_open(keys: Keyring) -> None:
    sealed = await seal(keys)
    other = Keyring(StaticKeys(f"a:{KEYS['b'].to_base64()}"))
    error = await failure_of(unseal(other, sealed))
    assert isinstance(error, DecryptionError)
    assert list(leaks(error, CANARY)) == []
    assert list(leaks(error, KEYS["b"].to_base64())) == []


@pytest.mark.parametrize("state", [PENDING, CURRENT, RETIRED])
async def test_pending_current_and_retired_keys_open(keys: Keyring, source: Source, state: KeyState) -> None:
    source.states = {"a": state, "b": CURRENT if state is not CURRENT else RETIRED}
    assert await unseal(keys, await sealed_with("a")) == TEXT


async def test_a_destroyed_key_does_not_open_and_is_not_asked_for(keys: Keyring, source: Source) -> None:
    source.states = {"a": CURRENT, "b": DESTROYED}
    error = await failure_of(unseal(keys, await sealed_with("b")))
    assert isinstance(error, UnknownKeyError)
    assert "the key 'b' was destroyed" in str(error)
    assert error.details == {"kid": "b"}
    assert source.asked == ["list"]


async def test_the_current_key_seals_and_changes_with_the_list(keys: Keyring, source: Source, clock: Clock) -> None:
    source.states = {"b": PENDING, "a": CURRENT}
    assert (await seal(keys)).kid == "a"
    source.states = {"b": CURRENT, "a": RETIRED}
    assert (await seal(keys)).kid == "a"
    clock.now += CACHE
    assert (await seal(keys)).kid == "b"
    assert await keys.current() == KEYS["b"]


@pytest.mark.parametrize(
    ("states", "said"),
    [
        ({"a": RETIRED, "b": PENDING}, "no key is current (source)"),
        ({"a": CURRENT, "b": CURRENT}, "several keys are current: a, b (source)"),
    ],
)
async def test_without_exactly_one_current_key_nothing_is_sealed_but_all_is_opened(
    keys: Keyring, source: Source, states: dict[str, KeyState], said: str
) -> None:
    source.states = states
    for work in (seal(keys), keys.current(), keys.open()):
        error = await failure_of(work)
        assert isinstance(error, ConfigurationError)
        assert error.message == said
    assert await unseal(keys, await sealed_with("a")) == TEXT
    assert await unseal(keys, await sealed_with("b")) == TEXT


async def test_a_list_without_any_key_seals_nothing(keys: Keyring, source: Source) -> None:
    source.states.clear()
    assert await keys.list() == ()
    with pytest.raises(ConfigurationError, match="no key is current"):
        await seal(keys)
    with pytest.raises(UnknownKeyError):
        await keys.get("a")


async def test_the_list_is_what_the_provider_says_now(keys: Keyring, source: Source) -> None:
    assert await keys.list() == (KeyInfo("a", CURRENT),)
    source.states = {"b": CURRENT, "a": DESTROYED}
    assert await keys.list() == (KeyInfo("b", CURRENT), KeyInfo("a", DESTROYED))
    assert source.asked == ["list", "list"]


# --- time limits ------------------------------------------------------------------------------------------------------------


async def test_within_the_time_limit_nothing_is_asked(keys: Keyring, source: Source, clock: Clock) -> None:
    sealed = await seal(keys)
    assert source.take() == ["list", "a"]
    clock.now += CACHE - 1
    assert await unseal(keys, sealed) == TEXT
    assert (await seal(keys)).kid == "a"
    assert source.take() == []
    clock.now += 1
    assert await unseal(keys, sealed) == TEXT
    assert source.take() == ["list", "a"]


async def test_a_key_is_asked_for_when_it_is_used(keys: Keyring, source: Source, clock: Clock) -> None:
    source.states = {"a": CURRENT, "b": RETIRED}
    b = await sealed_with("b")
    await unseal(keys, b)
    assert source.take() == ["list", "b"]
    clock.now += CACHE
    await seal(keys)
    assert source.take() == ["list", "a"]


async def test_a_time_limit_of_nothing_asks_each_time(source: Source, clock: Clock) -> None:
    keys = Keyring(source, cache_seconds=0, outage_seconds=0)
    await seal(keys)
    await seal(keys)
    assert source.asked == ["list", "a"] * 2
    source.problem = OSError()
    with pytest.raises(KeyUnavailableError):
        await keys.get("a")


@pytest.mark.parametrize("wrong", [-1.0, float("nan")])
def test_time_limits_that_are_none_are_refused(wrong: float) -> None:
    for limits in ({"cache_seconds": wrong}, {"outage_seconds": wrong}):
        with pytest.raises(ConfigurationError, match="zero or more"):
            Keyring(Source(), **limits)


async def test_a_key_that_is_destroyed_stops_opening_with_the_time_limit(
    keys: Keyring, source: Source, clock: Clock
) -> None:
    source.states = {"a": RETIRED, "b": CURRENT}
    sealed = await sealed_with("a")
    await unseal(keys, sealed)
    source.states["a"] = DESTROYED
    assert await unseal(keys, sealed) == TEXT
    clock.now += CACHE
    with pytest.raises(UnknownKeyError, match="destroyed"):
        await unseal(keys, sealed)
    source.states["a"] = RETIRED  # back again, by a mistake of somebody: its bytes are asked for, not remembered
    source.take()
    await keys.list()
    await unseal(keys, sealed)
    assert source.asked == ["list", "a"]


async def test_keys_that_are_gone_are_forgotten(keys: Keyring, source: Source) -> None:
    source.states = {"a": CURRENT, "b": RETIRED}
    await keys.get("b")
    del source.states["b"]
    await keys.list()
    with pytest.raises(UnknownKeyError):
        await keys.get("b")
    assert set(keys._keys) == set()


# --- outages ----------------------------------------------------------------------------------------------------------------


async def test_in_an_outage_opened_keys_open_for_a_while_and_nothing_is_sealed(
    keys: Keyring, source: Source, clock: Clock
) -> None:
    sealed = await seal(keys)
    source.problem = OSError(CANARY)
    clock.now += CACHE - 1
    assert (await seal(keys)).kid == "a"  # still confirmed
    clock.now += 1
    for later in (0, 100, OUTAGE - 101):
        clock.now += later
        assert await unseal(keys, sealed) == TEXT
        error = await failure_of(seal(keys))
        assert isinstance(error, KeyUnavailableError)
        assert error.message == "no keys from source: OSError"
        assert error.retryable
        assert list(leaks(error, CANARY)) == []
    clock.now += 1
    for work in (unseal(keys, sealed), keys.get("a"), keys.list(), keys.current(), keys.open()):
        assert isinstance(await failure_of(work), KeyUnavailableError)


@pytest.mark.parametrize("down", ["list", "a"])
async def test_in_half_an_outage_nothing_is_sealed_either(
    keys: Keyring, source: Source, clock: Clock, down: str
) -> None:
    """The database that has the list may answer while the outer service does not, and the other way around."""
    sealed = await seal(keys)
    source.problems[down] = OSError()
    clock.now += CACHE
    with pytest.raises(KeyUnavailableError):
        await seal(keys)
    assert await unseal(keys, sealed) == TEXT
    clock.now += OUTAGE
    with pytest.raises(KeyUnavailableError):
        await unseal(keys, sealed)


async def test_after_an_outage_all_is_as_before(keys: Keyring, source: Source, clock: Clock) -> None:
    sealed = await seal(keys)
    source.problem = OSError()
    clock.now += CACHE + OUTAGE
    with pytest.raises(KeyUnavailableError):
        await unseal(keys, sealed)
    source.problem = None
    with pytest.raises(KeyUnavailableError):  # an outage is believed for a moment
        await unseal(keys, sealed)
    clock.now += RETRY
    assert await unseal(keys, sealed) == TEXT
    assert (await seal(keys)).kid == "a"
    with pytest.raises(UnknownKeyError):  # which nobody could tell in the outage
        await keys.get("b")


async def test_a_dead_provider_is_not_hammered(keys: Keyring, source: Source, clock: Clock) -> None:
    sealed = await seal(keys)
    source.take()
    source.problem = OSError()
    clock.now += CACHE
    for _ in range(100):
        await unseal(keys, sealed)
        for work in (seal(keys), keys.list(), keys.get("unknown")):
            await asyncio.gather(work, return_exceptions=True)
    assert source.take() == ["list", "a"]
    clock.now += RETRY
    for _ in range(100):
        await unseal(keys, sealed)
    await asyncio.sleep(0)
    assert sorted(source.take()) == ["a", "list"]


async def test_a_provider_dead_from_the_start_is_not_hammered(keys: Keyring, source: Source, clock: Clock) -> None:
    source.problem = OSError()
    errors = [await failure_of(work()) for _ in range(50) for work in (keys.open, keys.list, keys.current)]
    assert source.take() == ["list"]
    assert {type(error) for error in errors} == {KeyUnavailableError}
    clock.now += RETRY
    source.problem = None
    await keys.open()


async def test_in_an_outage_opening_does_not_wait_for_its_end(keys: Keyring, source: Source, clock: Clock) -> None:
    sealed = await seal(keys)
    source.problem = OSError()
    clock.now += CACHE
    await unseal(keys, sealed)
    clock.now += RETRY
    source.gate, source.problem = asyncio.Event(), None  # from now on it answers, but slowly
    source.take()
    opening = await in_background(unseal(keys, sealed))
    assert opening.done()
    assert await opening == TEXT
    assert sorted(source.asked) == ["a", "list"]
    sealing = await in_background(seal(keys))  # who needs the answer waits for it
    assert not sealing.done()
    source.gate.set()
    assert (await sealing).kid == "a"


async def test_a_slow_provider_is_waited_for_as_long_as_patience_lasts(
    keys: Keyring, source: Source, clock: Clock
) -> None:
    await keys.list()
    clock.now += 100
    sealed = await seal(keys)
    clock.now += CACHE - 100  # the list is too old, the key is not
    source.gate = asyncio.Event()
    opening = await in_background(unseal(keys, sealed))
    assert not opening.done()
    clock.now += module.PATIENCE_SECONDS  # it has been asked for so long: the next one does not wait
    later = await in_background(unseal(keys, sealed))
    assert later.done()
    assert await later == TEXT
    source.gate.set()
    assert await opening == TEXT
    assert source.asked == ["list", "a", "list"]


async def test_trouble_with_one_key_stays_with_it(keys: Keyring, source: Source, clock: Clock) -> None:
    source.states = {"a": CURRENT, "b": RETIRED, "c": RETIRED}
    b, c = await sealed_with("b"), await sealed_with("c")
    await unseal(keys, c)
    source.problems = {"b": DecryptionError("the wrapped key 'b' was altered"), "c": OSError()}
    for _ in range(3):
        clock.now += CACHE
        assert (await seal(keys)).kid == "a"
        assert await unseal(keys, c) == TEXT
        with pytest.raises(DecryptionError, match="wrapped key 'b'"):
            await unseal(keys, b)
    source.take()
    for _ in range(10):
        with pytest.raises(DecryptionError):
            await unseal(keys, b)
    assert source.take() == []
    clock.now += RETRY
    source.problems.clear()
    assert await unseal(keys, b) == TEXT


async def test_a_key_the_provider_has_no_more_is_forgotten_at_once(keys: Keyring, source: Source, clock: Clock) -> None:
    """Whatever the list says: this is no outage."""
    sealed = await seal(keys)
    clock.now += CACHE
    source.problems["a"] = UnknownKeyError("the outer key is gone", details={"kid": "a"})
    for _ in range(2):
        with pytest.raises(UnknownKeyError, match="outer key is gone") as caught:
            await unseal(keys, sealed)
        assert caught.value.details == {"kid": "a"}
    del source.problems["a"]
    clock.now += RETRY
    assert await unseal(keys, sealed) == TEXT


class RefusedError(ConfigurationError):
    """Somebody's own, with a constructor of its own."""

    def __init__(self) -> None:
        super().__init__("the key file is wrong", hint="chmod", details={"mode": "0644"})


@pytest.mark.parametrize(
    ("problem", "kind", "said"),
    [
        (RuntimeError(CANARY), KeyUnavailableError, "no keys from source: RuntimeError"),
        (ExceptionGroup(CANARY, [ValueError(CANARY)]), KeyUnavailableError, "no keys from source: ExceptionGroup"),
        (TimeoutError(), KeyUnavailableError, "no keys from source: TimeoutError"),
        (asyncio.CancelledError(CANARY), KeyUnavailableError, "asking for the keys was interrupted"),
        (
            ConnectionUnavailableError("no route", hint="Look."),
            KeyUnavailableError,
            "no keys from source: no route. Look.",
        ),
        (KeyUnavailableError("KMS is down"), KeyUnavailableError, "KMS is down"),
        (DecryptionError("altered"), DecryptionError, "altered"),
        (RefusedError(), ConfigurationError, "the key file is wrong. chmod"),
    ],
)
async def test_whatever_a_provider_raises_is_one_of_ours(
    keys: Keyring, source: Source, problem: BaseException, kind: type[ControlPlaneError], said: str
) -> None:
    source.problem = problem
    works: list[Callable[[], Awaitable[object]]] = [keys.open, keys.list, keys.current, lambda: keys.get("a"), lambda: seal(keys)]  # fmt: skip
    for work in works:
        error = await failure_of(work())
        assert type(error) is kind
        assert str(error).startswith(said)
        assert list(leaks(error, CANARY)) == []
        assert (error.__cause__, error.__context__) == (None, None)


async def test_an_error_raised_again_and_again_gathers_nothing(keys: Keyring, source: Source) -> None:
    source.problem = KeyUnavailableError("down", details={"service": "kms"})
    errors = [await failure_of(keys.open()) for _ in range(20)]
    lengths = set()
    for error in errors:
        assert isinstance(error, KeyUnavailableError)
        assert error.details == {"service": "kms"}
        trace, length = error.__traceback__, 0
        while trace is not None:
            trace, length = trace.tb_next, length + 1
        lengths.add(length)
    assert len(set(map(id, errors))) == 20
    assert len(lengths) == 1
    assert "Task" not in repr([frame for error in errors for frame in locals_of(error)])


def locals_of(error: BaseException) -> list[dict[str, Any]]:
    trace, found = error.__traceback__, []
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == module.__file__:
            found.append(trace.tb_frame.f_locals)
        trace = trace.tb_next
    assert found
    return found


@pytest.mark.parametrize("given", [KEYS["b"], None, "a"])
async def test_a_provider_that_gives_something_else_than_the_key_seals_nothing(
    keys: Keyring, source: Source, given: object
) -> None:
    source.keys["a"] = given
    with pytest.raises(KeyUnavailableError):
        await seal(keys)


async def test_an_outage_and_its_end_are_logged_once(
    keys: Keyring, source: Source, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "car_control_plane.encryption")
    sealed = await seal(keys)
    source.problem = OSError(CANARY)
    for _ in range(5):
        clock.now += CACHE
        await unseal(keys, sealed)
    await asyncio.sleep(0)
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]  # of the list, and of the key
    source.problem = None
    clock.now += RETRY
    await seal(keys)
    assert [record.levelname for record in caplog.records][2:] == ["INFO", "INFO"]
    assert "source" in caplog.text
    assert CANARY not in caplog.text


# --- unknown keys -----------------------------------------------------------------------------------------------------------


async def test_an_unknown_key_has_the_provider_asked_once_and_is_then_believed_unknown_for_a_moment(
    keys: Keyring, source: Source, clock: Clock
) -> None:
    await seal(keys)
    source.take()
    for _ in range(10):
        error = await failure_of(unseal(keys, await sealed_with("b")))
        assert isinstance(error, UnknownKeyError)
        assert error.details == {"kid": "b"}
        assert "the key 'b'" in error.message
        assert list(leaks(error, CANARY)) == []
    assert source.take() == ["list"]
    for kid in "cdefgh":  # other names do not buy more questions
        with pytest.raises(UnknownKeyError):
            await keys.get(kid)
    assert source.take() == []
    source.states["b"] = PENDING
    clock.now += RETRY
    assert await unseal(keys, await sealed_with("b")) == TEXT
    assert source.take() == ["list", "b"]


async def test_a_process_with_an_old_list_learns_of_a_new_key_at_once(keys: Keyring, source: Source) -> None:
    await seal(keys)
    source.states = {"b": CURRENT, "a": RETIRED}
    assert await unseal(keys, await sealed_with("b")) == TEXT
    assert (await seal(keys)).kid == "b"


async def test_a_list_asked_for_a_moment_ago_by_the_same_call_is_not_asked_for_again(
    keys: Keyring, source: Source
) -> None:
    with pytest.raises(UnknownKeyError):
        await keys.get("b")
    assert source.asked == ["list"]


async def test_in_an_outage_nobody_says_that_a_key_does_not_exist(keys: Keyring, source: Source, clock: Clock) -> None:
    await seal(keys)
    source.problem = OSError()
    for later in (0, CACHE):
        clock.now += later
        with pytest.raises(KeyUnavailableError):
            await keys.get("b")
    assert await keys.get("a") == KEYS["a"]


# --- callers that come together, and go away --------------------------------------------------------------------------------


async def test_callers_that_come_together_ask_once(keys: Keyring, source: Source) -> None:
    source.gate = asyncio.Event()
    sealed = await sealed_with("a")
    callers = [await in_background(work) for _ in range(20) for work in (unseal(keys, sealed), seal(keys), keys.open())]
    source.gate.set()
    await asyncio.gather(*callers)
    assert source.asked == ["list", "a"]


async def test_callers_with_an_unknown_key_ask_once(keys: Keyring, source: Source) -> None:
    await seal(keys)
    source.take()
    source.gate = asyncio.Event()
    source.states["b"] = PENDING
    callers = [await in_background(keys.get("b")) for _ in range(20)]
    source.gate.set()
    assert await asyncio.gather(*callers) == [KEYS["b"]] * 20
    assert source.asked == ["list", "b"]


async def test_a_cancelled_caller_does_not_disturb_the_others(keys: Keyring, source: Source) -> None:
    source.gate = asyncio.Event()
    first, second, third = [await in_background(seal(keys)) for _ in range(3)]
    first.cancel()
    third.cancel()
    for cancelled in (first, third):
        with pytest.raises(asyncio.CancelledError):
            await cancelled
    source.gate.set()
    assert (await second).kid == "a"
    assert source.asked == ["list", "a"]


async def test_an_answer_nobody_waits_for_any_more_is_kept(keys: Keyring, source: Source) -> None:
    """So that callers who are less patient than the provider is slow get there all the same."""
    source.gate = asyncio.Event()
    first = await in_background(keys.list())
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    source.gate.set()
    await in_background(asyncio.sleep(0))
    source.gate = None
    await keys.get("a")
    assert source.asked == ["list", "a"]


async def test_a_list_is_not_older_than_the_call(keys: Keyring, source: Source) -> None:
    source.gate = asyncio.Event()
    first = await in_background(keys.list())
    later = [await in_background(keys.list()) for _ in range(5)]
    source.gate.set()
    await asyncio.gather(first, *later)
    assert source.asked == ["list", "list"]


async def test_a_failure_of_one_who_waits_is_an_error_of_his_own(keys: Keyring, source: Source) -> None:
    source.gate, source.problem = asyncio.Event(), OSError()
    callers = [await in_background(seal(keys)) for _ in range(5)]
    source.gate.set()
    errors = await asyncio.gather(*callers, return_exceptions=True)
    assert len({id(error) for error in errors}) == 5
    assert {type(error) for error in errors} == {KeyUnavailableError}
    assert source.asked == ["list"]


async def test_a_key_that_goes_while_it_is_asked_for(keys: Keyring, source: Source) -> None:
    source.states = {"a": CURRENT, "b": RETIRED}
    await keys.list()
    source.gate = asyncio.Event()
    caller = await in_background(keys.get("b"))
    gate, source.gate = source.gate, None
    del source.states["b"]
    await keys.list()
    gate.set()
    error = await failure_of(caller)
    assert isinstance(error, KeyUnavailableError)
    with pytest.raises(UnknownKeyError):
        await keys.get("b")


def test_a_keyring_outlives_a_loop_that_ended_while_it_asked(source: Source) -> None:
    keys = Keyring(source)

    async def give_up() -> None:
        source.gate = asyncio.Event()
        await in_background(keys.open())

    asyncio.run(give_up())
    source.gate = None
    with pytest.raises(KeyUnavailableError, match="interrupted"):
        asyncio.run(keys.open())


# --- life -------------------------------------------------------------------------------------------------------------------


async def test_a_closed_keyring_does_nothing_more(keys: Keyring, source: Source) -> None:
    sealed = await seal(keys)
    await keys.close()
    await keys.close()
    assert source.closed >= 1
    assert keys._keys == {}
    assert keys._listed.answer is None
    source.take()
    for work in (seal(keys), unseal(keys, sealed), keys.get("a"), keys.get("b"), keys.list(), keys.current(), keys.open()):  # fmt: skip
        assert isinstance(await failure_of(work), ClosedError)
    assert source.asked == []
    assert repr(keys) == "<Keyring source (closed)>"


async def test_whoever_waits_when_the_keyring_is_closed_is_told_so(keys: Keyring, source: Source) -> None:
    await seal(keys)
    source.gate = asyncio.Event()
    works = (keys.list(), keys.get("b"), keys.list())
    callers = [await in_background(work) for work in works]
    await keys.close()
    errors = await asyncio.gather(*callers, return_exceptions=True)
    assert [type(error) for error in errors] == [ClosedError] * 3
    assert keys._listed.answer is None


async def test_a_keyring_is_a_block(source: Source) -> None:
    async with Keyring(source) as keys:
        assert source.asked == ["list", "a"]
        assert repr(keys) == "<Keyring source>"
        assert keys.provider is source
    assert source.closed == 1
    with pytest.raises(ClosedError):
        await keys.open()


async def test_a_block_that_cannot_be_entered_closes_what_it_opened(source: Source) -> None:
    source.problem = OSError()
    with pytest.raises(KeyUnavailableError):
        async with Keyring(source):
            raise AssertionError
    assert source.closed == 1


async def test_no_part_of_a_keyring_shows_a_key() -> None:
    secret = base64.b64encode(b"\xff" + CANARY.encode().ljust(31, b"\xff")).decode()
    async with Keyring(StaticKeys(f"a:{secret}")) as keys:
        for thing in (keys, vars(keys), vars(keys._listed), vars(keys._keys["a"]), keys._keys["a"].answer):
            for canary in (CANARY, secret):
                assert list(shows(thing, canary)) == []
        with pytest.raises(TypeError):
            copy.deepcopy(keys)


async def test_a_keyring_from_settings() -> None:
    text = f"a:{KEYS['a'].to_base64()}"
    settings = load_settings(encryption_keys=text, encryption_cache_seconds=7.0, encryption_outage_seconds=8.0)
    keys = Keyring.from_settings(settings)
    assert (keys._cache_seconds, keys._outage_seconds, keys.provider.name) == (7.0, 8.0, "environment")
    assert await unseal(keys, await seal(keys)) == TEXT
    with pytest.raises(ConfigurationError):
        Keyring.from_settings(load_settings(encryption_keys=None))


async def test_a_keyring_from_settings_with_a_table_of_keys(tmp_path: Any) -> None:
    class Store:
        async def load(self) -> list[Any]:
            return []

    settings = load_settings(encryption_key_wrapper="local", encryption_outer_key_file=tmp_path / "outer")
    keys = Keyring.from_settings(settings, store=Store())
    assert isinstance(keys.provider, WrappedKeys)
    assert await keys.list() == ()
