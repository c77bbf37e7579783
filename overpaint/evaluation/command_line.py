"""The command that does the same again: settings as options of a program."""

import shlex
from collections.abc import Mapping
from typing import Any


def command_line(program: str, config: Any, usual: Mapping[str, Any] | None = None) -> str:
    """Returns what to type in a shell, as tyro reads it, with the options that differ from what is usual.

    Args:
        program: What comes before the options, as in "python examples/erase.py".
        config: The program's settings, a flat dataclass: numbers, words, paths, or tuples of them.
        usual: Value of each setting when its option is left out; None is what the class says.
    """
    usual = vars(type(config)()) if usual is None else usual
    words = []
    for name, value in vars(config).items():
        option = name.replace("_", "-")
        if value == usual[name]:
            continue
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", *map(str, value if isinstance(value, tuple) else (value,))]
    return f"{program} {shlex.join(words)}".rstrip()
