"""Checking the arguments of calls costs next to nothing."""

import pytest

from benchmarks import argument_checks


@pytest.mark.slow
def test_checks_cost_less_than_they_may() -> None:
    costs = argument_checks.main(argument_checks.Config(iterations=1))
    assert all(cost.calls and cost.share <= argument_checks.TARGET for cost in costs.values()), costs
