"""The ten methods by name."""

import inspect
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol, runtime_checkable

from overpaint.policy import DiffusionPolicy
from overpaint.settings import NonNegative, Seed

from .concept import Concept
from .erased import Erasure
from .methods.ac import AC
from .methods.ant import ANT
from .methods.eraseflow import EraseFlow
from .methods.esd import ESD
from .methods.mace import MACE
from .methods.receler import Receler
from .methods.sa import SA
from .methods.safree import SAFREE
from .methods.sld import SLD
from .methods.uce import UCE
from .protocols import TrainedMethod


@runtime_checkable
class ErasureMethod(Protocol):
    """What all methods have in common."""

    name: str
    config: Any

    def erase(self, policy: DiffusionPolicy, concept: Concept) -> Erasure:
        """Computes the erasure of a concept, without changing the policy."""
        ...


MethodName = Literal["sld", "safree", "uce", "mace", "esd", "ac", "sa", "receler", "ant", "eraseflow"]
"""The names of `METHODS`, for the type of a setting."""

METHODS = MappingProxyType(
    {method.name.lower(): method for method in (SLD, SAFREE, UCE, MACE, ESD, AC, SA, Receler, ANT, EraseFlow)}
)
"""The class of each method by its name in small letters."""


def method_named(name: str, config: Any = None, *, seed: Seed | None = None) -> ErasureMethod:
    """Makes a method.

    Args:
        name: One of `METHODS`.
        config: Its settings; None takes its authors' for nudity.
        seed: Of everything random in its training, where it trains; its settings' own if it is not given.

    Raises:
        ValueError: There is no such method, or the settings are another's.
    """
    if name not in METHODS:
        close = get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}{hint}")
    method: Any = METHODS[name](config)
    if not isinstance(method.config, wanted := type(METHODS[name]().config)):
        raise ValueError(f"config must be a {wanted.__name__} for {name}, got a {type(config).__name__}")
    if seed is not None and isinstance(method, TrainedMethod):
        method.config = replace(method.config, descent=replace(method.config.descent, seed=seed))
    return method


def erase(
    method: ErasureMethod,
    policy: DiffusionPolicy,
    concept: Concept,
    *,
    strength: NonNegative = 1.0,
    output_dir: Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Erasure:
    """Erases a concept by any method; where it trains, the run is kept in a folder and can be resumed.

    Args:
        method: Of any family.
        policy: Whose model is erased; it is not changed.
        concept: What is erased.
        strength: For methods that have one; 1 is the method's own setting.
        output_dir: Of the training; None keeps nothing.
        resume: Go on with an interrupted training in the same folder.
        progress: Whether the training shows a progress bar.

    Raises:
        ValueError: A strength is given to a method that has none, the processes cannot share a batch, or as the
            method's own `erase`.
    """
    taken = inspect.signature(method.erase).parameters
    if strength != 1.0 and "strength" not in taken:
        raise ValueError(f"strength must be 1 with {method.name}, which has none, got {strength}")
    if isinstance(method, TrainedMethod):
        method.config.descent.check_processes()
    given = {"strength": strength, "output_dir": output_dir, "resume": resume, "progress": progress}
    return method.erase(policy, concept, **{name: value for name, value in given.items() if name in taken})
