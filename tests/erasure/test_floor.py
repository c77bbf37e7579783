"""The constraints of erasing under a floor: a reward, or nearness to the reference."""

import math
from typing import Any

import pytest
import torch

from erasure import FixedWeight, ReferenceDivergence, RewardFloor


def test_violation_of_a_paired_floor_is_what_is_missing_beyond_the_slack() -> None:
    floor = RewardFloor(slack=0.1, scale=2.0)
    rewards = torch.tensor([0.5, 1.0], requires_grad=True)
    reference = torch.tensor([1.0, 1.0], requires_grad=True)
    violation = floor.violation(rewards, reference)
    torch.testing.assert_close(violation, torch.tensor([0.2, -0.05]), rtol=1e-6, atol=1e-7)
    violation.sum().backward()
    assert rewards.grad is not None
    assert rewards.grad.tolist() == [-0.5, -0.5]
    assert reference.grad is None
    assert floor.paired
    with pytest.raises(ValueError, match=r"reference_rewards must be given where RewardFloor\.floor is None"):
        floor.violation(rewards)


def test_a_number_can_be_the_floor() -> None:
    floor = RewardFloor(floor=0.5)
    assert not floor.paired
    torch.testing.assert_close(floor.violation(torch.tensor([0.25, 1.0])), torch.tensor([0.25, -0.5]))


def test_violation_of_a_divergence_is_relative_to_its_ceiling() -> None:
    violation = ReferenceDivergence(0.02).violation(torch.tensor([0.0, 0.02, 0.06]))
    torch.testing.assert_close(violation, torch.tensor([-1.0, 0.0, 2.0]))


def test_each_has_a_weight_of_its_own_by_default_and_takes_any() -> None:
    for kind in (RewardFloor, ReferenceDivergence):
        first, second = kind(), kind()
        first.lagrangian.update(1.0)
        assert first.lagrangian.weight > second.lagrangian.weight
        assert kind(lagrangian=FixedWeight(2.0)).lagrangian.weight == 2.0
        assert "controller" in first.description()["lagrangian"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slack": -0.1}, r"slack must be at least 0, got -0\.1"),
        ({"slack": math.nan}, "slack must be a finite number, got nan"),
        ({"scale": 0.0}, r"scale must be above 0, got 0\.0"),
        ({"floor": math.inf}, "floor must be a finite number, got inf"),
        ({"floor": 0.5, "slack": 0.1}, r"slack must be 0 with floor=0\.5, got 0\.1"),
    ],
)
def test_impossible_floor_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"RewardFloor\.{message}"):
        RewardFloor(**settings)


@pytest.mark.parametrize("ceiling", [0.0, -1.0, math.inf, math.nan])
def test_impossible_ceiling_of_a_divergence_is_refused(ceiling: float) -> None:
    with pytest.raises(ValueError, match=r"ReferenceDivergence\.ceiling must be (above 0|a finite number), got"):
        ReferenceDivergence(ceiling)
