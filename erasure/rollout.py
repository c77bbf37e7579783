"""Partial rollouts: latents before a step of each sample's own, and the target of negative guidance for them."""

import random
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from overpaint.policy import ClassifierFree, Conditioning, DiffusionPolicy, Guidance
from overpaint.policy.types import Latents, PerSample


def random_stops(seeds: Sequence[int], first: int, last: int) -> Int[Tensor, " batch"]:
    """Returns a step from `first` to `last` for each seed, every one as likely; it follows from the seed alone."""
    return torch.tensor([random.Random(f"step of {seed}").randrange(first, last + 1) for seed in seeds])


def noised_latents(
    policy: DiffusionPolicy, conditioning: Conditioning, seeds: Sequence[int], *, steps: int, guidance_scale: float
) -> tuple[Latents, Shaped[Tensor, " batch"]]:
    """Returns each sample's latents before a random step of its rollout, and that step's timestep.

    Noise and step follow from the sample's seed; each of the `steps` of a whole image is as likely as any other.
    """
    stops = random_stops(seeds, 0, steps - 1)
    guidance = ClassifierFree(guidance_scale)
    (latents,) = latents_before(policy, conditioning, stops[None], steps=steps, guidance=guidance, seeds=seeds)
    return latents, policy.plan(steps).timesteps[stops]


def rollout_calls(first: int, last: int, guidance_scale: float) -> float:
    """Returns how many samples go through the UNet on average for latents before a random step, see `random_stops`."""
    return (2 if guidance_scale != 1 else 1) * (first + last) / 2


@torch.no_grad()
def latents_before(
    policy: DiffusionPolicy,
    conditioning: Conditioning,
    stops: Int[Tensor, "stops batch"],
    *,
    steps: int,
    guidance: Guidance,
    seeds: Sequence[int],
) -> Float[Tensor, "stops batch channels h w"]:
    """Denoises every sample up to its last stop, without gradient, and returns what it was before each of its stops.

    Stops are indices of steps, counted from noise; 0 is pure noise. A sample that has arrived goes through the network
    no more, unless the policy has a guard: one that remembers the way needs all samples at every step.
    """
    latents: Latents = policy.sample(conditioning, steps=steps, seeds=seeds, until=0)
    stops = stops.to(latents.device)
    last = stops.amax(dim=0)
    passed = torch.stack([latents] * len(stops))
    for step in range(int(last.max())):
        if policy.guard is None:
            on = last > step
            latents[on] = policy.denoise(latents[on], conditioning[on], step=step, steps=steps, guidance=guidance)
        else:
            latents = policy.denoise(latents, conditioning, step=step, steps=steps, guidance=guidance)
        passed = torch.where((stops > step)[..., None, None, None], latents, passed)
    return passed


def erased_target(conditional: Latents, unconditional: Latents, *, negative_guidance: float) -> Latents:
    """Returns `ε(∅) - η (ε(c) - ε(∅))`: away from the concept, by the original model's own predictions."""
    return unconditional - negative_guidance * (conditional - unconditional)


def squared_error(prediction: Latents, target: Latents) -> PerSample:
    """Returns the mean squared difference of each sample's elements."""
    return (prediction - target).square().flatten(1).mean(dim=1)
