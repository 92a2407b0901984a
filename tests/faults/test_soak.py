"""The soak: a minute of random faults under mixed load, five times, with a ledger of every promise."""

import os

import pytest

from tests.fixtures.faults import PrivateServer
from tests.fixtures.soak import ManagerClient, PlainClient, soak

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(os.name == "nt", reason="there are no signals to freeze and kill a server with"),
]

SECONDS = 60


@pytest.mark.parametrize("seed", range(1, 6))
async def test_no_promise_is_broken_in_a_minute_of_random_faults(
    seed: int, private_server: PrivateServer, private_database: str
) -> None:
    verdict, figures = await soak(private_server, private_database, ManagerClient, seed=seed, seconds=SECONDS)
    print(figures)
    assert verdict.broken() == {}, figures


async def test_the_same_minute_breaks_promises_of_plain_sqlalchemy(
    private_server: PrivateServer, private_database: str
) -> None:
    """With `pool_pre_ping`: for comparison, and to see that the ledger finds what it is for."""
    verdict, figures = await soak(private_server, private_database, PlainClient, seed=1, seconds=SECONDS)
    print(figures, {name: len(found) for name, found in verdict.broken().items()})
    assert verdict.lies
