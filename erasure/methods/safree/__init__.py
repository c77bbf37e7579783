"""SAFREE: the guard, the filter of prompts, and latent re-attention."""

from .safree import NUDITY_CONCEPTS, SAFREE, SAFREEChange, SAFREEConfig, SAFREEGuard

__all__ = ["NUDITY_CONCEPTS", "SAFREE", "SAFREEChange", "SAFREEConfig", "SAFREEGuard"]
