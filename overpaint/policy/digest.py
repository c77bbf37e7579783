"""Which tensors they are: their SHA-256, so that what was computed from a model is told from what was not."""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def tensors_hash(tensors: Mapping[str, Tensor], notes: Iterable[str] = ()) -> str:
    """Returns the SHA-256 of tensors, their names, types and shapes included, in whatever order they come.

    Args:
        tensors: By name, in memory.
        notes: What else decides what they do, in this order.
    """
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(memoryview(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()))
    for note in notes:
        digest.update(f"{note}\n".encode())
    return digest.hexdigest()
