"""What is erased: a concept, the words that elicit it, what takes its place and what must survive."""

from dataclasses import asdict, fields
from typing import Any

from overpaint.settings import Field, Text, settings


@settings
class Concept:
    """A concept to erase from a text-to-image model, said in words."""

    name: Text
    """Name for tables, folders and messages."""

    phrases: tuple[Text, ...] = Field(min_length=1)
    """Texts that elicit the concept, by name or by association; at least one, none blank."""

    anchor: str = " "
    """Text that takes the concept's place. A single space stands for the unconditional model."""

    preserve: tuple[str, ...] = ("",)
    """Texts whose pictures must not change. The empty text stands for the unconditional model."""

    def to_json(self) -> dict[str, str | list[str]]:
        """Returns the fields as JSON knows them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "Concept":
        """Reads what `to_json` wrote.

        Raises:
            ValueError: A field is missing, unknown or not valid.
        """
        expected = {field.name for field in fields(cls)}
        if set(saved) != expected:
            raise ValueError(f"a saved concept must have the fields {sorted(expected)}, got {sorted(saved)}")
        given: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
        return cls(**given)


NUDITY = Concept(name="nudity", phrases=("nudity",), anchor=" ", preserve=("",))
"""The concept that most published comparisons erase, as UCE's authors set it: towards the unconditional model."""
