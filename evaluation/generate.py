"""Draw the planned images with a policy: into memory, or into a folder that an interrupted run fills up later."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from tqdm import tqdm

from policy.guidance import ClassifierFree, Guidance
from policy.types import Images

from .files import is_whole, write_png
from .folder import MANIFEST, check_manifest, check_model_name, write_manifest
from .images import DrawnImages, Pixels, to_pixels
from .plan import DrawConfig, PlannedImage
from .processes import process_rank_and_count, shard


@runtime_checkable
class Drawable(Protocol):
    """Whatever draws images from prompts; `policy.DiffusionPolicy` does."""

    def draw(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        steps: int,
        guidance: Guidance,
        eta: float,
        batch_size: int,
    ) -> Images:
        """Draws one image for each prompt from the noise of its seed."""
        ...


def draw(
    policy: Drawable,
    planned: Sequence[PlannedImage],
    config: DrawConfig | None = None,
    *,
    model: str,
    batch_size: int = 16,
    progress: bool = True,
) -> DrawnImages:
    """Draws images into memory.

    Args:
        policy: What draws, in its present state.
        planned: What is drawn; under several processes, this process's `shard` of the plan.
        config: How images are drawn.
        model: What this state of the policy is called in tables, such as `before` or `erased`.
        batch_size: Images drawn at a time. Changes speed and memory, not the images.
        progress: Whether a progress bar is shown.

    Raises:
        ValueError: Nothing is planned, or an image came out with values that are not finite.
    """
    config = config or DrawConfig()
    if not planned:
        raise ValueError("planned must hold at least one image, got none")
    batches = []
    with tqdm(total=len(planned), desc=f"drawing {model}", unit="image", disable=not progress) as bar:
        for start in range(0, len(planned), batch_size):
            batch = planned[start : start + batch_size]
            batches.append(_draw_batch(policy, batch, config))
            bar.update(len(batch))
    return DrawnImages(model=model, planned=tuple(planned), config=config, stack=torch.cat(batches))


def generate(
    policy: Drawable,
    planned: Sequence[PlannedImage],
    root: Path | str,
    config: DrawConfig | None = None,
    *,
    model: str,
    batch_size: int = 16,
    rank: int | None = None,
    world_size: int | None = None,
    progress: bool = True,
) -> int:
    """Draws this process's part of the images into a folder, those that are not there yet.

    Every file is written whole or not at all, so that a run killed at any moment is continued by
    the same call. What is there is trusted to come from the same weights: draw other weights
    under another `model`.

    Args:
        policy: What draws, in its present state.
        planned: What is drawn by all processes together.
        root: The folder of all models compared.
        config: How images are drawn.
        model: Name of the folder within `root`.
        batch_size: Images drawn at a time.
        rank: Which process this is; asked of accelerate when not given.
        world_size: How many processes there are; asked of accelerate when not given.
        progress: Whether the first process shows a progress bar.

    Returns:
        How many images this process drew.

    Raises:
        ValueError: The folder holds another run, the name of the model cannot be that of a folder,
            or the process is not one of the processes.
    """
    config = config or DrawConfig()
    root = Path(root)
    check_model_name(model)
    if not planned:
        raise ValueError("planned must hold at least one image, got none")
    if (rank is None) != (world_size is None):
        raise ValueError(f"rank and world_size must be given both or neither, got {rank} and {world_size}")
    if rank is None or world_size is None:
        rank, world_size = process_rank_and_count()
    mine = shard(planned, rank, world_size)
    if rank == 0:
        write_manifest(root, planned, config)
    elif (root / MANIFEST).exists():
        check_manifest(root, planned, config)

    folder = root / model
    missing = [image for image in mine if not is_whole(folder / image.file_name)]
    with tqdm(
        total=len(mine),
        initial=len(mine) - len(missing),
        desc=f"drawing {model}",
        unit="image",
        disable=not progress or rank > 0,
    ) as bar:
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            for image, pixels in zip(batch, _draw_batch(policy, batch, config), strict=True):
                write_png(pixels, folder / image.file_name)
            bar.update(len(batch))
    return len(missing)


def _draw_batch(policy: Drawable, batch: Sequence[PlannedImage], config: DrawConfig) -> Pixels:
    # Not inference mode: embeddings that the policy caches here may later be part of a training graph.
    with torch.no_grad():
        images = policy.draw(
            [image.prompt for image in batch],
            seeds=[image.seed for image in batch],
            steps=config.steps,
            guidance=ClassifierFree(config.guidance_scale),
            eta=config.eta,
            batch_size=len(batch),
        )
    if len(images) != len(batch):
        raise ValueError(f"policy must draw one image for each of {len(batch)} prompts, got {len(images)}")
    return to_pixels(images)
