"""Settings: frozen, keyword-only dataclasses whose fields carry their own rules, checked by pydantic.

A rule stands beside its field (`rank: int = Field(4, ge=1)`); one that joins several fields raises a `ValueError` in
`__post_init__`. Types are strict: no bool for an int, no string for a number, and no NaN or infinity but in a field
declared with `AnyFloat`. `dataclasses.replace` and `asdict` work, and so does tyro, which reads the docstrings beneath
the fields.
"""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import AfterValidator, AllowInfNan, Field, Strict, ValidationError
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from .rules import CONFIG, in_words, strict

__all__ = [
    "AnyFloat",
    "AnyPath",
    "Count",
    "Distinct",
    "Field",
    "Index",
    "NonNegative",
    "Positive",
    "Seed",
    "Share",
    "Text",
    "settings",
]

AnyFloat = Annotated[float, AllowInfNan(True)]
"""A float that may be infinite, which a bound beside the field can narrow; NaN breaks any bound."""


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:  # pydantic makes a sentence of a `ValueError` only
        raise ValueError(f"must begin with a known home folder, got {str(path)!r}") from error


AnyPath = Annotated[Path, Strict(False), AfterValidator(_expanded)]
"""A path, also given as a string; `~` is the home folder."""

Count = Annotated[int, Field(ge=1)]
"""How many, at least one."""

Index = Annotated[int, Field(ge=0)]
"""A place in a sequence, counted from 0."""

Seed = Annotated[int, Field(ge=0)]
"""What a generator of random numbers begins with."""

Positive = Annotated[float, Field(gt=0)]
"""A number above 0."""

NonNegative = Annotated[float, Field(ge=0)]
"""A number that is not below 0."""

Share = Annotated[float, Field(ge=0, le=1)]
"""A number from 0 to 1."""

Text = Annotated[str, Field(pattern=r"\S")]
"""A string that is not blank."""

T = TypeVar("T")


def _distinct(items: tuple[T, ...]) -> tuple[T, ...]:
    if len(set(items)) < len(items):
        raise ValueError(f"must hold each once, got {items!r}")
    return items


Distinct = Annotated[tuple[T, ...], AfterValidator(_distinct)]
"""A tuple that holds nothing twice."""


# `Field` is no field specifier to type checkers: of one they take a default by keyword only, and here it comes first.
@dataclass_transform(frozen_default=True, kw_only_default=True)
def settings(cls: type[T]) -> type[T]:
    """Makes a class of fields a settings dataclass.

    Its constructor raises a `ValueError` that names the class, the field, the rule and the value, for every field that
    breaks its rule.
    """
    annotations: Any = cls.__annotations__
    for name, rules in list(vars(cls).items()):
        if isinstance(rules, FieldInfo):  # the rules move to the annotation, so that a default is a plain value
            annotations[name] = Annotated[annotations[name], *rules.metadata]
            if rules.is_required():
                delattr(cls, name)
            else:
                setattr(cls, name, rules.default)
    written = dict(annotations)
    annotations.update((name, strict(hint)) for name, hint in written.items())
    made: Any = dataclass(cls, frozen=True, kw_only=True, config=CONFIG)
    annotations.update(written)
    checked: Callable[..., None] = made.__init__

    @wraps(checked)
    def construct(self: Any, **values: Any) -> None:
        try:
            checked(self, **values)
        except ValidationError as error:
            raise ValueError(in_words(error.errors(), f"{made.__name__}.", made.__dataclass_fields__)) from None

    made.__init__ = construct
    return made
