"""Sizes of BLIP's two towers, and how images and prompts are prepared for them."""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from .preprocess import CLIP_MEAN, CLIP_STD

Config = TypeVar("Config", bound="BlipConfig")


@dataclass(frozen=True, kw_only=True)
class BlipConfig:
    """Sizes of BLIP large's towers by default, which ImageReward and the BLIP score share.

    Numbers of attention heads cannot be read off a checkpoint, and a wrong one loads without an error, so they belong
    to the checkpoint as much as its weights do.
    """

    image_size: int = 224
    """Side of the square that the vision tower takes, in pixels."""
    patch_size: int = 16
    """Side of one patch, in pixels; divides the image size."""
    vision_hidden_size: int = 1024
    """Width of the vision tower (ViT-L)."""
    vision_layers: int = 24
    """Number of blocks of the vision tower."""
    vision_heads: int = 16
    """Number of attention heads of the vision tower; divides its width."""
    vision_intermediate_size: int = 4096
    """Width of the hidden layer in each block of the vision tower."""
    vision_layer_norm_eps: float = 1e-6
    """Added to the variance in the vision tower's layer norms (timm's value, not transformers' 1e-5)."""

    vocab_size: int = 30524
    """Number of token ids, `[DEC]` and `[ENC]` included."""
    hidden_size: int = 768
    """Width of the text encoder."""
    text_layers: int = 12
    """Number of layers of the text encoder; each can also attend to the image."""
    text_heads: int = 12
    """Number of attention heads of the text encoder (med_config.json; transformers has 8); divides its width."""
    text_intermediate_size: int = 3072
    """Width of the hidden layer in each layer of the text encoder."""
    text_layer_norm_eps: float = 1e-12
    """Added to the variance in the text encoder's layer norms (med_config.json)."""
    max_positions: int = 512
    """Number of learned positions of the text encoder."""
    max_length: int = 35
    """Number of tokens that a prompt is padded or cut to, `[CLS]` and `[SEP]` included."""

    image_mean: tuple[float, float, float] = CLIP_MEAN
    """Subtracted from each colour channel, in [0, 1]."""
    image_std: tuple[float, float, float] = CLIP_STD
    """Divides each colour channel."""
    antialias: bool = True
    """Whether tensors are antialiased when they shrink (torchvision >= 0.17; older ones did not). PIL always does."""
    initializer_range: float = 0.02
    """Standard deviation of fresh weights in both towers. A small network learns with 0.08 and hardly with 0.02."""

    def __post_init__(self) -> None:
        """Checks every field by itself and the ones that belong together."""
        for name in _COUNTS:
            check_count(name, getattr(self, name))
        for name in ("vision_layer_norm_eps", "text_layer_norm_eps", "initializer_range"):
            check_positive(name, getattr(self, name))
        for name in ("image_mean", "image_std"):
            if len(getattr(self, name)) != 3:
                raise ValueError(f"{name} must have one number for each of 3 channels, got {getattr(self, name)!r}")
        for value in self.image_std:
            check_positive("each of image_std", value)
        for whole, part in _DIVISIBLE:
            if getattr(self, whole) % getattr(self, part):
                got = f"{getattr(self, part)} and {getattr(self, whole)}"
                raise ValueError(f"{part} must divide {whole}, got {got}")
        if not 2 <= self.max_length <= self.max_positions:
            raise ValueError(f"max_length must be in 2..max_positions={self.max_positions}, got {self.max_length}")

    @classmethod
    def from_file(cls: type[Config], path: str | Path) -> Config:
        """Reads what `save` wrote."""
        read = json.loads(Path(path).read_text(encoding="utf-8"))
        unknown = sorted(set(read) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"{path} must hold fields of {cls.__name__} only, got {unknown}")
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in read.items()
        }
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Writes the fields as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def check_count(name: str, value: object) -> None:
    """Checks that a field is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def check_positive(name: str, value: float) -> None:
    """Checks that a field is a finite number above zero."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive number, got {value!r}")


_COUNTS = (
    "image_size",
    "patch_size",
    "vision_hidden_size",
    "vision_layers",
    "vision_heads",
    "vision_intermediate_size",
    "vocab_size",
    "hidden_size",
    "text_layers",
    "text_heads",
    "text_intermediate_size",
    "max_positions",
    "max_length",
)
_DIVISIBLE = (
    ("image_size", "patch_size"),
    ("vision_hidden_size", "vision_heads"),
    ("hidden_size", "text_heads"),
)
