"""The wrapper that accelerate puts around the trained network, and its removal."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from .types import Trainable

if TYPE_CHECKING:
    from accelerate import Accelerator

MARKS = ("forward", "_original_forward", "_is_accelerate_prepared")
"""Attributes that accelerate leaves on a module; while they stay, a second run would not be wrapped anew."""


@contextmanager
def prepared_network(accelerator: "Accelerator", policy: Trainable) -> Generator[nn.Module, None, None]:
    """Puts accelerate's wrapper in the policy's `network` for as long as the block lasts.

    Gradients stay in their process unless a backward asks otherwise (see `TrainingRun.backward`).

    Raises:
        ValueError: The policy's network is no module.
    """
    network = policy.network
    if not isinstance(network, nn.Module):
        raise ValueError(f"policy.network must be a torch module so that accelerate can wrap it, got {network!r}")
    before: dict[str, Any] = {mark: network.__dict__[mark] for mark in MARKS if mark in network.__dict__}
    try:
        # A launcher may start one process as one of many; alone it has nothing to average.
        wrapped = accelerator.prepare_model(network, evaluation_mode=accelerator.num_processes == 1)
        policy.network = wrapped
        with accelerator.no_sync(wrapped):
            yield wrapped
    finally:
        policy.network = network
        for mark in MARKS:
            network.__dict__.pop(mark, None)
        network.__dict__.update(before)
