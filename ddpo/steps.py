"""How much each denoising step counts in the loss."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from overpaint.policy import DiffusionPolicy

from .config import DDPOConfig


class StepPlan(NamedTuple):
    """Which steps an update trains on, and how much each counts."""

    weights: Float[Tensor, " steps"]
    """Of each step in the loss, 1 on average over those that are trained on."""

    chosen: Int[Tensor, " trained"] | None
    """Which those are; None draws them for each sample anew."""

    possible: tuple[int, ...]
    """Which can be."""

    trained: int
    """How many of each sample are."""

    def window(self, config: DDPOConfig, generator: torch.Generator) -> tuple[int, ...] | None:
        """Draws the steps of a round that are stochastic; None, without a draw, where all are.

        Args:
            config: Has the window's length and the share of the steps that it lies in.
            generator: Draws its place.
        """
        if not config.window:
            return None
        span = max(config.window, round(config.window_span * len(self.possible)))
        first = int(torch.randint(span - config.window + 1, (), generator=generator))
        return self.possible[first : first + config.window]


def step_plan(policy: DiffusionPolicy, config: DDPOConfig) -> StepPlan:
    """Returns which steps an update trains on.

    Raises:
        ValueError: There are fewer than a window has, or as `DiffusionPolicy.rollout`.
    """
    possible = policy.process.trained_steps(config.steps, config.eta)
    if config.window > len(possible):
        raise ValueError(
            f"DDPOConfig.window must be at most {len(possible)}, the steps that can be trained on, got {config.window}"
        )
    weights, trained = torch.ones(config.steps), config.trained_of(len(possible))
    if config.step_weights == "equal":
        return StepPlan(weights, None, possible, trained)
    weights = torch.zeros(config.steps)
    weights[list(possible)] = signal_weights(policy, steps=config.steps, eta=config.eta).cpu()[list(possible)]
    chosen = weights.topk(trained).indices.sort().values
    return StepPlan(weights / weights[chosen].mean(), chosen, possible, trained)


def signal_weights(policy: DiffusionPolicy, *, steps: int, eta: float) -> Float[Tensor, " steps"]:
    """Returns weights by how much a step's gradient tells about the reward.

    A step draws mean + std * z, and its mean follows the network's prediction with a slope c. The gradient of its
    log-probability is (c / std) * z times that of the prediction. The reward is the more correlated with z the larger
    std is, as far as a change of the latents matters as much at every step: so the signal of a step goes as c, its
    noise as c / std, and a sum of such estimates has the best ratio of the two with weights signal / noise^2, which is
    std^2 / c. Equal weights let the steps before the last drown the others: there std is small and c / std large.

    Each step's own gradient keeps its direction; what changes is how the steps share the weights of the network.
    """
    std, slope = step_scales(policy, steps=steps, eta=eta)
    return (std**2 / slope).float()


def step_scales(
    policy: DiffusionPolicy, *, steps: int, eta: float
) -> tuple[Float[Tensor, " steps"], Float[Tensor, " steps"]]:
    """Returns the standard deviation of each step, and by how much its mean follows the network's prediction.

    Raises:
        ValueError: As `DiffusionPolicy.rollout`.
    """
    policy.process.stochastic_steps(steps, eta)
    return policy.process.scales(policy.plan(steps), eta)
