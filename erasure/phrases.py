"""Texts as the tokenizer reads them: what the text encoder has room for, and which tokens of a prompt are a phrase."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from overpaint.policy import DiffusionPolicy

from .concept import Concept

SLOT = "{}"
"""Where a phrase stands in a template."""


class Placed(NamedTuple):
    """A phrase within a text; positions are counted from the start token."""

    text: str  # with the phrase
    first: int  # position of the phrase's first token
    end: int  # position behind its last; equal to `first` for a blank phrase
    last: int  # position of the text's end token, from which on there is nothing but padding


def placed(policy: DiffusionPolicy, template: str, phrase: str) -> Placed:
    """Puts a phrase into a template.

    Raises:
        ValueError: The template has not exactly one slot, the tokenizer takes the phrase for something else beside its
            neighbours, or it cuts the text off.
    """
    if template.count(SLOT) != 1:
        raise ValueError(f"a template must hold {SLOT} once, got {template!r}")
    head, tail = (token_ids(policy, part) for part in template.split(SLOT))
    body, text = token_ids(policy, phrase), template.replace(SLOT, phrase)
    whole = token_ids(policy, text)
    if whole != head + body + tail:
        raise ValueError(f"a phrase must keep its tokens within a template, and {phrase!r} does not in {template!r}")
    check_length(policy, [text], "a template with its phrase")
    return Placed(text, first=1 + len(head), end=1 + len(head) + len(body), last=1 + len(whole))


def token_ids(policy: DiffusionPolicy, text: str) -> list[int]:
    """Returns the tokens of a text without those of its start and end, however many they are."""
    return policy.prompts.ids(text)[1:-1]


def check_length(policy: DiffusionPolicy, texts: Iterable[str], owner: str) -> None:
    """Raises a `ValueError` where the text encoder would cut a text off; `owner` names the texts."""
    room = policy.prompts.room
    for text in texts:
        if (needed := len(token_ids(policy, text)) + 2) > room:
            raise ValueError(f"{owner} must have at most {room} tokens, got {needed} in {text!r}")


def check_words(policy: DiffusionPolicy, concept: Concept) -> None:
    """Raises a `ValueError` where the text encoder would cut a text of a concept off, or a phrase is the anchor."""
    check_length(policy, (*concept.phrases, concept.anchor, *concept.preserve), f"texts of {concept.name!r}")
    for phrase in concept.phrases:
        if phrase.strip().lower() == concept.anchor.strip().lower():
            raise ValueError(f"the anchor of {concept.name!r} must not be one of its phrases, got {phrase!r} as both")


def check_absent(concept: Concept, texts: Iterable[str], owner: str) -> None:
    """Raises a `ValueError` where a text holds a phrase of the concept; `owner` names the texts."""
    for text in texts:
        if found := [phrase for phrase in concept.phrases if holds(text, phrase)]:
            raise ValueError(f"{owner} must be free of {concept.name!r}, got {found[0]!r} in {text!r}")


def longest(policy: DiffusionPolicy, texts: Iterable[str]) -> str:
    """Returns the text of the most tokens."""
    return max(texts, key=lambda text: len(token_ids(policy, text)))


def phrase_tokens(policy: DiffusionPolicy, prompts: Sequence[Placed]) -> Bool[Tensor, "batch tokens"]:
    """Tells which tokens are those of the phrase."""
    tokens = torch.zeros(len(prompts), policy.prompts.room, dtype=torch.bool)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[prompt.first : prompt.end] = True
    return tokens.to(policy.device)


def holds(text: str, phrase: str) -> bool:
    """Tells whether a text has a phrase as whole words."""
    return f" {phrase.strip().lower()} " in f" {text.lower()} "


def template_of(phrase: str, text: str) -> str:
    """Returns a text that holds a phrase, with a slot in the place of its first occurrence."""
    start = f" {text.lower()} ".index(f" {phrase.strip().lower()} ")
    return text[:start] + SLOT + text[start + len(phrase.strip()) :]


def own_phrases(phrases: Sequence[str]) -> dict[str, list[str]]:
    """Returns the phrases that hold no other, each with the templates that those give which hold it."""
    alone = [phrase for phrase in phrases if not any(other != phrase and holds(phrase, other) for other in phrases)]
    return {
        own: [template_of(own, phrase) for phrase in phrases if phrase != own and holds(phrase, own)] for own in alone
    }
