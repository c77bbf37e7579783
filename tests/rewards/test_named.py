"""Rewards by name."""

import pytest

from rewards import FACTORIES, Incompressibility, RemoteReward, reward_named


def test_a_reward_is_made_by_the_factory_of_that_name() -> None:
    assert isinstance(reward_named("rewards.jpeg:Incompressibility"), Incompressibility)
    for name in ("rewards.jpeg", "rewards.jpeg:Missing", "nowhere:at_all"):
        with pytest.raises(ValueError, match=r"reward must be one of .*, or package\.module:factory, got"):
            reward_named(name)
    with pytest.raises(ValueError, match="reward must be callable"):
        reward_named("builtins:dict")


def test_an_address_is_a_served_reward_with_the_token_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = reward_named("http://127.0.0.1:8085")
    assert isinstance(reward, RemoteReward)
    assert (reward.config.url, reward.config.token_variable) == ("http://127.0.0.1:8085", None)
    monkeypatch.setenv("OVERPAINT_TOKEN", "secret")
    reward = reward_named("https://rewards.example")
    assert isinstance(reward, RemoteReward)
    assert reward.config.token_variable == "OVERPAINT_TOKEN"


@pytest.mark.parametrize("name", FACTORIES)
def test_every_short_name_leads_to_something_that_can_be_called(name: str) -> None:
    assert callable(FACTORIES[name])


def test_further_short_names_are_the_callers() -> None:
    assert isinstance(reward_named("mine", {"mine": Incompressibility}), Incompressibility)
    with pytest.raises(ValueError, match=r"reward must be one of image-reward, .*, mine, an address"):
        reward_named("other", {"mine": Incompressibility})
