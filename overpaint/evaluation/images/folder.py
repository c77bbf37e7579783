"""Drawn images as files, in ImageReward's layout.

    <root>/prompts.json            what each image shows and how it was drawn; one file for all models
    <root>/<model>/<id>_<k>.png    one image of a prompt
    <root>/<model>/model.json      which model drew them, where `generate` did
    <root>/<model>/manifest.jsonl  a row for each image, where `generate` did

One `prompts.json` for all models is what pairs them: a model drawn otherwise is refused.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from overpaint.policy.atomic import write_text

from .files import is_whole, read_png, write_png
from .images import ImageSource, Pixels
from .plan import DrawConfig, PlannedImage, check_plan

MANIFEST = "prompts.json"


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """Images of one model on disk, read when asked for."""

    root: Path
    model: str
    planned: tuple[PlannedImage, ...]
    config: DrawConfig

    @classmethod
    def open(cls, root: Path | str, model: str) -> "ImageFolder":
        """Opens the images of a model.

        Raises:
            ValueError: There is no manifest, or images that it lists are not there or not whole.
        """
        root = Path(root)
        planned, config = read_manifest(root)
        missing = [image.file_name for image in planned if not is_whole(root / model / image.file_name)]
        if missing:
            raise ValueError(
                f"root: {root / model} must hold all {len(planned)} images of {MANIFEST}, "
                f"got {len(missing)} missing or damaged, the first {missing[0]}"
            )
        return cls(root=root, model=model, planned=planned, config=config)

    def pixels(self, positions: Sequence[int]) -> Pixels:
        """Reads the images at these places of `planned`; they have to be of one size."""
        images = [read_png(self.root / self.model / self.planned[k].file_name) for k in positions]
        sizes = {(image.shape[-1], image.shape[-2]) for image in images}
        if len(sizes) > 1:
            raise ValueError(f"{self.root / self.model}: images must be of one size, got {sorted(sizes)}")
        return torch.stack(images)


def write_folder(images: ImageSource, root: Path | str, *, chunk: int = 64) -> ImageFolder:
    """Writes the images of a model, with the manifest if there is none yet.

    Raises:
        ValueError: The folder's manifest tells of other prompts, seeds or settings.
    """
    root = Path(root)
    check_model_name(images.model)
    write_manifest(root, images.planned, images.config)
    for start in range(0, len(images.planned), chunk):
        positions = range(start, min(start + chunk, len(images.planned)))
        for k, image in zip(positions, images.pixels(positions), strict=True):
            write_png(image, root / images.model / images.planned[k].file_name)
    return ImageFolder(root=root, model=images.model, planned=images.planned, config=images.config)


def write_manifest(root: Path | str, planned: Sequence[PlannedImage], config: DrawConfig, *, writer: str = "") -> None:
    """Writes `prompts.json`, or checks that the one that is there says the same.

    Args:
        root: The folder of all models compared.
        planned: What is drawn.
        config: How images are drawn.
        writer: Tells processes apart that may write it at the same time.

    Raises:
        ValueError: The folder's manifest tells of other prompts, seeds or settings, or two images have one name.
    """
    check_plan(planned)
    root = Path(root)
    if (root / MANIFEST).exists():
        check_manifest(root, planned, config)
        return
    images = [{"file": image.file_name, **image._asdict()} for image in planned]
    content = {"format": 1, **asdict(config), "images": images}
    write_text(root / MANIFEST, json.dumps(content, indent=1, ensure_ascii=False) + "\n", writer=writer)


def check_manifest(root: Path, planned: Sequence[PlannedImage], config: DrawConfig) -> None:
    """Checks that a folder holds these images, drawn in this way, and no others.

    Raises:
        ValueError: It does not; the message names the first difference.
    """
    there, drawn = read_manifest(root)
    if drawn != config:
        raise ValueError(f"root: {root} holds another run, drawn with {drawn}, got {config}; choose another folder")
    for old, new in zip(there, planned, strict=False):
        if old != new:
            raise ValueError(f"root: {root} holds another run, with {old}, got {new}; choose another folder")
    if len(there) != len(planned):
        raise ValueError(
            f"root: {root} holds another run, of {len(there)} images, got {len(planned)}; choose another folder"
        )


def read_manifest(root: Path) -> tuple[tuple[PlannedImage, ...], DrawConfig]:
    """Reads what the images of a folder show and how they were drawn.

    Raises:
        ValueError: There is no manifest, or it is not one.
    """
    path = root / MANIFEST
    if not path.is_file():
        raise ValueError(f"root must hold {MANIFEST}, got {root}, which does not")
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        planned = tuple(PlannedImage(*(image[field] for field in PlannedImage._fields)) for image in content["images"])
        steps, scale = content["steps"], content["guidance_scale"]
        eta, size = content.get("eta", 0.0), content.get("size")
        return planned, DrawConfig(steps=steps, guidance_scale=scale, eta=eta, size=size)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"root: {path} must be a manifest of drawn images, got {error!r}") from error


def check_model_name(model: str) -> None:
    """Raises a ValueError unless the name can be that of a folder."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", model):
        raise ValueError(f"model must be a folder name of letters, digits, '.', '_' and '-', got {model!r}")
