"""The terms of ReFL's loss: what each sample of a batch loses, and the gradient of their mean."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from erasure import ErasureConstraint, ObjectiveConstraint, ReferenceDivergence, RewardFloor
from erasure.gradient_conflict import gradient_cosine, project_conflicts
from erasure.protocols import ConceptBatch
from erasure.rollout import random_stops
from erasure.soft_attack import Judged
from overpaint.policy import ClassifierFree, DiffusionPolicy
from overpaint.policy.ddim import gaussian_kl
from overpaint.policy.types import PerSample
from overpaint.training import TrainingRun
from rewards import Reward, scores_of

from .config import ReFLConfig
from .loss import hinge
from .one_step import one_step_images

Item = TypeVar("Item", str, int)


class Measured(NamedTuple):
    """What some samples lose, and what that was computed from."""

    losses: PerSample
    """With gradient."""
    values: PerSample
    """Rewards where there are any, and otherwise the losses again."""


Term = Callable[[list[Item], list[int]], Measured]
"""Takes items of a batch, prompts or indices of pairs, and a seed for each."""


def rewards_of(
    policy: DiffusionPolicy,
    reward: Reward,
    prompts: Sequence[str],
    seeds: Sequence[int],
    config: ReFLConfig,
    reward_step: int,
) -> PerSample:
    """Returns the rewards of one-step images, with gradient."""
    images = one_step_images(policy, prompts, seeds, config, reward_step=reward_step)
    return scores_of("reward", reward, images, captions_of(prompts, config))


def reward_term(policy: DiffusionPolicy, reward: Reward, config: ReFLConfig, reward_step: int) -> Term[str]:
    """Returns the term of ReFL itself: the hinge of the reward."""

    def term(prompts: list[str], seeds: list[int]) -> Measured:
        rewards = rewards_of(policy, reward, prompts, seeds, config, reward_step)
        return Measured(hinge(rewards, margin=config.reward_margin), rewards)

    return term


def floor_term(
    policy: DiffusionPolicy, reward: Reward, config: ReFLConfig, reward_step: int, floor: RewardFloor
) -> Term[str]:
    """Returns what the reward is missing to its floor; there is no hinge, since the weight says when it is enough.

    The reference's rewards come from the same prompts, seeds and reward step. They are computed first: the reference
    borrows the network, which the gradient must find as it was.
    """

    def term(prompts: list[str], seeds: list[int]) -> Measured:
        reference = None
        if floor.paired:
            with policy.reference():
                reference = rewards_of(policy, reward, prompts, seeds, config, reward_step)
        rewards = rewards_of(policy, reward, prompts, seeds, config, reward_step)
        return Measured(floor.violation(rewards, reference), rewards)

    return term


def divergence_term(policy: DiffusionPolicy, config: ReFLConfig, bound: ReferenceDivergence) -> Term[str]:
    """Returns how far a denoising step of each sample diverges from the reference policy's.

    The states are the policy's own, and each step that a policy gradient learns from is as likely to be compared as any
    other.
    """
    guidance = ClassifierFree(config.guidance_scale)
    steps = torch.tensor(policy.process.trained_steps(config.steps, config.eta))  # the last of a flow has no deviation

    def term(prompts: list[str], seeds: list[int]) -> Measured:
        trajectory = policy.rollout(
            policy.encode(prompts),
            steps=config.steps,
            guidance=guidance,
            eta=config.eta,
            seeds=seeds,
            height=config.height,
            width=config.width,
        )
        chosen = torch.arange(len(seeds)), steps[random_stops(seeds, 0, len(steps) - 1)]
        with policy.reference():
            _, reference, _ = policy.stored_steps(trajectory, *chosen, guidance=guidance, eta=config.eta)
        _, mean, std = policy.stored_steps(trajectory, *chosen, guidance=guidance, eta=config.eta)
        losses = bound.violation(gaussian_kl(mean, reference, std))
        return Measured(losses, losses)

    return term


def erasure_term(
    policy: DiffusionPolicy, erasure: ErasureConstraint, config: ReFLConfig, reward_step: int, iteration: int
) -> Term[str]:
    """Returns the violation of an erasure constraint, on images as the reward sees them or on noise predictions."""

    def judge(prompts: Sequence[str], seeds: Sequence[int]) -> Judged:
        if isinstance(erasure, ObjectiveConstraint):
            return Judged(erasure.violation(policy, ConceptBatch(prompts, seeds)))
        images = one_step_images(policy, prompts, seeds, config, reward_step=reward_step)
        return erasure.judged(images, captions_of(prompts, config))

    def term(prompts: list[str], seeds: list[int]) -> Measured:
        if erasure.attack is None:
            losses = judge(prompts, seeds).violation
        else:
            losses = erasure.attack.judged(policy, prompts, seeds, judge, iteration=iteration)
        return Measured(losses, losses)

    return term


def captions_of(prompts: Sequence[str], config: ReFLConfig) -> list[str]:
    """Repeats each prompt for the images that it stands for."""
    return [prompt for prompt in prompts for _ in range(max(1, config.low_variance_noises))]


def accumulate(
    run: TrainingRun, batch: Sequence[tuple[Item, int]], term: Term[Item], *, weight: float, size: int
) -> Measured:
    """Adds weight times the gradient of a term's mean over a batch, some samples at a time, and returns the losses.

    Args:
        run: Goes backward.
        batch: This process's part.
        term: What the samples lose.
        weight: At least 0, where nothing is differentiated.
        size: Samples at a time.
    """
    parts = []
    for start in range(0, len(batch), size):
        items, seeds = zip(*batch[start : start + size], strict=True)
        with run.autocast(), torch.set_grad_enabled(weight > 0):
            measured = term(list(items), list(seeds))
        if weight > 0:
            run.backward(weight * measured.losses.mean() * (len(items) / len(batch)), sync=False)
        parts.append([values.detach().float() for values in measured])
    return Measured(*(torch.cat(values) for values in zip(*parts, strict=True)))


def take_gradient(run: TrainingRun, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Takes away the gradient that has been added up so far, and returns its mean over all processes."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return run.accelerator.reduce(gradients, reduction="mean") if run.num_processes > 1 else gradients


def join_gradients(
    parameters: Sequence[nn.Parameter], first: list[Tensor], second: list[Tensor], *, project: bool
) -> float:
    """Gives back the sum of two gradients, without what conflicts where that is asked for, and returns their cosine."""
    cosine = gradient_cosine(first, second)
    if project:
        first, second = project_conflicts(first, second)
    for parameter, one, other in zip(parameters, first, second, strict=True):
        parameter.grad = one + other
    return cosine
