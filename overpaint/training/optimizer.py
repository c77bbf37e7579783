"""The optimizers a run may use."""

from collections.abc import Sequence

import torch
from torch import nn

from .config import TrainingConfig


def make_optimizer(parameters: Sequence[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """Returns the optimizer that the settings name, over the given parameters.

    Raises:
        ValueError: There is nothing to train, or bitsandbytes does not work here.
    """
    if not parameters:
        raise ValueError("parameters must not be empty: load the policy with lora= or train=, got nothing trainable")
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters,
            lr=config.learning_rate,
            betas=config.adam_betas,
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )
    optimizer = _adamw8bit(parameters, config)
    _try_one_step(parameters[0].device, config)
    return optimizer


def _adamw8bit(parameters: Sequence[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """Returns bitsandbytes' AdamW8bit; tensors below 4096 elements keep 32-bit moments, as is its default."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except (ImportError, OSError, RuntimeError) as error:
        raise ValueError(f"{UNUSABLE}: bitsandbytes does not load ({error})") from error
    return AdamW8bit(
        parameters,
        lr=config.learning_rate,
        betas=config.adam_betas,
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )


def _try_one_step(device: torch.device, config: TrainingConfig) -> None:
    """Takes one step on a parameter of no importance, so that a missing kernel is found before any work."""
    parameter = nn.Parameter(torch.ones(4096, device=device))
    parameter.grad = torch.ones_like(parameter)
    try:
        _adamw8bit([parameter], config).step()
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        raise ValueError(f"{UNUSABLE}: bitsandbytes has no 8-bit step on {device} ({error})") from error


UNUSABLE = "optimizer must be one that works here, got 'adamw8bit'"
