"""What every reward is: a score for each pair of image and prompt."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from overpaint.policy.types import Images, PerSample


@runtime_checkable
class Reward(Protocol):
    """A score for each image, given the prompt that it was drawn for; higher is better.

    A detector of something unwanted is a reward as well: its score grows with what it detects, and whoever
    uses it decides the sign. One that does not look at prompts may say so by an attribute `reads_prompts` that is
    False: programs then ask for none.
    """

    differentiable: bool
    """Whether gradients flow from the scores to the images."""

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Returns one score per image, in the reward's own units; images are RGB in [0, 1]."""
        ...


def check_pairs(images: Images, prompts: Sequence[str]) -> None:
    """Checks that images and prompts form pairs that a reward can score.

    Raises:
        TypeError: The images are not floating point, or a prompt is not a string.
        ValueError: The images are not a batch of RGB images, or there is not one prompt for each.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must have shape [batch, 3, height, width], got {list(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point in [0, 1], got {images.dtype}; divide 8-bit images by 255")
    if isinstance(prompts, str):
        raise TypeError(f"prompts must be a sequence with one string for each image, got the string {prompts!r}")
    if len(prompts) != len(images):
        raise ValueError(f"prompts must hold one string for each image, got {len(prompts)} for {len(images)} images")
    check_strings(prompts)


def check_strings(prompts: Sequence[str]) -> None:
    """Checks that every prompt is a string.

    Raises:
        TypeError: One is not; its index and value are named.
    """
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise TypeError(f"prompts must be strings, got {prompt!r} at index {index}")
