"""What a trainer holds at or below zero while it erases: that the pictures of other prompts stay good, or the same.

The constraint of the form "erase, keep quality": minimise the erasure's cost subject to E[reward] >= r0 - slack on
prompts to be retained. Its rival keeps the denoising steps near the original model's, whatever that is worth to people:
Khalafi et al. (2026), https://arxiv.org/abs/2605.30825, minimise that divergence.
"""

from typing import Any

from overpaint.policy.types import PerSample
from overpaint.settings import NonNegative, Positive

from .controllers import WeightController
from .lagrangian import Lagrangian


class RewardFloor:
    """A mean reward of retained prompts that is not to be fallen below.

    The floor is the original model's reward less a slack, on the same prompts and from the same seeds, so that a batch
    of hard prompts is no violation; or a number.

    Args:
        slack: How much reward may be given up, at least 0; only without a `floor`.
        scale: Reward that a violation of 1 stands for, above 0.
        lagrangian: What weighs the violation; by default dual ascent as `LagrangianConfig` has it.
        floor: Lowest mean reward, in place of the original model's; finite.
    """

    def __init__(
        self,
        slack: NonNegative = 0.0,
        scale: Positive = 1.0,
        lagrangian: WeightController | None = None,
        floor: float | None = None,
    ) -> None:
        if floor is not None and slack:
            raise ValueError(f"RewardFloor.slack must be 0 with floor={floor}, got {slack}")
        self.slack, self.scale, self.floor = float(slack), float(scale), floor
        self.lagrangian = lagrangian or Lagrangian()

    @property
    def paired(self) -> bool:
        """Whether the reference policy's rewards of the same prompts and seeds are needed."""
        return self.floor is None

    def violation(self, rewards: PerSample, reference_rewards: PerSample | None = None) -> PerSample:
        """Returns (floor - reward) / scale for each sample; gradients flow through the rewards alone.

        Args:
            rewards: The policy's.
            reference_rewards: The reference policy's on the same prompts and seeds; only where `paired`.

        Raises:
            ValueError: They are missing.
        """
        if self.floor is not None:
            return (self.floor - rewards) / self.scale
        if reference_rewards is None:
            raise ValueError("reference_rewards must be given where RewardFloor.floor is None, got None")
        return (reference_rewards.detach() - self.slack - rewards) / self.scale

    def description(self) -> dict[str, Any]:
        """Returns what is constrained and how, for the record of a run."""
        return {
            "kind": "reward floor",
            "slack": self.slack,
            "scale": self.scale,
            "floor": self.floor,
            "lagrangian": self.lagrangian.description(),
        }


class ReferenceDivergence:
    """A mean divergence from the reference policy on retained prompts that is not to be exceeded.

    Args:
        ceiling: Highest Kullback-Leibler divergence of a denoising step from the reference policy's, mean over latent
            elements, above 0.
        lagrangian: What weighs the violation; by default dual ascent as `LagrangianConfig` has it.
    """

    def __init__(self, ceiling: Positive = 1e-3, lagrangian: WeightController | None = None) -> None:
        self.ceiling = float(ceiling)
        self.lagrangian = lagrangian or Lagrangian()

    def violation(self, divergences: PerSample) -> PerSample:
        """Returns divergence / ceiling - 1 for each sample; gradients flow."""
        return divergences / self.ceiling - 1

    def description(self) -> dict[str, Any]:
        """Returns what is constrained and how, for the record of a run."""
        return {
            "kind": "divergence from the reference",
            "ceiling": self.ceiling,
            "lagrangian": self.lagrangian.description(),
        }


QualityConstraint = RewardFloor | ReferenceDivergence
"""What a trainer takes to keep the pictures of other prompts good while it erases."""
