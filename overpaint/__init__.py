"""Reward fine-tuning of text-to-image diffusion models, under the constraint that erased concepts stay erased."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .policy import DiffusionPolicy, LoRAConfig
    from .training import TrainingConfig

__all__ = ["DiffusionPolicy", "LoRAConfig", "TrainingConfig"]

_HOMES = {"DiffusionPolicy": "policy", "LoRAConfig": "policy", "TrainingConfig": "training"}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for, so that `import overpaint` waits for no heavy library."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
