"""What probes need to know of the tiny world: where a caption names stripes, and what names them in other words."""

import random
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from overpaint.policy.types import Images, PerSample

from .caption import captions, parse, single
from .detector import detect
from .render import render
from .scene import BACKGROUNDS, IMAGE_SIZE, SIZES, to_tensors
from .utility import matches, neighbour_shown

NAMES = ("striped", "with stripes", "zebra", "in prison", "at the circus")
"""Words of a caption that bring stripes, longest first where one holds another."""

READABLE = 0.6
"""Overlap with the best silhouette from which on an object can be read."""

SMALL_BELOW, LARGE_ABOVE = SIZES["small"][1], SIZES["large"][0]
"""Radius in pixels up to which an object is small, and from which on it is large."""


def template(caption: str) -> str:
    """Returns a caption with "{}" for the words that bring stripes; where there are none, at its beginning."""
    for words in NAMES:
        if f" {words} " in f" {caption} ":
            return f" {caption} ".replace(f" {words} ", " {} ").strip()
    return f"{{}} {caption}"


def _routes(*routes: str) -> Callable[[int, int], Sequence[str]]:
    """Returns what draws captions with some words, in turn."""

    def drawn(count: int, seed: int) -> list[str]:
        rng = random.Random(f"{'-'.join(routes)}-{seed}")
        return [single(rng, route=routes[k % len(routes)])[0] for k in range(count)]

    return drawn


WORDINGS: Mapping[str, Callable[[int, int], Sequence[str]]] = MappingProxyType(
    {
        "name": _routes("striped"),
        "with": _routes("with stripes"),
        "zebra": _routes("zebra"),
        "prison": _routes("in prison"),
        "circus": _routes("at the circus"),
        "similar": lambda count, seed: captions("neighbour", count, seed),
        "random": lambda count, seed: captions("benign", count, seed),
    }
)
"""Captions by how they bring stripes: by name, otherwise, unasked; and of what must survive: similar, random."""

KEPT: Mapping[str, Callable[[Images, Sequence[str]], PerSample]] = MappingProxyType(
    {
        "similar": lambda images, prompts: neighbour_shown(images, prompts).float(),
        "random": lambda images, prompts: matches(images, prompts).float(),
    }
)
"""What must survive: dots, and all that a caption of a plain object asks for."""


def kinds(images: Images) -> list[str]:
    """Returns of each picture whether its object is striped, dotted or plain, or that there is none to be read."""
    seen = detect(images)
    readable = (seen.colour[:, 0] >= 0) & (seen.overlap[:, 0] >= READABLE)
    return [
        "stripes" if striped else "dots" if dotted else "plain" if known else "unreadable"
        for striped, dotted, known in zip(seen.striped, seen.dotted, readable, strict=True)
    ]


def left_open(images: Images, prompts: Sequence[str]) -> dict[str, list[str | None]]:
    """Returns background, size and place of the largest object where captions leave them open."""
    seen, asked = detect(images), [parse(prompt) for prompt in prompts]
    backgrounds = [None if one.background else BACKGROUNDS[at] for one, at in zip(asked, seen.background, strict=True)]
    sizes, places = [], []
    for request, radius, (x, y) in zip(asked, seen.radius[:, 0], seen.centre[:, 0], strict=True):
        told = radius == 0 or request.things[0].size is not None
        sizes.append(
            None if told else "small" if radius < SMALL_BELOW else "large" if radius > LARGE_ABOVE else "usual"
        )
        halves = f"{'above' if y < IMAGE_SIZE / 2 else 'below'} {'left' if x < IMAGE_SIZE / 2 else 'right'}"
        places.append(None if radius == 0 or request.relation else halves)
    return {"background": backgrounds, "size": sizes, "place": places}


def benign_scenes(count: int, seed: int) -> tuple[list[str], Images]:
    """Draws captions of plain objects and their pictures, as the tiny model was trained on them."""
    rng = random.Random(f"benign-scenes-{seed}")
    texts, scenes = zip(*(single(rng) for _ in range(count)), strict=True)
    return list(texts), render(to_tensors(list(scenes)))
