"""A measure, and what it says of a few images at a time."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

from overpaint.evaluation.images.images import to_images
from overpaint.evaluation.images.plan import KINDS, PlannedImage
from overpaint.policy.types import Images

Metric = Callable[[Images, Sequence[str]], Tensor | Sequence[float] | Sequence[bool]]
"""Gives one number, or one yes or no, for each image and its prompt; every `rewards.Reward` is one."""

Better = Literal["higher", "lower", "neither"]


class Measure(NamedTuple):
    """A metric, with what a reader of its numbers needs to know."""

    name: str
    metric: Metric
    kinds: tuple[str, ...] = ()
    """Kinds of prompts it is taken on; empty for all."""
    better: Better = "higher"
    """Which way is better."""
    note: str = ""
    """What the number means: version, labels, threshold and count rule of a detector, for example."""


def digest_of(shown: Sequence[PlannedImage], pixels: Sequence[UInt8[Tensor, "3 _ _"]]) -> str:
    """Returns what differs if a batch holds other images, prompts or seeds."""
    digest = hashlib.blake2b(json.dumps([list(image) for image in shown]).encode(), digest_size=16)
    for image in pixels:
        digest.update(str(tuple(image.shape)).encode())
        digest.update(image.contiguous().numpy())
    return digest.hexdigest()


def measured(
    measures: Sequence[Measure],
    shown: Sequence[PlannedImage],
    pixels: Sequence[UInt8[Tensor, "3 _ _"]],
    device: torch.device | str,
) -> dict[str, Any]:
    """Returns the values of a batch of one kind by each measure that is taken on it, and which of them are rates."""
    taken = [measure for measure in measures if not measure.kinds or shown[0].kind in measure.kinds]
    values = {measure.name: [math.nan] * len(shown) for measure in taken}
    rates = set()
    for places in _of_one_size(pixels) if taken else []:
        stack = to_images(torch.stack([pixels[place] for place in places]).to(device))
        prompts = [shown[place].prompt for place in places]
        for measure in taken:
            numbers, is_rate = _apply(measure, stack, prompts)
            for place, number in zip(places, numbers, strict=True):
                values[measure.name][place] = number
            if is_rate:
                rates.add(measure.name)
    return {"values": values, "rates": sorted(rates)}


def _of_one_size(pixels: Sequence[UInt8[Tensor, "3 _ _"]]) -> list[list[int]]:
    """Returns the places of images of each size."""
    places: dict[torch.Size, list[int]] = {}
    for place, image in enumerate(pixels):
        places.setdefault(image.shape, []).append(place)
    return list(places.values())


def fitted(pixels: UInt8[Tensor, "3 H W"], size: int) -> UInt8[Tensor, "3 size size"]:
    """Returns an image cropped to its centre square and scaled, antialiased bicubic, in 8 bits; or as it is."""
    if pixels.shape[1:] == (size, size):
        return pixels
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1)


def _apply(measure: Measure, images: Images, prompts: Sequence[str]) -> tuple[list[float], bool]:
    """Returns a metric's values and whether they are yes or no."""
    with torch.no_grad():
        values = torch.as_tensor(measure.metric(images, prompts))
    if values.shape != (len(prompts),):
        raise ValueError(
            f"measures[{measure.name!r}] must return one value for each of {len(prompts)} images, "
            f"got shape {tuple(values.shape)}"
        )
    numbers = values.double().tolist()
    for number, prompt in zip(numbers, prompts, strict=True):
        if not math.isfinite(number):
            raise ValueError(f"measures[{measure.name!r}]: values must be finite, got {number} for prompt {prompt!r}")
    return numbers, values.dtype == torch.bool


def check_measures(measures: Sequence[Measure], kinds: Sequence[str]) -> None:
    """Checks that measures can be told apart and are of kinds that exist.

    Raises:
        ValueError: They are not; the message says which.
    """
    names = [measure.name for measure in measures]
    if not names:
        raise ValueError("measures must hold at least one, got none")
    if len(set(names)) < len(names):
        raise ValueError(f"measures must have unique names, got {names}")
    for measure in measures:
        for kind in measure.kinds:
            # A process's shard may lack a kind that is drawn elsewhere, so that the usual ones always pass.
            if kind not in kinds and kind not in KINDS:
                known = ", ".join(dict.fromkeys((*kinds, *KINDS)))
                raise ValueError(f"measures[{measure.name!r}].kinds must be among {known}, got {kind!r}")
