"""Pairs of prompts: one that elicits the concept, and the anchor whose trajectories it is to take."""

import random
import re
from collections.abc import Sequence
from typing import NamedTuple

from erasure.concept import Concept
from erasure.phrases import own_phrases


class Pair(NamedTuple):
    """What a trajectory is drawn for, and what it is to become as likely for."""

    target: str
    anchor: str
    retained: bool = False
    """Whether both are one prompt, whose trajectories are to stay as likely as they were."""


def pair_of(
    prompt: str, concept: Concept, anchor: str, anchors: Sequence[str], templates: Sequence[str], choice: random.Random
) -> Pair:
    """Returns the pair of a prompt that elicits the concept.

    Its anchor is the same prompt with the anchor's words in the place of the concept's, or those alone where it has
    none of them. A prompt that says nothing but the concept is put into one of several others before, where there are
    any.

    Args:
        prompt: The target.
        concept: Its phrases that hold no other are its words.
        anchor: What takes the place of the words; blank leaves them out.
        anchors: Prompts without the concept, which such a prompt is put into.
        templates: How it is put there.
        choice: Chooses anchor and template.
    """
    left = replaced(prompt, concept, "")
    if left == " ".join(prompt.split()):  # no word of the concept is in it whose place could be taken
        return Pair(prompt, anchor.strip())
    if anchors and not re.search(r"\w", left):
        prompt = choice.choice(templates).format(concept=prompt, anchor=choice.choice(anchors))
    return Pair(prompt, replaced(prompt, concept, anchor.strip()))


def replaced(text: str, concept: Concept, anchor: str) -> str:
    """Returns a text with other words in the place of a concept's."""
    for phrase in sorted(own_phrases(concept.phrases), key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(phrase.strip())}(?!\w)", lambda _: anchor, text, flags=re.IGNORECASE)
    return " ".join(text.split())
