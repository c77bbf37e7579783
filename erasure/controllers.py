"""Weight controllers: how much a constrained term counts, and how that follows the constraint's violation.

The dual variable, `erasure.Lagrangian`, is one. Here are the protocol and its two rivals: a weight that never moves,
and a switch between erasing and retaining.
"""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from overpaint.settings import Count, NonNegative


@runtime_checkable
class WeightController(Protocol):
    """What weighs a constrained term of a loss against the other one.

    The caller averages the relative violation over the batch and all processes, and hands it in once for each update.
    """

    @property
    def weight(self) -> float:
        """What the constrained term is multiplied by."""
        ...

    @property
    def other_weight(self) -> float:
        """What the other term is multiplied by."""
        ...

    def update(self, violation: float) -> None:
        """Answers a violation: above zero the constraint is broken, at or below zero it holds.

        Raises:
            ValueError: The violation is not finite. Nothing is changed.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that an interrupted run needs to go on with the same weights."""
        ...

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Takes over what `state_dict` returned.

        Raises:
            ValueError: It is not the state of such a controller. Nothing is changed.
        """
        ...

    def description(self) -> dict[str, Any]:
        """Returns the kind of controller and its settings, for the record of a run."""
        ...


class FixedWeight:
    """A penalty: a weight that never moves.

    Args:
        weight: What the term is multiplied by; finite, at least 0.
    """

    other_weight: float = 1.0

    def __init__(self, weight: NonNegative = 1.0) -> None:
        self.weight = float(weight)

    def update(self, violation: float) -> None:
        """Changes nothing. Raises a `ValueError` where the violation is not finite."""
        check_violation(violation)

    def state_dict(self) -> dict[str, Any]:
        """Returns nothing, since nothing moves."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Raises a `ValueError` where there is something to take over."""
        check_keys(state, ())

    def description(self) -> dict[str, Any]:
        """Returns the weight."""
        return {"controller": "FixedWeight", "weight": self.weight}


class Switch:
    """Bang-bang control: only the constrained term counts, or only the other one.

    It erases until the mean violation of the last rounds is at or below `low`, then retains until that mean is above
    `high`. Source: the performance-driven switch of FlowErase-RL, https://arxiv.org/abs/2605.19739, whose code and
    thresholds are not published. Here it erases until the concept's rate is at most half its ceiling, and retains until
    it exceeds the ceiling, both over four rounds. It never switches before it has seen as many rounds.

    Args:
        rounds: Updates whose violations are averaged.
        low: Relative violation at or below which erasing ends; -0.5 is half the ceiling.
        high: Relative violation above which it begins again.
    """

    def __init__(self, rounds: Count = 4, *, low: float = -0.5, high: float = 0.0) -> None:
        if low > high:
            raise ValueError(f"Switch.low must be at most high={high}, got {low}")
        self.rounds, self.low, self.high = rounds, float(low), float(high)
        self.erasing = True
        self.switches = 0
        self._violations: deque[float] = deque(maxlen=rounds)

    @property
    def weight(self) -> float:
        """1 while it erases, and 0 while it retains."""
        return float(self.erasing)

    @property
    def other_weight(self) -> float:
        """0 while it erases, and 1 while it retains."""
        return float(not self.erasing)

    def update(self, violation: float) -> None:
        """Notes a violation, and switches where the mean of the last rounds has passed its threshold."""
        check_violation(violation)
        self._violations.append(violation)
        if len(self._violations) < self.rounds:
            return
        mean = math.fsum(self._violations) / self.rounds
        if mean <= self.low if self.erasing else mean > self.high:
            self.erasing = not self.erasing
            self.switches += 1

    def state_dict(self) -> dict[str, Any]:
        """Returns the phase, the violations of the last rounds, and how often it has switched."""
        return {"erasing": self.erasing, "violations": list(self._violations), "switches": self.switches}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Takes over what `state_dict` returned."""
        check_keys(state, ("erasing", "violations", "switches"))
        self.erasing, self.switches = bool(state["erasing"]), int(state["switches"])
        self._violations = deque(state["violations"], maxlen=self.rounds)

    def description(self) -> dict[str, Any]:
        """Returns the thresholds."""
        return {"controller": "Switch", "rounds": self.rounds, "low": self.low, "high": self.high}


def check_violation(violation: float) -> None:
    """Raises a `ValueError` where a violation, which trainers compute, is not finite."""
    if not math.isfinite(violation):
        raise ValueError(f"violation must be finite, got {violation}")


def check_keys(state: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    """Raises a `ValueError` where a state has other keys than these, as that of another controller does."""
    if set(state) != set(keys):
        wanted = f"the keys {', '.join(keys)}" if keys else "no keys"
        raise ValueError(f"state must have {wanted}, as the controller that saved it, got {sorted(state)}")
