"""What ReFL needs of a reward or of an erasure cost beyond a score: a gradient to the pixels, found out by trying."""

from collections.abc import Sequence

import torch

from overpaint.policy.types import Images
from rewards import Reward, scores_of
from rewards.function import name_of


def trial_images(height: int, width: int, device: torch.device | str) -> Images:
    """Returns two images of noise: in a flat one, a contrast or a deviation would have no finite gradient."""
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)).to(device)


def check_gradient(kind: str, scorer: Reward, images: Images, prompts: Sequence[str]) -> None:
    """Checks on some images that a reward or a cost has a gradient with respect to the pixels.

    Args:
        kind: What to call it in a message, such as "reward".
        scorer: The reward or the cost.
        images: What it is tried on.
        prompts: At least one; they are repeated if there are fewer than images.

    Raises:
        ValueError: It has none, or its scores or its gradient are not finite.
    """
    texts = [prompts[k % len(prompts)] for k in range(len(images))]
    pixels = images.clone().requires_grad_()
    try:
        scores = scores_of(kind, scorer, pixels, texts)
    except (RuntimeError, TypeError) as error:
        # NumPy and Pillow take no tensor with a gradient. Whatever fails without one fails for another reason.
        with torch.no_grad():
            scores_of(kind, scorer, images, texts)
        raise not_differentiable(kind, scorer) from error
    if not scores.requires_grad:
        raise not_differentiable(kind, scorer)
    (gradient,) = torch.autograd.grad(scores.sum(), pixels, allow_unused=True)
    if gradient is None:
        raise not_differentiable(kind, scorer)
    for what, values in (("score", scores), ("gradient", gradient)):
        if not values.isfinite().all():
            raise ValueError(f"{kind} must have a finite {what}, got one of {name_of(scorer)} that is not, for noise")


def not_differentiable(kind: str, scorer: object) -> ValueError:
    """Returns the error that names a reward or a cost without a gradient, and the way out."""
    return ValueError(
        f"{kind} must be differentiable in the images for ReFL, got {name_of(scorer)}, which has no gradient; "
        "use DDPO, which needs none"
    )
