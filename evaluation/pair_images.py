"""The images of pairs: looked into before any work, sorted into batches of one size, and read a batch ahead."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from .files import read_png
from .pairs import Pair

Size = tuple[int, int]
"""Width and height in pixels."""
Read = UInt8[Tensor, "3 H W"] | str
"""An image, or why it cannot be read."""


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


def read_ahead(batches: Mapping[int, list[int]], pairs: Sequence[Pair]) -> Iterator[tuple[int, list[int], list[Read]]]:
    """Yields the number of each batch, its indices and its images, while those of the next are being read."""

    def ask(batch: Sequence[int]) -> list[Future[Read]]:
        return [pool.submit(_read, pairs[index].path) for index in batch]

    numbers = list(batches)
    with ThreadPoolExecutor() as pool:
        asked = [ask(batches[number]) for number in numbers[:1]]
        for place, number in enumerate(numbers):
            asked += [ask(batches[later]) for later in numbers[place + 1 : place + 2]]
            yield number, batches[number], [future.result() for future in asked.pop(0)]


def _size(path: Path) -> Size | str:
    """Returns the size of an image, or why it cannot be read."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                return f"it must have 8 bits for each colour, got Pillow's mode {image.mode}"
            return image.size
    except Exception as error:  # Pillow's readers raise almost anything for a damaged file
        return f"it cannot be read: {error}"


def _read(path: Path) -> Read:
    """Returns an image, or why it cannot be read."""
    try:
        return read_png(path)
    except Exception as error:
        return f"it cannot be read: {error}"
