"""Sizes and constants of an ImageReward network."""

import math
from dataclasses import dataclass

from .blip_config import BlipConfig, check_count, check_positive


@dataclass(frozen=True, kw_only=True)
class ImageRewardConfig(BlipConfig):
    """Sizes of the two towers, and of the head that reads them; those of the official checkpoint by default."""

    head_widths: tuple[int, ...] = (1024, 128, 64, 16)
    """Widths of the head's hidden layers, which are linear as in the released code."""
    mean: float = 0.16717362830052426
    """Mean of the head's output over the authors' validation data; subtracted from it."""
    std: float = 1.0333394966054072
    """Standard deviation of the head's output over the same data; divides it."""

    def __post_init__(self) -> None:
        """Checks the towers' fields and the head's."""
        super().__post_init__()
        for width in self.head_widths:
            check_count("each of head_widths", width)
        if not math.isfinite(self.mean):
            raise ValueError(f"mean must be a finite number, got {self.mean!r}")
        check_positive("std", self.std)
