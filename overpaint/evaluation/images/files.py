"""Drawn images, in memory and as PNG files in ImageReward's layout.

    <root>/prompts.json                 what each image shows and how it was drawn; one file for all models
    <root>/<model>/<id>_<k>.png         one image of a prompt
    <root>/<model>/model.json           which model drew them, where `generate` did (see `drawable`)
    <root>/<model>/.drawn-<rank>.jsonl  rows of one process of `generate`, each added once its image is in place
    <root>/<model>/manifest.jsonl       all rows in the order of the plan, once all images are there

One `prompts.json` for all models is what pairs them: a model drawn otherwise is refused. An image of `generate` counts
as drawn if there is a row with the hash of its file. So a kill between image and row, a row that was cut short, and a
file that was cut short or changed all lead to the same: the image is drawn again.
"""

import base64
import io
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from overpaint import image_files
from overpaint.policy.atomic import append, write_bytes, write_text
from overpaint.policy.types import Images
from overpaint.settings import Count, Index
from overpaint.text_files import parsed_json, read_bytes, read_json_object
from rewards.public_files import sha256_of

from .plan import DrawConfig, PlannedImage, check_plan

Pixels = UInt8[Tensor, "batch 3 H W"]
"""RGB in 0..255."""
Read = UInt8[Tensor, "3 H W"] | str
"""An image, or why it cannot be read."""


def png_bytes(pixels: UInt8[Tensor, "3 H W"]) -> bytes:
    """Returns what a PNG of the image holds; the same image always gives the same bytes."""
    return _png(_picture(pixels))


def data_uri(pixels: UInt8[Tensor, "3 H W"], *, largest: int = 256) -> str:
    """Returns an image as a PNG in text, reduced to `largest` pixels a side if it is larger."""
    shown = _picture(pixels)
    shown.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    return "data:image/png;base64," + base64.b64encode(_png(shown, optimize=True)).decode("ascii")


def write_png(pixels: UInt8[Tensor, "3 H W"], path: Path) -> None:
    """Writes one image whole or not at all; raises as `write_bytes`."""
    write_bytes(path, png_bytes(pixels))


def read_image(path: Path) -> UInt8[Tensor, "3 H W"]:
    """Reads one image as bytes; raises as `overpaint.image_files.read_image`."""
    return image_files.image_pixels(image_files.read_image(path))


def pixels_or_reason(path: Path) -> Read:
    """Returns an image, or why it cannot be read."""
    try:
        return read_image(path)
    except FileNotFoundError as error:
        return f"it cannot be read: {error}"
    except image_files.UnreadableImage as error:
        return f"it {error.why}"


def _png(picture: Image.Image, **options: bool) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG", **options)
    return file.getvalue()


def _picture(pixels: UInt8[Tensor, "3 H W"]) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


@runtime_checkable
class ImageSource(Protocol):
    """The images that one model drew, in memory or in a folder."""

    @property
    def model(self) -> str:
        """The name of the model."""

    @property
    def planned(self) -> tuple[PlannedImage, ...]:
        """What each image shows, in order."""

    @property
    def config(self) -> DrawConfig:
        """How the images were drawn."""

    def pixels(self, positions: Sequence[int]) -> Pixels:
        """Returns the images at these places of `planned`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DrawnImages:
    """Images of one model in memory."""

    model: str
    planned: tuple[PlannedImage, ...]
    config: DrawConfig
    stack: Pixels = field(repr=False)
    """All images, in the order of `planned`."""

    def __post_init__(self) -> None:
        if len(self.planned) != len(self.stack):
            raise ValueError(f"stack must hold {len(self.planned)} images, one for each planned, got {len(self.stack)}")

    def pixels(self, positions: Sequence[Index]) -> Pixels:
        """Returns the images at these places of `planned`."""
        return self.stack[list(positions)]


def to_pixels(images: Images) -> Pixels:
    """Rounds RGB in [0, 1] to bytes, on the CPU.

    Raises:
        ValueError: An image holds a value that is not finite, which no byte can show.
    """
    if not torch.isfinite(images).all():
        bad = [k for k, image in enumerate(images) if not torch.isfinite(image).all()]
        raise ValueError(f"images must be finite, got NaN or infinity in image {bad[0]} of {len(images)}")
    return (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def to_images(pixels: Pixels) -> Images:
    """Returns bytes as RGB in [0, 1], float32."""
    return pixels.float() / 255


MANIFEST = "prompts.json"


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """Images of one model on disk, read when needed."""

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
        missing = [one.file_name for one in planned if isinstance(pixels_or_reason(root / model / one.file_name), str)]
        if missing:
            raise ValueError(
                f"root: {root / model} must hold all {len(planned)} images of {MANIFEST}, "
                f"got {len(missing)} missing or damaged, the first {missing[0]}"
            )
        return cls(root=root, model=model, planned=planned, config=config)

    def pixels(self, positions: Sequence[Index]) -> Pixels:
        """Reads the images at these places of `planned`; they have to be of one size."""
        images = [read_image(self.root / self.model / self.planned[k].file_name) for k in positions]
        sizes = {(image.shape[-1], image.shape[-2]) for image in images}
        if len(sizes) > 1:
            raise ValueError(f"{self.root / self.model}: images must be of one size, got {sorted(sizes)}")
        return torch.stack(images)


def write_folder(images: ImageSource, root: Path | str, *, chunk: Count = 64) -> ImageFolder:
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
    """Writes `prompts.json`, or checks that the one that is there says the same; `writer` tells processes apart.

    Raises:
        ValueError: The folder's manifest tells of other prompts, seeds or settings, or two images have one name.
    """
    check_plan(planned)
    root = Path(root)
    if not (root / MANIFEST).exists():
        images = [{"file": image.file_name, **image.to_dict()} for image in planned]
        content = {"format": 1, **asdict(config), "images": images}
        write_text(root / MANIFEST, json.dumps(content, indent=1, ensure_ascii=False) + "\n", writer=writer)
        return
    there, drawn = read_manifest(root)
    others: list[tuple[str, object]] = [(f"drawn with {drawn}", config)] if drawn != config else []
    others += [(f"with {old}", new) for old, new in zip(there, planned, strict=False) if old != new]
    if len(there) != len(planned):
        others.append((f"of {len(there)} images", len(planned)))
    if others:
        held, got = others[0]
        raise ValueError(f"root: {root} holds another run, {held}, got {got}; choose another folder")


def read_manifest(root: Path) -> tuple[tuple[PlannedImage, ...], DrawConfig]:
    """Reads what the images of a folder show and how they were drawn; a ValueError where no manifest says so."""
    path = root / MANIFEST
    if not path.is_file():
        raise ValueError(f"root must hold {MANIFEST}, got {root}, which does not")
    try:
        content = read_json_object(path)
        planned = tuple(map(PlannedImage.from_dict, content["images"]))
        check_plan(planned)
        given = {name: content[name] for name in ("eta", "size") if name in content}
        return planned, DrawConfig(steps=content["steps"], guidance_scale=content["guidance_scale"], **given)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"root: {path} must be a manifest of drawn images, got {error!r}") from error


def check_model_name(model: str) -> None:
    """Raises a ValueError unless the name can be that of a folder."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", model):
        raise ValueError(f"model must be a folder name of letters, digits, '.', '_' and '-', got {model!r}")


ROWS = "manifest.jsonl"
JOURNALS = ".drawn-*.jsonl"


class ImageRow(NamedTuple):
    """What is known of one image."""

    file: str
    kind: str
    id: str
    copy: int
    prompt: str
    seed: int
    width: int
    """In pixels."""
    height: int
    """In pixels."""
    seconds: float
    """Its share of the time that its batch took to draw."""
    batch: int
    """How many images were drawn together with it, itself included."""
    sha256: str
    """Of the file."""
    guidance_scale: float | None = None
    """Its own scale of guidance; None is that of the run."""

    def to_json(self) -> str:
        """Returns the line that tells of it; a guidance scale only where it has its own."""
        values = self._asdict()
        if self.guidance_scale is None:
            del values["guidance_scale"]
        return json.dumps(values, ensure_ascii=False)


def read_image_rows(folder: Path | str) -> tuple[ImageRow, ...]:
    """Reads the rows of a folder in the order of the plan; a ValueError where `generate` has not finished one."""
    path = Path(folder) / ROWS
    if not path.is_file():
        raise ValueError(f"folder must hold {ROWS}, got {folder}, which does not: `generate` has not finished it")
    return tuple(_read(path))


def known_rows(folder: Path) -> dict[str, list[ImageRow]]:
    """Returns all rows that were written so far, by file; lines that are not whole are left out."""
    rows: dict[str, list[ImageRow]] = {}
    for path in (folder / ROWS, *sorted(folder.glob(JOURNALS))):
        for row in _read(path):
            rows.setdefault(row.file, []).append(row)
    return rows


def drawn_row(folder: Path, image: PlannedImage, rows: Sequence[ImageRow]) -> ImageRow | None:
    """Returns the row that tells of an image and its file as they are; None where it is missing or damaged."""
    path = folder / image.file_name
    told = [row for row in rows if PlannedImage.from_dict(row._asdict()) == image]
    if not told or not path.is_file():
        return None
    digest = sha256_of(path)
    return next((row for row in told if row.sha256 == digest), None)


def append_row(folder: Path, rank: int, row: ImageRow) -> None:
    """Adds a row to those of one process; from then on it survives the death of the program.

    Raises:
        OSError: The disk is full, for example; the message names the file, and no part of the row is left in it.
    """
    line = row.to_json().encode() + b"\n"
    with (folder / f".drawn-{rank}.jsonl").open("ab+", buffering=0) as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                line = b"\n" + line
        append(file, line)


def finish_rows(folder: Path, planned: Sequence[PlannedImage], *, writer: str = "") -> bool:
    """Brings the rows of all processes together if all images are there; says whether they are.

    Whichever process comes last does it; two that come at once write the same.
    """
    journals = sorted(folder.glob(JOURNALS))
    rows = known_rows(folder)
    if not journals and (folder / ROWS).exists() and rows.keys() == {image.file_name for image in planned}:
        return True
    found = []
    for image in planned:
        row = drawn_row(folder, image, rows.get(image.file_name, ()))
        if row is None:
            return False
        found.append(row)
    lines = [row.to_json() + "\n" for row in found]
    write_text(folder / ROWS, "".join(lines), writer=writer)
    for journal in journals:
        journal.unlink(missing_ok=True)
    return True


def _read(path: Path) -> list[ImageRow]:
    rows = []
    with suppress(FileNotFoundError):  # a process that finished has just removed it
        for line in read_bytes(path).splitlines():
            with suppress(ValueError, TypeError):
                rows.append(ImageRow(**parsed_json(line, str(path))))
    return rows
