"""Fixtures of the policy's own tests."""

from collections.abc import Callable

import pytest
import torch

from overpaint.policy import DiffusionPolicy


@pytest.fixture
def stir() -> Callable[[DiffusionPolicy], None]:
    """Moves every trained weight, as an update would, by numbers that are the same each time."""

    @torch.no_grad()
    def move(policy: DiffusionPolicy) -> None:
        generator = torch.Generator().manual_seed(1)
        for parameter in policy.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)

    return move
