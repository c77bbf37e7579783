"""The images of pairs: looked into before any work, sorted into batches of one size, and read a batch ahead."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from overpaint.evaluation.scoring.pairs import Pair, read_pairs

from .files import read_png
from .images import Pixels

Size = tuple[int, int]
"""Width and height in pixels."""
Read = UInt8[Tensor, "3 H W"] | str
"""An image, or why it cannot be read."""
Item = TypeVar("Item")


def image_sizes(pairs: Sequence[Pair], *, skip_broken: bool = False) -> list[Size | str]:
    """Looks into the header of every image, which takes little time and finds most broken ones before any work.

    Returns:
        For each pair the size of its image, or why it cannot be read if broken ones are skipped.

    Raises:
        ValueError: An image is missing, is not one, or is not of 8 bits, and broken ones are not skipped.
    """
    with ThreadPoolExecutor() as pool:
        sizes = list(pool.map(lambda pair: _size(pair.path), pairs))
    broken = [(pair, size) for pair, size in zip(pairs, sizes, strict=True) if isinstance(size, str)]
    if broken and not skip_broken:
        pair, why = broken[0]
        raise ValueError(f"images must be readable, got {len(broken)} of {len(pairs)} that are not: {pair.path}: {why}")
    return sizes


def batches_of(sizes: Sequence[Size | str], batch_size: int) -> list[list[int]]:
    """Returns the indices of images of one size, batch by batch, about in the order of the pairs."""
    places: dict[Size, list[int]] = {}
    for index, size in enumerate(sizes):
        if not isinstance(size, str):
            places.setdefault(size, []).append(index)
    batches = [some[k : k + batch_size] for some in places.values() for k in range(0, len(some), batch_size)]
    return sorted(batches)


def read_ahead(
    batches: Mapping[int, Sequence[int]], read: Callable[[int], Item]
) -> Iterator[tuple[int, Sequence[int], list[Item]]]:
    """Yields the number of each batch, its indices and what was read of each, while the next batch is being read.

    Two batches at most are in memory, however many there are.

    Args:
        batches: The indices of each batch, by its number.
        read: Reads what has an index; called by several threads at once.
    """

    def ask(batch: Sequence[int]) -> list[Future[Item]]:
        return [pool.submit(read, index) for index in batch]

    numbers = list(batches)
    with ThreadPoolExecutor() as pool:
        asked = [ask(batches[number]) for number in numbers[:1]]
        for place, number in enumerate(numbers):
            asked += [ask(batches[later]) for later in numbers[place + 1 : place + 2]]
            yield number, batches[number], [future.result() for future in asked.pop(0)]


def image_files(folder: Path | str) -> list[Path]:
    """Returns the images of a folder and its subfolders, sorted by name.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: There are no images.
    """
    return [pair.path for pair in read_pairs(Path(folder))]


def in_batches(paths: Sequence[Path], batch_size: int) -> Iterator[tuple[list[int], Pixels]]:
    """Yields the images of files, a few of one size at a time, with their places; two batches are in memory at most.

    Raises:
        ValueError: There are no images, one cannot be read, or `batch_size` is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not paths:
        raise ValueError("paths must hold at least one image, got none")
    sizes = [_size(path) for path in paths]
    for path, size in zip(paths, sizes, strict=True):
        if isinstance(size, str):
            raise ValueError(f"{path}: {size}")
    batches = dict(enumerate(batches_of(sizes, batch_size)))
    for _, places, images in read_ahead(batches, lambda place: read_image(paths[place])):
        for place, image in zip(places, images, strict=True):
            if isinstance(image, str):
                raise ValueError(f"{paths[place]}: {image}")
        yield list(places), torch.stack([image for image in images if not isinstance(image, str)])


def read_image(path: Path) -> Read:
    """Returns an image, or why it cannot be read."""
    try:
        return read_png(path)
    except Exception as error:  # Pillow's readers raise almost anything for a damaged file
        return f"it cannot be read: {error}"


def _size(path: Path) -> Size | str:
    """Returns the size of an image, or why it cannot be read."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                return f"it must have 8 bits for each colour, got Pillow's mode {image.mode}"
            return image.size
    except Exception as error:  # Pillow's readers raise almost anything for a damaged file
        return f"it cannot be read: {error}"
