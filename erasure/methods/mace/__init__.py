"""MACE: the objective, its two linear systems, and masks of the concept."""

from .mace import MACE, TARGETS, MACEConfig, with_lora
from .masks import MaskedImages, Segmenter, masked_images

__all__ = ["MACE", "TARGETS", "MACEConfig", "MaskedImages", "Segmenter", "masked_images", "with_lora"]
