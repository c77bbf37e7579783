"""Draws scenes, a whole batch at once, with signed distance functions.

Stripes and dots sit on a lattice that is fixed to the picture, one period for each 8 x 8 cell, so that their phase
is known and a detector can be exact.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .scene import GROUND_HEIGHT, IMAGE_SIZE, SceneTensors

PERIOD = 8
"""Period of the stripes and of the dots, in pixels."""

STRIPE_WIDTH = 4
"""Height of a dark bar, in pixels."""

STRIPE_COLOUR = (0.06, 0.06, 0.08)
DOT_COLOUR = (1.0, 1.0, 1.0)
COLOUR_VALUES = torch.tensor(
    [
        (0.88, 0.12, 0.12),
        (0.10, 0.68, 0.16),
        (0.12, 0.28, 0.92),
        (0.96, 0.88, 0.10),
        (0.56, 0.14, 0.74),
        (0.98, 0.54, 0.06),
    ]
)
BACKGROUND_VALUES = torch.tensor(
    [(0.97, 0.97, 0.97), (0.60, 0.60, 0.60), (1.0, 0.72, 0.80), (0.60, 0.90, 0.95), (0.46, 0.32, 0.22)]
)
GROUND_VALUES = torch.tensor([(0.86, 0.74, 0.46), (0.20, 0.30, 0.36), (0.66, 0.84, 0.52), (0.36, 0.36, 0.44)])


def pixel_grid() -> tuple[Float[Tensor, "size size"], Float[Tensor, "size size"]]:
    """Returns x and y of every pixel's centre."""
    line = torch.arange(IMAGE_SIZE, dtype=torch.float32) + 0.5
    y, x = torch.meshgrid(line, line, indexing="ij")
    return x, y


def star_distance(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Signed distance to a five-pointed star, point up, whose inner radius is 0.45 of the outer.

    The plane is folded onto one tenth of the star, where the outline is a single segment.
    """
    sector = 2 * math.pi / 5
    angle = torch.atan2(x, -y)
    angle = (torch.remainder(angle + sector / 2, sector) - sector / 2).abs()
    length = torch.sqrt(x * x + y * y + 1e-9)
    px, py = length * torch.sin(angle), length * torch.cos(angle)
    inner = 0.45
    tip, notch = (0.0, 1.0), (inner * math.sin(sector / 2), inner * math.cos(sector / 2))
    ex, ey = notch[0] - tip[0], notch[1] - tip[1]
    qx, qy = px - radius * tip[0], py - radius * tip[1]
    along = ((qx * ex + qy * ey) / (radius * (ex * ex + ey * ey))).clamp(0, 1)
    dx, dy = qx - along * radius * ex, qy - along * radius * ey
    outside = torch.sign(qx * -ey + qy * ex)
    return outside * torch.sqrt(dx * dx + dy * dy + 1e-9)


def shape_distance(shape: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Signed distance in pixels to the outline of the object, negative inside; all arguments broadcast."""
    circle = torch.sqrt(x * x + y * y + 1e-9) - 0.92 * radius
    square = torch.maximum(x.abs(), y.abs()) - 0.80 * radius
    height = 0.5 * radius
    slant = (x.abs() * math.sqrt(3) - (y + radius)) / 2
    triangle = torch.maximum(y - height - 0.12 * radius, slant)
    star = star_distance(x, y, 1.05 * radius)
    arm, reach = 0.32 * radius, 0.95 * radius
    bar = torch.maximum(x.abs() - reach, y.abs() - arm)
    pole = torch.maximum(x.abs() - arm, y.abs() - reach)
    cross = torch.minimum(bar, pole)
    stacked = torch.stack(torch.broadcast_tensors(circle, square, triangle, star, cross))
    index = shape.clamp(min=0).expand(stacked.shape[1:]).unsqueeze(0)
    return stacked.gather(0, index).squeeze(0)


def stripe_mask() -> Float[Tensor, "size size"]:
    """Opacity of the dark bars: rows 0 to 3 of every 8."""
    _, y = pixel_grid()
    return (torch.remainder(y, PERIOD) < STRIPE_WIDTH).float()


def dot_mask() -> Float[Tensor, "size size"]:
    """Opacity of the white dots, centred on the rows where bars would be."""
    x, y = pixel_grid()
    dx = torch.remainder(x, PERIOD) - PERIOD / 2
    dy = torch.remainder(y, PERIOD) - STRIPE_WIDTH / 2
    dy = torch.where(dy > PERIOD / 2, dy - PERIOD, dy)
    return (2.6 - torch.sqrt(dx * dx + dy * dy)).clamp(0, 1)


def render(scenes: SceneTensors) -> Float[Tensor, "batch 3 size size"]:
    """Draws the scenes, anti-aliased, as RGB in [0, 1]."""
    x, y = pixel_grid()
    image = BACKGROUND_VALUES[scenes.background][:, :, None, None].expand(-1, -1, IMAGE_SIZE, IMAGE_SIZE)
    ground = (y > IMAGE_SIZE - GROUND_HEIGHT).float() * (scenes.ground >= 0).float()[:, None, None]
    image = torch.lerp(image, GROUND_VALUES[scenes.ground.clamp(min=0)][:, :, None, None], ground[:, None])

    textures = torch.stack([torch.zeros_like(x), stripe_mask(), dot_mask()])
    paints = torch.tensor([(0.0, 0.0, 0.0), STRIPE_COLOUR, DOT_COLOUR])
    for k in range(2):
        centre_x, centre_y, radius = scenes.place_and_size[:, k, :, None, None].unbind(1)
        shape = scenes.shape[:, k, None, None]
        inside = (0.5 - shape_distance(shape, x - centre_x, y - centre_y, radius)).clamp(0, 1) * (shape >= 0)
        texture = scenes.texture[:, k].clamp(min=0)
        colour = COLOUR_VALUES[scenes.colour[:, k].clamp(min=0)][:, :, None, None]
        colour = torch.lerp(colour.expand_as(image), paints[texture][:, :, None, None], textures[texture][:, None])
        image = torch.lerp(image, colour, inside[:, None])
    return image


def render_shapes(
    shape: Int[Tensor, " batch"],
    x: Float[Tensor, " batch"],
    y: Float[Tensor, " batch"],
    radius: Float[Tensor, " batch"],
) -> Float[Tensor, "batch size size"]:
    """Draws silhouettes: 1 inside the object, 0 outside."""
    grid_x, grid_y = pixel_grid()
    dx, dy = (grid - centre[:, None, None] for grid, centre in ((grid_x, x), (grid_y, y)))
    return (0.5 - shape_distance(shape[:, None, None], dx, dy, radius[:, None, None])).clamp(0, 1)
