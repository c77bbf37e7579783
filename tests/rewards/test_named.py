"""Rewards by name."""

import pytest

from rewards import Incompressibility, reward_named


def test_a_reward_is_made_by_the_factory_of_that_name() -> None:
    assert isinstance(reward_named("rewards.jpeg:Incompressibility"), Incompressibility)
    for name in ("rewards.jpeg", "rewards.jpeg:Missing", "nowhere:at_all"):
        with pytest.raises(ValueError, match=r"reward must be one of .*, or package\.module:factory, got"):
            reward_named(name)
    with pytest.raises(ValueError, match="reward must be callable"):
        reward_named("builtins:dict")
