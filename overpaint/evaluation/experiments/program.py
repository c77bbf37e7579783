"""A program's settings: read from a command line and a YAML file, and written back as both.

A program's settings are a `settings` dataclass. What depends on other settings, such as on the model, is None there,
and the program's `complete` fills it in. Groups of settings, such as `lora: LoRAConfig | None = None`, become options
`--lora.rank`; they are shown with the values that hold for the model and the method at hand.

A settings file may come from anywhere, as a run's output folder does when it is shared. It is data: what it names is
never imported, and the settings that can name code (`CODE`) do so on the command line alone.
"""

import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml

from overpaint.text_files import read_text

SETTINGS_OPTION = "--settings"
ADDRESSES = ("http://", "https://")
SETTINGS_HELP = "--settings FILE.yaml: settings as a run writes them into its settings.yaml; options here win."

CODE = ("reward", "measure")
"""Settings that can name code, as `package.module:name` or `path/to/file.py:name`."""

Config = TypeVar("Config")


def settings_from_command_line(
    config_type: type[Config], complete: Callable[[Config], Config], args: Sequence[str] | None = None
) -> Config:
    """Returns the settings that a command line asks for; `--settings FILE` reads some from YAML, options win over it.

    Args:
        config_type: The program's settings.
        complete: Fills in what depends on other settings; what is there already stays.
        args: The options; None is the command line's.

    Raises:
        ValueError: A setting breaks its rule.
        SystemExit: As tyro: an option is unknown, or help was asked for.
    """
    import tyro

    words, given = _without_settings(list(sys.argv[1:] if args is None else args))
    usual: Any = config_type()
    flat = {name: value for name, value in given.items() if not isinstance(value, Mapping)}
    groups = {name: value for name, value in given.items() if isinstance(value, Mapping)}
    plain, choices = (tyro.conf.AvoidSubcommands,), _choices()
    # Twice: first what stands alone, on which the groups depend, and then all of it.
    first, _ = tyro.cli(
        config_type, args=words, default=updated(usual, flat), return_unknown_args=True, add_help=False, config=plain,
        registry=choices,
    )  # fmt: skip
    default = updated(complete(first), groups)
    described = f"{config_type.__doc__}\n\n{SETTINGS_HELP}"
    return complete(
        tyro.cli(config_type, args=words, default=default, description=described, config=plain, registry=choices)
    )


def _choices() -> Any:
    """Returns how words are read of which one has to be chosen: a wrong one is answered with the nearest."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def of_literal(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        words = get_args(info.type)
        if get_origin(info.type) is not Literal or not all(isinstance(word, str) for word in words):
            return None

        def chosen(given: list[str]) -> str:
            if (word := given[0]) not in words:
                raise ValueError(f"must be one of {', '.join(words)}, got {word!r}{_hint(word, words)}")
            return word

        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=f"{{{','.join(words)}}}",
            instance_from_str=chosen,
            is_instance=lambda value: value in words,
            str_from_instance=lambda value: [value],
        )

    return registry


def _hint(word: str, known: Iterable[str]) -> str:
    close = get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _without_settings(args: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Takes `--settings FILE` out of a command line, and reads the files; later ones win."""
    given: dict[str, Any] = {}
    rest: list[str] = []
    words = iter(args)
    for word in words:
        name, _, value = word.partition("=")
        if name != SETTINGS_OPTION:
            rest.append(word)
            continue
        path = value or next(words, "")
        if not path:
            raise ValueError(f"{SETTINGS_OPTION} must be followed by a YAML file, got nothing")
        given = _joined(given, read_settings(path))
    for name in CODE:
        if any(word.partition("=")[0] == f"--{name}" for word in rest):
            given.pop(name, None)
        elif isinstance(value := given.get(name), str) and ":" in value and not value.startswith(ADDRESSES):
            raise ValueError(
                f"{name} in a settings file must be a short name or an address, got {value!r}, which is code; to "
                f"import it, give --{name} {shlex.quote(value)} beside the file"
            )
    return rest, given


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, as everywhere but in YAML 1.1, and nothing is said by reference to elsewhere."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuses aliases, by which a few lines can stand for more than there is memory."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(problem=f"found the alias *{event.anchor}", problem_mark=event.start_mark)
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_settings(path: str | Path) -> dict[str, Any]:
    """Reads a YAML file of settings; groups are mappings within it, and dashes in names are underscores.

    Raises:
        ValueError: There is no such file, or it is no YAML mapping of names.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"settings must be a YAML file, got {str(path)!r}, which is not there")
    try:
        found = yaml.load(read_text(path), Loader=_Loader)
    except RecursionError as error:
        raise ValueError(f"settings must be YAML of few levels, got {path}") from error
    except (yaml.YAMLError, ValueError) as error:  # the latter for a date or a number that is none
        raise ValueError(f"settings must be YAML, without aliases, got {path}: {error}") from error
    return _named({} if found is None else found, str(path))


def _named(found: object, where: str) -> dict[str, Any]:
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"settings must be a mapping of names to values, got {found!r} in {where}")
    return {
        name.replace("-", "_"): _named(value, f"{where}: {name}") if isinstance(value, Mapping) else value
        for name, value in found.items()
    }


def _joined(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(one)
    for name, value in other.items():
        before = both.get(name)
        both[name] = _joined(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return both


def updated(config: Any, given: Mapping[str, Any], where: str = "") -> Any:
    """Returns settings with some of them changed; groups are changed in part.

    Args:
        config: A settings dataclass.
        given: New values by name: a mapping for each group, a list for each tuple.
        where: What messages put before a name.

    Raises:
        ValueError: There is no such setting, or a value breaks its rule; the message names both.
    """
    known = {field.name: getattr(config, field.name) for field in fields(config)}
    changes = {}
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"settings must be among {', '.join(known)}, got {where}{name}{_hint(name, known)}")
        before = known[name]
        if isinstance(value, Mapping):
            if not is_dataclass(before):
                rule = "left out here" if before is None else "one value"
                raise ValueError(f"{where}{name} must be {rule}, got the group {dict(value)!r}")
            changes[name] = updated(before, value, f"{where}{name}.")
        else:
            changes[name] = _tuples(value)
    return replace(config, **changes)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def check_same(group: str, settings: Any, **values: Any) -> None:
    """Raises a `ValueError` where a group contradicts what the program sets by options of its own."""
    for name, value in values.items():
        if (found := getattr(settings, name)) != value:
            raise ValueError(f"{group}.{name} must be the program's own, {value!r}, got {found!r}; set that instead")


def check_left_out(config: Any, reasons: Mapping[str, str]) -> None:
    """Raises a `ValueError` where a setting is given that a program shares with others and does not heed.

    Args:
        config: The program's settings.
        reasons: Why, by the names of these settings, as a clause.
    """
    usual = type(config)()
    for name, why in reasons.items():
        if (value := getattr(config, name)) != getattr(usual, name):
            raise ValueError(f"{name} must be left out, since {why}; got {value}")


def given(**values: Any) -> dict[str, Any]:
    """Returns the values that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def settings_yaml(config: Any, owned: Mapping[str, Sequence[str]] | None = None) -> str:
    """Returns settings as YAML that `--settings` reads.

    Args:
        config: A settings dataclass.
        owned: Settings of each group that the program has options of its own for; they are left out.
    """
    return yaml.safe_dump(_plain(config, owned or {}), sort_keys=False, allow_unicode=True, width=100)


def _plain(value: Any, owned: Mapping[str, Sequence[str]], group: str = "") -> Any:
    if is_dataclass(value):
        return {
            field.name: _plain(getattr(value, field.name), owned, field.name)
            for field in fields(value)
            if field.name not in owned.get(group, ())
        }
    if isinstance(value, tuple):
        return [_plain(one, owned) for one in value]
    return str(value) if isinstance(value, Path) else value


def usual_beside(config: Config, complete: Callable[[Config], Config], deciding: Sequence[str]) -> dict[str, Any]:
    """Returns the settings that hold beside some, for `command_line`, which tells these whenever they differ.

    Args:
        config: A program's settings.
        complete: What fills in the settings that depend on others.
        deciding: Names of the others, such as the model and the method.
    """
    plain: Any = type(config)
    kept = {name: getattr(config, name) for name in deciding}
    return vars(complete(plain(**kept))) | {name: getattr(plain(), name) for name in deciding}


def command_line(program: str, config: Any, usual: Any = None, owned: Mapping[str, Sequence[str]] | None = None) -> str:
    """Returns what to type in a shell, as tyro reads it, with the options that differ from what is usual.

    Args:
        program: What comes before the options, as in "python examples/erase.py".
        config: The program's settings: numbers, words, paths, or tuples of them, and groups of such settings.
        usual: Settings, or a mapping of them, that hold when options are left out; None is what the class says.
        owned: Settings of each group that the program has options of its own for; they are left out.
    """
    usual = type(config)() if usual is None else usual
    return f"{program} {shlex.join(_options(config, usual, owned or {}))}".rstrip()


def _options(config: Any, usual: Any, owned: Mapping[str, Sequence[str]], group: str = "") -> list[str]:
    words = []
    usual_values = usual if isinstance(usual, Mapping) else vars(usual)
    for name, value in vars(config).items():
        if value == usual_values[name] or name in owned.get(group.removesuffix("."), ()):
            continue
        option = f"{group}{name.replace('_', '-')}"
        if value is None and is_dataclass(usual_values[name]):
            continue  # another option stands in the group's place
        if is_dataclass(value):
            words += _options(value, usual_values[name], owned, f"{option}.")
        elif isinstance(value, bool):
            before, dot, last = option.rpartition(".")
            words.append(f"--{option}" if value else f"--{before}{dot}no-{last}")
        else:
            words += [f"--{option}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words
