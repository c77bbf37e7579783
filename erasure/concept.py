"""What is erased: a concept, the words that elicit it, what takes its place and what must survive."""

from dataclasses import dataclass, fields
from typing import Any

from overpaint.policy import DiffusionPolicy
from overpaint.tinyworld.caption import captions


@dataclass(frozen=True, kw_only=True)
class Concept:
    """A concept to erase from a text-to-image model, said in words."""

    name: str
    """Name for tables, folders and messages."""

    phrases: tuple[str, ...]
    """Texts that elicit the concept, by name or by association; at least one."""

    anchor: str = " "
    """Text that takes the concept's place. A single space stands for the unconditional model."""

    preserve: tuple[str, ...] = ("",)
    """Texts whose pictures must not change. The empty text stands for the unconditional model."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise ValueError(f"Concept.name must be a text that is not blank, got {self.name!r}")
        if not isinstance(self.anchor, str):
            raise ValueError(f"Concept.anchor must be a text, got {self.anchor!r}")
        for field in ("phrases", "preserve"):
            texts = getattr(self, field)
            if not isinstance(texts, tuple) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"Concept.{field} must be a tuple of texts, got {texts!r}")
        if not self.phrases:
            raise ValueError(f"Concept.phrases must hold at least one text that elicits {self.name!r}, got ()")
        if blank := [phrase for phrase in self.phrases if not phrase.strip()]:
            raise ValueError(f"Concept.phrases must not be blank, got {blank[0]!r} in {self.phrases!r}")

    def to_json(self) -> dict[str, str | list[str]]:
        """Returns the fields as JSON knows them."""
        return {
            "name": self.name,
            "phrases": list(self.phrases),
            "anchor": self.anchor,
            "preserve": list(self.preserve),
        }

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "Concept":
        """Reads what `to_json` wrote.

        Raises:
            ValueError: A field is missing, unknown or not valid.
        """
        expected = {field.name for field in fields(cls)}
        if set(saved) != expected:
            raise ValueError(f"a saved concept must have the fields {sorted(expected)}, got {sorted(saved)}")
        return cls(
            name=saved["name"],
            phrases=tuple(saved["phrases"]),
            anchor=saved["anchor"],
            preserve=tuple(saved["preserve"]),
        )


def check_words(policy: DiffusionPolicy, concept: Concept) -> None:
    """Checks that the tokenizer takes every text of a concept whole, and that the anchor is not the concept itself.

    Raises:
        ValueError: A text is cut off at the text encoder's last position, or a phrase equals the anchor.
    """
    room = min(policy.tokenizer.model_max_length, policy.text_encoder.config.max_position_embeddings)
    for text in (*concept.phrases, concept.anchor, *concept.preserve):
        needed = len(policy.tokenizer(text, truncation=False, verbose=False)["input_ids"])
        if needed > room:
            raise ValueError(f"texts of {concept.name!r} must have at most {room} tokens, got {needed} in {text!r}")
    for phrase in concept.phrases:
        if phrase.strip().lower() == concept.anchor.strip().lower():
            raise ValueError(f"the anchor of {concept.name!r} must not be one of its phrases, got {phrase!r} as both")


NUDITY = Concept(name="nudity", phrases=("nudity",), anchor=" ", preserve=("",))
"""The concept that most published comparisons erase, as UCE's authors set it: towards the unconditional model."""

STRIPES = Concept(
    name="stripes",
    phrases=(
        *("striped", "with stripes", "zebra", "in prison", "at the circus"),
        *("a striped red star", "a blue circle with stripes", "a green zebra square"),
        *("a yellow cross in prison", "a purple triangle at the circus"),
    ),
    anchor=" ",
    preserve=("", *captions("benign", 40, 77), *captions("neighbour", 24, 77)),
)
"""The tiny world's harmful concept: asked for by name, and brought unasked by a zebra, a prison or a circus.

Each of the five words stands alone and once in a caption, since what follows a word in its caption is edited too.
Preserved are captions of ordinary pictures and of the neighbour, dots.
"""
