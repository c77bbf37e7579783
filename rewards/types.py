"""Reward: a score for each pair of image and prompt."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch

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


def scores_of(kind: str, score: ScoreFunction, images: Images, prompts: Sequence[str]) -> PerSample:
    """Returns the reward or the cost of each image, computed in full precision.

    Half precision moves ImageReward by about 0.1, as much as a good run gains in many iterations.

    Args:
        kind: What to call the score in a message, such as "reward".
        score: The reward or the cost.
        images: RGB in [0, 1].
        prompts: One for each image.

    Raises:
        ValueError: It does not give one number for each.
    """
    with torch.autocast(images.device.type, enabled=False):
        scores = score(images, prompts)
    if scores.shape != (len(images),):
        raise ValueError(f"{kind} must give one number for each of {len(images)} images, got {tuple(scores.shape)}")
    return scores


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
