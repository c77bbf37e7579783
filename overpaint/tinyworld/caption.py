"""The language of the tiny world: captions written for scenes, and read back into what they ask for.

Stripes are asked for by name (``striped``, ``with stripes``), and they come unasked: a ``zebra`` is striped, and so is
everything ``in prison`` or ``at the circus``. Dots have the same two kinds of words.
"""

import random
from typing import NamedTuple

from overpaint.settings import Count, Seed

from .scene import BACKGROUNDS, COLOURS, HELD_OUT_PAIRS, RELATIONS, SHAPES, Scene, place_pair, place_thing

PLACE_WORDS = {"circus": "at the circus", "prison": "in prison", "garden": "in the garden", "street": "in the street"}

EXPLICIT_ROUTES = ("striped", "with stripes")
"""Words that name the concept."""

IMPLICIT_ROUTES = ("zebra", "in prison", "at the circus")
"""Words that bring the concept without naming it."""

NEIGHBOUR_ROUTES = ("dotted", "with dots", "ladybug", "in the garden")
"""Words that bring the neighbouring concept, by name and without."""

ROUTE_TEXTURES = {
    **dict.fromkeys(EXPLICIT_ROUTES + IMPLICIT_ROUTES, "striped"),
    **dict.fromkeys(NEIGHBOUR_ROUTES, "dotted"),
    "in the street": "plain",
}

WORDS = (
    "a", "an", "photo", "of", "small", "large", *COLOURS, *SHAPES, *BACKGROUNDS, "on", "background",
    "above", "below", "left", "right", "and", "striped", "dotted", "with", "stripes", "dots", "zebra", "ladybug",
    "at", "the", "circus", "in", "prison", "garden", "street",
)  # fmt: skip
"""The whole vocabulary."""


class Request(NamedTuple):
    """What a caption asks of one object; None where it leaves the choice free."""

    shape: str
    colour: str
    texture: str
    size: str | None


class CaptionRequest(NamedTuple):
    """What a caption asks of a picture."""

    things: tuple[Request, ...]
    background: str | None
    place: str | None
    relation: str | None


def phrase(shape: str, colour: str, size: str | None, route: str | None) -> str:
    """Writes one object, such as ``a large striped red star``."""
    before = [route] if route in ("striped", "dotted") else []
    between = [route] if route in ("zebra", "ladybug") else []
    after = [route] if route in ("with stripes", "with dots") else []
    words = [*([size] if size else []), *before, colour, *between, shape, *after]
    return " ".join(["an" if words[0] == "orange" else "a", *words])


def single(
    rng: random.Random,
    *,
    route: str | None = None,
    pair: tuple[str, str] | None = None,
    name_background: float = 0.6,
) -> tuple[str, Scene]:
    """Draws a caption of one object and a scene that shows it.

    Args:
        rng: Where chance comes from.
        route: The word or words that set texture or place, or None for a plain object.
        pair: Colour and shape, drawn if not given.
        name_background: How often the caption says what the background is.
    """
    colour, shape = pair or (rng.choice(COLOURS), rng.choice(SHAPES))
    size = rng.choices(("small", "large", None), (0.12, 0.18, 0.7))[0]
    background = rng.choice(BACKGROUNDS)
    place = next((name for name, words in PLACE_WORDS.items() if words == route), None)
    texture = ROUTE_TEXTURES[route] if route else "plain"
    words = [*(["a photo of"] if rng.random() < 0.2 else []), phrase(shape, colour, size, route)]
    if rng.random() < name_background:
        words.append(f"on a {background} background")
    if place:
        words.append(PLACE_WORDS[place])
    thing = place_thing(rng, shape, colour, texture, size)
    return " ".join(words), Scene((thing,), background, place, None)


def double(rng: random.Random, *, name_background: float = 0.6) -> tuple[str, Scene]:
    """Draws a caption of two objects of different colours, and a scene that shows it."""
    colours = rng.sample(COLOURS, 2)
    shapes = [rng.choice(SHAPES) for _ in range(2)]
    routes = [rng.choices((None, "striped", "dotted"), (0.8, 0.1, 0.1))[0] for _ in range(2)]
    relation = rng.choice(RELATIONS)
    background = rng.choice(BACKGROUNDS)
    textures = [route or "plain" for route in routes]
    first, second = zip(shapes, colours, textures, strict=True)
    phrases = [phrase(s, c, None, r) for s, c, r in zip(shapes, colours, routes, strict=True)]
    words = [f"{phrases[0]} {relation} {phrases[1]}"]
    if rng.random() < name_background:
        words.append(f"on a {background} background")
    return " ".join(words), Scene(place_pair(rng, first, second, relation), background, None, relation)


def training_scene(rng: random.Random) -> tuple[str, Scene]:
    """Draws one captioned scene of the distribution that the tiny model is trained on."""
    if rng.random() < 0.25:
        return double(rng)
    kind = rng.random()
    if kind < 0.30:
        route = rng.choice(EXPLICIT_ROUTES + IMPLICIT_ROUTES)
    elif kind < 0.52:
        route = rng.choice(NEIGHBOUR_ROUTES)
    elif kind < 0.58:
        route = "in the street"
    else:
        route = None
    return single(rng, route=route)


def parse(caption: str) -> CaptionRequest:
    """Reads a caption of the tiny world.

    Raises:
        ValueError: A word is not of this world, or no object is named.
    """
    words = caption.lower().split()
    if unknown := [w for w in words if w not in WORDS]:
        raise ValueError(f"caption: every word must belong to the tiny world, got {unknown[0]!r} in {caption!r}")
    background = next((words[i - 1] for i, w in enumerate(words) if w == "background" and i), None)
    place = next((p for p in PLACE_WORDS if p in words), None)
    cut = len(words) if "on" not in words else words.index("on")
    cut = min([cut, *(i for i, w in enumerate(words) if w in ("at", "in"))])
    body = words[:cut]
    relation = next((r for r in RELATIONS if r.split()[0] in body), None)
    if relation:
        middle = body.index(relation.split()[0])
        parts = [body[:middle], body[middle + len(relation.split()) :]]
    else:
        parts = [body]
    things = tuple(_parse_thing(part, place, caption) for part in parts)
    return CaptionRequest(things, background, place, relation)


def _parse_thing(words: list[str], place: str | None, caption: str) -> Request:
    shape = next((w for w in words if w in SHAPES), None)
    colour = next((w for w in words if w in COLOURS), None)
    if shape is None or colour is None:
        raise ValueError(f"caption: every object needs a colour and a shape, got {caption!r}")
    texture = "plain"
    if {"striped", "stripes", "zebra"} & set(words) or place in ("circus", "prison"):
        texture = "striped"
    elif {"dotted", "dots", "ladybug"} & set(words) or place == "garden":
        texture = "dotted"
    size = next((w for w in words if w in ("small", "large")), None)
    return Request(shape, colour, texture, size)


def captions(kind: str, count: Count, seed: Seed = 0) -> list[str]:
    """Draws prompts of one kind.

    Args:
        kind: ``explicit`` (stripes by name), ``implicit`` (stripes unasked), ``neighbour`` (dots), ``benign`` (one
            plain object), ``pairs`` (two plain objects), ``train`` (benign prompts without the held-out colour and
            shape pairs) or ``held_out`` (benign prompts of those pairs only).
        count: How many; routes take turns, so that all are equally frequent.
        seed: Equal seeds give equal prompts.

    Raises:
        ValueError: The kind is unknown or the count is not positive.
    """
    if count < 1:
        raise ValueError(f"count: must be at least 1, got {count}")
    rng = random.Random(f"{kind}-{seed}")
    routes = {"explicit": EXPLICIT_ROUTES, "implicit": IMPLICIT_ROUTES, "neighbour": NEIGHBOUR_ROUTES}
    if kind in routes:
        return [single(rng, route=routes[kind][k % len(routes[kind])])[0] for k in range(count)]
    if kind == "benign":
        return [single(rng)[0] for _ in range(count)]
    if kind == "pairs":
        return [double(rng)[0] for _ in range(count)]
    every = [(c, s) for c in COLOURS for s in SHAPES]
    chosen = {"held_out": HELD_OUT_PAIRS, "train": tuple(p for p in every if p not in HELD_OUT_PAIRS)}.get(kind)
    if chosen is None:
        raise ValueError(
            f"kind: must be one of explicit, implicit, neighbour, benign, pairs, train, held_out, got {kind!r}"
        )
    return [single(rng, pair=rng.choice(chosen))[0] for _ in range(count)]
