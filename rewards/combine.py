"""Rewards made of other rewards."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from policy.types import Images, PerSample

from .types import Reward


class WeightedSum:
    """The sum of some rewards, each times its weight; differentiable where all of them are.

    Args:
        rewards: What is added up.
        weights: One number for each; negative for what is unwanted.
    """

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float]) -> None:
        if len(rewards) == 0:
            raise ValueError("rewards must hold at least one, got none")
        if len(weights) != len(rewards):
            raise ValueError(f"weights must hold one number for each of {len(rewards)} rewards, got {len(weights)}")
        if not all(math.isfinite(weight) for weight in weights):
            raise ValueError(f"weights must be finite numbers, got {list(weights)!r}")
        self.rewards = tuple(rewards)
        self.weights = tuple(weights)
        self.differentiable = all(reward.differentiable for reward in rewards)

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Returns the weighted sum for each image."""
        scores = [reward(images, prompts) for reward in self.rewards]
        return torch.stack([weight * score for weight, score in zip(self.weights, scores, strict=True)]).sum(dim=0)


@dataclass(frozen=True, kw_only=True)
class Clipped:
    """A reward held between two bounds; outside of them its gradient is zero."""

    reward: Reward
    """What is clipped."""
    low: float = -math.inf
    """Lowest score, in the reward's own units."""
    high: float = math.inf
    """Highest score, in the reward's own units."""

    def __post_init__(self) -> None:
        """Checks the bounds."""
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got {self.low!r} and {self.high!r}")

    @property
    def differentiable(self) -> bool:
        """Whether gradients flow from the scores to the images, which they do within the bounds."""
        return self.reward.differentiable

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Returns the clipped score of each image."""
        return self.reward(images, prompts).clamp(self.low, self.high)
