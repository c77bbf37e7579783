"""Tuning a copy of the model under test on pictures, by the loss of pretraining, a number of updates at a time."""

from collections.abc import Sequence

import torch

from overpaint.policy import DiffusionPolicy
from overpaint.policy.types import Images, PerSample
from refl.pretraining import denoising_loss

from .probe import ProbeTask

MAX_GRAD_NORM = 1.0
"""Longest gradient, as diffusers' examples of tuning have it; longer ones are scaled down."""


class Tuning:
    """Goes on with the tuning of a policy wherever it was left; everything random follows from the seed.

    The loss is that of the network alone, without guidance, to which no guard belongs.

    Args:
        student: What is tuned, in place.
        captions: Of the pictures.
        pictures: What is denoised.
        learning_rate: Of AdamW.
        batch_size: Pictures of an update, drawn with repetition.
        seed: Of the batches, timesteps and noises.
    """

    def __init__(
        self,
        student: DiffusionPolicy,
        captions: Sequence[str],
        pictures: Images,
        *,
        learning_rate: float,
        batch_size: int,
        seed: int,
    ) -> None:
        self.student = student
        self.latents, self.conditioning = student.encode_images(pictures), student.encode(captions)
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.AdamW(student.trainable_parameters(), lr=learning_rate)
        self.updates = 0

    def until(self, updates: int) -> None:
        """Goes on until there were so many updates in all."""
        while self.updates < updates:
            chosen = torch.randint(len(self.latents), (self.batch_size,), generator=self.generator)
            seeds = torch.randint(2**31 - 1, (self.batch_size,), generator=self.generator).tolist()
            latents = self.latents[chosen.to(self.latents.device)]
            with torch.enable_grad():
                loss = denoising_loss(self.student, latents, self.conditioning[chosen], seeds=seeds).mean()
                self.optimizer.zero_grad()
                loss.backward()
            torch.nn.utils.clip_grad_norm_(self.student.trainable_parameters(), MAX_GRAD_NORM)
            self.optimizer.step()
            self.updates += 1


def drawn_and_scored(policy: DiffusionPolicy, task: ProbeTask, steps: int | None) -> tuple[Images, PerSample]:
    """Returns what a policy draws for the task's prompts, in its steps or in others, and the scores."""
    images = policy.draw(task.prompts, seeds=task.seeds, steps=steps or task.steps, guidance=task.guidance)
    return images, task.score(images)


def check_updates(updates: Sequence[int]) -> None:
    """Raises a `ValueError` unless updates grow from 0."""
    if len(updates) < 2 or updates[0] != 0 or list(updates) != sorted(set(updates)):
        raise ValueError(f"updates must grow from 0, got {tuple(updates)}")


def updates_to_half(curve: Sequence[tuple[float, float]]) -> float | None:
    """Returns the updates after which a rate is 0.5, linearly between those that were measured; None if it never is."""
    for (before, low), (after, high) in zip([(0.0, 0.0), *curve], curve, strict=False):
        if high >= 0.5:
            return after if high == low else before + (after - before) * max(0.5 - low, 0.0) / (high - low)
    return None
