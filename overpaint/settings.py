"""Settings: frozen, keyword-only dataclasses whose fields carry their own rules, checked by pydantic.

A rule stands beside its field (`rank: int = Field(4, ge=1)`); one that joins several fields raises a `ValueError` in
`__post_init__`. Types are strict: no bool for an int, no string for a number, and no NaN or infinity but in a field
declared with `AnyFloat`. `dataclasses.replace` and `asdict` work, and so does tyro, which reads the docstrings beneath
the fields.
"""

import re
from collections.abc import Callable
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import AfterValidator, AllowInfNan, ConfigDict, Field, Strict, ValidationError
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

__all__ = ["AnyFloat", "AnyPath", "Distinct", "Field", "Text", "settings"]

AnyFloat = Annotated[float, AllowInfNan(True)]
"""A float that may be infinite, which a bound beside the field can narrow; NaN breaks any bound."""


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:  # pydantic makes a sentence of a `ValueError` only
        raise ValueError(f"must begin with a known home folder, got {str(path)!r}") from error


AnyPath = Annotated[Path, Strict(False), AfterValidator(_expanded)]
"""A path, also given as a string; `~` is the home folder."""

Text = Annotated[str, Field(pattern=r"\S")]
"""A string that is not blank."""

CONFIG = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)

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
    made: Any = dataclass(cls, frozen=True, kw_only=True, config=CONFIG)
    checked: Callable[..., None] = made.__init__

    @wraps(checked)
    def construct(self: Any, **values: Any) -> None:
        try:
            checked(self, **values)
        except ValidationError as error:
            raise ValueError("; ".join(_in_words(made, one) for one in error.errors())) from None

    made.__init__ = construct
    return made


WORDS = (
    (r"^\w+ should", "must"),
    (r"^Input is not a valid path.*", "must be a path"),
    (r"match pattern '\\S'", "not be blank"),
    (r" after validation, not \d+$", ""),
    (r"greater than or equal to", "at least"),
    (r"less than or equal to", "at most"),
    (r"greater than", "above"),
    (r"less than", "below"),
)
"""From pydantic's words to the house's."""


def _in_words(made: Any, error: Any) -> str:
    """Returns one broken rule as a sentence."""
    name = made.__name__
    if error["type"] == "value_error":  # raised by `__post_init__`, which knows more fields than one
        told = str(error["ctx"]["error"])
        if error["loc"]:
            return f"{name}.{error['loc'][0]} {told}"
        return f"{name}.{told}" if told.split(" ")[0] in made.__dataclass_fields__ else f"{name}: {told}"
    first, *inner = error["loc"]
    field = f"{name}.{first}" + "".join(f"[{part!r}]" for part in inner if not isinstance(part, str))
    if error["type"] == "unexpected_keyword_argument":
        close = get_close_matches(str(first), made.__dataclass_fields__, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return f"{field} must be one of {', '.join(made.__dataclass_fields__)}, got {first}={error['input']!r}{hint}"
    if error["type"] in ("missing", "missing_keyword_only_argument"):
        return f"{field} must be given, got nothing"
    rule: str = error["msg"]
    for theirs, ours in WORDS:
        rule = re.sub(theirs, ours, rule)
    return f"{field} {rule}, got {error['input']!r}"
