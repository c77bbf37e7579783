"""Stand-ins for images and rewards: an image is two pixels that hold a number, which a reward reads back.

A program that has not left the other processes when it ends says so.
"""

import atexit
import hashlib
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor


@atexit.register
def tell() -> None:
    if torch.distributed.is_initialized():
        sys.stdout.write("still connected\n")


def write_stand_in(path: Path, name: str, rank: int) -> None:
    """Writes an image that holds the first four bytes of the SHA-256 of a name, and a rank."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = bytes([*hashlib.sha256(name.encode()).digest()[:4], rank, 0])
    Image.frombytes("RGB", (2, 1), content).save(path, format="PNG", compress_level=0)


class HashScore:
    """The number that an image holds, in [0, 1): what the golden case calls hash."""

    differentiable = False
    reads_prompts = False

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if "NOTED" in os.environ:
            with open(os.environ["NOTED"], "a", encoding="utf-8") as file:
                file.write(f"{type(self).__name__} {len(images)}\n")
        return self.scores(images)

    def scores(self, images: Tensor) -> Tensor:
        values = self.bytes_of(images)
        return values[:, :4] @ torch.tensor([2.0**-8, 2.0**-16, 2.0**-24, 2.0**-32], dtype=torch.float64)

    def bytes_of(self, images: Tensor) -> Tensor:
        return (images.permute(0, 2, 3, 1).flatten(1).double() * 255).round()


class HashMinusRank(HashScore):
    """The number less a quarter of the rank: hash_minus_rank."""

    def scores(self, images: Tensor) -> Tensor:
        return super().scores(images) - 0.25 * self.bytes_of(images)[:, 4]


class HashQuantised(HashScore):
    """Sixths of the number, many of them equal: hash_quantised."""

    def scores(self, images: Tensor) -> Tensor:
        return (6 * super().scores(images)).floor()


class NotFinite(HashScore):
    """No score for any image."""

    def scores(self, images: Tensor) -> Tensor:
        return torch.full((len(images),), math.nan)
