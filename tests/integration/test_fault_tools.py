"""The tools faults are made with do what they say: otherwise a test that survives them proves nothing."""

import asyncio
import os
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from tests.fixtures.faults import Direction, FaultProxy, PrivateServer, When, backends, looking, terminate
from tests.fixtures.postgres import create_database, drop_database

SILENCE = 0.2
"""Seconds after which an answer that has not come is not coming."""


@pytest.fixture
async def proxy(empty_database: str) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(empty_database) as proxy:
        yield proxy


@pytest.fixture
async def client(proxy: FaultProxy) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(proxy.dsn, statement_cache_size=0)
    yield connection
    connection.terminate()


async def silent(work: Any) -> "asyncio.Task[Any]":
    """Begin to work, and see that no answer comes."""
    task: asyncio.Task[Any] = asyncio.ensure_future(work)
    done, _ = await asyncio.wait({task}, timeout=SILENCE)
    assert not done
    return task


async def test_a_proxy_counts_messages_connections_and_round_trips(proxy: FaultProxy) -> None:
    with proxy.counting() as connecting:
        connection = await asyncpg.connect(proxy.dsn)
    try:
        assert connecting.connections == 1
        assert connecting.messages["to_server", "startup"] == connecting.messages["to_client", "Z"] == 1
        with proxy.counting() as first:
            assert await connection.fetchval("SELECT $1::int", 7) == 7
        with proxy.counting() as second:
            assert await connection.fetchval("SELECT $1::int", 8) == 8
    finally:
        await connection.close()
    assert (first.round_trips, second.round_trips) == (2, 1), "the first one prepares"
    assert second.connections == 0
    assert second.messages["to_server", "S"] == second.messages["to_client", "D"] == 1
    assert second.total == 7


async def test_a_large_answer_passes_whole(client: asyncpg.Connection) -> None:
    assert len(await client.fetchval("SELECT repeat('x', 3000000)")) == 3_000_000


async def test_a_stalled_connection_keeps_what_it_does_not_pass_on(
    proxy: FaultProxy, client: asyncpg.Connection
) -> None:
    proxy.stall()
    answer = await silent(client.fetchval("SELECT 1"))
    other = await asyncpg.connect(proxy.dsn)
    assert await other.fetchval("SELECT 2") == 2, "new connections are not stalled"
    await other.close()
    proxy.resume()
    assert await answer == 1


async def test_an_answer_can_be_kept_back_of_what_was_done(proxy: FaultProxy, client: asyncpg.Connection) -> None:
    proxy.stall(direction="to_client")
    answer = await silent(client.fetchval("SELECT 1"))
    assert proxy.history[-1].direction == "to_client"
    proxy.resume()
    assert await answer == 1


async def test_new_connections_can_be_stalled_and_old_ones_go_on(proxy: FaultProxy, client: asyncpg.Connection) -> None:
    proxy.stall(existing=False, new=True)
    connecting = await silent(asyncpg.connect(proxy.dsn))
    assert await client.fetchval("SELECT 1") == 1
    proxy.resume()
    await (await connecting).close()


async def test_a_black_hole_takes_a_connection_and_keeps_silent(proxy: FaultProxy, client: asyncpg.Connection) -> None:
    proxy.black_hole()
    connecting = await silent(asyncpg.connect(proxy.dsn))
    assert len(proxy.links) == 1
    connecting.cancel()
    await asyncio.wait({connecting})
    assert await client.fetchval("SELECT 1") == 1


async def test_refused_is_refused_until_the_same_port_takes_connections_again(
    proxy: FaultProxy, client: asyncpg.Connection
) -> None:
    proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        await asyncpg.connect(proxy.dsn)
    assert await client.fetchval("SELECT 1") == 1
    proxy.accept()
    await (await asyncpg.connect(proxy.dsn)).close()


async def test_a_delay_holds_up(proxy: FaultProxy, client: asyncpg.Connection) -> None:
    await client.fetchval("SELECT 1")
    proxy.delay(SILENCE, jitter=0.01)
    answer = await silent(client.fetchval("SELECT 2"))
    assert await answer == 2


@pytest.mark.parametrize("reset", [False, True], ids=["cut", "reset"])
async def test_all_connections_can_be_ended(proxy: FaultProxy, reset: bool) -> None:
    # Bare sockets, for a driver tells both endings alike.
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    async with asyncio.timeout(60):
        while not proxy.links:  # noqa: ASYNC110 -- it is taken in the background
            await asyncio.sleep(0)
    assert proxy.cut(reset=reset) == 1
    if reset:
        with pytest.raises(ConnectionResetError):
            await reader.read()
    else:
        assert await reader.read() == b""
    writer.close()


TRANSACTION = "INSERT INTO struck VALUES (1)"


@pytest.fixture
async def table(empty_database: str) -> AsyncIterator[asyncpg.Connection]:
    async with looking(empty_database) as looker:
        await looker.execute("CREATE TABLE struck (number int)")
        yield looker


@pytest.mark.parametrize(
    ("direction", "when", "written"),
    [
        ("to_server", "before", False),
        ("to_server", "half", False),
        ("to_server", "after", True),
        ("to_client", "before", True),
        ("to_client", "half", True),
    ],
)
@pytest.mark.parametrize("then", ["close", "reset"])
async def test_a_strike_falls_on_its_message(  # noqa: PLR0917 -- parameters and fixtures
    direction: Direction,
    when: When,
    written: bool,
    then: Any,
    proxy: FaultProxy,
    client: asyncpg.Connection,
    table: asyncpg.Connection,
) -> None:
    kind = "Q" if direction == "to_server" else "C"
    strike = proxy.strike(1, direction=direction, when=when, then=then, kind=kind)
    with pytest.raises((asyncpg.PostgresConnectionError, asyncpg.InterfaceError, OSError)):
        await client.execute(TRANSACTION)
    assert strike.struck is not None
    assert (strike.struck.direction, strike.struck.kind) == (direction, kind)
    async with asyncio.timeout(60):
        while await backends(table):  # noqa: ASYNC110 -- a backend ends its statement before it sees who has hung up
            await asyncio.sleep(0.002)
    assert bool(await table.fetchval("SELECT count(*) FROM struck")) is written


async def test_an_answer_that_was_passed_on_is_read_before_the_end(
    proxy: FaultProxy, client: asyncpg.Connection
) -> None:
    proxy.strike(1, direction="to_client", when="after", kind="Z")
    assert await client.execute("SELECT 1") == "SELECT 1"
    with pytest.raises((asyncpg.PostgresConnectionError, asyncpg.InterfaceError, OSError)):
        await client.execute("SELECT 1")


async def test_the_number_of_messages_is_the_number_of_places_to_strike(proxy: FaultProxy) -> None:
    """As a matrix uses it: count once, then strike each."""

    async def work() -> None:
        connection = await asyncpg.connect(proxy.dsn, statement_cache_size=0)
        try:
            await connection.fetchval("SELECT 1")
        finally:
            connection.terminate()
            await proxy.quiet()

    with proxy.counting() as wire:
        await work()
    assert wire.total > 10
    for at in range(1, wire.total):  # but the last, which says goodbye and waits for nothing
        strike = proxy.strike(at)
        with pytest.raises((asyncpg.PostgresConnectionError, asyncpg.InterfaceError, OSError)):
            await work()
        assert strike.struck is not None
    beyond = proxy.strike(wire.total + 1)
    await work()
    assert beyond.struck is None


@pytest.mark.parametrize("when", ["before", "half", "after"])
async def test_a_message_can_be_stopped_half_way_and_go_on(
    when: When, proxy: FaultProxy, client: asyncpg.Connection
) -> None:
    proxy.strike(1, direction="to_client", when=when, then="stall", kind="D")
    answer = await silent(client.fetchval("SELECT repeat('x', 100000)"))
    proxy.resume()
    assert len(await answer) == 100_000


async def test_a_proxy_leaves_nothing_over(server_dsn: str) -> None:
    before = asyncio.all_tasks()
    descriptors = _descriptors()
    async with FaultProxy(server_dsn) as proxy:
        connections = [await asyncpg.connect(proxy.dsn) for _ in range(3)]
        proxy.stall()
        proxy.black_hole()
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        await asyncio.sleep(0)
    assert await reader.read() == b""
    writer.close()
    for connection in connections:
        connection.terminate()
    async with asyncio.timeout(60):
        while asyncio.all_tasks() - before or _descriptors() > descriptors:  # noqa: ASYNC110 -- sockets are closed in the background
            await asyncio.sleep(0.002)


def _descriptors() -> int:
    """Count the files this process has open; where there is no such list, none."""
    where = Path("/proc/self/fd")
    return len(list(where.iterdir())) if where.is_dir() else 0


# --- the server -------------------------------------------------------------------------------------------------------

needs_signals = pytest.mark.skipif(
    os.name == "nt", reason="there are no such signals, and no links without a right to them"
)


@pytest.fixture
async def dsn(private_server: PrivateServer) -> AsyncIterator[str]:
    """Address of an empty database on the private server."""
    await private_server.up()
    name = f"empty_{secrets.token_hex(6)}"
    yield await create_database(private_server.dsn(), name)
    await private_server.up()
    await drop_database(private_server.dsn(), name)


@needs_signals
@pytest.mark.parametrize("way", ["fast", "immediate", "crash"])
async def test_a_private_server_dies_in_every_way_under_one_address(
    way: Any, private_server: PrivateServer, dsn: str
) -> None:
    async with looking(dsn) as looker:
        await looker.execute("CREATE TABLE kept AS SELECT 1")
        await asyncio.to_thread(private_server.crash if way == "crash" else lambda: private_server.restart(way))
        with pytest.raises((OSError, asyncpg.PostgresError, asyncpg.InterfaceError)):
            await looker.execute("SELECT pg_sleep(30)")
    await private_server.up()
    async with looking(dsn) as looker:
        assert await looker.fetchval("SELECT count(*) FROM kept") == 1


@needs_signals
async def test_a_frozen_server_keeps_silent_until_it_goes_on(private_server: PrivateServer, dsn: str) -> None:
    async with looking(dsn) as looker:
        private_server.freeze()
        try:
            answer = await silent(looker.fetchval("SELECT 1"))
        finally:
            private_server.thaw()
        assert await answer == 1


@needs_signals
async def test_backends_can_be_ended_and_seen(dsn: str) -> None:
    victims = [await asyncpg.connect(dsn) for _ in range(3)]
    async with looking(dsn) as looker:
        assert sorted(await backends(looker)) == sorted(victim.get_server_pid() for victim in victims)
        await terminate(looker, victims[0].get_server_pid())
        assert len(await backends(looker)) == 2
        await terminate(looker)
        assert await backends(looker) == []
    for victim in victims:
        victim.terminate()
