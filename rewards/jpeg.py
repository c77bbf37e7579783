"""How many kilobytes an image takes as a JPEG: the two simplest rewards that have no gradient."""

import io
from collections.abc import Sequence

import torch
from PIL import Image

from overpaint.policy.types import Images, PerSample

from .preprocess import to_pixels
from .types import check_pairs


class Compressibility:
    """Minus the size of each image as a JPEG, in kB: smooth images score high; prompts do not matter.

    The size counts everything that a file has, its header of about 0.6 kB too. It depends on the encoder that Pillow
    was built with by a percent or so, and on nothing else in the batch.

    Source: Black et al. (2023), https://arxiv.org/abs/2305.13301, and kvablack/ddpo-pytorch, `rewards.py`.

    Args:
        quality: Quality that Pillow encodes with, from 1 to 100.
    """

    differentiable = False
    reads_prompts = False

    def __init__(self, quality: int = 95) -> None:
        self.quality = _checked(quality)

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Returns minus the size of each image in kB."""
        check_pairs(images, prompts)
        return -jpeg_sizes(images, self.quality)


class Incompressibility:
    """The size of each image as a JPEG, in kB: detail and noise score high; prompts do not matter.

    See `Compressibility`, whose negative it is.

    Args:
        quality: Quality that Pillow encodes with, from 1 to 100.
    """

    differentiable = False
    reads_prompts = False

    def __init__(self, quality: int = 95) -> None:
        self.quality = _checked(quality)

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Returns the size of each image in kB."""
        check_pairs(images, prompts)
        return jpeg_sizes(images, self.quality)


def jpeg_sizes(images: Images, quality: int) -> PerSample:
    """Returns how many thousands of bytes each image takes as a JPEG, in float32 on the images' device.

    Values are rounded to 8 bits, not truncated, and those outside [0, 1] are clamped. Pillow's other settings are its
    defaults: 4:2:0 chroma, Huffman tables not optimised.

    Raises:
        ValueError: An image holds a value that is not finite; it would be encoded as something, and scored.
    """
    finite = torch.isfinite(images).flatten(1).all(dim=1)
    if not finite.all():
        first = int((~finite).nonzero()[0])
        raise ValueError(f"images must be finite, got NaN or infinity in image {first} of {len(images)}")
    sizes = []
    for pixels in to_pixels(images):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="JPEG", quality=quality)
        sizes.append(file.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float32, device=images.device)


def _checked(quality: int) -> int:
    if quality not in range(1, 101):
        raise ValueError(f"quality must be a whole number from 1 to 100, got {quality!r}")
    return quality
