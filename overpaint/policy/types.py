"""The tensors that travel between packages: names of their types, and the levels that sampling visits."""

from typing import NamedTuple

from jaxtyping import Float, Shaped
from torch import Tensor

Latents = Float[Tensor, "batch channels h w"]
"""Latent images, scaled as the network sees them. Always float32, whatever the networks run in."""

Images = Float[Tensor, "batch 3 H W"]
"""RGB in [0, 1]."""

PerSample = Float[Tensor, " batch"]
"""One number for each sample."""

Embeddings = Float[Tensor, "batch tokens dim"]
"""Prompts as the UNet's cross-attention reads them."""


class Plan(NamedTuple):
    """The levels that one way of sampling visits, from noise to image."""

    timesteps: Shaped[Tensor, " steps"]
    """What the network is told of each step, falling: the scheduler's integers in diffusion, any numbers in a flow."""

    levels: Float[Tensor, " steps"]
    """Of each step: the cumulative alpha, the share of the signal in the variance, in diffusion; the share of the noise
    in a flow."""

    next_levels: Float[Tensor, " steps"]
    """That each step leads to."""
