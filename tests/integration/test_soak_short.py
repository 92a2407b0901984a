"""The soak, for as long as a run of all tests has patience; and the ledger, which has to find what it is for."""

import os

import pytest

from tests.fixtures.faults import FaultProxy, PrivateServer, looking
from tests.fixtures.soak import Client, Ledger, Load, ManagerClient, PlainClient, Verdict, entries, prepare, soak

pytestmark = pytest.mark.skipif(os.name == "nt", reason="there are no signals to freeze and kill a server with")

SECONDS = 20


@pytest.mark.slow
async def test_no_promise_is_broken_under_random_faults(private_server: PrivateServer, private_database: str) -> None:
    verdict, figures = await soak(private_server, private_database, ManagerClient, seed=20240229, seconds=SECONDS)
    print(figures)
    assert verdict.broken() == {}, figures


async def one_lost_answer(client: type[ManagerClient | PlainClient], database: str) -> tuple[Ledger, Verdict]:
    """Run one session whose COMMIT is done and never answered."""
    await prepare(database)
    async with FaultProxy(database) as proxy:
        loaded: Client = client(proxy.dsn)
        load = Load(loaded, seed=0)
        await load.call("session")
        with proxy.counting() as wire:
            await load.call("session")
        proxy.strike(wire.messages["to_client", "C"], direction="to_client", kind="C")
        await load.call("session")
        await load.call("session")
        await loaded.close()
    found, _ = await entries(database)
    return load.ledger, load.ledger.audit(found)


async def test_the_ledger_finds_the_lie_of_a_client_that_calls_a_lost_answer_a_failure(private_database: str) -> None:
    ledger, verdict = await one_lost_answer(PlainClient, private_database)
    assert list(verdict.broken()) == ["lies"]
    assert len(verdict.lies) == len(ledger.refused) == 1
    assert len(ledger.done) == 3


async def test_a_manager_says_that_it_does_not_know(private_database: str) -> None:
    ledger, verdict = await one_lost_answer(ManagerClient, private_database)
    assert verdict.broken() == {}
    assert list(ledger.unknown.values()) == ["session"]
    assert len(ledger.done) == 3


def test_the_ledger_finds_every_broken_promise() -> None:
    ledger = Ledger(
        done={"kept": "session", "lost": "session", "half": "session", "twice": "unit"},
        refused={"refused": "session: no", "lie": "session: no"},
        unknown={"either": "session", "or": "session"},
    )
    found = {"kept": (1, 1), "half": (1, 0), "twice": (2, 2), "lie": (1, 1), "either": (1, 1), "nobody's": (1, 1)}
    assert ledger.audit(found).broken() == {
        "lost": ["lost: session"],
        "lies": ["lie: session: no"],
        "torn": ["half (1, 0)", "twice (2, 2)"],
        "invented": ["nobody's"],
    }


async def test_the_ledger_finds_calls_that_hang_and_answers_that_are_wrong(private_database: str) -> None:
    """A client that answers with somebody else's row, and one without time limits behind a network that has died."""
    await prepare(private_database)

    class Careless(ManagerClient):
        async def direct_read(self, token: str) -> int:
            return await super().direct_read(token) + 1

    async with FaultProxy(private_database) as proxy:
        client = Careless(proxy.dsn)
        load = Load(client, seed=0)
        await load.call("direct write")
        await load.call("direct read")
        assert len(load.ledger.wrong) == 1
        await client.close()
        client = Careless(
            proxy.dsn,
            command_timeout_seconds=3600.0,
            pool_ping_after_seconds=3600.0,
        )
        await Load(client, seed=0).call("direct write")
        proxy.stall()
        load = Load(client, seed=0, patience=1.0)
        await load.call("direct write")
        assert len(load.ledger.hung) == 1
        proxy.resume()
        await client.close()
    async with looking(private_database) as looker:
        assert await looker.fetchval("SELECT count(*) FROM public.entries") > 0
