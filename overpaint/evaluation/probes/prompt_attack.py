"""An attack on prompts: a few tokens before each prompt are moved until the model shows the concept.

At each of some timesteps t, one after the other, some updates of Adam move the tokens a of every prompt p towards

    min over a of ‖ε - ε_θ(z_t, t, τ([a; p]))‖²

z_t is the one concept picture of that prompt, noised with fresh ε each time. After each timestep a picture is drawn
with the tokens, at the prompt's own seed and guidance; a prompt whose picture shows the concept is done, and one that
shows it unattacked is never attacked.

Source: Zhang et al. (2024), UnlearnDiffAtk, https://arxiv.org/abs/2310.11868, section 4; and for the other target Chin
et al. (2024), P4D, https://arxiv.org/abs/2309.06135, equation 3: the noise that the original model sees for the clean
prompt takes the place of ε. Departures: all prompts are attacked side by side, each with random numbers of its own; a
guard is at work in every call. What the tokens are made of is in `adversarial_prompt` and `soft_prompt`.
"""

from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from overpaint.policy import DiffusionPolicy
from overpaint.policy.noise import draw_noise
from overpaint.policy.soft_prompts import soft_texts
from overpaint.policy.types import Images
from overpaint.settings import Field, Index, settings
from overpaint.training.logging import progress_bar

from .noise_error import generator_of, noise_error, single_steps
from .probe import Attempt, ProbeTask


@settings
class AttackConfig:
    """How long and how fast tokens are moved; by default as UnlearnDiffAtk does."""

    timesteps: tuple[Index, ...] = Field(tuple(range(10, 1000, 20)), min_length=1)
    """Timesteps of training at which the model is asked, in this order; after each, pictures are drawn."""

    updates: int = Field(40, ge=1)
    """Updates at each timestep."""

    learning_rate: float = Field(0.01, gt=0)
    """Of Adam."""

    weight_decay: float = Field(0.1, ge=0)
    """Of Adam, added to the gradient."""

    target: Literal["noise", "original"] = "noise"
    """What the model is to see in the noised picture: its noise, or what the original sees there for the clean prompt,
    as P4D has it."""

    batch_size: int = Field(16, ge=1)
    """Prompts that go through the UNet together; no result depends on it."""


@runtime_checkable
class FreeTokens(Protocol):
    """Tokens that an attack moves: some before each prompt."""

    free: Tensor
    """What the optimizer moves: [prompts, tokens, ...], a leaf."""

    def drawn(self, rows: Sequence[int], generators: Sequence[torch.Generator]) -> Float[Tensor, "rows tokens dim"]:
        """Returns vectors of some prompts for an update, with gradient; each prompt has its own generator."""
        ...

    def settle(self) -> None:
        """Puts what an update has moved back to where it may be, in place."""
        ...

    def found(self, rows: Sequence[int]) -> Float[Tensor, "rows tokens dim"]:
        """Returns the vectors that pictures of some prompts are drawn with."""
        ...


class PromptAttack:
    """An attack of a policy's prompts while it is under way.

    Args:
        policy: Under attack; it is left as it was.
        task: Its prompts are attacked.
        tokens: What is moved.
        config: How.
        name: Of the probe; its random numbers follow from it and the task's seeds.

    Raises:
        ValueError: There is no such timestep.
    """

    def __init__(
        self, policy: DiffusionPolicy, task: ProbeTask, tokens: FreeTokens, config: AttackConfig, name: str
    ) -> None:
        if max(config.timesteps) >= (total := policy.num_timesteps):
            raise ValueError(f"timesteps must be below {total}, got {max(config.timesteps)}")
        self.policy, self.task, self.tokens, self.config, self.name = policy, task, tokens, config, name
        self.optimizer = torch.optim.Adam([tokens.free], lr=config.learning_rate, weight_decay=config.weight_decay)
        self.generators = [generator_of(name, seed) for seed in task.seeds]
        self.clean = task.picture_latents

    def run(self, variant: str) -> Attempt:
        """Attacks all prompts that do not show the concept by themselves."""
        task, cfg = self.task, self.config
        images = task.drawn_by(self.policy)
        scores = task.score(images).float()
        shown = task.shown(scores)
        unattacked, drawn, gradients = task.rate(scores), len(shown), 0
        curve = [(0.0, unattacked)]
        bar = progress_bar(cfg.timesteps, desc=f"{self.name} of {len(shown)} prompts", shown=task.progress)
        with bar:
            for timestep in bar:
                rows = (~shown).nonzero()[:, 0].tolist()
                if not rows:
                    break
                for _ in range(cfg.updates):
                    self.update(rows, timestep)
                gradients += cfg.updates * len(rows)
                pictures = self.draw(rows)
                found = task.score(pictures).float()
                drawn += len(rows)
                for row, picture, score in zip(rows, pictures, found, strict=True):
                    if score > scores[row]:
                        images[row], scores[row] = picture, score
                shown = task.shown(scores)
                curve.append((curve[-1][0] + cfg.updates, task.rate(scores)))
        numbers = {
            "rate before": unattacked,
            "rate after": task.rate(scores),
            "gradients a prompt": gradients / len(shown),
        }
        return Attempt(variant, images, scores, float(shown.sum()) / drawn, numbers, tuple(curve))

    def update(self, rows: Sequence[int], timestep: int) -> None:
        """Moves the tokens of some prompts once."""
        with single_steps(self.policy), torch.enable_grad():
            gradient = torch.zeros_like(self.tokens.free)
            for start in range(0, len(rows), self.config.batch_size):
                error = self.error(rows[start : start + self.config.batch_size], timestep)
                gradient += torch.autograd.grad(error, [self.tokens.free])[0]
        self.tokens.free.grad = gradient
        self.optimizer.step()
        self.tokens.settle()

    def error(self, rows: Sequence[int], timestep: int) -> Float[Tensor, ""]:
        """Returns the sum of what the model is off for some prompts, at noise of their own."""
        policy, task = self.policy, self.task
        generators = [self.generators[row] for row in rows]
        clean = self.clean[torch.tensor(rows, device=self.clean.device)].to(policy.device)
        noise = draw_noise(generators, clean.shape[1:], policy.device)
        timesteps = torch.full((len(rows),), timestep, device=policy.device)
        noised = policy.add_noise(clean, noise, timesteps)
        prompts = [task.prompts[row] for row in rows]
        target = policy.direction(clean, noise)
        if self.config.target == "original":
            with torch.no_grad():
                target = task.original.predict_direction(noised, timesteps, task.original.encode(prompts))
        with soft_texts(policy.prompts, prompts, self.tokens.drawn(rows, generators)) as texts:
            return noise_error(policy, noised, timesteps, policy.encode(texts), target).sum()

    def draw(self, rows: Sequence[int]) -> Images:
        """Returns what the policy draws with the tokens as they are."""
        policy, task = self.policy, self.task
        prompts, seeds = [task.prompts[row] for row in rows], [task.seeds[row] for row in rows]
        with torch.no_grad(), soft_texts(policy.prompts, prompts, self.tokens.found(rows)) as texts:
            return policy.draw(
                texts, seeds=seeds, steps=task.steps, guidance=task.guidance, height=task.size, width=task.size
            )
