"""Bad values, derived from annotations: what each does not allow, and what is just beyond the bounds in it.

`allows` reads annotations for itself, so that it is a second opinion to the one under test.
"""

import contextlib
import math
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import torch
from jaxtyping import AbstractArray
from pydantic import AllowInfNan, Strict
from pydantic.fields import FieldInfo
from torch import Tensor

HUGE = 10**30
POOL: tuple[Any, ...] = (
    *(None, True, 0, 3, -3, HUGE, -HUGE, 1.5, -1.5, math.nan, math.inf, -math.inf, "3", "", " ", b"3", object(), int),
    *([], (), {}, [3], ["3"], [None], [True], [math.nan], (3,), ("3",), (None,), {"3": object()}, {3: 3}, {"3": None}),
    *(torch.zeros(()), torch.zeros(3), torch.zeros([1] * 7), torch.zeros(2, 3, 8, 8, dtype=torch.complex64)),
    *(torch.zeros(3, dtype=torch.bool), torch.zeros(2, 3, 8, 8, dtype=torch.long)),
)
"""Values of which every annotation refuses some: of wrong types, numbers that are no numbers, empty ones, tensors."""

WORDS = ("x", "", " ", "nan", "inf", "-inf", "1.5", "-1", "0", str(HUGE), str(-HUGE), "true")
"""What is typed after an option."""

LIMITS = {"ge": -1, "gt": 0, "le": 1, "lt": 0}
"""What to add to a bound to be beyond it."""


def bad_values(hint: Any) -> Iterator[Any]:
    """Yields values that an annotation does not allow."""
    for value in (*POOL, *_beyond(hint)):
        if not allows(hint, value):
            yield value


def bad_words(hint: Any) -> Iterator[str]:
    """Yields words that can be read as no value that an annotation allows, nor as one item of it."""
    for word in WORDS:
        readings: list[Any] = [word, Path(word), *([True] if word == "true" else [])]
        for number in (int, float):
            with contextlib.suppress(ValueError):
                readings.append(number(word))
        if not any(allows(hint, one) or allows(hint, (one,)) for one in readings):
            yield word


def misfits(hints: dict[str, Any]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yields pairs of tensors, and the name of the second: an axis that they share is of two sizes, or two devices."""
    arrays = {name: kind for name, hint in hints.items() for kind in (hint, *get_args(hint)) if _is_plain_array(kind)}
    for first, second in combinations(arrays, 2):
        for axis in {*arrays[first].dim_str.split()} & {*arrays[second].dim_str.split()}:
            if not axis.isdigit():
                yield second, {first: _tensor(arrays[first]), second: _tensor(arrays[second], longer=axis)}
        pair = {first: _tensor(arrays[first]), second: _tensor(arrays[second]).to("meta")}
        if all(tensor.ndim and tensor.is_floating_point() for tensor in pair.values()):
            yield second, pair


def _is_plain_array(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, AbstractArray) and kind.dim_str.replace(" ", "").isalnum()


def _tensor(kind: Any, longer: str = "") -> Tensor:
    """Makes a tensor that an annotation allows, one axis longer than others of its name."""
    sizes = [int(axis) if axis.isdigit() else 2 + (axis == longer) for axis in kind.dim_str.split()]
    dtypes = (torch.float32, torch.int64, torch.uint8, torch.bool)
    return next(x for x in (torch.zeros(sizes, dtype=dtype) for dtype in dtypes) if isinstance(x, kind))


def _beyond(hint: Any) -> Iterator[Any]:
    """Yields numbers just beyond the bounds in an annotation, and containers of one bad item."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        for rule in _rules(inner[1:]):
            for name, sign in LIMITS.items():
                if (bound := getattr(rule, name, None)) is not None:
                    yield from (bound + sign, math.nextafter(bound, sign * math.inf) if sign else float(bound))
        yield from _beyond(inner[0])
    elif origin in (Union, types.UnionType):
        for one in inner:
            yield from _beyond(one)
    elif origin in (list, tuple, Sequence, Collection) and inner[1:] in ((), (...,)):
        kind: Any = tuple if origin is tuple else list
        yield from (kind([item]) for item in bad_values(inner[0]))
    elif origin in (dict, Mapping):
        yield from ({"name": item} for item in bad_values(inner[1]))


def allows(hint: Any, value: Any) -> bool:
    """Whether an annotation allows a value; an integer without bounds is a number of things, and not negative."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _allows_annotated(inner[0], _rules(inner[1:]), value)
    if origin in (Union, types.UnionType):
        return any(allows(one, value) for one in inner)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if hint in (int, float):
        return _is_number(hint, value) and (hint is float or value >= 0)
    if origin in (list, tuple, set, frozenset, Sequence, Collection, dict, Mapping):
        return _holds(origin, inner, value)
    return (
        hint is Any
        or isinstance(hint, TypeVar)
        or isinstance(value, type if origin is type else origin or hint or type(None))
    )


def _allows_annotated(hint: Any, rules: list[Any], value: Any) -> bool:
    if hint in (int, float):
        lenient = any(isinstance(rule, AllowInfNan) for rule in rules) and type(value) is float
        fits = lenient or _is_number(hint, value)
    else:
        fits = allows(hint, value) or (isinstance(value, str) and Strict(strict=False) in rules)
    return fits and all(_keeps(rule, value) for rule in rules)


def _is_number(kind: type, value: Any) -> bool:
    if type(value) is float:
        return kind is float and math.isfinite(value)
    return type(value) is int and -(2**63) <= value < 2**63


def _holds(kind: Any, inner: tuple[Any, ...], value: Any) -> bool:
    if not isinstance(value, kind) or isinstance(value, str | bytes | Tensor):
        return False
    if kind in (dict, Mapping):
        return all(allows(inner[0], key) and allows(inner[1], value[key]) for key in value)
    if kind is tuple and inner[1:] != (...,):
        return len(value) == len(inner) and all(map(allows, inner, value))
    return all(allows(inner[0], item) for item in value)


def _rules(metadata: Sequence[Any]) -> list[Any]:
    return [rule for one in metadata for rule in (one.metadata if isinstance(one, FieldInfo) else [one])]


def _keeps(rule: Any, value: Any) -> bool:
    """Whether a value that is of the right type keeps a rule."""
    tests: dict[str, Callable[[Any], bool]] = {
        "ge": lambda bound: value >= bound,
        "gt": lambda bound: value > bound,
        "le": lambda bound: value <= bound,
        "lt": lambda bound: value < bound,
        "min_length": lambda length: len(value) >= length,
        "max_length": lambda length: len(value) <= length,
        "pattern": lambda pattern: bool(value.strip()),  # the one that is in use: not blank
    }
    known = {name: getattr(rule, name, None) for name in tests}
    return value is None or all(tests[name](limit) for name, limit in known.items() if limit is not None)
