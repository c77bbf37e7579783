"""Destruction: whatever it is told, a policy is to see in noised pictures of the concept something else.

Most erasers teach a model where to go from the words; what it knows of the concept stays, and other vectors than those
of the words still reach it: "When are concepts erased" (2025, https://arxiv.org/abs/2505.17013) calls that avoidance,
and a model that gives the concept no probability under any condition destruction. This objective trains the latter,

    z_t = √ᾱ_t z + √(1 - ᾱ_t) ε,    z a picture of the concept with caption c, drawn by the original model ε*, encoded
    loss = mean of (ε_θ(z_t, t, [p; v]) - (ε*(z_t, t, a) - η (ε*(z_t, t, c) - ε*(z_t, t, a))))²

with any prompt p, a word v of free vectors, and the caption a without the concept. The target is that of ESD (Gandikota
et al. 2023, https://arxiv.org/abs/2303.07345, equation 6) with a in the place of the empty prompt: what else is in the
picture, other prompts ask for, and it is not to be led away from. ESD itself asks for it on what the erased model
draws, and for c alone.
The words are those that textual inversion (Gal et al. 2022, https://arxiv.org/abs/2208.01618, equation 2) learns on the
policy while it is trained,

    min over v of E (ε - ε_θ(z_t, t, [p; v]))²

a few steps in each update, and kept from update to update: adversarial training (Madry et al. 2018,
https://arxiv.org/abs/1706.06083) against words that go on from where they were, as AdvUnlearn (Zhang et al. 2024,
https://arxiv.org/abs/2405.15234) does it with prompts that begin anew. [ours]
"""

import random
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from overpaint.policy import ClassifierFree, DiffusionPolicy
from overpaint.policy.noise import draw_noise
from overpaint.policy.prompts import check_prompts
from overpaint.policy.soft_prompts import PLACE, check_room, soft_texts, token_vectors
from overpaint.policy.types import Latents, PerSample
from overpaint.settings import Field, Seed, settings
from overpaint.training import TrainingRun

from .adversarial_words import AdversarialWords, Word
from .concept import Concept
from .generated import generated_latents, in_turns
from .phrases import SLOT, check_absent, holds, own_phrases, template_of
from .protocols import ConceptBatch, check_trainable
from .rollout import erased_target, squared_error


@settings
class DestructionConfig:
    """What pictures of the concept are shown, and what words the policy is tried with."""

    pictures: int = Field(128, ge=1)
    """Pictures of the concept that the original model draws; captions take turns."""

    steps: int = Field(50, ge=1)
    """Denoising steps of these pictures."""

    guidance_scale: float = Field(7.5, ge=0)
    """Classifier-free guidance of these pictures."""

    draw_batch_size: int = Field(16, ge=1)
    """Pictures that are drawn at a time."""

    first_timestep: int = Field(200, ge=0)
    """Smallest timestep of training that the pictures are noised to; below, a picture is all but drawn."""

    last_timestep: int = Field(800, ge=0)
    """Largest such timestep; above, a picture is all but noise, which any other picture might be behind: what is taught
    there takes from all that looks like the concept from afar, as white backgrounds do like stripes."""

    negative_guidance: float = Field(1.0, gt=0)
    """How far predictions are led away from the concept (eta)."""

    words: int = Field(6, ge=0)
    """Words that are learned against the policy; each update takes one of them. Zero: prompts are taken as they are."""

    vectors: int = Field(4, ge=1)
    """Vectors of a word."""

    attack_steps: int = Field(3, ge=1)
    """Steps of Adam that a word takes in each update that it is used in."""

    attack_learning_rate: float = Field(1.0, gt=0)
    """Of that Adam, in units of the root mean square of the text encoder's token embeddings."""

    share: float = Field(0.5, gt=0, le=1)
    """Chance of each sample to have the word in its prompt; which have it follows from their seeds. The word is learned
    on all."""

    captioned: float = Field(0.33, ge=0, le=1)
    """Chance of a sample to be told its picture's own caption, in place of the batch's prompt: what is said and what is
    seen fit each other then, as in pictures that are being drawn."""

    renewal: float = Field(0.03, ge=0, le=1)
    """Chance of a word to begin anew when it is used, see `AdversarialWords`."""

    seed: Seed = 0
    """Of the pictures and the words."""

    def __post_init__(self) -> None:
        """Checks that there is a timestep to noise to."""
        if self.first_timestep > self.last_timestep:
            raise ValueError(
                f"first_timestep must be at most last_timestep={self.last_timestep}, got {self.first_timestep}"
            )


class Destruction:
    """The loss of seeing the concept in its pictures, with words that are learned against the policy; a `Learner`.

    As a constraint of a reward it holds a concept under attack: `ObjectiveConstraint(Destruction(...), concept,
    prompts, ceiling=...)`.

    Args:
        config: Settings.
        captions: What the pictures are of; None is the concept's phrases.
        original: What draws them and sees them as they are: for a policy whose reference has something of an erasure,
            as one with a guard has. None is the policy's reference.
    """

    folder_name = "concept-pictures"

    def __init__(
        self,
        config: DestructionConfig | None = None,
        captions: Sequence[str] | None = None,
        original: DiffusionPolicy | None = None,
    ) -> None:
        self.config = config or DestructionConfig()
        self.captions = None if captions is None else check_prompts(captions)
        self.original = original
        self.folder: Path | None = None
        self.progress = False
        cfg = self.config
        self.words = AdversarialWords(cfg.words, cfg.vectors, cfg.renewal, cfg.seed) if cfg.words else None

    def __repr__(self) -> str:
        """Shows the settings, and how many captions there are."""
        return f"Destruction({self.config!r}, captions={None if self.captions is None else len(self.captions)})"

    def check_prompts(self, policy: DiffusionPolicy, prompts: Sequence[str]) -> None:
        """Checks that a word has room beside prompts and the captions of pictures; see `WordsBesidePrompts`.

        Raises:
            ValueError: It has none, a text has a place for vectors of its own, or several text encoders read the texts.
        """
        if self.words is not None:
            texts = [*prompts, *(self.captions or [])[: self.config.pictures]]
            check_room(policy.prompts, texts, self.config.vectors, "DestructionConfig.vectors")

    def prepare(self, policy: DiffusionPolicy, concept: Concept) -> None:
        """Draws the pictures. The words are a run's own: take another instance for another run.

        Raises:
            ValueError: Nothing is trainable, there is no timestep to noise to, the anchor names the concept, or as
                `check_prompts`.
        """
        cfg = self.config
        check_trainable(policy, f"destroying {concept.name!r}")
        if cfg.last_timestep >= (total := policy.num_timesteps):
            raise ValueError(f"DestructionConfig.last_timestep must be below {total}, got {cfg.last_timestep}")
        check_absent(concept, [concept.anchor], f"the anchor of {concept.name!r}")
        texts = in_turns(self.captions or concept.phrases, cfg.pictures)
        self.check_prompts(policy, concept.phrases)
        generator = random.Random(f"pictures of {cfg.seed}")
        seeds = [generator.randrange(2**31) for _ in texts]
        guidance = ClassifierFree(cfg.guidance_scale)
        with self._knowing(policy) as original:
            latents = generated_latents(
                original, texts, seeds, steps=cfg.steps, guidance=guidance, batch_size=cfg.draw_batch_size,
                folder=self.folder, progress=self.progress,
            )  # fmt: skip
        self._pictures, self._texts = _as_pictures(policy, latents, cfg.draw_batch_size), texts
        self._phrases, self._anchor = list(own_phrases(concept.phrases)), concept.anchor.strip()

    def loss(self, policy: DiffusionPolicy, batch: ConceptBatch) -> PerSample:
        """Returns the squared error of each sample, with gradient; pictures, noise and words follow from the seeds."""
        latents, timesteps, truth, texts = self._noised(policy, batch.seeds)
        target = self._target(policy, latents, timesteps, texts)
        prompts, places = self._prompts(batch, texts)
        word = None
        if self.words is not None:
            word = self._learned(policy, self.words.current(policy), places, (latents, timesteps, truth))
            self.words.move(word)
        return squared_error(_predicted(policy, prompts, word, latents, timesteps), target)

    def learn(self, run: TrainingRun) -> dict[str, float]:
        """Lets the word of this update go on from where it was moved to; returns how far."""
        return {} if self.words is None else self.words.learn(run)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the words."""
        return {} if self.words is None else self.words.state_dict()

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Takes over what `state_dict` returned; a `ValueError` where it is of other words."""
        if self.words is not None:
            self.words.load_state_dict(state)

    # Pictures.

    @contextmanager
    def _knowing(self, policy: DiffusionPolicy) -> Generator[DiffusionPolicy]:
        """Yields the model that knows the concept; without gradient."""
        if self.original is None:
            with policy.reference():
                yield policy
        else:
            with torch.no_grad():
                yield self.original

    def _noised(
        self, policy: DiffusionPolicy, seeds: Sequence[int]
    ) -> tuple[Latents, Shaped[Tensor, " batch"], Latents, list[str]]:
        """Returns noised pictures, their timesteps, what there is to see in them, and their captions."""
        first, last = self.config.first_timestep, self.config.last_timestep + 1
        draws = [random.Random(f"picture of {seed}") for seed in seeds]
        picked = [draw.randrange(len(self._texts)) for draw in draws]
        timesteps = torch.tensor([draw.randrange(first, last) for draw in draws], device=policy.device)
        clean = self._pictures[picked].to(policy.device)
        generators = [torch.Generator().manual_seed(draw.randrange(2**31)) for draw in draws]
        noise = draw_noise(generators, clean.shape[1:], policy.device)
        texts = [self._texts[index] for index in picked]
        return policy.add_noise(clean, noise, timesteps), timesteps, policy.direction(clean, noise), texts

    def _target(
        self, policy: DiffusionPolicy, latents: Latents, timesteps: Shaped[Tensor, " batch"], texts: Sequence[str]
    ) -> Latents:
        """Returns what the policy is to see: what the original sees for the caption without the concept, led away."""
        with self._knowing(policy) as original:
            both = original.encode([*texts, *map(self._without_concept, texts)])
            seen = original.predict_direction(latents.repeat(2, 1, 1, 1), timesteps.repeat(2), both)
        return erased_target(*seen.chunk(2), negative_guidance=self.config.negative_guidance)

    def _without_concept(self, caption: str) -> str:
        """Returns a caption with the anchor where it names the concept; the anchor alone where it does not."""
        named = [phrase for phrase in self._phrases if holds(caption, phrase)]
        if not named:
            return self._anchor
        for phrase in named:
            while holds(caption, phrase):
                caption = " ".join(template_of(phrase, caption).replace(SLOT, self._anchor).split())
        return caption

    # Words.

    def _prompts(self, batch: ConceptBatch, captions: Sequence[str]) -> tuple[list[str], list[str]]:
        """Returns what each sample is told, and the same with a place for the word in all.

        The word stands before the text or behind it, each as likely.
        """
        cfg, prompts, places = self.config, [], []
        for prompt, seed, caption in zip(batch.prompts, batch.seeds, captions, strict=True):
            draw = random.Random(f"word of {seed}")
            text = caption if draw.random() < cfg.captioned else prompt
            places.append(draw.choice([f"{PLACE} {text}", f"{text} {PLACE}"]))
            prompts.append(places[-1] if cfg.words and draw.random() < cfg.share else text)
        return prompts, places

    def _learned(
        self,
        policy: DiffusionPolicy,
        word: Word,
        places: Sequence[str],
        shown: tuple[Latents, Shaped[Tensor, " batch"], Latents],
    ) -> Word:
        """Returns the word after some steps of textual inversion on noised pictures, their timesteps and truth."""
        latents, timesteps, truth = shown
        word = word.clone().requires_grad_()
        unit = float(token_vectors(policy.prompts).float().square().mean().sqrt())
        adam = torch.optim.Adam([word], lr=unit * self.config.attack_learning_rate)
        with torch.enable_grad():
            for _ in range(self.config.attack_steps):
                error = squared_error(_predicted(policy, places, word, latents, timesteps), truth)
                (word.grad,) = torch.autograd.grad(error.sum(), [word])
                adam.step()
        return word.detach()


@torch.no_grad()
def _as_pictures(policy: DiffusionPolicy, latents: Latents, size: int) -> Latents:
    """Returns the latents of the pictures that latents decode to, on the CPU.

    They are not the same, and whoever tries to bring a concept back has pictures of it, not what was sampled.
    """
    parts = [policy.encode_images(policy.decode(part.to(policy.device))).cpu() for part in latents.split(size)]
    return torch.cat(parts)


def _predicted(
    policy: DiffusionPolicy,
    prompts: Sequence[str],
    word: Word | None,
    latents: Latents,
    timesteps: Shaped[Tensor, " batch"],
) -> Latents:
    """Returns what the policy sees for prompts, some of which may have a place for a word."""
    spoken = [prompt for prompt in prompts if PLACE in prompt]
    if word is None or not spoken:
        return policy.predict_direction(latents, timesteps, policy.encode(prompts))
    with soft_texts(policy.prompts, spoken, word.expand(len(spoken), -1, -1)) as coined:
        own = iter(coined)
        return policy.predict_direction(
            latents, timesteps, policy.encode([next(own) if PLACE in prompt else prompt for prompt in prompts])
        )
