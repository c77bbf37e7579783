"""From rewards to the weights of reward-weighted regression.

Source: Black et al. (2023), https://arxiv.org/abs/2305.13301, section 4.2, and jannerm/ddpo. Rewards are taken as they
are, without normalisation, and the "temperature" of the authors' code multiplies them: it is an inverse one.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Real
from torch import Tensor

from overpaint.settings import NonNegative

from .advantage import members

Numbers = Float[Tensor, " samples"]
Rewards = Real[Tensor, " samples"]


def softmax_weights(
    rewards: Rewards, *, inverse_temperature: NonNegative, prompts: Sequence[str] | None = None
) -> Numbers:
    """Returns softmax(inverse_temperature * reward) times the number of samples, so that the mean weight is 1.

    Args:
        rewards: One for each sample.
        inverse_temperature: Per unit of reward.
        prompts: The softmax is taken over the samples of each prompt; None takes it over all of them.
    """
    weights = torch.empty_like(rewards)
    groups = [list(range(len(rewards)))] if prompts is None else members(prompts).values()
    for samples in groups:
        weights[samples] = len(samples) * torch.softmax(inverse_temperature * rewards[samples], dim=0)
    return weights


def sparse_weights(rewards: Rewards, *, percentile: float) -> Numbers:
    """Returns 1 for rewards at or above a percentile of all of them, and 0 for the rest (RWR-sparse).

    The percentile is numpy's, with linear interpolation, in float64: where it falls on a sample, that one is kept.
    """
    cut = float(np.percentile(rewards.double().numpy(), percentile))
    return (rewards.double() >= cut).to(rewards.dtype)
