"""Randomness that belongs to the sample and not to the batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from overpaint.settings import Count, Seed

from .types import Latents


class SampleNoise:
    """The stream of standard normal noises of each sample of a batch.

    Every sample has its own generator on the CPU, seeded by its own seed. The first draw is the initial latents, the
    next ones are the noises of the steps, in order. So the noise of a sample is the same in any batch, at any place
    in it, in any number of processes and on any device.

    Args:
        seeds: One for each sample.
        shape: Of one sample's latents: channels, height and width.
        device: Where the draws go.
    """

    def __init__(self, seeds: Sequence[Seed], shape: Sequence[Count], device: torch.device) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape, self.device = tuple(shape), device

    def draw(self) -> Latents:
        """Returns the next noise of every sample."""
        return draw_noise(self.generators, self.shape, self.device)


def draw_noise(generators: Sequence[torch.Generator], shape: Sequence[int], device: torch.device) -> Latents:
    """Returns one noise of a shape from each generator; the copy to an accelerator does not wait for it."""
    noise: Tensor = torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])
    if device.type == "cuda":
        return noise.pin_memory().to(device, non_blocking=True)
    return noise.to(device)


def check_seeds(seeds: Sequence[int], count: int) -> None:
    """Checks that there is a seed for each sample.

    Raises:
        ValueError: There are more or fewer.
    """
    if len(seeds) != count:
        raise ValueError(f"seeds must be one for each of the {count} samples, got {len(seeds)}")
