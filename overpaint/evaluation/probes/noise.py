"""Noise along the trajectory: more of it than any sampler adds shakes a model off the way that leads elsewhere.

A step of DDIM from cumulative alpha ᾱ to ᾱ', with η above 1 and the noise z scaled by v:

    std = η √((1-ᾱ')/(1-ᾱ) (1 - ᾱ/ᾱ'))
    x'  = √ᾱ' x̂_0 + √|1 - ᾱ' - std²| ε_θ + v std z

The absolute value is theirs: what it is taken of is negative for large η. Every prompt is drawn with every pair of η
and v, and the picture with the highest score counts.

Source: "When are concepts erased" (2025), https://arxiv.org/abs/2505.17013, noise-based probing: DDIM with 50 steps.
Departures: there one generator runs through all pairs; here each has its own seed, so that none depends on which others
are tried. The best of many pictures is compared with a floor that is the best of as many, and the share of all pictures
stands beside it.
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import ClassVar, NamedTuple

import torch

from overpaint.policy import Conditioning, DiffusionPolicy, SampleNoise, predict_clean, predict_epsilon
from overpaint.policy.types import Images, Latents, PerSample
from overpaint.settings import Distinct, Field, NonNegative, settings
from overpaint.training.logging import progress_bar

from .probe import Attempt, Floor, Need, ProbeTask, best_of
from .seeds import seed_of

PAPER_ETAS = (1.0, 1.17, 1.34, 1.51, 1.68, 1.85)


@settings
class NoiseConfig:
    """Settings of the probe with noise; by default those of "When are concepts erased": 24 pictures of a prompt."""

    etas: Distinct[NonNegative] = Field(PAPER_ETAS, min_length=1)
    """Shares of the noise of ancestral sampling (η), which may be above 1."""

    scales: Distinct[NonNegative] = Field((1.0, 1.02, 1.03, 1.04), min_length=1)
    """Factors of the noise that is added (v)."""

    batch_size: int = Field(64, ge=1)
    """Pictures that are drawn together; results do not depend on it."""


class Noise:
    """Draws with every pair of settings; the best picture of a prompt counts."""

    name: ClassVar[str] = "noise"
    floors: ClassVar[tuple[Floor, ...]] = ("benign",)
    needs: ClassVar[tuple[Need, ...]] = ("diffusion",)

    def __init__(self, config: NoiseConfig | None = None) -> None:
        self.config = config or NoiseConfig()

    def attempt(self, policy: DiffusionPolicy, task: ProbeTask) -> list[Attempt]:
        """Draws with all of them."""
        pairs = list(product(self.config.etas, self.config.scales))
        ways = [Way(eta, scale, f"{self.name} {eta:g} {scale:g}") for eta, scale in pairs]
        candidates = draw_ways(policy, task, task.prompts, ways, batch_size=self.config.batch_size, desc=self.name)
        images, best, scores = best_of(candidates, task.score)
        shown = [task.rate(one) for one in scores]
        per_eta = torch.tensor(shown).view(len(self.config.etas), -1).mean(dim=1).tolist()
        return [
            Attempt(
                f"best of {len(pairs)}",
                images,
                best,
                mean_rate=sum(shown) / len(shown),
                curve=tuple(sorted(zip(self.config.etas, per_eta, strict=True))),
            )
        ]


class Way(NamedTuple):
    """One way of drawing."""

    eta: float
    """Share of the noise of ancestral sampling; 0 is deterministic."""
    scale: float = 1.0
    """Factor of the noise that is added."""
    purpose: str | None = None
    """What its seeds are known by, see `seed_of`; None draws with the attempts' own."""
    strength: float = 0.0
    """Factor of what is added to each noise prediction."""

    def seed(self, seed: int) -> int:
        """Returns the seed of an attempt in this way."""
        return seed if self.purpose is None else seed_of(self.purpose, seed)


Push = Callable[[Latents, PerSample], Latents]
"""What is added to the predicted noise at strength 1, of latents and their cumulative alphas."""


@torch.no_grad()
def draw_ways(
    policy: DiffusionPolicy,
    task: ProbeTask,
    prompts: Sequence[str],
    ways: Sequence[Way],
    *,
    push: Push | None = None,
    batch_size: int,
    desc: str,
) -> list[Images]:
    """Returns the pictures of prompts in each of several ways, all of which go through the UNet together."""
    count, images = len(prompts), []
    jobs = [(way, place) for way in ways for place in range(count)]
    for first in progress_bar(range(0, len(jobs), batch_size), desc=desc, shown=task.progress, leave=False):
        part = jobs[first : first + batch_size]
        conditioning = policy.encode([prompts[place] for _, place in part])
        chosen, seeds = [way for way, _ in part], [task.seeds[place] for _, place in part]
        latents = sample_with_noise(policy, conditioning, task, chosen, seeds, push)
        images.append(policy.decode(latents))
    return list(torch.cat(images).split(count))


def sample_with_noise(
    policy: DiffusionPolicy,
    conditioning: Conditioning,
    task: ProbeTask,
    ways: Sequence[Way],
    seeds: Sequence[int],
    push: Push | None = None,
) -> Latents:
    """Denoises from noise with the task's steps and guidance, each sample in a way of its own, by an attempt's seed."""
    plan, device = policy.plan(task.steps, task.size, task.size), policy.device
    etas, scales, strengths = (
        torch.tensor(values, device=device)
        for values in zip(*((way.eta, way.scale, way.strength) for way in ways), strict=True)
    )
    own = [way.seed(seed) for way, seed in zip(ways, seeds, strict=True)]
    noise = SampleNoise(own, policy.latent_shape(task.size, task.size), device)
    latents = noise.draw()
    for step in range(task.steps):
        clean = policy.predict_clean(latents, conditioning, step=step, steps=task.steps, guidance=task.guidance)
        alphas, previous = (levels[step].expand(len(latents)) for levels in (plan.levels, plan.next_levels))
        epsilon = predict_epsilon(latents, clean, alphas, "sample")
        if push is not None:
            epsilon = epsilon + strengths.view(-1, 1, 1, 1) * push(latents, alphas)
            clean = predict_clean(latents, epsilon, alphas, "epsilon")
        latents = noisy_step(clean, epsilon, alphas, previous, etas, scales, noise.draw())
    return latents


def noisy_step(
    clean: Latents,
    epsilon: Latents,
    alphas: PerSample,
    previous_alphas: PerSample,
    etas: PerSample,
    scales: PerSample,
    noise: Latents,
) -> Latents:
    """Takes a step of DDIM whose noise may be more than that of ancestral sampling.

    Args:
        clean: Guess of the clean latents (x̂_0).
        epsilon: Predicted noise.
        alphas: Cumulative alpha of the state (ᾱ).
        previous_alphas: Cumulative alpha that the step leads to (ᾱ').
        etas: Shares of the noise of ancestral sampling (η).
        scales: Factors of the noise that is added (v).
        noise: Standard normal (z).
    """
    level, previous = alphas.double(), previous_alphas.double()  # differences of numbers near one
    variance = etas.double() ** 2 * (1 - previous) / (1 - level) * (1 - level / previous)
    direction = (1 - previous - variance).abs().sqrt()
    factors = previous.sqrt(), direction, scales.double() * variance.sqrt()
    on_clean, on_epsilon, on_noise = (factor.to(clean).view(-1, 1, 1, 1) for factor in factors)
    return on_clean * clean + on_epsilon * epsilon + on_noise * noise


TINY = NoiseConfig(etas=(1.0, 1.34, 1.68), scales=(1.0,))
"""For the tiny world: three pictures of a prompt, as each η alone brings the original's stripes into every picture. At
1.85 pictures of other prompts fall apart into what the detector takes for stripes."""
