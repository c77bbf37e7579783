"""How strongly stripes and dots show, measured on the lattices that the renderer uses; differentiable.

Each detector multiplies one channel of the picture with a zero-mean square pattern and averages over a small window,
so that flat areas give nothing and an edge gives little.
"""

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .render import PERIOD, STRIPE_WIDTH, dot_mask, pixel_grid

STRIPE_THRESHOLD = 0.2
"""Response above which stripes show. Drawn stripes give 0.26 to 0.45, edges without stripes at most 0.15."""

EDGE_RESPONSE, FULL_RESPONSE = 0.15, 0.45
"""Highest response without stripes, and highest with them."""

DOT_THRESHOLD = 0.45
"""Response above which dots show. Drawn dots give at least 0.56, pictures without them at most 0.44."""

WINDOW_PIXELS = 16
"""How many of the strongest windows are averaged."""


@cache
def _stripe_patterns() -> Float[Tensor, "phases 1 size size"]:
    """Square waves down the rows, of the stripes' period, in four phases; their negatives are the other four."""
    _, y = pixel_grid()
    waves = [(torch.remainder(y - shift, PERIOD) >= STRIPE_WIDTH).float() * 2 - 1 for shift in range(PERIOD // 2)]
    return torch.stack(waves)[:, None]


@cache
def _dot_pattern() -> Float[Tensor, "size size"]:
    """The lattice of dots, zero-mean, scaled so that a full-contrast lattice gives 1."""
    dots = dot_mask()
    pattern = dots - dots.mean()
    return pattern / (pattern * dots).mean()


def _strongest(response: Float[Tensor, "batch h w"]) -> Float[Tensor, " batch"]:
    return response.flatten(1).topk(WINDOW_PIXELS, dim=1).values.mean(dim=1)


def stripe_response(images: Float[Tensor, "batch 3 H W"]) -> Float[Tensor, " batch"]:
    """Measures dark horizontal bars of the world's period, in any phase.

    The brightest channel is used: it is high in every colour of the world and low in the bars. A window is two periods
    high and six pixels wide. The result is half the contrast of the bars.
    """
    value = images.amax(dim=1)
    patterns = _stripe_patterns().to(value)
    waves = torch.stack([F.avg_pool2d(value[:, None] * p, (2 * PERIOD, 6), stride=1)[:, 0] for p in patterns])
    return _strongest(waves.abs().amax(dim=0))


def dot_response(images: Float[Tensor, "batch 3 H W"]) -> Float[Tensor, " batch"]:
    """Measures white dots on the world's lattice, as a contrast.

    The darkest channel is used: it is low in every object's colour and high in the dots. A window is two periods
    square.
    """
    darkest = images.amin(dim=1)
    response = F.avg_pool2d((darkest * _dot_pattern().to(darkest))[:, None], 2 * PERIOD, stride=1)[:, 0]
    return _strongest(response)


class StripeScore:
    """How much of a drawn stripe's contrast a picture shows, beyond what edges give.

    A ``Reward`` in form. Its gradient is the same for faint and for full stripes, where a probability would saturate,
    so that it can be the cost that ReFL holds down.
    """

    differentiable = True
    reads_prompts = False

    def __call__(self, images: Float[Tensor, "batch 3 H W"], prompts: Sequence[str]) -> Float[Tensor, " batch"]:
        """Returns 0 for pictures without stripes and about 1 for the strongest; the detector decides at 0.17."""
        return (stripe_response(images.float()) - EDGE_RESPONSE).relu() / (FULL_RESPONSE - EDGE_RESPONSE)
