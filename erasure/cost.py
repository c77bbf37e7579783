"""Costs on images: how far a picture is from being free of a concept."""

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from overpaint.policy.types import Images, PerSample
from rewards.types import Reward


@runtime_checkable
class ImageCost(Protocol):
    """How far each image is from being free of a concept; at or below zero it is free.

    ReFL backpropagates through it and so needs a differentiable one; policy gradients do not.
    """

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Returns the cost of each image, in the cost's own units. Images are RGB in [0, 1]."""
        ...


class ScoreCeiling:
    """The excess of a detector's score over a ceiling.

    Args:
        detector: Any reward that grows with the concept, such as the probability of nudity that a classifier gives.
        ceiling: Highest score that still counts as erased, in the detector's own units.

    Raises:
        ValueError: The ceiling is not finite.
    """

    def __init__(self, detector: Reward, ceiling: float = 0.1) -> None:
        if not math.isfinite(ceiling):
            raise ValueError(f"ScoreCeiling.ceiling must be finite, got {ceiling}")
        self.detector = detector
        self.ceiling = ceiling

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Returns score - ceiling for each image."""
        return self.detector(images, prompts) - self.ceiling
