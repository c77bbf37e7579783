from collections.abc import Callable
from typing import Any

import pytest
import torch

from erasure import UCE, Concept, strongest_erasure, strongest_setting
from overpaint.policy import DiffusionPolicy
from overpaint.policy.types import PerSample
from overpaint.policy.weights import base_parameters

NOISE = torch.randn(64, generator=torch.Generator().manual_seed(0))
NOISE = NOISE - NOISE.mean()


def falling(strength: float) -> PerSample:
    """Rewards with mean 1 - strength squared, and much noise that is the same at every strength."""
    return 1 - strength**2 + 10 * NOISE


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.93])
def test_search_finds_the_threshold_of_falling_rewards(threshold: float) -> None:
    search = strongest_setting(falling, floor=1 - threshold**2, tolerance=1e-3)
    assert threshold - 1e-3 <= search.best.strength <= threshold + 1e-6  # rounding of the floor
    assert search.monotone


def test_floor_is_what_the_weakest_setting_has_less_the_slack() -> None:
    search = strongest_setting(falling, slack=0.25, tolerance=1e-3)
    assert search.floor == pytest.approx(0.75, abs=1e-5)
    assert 0.5 - 1e-3 <= search.best.strength <= 0.5 + 1e-5


def test_best_setting_keeps_the_floor_even_if_rewards_rise_again() -> None:
    def dipping(strength: float) -> PerSample:
        return torch.full((4,), 1.0 - 4 * strength if strength < 0.5 else -2.0 + strength)

    search = strongest_setting(dipping, floor=0.5, tolerance=1e-3)
    assert search.best.reward >= 0.5
    assert search.best.strength == pytest.approx(0.125, abs=1e-3)
    assert not search.monotone


def test_strongest_setting_is_taken_at_once_if_it_keeps_the_floor() -> None:
    search = strongest_setting(falling, floor=-5.0, weakest=0.0, strongest=2.0)
    assert [trial.strength for trial in search.trials] == [0.0, 2.0]
    assert search.best.strength == 2.0


def test_change_is_paired_so_that_common_noise_cancels() -> None:
    best = strongest_setting(falling, floor=0.75, tolerance=1e-3).best
    assert best.change == pytest.approx(-(best.strength**2), abs=1e-5)
    assert best.standard_error < 1e-5  # float32 rounding; the rewards alone have a standard error of 1.2


def test_search_halves_the_interval() -> None:
    calls: list[float] = []

    def rewards(strength: float) -> PerSample:
        calls.append(strength)
        return falling(strength)

    strongest_setting(rewards, floor=0.9, tolerance=1 / 16)
    assert calls == [0.0, 1.0, 0.5, 0.25, 0.375, 0.3125]


def test_floor_out_of_reach_is_refused() -> None:
    with pytest.raises(ValueError, match=r"floor must be at most the mean reward of the weakest setting, 1 at .* 1\.5"):
        strongest_setting(lambda strength: torch.ones(3) - strength, floor=1.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weakest": 1.0, "strongest": 1.0}, "weakest must be below strongest"),
        ({"strongest": float("inf")}, "strongest must be a finite number, got inf"),
        ({"tolerance": 0.0}, "tolerance must be above 0"),
        ({"floor": float("nan")}, "floor must be a finite number"),
        ({"slack": 0.1}, r"slack must be 0 with floor=0.0, got 0.1"),
        ({"floor": None, "slack": -0.1}, r"slack must be at least 0, got -0.1"),
    ],
)
def test_impossible_search_is_refused_before_any_reward(options: dict[str, Any], message: str) -> None:
    def never(strength: float) -> PerSample:
        raise AssertionError("drew images")

    with pytest.raises(ValueError, match=message):
        strongest_setting(never, **{"floor": 0.0, **options})


@pytest.mark.parametrize(
    "rewards",
    [
        lambda strength: torch.full((2,), torch.nan),
        lambda strength: torch.ones(0),
        lambda strength: torch.ones(2 + int(strength)),
    ],
    ids=["not-finite", "empty", "other-samples"],
)
def test_rewards_that_cannot_be_compared_are_refused(rewards: Callable[[float], PerSample]) -> None:
    with pytest.raises(ValueError, match="rewards at strength"):
        strongest_setting(rewards, floor=0.5)


def test_erasure_is_as_strong_as_the_floor_allows_and_the_policy_is_left_alone(policy: DiffusionPolicy) -> None:
    concept = Concept(name="stripes", phrases=("striped",))
    original = {name: parameter.detach().clone() for name, parameter in base_parameters(policy.unet).items()}

    def kept(policy: DiffusionPolicy) -> PerSample:
        """A reward that falls with the distance of the weights from the original ones."""
        weights = base_parameters(policy.unet)
        return -torch.stack([(weights[name] - value).norm() for name, value in original.items()]).sum().reshape(1)

    with UCE().erase(policy, concept, 0.5).applied(policy):
        floor = kept(policy).item()
    erasure, search = strongest_erasure(UCE(), policy, concept, kept, floor=floor, strongest=2.0, tolerance=0.01)
    assert erasure.config["strength"] == search.best.strength
    assert search.best.strength == pytest.approx(0.5, abs=0.01)
    assert all(torch.equal(value, original[name]) for name, value in base_parameters(policy.unet).items())
