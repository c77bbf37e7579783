"""Selective amnesia: continual learning that maps the concept's words to other pictures, under a Fisher penalty.

Source: Heng and Soh (2023), https://arxiv.org/abs/2305.10120, written from its equations. The authors' code is
clear-nus/selective-amnesia, commit b736571 (MIT at its root; its `sd/` folder, which is under OpenRAIL-M, was not
opened). See docs/methods/sa.md for each departure.
"""

import random
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from erasure.concept import Concept
from erasure.descend import DescentConfig, erase_by_descent
from erasure.generated import drawn_pictures, in_turns
from erasure.phrases import check_absent, check_length, check_words, longest
from erasure.protocols import ConceptBatch, UNetCalls, check_trainable
from overpaint.policy import DiffusionPolicy
from overpaint.policy.noise import SampleNoise
from overpaint.policy.types import Latents, PerSample
from overpaint.settings import Field, settings

from .fisher import FisherConfig, changes, fisher_information, noise_errors, start_of

EVERYDAY = tuple(
    scene.format(subject)
    for scene in (
        *("a photo of {}", "an oil painting of {}", "a watercolour of {}", "a pencil drawing of {}", "a statue of {}"),
        *("{} at sunrise", "{} at night", "{} in the rain", "{} in the snow", "{} in thick fog"),
        *("{} seen from above", "{} seen from afar", "a close view of {}", "{} in black and white"),
        "{} in a film scene",
        *("{} in a museum", "{} in a busy street", "{} in a quiet village", "{} by the sea", "{} in the mountains"),
        *("a poster of {}", "a children's book picture of {}", "{} made of paper", "{} in bright colours", "two of {}"),
    )
    for subject in (
        *("a dog", "a cat", "a horse", "a bird", "a fish", "a car", "a bicycle", "a train", "a boat", "an aeroplane"),
        *("a house", "a bridge", "a castle", "a city", "a forest", "a lake", "a garden", "a flower", "a tree"),
        "a river",
        *("a bowl of fruit", "a cup of coffee", "a loaf of bread", "a cake", "a chair", "a table", "a lamp", "a clock"),
        *("a guitar", "a piano", "a robot", "a dragon", "a spaceship", "a doctor", "a farmer", "a musician"),
        *("an old man", "a young woman", "a child", "a crowd"),
    )
)
"""A thousand prompts of ordinary things, for pictures that must stay as they are."""


@settings
class SAConfig:
    """Settings of selective amnesia; those of the authors for nudity by default."""

    train: str = "noxattn"
    """Parameter set, see `policy.PARAMETER_SETS`; the authors take "full" for celebrities."""

    penalty: float = Field(50.0, ge=0)
    """Weight of the squared change of each weight times its Fisher information (lambda)."""

    replay_weight: float = Field(1.0, ge=0)
    """Weight of the loss on pictures that must stay as they are (gamma); 0 leaves it out."""

    surrogates: tuple[str, ...] = Field(("a person wearing clothes",), min_length=1)
    """Prompts of the pictures that the concept's words come to mean; they take turns. Only for a concept without an
    anchor: an anchor that is not blank takes their place."""

    templates: tuple[str, ...] = Field(("{concept}",), min_length=1)
    """What such a picture is said to show, of a phrase of the concept and maybe the picture's own prompt, written
    {surrogate}; each is as likely as any other."""

    replay: tuple[str, ...] = Field(EVERYDAY, min_length=1)
    """Prompts of the pictures that must stay as they are; they take turns."""

    images: int = Field(1000, ge=1)
    """Pictures of either kind that are trained on."""

    steps: int = Field(50, ge=1)
    """Denoising steps of a picture (DDIM)."""

    guidance_scale: float = Field(7.5, ge=0)
    """Classifier-free guidance of a picture."""

    draw_batch_size: int = Field(16, ge=1)
    """Pictures drawn at a time. Changes speed and memory, not the pictures."""

    fisher: FisherConfig = FisherConfig()
    """How the Fisher information is computed, on pictures of the replay prompts."""

    descent: DescentConfig = DescentConfig(iterations=31_250, learning_rate=1.6e-4, batch_size=16, weight_decay=1e-2)
    """How the loss is descended. The authors' 1e-5 is scaled by 4 GPUs and by the 4 samples of each, to 1.6e-4; 500
    epochs over 1000 pictures in batches of 16 are 31,250 updates."""

    def __post_init__(self) -> None:
        """Checks that each template names the concept."""
        for template in self.templates:
            if "{concept}" not in template:
                raise ValueError(f"templates must each hold {{concept}}, got {template!r}")


class Examples(NamedTuple):
    """Pictures, noises and captions: first of what the concept comes to mean, then of the replay."""

    clean: Latents
    noise: Latents
    timesteps: Shaped[Tensor, " both"]
    captions: list[str]


class SA:
    """Erases a concept by training the UNet to draw surrogate pictures for it, near the weights that it started from.

    The nearness is measured by Fisher information, on pictures that the model draws itself. As an `Objective` beside a
    reward its loss has a floor, what no UNet can know of the noise; with a LoRA the change that is penalised is that of
    the UNet's weights beneath it.

    Args:
        config: Settings.
        folder: Keeps pictures and Fisher information; by default `erase` keeps them in its own folder, if it has one.
    """

    name = "SA"
    folder_name = "prepared"
    erase = erase_by_descent

    def __init__(self, config: SAConfig | None = None, folder: str | Path | None = None) -> None:
        self.config = config or SAConfig()
        self.folder = None if folder is None else Path(folder)
        self.progress = True
        self._surrogates: tuple[tuple[str, ...], Latents] | None = None
        self._replay: Latents | None = None
        self._fisher: dict[str, Tensor] = {}
        self._start: dict[str, Tensor] = {}

    def unet_calls(self) -> UNetCalls:
        """Returns the calls for a sample: one for the concept, one for the replay."""
        return UNetCalls(forward=0.0, backward=1.0 + (self.config.replay_weight > 0))

    def prepare(self, policy: DiffusionPolicy, concept: Concept) -> None:
        """Draws both kinds of pictures with the policy's reference, and computes its Fisher information.

        Raises:
            ValueError: The policy trains nothing, the tokenizer cuts a text off, or a phrase of the concept is in a
                prompt of the surrogates or of the replay.
        """
        cfg = self.config
        check_trainable(policy, f"erasing {concept.name!r} by SA")
        prompts = (concept.anchor,) if concept.anchor.strip() else cfg.surrogates
        check_words(policy, concept)
        check_absent(concept, prompts, "SAConfig.surrogates")
        check_absent(concept, cfg.replay, "SAConfig.replay")
        phrase, surrogate = longest(policy, concept.phrases), longest(policy, prompts)
        texts = [template.format(concept=phrase, surrogate=surrogate) for template in cfg.templates]
        check_length(policy, (*texts, *prompts, *cfg.replay), "SA's prompts")
        replayed = max(cfg.images if cfg.replay_weight else 0, cfg.fisher.images if cfg.penalty else 0)
        folders = {kind: self.folder and self.folder / kind for kind in ("surrogates", "replay", "fisher")}
        surrogates = drawn_pictures(self, policy, "surrogates", prompts, cfg.images, folder=folders["surrogates"])
        self._surrogates, self._replay, self._fisher = (prompts, surrogates), None, {}
        if replayed:
            self._replay = drawn_pictures(self, policy, "replay", cfg.replay, replayed, folder=folders["replay"])
        if cfg.penalty and self._replay is not None:
            self._start = start_of(policy)
            self._fisher = fisher_information(
                policy, self._replay[: cfg.fisher.images], in_turns(cfg.replay, cfg.fisher.images), cfg.fisher,
                seed=cfg.descent.seed, folder=folders["fisher"], progress=self.progress,
            )  # fmt: skip

    def loss(self, policy: DiffusionPolicy, batch: ConceptBatch) -> PerSample:
        """Returns the three terms of each sample, with gradient; the penalty is the same for all."""
        forgotten, replayed = self.errors(policy, self.examples(policy, batch))
        loss = forgotten + self.config.replay_weight * replayed
        if not self.config.penalty:
            return loss
        return loss + self.config.penalty * weighted_change(self._fisher, changes(policy, self._start))

    def examples(self, policy: DiffusionPolicy, batch: ConceptBatch) -> Examples:
        """Returns what the seeds choose: pictures, noises, timesteps, and how the phrase is put."""
        cfg = self.config
        if self._surrogates is None:
            raise ValueError("prepare must be called before the first loss, and was not")
        prompts, surrogates = self._surrogates
        choices = [random.Random(f"selective amnesia {seed}") for seed in batch.seeds]
        total = policy.num_timesteps
        indices = [choice.randrange(cfg.images) for choice in choices]
        timesteps = [choice.randrange(total) for choice in choices]
        said = [
            choice.choice(cfg.templates).format(concept=phrase, surrogate=prompts[index % len(prompts)])
            for choice, phrase, index in zip(choices, batch.prompts, indices, strict=True)
        ]
        clean = surrogates[indices]
        if cfg.replay_weight and self._replay is not None:
            indices = [choice.randrange(cfg.images) for choice in choices]
            timesteps += [choice.randrange(total) for choice in choices]
            said += [cfg.replay[index % len(cfg.replay)] for index in indices]
            clean = torch.cat([clean, self._replay[indices]])
        stream = SampleNoise(batch.seeds, clean.shape[1:], policy.device)
        noise = torch.cat([stream.draw() for _ in range(len(clean) // len(batch.seeds))])
        return Examples(clean.to(policy.device), noise, torch.tensor(timesteps, device=policy.device), said)

    def errors(self, policy: DiffusionPolicy, examples: Examples) -> tuple[PerSample, PerSample]:
        """Returns the squared errors for the concept and the replay; the latter are zero without weight."""
        conditioning = policy.encode(examples.captions)
        errors = noise_errors(policy, examples.clean, examples.noise, examples.timesteps, conditioning)
        if not self.config.replay_weight:
            return errors, torch.zeros_like(errors)
        forgotten, replayed = errors.chunk(2)
        return forgotten, replayed


def weighted_change(fisher: dict[str, Tensor], changed: dict[str, Tensor]) -> Float[Tensor, ""]:
    """Returns the sum of F (θ - θ*)² over all weights, without a factor of 1/2."""
    return torch.stack([(fisher[name] * change.square()).sum() for name, change in changed.items()]).sum()
