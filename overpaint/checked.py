"""Checked calls: what a package offers refuses arguments that their annotations do not allow, in one sentence.

An argument has the rules of a settings' field: strict types, no bool for an int, no NaN or infinity for a number, and
what an annotation such as `Annotated[int, Field(ge=1)]` adds. Tensors have the dtype and the shape that jaxtyping's
annotations say, with axes of one name of one size, and lie on one device. Every item of a list, a tuple or a dictionary
is looked at. Annotations are read at the first call, so that importing waits for nothing. A written constructor checks
whoever calls it, since what it keeps may have been computed. Other calls of the packages among themselves, and records
that they pass on, are for the tests to check: a trainer's step has hundreds of them, and users stand at the door.
"""

import inspect
import sys
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import cache, wraps
from itertools import chain, repeat
from types import FunctionType
from typing import Any, NoReturn, Unpack, get_args, get_origin, get_type_hints, no_type_check

from jaxtyping import jaxtyped
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import is_pydantic_dataclass
from torch import Tensor

from .rules import CONFIG, WrongTypeError, in_words, shown, strict

__all__ = ["Checks", "check_calls"]


OURS: set[str] = set()
"""The top packages whose calls are checked."""


def check_calls(package: str) -> None:
    """Makes what `__all__` of a package names check its arguments: functions, constructors and public methods.

    Settings check themselves, and a protocol has no code.

    Args:
        package: Its name, as in `check_calls(__name__)` at the end of its `__init__.py`.
    """
    OURS.add(package.partition(".")[0])
    _is_ours.cache_clear()
    module = sys.modules[package]
    for name in module.__all__:
        public = getattr(module, name)
        if isinstance(public, FunctionType):
            call = _checked(public, public.__module__, f"{public.__name__}: ")
            for home in (module, sys.modules[public.__module__]):  # pickle looks where it was defined
                setattr(home, public.__name__, call)
        elif inspect.isclass(public):
            for owner in public.__mro__:
                if owner.__module__.partition(".")[0] == package.partition(".")[0]:
                    _check_methods(owner)


@cache
def _is_ours(module: str) -> bool:
    """Whether a module belongs to a package that checks its calls."""
    return module.partition(".")[0] in OURS


def _check_methods(owner: type) -> None:
    """Makes the methods that a class itself defines check their arguments."""
    if getattr(owner, "_is_protocol", False):
        return
    maker = "__new__" if issubclass(owner, tuple) else "" if is_pydantic_dataclass(owner) else "__init__"
    for name, member in list(vars(owner).items()):
        function = getattr(member, "__func__", member)
        if not isinstance(function, FunctionType) or (name.startswith("_") and name not in (maker, "__call__")):
            continue
        prefix = f"{owner.__name__}." if name == maker else f"{owner.__name__}.{name}: "
        bound = not isinstance(member, staticmethod)
        always = name == "__init__" and not is_dataclass(owner)
        call = _checked(function, owner.__module__, prefix, bound=bound, always=always)
        setattr(owner, name, call if function is member else type(member)(call))


@no_type_check  # the tests' type checker would stand between a caller and what it calls
def _checked(
    function: FunctionType, home: str, prefix: str, *, bound: bool = False, always: bool = False
) -> Callable[..., Any]:
    """Returns the function, which checks its arguments before it does anything.

    Args:
        function: Checks once, however often it is given.
        home: The module that its annotations are from.
        prefix: Begins what is said of an argument.
        bound: The first argument is the object of a method, or its class.
        always: Also what the packages give one another.
    """
    if hasattr(function, "checks"):
        return function
    checks = cache(lambda: Checks(function, vars(sys.modules[home]), prefix, bound))

    @wraps(function)
    def call(*args: Any, **values: Any) -> Any:
        if always or not _is_ours(sys._getframe(1).f_globals.get("__name__", "")):
            checks()(args, values)
        return function(*args, **values)

    vars(call)["checks"] = checks
    return call


class Checks:
    """The rules of a function's arguments; as `_checked`, with the names that annotations refer to."""

    def __init__(self, function: FunctionType, names: dict[str, Any], prefix: str, bound: bool) -> None:
        self.prefix = prefix
        self.rules: dict[str, Callable[[Any], Any]] = {}
        self.order: list[str] = []
        self.rest: str | None = None
        hints = get_type_hints(function, names, include_extras=True)
        for key, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is parameter.VAR_POSITIONAL:
                self.rest = key
            elif parameter.kind is not parameter.KEYWORD_ONLY:
                self.order.append(key)
            if (bound and self.order == [key]) or key not in hints:
                continue
            if parameter.kind is not parameter.VAR_KEYWORD:
                self.rules[key] = _rule(hints[key])
            elif get_origin(hints[key]) is Unpack:
                options = get_type_hints(*get_args(hints[key]), include_extras=True)
                self.rules |= {option: _rule(hint) for option, hint in options.items()}

    def __call__(self, args: tuple[Any, ...], values: dict[str, Any]) -> None:
        """Raises a `TypeError` or a `ValueError` for the first argument that breaks its rule."""
        tensors: dict[str, Tensor] = {}
        names = (*self.order, *repeat(self.rest, len(args) - len(self.order)))
        with jaxtyped("context"):  # in which an axis keeps its size
            for key, value in chain(zip(names, args, strict=False), values.items()):
                rule = self.rules.get(key)
                if key is None or rule is None:  # without an annotation, or no argument: Python itself says so
                    continue
                try:
                    rule({key: value})
                except ValidationError as error:
                    self.refuse(error.errors(), tensors if isinstance(value, Tensor) else {})
                if isinstance(value, Tensor):
                    tensors[key] = value
        devices = {tensor.device for tensor in tensors.values() if tensor.ndim and tensor.is_floating_point()}
        if len(devices) > 1:
            raise ValueError(f"{self.prefix}tensors must be on one device, got {_together(tensors)}")

    def refuse(self, errors: list[Any], before: dict[str, Tensor]) -> NoReturn:
        """Raises what the errors of an argument come to, and names the tensors that it has to go with."""
        kind = TypeError if all(map(_is_of_type, errors)) else ValueError
        beside = f", with {_together(before)}" if before and errors[0]["type"] == "is_instance_of" else ""
        raise kind(in_words(errors, self.prefix) + beside) from None


def _is_of_type(error: Any) -> bool:
    """Whether an error is about a type."""
    return error["type"].endswith(("_type", "_of")) or isinstance(error.get("ctx", {}).get("error"), WrongTypeError)


def _together(tensors: dict[str, Tensor]) -> str:
    return ", ".join(f"{key}: {shown(tensor)}" for key, tensor in tensors.items())


def _rule(hint: Any) -> Callable[[Any], Any]:
    """Returns what raises pydantic's error for an argument, by its name, that its annotation does not allow."""
    named: Any = dict
    return TypeAdapter(named[str, strict(hint)], config=CONFIG).validator.validate_python
