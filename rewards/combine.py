"""Rewards made of other rewards.

A score that is NaN stays NaN in all of them: none hides a reward that went wrong.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import torch

from overpaint.policy.types import Images, PerSample
from overpaint.settings import AnyFloat, Count, Positive

from .function import as_reward, name_of
from .types import Reward, RewardLike, check_pairs, reads_prompts, scores_of, to_device

RELATIVE_ROUNDING = 1e-6
"""Differences between scores, relative to the largest, that are float32's rounding and nothing else."""


class WeightedSum:
    """The sum of some rewards, each times its weight; differentiable where all of them are.

    Args:
        rewards: What is added up.
        weights: One number for each; negative for what is unwanted.
    """

    def __init__(self, rewards: Sequence[RewardLike], weights: Sequence[float]) -> None:
        if len(rewards) == 0:
            raise ValueError("rewards must hold at least one, got none")
        if len(weights) != len(rewards):
            raise ValueError(f"weights must hold one number for each of {len(rewards)} rewards, got {len(weights)}")
        self.rewards = tuple(as_reward(reward, f"rewards[{k}]") for k, reward in enumerate(rewards))
        self.weights = tuple(weights)
        self.differentiable = all(reward.differentiable for reward in self.rewards)
        self.reads_prompts = any(reads_prompts(reward) for reward in self.rewards)

    def __repr__(self) -> str:
        parts = (f"{weight!r} * {_named(reward)}" for weight, reward in zip(self.weights, self.rewards, strict=True))
        return f"WeightedSum({' + '.join(parts)})"

    def to(self, device: torch.device | str) -> "WeightedSum":
        """Moves the networks of all rewards to a device."""
        for reward in self.rewards:
            to_device(reward, device)
        return self

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Returns the weighted sum for each image.

        Raises:
            ValueError: A reward does not give one number for each image.
        """
        scores = [scores_of(f"rewards[{k}]", reward, images, prompts) for k, reward in enumerate(self.rewards)]
        return torch.stack([weight * score for weight, score in zip(self.weights, scores, strict=True)]).sum(dim=0)


Combination = TypeVar("Combination", bound="_OfOneReward")


class _OfOneReward:
    """A function of one reward's scores."""

    def __init__(self, reward: RewardLike) -> None:
        self.reward = as_reward(reward)
        self.differentiable = self.reward.differentiable
        self.reads_prompts = reads_prompts(self.reward)

    def to(self: Combination, device: torch.device | str) -> Combination:
        """Moves the reward's network to a device."""
        to_device(self.reward, device)
        return self


class Clipped(_OfOneReward):
    """A reward held between two bounds; outside of them its gradient is zero.

    Args:
        reward: What is clipped.
        low: Lowest score, in the reward's own units.
        high: Highest score, in the reward's own units.
    """

    def __init__(self, *, reward: RewardLike, low: AnyFloat = -math.inf, high: AnyFloat = math.inf) -> None:
        if not low < high:
            raise ValueError(f"low must be below high, got {low!r} and {high!r}")
        super().__init__(reward)
        self.low = low
        self.high = high

    def __repr__(self) -> str:
        return f"Clipped({_named(self.reward)}, low={self.low!r}, high={self.high!r})"

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Returns the clipped score of each image; a `ScoresError` where the reward gives not one number for each."""
        return scores_of("reward", self.reward, images, prompts).clamp(self.low, self.high)


class Standardised(_OfOneReward):
    """A reward in standard deviations from its mean, (score - mean) / std, so that rewards of any units can be added.

    The two numbers are fixed: a pair's score does not depend on the batch that it comes in.

    Args:
        reward: What is standardised.
        mean: Score that becomes 0, in the reward's own units.
        std: Difference of scores that becomes 1, in the reward's own units.
    """

    def __init__(self, *, reward: RewardLike, mean: float, std: Positive) -> None:
        super().__init__(reward)
        self.mean = mean
        self.std = std

    @classmethod
    @torch.no_grad()
    def measured(
        cls, reward: RewardLike, images: Images, prompts: Sequence[str], *, batch_size: Count = 16
    ) -> "Standardised":
        """Standardises a reward by its scores of some reference pairs.

        The deviation is that of the pairs as a population: the root of the mean squared distance from the mean, which
        divides by the number of pairs and not by one less.

        Args:
            reward: What is standardised.
            images: Reference images.
            prompts: One for each.
            batch_size: Pairs scored at a time.

        Raises:
            ValueError: There are fewer than two pairs, a score is not finite, or all are the same.
        """
        check_pairs(images, prompts)
        reward = as_reward(reward)
        if len(images) < 2:
            raise ValueError(f"images must hold at least two, got {len(images)}")
        parts = [slice(start, start + batch_size) for start in range(0, len(images), batch_size)]
        scores = torch.cat([scores_of("reward", reward, images[part], prompts[part]).cpu().double() for part in parts])
        bad = (~scores.isfinite()).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"reward must be finite, got {scores[bad[0]].item()} for image {bad[0]} of {len(images)}, "
                f"prompt {prompts[bad[0]]!r}"
            )
        std = scores.std(correction=0).item()
        if std <= RELATIVE_ROUNDING * scores.abs().max().item():
            raise ValueError(
                f"reward must tell the reference pairs apart, got {scores[0].item():.6g} for all {len(images)} from "
                f"{_named(reward)}; a reward that is constant cannot be standardised"
            )
        return cls(reward=reward, mean=scores.mean().item(), std=std)

    def __repr__(self) -> str:
        return f"Standardised({_named(self.reward)}, mean={self.mean!r}, std={self.std!r})"

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Returns the standardised score of each image; a `ScoresError` as `Clipped`."""
        return (scores_of("reward", self.reward, images, prompts) - self.mean) / self.std


def _named(reward: Reward) -> str:
    """Returns what to call a reward: a network's own text would be hundreds of lines."""
    if isinstance(reward, WeightedSum | _OfOneReward):
        return repr(reward)
    return name_of(reward)
