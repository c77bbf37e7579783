"""Draws the planned images: into memory, or into a folder that an interrupted run fills up later."""

import hashlib
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch

from overpaint.policy.atomic import forget_partial, write_bytes
from overpaint.policy.guidance import ClassifierFree
from overpaint.settings import Count, Index
from overpaint.training import process_state
from overpaint.training.logging import progress_bar

from .drawable import RECORD, Drawable, model_record, write_record
from .files import (
    MANIFEST,
    ROWS,
    DrawnImages,
    ImageRow,
    Pixels,
    append_row,
    check_model_name,
    drawn_row,
    finish_rows,
    known_rows,
    png_bytes,
    to_pixels,
    write_manifest,
)
from .plan import DrawConfig, PlannedImage, batched_places, batches_of, check_plan, check_rank

LONG = 600.0
"""Seconds from which on the first batch is followed by an estimate of the whole."""


def draw(
    policy: Drawable,
    planned: Sequence[PlannedImage],
    config: DrawConfig | None = None,
    *,
    model: str,
    batch_size: Count = 16,
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
    with progress_bar(total=len(planned), desc=f"drawing {model}", unit="image", shown=progress) as bar:
        order = batched_places(planned, batch_size)
        for places in order:
            batches.append(_draw_batch(policy, [planned[place] for place in places], config))
            bar.update(len(places))
    drawn = torch.cat(batches)
    stack = torch.empty_like(drawn)
    stack[list(chain.from_iterable(order))] = drawn
    return DrawnImages(model=model, planned=tuple(planned), config=config, stack=stack)


def generate(
    policy: Drawable,
    planned: Sequence[PlannedImage],
    root: Path | str,
    config: DrawConfig | None = None,
    *,
    model: str,
    batch_size: Count = 16,
    rank: Index | None = None,
    world_size: Count | None = None,
    progress: bool = True,
) -> int:
    """Draws this process's part of the images into a folder, those that are not there yet.

    A run killed at any moment is continued by the same call, to the same bytes: every file is written whole or not
    at all, and batches are those of the plan, so that one in which an image is missing is drawn again as a whole.
    Processes share out whole batches. Another `batch_size` may change an image by one grey level in a few pixels,
    since networks then sum in another order.

    Args:
        policy: What draws, in its present state.
        planned: What is drawn by all processes together.
        root: The folder of all models compared.
        config: How images are drawn.
        model: Name of the folder within `root`.
        batch_size: Images drawn at a time.
        rank: Which process this is; accelerate's answer when not given.
        world_size: How many processes there are; accelerate's answer when not given.
        progress: Whether the first process shows a progress bar, and tells beforehand if the images will take long.

    Returns:
        How many images this process drew.

    Raises:
        ValueError: The folder holds another run or images of another model, two images have one name, a name cannot
            be that of a file, or the process is not one of the processes.
        OSError: A file cannot be written, as on a full disk; the message names it. All images drawn before stay.
    """
    config, root = config or DrawConfig(), Path(root)
    check_model_name(model)
    check_plan(planned)
    if (rank is None) != (world_size is None):
        raise ValueError(f"rank and world_size must be given both or neither, got {rank} and {world_size}")
    if rank is None or world_size is None:
        state = process_state()
        rank, world_size = state.process_index, state.num_processes
    check_rank(rank, world_size)
    mine = batches_of(planned, batch_size)[rank::world_size]
    folder, writer = root / model, f".{rank}"
    with _with_what_stays(folder, len(planned)):
        for path in (root / MANIFEST, folder / RECORD, folder / ROWS):
            forget_partial(path, writer=writer)
        write_manifest(root, planned, config, writer=writer)
        write_record(folder, model_record(policy, config), writer=writer)
        rows = known_rows(folder)
        work = [(batch, missing) for batch in mine if (missing := _missing(folder, batch, rows))]
        total, to_draw = sum(map(len, mine)), sum(len(missing) for _, missing in work)
        shown = progress and rank == 0
        with progress_bar(
            total=total, initial=total - to_draw, desc=f"drawing {model}", unit="image", shown=shown
        ) as bar:
            for number, (batch, missing) in enumerate(work):
                seconds = _draw_into(folder, batch, missing, policy, config, rank)
                bar.update(len(missing))
                if number == 0 and seconds * (len(work) - 1) > LONG and shown:
                    whole = duration_text(seconds * len(work))
                    bar.write(f"{model}: {to_draw} images will take about {whole}", file=sys.stderr)
        finish_rows(folder, planned, writer=writer)
    return to_draw


def _missing(
    folder: Path, batch: Sequence[PlannedImage], rows: Mapping[str, Sequence[ImageRow]]
) -> frozenset[PlannedImage]:
    return frozenset(image for image in batch if drawn_row(folder, image, rows.get(image.file_name, ())) is None)


def _draw_into(
    folder: Path,
    batch: Sequence[PlannedImage],
    missing: frozenset[PlannedImage],
    policy: Drawable,
    config: DrawConfig,
    rank: int,
) -> float:
    """Draws a batch, writes what is missing of it, and returns how many seconds drawing took."""
    begin = time.perf_counter()
    pixels = _draw_batch(policy, batch, config)
    seconds = time.perf_counter() - begin
    for image, picture in zip(batch, pixels, strict=True):
        if image in missing:
            content = png_bytes(picture)
            row = ImageRow(
                file=image.file_name,
                **image.to_dict(),
                width=picture.shape[-1],
                height=picture.shape[-2],
                seconds=round(seconds / len(batch), 6),
                batch=len(batch),
                sha256=hashlib.sha256(content).hexdigest(),
            )
            write_bytes(folder / image.file_name, content)
            append_row(folder, rank, row)
    return seconds


@contextmanager
def _with_what_stays(folder: Path, total: int) -> Generator[None]:
    """Adds to an error of writing how many images stay."""
    try:
        yield
    except OSError as error:
        there = len(list(folder.glob("*.png"))) if folder.is_dir() else 0
        raise OSError(
            error.errno,
            f"{error.strerror}; the {there} of {total} images that are in {folder} stay, and the same call goes on "
            "once it can write again",
            error.filename,
        ) from error


def _draw_batch(policy: Drawable, batch: Sequence[PlannedImage], config: DrawConfig) -> Pixels:
    """Draws images of one guidance scale."""
    own = batch[0].guidance_scale
    # Not inference mode: embeddings that the policy caches here may later be part of a training graph.
    with torch.no_grad():
        images = policy.draw(
            [image.prompt for image in batch],
            seeds=[image.seed for image in batch],
            steps=config.steps,
            guidance=ClassifierFree(config.guidance_scale if own is None else own),
            eta=config.eta,
            batch_size=len(batch),
            height=config.size,
            width=config.size,
        )
    if len(images) != len(batch):
        raise ValueError(f"policy must draw one image for each of {len(batch)} prompts, got {len(images)}")
    if config.size is not None and tuple(images.shape[-2:]) != (config.size, config.size):
        raise ValueError(f"policy must draw images of size {config.size}, got {tuple(images.shape[-2:])}")
    return to_pixels(images)


def seconds_per_image(
    drawable: Drawable, planned: Sequence[PlannedImage], config: DrawConfig, *, batch_size: int = 16
) -> float:
    """Returns how long one image will take, from a batch of one step and one of three, each drawn for nothing."""
    batch = batches_of(planned, batch_size)[0]

    def timed(steps: int) -> float:
        begin = time.perf_counter()
        _draw_batch(drawable, batch, replace(config, steps=steps))
        return time.perf_counter() - begin

    timed(1)  # sets much up, and encodes the prompts
    one, three = timed(1), timed(3)
    return (one + max(three - one, 0.0) / 2 * (config.steps - 1)) / len(batch)


def duration_text(seconds: float) -> str:
    """Returns a time as a person says it: `40 s`, `12 min`, `3 h 05 min`."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
