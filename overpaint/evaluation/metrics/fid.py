"""The Fréchet Inception distance between two sets of images, computed by torchmetrics.

Source: Heusel et al. (2017), https://arxiv.org/abs/1706.08500, section 3. torchmetrics, of the extra `fid`, adds up the
features' moments in float64 and takes the distance; its own way to the features would need torchvision.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from overpaint.evaluation.images.pair_images import in_batches


@torch.no_grad()
def frechet_distance(
    network: nn.Module,
    real: Sequence[Path],
    drawn: Sequence[Path],
    *,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
) -> float:
    """Returns the Fréchet distance between normal distributions with the moments of two sets' features.

    The number depends on how many images there are: sets of 2,048 images or fewer have covariances without full rank,
    and papers take 10,000 to 50,000. Memory does not grow with the number of images.

    Args:
        network: Maps images, RGB in 0..255, to features; `Inception.from_file(path)` for FID. It has to say the number
            of features as `num_features`.
        real: Files of the images that are compared with, of any sizes.
        drawn: Files of the images that were drawn.
        batch_size: Images that are read and mapped at a time; those of one size together.
        device: Where the network is put and run.

    Raises:
        ImportError: torchmetrics is missing.
        ValueError: A set has fewer than two images, or one cannot be read.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "torchmetrics":
            raise
        raise ImportError(
            "FID needs the package torchmetrics, which the extra fid brings: pip install overpaint[fid]"
        ) from error
    for name, paths in (("real", real), ("drawn", drawn)):
        if len(paths) < 2:
            raise ValueError(f"{name} must hold at least 2 images, got {len(paths)}")
    metric = FrechetInceptionDistance(feature=network.eval()).to(device)
    for paths, is_real in ((real, True), (drawn, False)):
        for _, pixels in in_batches(paths, batch_size):
            metric.update(pixels.to(device), real=is_real)
    return float(metric.compute())
