"""How the terms of DDPO's objective are weighed where a concept is to be erased, or to stay erased.

Two forms. Reward under erasure: the erasure's violation is weighed against the reward. Erasure under quality: a floor
of the reward, or a ceiling of the divergence from the reference policy, is weighed against the erasure's violation.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from erasure import ErasureConstraint, ObjectiveConstraint, QualityConstraint, RewardFloor
from erasure.protocols import ConceptBatch
from erasure.soft_attack import Judged
from overpaint.policy import DiffusionPolicy
from overpaint.training import TrainingRun


class RoundWeights(NamedTuple):
    """What the terms are multiplied by; a term whose weight is 0 takes no part in an update."""

    reward: float = 1.0
    """Of the prompts' rewards."""

    violation: float = 0.0
    """Of the erasure's violation."""

    concept_reward: float = 0.0
    """Of the rewards of the concept's samples, which count in the first form only."""

    divergence: float = 0.0
    """Of the divergence from the reference policy on the prompts' samples."""


def weights_of(erasure: ErasureConstraint | None, floor: QualityConstraint | None) -> RoundWeights:
    """Returns the present weights: each term has its own controller's, times what the other one leaves it."""
    if erasure is None:
        return RoundWeights()
    own = erasure.lagrangian
    if floor is None:
        return RoundWeights(own.other_weight, own.weight, own.other_weight)
    violation, quality = own.weight * floor.lagrangian.other_weight, floor.lagrangian.weight * own.other_weight
    if isinstance(floor, RewardFloor):
        return RoundWeights(quality, violation)
    return RoundWeights(0.0, violation, divergence=quality / floor.ceiling)


def add_objective(
    run: TrainingRun, policy: DiffusionPolicy, erasure: ObjectiveConstraint, count: int, *, weight: float, size: int
) -> float:
    """Adds the gradient of an erasure's loss to that of the coming update, and moves its weight.

    Where prompts are attacked, it is the loss under attack; where hard ones are mined, it is remembered.

    Args:
        run: Draws the prompts and goes backward.
        policy: What is tuned.
        erasure: The loss.
        count: Prompts, over all processes.
        weight: What the violation is multiplied by; at 0 nothing is differentiated.
        size: Prompts that go through the UNet at a time.

    Returns:
        The mean violation over all processes.
    """

    def judge(prompts: Sequence[str], seeds: Sequence[int]) -> Judged:
        return Judged(erasure.violation(policy, ConceptBatch(prompts, seeds)))

    batch = erasure.prompts.draw(run, count)
    parts = []
    for first in range(0, len(batch), size):
        prompts, seeds = zip(*batch[first : first + size], strict=True)
        with run.autocast(), torch.set_grad_enabled(weight > 0):
            if erasure.attack is None:
                violation = judge(prompts, seeds).violation
            else:
                violation = erasure.attack.judged(policy, prompts, seeds, judge, iteration=run.iteration)
        if weight > 0:
            run.backward(weight * (violation.sum() / len(batch)), sync=False)
        parts.append(violation.detach())
    violations = torch.cat(parts)
    erasure.prompts.note(run, [prompt for prompt, _ in batch], violations)
    mean = run.mean(violations)
    if math.isfinite(mean):  # otherwise the update is skipped, and there is nothing to answer
        erasure.lagrangian.update(mean)
    return mean
