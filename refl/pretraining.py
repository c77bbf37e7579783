"""The pairs of image and caption that the pretraining term denoises, as latents, and the loss on them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from overpaint.policy import Conditioning, DiffusionPolicy, Guidance, SampleNoise
from overpaint.policy.guidance import DEFAULT_GUIDANCE
from overpaint.policy.prompts import check_prompts
from overpaint.policy.types import Latents, PerSample
from overpaint.training.logging import progress_bar
from rewards.preprocess import pil_to_square

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
CAPTIONS_FILE = "metadata.jsonl"


class PretrainingPairs(NamedTuple):
    """Latents and the caption of each."""

    latents: Latents
    captions: list[str]


def pairs_from_policy(
    policy: DiffusionPolicy,
    prompts: Sequence[str],
    *,
    count: int,
    steps: int = 40,
    guidance: Guidance = DEFAULT_GUIDANCE,
    seed: int = 0,
    batch_size: int = 16,
    height: int | None = None,
    width: int | None = None,
    progress: bool = False,
) -> PretrainingPairs:
    """Draws pairs from the frozen policy itself, the one that training starts from.

    Needs no data: the term then says "stay what you are", in the units of pretraining.

    Args:
        policy: Its reference is drawn from, so that a resumed run gets the same pairs.
        prompts: Captions, taken in turn.
        count: Number of pairs.
        steps: Denoising steps.
        guidance: By default classifier-free guidance of 7.5.
        seed: Seed of the first image; the next ones follow.
        batch_size: Images at a time.
        height: Of the images, in pixels; None is the size that the model was trained on.
        width: Of the images, likewise.
        progress: Whether a progress bar is shown.

    Raises:
        ValueError: There are no prompts, one is not a string, or `count` or `batch_size` is below 1.
    """
    known = check_prompts(prompts)
    for name, value in (("count", count), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
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


def pairs_from_folder(policy: DiffusionPolicy, folder: str | Path, *, batch_size: int = 8) -> PretrainingPairs:
    """Reads pairs from a folder and its subfolders: images, each with a caption.

    Captions are in `metadata.jsonl`, which has a line `{"file_name": ..., "text": ...}` for each image as image folders
    of Hugging Face have it, or in a `.txt` beside the image. Images are scaled and centre-cropped to the size that the
    policy was trained on. The latents, the means of the VAE's posterior, stay in the CPU's memory.

    Raises:
        ValueError: The folder has no images, an image has no caption, or `metadata.jsonl` is not what it should be.
    """
    captions = _captions(Path(folder))
    files = list(captions)
    parts = []
    for start in range(0, len(files), batch_size):
        squares = []
        for file in files[start : start + batch_size]:
            with Image.open(Path(folder) / file) as image:
                squares.append(pil_to_square(image.convert("RGB"), policy.image_size))
        parts.append(policy.encode_images(torch.stack(squares)).cpu())
    return PretrainingPairs(torch.cat(parts), [captions[file] for file in files])


def denoising_loss(
    policy: DiffusionPolicy, latents: Latents, conditioning: Conditioning, *, seeds: Sequence[int]
) -> PerSample:
    """Returns the loss of pretraining for each sample, see `DiffusionPolicy.denoising_loss`.

    Timestep and noise of a sample come from its own seed: its loss is the same in any batch and any process.
    """
    noise = SampleNoise(seeds, height=latents.shape[2], width=latents.shape[3], device=policy.device)
    levels = len(policy.alphas)
    drawn = [torch.randint(levels, (), generator=generator) for generator in noise.generators]
    return policy.denoising_loss(latents, conditioning, torch.stack(drawn).to(policy.device), noise.draw())


def _captions(folder: Path) -> dict[str, str]:
    """Returns the caption of each image of a folder, by its path below the folder, in the order of the paths."""
    images = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS
    )
    if not images:
        raise ValueError(f"folder must hold images ({', '.join(IMAGE_ENDINGS)}), got {str(folder)!r} without any")
    captions = _listed_captions(folder / CAPTIONS_FILE)
    if missing := sorted(captions.keys() - set(images)):
        raise ValueError(f"{CAPTIONS_FILE} must name images of its folder, got {missing[0]!r}, which is not there")
    for name in images:
        text_file = (folder / name).with_suffix(".txt")
        if name not in captions and not text_file.is_file():
            raise ValueError(
                f"every image must have a caption in {CAPTIONS_FILE} or in a .txt beside it, got none for {name!r}"
            )
        if name not in captions:
            captions[name] = text_file.read_text(encoding="utf-8").strip()
    return {name: captions[name] for name in images}


def _listed_captions(path: Path) -> dict[str, str]:
    """Reads metadata.jsonl, if there is one."""
    if not path.is_file():
        return {}
    captions = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = entry["file_name"], entry["text"]
        except (json.JSONDecodeError, KeyError, TypeError):
            name = text = None
        if not isinstance(name, str) or not isinstance(text, str):
            raise ValueError(
                f'{path.name} must have {{"file_name": ..., "text": ...}}, two strings, on every line, got {line!r} on '
                f"line {number}"
            )
        captions[name] = text
    return captions
