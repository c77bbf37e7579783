"""What is refused, and how: bad values for every setting, argument and program option, as users would give them.

    PYTHONPATH=. python tests/bad_input.py

Values are derived from annotations and the rules in them (`bad_values.py`). Each has to be refused by a `ValueError` or
a `TypeError` whose words name what was given, the rule and the value. Prints as JSON how many were, and the others.
"""

import contextlib
import importlib
import inspect
import io
import json
import pkgutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Unpack, get_args, get_origin, get_type_hints

import tyro
from bad_values import bad_values, bad_words, misfits
from pydantic.dataclasses import is_pydantic_dataclass

from overpaint.evaluation.experiments.program import settings_from_command_line
from overpaint.rules import CONFIG

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "examples"))  # where programs find each other
PUBLIC = (
    "overpaint", "overpaint.policy", "overpaint.training", "overpaint.evaluation", "overpaint.tinyworld", "rewards",
    "erasure", "refl", "ddpo",
)  # fmt: skip
ROOTS = ("overpaint", "rewards", "erasure", "refl", "ddpo", "examples", "benchmarks")

# What is asked


class Attempt(NamedTuple):
    """Something that has to be refused."""

    kind: str
    place: str
    argument: str
    value: Any
    call: Callable[[], object]


def setting_attempts() -> Iterator[Attempt]:
    """Every field of every settings dataclass of the packages and programs."""
    for made in settings_classes():
        for name, hint in get_type_hints(made, include_extras=True).items():
            for value in bad_values(hint) if name in made.__dataclass_fields__ else ():
                yield Attempt("setting", made.__qualname__, name, value, lambda m=made, n=name, v=value: m(**{n: v}))


def settings_classes() -> list[Any]:
    """Returns the settings dataclasses of the packages, the examples and the benchmarks."""
    found: dict[str, Any] = {}
    for root in ROOTS:
        for module in pkgutil.walk_packages([str(ROOT / root)], f"{root}."):
            if not module.name.endswith("peers_trl"):  # runs in an environment of its own
                content = vars(importlib.import_module(module.name))
                found |= {f"{c.__module__}.{c.__name__}": c for c in content.values() if isinstance(c, type)}
    ours = (one for name, one in sorted(found.items()) if name.partition(".")[0] in ROOTS)
    return [one for one in ours if getattr(one, "__pydantic_config__", None) == CONFIG]


class Callee(NamedTuple):
    """A public function, method or constructor."""

    name: str
    call: Callable[..., Any]
    hints: dict[str, Any]
    method: bool


def callees() -> list[Callee]:
    """Returns what the packages offer to be called: functions, constructors and public methods."""
    found: dict[int, Callee] = {}
    for package in map(importlib.import_module, PUBLIC):
        for name in package.__all__:
            public = getattr(package, name)
            if inspect.isfunction(public):
                found[id(public)] = Callee(name, public, _hints(public, public.__module__), False)
            elif inspect.isclass(public) and not getattr(public, "_is_protocol", False):
                for base in public.__mro__:
                    if base.__module__.split(".")[0] in ROOTS and not getattr(base, "_is_protocol", False):
                        found |= {id(callee.call): callee for callee in _methods(base)}
    return list(found.values())


def _methods(owner: Any) -> Iterator[Callee]:
    for name, member in vars(owner).items():
        function = getattr(member, "__func__", member)
        if not inspect.isfunction(function) or (
            name.startswith("_") and name not in ("__init__", "__new__", "__call__")
        ):
            continue
        if name == "__new__" and not issubclass(owner, tuple):
            continue
        if not (name == "__init__" and is_pydantic_dataclass(owner)):
            title = owner.__name__ if name in ("__init__", "__new__") else f"{owner.__name__}.{name}"
            bound = not isinstance(member, staticmethod)
            hints = _hints(function, owner.__module__)
            yield Callee(title, function, dict([*hints.items()][bound:]), bound)


def _hints(function: Any, home: str) -> dict[str, Any]:
    """Returns the annotations of the arguments, those of `**options` one by one."""
    hints = get_type_hints(function, vars(sys.modules[home]), include_extras=True)
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        hint = hints.get(name, Any)
        if get_origin(hint) is Unpack:
            found |= get_type_hints(*get_args(hint), include_extras=True)
        elif parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            found[name] = hint
    return found


def call_attempts() -> Iterator[Attempt]:
    """Every argument of what is called: alone, as what is refused is refused before another is missed."""
    for callee in callees():
        for name, hint in callee.hints.items():
            for value in bad_values(hint):
                yield _attempt("argument", callee, name, {name: value})
        for name, tensors in misfits(callee.hints):
            yield _attempt("tensors", callee, name, tensors)


def _attempt(kind: str, callee: Callee, name: str, given: dict[str, Any]) -> Attempt:
    first = (None,) if callee.method else ()
    return Attempt(kind, callee.name, name, given[name], lambda: callee.call(*first, **given))


def option_attempts() -> Iterator[Attempt]:
    """Every option of every program, as its command line reads it."""
    for path in sorted((ROOT / "examples").glob("*.py")):
        module = importlib.import_module(f"examples.{path.stem}")
        for option, hint in _options(module.Config):
            for word in islice(bad_words(hint), 1 if hint is bool else 2):  # reading a command line takes long
                told = word if hint is bool else option  # what takes no value is told by the value
                yield Attempt("option", path.name, told, word, partial(_parse, module, [f"--{option}={word}"]))


def _options(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, hint in get_type_hints(config, include_extras=True).items():
        group = next((one for one in (hint, *get_args(hint)) if is_pydantic_dataclass(one)), None)
        if group is not None:
            yield from _options(group, f"{prefix}{name.replace('_', '-')}.")
        elif name in config.__dataclass_fields__:
            yield prefix + name.replace("_", "-"), hint


def _parse(module: Any, args: list[str]) -> object:
    """Reads a command line as the program does."""
    words = io.StringIO()
    try:
        with contextlib.redirect_stderr(words), contextlib.redirect_stdout(words):
            if hasattr(module, "settings_from_command_line"):
                return settings_from_command_line(module.Config, module.complete, args)
            return tyro.cli(module.Config, args=args)
    except SystemExit as error:
        raise (ValueError if error.code == 2 else RuntimeError)(" ".join(words.getvalue().split())) from None


# What comes of it

RULE = ("got", "parsing", "Expected", "Unrecognized options")
"""One of these stands in what is said of a broken rule; the last ones are tyro's."""


def outcome(attempt: Attempt) -> str:
    """Returns "refused", or what is wrong with the answer."""
    try:
        attempt.call()
    except (ValueError, TypeError) as error:
        told = str(error)
        field = attempt.argument.split(".")[-1].replace("-", "_")
        named = attempt.kind == "option" or attempt.place in told
        if named and field in told.replace("-", "_") and any(word in told for word in RULE):
            return "refused"
        missing = "missing" in told and "argument" in told  # Python's own: nobody has looked at the value
        return "silent" if missing else f"unclear: {told[:200]}"
    except Exception as error:
        return f"unclear: {type(error).__name__}: {str(error)[:200]}"
    return "silent"


def main(kinds: Sequence[str]) -> None:
    """Makes all attempts of some kinds, and prints what came of them."""
    sources = {"setting": setting_attempts, "argument": call_attempts, "option": option_attempts}
    counts: Counter[str] = Counter()
    failures: list[str] = []
    for kind in kinds or sources:
        for attempt in sources[kind]():
            found = outcome(attempt)
            counts[f"{attempt.kind} {found.partition(':')[0]}"] += 1
            if found != "refused":
                failures.append(f"{attempt.place}: {attempt.argument}={attempt.value!r}"[:200] + f": {found}")
    sys.stdout.write(json.dumps({"counts": counts, "failures": failures}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
