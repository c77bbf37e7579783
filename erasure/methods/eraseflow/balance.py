"""The arithmetic of trajectory balance over denoising steps.

    residual = Σ w_j (log p_F(j) - log p_B(j)) - level,       loss = residual²

over the chosen steps j of one trajectory. p_F is the denoising step, with the network that is trained, p_B the noising
step, without any; both log-densities are means over the latent's elements.
"""

import random
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from overpaint.policy import ClassifierFree, DiffusionPolicy, Trajectory
from overpaint.policy.ddim import gaussian_log_prob
from overpaint.policy.guidance import StepContext
from overpaint.policy.process import Process, RectifiedFlow
from overpaint.policy.types import Latents, PerSample, Plan


def chosen_steps(seeds: Sequence[int], *, steps: int, early: int, late: int) -> Int[Tensor, "batch chosen"]:
    """Returns some of the steps before the last ones, drawn for each seed without repeats, and the last ones."""
    first = range(steps - late)
    drawn = [sorted(random.Random(f"balanced steps of {seed}").sample(first, early)) for seed in seeds]
    return torch.tensor([[*chosen, *range(steps - late, steps)] for chosen in drawn])


def noising_log_probs(
    process: Process, latents: Float[Tensor, "batch states channels h w"], plan: Plan
) -> Float[Tensor, "batch steps"]:
    """Returns log p_B of every step of a trajectory: how likely noising leads from where it led back to its start."""
    columns = [
        gaussian_log_prob(latents[:, step], *process.noising(latents[:, step + 1], plan, step))
        for step in range(len(plan.timesteps))
    ]
    return torch.stack(columns, dim=1)


def denoising_log_probs(
    policy: DiffusionPolicy,
    trajectory: Trajectory,
    chosen: Int[Tensor, "batch chosen"],
    *,
    guidance: ClassifierFree,
) -> Float[Tensor, "batch chosen"]:
    """Returns log p_F of the chosen steps for the trajectory's prompts, with gradient; as DDPO evaluates them."""
    count, each = chosen.shape
    samples = torch.arange(count).repeat_interleave(each)
    return policy.log_prob(trajectory, samples, chosen.flatten(), guidance=guidance, eta=1.0).view(count, each)


def step_weights(process: Process, plan: Plan, kind: Literal["equal", "balanced"]) -> Float[Tensor, " steps"]:
    """Returns the weight of each step, 1 on average over all of them.

    A difference d of two noise predictions moves log p_F of a step by d² (1 - k) / (2 k (1 - a_prev)), with k = a /
    a_prev in the words of `policy.ddim`. The steps before the last have most of the sum of these factors; ``balanced``
    divides by them, so that d² counts the same everywhere. In a flow d is a difference of velocities, and the
    factor the squared slope of a step's mean over twice its variance; the last step has no density.
    """
    if kind == "equal":
        return torch.ones_like(plan.levels)
    if isinstance(process, RectifiedFlow):
        std, slope = process.scales(plan, 1.0)
        weights = (std / slope) ** 2
        return (weights / weights[:-1].mean()).to(plan.levels)
    levels, previous = plan.levels.double(), plan.next_levels.double()
    kept = levels / previous
    weights = kept * (1 - previous) / (1 - kept)
    return (weights / weights.mean()).to(plan.levels)


def residuals(
    forward: Float[Tensor, "batch chosen"],
    backward: Float[Tensor, "batch chosen"],
    weights: Float[Tensor, "batch chosen"],
    level: PerSample,
) -> PerSample:
    """Returns Σ w (log p_F - log p_B) - level of each trajectory."""
    return (weights * (forward - backward)).sum(dim=1) - level


class ConstantUnconditional(ClassifierFree):
    """Classifier-free guidance whose gradient flows through the prompt's branch alone."""

    def combine(self, predictions: Float[Tensor, "branches batch channels h w"], context: StepContext) -> Latents:
        """Returns the same prediction as without it."""
        *away, towards = predictions
        return super().combine(torch.stack([*(branch.detach() for branch in away), towards]), context)
