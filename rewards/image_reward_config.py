"""Sizes and constants of an ImageReward network."""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .preprocess import CLIP_MEAN, CLIP_STD


@dataclass(frozen=True, kw_only=True)
class ImageRewardConfig:
    """Sizes and constants of an ImageReward network; those of the official checkpoint by default.

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
    """Width of the text encoder, and of the feature that the head reads."""
    text_layers: int = 12
    """Number of layers of the text encoder; each also attends to the image."""
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

    head_widths: tuple[int, ...] = (1024, 128, 64, 16)
    """Widths of the head's hidden layers, which are linear as in the released code."""
    mean: float = 0.16717362830052426
    """Mean of the head's output over the authors' validation data; subtracted from it."""
    std: float = 1.0333394966054072
    """Standard deviation of the head's output over the same data; divides it."""

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
        _check_numbers(self)
        for whole, part in _DIVISIBLE:
            if getattr(self, whole) % getattr(self, part):
                got = f"{getattr(self, part)} and {getattr(self, whole)}"
                raise ValueError(f"{part} must divide {whole}, got {got}")
        if not 2 <= self.max_length <= self.max_positions:
            raise ValueError(f"max_length must be in 2..max_positions={self.max_positions}, got {self.max_length}")

    @classmethod
    def from_file(cls, path: str | Path) -> "ImageRewardConfig":
        """Reads what `save` wrote."""
        read = json.loads(Path(path).read_text(encoding="utf-8"))
        unknown = sorted(set(read) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"{path} must hold fields of ImageRewardConfig only, got {unknown}")
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in read.items()
        }
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Writes the fields as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def _check_numbers(config: ImageRewardConfig) -> None:
    for name in _COUNTS:
        _check_count(name, getattr(config, name))
    for width in config.head_widths:
        _check_count("each of head_widths", width)
    for name in ("vision_layer_norm_eps", "text_layer_norm_eps", "std", "initializer_range"):
        _check_positive(name, getattr(config, name))
    if not math.isfinite(config.mean):
        raise ValueError(f"mean must be a finite number, got {config.mean!r}")
    for name in ("image_mean", "image_std"):
        if len(getattr(config, name)) != 3:
            raise ValueError(f"{name} must have one number for each of 3 channels, got {getattr(config, name)!r}")
    for value in config.image_std:
        _check_positive("each of image_std", value)


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _check_positive(name: str, value: float) -> None:
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
