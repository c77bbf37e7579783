"""The global generators of random numbers: their seeds and their states."""

import random
from typing import Any

import numpy as np
import torch


def seed_global_generators(seed: int) -> None:
    """Seeds the generators of Python, numpy and torch, those of all devices included."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (the libraries a trainer calls may draw from it)
    torch.manual_seed(seed)


def global_random_state(device: torch.device) -> dict[str, Any]:
    """Returns the state of the generators of Python, numpy and torch, and of the device's own one."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 (see above)
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_global_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Takes back what `global_random_state` returned; a run that moves to or from a GPU keeps the others."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002 (see above)
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
