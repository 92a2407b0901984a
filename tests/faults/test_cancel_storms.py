"""Storms of cancellations, longer and more of them than the default run has patience for."""

import pytest

from tests.fixtures.storm import rage

pytestmark = pytest.mark.faults

UNITS = 6_000


@pytest.mark.parametrize("seed", range(1, 6))
async def test_no_storm_does_harm(seed: int, own_database: str) -> None:
    await rage(own_database, units=UNITS, seed=seed)
