"""The exponential moving average of trained weights."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """A slow copy of the weights: average = decay * average + (1 - decay) * weights, once in each update.

    It starts at the weights of the start, so that there is no bias to correct, and is kept in float32 or wider.

    Args:
        parameters: What is averaged. They are read, and only changed inside `swapped`.
        decay: Part of the old average that stays, between 0 and 1.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.decay = decay
        self._parameters = list(parameters)
        self.averages: list[Tensor] = [_wide(parameter).clone() for parameter in self._parameters]

    def update(self) -> None:
        """Moves the averages towards the weights."""
        for average, parameter in zip(self.averages, self._parameters, strict=True):
            average.lerp_(_wide(parameter), 1 - self.decay)

    @contextmanager
    def swapped(self) -> Generator[None, None, None]:
        """Puts the averages in place of the weights for as long as the block lasts."""
        weights = [parameter.detach().clone() for parameter in self._parameters]
        self._write(self.averages)
        try:
            yield
        finally:
            self._write(weights)

    def state_dict(self) -> dict[str, list[Tensor]]:
        """Returns the averages, in the order of the parameters."""
        return {"averages": self.averages}

    def load_state_dict(self, state: dict[str, list[Tensor]], /) -> None:
        """Takes back what `state_dict` returned."""
        for average, saved in zip(self.averages, state["averages"], strict=True):
            average.copy_(saved)

    @torch.no_grad()
    def _write(self, values: Sequence[Tensor]) -> None:
        """Copies the values into the parameters."""
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)
        torch.clear_autocast_cache()


def _wide(parameter: nn.Parameter) -> Tensor:
    """Returns a parameter's value in float32 or wider, without a copy where it is that already."""
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
