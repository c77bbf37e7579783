"""Rewards made of other rewards."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from rewards import Clipped, Reward, WeightedSum

IMAGES = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(4))
PROMPTS = ["a"] * 4


class Brightness:
    """The mean of one channel."""

    def __init__(self, channel: int, differentiable: bool = True) -> None:
        self.channel = channel
        self.differentiable = differentiable

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images[:, self.channel].mean(dim=(1, 2))


def test_weighted_sum_adds_scores_and_gradients() -> None:
    images = IMAGES.clone().requires_grad_()
    reward = WeightedSum([Brightness(0), Brightness(2)], [2.0, -0.5])
    scores = reward(images, PROMPTS)
    expected = 2 * IMAGES[:, 0].mean(dim=(1, 2)) - 0.5 * IMAGES[:, 2].mean(dim=(1, 2))
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-7)
    scores.sum().backward()
    assert images.grad is not None
    assert images.grad[0, :, 0, 0].tolist() == [0.5, 0.0, -0.125]


def test_sum_is_differentiable_only_where_all_are() -> None:
    assert WeightedSum([Brightness(0), Brightness(1)], [1.0, 1.0]).differentiable
    assert not WeightedSum([Brightness(0), Brightness(1, differentiable=False)], [1.0, 1.0]).differentiable


def test_clipped_reward_stays_within_its_bounds() -> None:
    reward = Clipped(reward=Brightness(0), low=0.4, high=0.5)
    assert isinstance(reward, Reward)
    assert reward.differentiable
    assert torch.equal(reward(IMAGES, PROMPTS), IMAGES[:, 0].mean(dim=(1, 2)).clamp(0.4, 0.5))
    assert torch.equal(Clipped(reward=Brightness(0))(IMAGES, PROMPTS), Brightness(0)(IMAGES, PROMPTS))


def test_wrong_combinations_are_refused() -> None:
    with pytest.raises(ValueError, match="rewards must hold at least one"):
        WeightedSum([], [])
    with pytest.raises(ValueError, match="one number for each of 1 rewards, got 2"):
        WeightedSum([Brightness(0)], [1.0, 2.0])
    with pytest.raises(ValueError, match="weights must be finite numbers"):
        WeightedSum([Brightness(0)], [float("inf")])
    with pytest.raises(ValueError, match=r"low must be below high, got 1\.0 and 0\.5"):
        Clipped(reward=Brightness(0), low=1.0, high=0.5)
