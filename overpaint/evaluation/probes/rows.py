"""What a probe costs: the rows of its batches that go through the UNet."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class UNetRows:
    """Counts samples that go through UNets, each branch of guidance for itself."""

    def __init__(self) -> None:
        self.forward = 0
        self.backward = 0

    @property
    def total(self) -> int:
        """All rows, with gradient or without."""
        return self.forward + self.backward

    def _count(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output.sample
        if torch.is_grad_enabled() and first.requires_grad:
            self.backward += len(first)
        else:
            self.forward += len(first)


@contextmanager
def counted_rows(*unets: nn.Module) -> Generator[UNetRows]:
    """Counts what goes through some UNets in a `with` block; `forward` is without gradient, `backward` with."""
    rows = UNetRows()
    handles = [unet.register_forward_hook(rows._count) for unet in {id(one): one for one in unets}.values()]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()
