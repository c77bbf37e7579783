"""Rules of values: what annotations allow, strictly and by pydantic, and what is said of a value that breaks one.

Settings and the arguments of calls are held to the same: no bool for an int, no string for a number, no NaN, nothing
converted. An object is taken as it is where its class is right, and the items of lists, tuples, sets and dictionaries
are looked at, every one.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import reduce
from operator import getitem, or_
from pathlib import Path
from reprlib import Repr
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BeforeValidator, ConfigDict, InstanceOf, WrapValidator

CONFIG = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


class WrongTypeError(ValueError):
    """A value is of a wrong type; pydantic makes a sentence of a `ValueError` only."""


PLAIN = (bool, int, float, str, Path, type(None))
"""Classes whose values pydantic knows."""


def _number(value: Any) -> Any:
    """Refuses what pydantic would convert to a number, such as a tensor, and integers that no tensor holds."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"must be within 64 bits, got {shown(value)}")
    if hasattr(value, "__float__") and not isinstance(value, int | float):
        raise WrongTypeError(f"must be a valid number, got {shown(value)}")
    return value


def strict(hint: Any) -> Any:
    """Returns an annotation by which pydantic takes objects as they are, and neither converts them nor looks inside."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        own = (BeforeValidator(_number),) if inner[0] in (int, float) else ()
        return Annotated[inner[0] if own else strict(inner[0]), *inner[1:], *own]
    if hint in (int, float):
        return strict(Annotated[hint, ...])
    if origin in (Union, UnionType):
        return reduce(or_, (strict(one) for one in inner))
    if origin in (Sequence, Collection, Mapping):
        concrete: Any = dict if origin is Mapping else list
        return Annotated[concrete[*map(strict, inner)], WrapValidator(_container(origin, concrete))]
    if origin in (list, tuple, dict, set, frozenset):
        return origin[*(one if one is ... else strict(one) for one in inner)]
    if hint is Any or isinstance(hint, TypeVar):
        return Any
    if hint in PLAIN or origin in (Literal, Callable, type):
        return hint
    return getitem(InstanceOf, origin or hint)


def _container(abstract: type, concrete: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    """Returns the check of a container. Only the items of those that hold them are looked at: others compute theirs."""
    kinds = (dict,) if abstract is Mapping else (list, tuple, set, frozenset, dict)

    def check(value: Any, items: Callable[[Any], Any]) -> Any:
        array = hasattr(value, "__array__")  # a collection to Python, and no list of Python's numbers
        if not isinstance(value, abstract) or isinstance(value, str | bytes) or array:
            raise WrongTypeError(f"must be a {abstract.__name__.lower()}, got {shown(value)}")
        if isinstance(value, kinds):
            items(concrete(value))
        return value

    return check


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


class _Shown(Repr):
    """Any value in a few words."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 200

    def repr_Tensor(self, tensor: Any, level: int) -> str:  # reprlib finds a method by the name of the value's class
        """Says what kind of tensor it is."""
        return f"a {str(tensor.dtype).removeprefix('torch.')} tensor of shape {list(tensor.shape)} on {tensor.device}"

    repr_Parameter = repr_Tensor


shown = _Shown().repr


def in_words(errors: Iterable[Any], prefix: str, fields: Collection[str] = ()) -> str:
    """Returns the broken rules: a sentence for each value, which names the field, the rules and the value.

    Args:
        errors: What pydantic has found; each place begins with the name of a field.
        prefix: Stands before that name.
        fields: The names of all fields.
    """
    sentences: dict[str, str] = {}
    for one in errors:
        place, rule, value = _in_words(one, prefix, fields)
        if place in sentences:  # none of several types takes the value
            rule = f"{sentences[place].removesuffix(value)} or {rule.removeprefix(' must be ')}"
        sentences[place] = rule + value
    return "; ".join(f"{place}{told}" for place, told in sentences.items())


def _in_words(error: Any, prefix: str, fields: Collection[str]) -> tuple[str, str, str]:
    """Returns a place, the rule that is broken there, and by which value."""
    first, *inner = error["loc"] or ("",)
    place = f"{prefix}{first}" + "".join(f"[{part!r}]" for part in inner if not isinstance(part, str))
    if error["type"] == "value_error":  # raised by a validator, or by `__post_init__`, which knows more fields than one
        told = str(error["ctx"]["error"])
        if first:
            return place, f" {told}", ""
        return (prefix, told, "") if told.split(" ")[0] in fields else (prefix.rstrip("."), f": {told}", "")
    if error["type"] == "unexpected_keyword_argument":
        close = get_close_matches(str(first), fields, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return place, f" must be one of {', '.join(fields)}", f", got {first}={shown(error['input'])}{hint}"
    if error["type"] in ("missing", "missing_keyword_only_argument"):
        return place, " must be given", ", got nothing"
    rule: str = error["msg"]
    for theirs, ours in WORDS:
        rule = re.sub(theirs, ours, rule)
    return place, f" {rule}", f", got {shown(error['input'])}"
