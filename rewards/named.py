"""Rewards by name, for programs: a short name, the address of a served one, or a name in a module or a file."""

import difflib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from .aesthetic import Aesthetic
from .alignment import Alignment
from .blip import BLIPScore
from .clip import CLIPScore
from .function import as_reward, signature_of
from .hps import HPSv2
from .image_reward import ImageReward
from .jpeg import Compressibility, Incompressibility
from .nudity import NudeNet, OpenNSFW
from .pick import PickScore
from .remote import RemoteConfig, RemoteReward
from .types import Reward

FACTORIES: Mapping[str, Callable[[], Reward]] = MappingProxyType(
    {
        "image-reward": ImageReward.load,
        "clip": CLIPScore.load,
        "aesthetic": Aesthetic.load,
        "blip": BLIPScore.load,
        "pick": PickScore.load,
        "hps": HPSv2.load,
        "alignment": Alignment.load,
        "compressibility": Compressibility,
        "incompressibility": Incompressibility,
        "nudenet": NudeNet,
        "opennsfw": OpenNSFW,
    }
)
"""Each short name, and what is called without arguments to make the reward."""
WEIGHTS_FIRST = (ImageReward.load, CLIPScore.load, Aesthetic.load, BLIPScore.load, PickScore.load, HPSv2.load)
"""Those of them whose first argument is the path of the weights, whatever its name; others have it as `weights`."""

TOKEN_VARIABLE = "OVERPAINT_TOKEN"
"""Environment variable with the token of a server that is named by its address, where it asks for one."""


def reward_named(
    name: str,
    more: Mapping[str, Callable[[], Reward]] = MappingProxyType({}),
    *,
    weights: str | Path | None = None,
    vocab: str | Path | None = None,
) -> Reward:
    """Makes a reward of its name.

    That is a short name, the address of `rewards.serve`, or `package.module:name` or `path/to/file.py:name`, where the
    name is of a function of images and prompts, of a reward, of its class, or of a function without required arguments
    that makes one. Modules in the working directory are found, too.

    Args:
        name: Which reward.
        more: Short names besides those of `FACTORIES`, such as `overpaint.tinyworld.REWARDS`.
        weights: File or folder with its weights; given to a class or a function that takes `weights`, and to the short
            names that load some.
        vocab: File or folder with its vocabulary; given to what takes `vocab`.

    Raises:
        ValueError: There is no such thing, what it makes is no reward, or it takes no weights or no vocabulary.
    """
    if name.startswith(("http://", "https://")):
        if weights is not None or vocab is not None:
            option = "vocab" if weights is None else "weights"
            raise ValueError(f"{option} must be given to the server, and not beside its address {name!r}")
        variable = TOKEN_VARIABLE if TOKEN_VARIABLE in os.environ else None
        return RemoteReward(RemoteConfig(url=name, token_variable=variable))
    factories = {**FACTORIES, **more}
    found = factories[name] if name in factories else object_named(name, "reward", factories)
    return reward_made(found, name, weights=weights, vocab=vocab)


def object_named(name: str, field: str, known: Mapping[str, object]) -> object:
    """Returns what `package.module:name` or `path/to/file.py:name` stands for.

    Args:
        name: Its name; the module is looked for where Python looks, and in the working directory.
        field: What to call it in a message.
        known: Short names that it could have been instead.

    Raises:
        ValueError: There is no such module or file, it fails when it is imported, or it has nothing of that name.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise ValueError(
            f"{field} must be one of {', '.join(known)}, an address, package.module:name or path/to/file.py:name, got "
            f"{name!r}{_hint(name, known)}"
        )
    module = _module(place, field, name)
    try:
        return reduce(getattr, attribute.split("."), module)
    except AttributeError as error:
        where = getattr(module, "__file__", None) or place
        names = [known for known in vars(module) if not known.startswith("_")]
        raise ValueError(
            f"{field} must name something that its module has, got {name!r}: {where} has no {attribute}"
            f"{_near(attribute, names)}"
        ) from error


def reward_made(
    found: object, name: str, *, weights: str | Path | None = None, vocab: str | Path | None = None
) -> Reward:
    """Makes a reward of what a name stands for: a function of images and prompts, a reward, its class, or its factory.

    Raises:
        ValueError: It is none, or takes no weights or no vocabulary.
    """
    options = {"weights": weights, "vocab": vocab}
    arguments: dict[str, Any] = {key: Path(path).expanduser() for key, path in options.items() if path is not None}
    if callable(found) and _is_factory(found, name):
        positional = [arguments.pop("weights")] if "weights" in arguments and found in WEIGHTS_FIRST else []
        signature = signature_of(found)
        taken = set() if signature is None else set(signature.parameters)
        if arguments.keys() <= taken:
            return _as_reward(found(*positional, **arguments), name)
        arguments = {option: path for option, path in arguments.items() if option not in taken}
    if arguments:
        raise ValueError(f"{next(iter(arguments))} must be given to a reward that takes it, and {name} takes none")
    return _as_reward(found, name)


def _as_reward(found: Any, name: str) -> Reward:
    """Returns what was found or made as a reward, with its name in the message where it is none."""
    try:
        return as_reward(found)
    except TypeError as error:
        raise ValueError(f"{error}; from {name!r}") from error


def _is_factory(found: Callable[..., Any], name: str) -> bool:
    """Says whether something that can be called makes a reward, and is not one.

    Raises:
        ValueError: It is a class that cannot be called with nothing.
    """
    if not isinstance(found, type) and (isinstance(found, Reward) or inspect.iscoroutinefunction(found)):
        return False
    signature = signature_of(found)
    if signature is None:
        return isinstance(found, type)
    parameters = signature.parameters.values()
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [one.name for one in parameters if one.default is one.empty and one.kind not in variable]
    if isinstance(found, type):
        if required:
            raise ValueError(
                f"reward must name a class that needs no arguments, got {name!r}, which needs {', '.join(required)}; "
                "name an object of it, or a function without arguments that makes one"
            )
        return True
    # A wrapper that passes on whatever it is given does not say which it is: it is taken for a function of images.
    return not required and not any(one.kind is one.VAR_POSITIONAL for one in parameters)


def _module(place: str, field: str, name: str) -> ModuleType:
    """Imports a module by its dotted name or by its file's path."""
    path = Path(place).expanduser()
    by_path = path.suffix == ".py"
    if by_path and not path.is_file():
        raise ValueError(f"{field} must name a file that exists, got {name!r}: there is no {path}")
    # After all else, so that nothing of this program or of a library is hidden by a file that happens to lie there.
    folder = str(path.resolve().parent if by_path else Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
        importlib.invalidate_caches()
    try:
        return _imported_file(path.resolve()) if by_path else importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or by_path or not f"{place}.".startswith(f"{error.name}."):
            raise ValueError(f"{field} must name a module that can be imported, got {name!r}: {error}") from error
        raise ValueError(
            f"{field} must name a module, got {name!r}: no {error.name} where Python looks, nor in {Path.cwd()}"
        ) from error
    except Exception as error:  # of the user's file, whatever it is
        raise ValueError(
            f"{field} must name a module that can be imported, got {name!r}: {type(error).__name__}: {error}"
        ) from error


def _imported_file(path: Path) -> ModuleType:
    """Imports a file once, under its path: its name may be that of another module."""
    name = str(path)
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _hint(name: str, known: Mapping[str, object]) -> str:
    """Returns what may have been meant by a name that is none."""
    if name.endswith(".py"):
        return f"; name what in it: {name}:score"
    if Path(name).expanduser().exists():
        return "; the path of weights is given as reward_weights, beside the reward's name"
    return _near(name, known)


def _near(name: str, known: Mapping[str, object] | list[str]) -> str:
    """Returns a suggestion where a name is nearly another one."""
    plain = {one.lower().replace("_", "-"): one for one in known}
    close = difflib.get_close_matches(name.lower().replace("_", "-"), plain, n=1)
    return f"; did you mean {plain[close[0]]}?" if close else ""
