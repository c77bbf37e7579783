"""Nested Python values as JSON plus named tensors: what checkpoints hold instead of pickles.

Optimizers, generators and constraints describe their state as dicts, lists, tuples, numbers, strings, tensors
and numpy arrays. `pack` takes such a value apart and `unpack` puts the same one together again, with the types
of its keys and the difference between list and tuple. JSON keeps every Python float exactly.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def pack(value: Any, name: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Takes a nested value apart.

    Args:
        value: What is taken apart.
        name: Where it belongs; tensors are named by their path below it.

    Returns:
        A value that JSON can hold, and the tensors it refers to, each a copy on the CPU.

    Raises:
        TypeError: Something in it is neither a container, a number, a string nor a tensor.
    """
    tensors: dict[str, Tensor] = {}
    return _pack(value, name, tensors), tensors


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Puts together what `pack` took apart."""
    if isinstance(packed, list):
        return [unpack(item, tensors) for item in packed]
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    match kind:
        case "dict":
            return {key: unpack(item, tensors) for key, item in content}
        case "tuple":
            return tuple(unpack(item, tensors) for item in content)
        case "tensor":
            return tensors[content]
        case "array":
            return tensors[content].numpy()
    raise ValueError(f"kind must be dict, tuple, tensor or array, got {kind!r}")


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Takes one value apart and adds its tensors to those already found."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor):
        # A copy, because safetensors takes no two tensors that share memory.
        tensors[path] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": path}
    if isinstance(value, np.ndarray):
        tensors[path] = torch.from_numpy(value.copy())
        return {"array": path}
    if isinstance(value, list):
        return [_pack(item, _below(path, index), tensors) for index, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"tuple": [_pack(item, _below(path, index), tensors) for index, item in enumerate(value)]}
    if isinstance(value, dict) and all(isinstance(key, str | int) for key in value):
        return {"dict": [[key, _pack(item, _below(path, key), tensors)] for key, item in value.items()]}
    rule = "be made of dicts, lists, tuples, numbers, strings and tensors"
    raise TypeError(f"{path or 'value'} must {rule}, got {value!r}")


def _below(path: str, key: str | int) -> str:
    """Returns the path of an item."""
    return f"{path}/{key}" if path else str(key)
