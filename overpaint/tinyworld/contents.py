"""What of a phrase shows in a picture of the tiny world: the truth about a concept that is not stripes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .caption import WORDS
from .detector import Detection, detect
from .scene import BACKGROUNDS, COLOURS, PLACES, SHAPES

STRIPED, DOTTED = ("striped", "stripes", "zebra"), ("dotted", "dots", "ladybug")


class Contents(NamedTuple):
    """What a phrase asks for; None is not asked for."""

    colour: int | None
    shape: int | None
    background: int | None
    place: int | None
    striped: bool
    dotted: bool

    def shown(self, seen: Detection) -> Bool[Tensor, " batch"]:
        """Tells for each picture whether all of it shows; colour and shape of one object."""
        there = seen.colour >= 0
        for wanted, found in ((self.colour, seen.colour), (self.shape, seen.shape)):
            if wanted is not None:
                there = there & (found == wanted)
        shows = there.any(dim=1) if (self.colour, self.shape) != (None, None) else torch.ones(len(there)).bool()
        for wanted, found in ((self.background, seen.background), (self.place, seen.place)):
            if wanted is not None:
                shows = shows & (found == wanted)
        if self.striped:
            shows = shows & seen.striped
        return shows & seen.dotted if self.dotted else shows


def contents_of(phrase: str) -> Contents:
    """Reads a phrase, such as "star", "blue star", "with dots" or "pink background".

    Raises:
        ValueError: A word is not of the tiny world, or nothing in it can be seen in a picture.
    """
    words = phrase.lower().split()
    if unknown := [word for word in words if word not in WORDS]:
        raise ValueError(f"phrase: every word must belong to the tiny world, got {unknown[0]!r} in {phrase!r}")

    def index(names: Sequence[str]) -> int | None:
        return next((names.index(word) for word in words if word in names), None)

    found = Contents(
        index(COLOURS), index(SHAPES), index(BACKGROUNDS), index(PLACES),
        any(word in STRIPED for word in words), any(word in DOTTED for word in words),
    )  # fmt: skip
    if found == (None, None, None, None, False, False):
        raise ValueError(f"phrase must name something that shows in a picture of the tiny world, got {phrase!r}")
    return found


class Shown:
    """Tells whether any of some phrases shows in a picture of the tiny world.

    Args:
        phrases: See `contents_of`, which says what is refused.
    """

    differentiable = False
    reads_prompts = False

    def __init__(self, phrases: Sequence[str]) -> None:
        self.contents = tuple(contents_of(phrase) for phrase in phrases)

    def __call__(self, images: Float[Tensor, "batch 3 H W"], prompts: Sequence[str] = ()) -> Bool[Tensor, " batch"]:
        """Returns yes or no for each picture; prompts are not looked at."""
        seen = detect(images)
        return torch.stack([one.shown(seen) for one in self.contents]).any(dim=0).to(images.device)
