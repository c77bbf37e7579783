"""Images as files in memory, as they travel to a server; what arrives there is not trusted."""

import io
from typing import Literal

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from overpaint.image_files import UnreadableImage, opened_image
from overpaint.policy.types import Images

from .preprocess import from_pil, to_pixels

ImageFormat = Literal["png", "jpeg"]
"""How images travel: without loss, or as a JPEG, which is smaller and changes them a little."""


def encode_images(images: Images, format: ImageFormat = "png", quality: int = 95) -> list[bytes]:
    """Returns each image as a file; values are rounded to 8 bits, and those outside [0, 1] are clamped.

    Args:
        images: RGB in [0, 1].
        format: "png", which keeps all 8 bits, or "jpeg".
        quality: Quality of a JPEG, from 1 to 100; Pillow's chroma subsampling is its default, 4:2:0.

    Raises:
        ValueError: An image holds a value that is not finite, or there is no such format or quality.
    """
    check_format(format, quality)
    finite = torch.isfinite(images).flatten(1).all(dim=1)
    if not finite.all():
        first = int((~finite).nonzero()[0])
        raise ValueError(f"images must be finite, got NaN or infinity in image {first} of {len(images)}")
    # The fastest level: on noise, as on photographs, higher ones take several times as long for a few percent.
    options = {"compress_level": 1} if format == "png" else {"quality": quality}
    files = []
    for pixels in to_pixels(images):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format, **options)
        files.append(file.getvalue())
    return files


def decode_image(content: bytes, max_pixels: int) -> Float[Tensor, "3 H W"]:
    """Returns the image of a file, RGB in [0, 1], float32.

    Args:
        content: A PNG or a JPEG, RGB or grey, 8 bits per channel.
        max_pixels: Largest width times height that is decoded; read off the header first.

    Raises:
        ValueError: It is neither a PNG nor a JPEG, is too large, is damaged, or has other channels.
    """
    try:
        with opened_image(content, formats=("PNG", "JPEG")) as opened:
            width, height = opened.size
            if not 0 < width * height <= max_pixels:
                raise UnreadableImage("an image", f"must have at most {max_pixels} pixels, got {width} x {height}")
            if opened.mode not in ("RGB", "L"):
                why = f"must be 8-bit RGB or grey, without transparency, got {opened.mode}"
                raise UnreadableImage("an image", why)
            return from_pil(opened)
    except UnreadableImage as error:
        if error.__cause__ is None:
            raise
        raise ValueError(
            f"an image must be a PNG or a JPEG, and a whole one, got what ends in {type(error.__cause__).__name__}"
        ) from error


def check_format(format: str, quality: int) -> None:
    """Checks how images are to be encoded.

    Raises:
        ValueError: There is no such format or quality.
    """
    if format not in ("png", "jpeg"):
        raise ValueError(f"format must be png or jpeg, got {format!r}")
    if quality not in range(1, 101):
        raise ValueError(f"quality must be a whole number from 1 to 100, got {quality!r}")
