"""Distillation from the erased reference: an objective that keeps a tuned policy as erased as it was when it started.

The squared distance between two policies' noise predictions is, up to a factor that depends on the timestep only, the
Kullback-Leibler divergence between their denoising steps; DPOK (Fan et al. 2023, https://arxiv.org/abs/2305.16381)
holds a tuned model near the pretrained one by it, on all prompts. Here the model to stay near is the erased one, the
prompts are the concept's only, and every timestep counts the same, as in the losses of the erasure papers. No erasure
paper defines this loss: it stands in for a method's own loss where the method has none on noise predictions, as UCE.
"""

from overpaint.policy import DiffusionPolicy
from overpaint.policy.types import PerSample
from overpaint.settings import Field, settings

from .concept import Concept
from .protocols import ConceptBatch, check_trainable
from .rollout import noised_latents, squared_error


@settings
class ReferenceDistanceConfig:
    """Where on the way from noise to image the two policies are compared."""

    steps: int = Field(50, ge=1)
    """Number of denoising steps of a whole image; each is as likely to be compared as any other."""

    guidance_scale: float = Field(3.0, ge=0)
    """Classifier-free guidance of the rollout that leads there. Source: 3 in ESD (Gandikota et al. 2023)."""


class ReferenceDistance:
    """The squared distance of a policy's noise predictions from its reference's, on prompts of the concept.

    Zero as long as nothing was trained. The latents are the tuned policy's own: it is held where it goes, not where the
    erased one went. Predictions are compared for the prompt alone, without guidance, as ESD does.
    """

    def __init__(self, config: ReferenceDistanceConfig | None = None) -> None:
        self.config = config or ReferenceDistanceConfig()

    def prepare(self, policy: DiffusionPolicy, concept: Concept) -> None:
        """Raises a `ValueError` where nothing is trainable; the policy's reference has to be erased already."""
        check_trainable(policy, f"keeping {concept.name!r} erased")

    def loss(self, policy: DiffusionPolicy, batch: ConceptBatch) -> PerSample:
        """Returns the mean squared difference of the two predictions for each sample, with gradient."""
        cfg, conditioning = self.config, policy.encode(batch.prompts)
        latents, timesteps = noised_latents(
            policy, conditioning, batch.seeds, steps=cfg.steps, guidance_scale=cfg.guidance_scale
        )
        with policy.reference():
            target = policy.predict_direction(latents, timesteps, conditioning)
        return squared_error(policy.predict_direction(latents, timesteps, conditioning), target)
