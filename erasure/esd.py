"""Erased Stable Diffusion: the prediction for a concept is led away from where the concept would lead it.

Source: Gandikota et al. (2023), https://arxiv.org/abs/2303.07345, written from its equations. The authors' code is
rohitgandikota/erasing (MIT): commit a2189e9 is the paper's, commit 25613d2 the newer one. See docs/erasure.md for each
departure.
"""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import Parameter

from overpaint.policy import ClassifierFree, DiffusionPolicy
from overpaint.policy.types import Embeddings, Latents, PerSample

from .concept import Concept, check_words
from .descend import DescentConfig, descended
from .erased import Erasure
from .estimate import UNetCalls
from .protocols import ConceptBatch
from .rollout import latents_before, random_stops


@dataclass(frozen=True, kw_only=True)
class ESDConfig:
    """Settings of ESD; those of the paper for nudity by default (ESD-u)."""

    train: str = "noxattn"
    """Parameter set: "noxattn" is ESD-u, for what any prompt may bring; "xattn" is ESD-x, for what is named. The newer
    code's are "noxattn-layers" and "xattn", and its strict one is "xattn-kv". See `policy.PARAMETER_SETS`."""

    negative_guidance: float = 1.0
    """How far the prediction is led away from the concept (eta). The newer code's 2 is this 1: see `variant`."""

    erase_from: str | None = None
    """Prompt whose prediction is led away from the concept; None is the concept's own. Newer code only."""

    variant: Literal["paper", "released"] = "paper"
    """Where noised latents come from: ``paper`` draws them with the model as erased so far, ``released``, the newer
    code, with the original one, and so trains on what the erased model no longer draws."""

    steps: int = 50
    """Denoising steps of a whole image (DDIM); each is as likely to be trained on as any other."""

    guidance_scale: float = 3.0
    """Classifier-free guidance of the rollout that leads to a noised latent."""

    descent: DescentConfig = field(default_factory=lambda: DescentConfig(iterations=1000, learning_rate=1e-5))
    """How the loss is descended."""

    @classmethod
    def tiny_world(cls) -> "ESDConfig":
        """Returns the settings for the tiny world's stripes: ESD-x, as few updates as take them away."""
        return cls(train="xattn", steps=10, descent=DescentConfig(iterations=60, learning_rate=3e-4, batch_size=8))

    def __post_init__(self) -> None:
        if self.variant not in ("paper", "released"):
            raise ValueError(f"ESDConfig.variant must be 'paper' or 'released', got {self.variant!r}")
        if not 0 < self.negative_guidance < math.inf:
            raise ValueError(f"ESDConfig.negative_guidance must be positive, got {self.negative_guidance}")
        if self.steps < 1:
            raise ValueError(f"ESDConfig.steps must be at least 1, got {self.steps}")
        if not 0 <= self.guidance_scale < math.inf:
            raise ValueError(f"ESDConfig.guidance_scale must be finite and at least 0, got {self.guidance_scale}")


class ESD:
    """Erases a concept by teaching the UNet, asked for the concept, to predict the opposite.

    The original model is the policy's reference, so that no second UNet is kept.

    Args:
        config: Settings.
    """

    name = "ESD"

    def __init__(self, config: ESDConfig | None = None) -> None:
        self.config = config or ESDConfig()

    def erase(
        self,
        policy: DiffusionPolicy,
        concept: Concept,
        *,
        output_dir: str | Path | None = None,
        resume: bool = False,
        progress: bool = True,
    ) -> Erasure:
        """Trains a copy of the UNet. The policy is not changed: see `Erasure.apply`.

        Args:
            policy: Whose model is erased; a LoRA counts as part of it.
            concept: Each update takes some of its phrases.
            output_dir: Keeps metrics and checkpoints; None keeps nothing.
            resume: Go on with an interrupted run in the same folder.
            progress: Whether a progress bar is shown.

        Raises:
            ValueError: As `descend`.
        """
        student = policy.student_copy(self.config.train)
        change = descended(
            self, student, concept, self.config.descent,
            output_dir=output_dir, resume=resume, progress=progress, settings={"esd": self.config},
        )  # fmt: skip
        return Erasure.of(policy, self.name, asdict(self.config), concept, change)

    def descent(self) -> DescentConfig:
        """Returns how it trains."""
        return self.config.descent

    def unet_calls(self) -> UNetCalls:
        """Returns the calls for a sample: the way to its step, the original's two predictions, and its own."""
        branches = 2 if self.config.guidance_scale != 1 else 1
        asked = 2 if self.config.erase_from is None else 3
        return UNetCalls(forward=branches * (self.config.steps - 1) / 2 + asked, backward=1)

    def prepare(self, policy: DiffusionPolicy, concept: Concept) -> None:
        """Checks the concept's words.

        Raises:
            ValueError: The tokenizer cuts one off.
        """
        check_words(policy, concept)

    def parameters(self, policy: DiffusionPolicy) -> list[Parameter]:
        """Returns everything that the policy trains."""
        return policy.trainable_parameters()

    def loss(self, policy: DiffusionPolicy, batch: ConceptBatch) -> PerSample:
        """Returns the mean of (ε(x_t, c) - target)² of each sample (the paper's eq. 6 and 7), with gradient."""
        cfg = self.config
        prompts, empty = policy.encode(batch.prompts), policy.encode([""] * len(batch.prompts))
        stops = random_stops(batch.seeds, 0, cfg.steps - 1)
        guidance = ClassifierFree(cfg.guidance_scale)
        timesteps = policy.timesteps(cfg.steps)[stops]

        def rolled() -> Latents:
            return latents_before(policy, prompts, stops, steps=cfg.steps, guidance=guidance, seeds=batch.seeds)

        latents = rolled() if cfg.variant == "paper" else None
        if latents is None:
            with policy.reference():
                latents = rolled()
        source = None if cfg.erase_from is None else policy.encode([cfg.erase_from] * len(batch.prompts))
        target = learned_target(
            policy, latents, timesteps, prompts, empty, source=source, negative_guidance=cfg.negative_guidance
        )
        return erased_loss(policy, latents, timesteps, prompts if source is None else source, target)


def erased_loss(
    policy: DiffusionPolicy,
    latents: Latents,
    timesteps: Int[Tensor, " batch"],
    asked: Embeddings,
    target: Latents,
) -> PerSample:
    """Returns the mean squared distance of each sample's prediction, for what is asked, from its target."""
    prediction = policy.predict_noise(latents, timesteps, asked)
    return (prediction - target).square().flatten(1).mean(dim=1)


def learned_target(
    policy: DiffusionPolicy,
    latents: Latents,
    timesteps: Int[Tensor, " batch"],
    concept: Embeddings,
    empty: Embeddings,
    *,
    source: Embeddings | None = None,
    negative_guidance: float = 1.0,
) -> Latents:
    """Returns what the prediction for a source s has to become, `ε*(s) - (1 + η) (ε*(c) - ε*(∅))`.

    ε* is the policy's reference. Without a source s is the concept c itself, and the target the paper's
    `ε*(∅) - η (ε*(c) - ε*(∅))`.

    Args:
        policy: Its reference predicts.
        latents: Noised latents.
        timesteps: The scheduler's integer of each sample.
        concept: Embeddings of the concept.
        empty: Embeddings of the empty prompt.
        source: Embeddings of what is led away from the concept, if not the concept.
        negative_guidance: How far (η).
    """
    asked = [concept, empty] if source is None else [concept, empty, source]
    count = len(asked)
    with policy.reference():
        original = policy.predict_noise(latents.repeat(count, 1, 1, 1), timesteps.repeat(count), torch.cat(asked))
    conditional, unconditional, *rest = original.chunk(count)
    target = erased_target(conditional, unconditional, negative_guidance=negative_guidance)
    return rest[0] - conditional + target if rest else target


def erased_target(conditional: Latents, unconditional: Latents, *, negative_guidance: float) -> Latents:
    """Returns `ε(∅) - η (ε(c) - ε(∅))`: away from the concept, by the original model's own predictions."""
    return unconditional - negative_guidance * (conditional - unconditional)
