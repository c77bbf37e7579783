"""A texture that the tiny model has never seen, with its detector: what a probe can paint that nobody taught.

A probe that optimises, or is shown a picture, may draw a texture by itself; how often, this texture tells.
"""

from collections.abc import Sequence
from functools import cache
from random import Random

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .caption import single
from .render import PERIOD, STRIPE_COLOUR, STRIPE_WIDTH, pixel_grid, render, render_shapes
from .scene import to_tensors

CHECKER_WINDOW = 2 * PERIOD
"""Side of the window that is averaged over, in pixels."""

WINDOWS = 16
"""How many of the strongest windows are averaged."""

CHECKER_THRESHOLD = 0.18
"""Response from which on the texture shows. Rendered ones give at least 0.25, pictures of the world at most 0.12."""


def checkered_scenes(count: int, seed: int = 0) -> tuple[list[str], Float[Tensor, "count 3 size size"]]:
    """Draws captions of plain objects, and pictures in which the object is a checkerboard."""
    rng = Random(f"checkered-{seed}")
    texts, scenes = zip(*(single(rng) for _ in range(count)), strict=True)
    tensors = to_tensors(list(scenes))
    centre_x, centre_y, radius = tensors.place_and_size[:, 0].unbind(1)
    inside = render_shapes(tensors.shape[:, 0], centre_x, centre_y, radius)[:, None]
    opacity = inside * (_squares() > 0).float()
    paint = torch.tensor(STRIPE_COLOUR)[:, None, None]
    return list(texts), torch.lerp(render(tensors), paint.expand(count, -1, *opacity.shape[2:]), opacity)


class CheckerScore:
    """How strongly a checkerboard of the lattice of stripes shows: half its contrast, in any phase."""

    differentiable = True
    reads_prompts = False

    def __call__(self, images: Float[Tensor, "batch 3 H W"], prompts: Sequence[str] = ()) -> Float[Tensor, " batch"]:
        """Returns the response of each picture; `CHECKER_THRESHOLD` decides. Prompts are not looked at."""
        value = images.float().amax(dim=1)
        waves = torch.stack(
            [
                F.avg_pool2d((value * pattern.to(value))[:, None], CHECKER_WINDOW, stride=1)[:, 0]
                for pattern in _phases()
            ]
        )
        strongest = waves.abs().amax(dim=0).flatten(1).topk(WINDOWS, dim=1).values
        return strongest.mean(dim=1)


@cache
def _squares() -> Float[Tensor, "size size"]:
    """1 and -1 in squares of a stripe's height."""
    x, y = pixel_grid()
    return ((x // STRIPE_WIDTH + y // STRIPE_WIDTH) % 2) * 2 - 1


@cache
def _phases() -> tuple[Float[Tensor, "size size"], ...]:
    """The squares in their sixteen phases; their negatives are the other sixteen."""
    return tuple(
        _squares().roll((down, across), dims=(0, 1)) for down in range(STRIPE_WIDTH) for across in range(STRIPE_WIDTH)
    )
