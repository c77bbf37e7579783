"""The constrained form of methods that have a strength: the strongest setting that keeps the reward above a floor.

Bisection on common random numbers: the rewards of every setting belong to the same prompts and seeds, so that two
settings differ by what they do and not by the luck of the draw.
"""

import inspect
import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from overpaint.policy import DiffusionPolicy
from overpaint.policy.types import PerSample
from overpaint.settings import NonNegative, Positive

from .concept import Concept
from .erased import Erasure

NOISE = 2.0
"""Standard errors of a paired difference up to which it is taken for chance."""


class Trial(NamedTuple):
    """One setting that was tried."""

    strength: float
    """The setting."""

    reward: float
    """Its mean reward."""

    change: float
    """Mean paired difference of its reward to that of the weakest setting."""

    standard_error: float
    """Standard error of that difference; 0 where there is one sample only."""


class StrengthSearch(NamedTuple):
    """What a search found."""

    floor: float
    """Lowest mean reward that was good enough."""

    best: Trial
    """The strongest setting that was seen to keep the floor."""

    trials: tuple[Trial, ...]
    """Everything that was tried, from weak to strong."""

    monotone: bool
    """Whether rewards fell with strength wherever they differed by more than chance. If not, the best setting still
    keeps the floor, but a stronger one that was not tried might as well."""


@runtime_checkable
class AdjustableMethod(Protocol):
    """An erasure method with a strength: 0 changes nothing, and more erases more."""

    def erase(self, policy: DiffusionPolicy, concept: Concept, strength: float) -> Erasure:
        """Computes the erasure of a concept, without changing the policy."""
        ...


def strongest_setting(
    rewards_at: Callable[[float], PerSample],
    *,
    floor: float | None = None,
    slack: NonNegative = 0.0,
    weakest: float = 0.0,
    strongest: float = 1.0,
    tolerance: Positive = 0.05,
) -> StrengthSearch:
    """Finds the largest strength whose mean reward is at least the floor.

    Args:
        rewards_at: Rewards at a strength, of the same prompts and seeds in the same order each time.
        floor: Lowest mean reward that is good enough; None is that of the weakest setting less the slack.
        slack: How much reward may be given up, at least 0; only without a `floor`.
        weakest: Smallest strength, such as 0, which is the original model; it has to keep the floor.
        strongest: Largest strength.
        tolerance: The search ends when the best setting is this close to one that misses the floor.

    Raises:
        ValueError: The bounds are out of order, even the weakest setting misses the floor, or rewards are not
            finite or not of the same samples.
    """
    _check(floor, slack, weakest, strongest)
    rewards: dict[float, PerSample] = {}

    def mean_at(strength: float) -> float:
        found = rewards_at(strength)
        if not len(found) or not torch.isfinite(found).all():
            raise ValueError(f"rewards at strength {strength} must be finite and at least one, got {found.tolist()}")
        if len(found) != (count := len(rewards.get(weakest, found))):
            raise ValueError(f"rewards at strength {strength} must be of the same {count} samples, got {len(found)}")
        rewards[strength] = found.detach().cpu().double()
        return rewards[strength].mean().item()

    reward = mean_at(weakest)
    floor = reward - slack if floor is None else floor
    if reward < floor:
        raise ValueError(
            f"floor must be at most the mean reward of the weakest setting, {reward:.6g} at strength {weakest}, "
            f"got {floor:.6g}"
        )
    low, high = (strongest if mean_at(strongest) >= floor else weakest), strongest
    while high - low > tolerance:
        middle = (low + high) / 2
        if mean_at(middle) >= floor:
            low = middle
        else:
            high = middle

    trials = {
        strength: Trial(strength, found.mean().item(), *_paired(found, rewards[weakest]))
        for strength, found in sorted(rewards.items())
    }
    rises = [_paired(rewards[stronger], rewards[weaker]) for weaker, stronger in pairwise(trials)]
    monotone = all(rise <= NOISE * standard_error for rise, standard_error in rises)
    return StrengthSearch(floor, trials[low], tuple(trials.values()), monotone)


def strongest_erasure(
    method: AdjustableMethod,
    policy: DiffusionPolicy,
    concept: Concept,
    rewards_of: Callable[[DiffusionPolicy], PerSample],
    *,
    floor: float | None = None,
    slack: NonNegative = 0.0,
    strongest: float = 1.0,
    tolerance: Positive = 0.05,
) -> tuple[Erasure, StrengthSearch]:
    """Erases a concept as strongly as the floor of the reward allows.

    Args:
        method: The method whose strength is searched, from 0 up.
        policy: Whose model is erased; it is left as it was.
        concept: What is erased.
        rewards_of: Draws with the policy, for fixed prompts and seeds, and returns the rewards.
        floor: As in `strongest_setting`, with the next three; the weakest setting is the original model.
        slack: How much reward may be given up.
        strongest: Largest strength.
        tolerance: How finely the strength is searched.

    Raises:
        ValueError: As `strongest_setting`.
    """

    def rewards_at(strength: float) -> PerSample:
        with method.erase(policy, concept, strength).applied(policy):
            return rewards_of(policy)

    search = strongest_setting(rewards_at, floor=floor, slack=slack, strongest=strongest, tolerance=tolerance)
    return method.erase(policy, concept, search.best.strength), search


def _check(floor: float | None, slack: float, weakest: float, strongest: float) -> None:
    if weakest >= strongest:
        raise ValueError(f"weakest must be below strongest, got {weakest} and {strongest}")
    if slack and floor is not None:
        raise ValueError(f"slack must be 0 with floor={floor}, got {slack}")


def _paired(rewards: PerSample, others: PerSample) -> tuple[float, float]:
    """Returns the mean of the paired differences and its standard error."""
    differences = rewards - others
    count = len(differences)
    standard_error = differences.std().item() / math.sqrt(count) if count > 1 else 0.0
    return differences.mean().item(), standard_error


def has_strength(method: object) -> bool:
    """Tells whether a method has a strength, which `AdjustableMethod` as a type cannot: other methods erase, too."""
    return isinstance(method, AdjustableMethod) and "strength" in inspect.signature(method.erase).parameters
