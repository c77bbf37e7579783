"""What drawing, training and attacking cost: the samples that go through a denoising network."""

from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from .families import FAMILIES

NETWORKS = frozenset(family.classes[family.network] for family in FAMILIES)
"""Names of the classes of all families' denoising networks, UNets and transformers."""


class UNetRows:
    """Counts samples that go through denoising networks of any family, each branch of guidance for itself."""

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
        if not _denoises(type(module)):
            return
        first = output[0] if isinstance(output, tuple) else output.sample
        if torch.is_grad_enabled() and first.requires_grad:
            self.backward += len(first)
        else:
            self.forward += len(first)


@contextmanager
def counted_rows() -> Generator[UNetRows]:
    """Counts what goes through any denoising network in a `with` block, whoever made it: copies may be trained."""
    rows = UNetRows()
    handle = register_module_forward_hook(rows._count)
    try:
        yield rows
    finally:
        handle.remove()


@cache
def _denoises(kind: type[nn.Module]) -> bool:
    """Tells whether a class is that of a denoising network, or made of one as a sharded network's is, by its name."""
    return any(base.__name__ in NETWORKS for base in kind.__mro__)
