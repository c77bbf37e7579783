"""Distances between two sets of images: FID, of the Inception network's features, and CMMD, of CLIP's embeddings.

FID is computed by torchmetrics, of the extra `fid`, which adds up the features' moments in float64; its own way to the
features would need torchvision. Source: Heusel et al. (2017), https://arxiv.org/abs/1706.08500, section 3.

The network is the one of 2015-12-05 that TensorFlow published and Heusel et al. used, not the later ones called
Inception v3. Layers have the names that they have in the one file of its weights in PyTorch, which torch-fidelity and
pytorch-fid publish. Source: Szegedy et al. (2016), https://arxiv.org/abs/1512.00567; the file itself; torch-fidelity's
outputs, which the tests compare with.

CMMD is the maximum mean discrepancy. Source: Jayasumana et al. (2024), https://arxiv.org/abs/2401.09603, section 4, and
google-research/cmmd, `distance.py`: a Gaussian kernel of bandwidth 10, times 1000, and the biased estimator, which
counts an image with itself too. The paper writes the unbiased one, and the two hardly differ; published numbers are of
the biased one.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from overpaint.evaluation.images.files import Pixels, to_images
from overpaint.evaluation.images.pairs import in_batches
from overpaint.policy.weight_files import flat_tensors, read_pickle
from rewards import ClipEncoder
from rewards.checkpoint import HubFiles
from rewards.clip_encoder import Vectors
from rewards.public_files import sha256_of

WEIGHTS_NAME = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS_NAME}"
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Of the file's 95,628,359 bytes; pytorch-fid's `pt_inception-2015-12-05-6726825d.pth` is the same file."""
_BY_HAND = f"Where there is a network, save {WEIGHTS_URL} (SHA-256 {WEIGHTS_SHA256}) and give its path"
SIDE = 299
"""Pixels of a side that the network takes."""

Maps = Float[Tensor, "batch _ _ _"]
Branches = Mapping[str, Sequence[tuple[Any, ...]]]
"""Stages of chains: the channels and the kernel of a convolution; with two kernels two of them, side by side."""

ONE, THREE, FIVE, ROW, COLUMN = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1)
BLOCK_A: Branches = {
    "branch1x1": [(64, ONE)],
    "branch5x5": [(48, ONE), (64, FIVE)],
    "branch3x3dbl": [(64, ONE), (96, THREE), (96, THREE)],
}
REDUCTION_TO_17: Branches = {"branch3x3": [(384, THREE)], "branch3x3dbl": [(64, ONE), (96, THREE), (96, THREE)]}
REDUCTION_TO_8: Branches = {
    "branch3x3": [(192, ONE), (320, THREE)],
    "branch7x7x3": [(192, ONE), (192, ROW), (192, COLUMN), (192, THREE)],
}
BLOCK_E: Branches = {
    "branch1x1": [(320, ONE)],
    "branch3x3": [(384, ONE), (384, (1, 3), (3, 1))],
    "branch3x3dbl": [(448, ONE), (384, THREE), (384, (1, 3), (3, 1))],
}


def _block_c(middle: int) -> Branches:
    return {
        "branch1x1": [(192, ONE)],
        "branch7x7": [(middle, ONE), (middle, ROW), (192, COLUMN)],
        "branch7x7dbl": [(middle, ONE), (middle, COLUMN), (middle, ROW), (middle, COLUMN), (192, ROW)],
    }


class Inception(nn.Module):
    """Maps images to 2,048 features each, as they enter the last layer."""

    num_features = 2048

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, (3, 3), stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, (3, 3))
        self.Conv2d_2b_3x3 = Convolution(32, 64, (3, 3), same=True)
        self.Conv2d_3b_1x1 = Convolution(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = Convolution(80, 192, (3, 3))
        for name, inputs, pooled in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
            self.add_module(f"Mixed_{name}", Block(inputs, BLOCK_A, pooled))
        self.Mixed_6a = Block(288, REDUCTION_TO_17, None)
        for name, middle in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            self.add_module(f"Mixed_{name}", Block(768, _block_c(middle), 192))
        self.Mixed_7a = Block(768, REDUCTION_TO_8, None)
        self.Mixed_7b = Block(1280, BLOCK_E, 192)
        self.Mixed_7c = Block(2048, BLOCK_E, 192, maximum=True)
        self.fc = nn.Linear(2048, 1008)

    @classmethod
    def from_file(cls, path: Path | str, sha256: str | None = WEIGHTS_SHA256) -> "Inception":
        """Loads frozen weights from their file.

        Args:
            path: The file.
            sha256: What its content must have as SHA-256; None leaves it unchecked.

        Raises:
            FileNotFoundError: There is no such file; the message says where to get it.
            ValueError: It has other content.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"the features' file must be there, got {path}, which is not. {_BY_HAND}")
        found = sha256_of(path)
        if sha256 is not None and found != sha256:
            raise ValueError(f"{path} must have SHA-256 {sha256}, got {found}. {_BY_HAND}")
        network = cls()
        network.load_state_dict(flat_tensors(read_pickle(path), path))
        return network.eval().requires_grad_(False)

    def forward(self, images: Pixels) -> Float[Tensor, "batch 2048"]:
        """Returns the features of images of any size, RGB in 0..255."""
        maps = (_scaled(images.float()) - 128) / 128
        maps = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(maps)))
        maps = functional.max_pool2d(maps, 3, stride=2)
        maps = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(maps))
        maps = functional.max_pool2d(maps, 3, stride=2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                maps = block(maps)
        return maps.mean(dim=(2, 3))


class Convolution(nn.Module):
    """A convolution, its normalisation, and what is positive of it; `same` keeps height and width by padding."""

    def __init__(
        self, inputs: int, outputs: int, kernel: tuple[int, int], *, stride: int = 1, same: bool = False
    ) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if same else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, maps: Maps) -> Maps:
        """Returns the maps of the layer."""
        return functional.relu(self.bn(self.conv(maps)))


class Block(nn.Module):
    """Branches side by side: chains of convolutions, and a pooling.

    Args:
        inputs: Channels of what comes in.
        branches: The stages of each chain by the beginning of its layers' names.
        pooled: Channels of the convolution after the pooling; None for a block without, which halves height and width.
        maximum: Whether the maximum is pooled, or the mean over 3 x 3 places, those outside not counted, as TensorFlow
            takes it. The published network has one block with each of the two at 8 x 8.
    """

    def __init__(self, inputs: int, branches: Branches, pooled: int | None, *, maximum: bool = False) -> None:
        super().__init__()
        self.halves, self.maximum = pooled is None, maximum
        self.stages: list[list[list[str]]] = []
        for branch, stages in branches.items():
            width, names = inputs, []
            for number, (channels, *kernels) in enumerate(stages, start=1):
                stem = branch if len(stages) == 1 else f"{branch}_{number}"
                names.append([stem] if len(kernels) == 1 else [f"{stem}{letter}" for letter in "ab"])
                ends = self.halves and number == len(stages)
                for name, kernel in zip(names[-1], kernels, strict=True):
                    self.add_module(name, Convolution(width, channels, kernel, stride=1 + ends, same=not ends))
                width = channels * len(kernels)
            self.stages.append(names)
        if pooled is not None:
            self.branch_pool = Convolution(inputs, pooled, (1, 1))

    def forward(self, maps: Maps) -> Maps:
        """Returns the branches' maps as channels."""
        outputs = []
        for names in self.stages:
            output = maps
            for stage in names:
                output = torch.cat([self.get_submodule(name)(output) for name in stage], dim=1)
            outputs.append(output)
        if self.halves:
            outputs.append(functional.max_pool2d(maps, 3, stride=2))
        elif self.maximum:
            outputs.append(self.branch_pool(functional.max_pool2d(maps, 3, stride=1, padding=1)))
        else:
            means = functional.avg_pool2d(maps, 3, stride=1, padding=1, count_include_pad=False)
            outputs.append(self.branch_pool(means))
        return torch.cat(outputs, dim=1)


def _scaled(images: Maps) -> Maps:
    """Scales to `SIDE` as TensorFlow 1 did: bilinear, not antialiased, the corner of the first pixel at the origin."""
    for dim in (2, 3):
        length = images.shape[dim]
        places = torch.arange(SIDE, device=images.device) * (length / SIDE)
        first = places.floor().long()
        second = (first + 1).clamp(max=length - 1)
        shape = [-1 if k == dim else 1 for k in range(4)]
        share = (places - first).to(images.dtype).view(shape)
        images = images.index_select(dim, first) * (1 - share) + images.index_select(dim, second) * share
    return images


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
    """Returns the mean of the kernel exp(-|x - y|² / (2 SIGMA²)) over all pairs, or those of two different places.

    All values lie within 2 % of 1, and their differences are what counts: float64.
    """
    total = torch.zeros((), dtype=torch.float64, device=first.device)
    for one in map(Tensor.double, first.split(block)):
        for other in map(Tensor.double, second.split(block)):
            squares = one.square().sum(dim=1)[:, None] + other.square().sum(dim=1)[None] - 2 * one @ other.T
            total += torch.exp(-squares.clamp(min=0) / (2 * SIGMA**2)).sum()
    if off_diagonal:
        return (float(total) - len(first)) / (len(first) * (len(first) - 1))
    return float(total) / (len(first) * len(second))
