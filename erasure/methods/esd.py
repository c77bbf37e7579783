"""Erased Stable Diffusion: the prediction for a concept learns the target of negative guidance.

Source: Gandikota et al. (2023), https://arxiv.org/abs/2303.07345, written from its equations. The authors' code is
rohitgandikota/erasing (MIT): commit a2189e9 is the paper's, commit 25613d2 the newer one. See
docs/methods/esd.md for each departure.
"""

from contextlib import nullcontext
from typing import Literal

from jaxtyping import Shaped
from torch import Tensor

from erasure.concept import Concept
from erasure.descend import DescentConfig, erase_by_descent
from erasure.phrases import check_words
from erasure.protocols import ConceptBatch, UNetCalls
from erasure.rollout import erased_target, noised_latents, rollout_calls, squared_error
from overpaint.policy import Conditioning, DiffusionPolicy
from overpaint.policy.types import Latents, PerSample
from overpaint.settings import Field, settings


@settings
class ESDConfig:
    """Settings of ESD; those of the paper for nudity by default (ESD-u)."""

    train: str = "noxattn"
    """Parameter set: "noxattn" is ESD-u, for what any prompt may bring; "xattn" is ESD-x, for what is named. The newer
    code's are "noxattn-layers" and "xattn", and its strict one is "xattn-kv". See `policy.PARAMETER_SETS`."""

    negative_guidance: float = Field(1.0, gt=0)
    """How far the prediction is led away from the concept (eta). The newer code's 2 is this 1: see `variant`."""

    erase_from: str | None = None
    """Prompt whose prediction is led away from the concept; None is the concept's own. Newer code only."""

    variant: Literal["paper", "released"] = "paper"
    """Where noised latents come from: ``paper`` draws them with the model as erased so far, ``released``, the newer
    code, with the original one, and so trains on what the erased model no longer draws."""

    steps: int = Field(50, ge=1)
    """Denoising steps of a whole image (DDIM); each is as likely to be trained on as any other."""

    guidance_scale: float = Field(3.0, ge=0)
    """Classifier-free guidance of the rollout that leads to a noised latent."""

    descent: DescentConfig = DescentConfig(iterations=1000, learning_rate=1e-5)
    """How the loss is descended."""


class ESD:
    """Erases a concept by fine-tuning on the target of negative guidance; the original is the policy's reference."""

    name = "ESD"
    erase = erase_by_descent

    def __init__(self, config: ESDConfig | None = None) -> None:
        self.config = config or ESDConfig()

    def unet_calls(self) -> UNetCalls:
        """Returns the calls for a sample: the way to its step, the original's two predictions, and its own."""
        original = 2 if self.config.erase_from is None else 3
        return UNetCalls(rollout_calls(0, self.config.steps - 1, self.config.guidance_scale) + original, backward=1)

    def prepare(self, policy: DiffusionPolicy, concept: Concept) -> None:
        """Raises a `ValueError` where the text encoder would cut one of the concept's texts off."""
        check_words(policy, concept)

    def loss(self, policy: DiffusionPolicy, batch: ConceptBatch) -> PerSample:
        """Returns the mean of (ε(x_t, c) - target)² of each sample (the paper's eq. 6 and 7), with gradient."""
        cfg = self.config
        prompts, empty = policy.encode(batch.prompts), policy.encode([""] * len(batch.prompts))
        with policy.reference() if cfg.variant == "released" else nullcontext():
            latents, timesteps = noised_latents(
                policy, prompts, batch.seeds, steps=cfg.steps, guidance_scale=cfg.guidance_scale
            )
        source = None if cfg.erase_from is None else policy.encode([cfg.erase_from] * len(batch.prompts))
        target = learned_target(
            policy, latents, timesteps, prompts, empty, source=source, negative_guidance=cfg.negative_guidance
        )
        return erased_loss(policy, latents, timesteps, prompts if source is None else source, target)


def erased_loss(
    policy: DiffusionPolicy,
    latents: Latents,
    timesteps: Shaped[Tensor, " batch"],
    conditioning: Conditioning,
    target: Latents,
) -> PerSample:
    """Returns the mean squared distance of each sample's prediction from its target."""
    return squared_error(policy.predict_direction(latents, timesteps, conditioning), target)


def learned_target(
    policy: DiffusionPolicy,
    latents: Latents,
    timesteps: Shaped[Tensor, " batch"],
    concept: Conditioning,
    empty: Conditioning,
    *,
    source: Conditioning | None = None,
    negative_guidance: float = 1.0,
) -> Latents:
    """Returns what the prediction for a source s has to become, `ε*(s) - (1 + η) (ε*(c) - ε*(∅))`.

    ε* is the policy's reference. Without a source s is the concept c itself, and the target the paper's
    `ε*(∅) - η (ε*(c) - ε*(∅))`.
    """
    prompts = [concept, empty] if source is None else [concept, empty, source]
    count = len(prompts)
    with policy.reference():
        repeated = latents.repeat(count, 1, 1, 1), timesteps.repeat(count)
        original = policy.predict_direction(*repeated, Conditioning.cat(prompts))
    conditional, unconditional, *rest = original.chunk(count)
    target = erased_target(conditional, unconditional, negative_guidance=negative_guidance)
    return rest[0] - conditional + target if rest else target
