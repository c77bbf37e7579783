"""Dual ascent: the weight of a constraint grows while it is violated and shrinks once it holds.

Maximising E[reward] subject to violation <= 0 becomes maximising E[reward] - weight * violation, for the weight at
which the constraint just holds. Source of the dual step: reward-constrained policy optimization, Tessler et al. (2018),
https://arxiv.org/abs/1805.11074. Source of the damping terms: Stooke et al. (2020), https://arxiv.org/abs/2007.03964.
"""

import math

from overpaint.settings import AnyFloat, Field, settings


@settings
class LagrangianConfig:
    """How the weight of a constraint follows its violation.

    With both gains at zero this is plain dual ascent, whose weight oscillates around the right value: it keeps growing
    until the violation is gone, and by then is too large. The proportional gain answers the violation at once, the
    derivative gain answers its growth.
    """

    learning_rate: float = Field(0.1, ge=0)
    """Integral gain: growth of the weight per unit of violation and update."""

    initial_weight: float = Field(1.0, ge=0)
    """Weight before the first update, in units of reward per unit of violation."""

    max_weight: float = Field(100.0, ge=0)
    """Largest weight; keeps a constraint that cannot be met from drowning the reward."""

    proportional_gain: float = Field(0.0, ge=0)
    """Weight added per unit of present violation (Stooke et al. 2020, K_P). Zero: off."""

    derivative_gain: float = Field(0.0, ge=0)
    """Weight added per unit by which the violation grew since the last update (K_D). Zero: off."""

    max_violation: AnyFloat = Field(math.inf, gt=0)
    """Violations above this count as this. Costs often have a lower bound and no upper one: without a bound, a few
    updates of a gross violation wind up more weight than hundreds of good ones take back."""

    def __post_init__(self) -> None:
        """Checks that the weight starts within its bound."""
        if self.initial_weight > self.max_weight:
            raise ValueError(
                f"initial_weight must be at most max_weight, got {self.initial_weight} above {self.max_weight}"
            )


class Lagrangian:
    """The weight of one constraint, moved by dual ascent.

    The caller averages the violation over the batch and all processes, and hands it in once for each policy update.
    """

    def __init__(self, config: LagrangianConfig | None = None) -> None:
        self.config = config or LagrangianConfig()
        self._integral = self._weight = float(self.config.initial_weight)
        self._previous = math.nan  # no violation seen yet

    @property
    def weight(self) -> float:
        """What the constraint is multiplied by, in [0, max_weight]."""
        return self._weight

    def update(self, violation: float) -> None:
        """Takes one dual step: up while the violation is above zero, down below it.

        The derivative counts growth only, as in Algorithm 2 of Stooke et al. Departures from it: the integral holds the
        weight itself (the gain multiplied in, and the initial weight), it is clipped from above as well, the violation
        may be (`max_violation`), and the first update has no derivative, where theirs compares with a cost of zero.

        Raises:
            ValueError: The violation is not finite. The weight is unchanged.
        """
        if not math.isfinite(violation):
            raise ValueError(f"violation must be finite, got {violation}")
        violation = min(violation, self.config.max_violation)
        growth = 0.0 if math.isnan(self._previous) else max(violation - self._previous, 0.0)
        self._integral = self._clip(self._integral + self.config.learning_rate * violation)
        self._weight = self._clip(
            self._integral + self.config.proportional_gain * violation + self.config.derivative_gain * growth
        )
        self._previous = violation

    def state_dict(self) -> dict[str, float]:
        """Returns everything that an interrupted run needs to go on with the same weights.

        The previous violation is left out before the first update, so that every value is a finite number.
        """
        state = {"integral": self._integral, "weight": self._weight}
        return state if math.isnan(self._previous) else state | {"previous": self._previous}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Takes over what `state_dict` returned.

        Raises:
            ValueError: A key is missing or unknown, or a value is not finite. Nothing is changed.
        """
        if set(state) - {"previous"} != {"integral", "weight"}:
            raise ValueError(f"state must have the keys integral, weight and perhaps previous, got {sorted(state)}")
        if bad := [key for key, value in state.items() if not math.isfinite(value)]:
            raise ValueError(f"state[{bad[0]!r}] must be finite, got {state[bad[0]]}")
        self._integral = float(state["integral"])
        self._weight = float(state["weight"])
        self._previous = float(state.get("previous", math.nan))

    def _clip(self, weight: float) -> float:
        return min(max(weight, 0.0), self.config.max_weight)
