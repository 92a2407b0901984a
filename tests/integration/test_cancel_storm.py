"""A storm of cancellations, in every way a program cancels: nobody gets another's answer, and nothing is lost or left over."""

import pytest

from tests.fixtures.storm import rage

UNITS = 2_000


@pytest.mark.slow
async def test_a_storm_of_cancellations_does_no_harm(own_database: str) -> None:
    await rage(own_database, units=UNITS, seed=20240229)
