"""The pairs of image and caption that the pretraining term denoises, as latents, and the loss on them."""

import csv
import io
import random
import warnings
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from PIL import Image, ImageOps
from torch import Tensor

from overpaint.image_files import IMAGE_SUFFIXES, UnreadableImage, image_size, images_below, read_image
from overpaint.policy import ClassifierFree, Conditioning, DiffusionPolicy, Guidance, SampleNoise
from overpaint.policy.guidance import DEFAULT_GUIDANCE
from overpaint.policy.prompts import check_prompts
from overpaint.policy.types import Latents, PerSample
from overpaint.settings import Count, Seed
from overpaint.text_files import read_json_lines, read_text
from overpaint.training import TrainingRun
from overpaint.training.logging import progress_bar
from rewards.preprocess import from_pil, pil_to_square

from .config import ReFLConfig
from .terms import Measured, Term

LISTINGS = ("metadata.jsonl", "metadata.csv")
"""Files that may list the captions of a folder."""
FIRST_SEED = 2_000_000
"""Seed of the first pair that is drawn where none are given, plus the run's."""
CAPTION_SUFFIXES = (".txt", ".caption")
"""Endings of the files that may hold the caption of the image beside them."""


class PretrainingPairs(NamedTuple):
    """Latents and the caption of each."""

    latents: Latents
    captions: list[str]


def pairs_from_policy(
    policy: DiffusionPolicy,
    prompts: Sequence[str],
    *,
    count: Count,
    steps: Count = 40,
    guidance: Guidance = DEFAULT_GUIDANCE,
    seed: Seed = 0,
    batch_size: Count = 16,
    height: Count | None = None,
    width: Count | None = None,
    progress: bool = False,
) -> PretrainingPairs:
    """Draws pairs from the frozen policy itself, the one that training starts from.

    Needs no data: the term then says "stay what you are", in the units of pretraining.

    Args:
        policy: Its reference is drawn from, so that a resumed run gets the same pairs.
        prompts: Captions, taken in turn.
        count: Number of pairs.
        steps: Denoising steps.
        guidance: By default classifier-free guidance of 5.
        seed: Seed of the first image; the next ones follow.
        batch_size: Images at a time.
        height: Of the images, in pixels; None is the size that the model was trained on.
        width: Of the images, likewise.
        progress: Whether a progress bar is shown.

    Raises:
        ValueError: There are no prompts, one is not a string, or `count` or `batch_size` is below 1.
    """
    known = check_prompts(prompts)
    captions = [known[k % len(known)] for k in range(count)]
    seeds = range(seed, seed + count)
    parts = []
    bar = progress_bar(shown=progress, desc="pretraining pairs", total=count, unit="image")
    with policy.reference(), bar:
        for start in range(0, count, batch_size):
            part = slice(start, start + batch_size)
            latents = policy.sample(
                policy.encode(captions[part]),
                steps=steps,
                guidance=guidance,
                seeds=seeds[part],
                height=height,
                width=width,
            )
            parts.append(latents)
            bar.update(len(latents))
    return PretrainingPairs(torch.cat(parts), captions)


def own_pairs(
    run: TrainingRun, policy: DiffusionPolicy, prompts: Sequence[str], config: ReFLConfig
) -> PretrainingPairs:
    """Draws the pairs of the pretraining term from the frozen policy, each process its part."""
    captions = [prompts[k % len(prompts)] for k in range(config.pool)]
    mine = run.shard(range(config.pool))
    part = pairs_from_policy(
        policy,
        captions[mine.start : mine.stop],
        count=len(mine),
        steps=config.steps,
        guidance=ClassifierFree(max(config.guidance_scale, 1.0)),
        seed=FIRST_SEED + run.config.seed + mine.start,
        height=config.height,
        width=config.width,
        progress=run.is_main and run.config.progress,
    )
    return PretrainingPairs(run.gather(part.latents), captions)


def pretraining_term(policy: DiffusionPolicy, pairs: PretrainingPairs, config: ReFLConfig) -> Term[int]:
    """Returns the denoising loss of pairs, which are given by their indices."""
    loss = denoising_loss if config.pretraining_target == "noise" else reference_loss

    def term(indices: list[int], seeds: list[int]) -> Measured:
        dropped = [random.Random(f"caption of {seed}").random() < config.caption_dropout for seed in seeds]
        conditioning = policy.encode([pairs.captions[k] for k in indices])
        if any(dropped):  # what guidance leads away from, in place of the caption
            away = ClassifierFree().away(conditioning, policy.prompts.empty(conditioning))
            both = Conditioning.cat([conditioning, away])
            conditioning = both[torch.arange(len(indices)) + len(indices) * torch.tensor(dropped)]
        losses = loss(policy, pairs.latents[indices].to(policy.device), conditioning, seeds=seeds)
        return Measured(losses, losses)

    return term


def pairs_from_folder(
    policy: DiffusionPolicy,
    folder: str | Path,
    *,
    batch_size: Count = 8,
    skip_damaged: bool = False,
    height: Count | None = None,
    width: Count | None = None,
) -> PretrainingPairs:
    """Reads pairs from a folder and its subfolders: images, each with a caption.

    Captions are in `metadata.jsonl` or `metadata.csv`, which have a `file_name` and a `text` for each image as image
    folders of Hugging Face have them, or in a `.txt` or `.caption` beside the image. How files are read is told in
    `overpaint.image_files` and `overpaint.text_files`. Images are scaled and centre-cropped.
    The latents, the means of the VAE's posterior, stay in the CPU's memory.

    Args:
        policy: Its autoencoder encodes.
        folder: Where images and captions lie. Hidden files do not count.
        batch_size: Images encoded at a time.
        height: Of the images in pixels, as the trainer's; None is the size that the policy was trained on.
        width: Likewise.
        skip_damaged: Whether images that cannot be read are left out with their captions, and named in a warning.

    Raises:
        ValueError: The folder has no images, an image has no caption, an image cannot be read, or a file of captions is
            not what it should be.
    """
    folder, side = Path(folder), policy.image_size
    captions = _captions(folder)
    damaged: dict[str, str] = {}
    for name in captions:
        try:
            image_size(folder / name)  # of all files before any work; what is cut off shows when it is decoded
        except UnreadableImage as error:
            damaged[name] = _refused(error, skip_damaged)
    parts = []
    names = [name for name in captions if name not in damaged]
    for start in range(0, len(names), batch_size):
        squares = []
        for name in names[start : start + batch_size]:
            try:
                squares.append(_fitted(read_image(folder / name), height or side, width or side))
            except UnreadableImage as error:
                damaged[name] = _refused(error, skip_damaged)
        if squares:
            parts.append(policy.encode_images(torch.stack(squares)).cpu())
    if damaged:
        told = "; ".join(f"{name} {why}" for name, why in damaged.items())
        if not parts:
            raise ValueError(f"folder must hold at least one image that can be read, got {told}")
        warnings.warn(f"{len(damaged)} of {len(captions)} images are left out: {told}", stacklevel=2)
    return PretrainingPairs(torch.cat(parts), [text for name, text in captions.items() if name not in damaged])


def _fitted(image: Image.Image, height: int, width: int) -> Float[Tensor, "3 height width"]:
    """Returns an image scaled and centre-cropped to a size."""
    if height == width:
        return pil_to_square(image, height)
    return from_pil(ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC))


def _refused(error: UnreadableImage, skip: bool) -> str:
    """Returns why an image cannot be read, or says how to go on without it."""
    if skip:
        return error.why
    raise UnreadableImage(error.name, f"{error.why}; mend or remove it, or give skip_damaged=True") from error


def denoising_loss(
    policy: DiffusionPolicy, latents: Latents, conditioning: Conditioning, *, seeds: Sequence[int]
) -> PerSample:
    """Returns the loss of pretraining for each sample, see `DiffusionPolicy.denoising_loss`.

    Timestep and noise of a sample come from its own seed: its loss is the same in any batch and any process.
    """
    return policy.denoising_loss(latents, conditioning, *_noise(policy, latents, seeds))


def reference_loss(
    policy: DiffusionPolicy, latents: Latents, conditioning: Conditioning, *, seeds: Sequence[int]
) -> PerSample:
    """Returns the mean squared difference of each sample from what the policy's reference sees in the same latents.

    Draws as `denoising_loss` does.
    """
    timesteps, noise = _noise(policy, latents, seeds)
    noised = policy.add_noise(latents, noise, timesteps)
    with policy.reference():
        target = policy.predict_direction(noised, timesteps, conditioning)
    return (policy.predict_direction(noised, timesteps, conditioning) - target).square().flatten(1).mean(dim=1)


def _noise(policy: DiffusionPolicy, latents: Latents, seeds: Sequence[int]) -> tuple[Int[Tensor, " batch"], Latents]:
    """Returns a timestep and a noise for each sample, from its seed."""
    noise = SampleNoise(seeds, latents.shape[1:], policy.device)
    levels = policy.num_timesteps
    drawn = [torch.randint(levels, (), generator=generator) for generator in noise.generators]
    return torch.stack(drawn).to(policy.device), noise.draw()


def _captions(folder: Path) -> dict[str, str]:
    """Returns the caption of each image of a folder, by its path below the folder, in the order of the paths."""
    images = images_below(folder)
    if not images:
        raise ValueError(f"folder must hold images ({', '.join(IMAGE_SUFFIXES)}), got {str(folder)!r} without any")
    captions = _listed_captions(folder)
    if missing := sorted(captions.keys() - set(images)):
        raise ValueError(f"{_listing(folder)} must name images of its folder, got {missing[0]!r}, which is not there")
    for name in images:
        beside = (Path(folder, name).with_suffix(ending) for ending in CAPTION_SUFFIXES)
        text_file = next((path for path in beside if path.is_file()), None)
        if name not in captions and text_file is None:
            raise ValueError(
                f"every image must have a caption in {' or '.join(LISTINGS)}, or in a {' or '.join(CAPTION_SUFFIXES)} "
                f"beside it, got none for {name!r}"
            )
        if name not in captions and text_file is not None:
            captions[name] = read_text(text_file).strip()
    return {name: captions[name] for name in images}


def _listing(folder: Path) -> str | None:
    """Returns the name of the file that lists captions; None where there is none."""
    there = [name for name in LISTINGS if (folder / name).is_file()]
    if len(there) > 1:
        raise ValueError(f"folder must hold {' or '.join(LISTINGS)}, got both in {str(folder)!r}")
    return there[0] if there else None


def _listed_captions(folder: Path) -> dict[str, str]:
    """Reads metadata.jsonl or metadata.csv, if there is one; paths are written as `images_below` does."""
    listing = _listing(folder)
    if listing is None:
        return {}
    path = folder / listing
    entries: dict[int, dict[str, Any]] = {}
    if path.suffix == ".csv":
        rows = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
        try:
            for row in rows:
                entries[rows.line_num] = row
        except csv.Error as error:
            raise ValueError(f"{path} must be a table, got {error} on line {rows.line_num}") from error
    else:
        entries = read_json_lines(path)
    captions = {}
    for number, entry in entries.items():
        name, text = entry.get("file_name"), entry.get("text")
        if not isinstance(name, str) or not isinstance(text, str):
            raise ValueError(
                f"{path} must have file_name and text, two strings, on every line, got {entry!r} on line {number}"
            )
        captions[PurePosixPath(name).as_posix()] = text
    return captions
