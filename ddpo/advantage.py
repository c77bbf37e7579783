"""From rewards to advantages: by how many standard deviations each is better than what was to be expected."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Real
from torch import Tensor

from overpaint.settings import Count

EPSILON = 1e-6
"""Added to every standard deviation."""

Numbers = Float[Tensor, " samples"]
Rewards = Real[Tensor, " samples"]


def round_advantages(rewards: Rewards, groups: Sequence[str] = ()) -> Numbers:
    """Returns the rewards normalised by mean and standard deviation of all of them, whatever their groups."""
    rewards = rewards.double()
    return (rewards - rewards.mean()) / (rewards.std(correction=0) + EPSILON)


def group_advantages(rewards: Rewards, groups: Sequence[str]) -> Numbers:
    """Returns the rewards normalised within each group: all images of one prompt in this round.

    Source: Shao et al. (2024), https://arxiv.org/abs/2402.03300, section 4.1.2. A group of one gets advantage 0.
    """
    rewards = rewards.double()
    advantages = torch.empty_like(rewards)
    for samples in members(groups).values():
        advantages[samples] = round_advantages(rewards[samples])
    return advantages


def centred(values: Rewards, groups: Sequence[str]) -> Numbers:
    """Returns values minus the mean of their group, in float64."""
    centred = values.double().clone()
    for samples in members(groups).values():
        centred[samples] -= centred[samples].mean()
    return centred


def centred_advantages(rewards: Rewards, groups: Sequence[str]) -> Numbers:
    """Returns the rewards minus the mean of their group, all divided by one standard deviation, that of the round.

    Unlike within a group alone, a group whose images are all alike does not count as much as one that tells them apart.
    """
    differences = centred(rewards, groups)
    return differences / (differences.square().mean().sqrt() + EPSILON)


class PromptStatistics:
    """Keeps the last rewards of each prompt over rounds, and normalises new ones by them.

    Source: Black et al. (2023), https://arxiv.org/abs/2305.13301, section 5.2 and `stat_tracking.py` of their code. New
    rewards enter the buffer before the statistics are taken, standard deviations are of the whole population.

    Args:
        buffer_size: Rewards kept of each prompt.
        min_count: Rewards of a prompt below which the whole round's mean and standard deviation are taken instead.

    Raises:
        ValueError: A number is below 1.
    """

    def __init__(self, buffer_size: Count = 32, min_count: Count = 16) -> None:
        self.buffer_size = buffer_size
        self.min_count = min_count
        self._buffers: dict[str, deque[float]] = {}

    def advantages(self, rewards: Rewards, prompts: Sequence[str]) -> Numbers:
        """Takes notice of a round's rewards and returns them normalised, in float64.

        Args:
            rewards: One for each sample, of all processes.
            prompts: The prompt of each sample.
        """
        rewards = rewards.double()
        mean, std = rewards.mean(), rewards.std(correction=0)
        advantages = torch.empty_like(rewards)
        for prompt, samples in members(prompts).items():
            buffer = self._buffers.setdefault(prompt, deque(maxlen=self.buffer_size))
            buffer.extend(rewards[samples].tolist())
            centre, spread = mean, std
            if len(buffer) >= self.min_count:
                kept = torch.tensor(list(buffer), dtype=torch.float64)
                centre, spread = kept.mean(), kept.std(correction=0)
            advantages[samples] = (rewards[samples] - centre) / (spread + EPSILON)
        return advantages

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that an interrupted run needs."""
        return {"buffers": {prompt: list(buffer) for prompt, buffer in self._buffers.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` returned."""
        buffers = state["buffers"]
        self._buffers = {prompt: deque(kept, maxlen=self.buffer_size) for prompt, kept in buffers.items()}


def members(groups: Sequence[str]) -> dict[str, list[int]]:
    """Returns the indices of the samples of each group, groups in the order of their first sample."""
    members: dict[str, list[int]] = {}
    for sample, group in enumerate(groups):
        members.setdefault(group, []).append(sample)
    return members
