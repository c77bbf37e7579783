"""The noise levels of a checkpoint's scheduler, for any number of steps, on the device where they are used."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from . import ddim
from .ddim import Schedule


class Schedules:
    """The noise levels that sampling visits, and those of training.

    Args:
        config: The scheduler's configuration.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self._alphas = ddim.cumulative_alphas(config)
        self._plans: dict[tuple[int, torch.device], Schedule] = {}

    def alphas(self, device: torch.device) -> Float[Tensor, " timesteps"]:
        """Returns the cumulative alpha of every timestep of training; they are copied to a device once."""
        if self._alphas.device != device:
            self._alphas = self._alphas.to(device)
        return self._alphas

    def plan(self, steps: int, device: torch.device) -> Schedule:
        """Returns the noise levels of a sampling with that many steps; they are copied to a device once.

        Raises:
            ValueError: `steps` is out of its range.
        """
        if (steps, device) not in self._plans:
            self._plans[steps, device] = Schedule(*(part.to(device) for part in ddim.schedule(self.config, steps)))
        return self._plans[steps, device]

    def stochastic(self, steps: int, eta: float, device: torch.device) -> Schedule:
        """Returns the plan, checked for a density at every step.

        Raises:
            ValueError: `steps` or `eta` is out of its range, or a step would be deterministic.
        """
        check_eta(eta)
        if eta == 0:
            raise ValueError("eta must be above 0 for log-probabilities, as a deterministic step has none, got 0")
        if int(self.plan(steps, torch.device("cpu")).timesteps[-1]) == 0:
            spacing = self.config.get("timestep_spacing")
            raise ValueError(
                f"the last step must start above timestep 0 to have a log-probability, got 0 from steps={steps} and "
                f"the checkpoint's timestep_spacing={spacing!r}"
            )
        return self.plan(steps, device)


def check_eta(eta: float) -> None:
    """Checks the share of the noise of ancestral sampling.

    Raises:
        ValueError: It is not in [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be from 0 to 1, got {eta}")


def check_step(step: int, steps: int) -> None:
    """Checks the index of a step.

    Raises:
        ValueError: There is no such step.
    """
    if not 0 <= step < steps:
        raise ValueError(f"step must be from 0 to {steps - 1}, the last of {steps} steps, got {step}")


def check_span(start: int, until: int | None, steps: int, *, given: bool) -> None:
    """Checks which steps are to be taken: those from `start` on and before `until`, or to the end.

    Raises:
        ValueError: There are no such steps, or `start` is above 0 and the latents before it are not `given`.
    """
    if until is not None and not 0 <= until <= steps:
        raise ValueError(f"until must be from 0 to steps={steps}, got {until}")
    last = steps if until is None else until
    if not 0 <= start <= last:
        raise ValueError(f"start must be from 0 to {last}, where sampling ends, got {start}")
    if start > 0 and not given:
        raise ValueError(f"latents must be given with start={start}, got None")
