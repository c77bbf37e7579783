"""log Z, the one number of trajectory balance that is learned beside the network."""

import copy
import math
from typing import Any

import torch


class LogPartition:
    """The logarithm of the partition function, moved by an AdamW of its own.

    Args:
        start: Its first value.
        learning_rate: Of every step.
        weight_decay: Towards zero.
    """

    def __init__(self, start: float, learning_rate: float, weight_decay: float) -> None:
        self._parameter = torch.nn.Parameter(torch.tensor(float(start), dtype=torch.float64))
        self._optimizer = torch.optim.AdamW([self._parameter], lr=learning_rate, weight_decay=weight_decay)

    @property
    def value(self) -> float:
        """The present value."""
        return float(self._parameter.detach())

    def step(self, gradient: float) -> None:
        """Takes a step against the loss's derivative, clipped to 1; none where it is not finite."""
        if not math.isfinite(gradient):
            return
        self._parameter.grad = torch.full_like(self._parameter, min(max(gradient, -1.0), 1.0))
        self._optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Returns the value and the optimizer's state."""
        return {"value": self.value, "optimizer": copy.deepcopy(self._optimizer.state_dict())}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Takes over what `state_dict` returned."""
        with torch.no_grad():
            self._parameter.fill_(state["value"])
        self._optimizer.load_state_dict(state["optimizer"])
