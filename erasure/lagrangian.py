"""The dual variable: the weight of a constraint grows while it is violated and shrinks once it holds.

Maximising E[reward] subject to violation <= 0 becomes maximising E[reward] - weight * violation, for the weight at
which the constraint just holds. Sources: the dual step, reward-constrained policy optimization, Tessler et al. (2018),
https://arxiv.org/abs/1805.11074; the damping, PID Lagrangian methods, Stooke et al. (2020),
https://arxiv.org/abs/2007.03964; the step in the logarithm, exponentiated gradient, Kivinen and Warmuth (1997),
https://doi.org/10.1006/inco.1996.2612.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

from overpaint.settings import AnyFloat, Field, settings

from .controllers import check_keys, check_violation


@settings
class LagrangianConfig:
    """How the weight of a constraint follows its relative violation: 0 at the bound, and 1 at twice the ceiling.

    The gains act on the logarithm of the weight: nobody knows beforehand whether a constraint's weight will be 0.01 or
    100, and steps of so many per cent take as many updates from far above as from far below. With the last two gains at
    zero this is plain dual ascent, whose weight keeps growing until the violation is gone, is too large by then, and
    oscillates. The proportional gain answers the violation at once, the derivative gain answers its growth.
    """

    space: Literal["log", "linear"] = "log"
    """What the gains act on: the logarithm of the weight, or the weight itself, as in the papers of dual ascent."""

    learning_rate: float = Field(0.1, ge=0)
    """Integral gain: what is added per unit of violation and update. In the logarithm 0.1 multiplies the weight by e
    in 10 updates of twice the ceiling or more, and divides it by e in 10 updates without any cost."""

    initial_weight: float = Field(1.0, ge=0)
    """Weight before the first update, in units of the other term per unit of relative violation."""

    min_weight: float = Field(1e-2, ge=0)
    """Smallest weight; above 0 in the logarithm. From here a constraint that has long held is soon answered, should
    it be broken again."""

    max_weight: float = Field(1e3, ge=0)
    """Largest weight; keeps a constraint that cannot be met from drowning the other term."""

    proportional_gain: float = Field(1.0, ge=0)
    """What the present violation adds for this update alone (Stooke et al. 2020, K_P). Zero: off."""

    derivative_gain: float = Field(0.0, ge=0)
    """What the growth of the violation since the last update adds for this update alone (K_D). Zero: off."""

    smoothing: float = Field(0.7, ge=0, lt=1)
    """Decay of the running mean of violations that the gains see: batches are small, and their violations noisy. Zero:
    each batch for itself."""

    scale_memory: float = Field(0.99, ge=0, lt=1)
    """Decay of the running mean of squares, by whose root the running mean is divided where it is above 1. Costs often
    have a lower bound and no upper one, and few pictures of a batch show the concept, but those much: divided, gross
    violations do not wind up the weight, and unlike cut off, they count for as much as all the good ones between them.
    Zero: off."""

    max_violation: AnyFloat = Field(20.0, gt=0)
    """Violations farther from 0 count as this far: no single one fills the memory for long."""

    def __post_init__(self) -> None:
        """Checks that the weight starts within its bounds."""
        if self.space == "log" and self.min_weight == 0:
            raise ValueError("min_weight must be above 0 in the space 'log', got 0")
        if not self.min_weight <= self.initial_weight <= self.max_weight:
            raise ValueError(
                f"initial_weight must be between min_weight={self.min_weight} and max_weight={self.max_weight}, "
                f"got {self.initial_weight}"
            )


class Lagrangian:
    """The weight of one constraint, moved by plain or PID-controlled dual ascent; a `WeightController`.

    The caller averages the violation over the batch and all processes, and hands it in once for each policy update.
    """

    other_weight: float = 1.0

    def __init__(self, config: LagrangianConfig | None = None) -> None:
        self.config = config or LagrangianConfig()
        self._weight = float(self.config.initial_weight)
        self._integral = self._to_space(self._weight)
        self._violation = math.nan  # running mean; none seen yet
        self._square = 0.0  # running mean of squares

    @property
    def weight(self) -> float:
        """What the constraint is multiplied by, in [min_weight, max_weight]."""
        return self._weight

    def update(self, violation: float) -> None:
        """Takes one dual step: up while the violation is above zero, down below it.

        The derivative counts growth only, as in Algorithm 2 of Stooke et al. Departures from it: the step is in the
        logarithm by default; the integral holds the weight itself (the gain multiplied in, and the initial weight); it
        is clipped from above as well, and so is the violation (`max_violation`); one running mean serves all three
        gains, in units of the violations' root mean square where these are large (`scale_memory`), as Adam has it
        (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980); and the first update has no derivative, where theirs
        compares with a cost of zero.

        Raises:
            ValueError: The violation is not finite. The weight is unchanged.
        """
        check_violation(violation)
        cfg, first, before = self.config, math.isnan(self._violation), self._seen
        violation = min(max(violation, -cfg.max_violation), cfg.max_violation)
        if first:
            self._violation, self._square = violation, violation**2
        else:
            self._violation += (1 - cfg.smoothing) * (violation - self._violation)
            self._square += (1 - cfg.scale_memory) * (violation**2 - self._square)
        growth = 0.0 if first else max(self._seen - before, 0.0)
        self._integral = self._clipped(self._integral + cfg.learning_rate * self._seen)
        answer = self._clipped(self._integral + cfg.proportional_gain * self._seen + cfg.derivative_gain * growth)
        self._weight = math.exp(answer) if cfg.space == "log" else answer

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that an interrupted run needs to go on with the same weights.

        The running mean of the violation is None before the first update, so that every number is finite.
        """
        violation = None if math.isnan(self._violation) else self._violation
        return {"integral": self._integral, "weight": self._weight, "violation": violation, "square": self._square}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Takes over what `state_dict` returned.

        Raises:
            ValueError: A key is missing or unknown, or a value is not finite. Nothing is changed.
        """
        check_keys(state, ("integral", "weight", "violation", "square"))
        if bad := [key for key, value in state.items() if value is not None and not math.isfinite(value)]:
            raise ValueError(f"state[{bad[0]!r}] must be finite, got {state[bad[0]]}")
        self._integral, self._weight = float(state["integral"]), float(state["weight"])
        self._violation = math.nan if state["violation"] is None else float(state["violation"])
        self._square = float(state["square"])

    def description(self) -> dict[str, Any]:
        """Returns the settings."""
        return {"controller": "Lagrangian", **asdict(self.config)}

    @property
    def _seen(self) -> float:
        """The violation as the gains see it."""
        return self._violation / max(1.0, math.sqrt(self._square)) if self.config.scale_memory else self._violation

    def _to_space(self, weight: float) -> float:
        return math.log(weight) if self.config.space == "log" else weight

    def _clipped(self, value: float) -> float:
        return min(max(value, self._to_space(self.config.min_weight)), self._to_space(self.config.max_weight))
