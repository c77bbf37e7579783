"""What ReFL needs of a reward or of an erasure cost beyond a score: a gradient to the pixels."""

from collections.abc import Sequence

import torch

from erasure import ImageCost
from overpaint.policy.types import Images
from rewards import Reward, scores_of


def check_gradient(kind: str, scorer: Reward | ImageCost, image: Images, prompts: Sequence[str]) -> None:
    """Checks on one image that a reward or a cost has a gradient with respect to the pixels.

    Raises:
        ValueError: It has none.
    """
    pixels = image.clone().requires_grad_()
    scores = scores_of(kind, scorer, pixels, prompts)
    if not scores.requires_grad or torch.autograd.grad(scores.sum(), pixels, allow_unused=True)[0] is None:
        raise not_differentiable(kind, scorer)


def not_differentiable(kind: str, scorer: Reward | ImageCost) -> ValueError:
    """Returns the error that names a reward or a cost without a gradient, and the way out."""
    return ValueError(
        f"{kind} must be differentiable in the images for ReFL, got {type(scorer).__name__}, which has no gradient; "
        "use DDPO, which needs none"
    )
