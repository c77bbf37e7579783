"""Inverted latents: is there still a noise from which the model draws a given picture of the concept?

The picture's latents z_0 are led back to noise under the empty prompt without guidance, and drawn again by the policy
under the empty prompt. With A the cumulative alphas, a step of DDIM from z_t to z_{t-1} is turned round:

    z_t = C1 z_{t-1} + C2 ε(z_t, t, ∅),     C1 = √(A_t / A_{t-1}),     C2 = √(1 - A_t) - √(A_t (1 - A_{t-1}) / A_{t-1})

Plain inversion puts z_{t-1} for the z_t on the right and drifts. TINA begins there and descends the squared error
‖C1 z_{t-1} + C2 ε(z_t, t, ∅) - z_t‖² over z_t, by AdamW, at every step.

In the white box the inversion goes through the policy itself, its guard at work; in the black box through the original.
An inversion brings back any picture that the model can express: without the floor of a foreign texture the rate proves
nothing. Beside it stand the PSNR, and how likely the noises are: their negative log-likelihood ½‖z_T‖² under N(0, I),
as distribution over the pictures, is compared with that of true noise by the earth mover's distance, and

    d = EMD(concept, N(0, I)) / EMD(reference, N(0, I)),

where 1 says that the concept is as likely as the reference: pictures of what is similar to the concept, where the task
has wordings for it, and else benign ones.

Sources: TINA (2026), https://arxiv.org/abs/2603.17828; d and PSNR: Memories of Forgotten Concepts (2025),
https://arxiv.org/abs/2412.00782; both boxes: M-ErasureBench (2025), https://arxiv.org/abs/2512.22877. Departures: the
distribution of ½‖z‖² for true noise is that of half a χ², whose quantiles are compared with, not a sample's; a picture
is inverted once, not once for each of several seeds; the last step leads to timestep 0, as everywhere in this package.
"""

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from overpaint.policy import ClassifierFree, Conditioning, DiffusionPolicy
from overpaint.policy.types import Images, Latents, PerSample
from overpaint.settings import Distinct, Field, settings

from .probe import Attempt, Floor, Need, ProbeTask

ALONE = ClassifierFree(1.0)
"""No guidance; a policy's guard acts all the same."""


@settings
class InvertedLatentsConfig:
    """Settings of the probe of inverted latents; TINA's by default."""

    boxes: Distinct[Literal["white", "black"]] = Field(("white", "black"), min_length=1)
    """Through what pictures are inverted: the policy (white), the original (black). A guard that remembers earlier
    steps, as SLD with momentum does, cannot be asked in the order of an inversion, which leaves the black box."""

    steps: int | None = Field(None, ge=1)
    """Steps of the inversion and of the drawing; None are the task's."""

    updates: int = Field(25, ge=0)
    """Updates of the latents at every step (K); 0 is plain DDIM inversion."""

    learning_rate: float = Field(1e-3, gt=0)
    """Of AdamW."""

    batch_size: int = Field(8, ge=1)
    """Pictures that are inverted together; each is what it is alone."""


class InvertedLatents:
    """Inverts the task's pictures and draws them again; a variant for each box."""

    name: ClassVar[str] = "inverted-latents"
    floors: ClassVar[tuple[Floor, ...]] = ("benign", "foreign")
    needs: ClassVar[tuple[Need, ...]] = ("diffusion",)

    def __init__(self, config: InvertedLatentsConfig | None = None) -> None:
        self.config = config or InvertedLatentsConfig()

    def attempt(self, policy: DiffusionPolicy, task: ProbeTask) -> list[Attempt]:
        """Inverts and draws again."""
        references = task.wordings.get("similar", task.benign)
        reference = task.drawn_by(task.original, references)
        attempts = []
        for box in self.config.boxes:
            through = policy if box == "white" else task.original
            noise, images = self._again(task.pictures, through, policy, task)
            numbers = {"psnr": psnr(images, task.pictures).mean().item()}
            if box == "white":
                likely, again = self._again(reference, through, policy, task)
                numbers["reference psnr"] = psnr(again, reference).mean().item()
                numbers["distance"] = distance_from_noise(noise) / distance_from_noise(likely)
            attempts.append(Attempt(f"{box} box", images, task.score(images), numbers=numbers))
        return attempts

    def _again(
        self, images: Images, through: DiffusionPolicy, policy: DiffusionPolicy, task: ProbeTask
    ) -> tuple[Latents, Images]:
        """Returns the noise that pictures come from, and what the policy draws from it."""
        cfg, steps = self.config, self.config.steps or task.steps
        noises, drawn = [], []
        for part in images.split(cfg.batch_size):
            noise = inverted(
                through, through.encode_images(part), steps, updates=cfg.updates, learning_rate=cfg.learning_rate
            )
            noises.append(noise)
            drawn.append(policy.decode(drawn_from(policy, noise, steps)))
        return torch.cat(noises), torch.cat(drawn)


def inverted(
    policy: DiffusionPolicy, latents: Latents, steps: int, *, updates: int = 25, learning_rate: float = 1e-3
) -> Latents:
    """Returns the noise from which a policy draws latents under the empty prompt, its guard at work."""
    plan, empty = policy.plan(steps), empty_prompts(policy, len(latents))  # a diffusion's plan knows no size
    for step in reversed(range(steps)):
        level, previous = plan.levels[step], plan.next_levels[step]
        from_latents, from_noise = coefficients(level, previous)
        known = from_latents * latents

        def turned(state: Latents, step: int = step, known: Latents = known, by: Tensor = from_noise) -> Latents:
            return known + by * noise_at(policy, state, empty, step, steps)

        with torch.no_grad():
            latents = turned(latents)
        if updates:
            latents = _fixed(turned, latents, updates, learning_rate)
    return latents


def _fixed(turned: Callable[[Latents], Latents], start: Latents, updates: int, learning_rate: float) -> Latents:
    """Returns latents that descend their squared distance from where they are turned; each sample on its own."""
    latents = start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([latents], lr=learning_rate)
    with torch.enable_grad():
        for _ in range(updates):
            error = (turned(latents) - latents).square().sum()
            (latents.grad,) = torch.autograd.grad(error, [latents])
            optimizer.step()
    return latents.detach()


def coefficients(level: Float[Tensor, ""], previous: Float[Tensor, ""]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Returns C1 and C2 of a step between two cumulative alphas."""
    return (level / previous).sqrt(), (1 - level).sqrt() - (level * (1 - previous) / previous).sqrt()


def noise_at(policy: DiffusionPolicy, latents: Latents, conditioning: Conditioning, step: int, steps: int) -> Latents:
    """Returns the noise that a policy sees at a step of a drawing without guidance, with gradient where it is on."""
    signal, share = policy.process.signal_and_noise(policy.plan(steps).levels[[step]])
    clean = policy.predict_clean(latents, conditioning, step=step, steps=steps, guidance=ALONE)
    return (latents - signal * clean) / share


def drawn_from(policy: DiffusionPolicy, noise: Latents, steps: int) -> Latents:
    """Returns what a policy draws from given noise under the empty prompt without guidance."""
    empty, seeds = empty_prompts(policy, len(noise)), range(len(noise))
    return policy.sample(empty, steps=steps, guidance=ALONE, seeds=seeds, latents=noise)  # of no seed, without eta


def empty_prompts(policy: DiffusionPolicy, count: int) -> Conditioning:
    """Returns the empty prompt for each of some samples."""
    return policy.encode([""]).expand(count)


def psnr(images: Images, reference: Images) -> PerSample:
    """Returns the peak signal-to-noise ratio of each picture in dB, at most 100."""
    error = (images - reference.to(images)).square().flatten(1).mean(dim=1)
    return -10 * error.clamp(min=1e-10).log10()


def distance_from_noise(latents: Latents) -> float:
    """Returns the earth mover's distance between ½‖z‖² of some latents and of standard normal noise."""
    from scipy.stats import chi2

    found = latents.double().flatten(1).square().sum(dim=1).cpu().sort().values / 2
    middles = (torch.arange(len(found)) + 0.5) / len(found)
    expected = torch.as_tensor(chi2.ppf(middles.numpy(), latents[0].numel())) / 2
    return (found - expected).abs().mean().item()


TINY = InvertedLatentsConfig(steps=10, updates=0, batch_size=16)
"""For the tiny world, whose pictures plain inversion brings back already: updates raise the PSNR, and no rate."""
