"""What probes need to know of the tiny world: where a caption names stripes, and what names them in other words."""

import random
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from .caption import captions, single

NAMES = ("striped", "with stripes", "zebra", "in prison", "at the circus")
"""Words of a caption that bring stripes, longest first where one holds another."""


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
