"""Reward: a score for each pair of image and prompt."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy
import torch
from torch import Tensor

from overpaint.policy.types import Images, PerSample


@runtime_checkable
class Reward(Protocol):
    """A score for each image, given the prompt that it was drawn for; higher is better.

    A detector of something unwanted is a reward as well: its score grows with what it detects, and whoever
    uses it decides the sign. One that does not read prompts may say so by an attribute `reads_prompts` that is
    False: programs then ask for none.
    """

    differentiable: bool
    """Whether gradients flow from the scores to the images."""

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Returns one score per image, in the reward's own units; images are RGB in [0, 1].

        Rewards of this package raise what `check_pairs` does where prompts and images are not pairs.
        """
        ...


ScoreFunction = Callable[[Images, Sequence[str]], PerSample]
"""A reward, or a cost on images."""

RewardLike = Reward | Callable[[Images, Any], Any]
"""What is accepted as a reward: `rewards.as_reward` makes one of a plain function of images and prompts."""


class ScoresError(ValueError):
    """A reward gave something else than one number for each image: a fault of its code, which no second try mends."""


def scores_of(kind: str, score: Callable[[Images, Any], Any], images: Images, prompts: Sequence[str]) -> PerSample:
    """Returns the reward or the cost of each image, computed in full precision, on the images' device.

    Half precision moves ImageReward by about 0.1, as much as a good run gains in many iterations.

    Args:
        kind: What to call the score in a message, such as "reward".
        score: The reward or the cost.
        images: RGB in [0, 1].
        prompts: One for each image.

    Raises:
        ScoresError: It does not give one number for each.
    """
    with torch.autocast(images.device.type, enabled=False):
        given = score(images, prompts)
    scores = as_scores(kind, given, images)
    return scores if isinstance(given, Tensor) and scores.is_floating_point() else scores.float()


def as_scores(kind: str, given: Any, images: Images) -> Tensor:
    """Returns what a reward gave as one number for each image: [batch], on the images' device.

    A column [batch, 1], an array and a list or tuple of numbers or of tensors (whose gradients stay) are taken; yes and
    no stay what they are.

    Args:
        kind: What to call the score in a message.
        given: What the reward gave.
        images: What it was given for.

    Raises:
        ScoresError: It is not one number for each image.
    """
    scores, count = _tensor_of(given), len(images)
    if scores is None:
        raise ScoresError(f"{kind} must give one number for each of {count} images, got {type(given).__name__}")
    if scores.shape == (count, 1):
        scores = scores[:, 0]
    if scores.shape != (count,):
        found = "one number for all of them" if scores.ndim == 0 else str(tuple(scores.shape))
        raise ScoresError(f"{kind} must give one number for each of {count} images, got {found}")
    return scores.to(images.device)


def _tensor_of(given: Any) -> Tensor | None:
    """Returns numbers as a tensor, or None where they are none."""
    try:
        if isinstance(given, list | tuple) and given and all(isinstance(one, Tensor) for one in given):
            given = torch.stack(list(given))
        if not isinstance(given, Tensor | list | tuple):
            given = numpy.asarray(given)
        scores = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):  # no numbers, or rows of different lengths
        return None
    return None if scores.is_complex() else scores


def reads_prompts(reward: Reward) -> bool:
    """Says whether a reward's scores depend on the prompts: they do, unless it has `reads_prompts = False`."""
    return bool(getattr(reward, "reads_prompts", True))


def to_device(reward: object, device: torch.device | str) -> None:
    """Moves a reward's network to a device, in place; a reward without one stays as it is."""
    move = getattr(reward, "to", None)
    if callable(move):
        move(device)


def check_pairs(images: Images, texts: Sequence[str], name: str = "prompts") -> None:
    """Checks that images and texts form pairs.

    Raises:
        TypeError: The images are not floating point, or a text is not a string.
        ValueError: The images are not a batch of RGB images, or there is not one text for each.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must have shape [batch, 3, height, width], got {list(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point in [0, 1], got {images.dtype}; divide 8-bit images by 255")
    if isinstance(texts, str):
        raise TypeError(f"{name} must be a sequence with one string for each image, got the string {texts!r}")
    if len(texts) != len(images):
        raise ValueError(f"{name} must hold one string for each image, got {len(texts)} for {len(images)} images")
    check_strings(texts, name)


def check_strings(texts: Sequence[str], name: str = "prompts") -> None:
    """Checks that every text is a string.

    Raises:
        TypeError: One is not; its index and value are named.
    """
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{name} must be strings, got {text!r} at index {index}")
