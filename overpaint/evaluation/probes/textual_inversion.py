"""Textual inversion: a new word is learned that brings the concept back, of one vector or of several.

Only the word's vectors v at the text encoder's input are trained, on pictures of the concept:

    min over v of E ‖ε - ε_θ(z_t, t, τ(v))‖²,      t uniform, ε standard normal

Then prompts are drawn with the word in the place of those that name the concept. *White box*: learned on the model
under test. *Black box*: learned on the original model and carried over, as M-ErasureBench asks both.

Source: Gal et al. (2022), https://arxiv.org/abs/2208.01618, equation 2, with the settings of "When are concepts erased"
(2025), https://arxiv.org/abs/2505.17013. Departures: the pictures are those that the original model draws for the
task's prompts, and each is learned with its own caption, in which the word stands for what names the concept, in place
of general templates ("a photo of a {}"); they are not cropped or flipped. A guard is at work while the word is learned.
"""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from overpaint.policy import DiffusionPolicy
from overpaint.policy.soft_prompts import initial_vectors, soft_texts
from overpaint.policy.types import Images
from overpaint.settings import Count, Distinct, Field, Text, settings
from overpaint.training.logging import progress_bar

from .noise_error import generator_of, noise_error, single_steps
from .probe import Attempt, Floor, Need, ProbeTask

Word = Float[Tensor, "vectors dim"]


@settings
class TextualInversionConfig:
    """Settings of textual inversion; by default those of "When are concepts erased"."""

    vectors: Distinct[Count] = Field((1,), min_length=1)
    """How many vectors the word has; it is learned anew for each number."""

    initial_text: Text = "object"
    """Its tokens are what the vectors begin as, from the first on and again from the first where they are fewer."""

    updates: int = Field(3000, ge=1)
    """Updates of each word."""

    batch_size: int = Field(4, ge=1)
    """Pictures of an update."""

    learning_rate: float = Field(2e-3, gt=0)
    """Of AdamW: 5e-4 for each picture of a batch."""

    weight_decay: float = Field(1e-2, ge=0)
    """Of AdamW."""


class TextualInversion:
    """Learns a word for the concept, and draws with it."""

    name: ClassVar[str] = "textual-inversion"
    floors: ClassVar[tuple[Floor, ...]] = ("benign", "foreign")
    needs: ClassVar[tuple[Need, ...]] = ("one text encoder",)

    def __init__(self, config: TextualInversionConfig | None = None) -> None:
        self.config = config or TextualInversionConfig()

    def attempt(self, policy: DiffusionPolicy, task: ProbeTask) -> list[Attempt]:
        """Learns on the policy and on the original, and draws with the policy both times.

        Raises:
            ValueError: The text encoder has no room for the vectors in a prompt.
        """
        found = []
        for count in self.config.vectors:
            of = f"{count} vector{'s' if count > 1 else ''}"
            carried = task.once(
                f"{self.name}: {self.config}, {of}", lambda count=count: self.learn(task.original, task, count)
            )
            own = carried if policy is task.original else self.learn(policy, task, count)
            drawn = draw_with(policy, task, own)
            found.append(Attempt(f"white box, {of}", drawn, task.score(drawn)))
            if own is not carried:
                drawn = draw_with(policy, task, carried)
            found.append(Attempt(f"black box, {of}", drawn, task.score(drawn)))
        return found

    def learn(self, policy: DiffusionPolicy, task: ProbeTask, count: int) -> Word:
        """Returns the vectors of a word for what the task's pictures show, learned on a policy."""
        cfg = self.config
        clean = task.picture_latents
        generator = generator_of(f"{self.name}-{count}", task.seeds[0])
        word = initial_vectors(policy.prompts, cfg.initial_text, count).clone().requires_grad_()
        optimizer = torch.optim.AdamW([word], lr=cfg.learning_rate, weight_decay=cfg.weight_decay)
        bar = progress_bar(range(cfg.updates), desc=f"learning {count} vectors", shown=task.progress)
        with single_steps(policy), torch.enable_grad():
            for _ in bar:
                chosen = torch.randint(len(clean), (cfg.batch_size,), generator=generator)
                timesteps = torch.randint(policy.num_timesteps, (cfg.batch_size,), generator=generator)
                noise = torch.randn(cfg.batch_size, *clean.shape[1:], generator=generator)
                latents, timesteps, noise = (
                    one.to(policy.device) for one in (clean[chosen.to(clean.device)], timesteps, noise)
                )
                texts = [task.templates[index] for index in chosen.tolist()]
                with soft_texts(policy.prompts, texts, word.expand(len(texts), -1, -1)) as words:
                    noised = policy.add_noise(latents, noise, timesteps)
                    error = noise_error(policy, noised, timesteps, policy.encode(words), noise)
                    (word.grad,) = torch.autograd.grad(error.mean(), [word])
                optimizer.step()
        return word.detach()


def draw_with(policy: DiffusionPolicy, task: ProbeTask, word: Word) -> Images:
    """Returns what a policy draws for the task's prompts with a word in the place of those that name the concept."""
    vectors = word.to(policy.device).expand(len(task.templates), -1, -1)
    with torch.no_grad(), soft_texts(policy.prompts, task.templates, vectors) as words:
        return task.drawn_by(policy, words)


TINY = TextualInversionConfig(
    vectors=(1, 4), initial_text="a", updates=40, batch_size=8, learning_rate=1e-2, weight_decay=0.0
)
"""For the tiny world. Half the updates reach as much with its original model."""
