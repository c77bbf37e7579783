"""What a training run asks of the objects it is given."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class Trainable(Protocol):
    """A policy whose denoising network is trained; `policy.DiffusionPolicy` is one."""

    network: Callable[..., Any]
    """What every forward of that network goes through; a run replaces it by accelerate's wrapper."""

    def to(self, device: torch.device, /) -> Any:
        """Moves all of its networks to the run's device."""
        ...

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Returns what the optimizer changes, always in the same order."""
        ...

    def trainable_state(self) -> dict[str, Tensor]:
        """Returns the trainable weights by name."""
        ...

    def load_trainable_state(self, state: dict[str, Tensor], /) -> None:
        """Takes back what `trainable_state` returned."""
        ...


@runtime_checkable
class Shardable(Protocol):
    """A policy whose frozen weights can be spread over processes."""

    def shard(self, processes: int, /) -> None:
        """Spreads them over so many connected processes, and leaves what is trained whole."""
        ...


@runtime_checkable
class Stateful(Protocol):
    """Anything whose state belongs in a checkpoint, such as the dual variable of a constraint."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as dicts, lists, tuples, numbers, strings and tensors."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Takes back what `state_dict` returned."""
        ...


@runtime_checkable
class Sliceable(Protocol):
    """A sequence or a tensor: what can be divided among processes."""

    def __len__(self) -> int:
        """Returns the number of items."""
        ...

    def __getitem__(self, part: Any, /) -> Any:
        """Returns a part of the same kind."""
        ...
