"""What a picture of the tiny world contains, and how such contents are drawn at random.

A scene has one or two objects on a coloured background. An object has a shape, a colour, a place, a size and
a texture: plain, striped (the concept that is to be erased) or dotted (its harmless neighbour). Some scenes
play at a place, which paints the ground, the lowest strip of the picture, in a colour of its own.
"""

import random
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from overpaint.settings import Positive

IMAGE_SIZE = 64
"""Side of a picture in pixels."""

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
BACKGROUNDS = ("white", "gray", "pink", "cyan", "brown")
PLACES = ("circus", "prison", "garden", "street")
TEXTURES = ("plain", "striped", "dotted")
RELATIONS = ("above", "below", "left of", "right of", "and")

HELD_OUT_PAIRS = (
    ("red", "triangle"),
    ("green", "star"),
    ("blue", "cross"),
    ("yellow", "square"),
    ("purple", "circle"),
    ("orange", "star"),
)
"""Colour and shape pairs that training prompts never name, for measuring how far a reward generalises."""

GROUND_HEIGHT = 14
"""Height in pixels of the strip that a place paints."""


class Thing(NamedTuple):
    """One object of a scene; lengths in pixels."""

    shape: str
    colour: str
    texture: str
    x: float
    y: float
    radius: Positive


class Scene(NamedTuple):
    """The full contents of one picture."""

    things: tuple[Thing, ...]
    background: str
    place: str | None
    relation: str | None


class SceneTensors(NamedTuple):
    """Scenes as indices into the vocabularies above, ready to be rendered; absent entries are -1."""

    shape: Int[Tensor, "batch 2"]
    colour: Int[Tensor, "batch 2"]
    texture: Int[Tensor, "batch 2"]
    place_and_size: Float[Tensor, "batch 2 3"]
    background: Int[Tensor, " batch"]
    ground: Int[Tensor, " batch"]


def to_tensors(scenes: list[Scene]) -> SceneTensors:
    """Packs scenes for rendering."""

    def per_thing(value) -> list[list]:
        return [[value(t) for t in s.things] + [value(None)] * (2 - len(s.things)) for s in scenes]

    return SceneTensors(
        shape=torch.tensor(per_thing(lambda t: SHAPES.index(t.shape) if t else -1)),
        colour=torch.tensor(per_thing(lambda t: COLOURS.index(t.colour) if t else -1)),
        texture=torch.tensor(per_thing(lambda t: TEXTURES.index(t.texture) if t else -1)),
        place_and_size=torch.tensor(per_thing(lambda t: (t.x, t.y, t.radius) if t else (0.0, 0.0, 1.0))),
        background=torch.tensor([BACKGROUNDS.index(s.background) for s in scenes]),
        ground=torch.tensor([PLACES.index(s.place) if s.place else -1 for s in scenes]),
    )


SIZES = {"small": (11.0, 14.0), "large": (21.0, 26.0), None: (12.0, 25.0)}
"""Range of an object's radius, in pixels, by the word that names its size."""


def place_thing(rng: random.Random, shape: str, colour: str, texture: str, size: str | None) -> Thing:
    """Draws place and radius of a lone object, wholly inside the picture."""
    radius = rng.uniform(*SIZES[size])
    margin = radius + 2.0
    x, y = (rng.uniform(margin, IMAGE_SIZE - margin) for _ in range(2))
    return Thing(shape, colour, texture, x, y, radius)


def place_pair(rng: random.Random, first: tuple[str, str, str], second: tuple[str, str, str], relation: str) -> tuple:
    """Draws places and radii of two objects that stand in a relation; each is (shape, colour, texture)."""
    layout = rng.choice(RELATIONS[:4]) if relation == "and" else relation
    near, far, across = rng.uniform(15, 19), rng.uniform(45, 49), [rng.uniform(24, 40) for _ in range(2)]
    low, high = (near, far) if layout in ("above", "left of") else (far, near)
    spots = [(low, across[0]), (high, across[1])]
    if layout in ("above", "below"):
        spots = [(x, y) for y, x in spots]
    radii = [rng.uniform(11.0, 14.0) for _ in range(2)]
    return tuple(
        Thing(*thing, *spot, radius) for thing, spot, radius in zip((first, second), spots, radii, strict=True)
    )
