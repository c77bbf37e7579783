"""What one rollout of the policy did."""

from typing import NamedTuple

from jaxtyping import Float, Shaped
from torch import Tensor

from .conditioning import Conditioning


class Trajectory(NamedTuple):
    """Everything that one rollout of the policy did, in the order of the steps, from noise to image.

    Step i took `latents[:, i]` at `timesteps[i]` to `latents[:, i + 1]`, with log-probability `log_probs[:, i]`.
    """

    latents: Float[Tensor, "batch states channels h w"]
    """States, one more than there are steps; float32 and unrounded, so that log-probabilities stay exact."""

    log_probs: Float[Tensor, "batch steps"]
    """Log-density of each step, averaged over the latent's elements; float64; NaN where a step was deterministic."""

    timesteps: Shaped[Tensor, " steps"]
    """What the network was told of each step, falling, see `Plan`."""

    conditioning: Conditioning
    """The prompts that were drawn, encoded."""

    means: Float[Tensor, "batch steps channels h w"] | None = None
    """Mean of the Gaussian that each step was drawn from, where they are kept."""
