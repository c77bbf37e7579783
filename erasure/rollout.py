"""Latents on the way from noise to image, each sample stopped at a step of its own."""

import random
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from overpaint.policy import DiffusionPolicy, Guidance
from overpaint.policy.types import Embeddings, Latents


def random_stops(seeds: Sequence[int], first: int, last: int) -> Int[Tensor, " batch"]:
    """Returns a step from `first` to `last` for each seed, every one as likely; it follows from the seed alone."""
    return torch.tensor([random.Random(f"step of {seed}").randrange(first, last + 1) for seed in seeds])


@torch.no_grad()
def latents_before(
    policy: DiffusionPolicy,
    embeddings: Embeddings,
    stops: Int[Tensor, " batch"],
    *,
    steps: int,
    guidance: Guidance,
    seeds: Sequence[int],
) -> Latents:
    """Denoises every sample up to its own step, without gradient.

    A sample that has arrived goes through the network no more, unless the policy has a guard: one that remembers
    the way needs all samples at every step.

    Args:
        policy: What draws.
        embeddings: The prompt of each sample.
        stops: Index of the step before which each sample stops, counted from noise; 0 leaves pure noise.
        steps: Number of denoising steps of a whole image.
        guidance: That of the rollout.
        seeds: One for each sample.
    """
    latents = policy.sample(embeddings, steps=steps, seeds=seeds, until=0)
    arrived = latents.clone()
    for step in range(int(stops.max())):
        going = (stops > step).to(latents.device)
        if policy.guard is None:
            latents[going] = policy.denoise(
                latents[going], embeddings[going], step=step, steps=steps, guidance=guidance
            )
        else:
            latents = policy.denoise(latents, embeddings, step=step, steps=steps, guidance=guidance)
        arrived[going] = latents[going]
    return arrived
