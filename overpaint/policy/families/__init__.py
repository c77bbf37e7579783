"""Families of models: what each has of its own, in one file each, and which one a pipeline is of."""

from .family import Family
from .flux import Flux
from .sd import StableDiffusion
from .sd3 import StableDiffusion3
from .sdxl import StableDiffusionXL

__all__ = [
    "FAMILIES",
    "Family",
    "Flux",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionXL",
    "family_named",
    "supported",
]

FAMILIES: tuple[type[Family], ...] = (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux)
"""All families."""


def family_named(pipeline: object) -> type[Family] | None:
    """Returns the family of a class of pipelines by its name, if it is one of a known family."""
    return next((family for family in FAMILIES if pipeline in family.pipelines), None)


def supported() -> str:
    """Returns the names of the pipelines that a policy can be loaded from."""
    return ", ".join(family.pipelines[0] for family in FAMILIES)
