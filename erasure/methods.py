"""The nine methods by name, each with its settings for the tiny world or its authors' for nudity."""

import importlib
import inspect
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol, runtime_checkable

from overpaint.policy import DiffusionPolicy

from .concept import Concept
from .erased import Erasure
from .estimate import TrainedMethod

METHODS = MappingProxyType(
    {
        "sld": "erasure.sld:SLD",
        "safree": "erasure.safree:SAFREE",
        "uce": "erasure.uce:UCE",
        "mace": "erasure.mace:MACE",
        "esd": "erasure.esd:ESD",
        "ac": "erasure.ac:AC",
        "sa": "erasure.sa:SA",
        "receler": "erasure.receler:Receler",
        "ant": "erasure.ant:ANT",
    }
)
"""Each name, and the class of the method; its settings are the class of that name with `Config` behind it."""

Preset = Literal["official", "tiny-world"]
"""Which settings: the authors' for nudity, or those for the tiny world's stripes."""


@runtime_checkable
class ErasureMethod(Protocol):
    """What all methods have in common."""

    name: str
    config: Any

    def erase(self, policy: DiffusionPolicy, concept: Concept) -> Erasure:
        """Computes the erasure of a concept, without changing the policy."""
        ...


def method_named(name: str, preset: Preset = "official", *, seed: int | None = None) -> ErasureMethod:
    """Makes a method.

    Args:
        name: One of `METHODS`.
        preset: Which settings it gets.
        seed: Of everything random in its training, where it trains; its settings' own if it is not given.

    Raises:
        ValueError: There is no such method.
    """
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    module, _, kind = METHODS[name].partition(":")
    found = importlib.import_module(module)
    settings: Any = getattr(found, f"{kind}Config")
    config = settings.tiny_world() if preset == "tiny-world" else settings()
    if seed is not None and hasattr(config, "descent"):
        config = replace(config, descent=replace(config.descent, seed=seed))
    return getattr(found, kind)(config)


def erase(
    method: ErasureMethod,
    policy: DiffusionPolicy,
    concept: Concept,
    *,
    strength: float = 1.0,
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
        method.descent().check_processes()
    given = {"strength": strength, "output_dir": output_dir, "resume": resume, "progress": progress}
    return method.erase(policy, concept, **{name: value for name, value in given.items() if name in taken})
