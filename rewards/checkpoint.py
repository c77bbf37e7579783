"""Checkpoints as tensors by name: nothing else is unpickled, and a network takes every one of them or none."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a state dict without unpickling anything but tensors; one under the key `model` is taken from there.

    Args:
        path: A `.safetensors` file, or a file of `torch.save`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"a checkpoint must map names to tensors, and {path} does not")
    return state


def frozen_with(network: Network, state: Mapping[str, Tensor]) -> Network:
    """Gives the network its weights, every one of which must be there and fit, and freezes it.

    Raises:
        ValueError: Some are missing, unknown or of another shape; the first four are named.
    """
    expected = network.state_dict()
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is unknown" for name in state if name not in expected]
    problems += [
        f"{name} has shape {list(state[name].shape)} and not {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        raise ValueError(f"weights must fit the config, got {len(problems)} that do not: {'; '.join(problems[:4])}")
    network.load_state_dict(dict(state))
    return network.requires_grad_(False).eval()
