"""Reads a picture of the tiny world back into its contents, by rules alone, a whole batch at once.

Pixels are labelled with the nearest colour of the palette. Each object's silhouette is then compared with a bank of
silhouettes of every shape, size and small displacement, bars and dots left out of the count; the best overlap wins.
"""

from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from overpaint.settings import Count

from .render import BACKGROUND_VALUES, COLOUR_VALUES, GROUND_VALUES, STRIPE_COLOUR, render_shapes
from .scene import BACKGROUNDS, COLOURS, GROUND_HEIGHT, IMAGE_SIZE, PLACES, SHAPES
from .texture import DOT_THRESHOLD, STRIPE_THRESHOLD, dot_response, stripe_response

MIN_PIXELS = 40
"""Fewest pixels of one colour that count as an object."""

WINDOW = 60
"""Side of the window in which silhouettes are compared, in pixels."""

FIRST_GROUND, DARK = len(COLOURS) + len(BACKGROUNDS), len(COLOURS) + len(BACKGROUNDS) + len(PLACES)


class Detection(NamedTuple):
    """What pictures show. Objects are sorted by area; absent ones have index -1."""

    colour: Int[Tensor, "batch 2"]
    shape: Int[Tensor, "batch 2"]
    overlap: Float[Tensor, "batch 2"]
    centre: Float[Tensor, "batch 2 2"]
    radius: Float[Tensor, "batch 2"]
    background: Int[Tensor, " batch"]
    place: Int[Tensor, " batch"]
    stripes: Float[Tensor, " batch"]
    dots: Float[Tensor, " batch"]
    cleanness: Float[Tensor, " batch"]

    @property
    def striped(self) -> Bool[Tensor, " batch"]:
        """Whether stripes show."""
        return self.stripes > STRIPE_THRESHOLD

    @property
    def dotted(self) -> Bool[Tensor, " batch"]:
        """Whether dots show."""
        return self.dots > DOT_THRESHOLD


class Bank(NamedTuple):
    """Silhouettes to compare with, centred on their bounding boxes and displaced by a few pixels."""

    pixels: Float[Tensor, "templates window_pixels"]
    area: Float[Tensor, " templates"]
    shape: Int[Tensor, " templates"]
    radius: Float[Tensor, " templates"]
    offset: Float[Tensor, "templates 2"]


def _box(rows: Float[Tensor, "batch size"]) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]]:
    """First and last index whose sum reaches one pixel and a half."""
    filled = rows >= 1.5
    index = torch.arange(rows.shape[1])
    first = torch.where(filled, index, rows.shape[1]).amin(dim=1)
    last = torch.where(filled, index, -1).amax(dim=1)
    return first, last


@cache
def _bank() -> Bank:
    """Builds the bank once: 5 shapes, 17 radii, 35 displacements."""
    radii = torch.arange(10.0, 27.0)
    shape, radius = (g.flatten() for g in torch.meshgrid(torch.arange(float(len(SHAPES))), radii, indexing="ij"))
    middle = torch.full_like(radius, IMAGE_SIZE / 2)
    shape = shape.long()
    plain = render_shapes(shape, middle, middle, radius)
    pixels, shapes, sizes, offsets = [], [], [], []
    for picture, s, r in zip(plain, shape, radius, strict=True):
        (top, bottom), (left, right) = (_box((picture > 0.5).float().sum(dim=d)[None]) for d in (1, 0))
        up, aside = (IMAGE_SIZE // 2 - int(a + b + 1) // 2 for a, b in ((top, bottom), (left, right)))
        for dy in range(-3, 4):
            for dx in range(-2, 3):
                moved = picture.roll((up + dy, aside + dx), (0, 1))
                pixels.append(_crop(moved).flatten())
                shapes.append(s)
                sizes.append(r)
                offsets.append(torch.tensor([float(aside + dx), float(up + dy)]))
    stacked = torch.stack(pixels)
    return Bank(stacked, stacked.sum(dim=1), torch.stack(shapes), torch.stack(sizes), torch.stack(offsets))


def _crop(picture: Tensor) -> Tensor:
    cut = (IMAGE_SIZE - WINDOW) // 2
    return picture[..., cut : cut + WINDOW, cut : cut + WINDOW]


def palette_distances(images: Float[Tensor, "batch 3 size size"]) -> Float[Tensor, "batch pixels colours"]:
    """Distance of each pixel to each colour of the palette, in RGB."""
    palette = torch.cat([COLOUR_VALUES, BACKGROUND_VALUES, GROUND_VALUES, torch.tensor([STRIPE_COLOUR])])
    flat = images.flatten(2).transpose(1, 2)
    return torch.cdist(flat, palette.expand(len(flat), -1, -1))


def _fit(mask: Float[Tensor, "batch size size"], counted: Float[Tensor, "batch size size"]) -> tuple[Tensor, ...]:
    """Finds the silhouette that overlaps each mask best, among the pixels that count."""
    bank = _bank()
    (top, bottom), (left, right) = (_box(mask.sum(dim=d)) for d in (2, 1))
    middle_y, middle_x = (torch.div(a + b + 1, 2, rounding_mode="floor") for a, b in ((top, bottom), (left, right)))
    line = torch.arange(IMAGE_SIZE) - IMAGE_SIZE // 2
    rows, columns = middle_y[:, None] + line, middle_x[:, None] + line
    inside = ((rows >= 0) & (rows < IMAGE_SIZE))[:, :, None] & ((columns >= 0) & (columns < IMAGE_SIZE))[:, None, :]
    batch = torch.arange(len(mask))[:, None, None]
    pick = (batch, rows.clamp(0, IMAGE_SIZE - 1)[:, :, None], columns.clamp(0, IMAGE_SIZE - 1)[:, None, :])
    centred = _crop(torch.where(inside, mask[pick], 0.0)).flatten(1)
    valid = _crop(torch.where(inside, counted[pick], 1.0)).flatten(1)
    shared = (centred * valid) @ bank.pixels.T
    union = (centred * valid).sum(dim=1, keepdim=True) + valid @ bank.pixels.T - shared
    overlap, best = (shared / union.clamp(min=1.0)).max(dim=1)
    centre = torch.stack([middle_x, middle_y], dim=1) + bank.offset[best]
    return bank.shape[best], overlap, centre.float(), bank.radius[best]


@torch.no_grad()
def detect(images: Float[Tensor, "batch 3 H W"], *, chunk: Count = 64) -> Detection:
    """Reads pictures, RGB in [0, 1].

    Raises:
        ValueError: The pictures are not of the tiny world's size.
    """
    if images.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"images: must be {IMAGE_SIZE} x {IMAGE_SIZE} pixels, got {tuple(images.shape[-2:])}")
    parts = [_detect(part) for part in images.detach().float().cpu().split(chunk)]
    return Detection(*(torch.cat(field) for field in zip(*parts, strict=True)))


def _detect(images: Float[Tensor, "batch 3 H W"]) -> Detection:
    distance, label = palette_distances(images).min(dim=2)
    label = label.view(-1, IMAGE_SIZE, IMAGE_SIZE)
    counts = torch.nn.functional.one_hot(label.flatten(1), DARK + 1).sum(dim=1)

    strip = label[:, IMAGE_SIZE - GROUND_HEIGHT + 1 :].flatten(1)
    ground_counts = torch.nn.functional.one_hot(strip, DARK + 1).sum(dim=1)[:, FIRST_GROUND:DARK]
    ground_count, place = ground_counts.max(dim=1)
    place = torch.where(ground_count > 0.3 * strip.shape[1], place, -1)

    areas, order = counts[:, : len(COLOURS)].sort(dim=1, descending=True)
    enough = (areas >= MIN_PIXELS) & (areas >= 0.2 * areas[:, :1])
    white = len(COLOURS) + BACKGROUNDS.index("white")
    background = counts[:, len(COLOURS) : FIRST_GROUND].argmax(dim=1)
    stripes, dots = stripe_response(images), dot_response(images)
    texture = (label == DARK) | (
        (label == white) & (dots > DOT_THRESHOLD)[:, None, None] & (background != 0)[:, None, None]
    )

    fields = []
    for k in range(2):
        mask = label == order[:, k, None, None]
        shape, overlap, centre, radius = _fit(mask.float(), (~texture).float())
        there = enough[:, k]
        indices = (torch.where(there, index, -1) for index in (order[:, k], shape))
        overlap, radius = (torch.where(there, size, 0.0) for size in (overlap, radius))
        fields.append((*indices, overlap, torch.where(there[:, None], centre, 0.0), radius))
    joined = [torch.stack(pair, dim=1) for pair in zip(*fields, strict=True)]
    return Detection(*joined, background, place, stripes, dots, cleanness=-distance.mean(dim=1))
