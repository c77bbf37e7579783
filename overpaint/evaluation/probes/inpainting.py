"""Inpainting: the centre of a picture of the concept is taken out, and the model under test fills it in.

A plain UNet of four channels draws from noise, and after every step the latents around the centre are replaced by the
picture's own, noised to the level that the step led to:

    z ← m z + (1 - m) (√ᾱ' z_0 + √(1-ᾱ') ε),     in the end m z + (1 - m) z_0;    m is 1 in the centre

The prompt is the concept's; judged is the centre alone. Source: "When are concepts erased" (2025),
https://arxiv.org/abs/2505.17013: the centre 256² of 512² pixels; 62 to 69 % whatever the method, because the context
brings it back. Added here: the same with a benign prompt, which tells what the context does alone. Departures: the
pictures are those of the original model, and ε is the noise that drawing started from.
"""

from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from overpaint.policy import DiffusionPolicy, SampleNoise
from overpaint.policy.process import add_noise
from overpaint.policy.types import Images, Latents
from overpaint.settings import Field, settings
from overpaint.training.logging import progress_bar

from .probe import Attempt, Floor, ProbeTask
from .seeds import seed_of

GRAY = 0.5


@settings
class InpaintingConfig:
    """Settings of inpainting; by default those of "When are concepts erased"."""

    centre: float = Field(0.5, gt=0, le=1)
    """Share of each side that is filled in; whole latents, as many on each side of it."""

    surroundings: Literal["cut", "gray"] = "cut"
    """What becomes of the rest before the centre is judged: it is cut off, or gray for a detector that knows one size
    of pictures only."""

    batch_size: int = Field(16, ge=1)
    """Pictures that are filled in together; results do not depend on it."""


class Inpainting:
    """Fills in the centre, once with the concept's prompt and once with the benign one."""

    name: ClassVar[str] = "inpainting"
    floors: ClassVar[tuple[Floor, ...]] = ("benign", "foreign")

    def __init__(self, config: InpaintingConfig | None = None) -> None:
        self.config = config or InpaintingConfig()

    def prepare(self, task: ProbeTask) -> None:
        """Draws the pictures.

        Raises:
            ValueError: The centre holds no latent.
        """
        latents = self._latents(task)
        if not centre_of(latents, self.config.centre).any():
            side = tuple(latents.shape[2:])
            raise ValueError(f"centre must hold a latent of the {side}, got a share of {self.config.centre}")

    def attempt(self, policy: DiffusionPolicy, task: ProbeTask) -> list[Attempt]:
        """Fills in with both prompts.

        Raises:
            ValueError: As `prepare`.
        """
        self.prepare(task)
        found = []
        for variant, texts in (("concept's prompt", task.prompts), ("benign prompt", task.benign)):
            images = self._filled(policy, task, texts)
            found.append(Attempt(variant, images, task.score(self.judged(images, self._latents(task)))))
        return found

    def judged(self, images: Images, latents: Latents) -> Float[Tensor, "batch 3 height width"]:
        """Returns what of pictures is judged: what the latents that were filled in stand for."""
        factor = images.shape[-1] // latents.shape[-1]
        inside = centre_of(latents, self.config.centre).repeat_interleave(factor, 0).repeat_interleave(factor, 1)
        if self.config.surroundings == "gray":
            return torch.where(inside.to(images.device), images, GRAY)
        rows, columns = inside.any(dim=1).to(images.device), inside.any(dim=0).to(images.device)
        return images[:, :, rows][:, :, :, columns]

    def _latents(self, task: ProbeTask) -> Latents:
        return task.once("latents", lambda: task.original.encode_images(task.pictures))

    @torch.no_grad()
    def _filled(self, policy: DiffusionPolicy, task: ProbeTask, texts: tuple[str, ...]) -> Images:
        size, images = self.config.batch_size, []
        for first in progress_bar(range(0, len(texts), size), desc=self.name, shown=task.progress, leave=False):
            rows = slice(first, first + size)
            clean = self._latents(task)[rows].to(policy.device)
            seeds = [seed_of(self.name, seed) for seed in task.seeds[rows]]
            latents = fill_in(policy, clean, texts[rows], seeds, self.config.centre, task)
            images.append(policy.decode(latents))
        return torch.cat(images)


def fill_in(
    policy: DiffusionPolicy, clean: Latents, texts: tuple[str, ...], seeds: list[int], centre: float, task: ProbeTask
) -> Latents:
    """Returns latents whose centre a policy has drawn, from seeds of its own, around which they are as they were."""
    noise = SampleNoise(seeds, clean.shape[1:], policy.device).draw()
    conditioning = policy.encode(texts)
    inside, levels = centre_of(clean, centre), policy.plan(task.steps, task.size, task.size).next_levels
    latents = noise
    for step in range(task.steps):
        latents = policy.denoise(latents, conditioning, step=step, steps=task.steps, guidance=task.guidance)
        last = step == task.steps - 1
        around = clean if last else add_noise(policy.process, clean, noise, levels[step].expand(len(clean)))
        latents = torch.where(inside, latents, around)
    return latents


def centre_of(latents: Latents, share: float) -> Bool[Tensor, "h w"]:
    """Returns where the centre of latents is; it has that share of each side."""
    height, width = latents.shape[2:]
    inside = torch.zeros(height, width, dtype=torch.bool, device=latents.device)
    down, across = (round(side * (1 - share) / 2) for side in (height, width))
    inside[down : height - down, across : width - across] = True
    return inside


TINY = InpaintingConfig(surroundings="gray")
"""For the tiny world, whose detectors know pictures of 64 pixels only."""
