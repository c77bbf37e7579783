"""A concept of the tiny world that is not stripes: said in words, with settings of the methods and prompts for it."""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, islice
from typing import Any

from erasure import Concept
from erasure.methods.ac import ACConfig
from erasure.methods.ant import ANTConfig
from erasure.methods.eraseflow import EraseFlowConfig
from erasure.methods.sa import SAConfig
from erasure.methods.safree import SAFREEConfig
from erasure.methods.sld import SLDConfig
from erasure.phrases import holds

from .caption import ROUTE_TEXTURES, captions, single
from .presets import FLOW_PRESETS, PRESETS, STRIPES

TRIES = 1000
"""How many captions are drawn in search of one that holds a phrase."""


def preset(method: str, concept: Concept = STRIPES, *, flow: bool = False) -> Any:
    """Returns a method's settings for a concept of the tiny world.

    They were found for stripes. For another concept the words of stripes are left out of them, and so are the captions
    that hold a phrase of the concept; what else is in them was not found for it. With `flow` they are those for the
    rectified-flow transformer, where there are any.
    """
    config = FLOW_PRESETS.get(method, PRESETS[method]) if flow else PRESETS[method]
    if concept == STRIPES:
        return config
    if isinstance(config, SLDConfig):
        return replace(config, concept_text=None)
    if isinstance(config, SAFREEConfig):
        return replace(config, concepts=None)
    if isinstance(config, ANTConfig):
        return replace(config, saliency=replace(config.saliency, prompts=None))
    if isinstance(config, ACConfig | EraseFlowConfig):
        return replace(config, anchors=without(concept.phrases, config.anchors))
    if isinstance(config, SAConfig):
        surrogates, replay = (without(concept.phrases, texts) for texts in (config.surrogates, config.replay))
        return replace(config, surrogates=surrogates, replay=replay)
    return config


def own_concept(phrases: Sequence[str], anchor: str = " ", preserve: Sequence[str] = ()) -> Concept:
    """Returns a concept of the tiny world that is not stripes.

    Args:
        phrases: Texts that elicit it; the first is its name.
        anchor: What takes its place.
        preserve: What must survive; none is the captions that are preserved when stripes are erased, without those
            that hold one of the phrases.
    """
    kept = ("", *preserve) if preserve else without(phrases, STRIPES.preserve)
    return Concept(name=phrases[0], phrases=tuple(phrases), anchor=anchor, preserve=kept)


def without(phrases: Sequence[str], texts: Sequence[str]) -> tuple[str, ...]:
    """Returns the texts that hold none of the phrases, as words."""
    return tuple(text for text in texts if not any(holds(text, phrase) for phrase in phrases))


def concept_captions(concept: Concept, kind: str, count: int, seed: int = 0) -> list[str]:
    """Draws prompts of one kind for a concept; those for stripes are `captions`.

    ``explicit`` ones hold a phrase of the concept, ``neighbour`` ones a preserved text, and all other kinds are as
    `captions` draws them, without the phrases; there are no ``implicit`` ones. A phrase that no caption of a plain
    object holds stands alone.

    Raises:
        ValueError: The count is not positive, the kind is unknown, or every caption of the kind holds a phrase.
    """
    if concept == STRIPES:
        return captions(kind, count, seed)
    if kind == "implicit":
        return []
    rng = random.Random(f"{concept.name}-{kind}-{seed}")
    if kind in ("explicit", "neighbour"):
        texts = concept.phrases if kind == "explicit" else [text for text in concept.preserve if text.strip()]
        return [_holding(rng, text) for text in islice(cycle(texts), count)]
    if found := without(concept.phrases, captions(kind, TRIES, seed)):
        return list(islice(cycle(found), count))
    raise ValueError(f"concept must leave captions of the kind {kind!r}, got {concept.phrases}, of which all hold one")


def _holding(rng: random.Random, text: str) -> str:
    """Returns a caption of one object that holds a text."""
    if text in ROUTE_TEXTURES:
        return single(rng, route=text)[0]
    drawn = (single(rng, name_background=1.0)[0] for _ in range(TRIES))
    return next((caption for caption in drawn if holds(caption, text)), text)
