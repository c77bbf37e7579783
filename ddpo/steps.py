"""How much each denoising step counts in the loss."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from overpaint.policy import DiffusionPolicy

from .config import DDPOConfig


def step_plan(
    policy: DiffusionPolicy, config: DDPOConfig
) -> tuple[Float[Tensor, " steps"], Int[Tensor, " trained"] | None]:
    """Returns the weight of each step, 1 on average over those that are trained on, and which those are.

    None stands for steps that are drawn for each sample anew.
    """
    weights = torch.ones(config.steps)
    if config.step_weights == "equal":
        return weights, None
    weights = signal_weights(policy, steps=config.steps, eta=config.eta)
    chosen = weights.topk(config.trained_steps).indices.sort().values
    return weights / weights[chosen].mean(), chosen.cpu()


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
