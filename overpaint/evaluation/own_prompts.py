"""Prompts for an evaluation by kind: from a user's file, or from templates for a concept that is said in words."""

import json
import random
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

from overpaint.evaluation.prompts import PLACES, SCENES, STYLES, THINGS
from overpaint.evaluation.tables import decoded


def read_prompt_kinds(path: Path, kinds: Sequence[str]) -> dict[str, list[str]]:
    """Reads a JSON object with a list of prompts for each kind.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no JSON object, a kind is missing, or one has no list of prompts, none of them blank.
    """
    try:
        found = json.loads(decoded(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"prompts_file must be JSON, got {path}: {error}") from error
    wanted = f"prompts_file must be an object with a list of prompts for each of {', '.join(kinds)}"
    if not isinstance(found, Mapping):
        raise ValueError(f"{wanted}, got a {type(found).__name__} in {path}")
    if missing := [kind for kind in kinds if kind not in found]:
        raise ValueError(f"{wanted}, got none for {', '.join(missing)} in {path}")
    for kind in kinds:
        texts = found[kind]
        if not isinstance(texts, list) or not texts:
            raise ValueError(f"{wanted}, got {texts!r} for {kind} in {path}")
        for number, text in enumerate(texts, start=1):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"prompts_file must hold prompts, got {text!r} as number {number} of {kind} in {path}")
    return {kind: list(found[kind]) for kind in kinds}


SHOWN = (
    "{style} {phrase}", "{style} {phrase} {place}", "{style} {phrase} {scene}", "{phrase}", "{phrase} {scene}",
    "{thing} and {phrase}", "{thing}, {phrase}", "{style} {thing} in the style of {phrase}", "{thing} by {phrase}",
)  # fmt: skip
"""How prompts show a thing, a person or a style that is known by its phrase alone; each is as frequent as any other."""


def concept_prompts(
    phrases: Sequence[str], neighbours: Sequence[str], kind: str, count: int, seed: int = 0
) -> list[str]:
    """Draws prompts of one kind for a concept that is said in words; equal seeds give equal prompts.

    The first phrase names the concept: `explicit` prompts hold it. All others bring it otherwise: `implicit` prompts
    hold them. `neighbour` prompts hold what has to survive, and `benign` ones are things that hold none of the phrases.
    Where there is no further phrase or no neighbour there are no such prompts.

    Args:
        phrases: What elicits the concept, its name first; at least one.
        neighbours: What is close to it and has to survive.
        kind: One of the four.
        count: How many; none is repeated as far as there are enough.
        seed: Which.

    Raises:
        ValueError: The kind is unknown or the count is not positive.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    shown = {"explicit": phrases[:1], "implicit": phrases[1:], "neighbour": neighbours, "benign": ("",)}
    if kind not in shown:
        raise ValueError(f"kind must be one of {', '.join(shown)}, got {kind!r}")
    things = [thing for thing in THINGS if not any(phrase.lower() in thing for phrase in phrases)]
    if kind == "benign":
        every = [f"{style} {thing} {scene}" for style, thing, scene in product(STYLES, things, SCENES)]
        random.Random(f"benign-{seed}").shuffle(every)
        return [every[k % len(every)] for k in range(count)]
    every = []
    for phrase in shown[kind]:
        for template in SHOWN:
            words = {"style": STYLES, "place": PLACES, "scene": SCENES, "thing": things}
            named = [name for name in words if f"{{{name}}}" in template]
            every.append(
                [
                    template.format(phrase=phrase, **dict(zip(named, chosen, strict=True)))
                    for chosen in product(*(words[name] for name in named))
                ]
            )
    chance = random.Random(f"{kind}-{seed}")
    for texts in every:
        chance.shuffle(texts)
    chance.shuffle(every)
    turns = [texts[turn] for turn in range(max(map(len, every), default=0)) for texts in every if turn < len(texts)]
    return [turns[k % len(turns)] for k in range(count)] if turns else []
