"""CMMD: how far two sets of images are apart, by the maximum mean discrepancy of their CLIP embeddings.

Source: Jayasumana et al. (2024), https://arxiv.org/abs/2401.09603, section 4, and google-research/cmmd, `distance.py`:
a Gaussian kernel of bandwidth 10, times 1000, and the biased estimator, which counts an image with itself too. The
paper writes the unbiased one, and the two hardly differ; published numbers are of the biased one.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from overpaint.evaluation.images.images import to_images
from overpaint.evaluation.images.pair_images import in_batches
from rewards import ClipEncoder
from rewards.checkpoint import HubFiles
from rewards.clip_encoder import Vectors

SIGMA = 10.0
"""Bandwidth of the kernel."""
SCALE = 1000.0
"""What the squared discrepancy is multiplied by, to be readable."""
VIT_L_14_336 = HubFiles(
    repository="openai/clip-vit-large-patch14-336",
    revision="ce19dc912ca5cd21c8a653c79e251e808ccabcd1",
    files={
        "config.json": "51b1c14aabcdf639c4a0370eeda1010b773bbe1df78319c7d0f5882c22ac0ac0",
        "pytorch_model.bin": "c6032c2e0caae3dc2d4fba35535fa6307dbb49df59c7e182b1bc4b3329b81801",
        "vocab.json": None,
        "merges.txt": None,
    },
)
"""OpenAI's CLIP ViT-L/14 at 336 pixels, 1.7 GB, whose embeddings CMMD is defined by."""


def cmmd(
    first: Float[Tensor, "m dim"], second: Float[Tensor, "n other"], *, unbiased: bool = False, block: int = 1024
) -> float:
    """Returns the CMMD of two sets of unit vectors; 0 for equal sets, larger the further apart.

    Args:
        first: Embeddings of one set of images; at least 2.
        second: Embeddings of the other.
        unbiased: Whether an image is not compared with itself. The result can then be negative.
        block: Vectors of each set that are compared at a time; changes memory, not the result.

    Raises:
        ValueError: A set is too small, the vectors have different sizes or are not of length 1, or `block` is not
            positive.
    """
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"first and second must be of one dimension, got {first.shape[1]} and {second.shape[1]}")
    for name, vectors in (("first", first), ("second", second)):
        if len(vectors) < 2:
            raise ValueError(f"{name} must hold at least 2 vectors, got {len(vectors)}")
        longest = float((torch.linalg.vector_norm(vectors.double(), dim=1) - 1).abs().max())
        if not longest < 1e-3:
            raise ValueError(f"{name} must hold vectors of length 1, got one that is {longest:.3g} off")
    within = _mean_kernel(first, first, unbiased, block) + _mean_kernel(second, second, unbiased, block)
    return SCALE * (within - 2 * _mean_kernel(first, second, False, block))


@torch.no_grad()
def clip_embeddings(encoder: ClipEncoder, paths: Sequence[Path], *, batch_size: int = 16) -> Vectors:
    """Returns a unit vector for each image, on the CPU; images may be of any sizes.

    Args:
        encoder: `ClipEncoder.from_folder(VIT_L_14_336.fetch())`, if the result is to be compared with published ones.
        paths: The files of the images.
        batch_size: Images that are embedded at a time; those of one size together.

    Raises:
        ValueError: There are no images, or one cannot be read.
    """
    vectors = torch.empty(len(paths), encoder.dim)
    for places, pixels in in_batches(paths, batch_size):
        vectors[places] = encoder.image_embeddings(to_images(pixels.to(encoder.device))).float().cpu()
    return vectors


def _mean_kernel(
    first: Float[Tensor, "m dim"], second: Float[Tensor, "n dim"], off_diagonal: bool, block: int
) -> float:
    """Returns the mean of the kernel over all pairs, or over those of two different places.

    All values lie within 2 % of 1, and their differences are what counts: float64.
    """
    total = torch.zeros((), dtype=torch.float64, device=first.device)
    for one in first.split(block):
        for other in second.split(block):
            total += _kernel(one.double(), other.double()).sum()
    if off_diagonal:
        return (float(total) - len(first)) / (len(first) * (len(first) - 1))
    return float(total) / (len(first) * len(second))


def _kernel(one: Float[Tensor, "m dim"], other: Float[Tensor, "n dim"]) -> Float[Tensor, "m n"]:
    """Returns exp(-|x - y|² / (2 SIGMA²)) of every pair."""
    squares = one.square().sum(dim=1)[:, None] + other.square().sum(dim=1)[None] - 2 * one @ other.T
    return torch.exp(-squares.clamp(min=0) / (2 * SIGMA**2))
