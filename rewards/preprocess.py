"""From images of any size to the normalised square that a vision tower takes.

Both paths do the same in this order: scale the short side, crop the centre, normalise. The tensor path is part of the
graph, so that a reward's gradient reaches the pixels; the PIL path is what published scores were computed with. Rewards
that look at an encoded picture take bytes instead.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional

from overpaint.image_files import as_rgb, image_pixels, read_image
from overpaint.policy.types import Images

ImageFile = Image.Image | str | Path
"""An image of PIL, or the path of one."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of each colour channel over CLIP's training images, in [0, 1]."""
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation of each colour channel over CLIP's training images, in [0, 1]."""


def scaled_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Returns (height, width) scaled so that the shorter of them is `short_side`; the longer is rounded down."""
    if height <= width:
        return short_side, int(short_side * width / height)
    return int(short_side * height / width), short_side


def centre_offset(length: int, crop: int) -> int:
    """Returns where a centred window of `crop` begins; halves go to the even number, as in torchvision."""
    return round((length - crop) / 2)


def resize_and_crop(images: Images, size: int, *, antialias: bool = True) -> Float[Tensor, "batch 3 size size"]:
    """Scales the short side to `size` by bicubic interpolation and crops the centre; gradients flow through.

    Images that already have the size pass unchanged. Interpolation overshoots [0, 1] by up to 0.02 and is not clamped,
    as in the code that ImageReward was used for training with.
    """
    height, width = scaled_size(images.shape[2], images.shape[3], size)
    if (height, width) != tuple(images.shape[2:]):
        images = functional.interpolate(
            images, size=(height, width), mode="bicubic", align_corners=False, antialias=antialias
        )
    top, left = centre_offset(height, size), centre_offset(width, size)
    return images[:, :, top : top + size, left : left + size]


def normalise(images: Images, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Images:
    """Subtracts the mean of each colour channel and divides by its standard deviation."""
    shift = torch.tensor(mean, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
    scale = torch.tensor(std, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
    return (images - shift) / scale


def open_image(image: ImageFile) -> Image.Image:
    """Returns an image, or the one stored at a path, as upright RGB of 8 bits: see `overpaint.image_files`.

    Raises:
        TypeError: It is neither an image of PIL nor a path.
        FileNotFoundError: There is no file at the path.
        ValueError: It cannot be read, or holds values without a known range.
    """
    if isinstance(image, Image.Image):
        return as_rgb(image)
    if not isinstance(image, str | Path):
        raise TypeError(f"an image must be a PIL image or a path, got {type(image).__name__}")
    return read_image(image)


def pil_to_square(image: Image.Image, size: int) -> Float[Tensor, "3 size size"]:
    """Scales and crops with PIL, whose interpolation always antialiases and rounds to 8 bits; RGB in [0, 1].

    Conversion to RGB comes first: the code that ImageReward's published scores were computed with converts last, which
    gives the same but for images with transparency, a palette or more than 8 bits.
    """
    image = as_rgb(image)
    height, width = scaled_size(image.height, image.width, size)
    if (height, width) != (image.height, image.width):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    top, left = centre_offset(height, size), centre_offset(width, size)
    return from_pil(image.crop((left, top, left + size, top + size)))


def from_pil(image: Image.Image) -> Float[Tensor, "3 H W"]:
    """Returns an image as upright RGB in [0, 1], float32."""
    return image_pixels(as_rgb(image)).float() / 255


def to_pixels(images: Images) -> UInt8[numpy.ndarray, "batch H W 3"]:
    """Rounds images in [0, 1] to 8 bits, channels last; red comes first."""
    levels = (images.detach().float() * 255).round().clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).cpu().numpy()
