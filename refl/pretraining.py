"""The pairs of image and caption that the pretraining term denoises, as latents."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from policy import DiffusionPolicy, Guidance
from policy.prompts import check_prompts
from policy.types import Latents

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


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
    guidance: Guidance | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> PretrainingPairs:
    """Draws pairs from the frozen policy itself, the one that training starts from.

    Needs no data: the term then says "stay what you are", in the units of pretraining.

    Args:
        policy: Its reference is drawn from, so that a resumed run gets the same pairs.
        prompts: Captions, taken in turn.
        count: Number of pairs.
        steps: Denoising steps.
        guidance: None is classifier-free guidance of 5.
        seed: Seed of the first image; the next ones follow.
        batch_size: Images at a time.
    """
    known = check_prompts(prompts)
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    captions = [known[k % len(known)] for k in range(count)]
    parts = []
    with policy.reference():
        for start in range(0, count, batch_size):
            part = captions[start : start + batch_size]
            seeds = [seed + start + k for k in range(len(part))]
            parts.append(policy.sample(policy.encode(part), steps=steps, guidance=guidance, seeds=seeds))
    return PretrainingPairs(torch.cat(parts), captions)


def pairs_from_folder(policy: DiffusionPolicy, folder: str | Path, *, batch_size: int = 8) -> PretrainingPairs:
    """Reads pairs from a folder: images, and captions in `metadata.jsonl` or in a `.txt` beside each image.

    `metadata.jsonl` has a line `{"file_name": ..., "text": ...}` for each image, as Hugging Face's image folders do. Images are
    scaled and centre-cropped to the size that the policy was trained on.

    Raises:
        ValueError: The folder has no images, or an image has no caption.
    """
    from PIL import Image

    from rewards.preprocess import pil_to_square

    folder = Path(folder)
    captions = _captions(folder)
    parts = []
    files = sorted(captions)
    for start in range(0, len(files), batch_size):
        squares = []
        for file in files[start : start + batch_size]:
            with Image.open(folder / file) as image:
                squares.append(pil_to_square(image.convert("RGB"), policy.image_size))
        parts.append(policy.encode_images(torch.stack(squares)))
    return PretrainingPairs(torch.cat(parts), [captions[file] for file in files])


def _captions(folder: Path) -> dict[str, str]:
    """Reads the caption of each image of a folder."""
    images = sorted(p.name for p in folder.glob("*") if p.suffix.lower() in IMAGE_ENDINGS) if folder.is_dir() else []
    if not images:
        raise ValueError(f"folder must hold images ({', '.join(IMAGE_ENDINGS)}), got {str(folder)!r} without any")
    listed: dict[str, str] = {}
    if (folder / "metadata.jsonl").is_file():
        for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            listed[entry["file_name"]] = entry["text"]
    captions = {}
    for name in images:
        beside = (folder / name).with_suffix(".txt")
        if name not in listed and not beside.is_file():
            raise ValueError(f"every image must have a caption in metadata.jsonl or a .txt beside it, got none for {name!r}")
        captions[name] = listed[name] if name in listed else beside.read_text(encoding="utf-8").strip()
    return captions
