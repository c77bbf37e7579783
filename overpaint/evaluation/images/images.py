"""Drawn images as bytes: a quarter of the memory of floats, and exactly what a PNG holds."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import UInt8
from torch import Tensor

from overpaint.policy.types import Images

from .plan import DrawConfig, PlannedImage

Pixels = UInt8[Tensor, "batch 3 H W"]
"""RGB in 0..255."""


@runtime_checkable
class ImageSource(Protocol):
    """The images that one model drew, in memory or in a folder."""

    @property
    def model(self) -> str:
        """The name of the model."""
        ...

    @property
    def planned(self) -> tuple[PlannedImage, ...]:
        """What each image shows, in order."""
        ...

    @property
    def config(self) -> DrawConfig:
        """How the images were drawn."""
        ...

    def pixels(self, positions: Sequence[int]) -> Pixels:
        """Returns the images at these places of `planned`."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class DrawnImages:
    """Images of one model in memory."""

    model: str
    planned: tuple[PlannedImage, ...]
    config: DrawConfig
    stack: Pixels = field(repr=False)
    """All images, in the order of `planned`."""

    def __post_init__(self) -> None:
        if len(self.planned) != len(self.stack):
            raise ValueError(f"stack must hold {len(self.planned)} images, one for each planned, got {len(self.stack)}")

    def pixels(self, positions: Sequence[int]) -> Pixels:
        """Returns the images at these places of `planned`."""
        return self.stack[list(positions)]


def to_pixels(images: Images) -> Pixels:
    """Rounds RGB in [0, 1] to bytes, on the CPU.

    Raises:
        ValueError: An image holds a value that is not finite, which no byte can show.
    """
    if not torch.isfinite(images).all():
        bad = [k for k, image in enumerate(images) if not torch.isfinite(image).all()]
        raise ValueError(f"images must be finite, got NaN or infinity in image {bad[0]} of {len(images)}")
    return (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def to_images(pixels: Pixels) -> Images:
    """Returns bytes as RGB in [0, 1], float32."""
    return pixels.float() / 255
