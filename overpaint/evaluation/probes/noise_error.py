"""How far a model's noise prediction is off at one noise level: what probes of prompts descend, with the guard at work.

Textual inversion and attacks on prompts minimise ‖ε - ε_θ(z_t, t, τ)‖² over what goes into the text encoder. The
gradient reaches the free vectors through frozen weights, and through the guard where the policy has one.
"""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from jaxtyping import Shaped
from torch import Tensor

from erasure.methods.sld import SLDGuard
from overpaint.policy import ClassifierFree, Conditioning, DiffusionPolicy
from overpaint.policy.types import Latents, PerSample

from .seeds import seed_of

UNGUIDED = ClassifierFree(1.0)
"""The prediction for the prompt alone, which a guard changes as it changes guided ones."""


def noise_error(
    policy: DiffusionPolicy,
    noised: Latents,
    timesteps: Shaped[Tensor, " batch"],
    conditioning: Conditioning,
    noise: Latents,
) -> PerSample:
    """Returns the mean squared difference between the noise that the policy sees in latents and another noise."""
    return ((policy.predict_direction(noised, timesteps, conditioning, UNGUIDED) - noise) ** 2).flatten(1).mean(dim=1)


@contextmanager
def single_steps(policy: DiffusionPolicy) -> Generator[None]:
    """Lets a guard that remembers the steps before predict at any step for the length of a `with` block.

    That is SLD with momentum, which is then without.
    """
    guard = policy.guard
    if isinstance(guard, SLDGuard):
        policy.guard = guard.without_momentum()
    try:
        yield
    finally:
        policy.guard = guard


def generator_of(about: str, seed: int) -> torch.Generator:
    """Returns a generator that draws for a purpose, other numbers than those that images begin with."""
    return torch.Generator().manual_seed(seed_of(about, seed))
