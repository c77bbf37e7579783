"""An objective that keeps a tuned policy as erased as the policy that it started from.

The squared distance between two policies' noise predictions is, up to a factor that depends on the timestep only, the
Kullback-Leibler divergence between their denoising steps; DPOK (Fan et al. 2023, https://arxiv.org/abs/2305.16381)
holds a tuned model near the pretrained one by it, on all prompts. Here the model to stay near is the erased one, the
prompts are the concept's only, and every timestep counts the same, as in the losses of the erasure papers. No erasure
paper defines this loss: it stands in for a method's own loss where the method has none on noise predictions, as UCE.
"""

import math
from dataclasses import dataclass

from torch.nn import Parameter

from overpaint.policy import ClassifierFree, DiffusionPolicy
from overpaint.policy.types import PerSample

from .concept import Concept
from .protocols import ConceptBatch
from .rollout import latents_before, random_stops


@dataclass(frozen=True, kw_only=True)
class StayErasedConfig:
    """Where on the way from noise to image the two policies are compared."""

    steps: int = 50
    """Number of denoising steps of a whole image; each is as likely to be compared as any other."""

    guidance_scale: float = 3.0
    """Classifier-free guidance of the rollout that leads there. Source: 3 in ESD (Gandikota et al. 2023)."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"StayErasedConfig.steps must be at least 1, got {self.steps}")
        if not 0 <= self.guidance_scale < math.inf:
            raise ValueError(
                f"StayErasedConfig.guidance_scale must be finite and at least 0, got {self.guidance_scale}"
            )


class StayErased:
    """The squared distance of a policy's noise predictions from those it started with, on prompts of the concept.

    Zero as long as nothing was trained. The latents are the tuned policy's own: it is held where it goes, not where the
    erased one went. Predictions are compared for the prompt alone, without guidance, as ESD does.

    Args:
        config: Settings of the rollout.
    """

    def __init__(self, config: StayErasedConfig | None = None) -> None:
        self.config = config or StayErasedConfig()

    def prepare(self, policy: DiffusionPolicy, concept: Concept) -> None:
        """Checks that the policy has something to train.

        What it was before, its reference, has to be erased already: see `Erasure.apply`.

        Raises:
            ValueError: Nothing in the policy is trainable.
        """
        if not policy.trainable_parameters():
            raise ValueError(
                f"staying free of {concept.name!r} needs a policy with trainable weights, got one without; "
                "load it with lora=LoRAConfig() or train='xattn'"
            )

    def parameters(self, policy: DiffusionPolicy) -> list[Parameter]:
        """Returns everything that the policy trains."""
        return policy.trainable_parameters()

    def loss(self, policy: DiffusionPolicy, batch: ConceptBatch) -> PerSample:
        """Returns the mean squared difference of the two predictions for each sample; gradients reach the tuned policy.

        The denoising step of each sample follows from its own seed, whatever else is in the batch.
        """
        embeddings = policy.encode(batch.prompts)
        steps, guidance = self.config.steps, ClassifierFree(self.config.guidance_scale)
        stops = random_stops(batch.seeds, 0, steps - 1)
        latents = latents_before(policy, embeddings, stops, steps=steps, guidance=guidance, seeds=batch.seeds)
        timesteps = policy.timesteps(steps)[stops]
        with policy.reference():
            target = policy.predict_noise(latents, timesteps, embeddings)
        prediction = policy.predict_noise(latents, timesteps, embeddings)
        return (prediction - target).square().flatten(1).mean(dim=1)
