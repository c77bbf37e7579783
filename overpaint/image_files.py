"""Image files: the one place where they are opened, and the rules by which each becomes upright RGB of 8 bits.

- Turned upright by the EXIF orientation of the file's header, as viewers do.
- Transparency lies on white. A palette, CMYK and grey become RGB; colour profiles are not applied.
- 16 bits become 8 by their high byte, as Pillow itself reads 16-bit colour. Values without a known range (floats,
  32-bit integers) are refused.
- Of an animation the first frame is taken, and a warning says so.
- What a file holds decides its format, not its name, and only `FORMATS` are tried: of the others that Pillow knows,
  some have it start other programs.
"""

import io
import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import numpy
import torch
from jaxtyping import UInt8
from PIL import ExifTags, Image
from torch import Tensor

IMAGE_SUFFIXES = (".avif", ".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Endings, in lower case, of the names of files that count as images of a folder."""

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names of the formats that are read; phones' MPO counts as JPEG."""

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each of EXIF's orientations."""
SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N")
"""Pillow's modes of 16-bit grey."""
UNSCALED_SIXTEEN_BIT = ("PNG", "PPM")
"""Formats of which Pillow may hold 16-bit grey in its mode of 32-bit integers."""


class UnreadableImage(ValueError):
    """An image that cannot be read; its text names the file and says why."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(name, why)
        self.name = name
        self.why = why

    def __str__(self) -> str:
        return f"{self.name} {self.why}"


def read_image(source: Path | str | bytes) -> Image.Image:
    """Returns an image as upright RGB of 8 bits.

    Args:
        source: The path of a file, or what a file holds.

    Raises:
        FileNotFoundError: There is no file at the path.
        UnreadableImage: It is no image, is damaged or cut off, is larger than Pillow's limit against decompression
            bombs, or holds values without a known range.
    """
    name = _name(source)
    with opened_image(source) as opened:
        frames = getattr(opened, "n_frames", 1)
        if frames > 1 and opened.format != "MPO":  # what phones write, whose further frames are depth and the like
            warnings.warn(f"{name} has {frames} frames, of which the first is read", stacklevel=2)
        picture = as_rgb(opened, name).copy()
        picture.info.clear()  # nothing of the file is left to be heeded twice
        return picture


def image_size(path: Path | str) -> tuple[int, int]:
    """Returns (width, height) of the upright image, from the header alone; raises as `read_image` if that shows why."""
    with opened_image(path) as opened:
        _check_mode(opened, str(path))
        width, height = opened.size
        # Pillow gives the size of a TIFF as it is after turning, which it does itself.
        turned = opened.format != "TIFF" and _orientation(opened) >= 5
        return (height, width) if turned else (width, height)


def image_pixels(image: Image.Image) -> UInt8[Tensor, "3 H W"]:
    """Returns an RGB image as bytes, channels first."""
    # A copy, because torch takes no array that it may not write to.
    return torch.from_numpy(numpy.array(image, dtype=numpy.uint8)).permute(2, 0, 1)


@contextmanager
def opened_image(source: Path | str | bytes, formats: tuple[str, ...] = FORMATS) -> Generator[Image.Image]:
    """Opens a file of which nothing but the header is read yet; whatever Pillow raises meanwhile names the file.

    Args:
        source: The path of a file, or what a file holds.
        formats: Pillow's names of formats that are tried.

    Raises:
        FileNotFoundError: There is no file at the path.
        UnreadableImage: Anything else that goes wrong before the context ends.
    """
    name = _name(source)
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise FileNotFoundError(f"there is no image at {source}")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats) as opened:
            yield opened
    except UnreadableImage:
        raise
    except Exception as error:  # Pillow's readers raise almost anything for a damaged file
        raise UnreadableImage(name, f"cannot be read: {str(error) or type(error).__name__}") from error


def as_rgb(image: Image.Image, name: str = "an image") -> Image.Image:
    """Returns an image of Pillow as upright RGB of 8 bits: the same object if it is that already.

    Raises:
        UnreadableImage: It holds values without a known range.
    """
    _check_mode(image, name)
    orientation = _orientation(image)
    image.load()
    if image.mode in (*SIXTEEN_BIT, "I"):
        image = _high_bytes(image)
    elif image.has_transparency_data:
        picture = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    if image.mode != "RGB":
        image = image.convert("RGB")
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])
        image.info.clear()  # or its orientation would be heeded again
    return image


def images_below(folder: Path) -> list[str]:
    """Returns the images of a folder and its subfolders by their paths below it, sorted; hidden ones are left out."""
    files = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    below = (path.relative_to(folder) for path in files)
    return sorted(path.as_posix() for path in below if not any(part.startswith(".") for part in path.parts))


def _name(source: Path | str | bytes) -> str:
    return "an image" if isinstance(source, bytes) else os.fspath(source)


def _orientation(image: Image.Image) -> int:
    """Returns EXIF's orientation, 1 where there is none.

    By the method of the base class: that of PNG decodes the whole image to look for EXIF data at its end.
    """
    value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    # Pillow turns a TIFF itself as it is loaded, and has forgotten its orientation then.
    return value if isinstance(value, int) and image.format != "TIFF" else 1


def _check_mode(image: Image.Image, name: str) -> None:
    if image.mode == "F" or (image.mode == "I" and image.format not in UNSCALED_SIXTEEN_BIT):
        raise UnreadableImage(
            name,
            f"must have 8 or 16 bits for each colour, got Pillow's mode {image.mode}, whose values have no known "
            "range; scale them to 0..255 first",
        )


def _high_bytes(image: Image.Image) -> Image.Image:
    """Returns 16-bit grey as 8-bit grey; a grey that stands for transparency becomes white."""
    values = numpy.asarray(image).astype(numpy.uint16)
    grey = (values >> 8).astype(numpy.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)
