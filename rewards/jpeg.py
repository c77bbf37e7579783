"""How many kilobytes an image takes as a JPEG: the two simplest rewards that have no gradient."""

from collections.abc import Sequence
from typing import Annotated

import torch

from overpaint.policy.types import Images, PerSample
from overpaint.settings import Field

from .encoded import encode_images
from .types import check_pairs


class Incompressibility:
    """The size of each image as a JPEG, in kB: detail and noise score high; prompts do not matter.

    The size counts everything that a file has, its header of about 0.6 kB too. It depends on the encoder that Pillow
    was built with by a percent or so, and on nothing else in the batch.

    Source: Black et al. (2023), https://arxiv.org/abs/2305.13301, and kvablack/ddpo-pytorch, `rewards.py`.

    Args:
        quality: Quality that Pillow encodes with, from 1 to 100.
    """

    differentiable = False
    reads_prompts = False
    sign = 1

    def __init__(self, quality: Annotated[int, Field(ge=1, le=100)] = 95) -> None:
        self.quality = quality

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Returns the score of each image in kB."""
        check_pairs(images, prompts)
        return self.sign * jpeg_sizes(images, self.quality)


class Compressibility(Incompressibility):
    """Minus the size of each image as a JPEG, in kB: smooth images score high; see `Incompressibility`."""

    sign = -1


def jpeg_sizes(images: Images, quality: int) -> PerSample:
    """Returns how many thousands of bytes each image takes as a JPEG, in float32 on the images' device.

    Values are rounded to 8 bits, not truncated, and those outside [0, 1] are clamped. Pillow's other settings are its
    defaults: 4:2:0 chroma, Huffman tables not optimised.

    Raises:
        ValueError: An image holds a value that is not finite; it would be encoded as something, and scored.
    """
    sizes = [len(file) / 1000 for file in encode_images(images, "jpeg", quality)]
    return torch.tensor(sizes, dtype=torch.float32, device=images.device)
