"""What a trainer asks of a reward or of a cost on images: one number for each image, in full precision."""

from collections.abc import Callable, Sequence

import torch

from overpaint.policy.types import Images, PerSample

Judge = Callable[[Images, Sequence[str]], PerSample]
"""A reward, or a cost on images."""


def scores_of(kind: str, judge: Judge, images: Images, prompts: Sequence[str]) -> PerSample:
    """Returns what a reward or a cost says of each image, computed in full precision.

    Half precision moves ImageReward by about 0.1, as much as a good run gains in many iterations.

    Args:
        kind: What to call the judge in a message, such as "reward".
        judge: The reward or the cost.
        images: What is judged.
        prompts: One for each image.

    Raises:
        ValueError: It does not say one number for each.
    """
    with torch.autocast(images.device.type, enabled=False):
        scores = judge(images, prompts)
    if scores.shape != (len(images),):
        raise ValueError(f"{kind} must give one number for each of {len(images)} images, got {tuple(scores.shape)}")
    return scores
