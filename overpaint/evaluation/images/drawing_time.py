"""How long images will take, before they are drawn."""

import time
from collections.abc import Sequence

import torch

from overpaint.policy.guidance import ClassifierFree

from .drawable import Drawable
from .plan import DrawConfig, PlannedImage


def seconds_per_image(
    drawable: Drawable, planned: Sequence[PlannedImage], config: DrawConfig, *, batch_size: int = 16
) -> float:
    """Returns how long one image will take, from a batch of one step and one of three, each drawn for nothing.

    Args:
        drawable: What will draw.
        planned: What it will draw; the first batch is taken.
        config: How it will draw.
        batch_size: Images drawn at a time.
    """
    batch = planned[:batch_size]

    def timed(steps: int) -> float:
        begin = time.perf_counter()
        with torch.no_grad():
            drawable.draw(
                [image.prompt for image in batch],
                seeds=[image.seed for image in batch],
                steps=steps,
                guidance=ClassifierFree(config.guidance_scale),
                eta=config.eta,
                batch_size=len(batch),
                height=config.size,
                width=config.size,
            ).cpu()  # waits for an accelerator
        return time.perf_counter() - begin

    timed(1)  # sets much up, and encodes the prompts
    one, three = timed(1), timed(3)
    return (one + max(three - one, 0.0) / 2 * (config.steps - 1)) / len(batch)


def duration_text(seconds: float) -> str:
    """Returns a time as a person says it: `40 s`, `12 min`, `3 h 05 min`."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
