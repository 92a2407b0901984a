"""Sealing and opening connection strings, on one core, beside cryptography's Fernet."""

import time
import uuid
from collections.abc import Awaitable, Callable, Sequence

from cryptography.fernet import Fernet

from benchmarks.harness import Bench, Line, Table, Way, at_least, interleaved, ratios
from car_control_plane.encryption import Key, Keyring, SealedConnectionString, StaticKeys
from car_control_plane.encryption.envelope import connection_string_context, seal, unseal

VALUES = 2_000
"""Connection strings in each slice, each of another row."""
SLICES = 10

TEXT = "postgresql://app_0001:Zq3vT9-long-random-password-8dK2@db-0001.example.com:5432/tenant_0001?sslmode=verify-full"

# What is compared: what it is called, the way, and its yardstick.
COMPARED = (
    ("`Keyring.seal`", "keyring seals", "fernet seals"),
    ("`Keyring.unseal`", "keyring opens", "fernet opens"),
    ("`envelope.seal`", "envelope seals", "fernet seals"),
    ("`envelope.unseal`", "envelope opens", "fernet opens"),
)
YARDSTICKS = {"fernet seals": "`Fernet.encrypt`", "fernet opens": "`Fernet.decrypt`"}

Place = tuple[uuid.UUID, uuid.UUID]


async def measure(bench: Bench) -> Table:
    places = [(uuid.uuid4(), uuid.uuid4()) for _ in range(bench.size(VALUES))]
    slices = bench.slices(SLICES)
    key = Key.generate("2026-11")
    async with Keyring(StaticKeys(f"{key.kid}:{key.to_base64()}")) as keys:
        ways = {**_keyring(keys, places), **_envelope(key, places), **_fernet(places)}
        await interleaved(ways, 1)
        costs = await interleaved(ways, bench.rounds, slices=slices)
    calls = len(places) * slices
    speeds = {name: [calls / cost for cost in costs[name]] for name in ways}
    return Table(
        "Sealing connection strings",
        f"One connection string of {len(TEXT)} characters for each row, one after the other in one thread; seconds of its core. Fernet binds nothing to a row, has no "
        "key id and no commitment to its key, and uses AES-128.",
        [
            *(Line(what, YARDSTICKS[other], ratios(costs, other, to=way), at_least(0.5)) for what, way, other in COMPARED),
            *(Line(what, "", speeds[way], at_least(15_000), "/s") for what, way, _ in COMPARED),
            *(Line(what, "", speeds[name], None, "/s") for name, what in YARDSTICKS.items()),
        ],
    )  # fmt: skip


def _way(work: Callable[[], Awaitable[object]]) -> Way:
    async def run() -> float:
        started = time.process_time()
        await work()
        return time.process_time() - started

    return run


def _keyring(keys: Keyring, places: Sequence[Place]) -> dict[str, Way]:
    sealed: list[SealedConnectionString] = []

    async def seals() -> None:
        sealed[:] = [await keys.seal(TEXT, tenant_id=tenant, database_id=database) for tenant, database in places]

    async def opens() -> None:
        if not sealed:
            await seals()
        for value, (tenant, database) in zip(sealed, places, strict=True):
            (await keys.unseal(value, tenant_id=tenant, database_id=database)).reveal()

    return {"keyring seals": _way(seals), "keyring opens": _way(opens)}


def _envelope(key: Key, places: Sequence[Place]) -> dict[str, Way]:
    """As a rotation calls it: without the keyring, with the place made for each row."""
    sealed: list[str] = []

    async def seals() -> None:
        sealed[:] = [seal(key, TEXT, connection_string_context(*place)) for place in places]

    async def opens() -> None:
        if not sealed:
            await seals()
        for value, place in zip(sealed, places, strict=True):
            unseal(key, value, connection_string_context(*place))

    return {"envelope seals": _way(seals), "envelope opens": _way(opens)}


def _fernet(places: Sequence[Place]) -> dict[str, Way]:
    fernet, sealed = Fernet(Fernet.generate_key()), list[str]()

    async def seals() -> None:
        sealed[:] = [fernet.encrypt(TEXT.encode()).decode() for _ in places]

    async def opens() -> None:
        if not sealed:
            await seals()
        for value in sealed:
            fernet.decrypt(value).decode()

    return {"fernet seals": _way(seals), "fernet opens": _way(opens)}
