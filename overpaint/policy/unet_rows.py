"""What drawing, training and attacking cost: the samples that go through a UNet."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook


class UNetRows:
    """Counts samples that go through UNets, each branch of guidance for itself."""

    def __init__(self) -> None:
        self.forward = 0
        """Without gradient."""
        self.backward = 0
        """With gradient."""

    @property
    def total(self) -> int:
        """All rows, with gradient or without."""
        return self.forward + self.backward

    def _count(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        if not isinstance(module, UNet2DConditionModel):
            return
        first = output[0] if isinstance(output, tuple) else output.sample
        if torch.is_grad_enabled() and first.requires_grad:
            self.backward += len(first)
        else:
            self.forward += len(first)


@contextmanager
def counted_rows() -> Generator[UNetRows]:
    """Counts what goes through any UNet in a `with` block, whoever made it: copies may be trained."""
    rows = UNetRows()
    handle = register_module_forward_hook(rows._count)
    try:
        yield rows
    finally:
        handle.remove()
