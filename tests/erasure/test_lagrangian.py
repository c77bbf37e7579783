import json
import math
import random
from statistics import fmean, pstdev
from typing import Any

import pytest

from erasure import Lagrangian, LagrangianConfig


def raw(**settings: Any) -> LagrangianConfig:
    """Settings under which every violation counts as it is."""
    given: dict[str, Any] = {"smoothing": 0.0, "max_violation": math.inf, "scale_memory": 0.0, **settings}
    return LagrangianConfig(**given)


def linear(**settings: Any) -> LagrangianConfig:
    """Settings of plain dual ascent on the weight itself."""
    return raw(**{"space": "linear", "min_weight": 0.0, "proportional_gain": 0.0} | settings)


PID = linear(learning_rate=0.5, initial_weight=1.0, max_weight=4.0, proportional_gain=2.0, derivative_gain=10.0)


def test_weight_grows_with_the_violation_and_shrinks_without() -> None:
    lagrangian = Lagrangian(linear(learning_rate=0.5, initial_weight=1.0))
    lagrangian.update(0.4)
    assert lagrangian.weight == pytest.approx(1.2, rel=1e-12)
    lagrangian.update(-1.0)
    assert lagrangian.weight == pytest.approx(0.7, rel=1e-12)


@pytest.mark.parametrize(("violation", "bound"), [(1e9, 3.0), (-1e9, 0.0)])
def test_weight_stays_between_zero_and_its_maximum(violation: float, bound: float) -> None:
    lagrangian = Lagrangian(linear(max_weight=3.0))
    lagrangian.update(violation)
    assert lagrangian.weight == bound


def test_violation_counts_up_to_its_bound_and_not_beyond() -> None:
    bounded = linear(proportional_gain=0.5, max_violation=1.0, learning_rate=0.1, derivative_gain=0.25)
    lagrangian = Lagrangian(bounded)
    lagrangian.update(0.5)  # integral 1.05
    lagrangian.update(300.0)  # integral 1.15; the violation counts as 1, its growth as 0.5
    assert lagrangian.weight == pytest.approx(1.15 + 0.5 * 1 + 0.25 * 0.5, rel=1e-12)
    lagrangian.update(-2.0)  # and counts as -1: integral 1.05
    assert lagrangian.weight == pytest.approx(1.05 - 0.5, rel=1e-12)


def test_weight_leaves_its_bound_at_once_when_the_violation_changes_sign() -> None:
    lagrangian = Lagrangian(linear(learning_rate=0.5, initial_weight=0.0))
    lagrangian.update(-100.0)
    lagrangian.update(1.0)
    assert lagrangian.weight == pytest.approx(0.5, rel=1e-12)


def test_gains_add_the_violation_and_its_growth() -> None:
    lagrangian = Lagrangian(PID)
    lagrangian.update(0.2)  # integral 1.1; no growth yet
    assert lagrangian.weight == pytest.approx(1.1 + 2 * 0.2, rel=1e-12)
    lagrangian.update(0.3)  # integral 1.25; growth 0.1
    assert lagrangian.weight == pytest.approx(1.25 + 2 * 0.3 + 10 * 0.1, rel=1e-12)
    lagrangian.update(0.1)  # integral 1.3; a fall counts as no growth
    assert lagrangian.weight == pytest.approx(1.3 + 2 * 0.1, rel=1e-12)


def test_gains_cannot_lead_outside_the_bounds() -> None:
    lagrangian = Lagrangian(PID)
    lagrangian.update(1.5)  # 1.75 + 3
    assert lagrangian.weight == 4.0
    lagrangian.update(-1.5)  # 1.0 - 3
    assert lagrangian.weight == 0.0


def test_proportional_gain_damps_the_oscillation_of_dual_ascent() -> None:
    def overshoot(gain: float) -> float:
        # A policy whose violation falls as fast as the weight is above 1, and rises below it.
        lagrangian = Lagrangian(linear(proportional_gain=gain, learning_rate=0.1, initial_weight=0.0))
        violation, lowest = 1.0, 1.0
        for _ in range(200):
            lagrangian.update(violation)
            violation -= 0.1 * (lagrangian.weight - 1.0)
            lowest = min(lowest, violation)
        return -lowest

    assert overshoot(2.0) < 0.2 * overshoot(0.0)


@pytest.mark.parametrize("updates", [[], [0.2], [0.2, 0.5]])
def test_restored_lagrangian_goes_on_as_if_never_stopped(updates: list[float]) -> None:
    lagrangian, restored = Lagrangian(PID), Lagrangian(PID)
    for violation in updates:
        lagrangian.update(violation)
    restored.load_state_dict(json.loads(json.dumps(lagrangian.state_dict())))
    assert restored.weight == lagrangian.weight
    lagrangian.update(0.6)
    restored.update(0.6)
    assert restored.state_dict() == lagrangian.state_dict()


def test_restoring_an_early_state_forgets_what_came_after() -> None:
    lagrangian = Lagrangian(PID)
    early = lagrangian.state_dict()
    lagrangian.update(0.2)
    lagrangian.load_state_dict(early)
    assert lagrangian.state_dict() == Lagrangian(PID).state_dict()


@pytest.mark.parametrize("violation", [math.nan, math.inf])
@pytest.mark.parametrize("caller", ["ddpo.trainer", "a_program"])
def test_violation_that_is_not_finite_is_refused_and_changes_nothing(violation: float, caller: str) -> None:
    lagrangian = Lagrangian(PID)
    with pytest.raises(ValueError, match=r"violation must be .*finite.*, got"):
        exec("update(violation)", {"__name__": caller, "update": lagrangian.update, "violation": violation})
    assert lagrangian.state_dict() == Lagrangian(PID).state_dict()


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"weight": 1.0},
        {"weight": 1.0, "integral": 1.0, "violation": 0.0, "more": 1.0},
        {"weight": 1.0, "integral": math.nan, "violation": 0.0},
    ],
)
def test_damaged_state_is_refused(state: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="state"):
        Lagrangian().load_state_dict(state)


@pytest.mark.parametrize(
    "field", ["learning_rate", "initial_weight", "min_weight", "max_weight", "proportional_gain", "derivative_gain"]
)
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_impossible_gain_is_refused(field: str, value: float) -> None:
    settings: dict[str, Any] = {field: value}
    with pytest.raises(ValueError, match=rf"LagrangianConfig\.{field} must be (at least 0|a finite number), got"):
        LagrangianConfig(**settings)


@pytest.mark.parametrize("value", [-1.0, 0.0, math.nan])
def test_impossible_bound_of_the_violation_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"LagrangianConfig\.max_violation must be above 0, got"):
        LagrangianConfig(max_violation=value)


def test_initial_weight_outside_its_bounds_is_refused() -> None:
    with pytest.raises(ValueError, match=r"initial_weight must be between min_weight=0\.01 and max_weight=1\.0"):
        LagrangianConfig(initial_weight=2.0, max_weight=1.0)


def test_weight_of_zero_is_refused_in_the_logarithm() -> None:
    with pytest.raises(ValueError, match=r"min_weight must be above 0 in the space 'log', got 0"):
        LagrangianConfig(min_weight=0.0)
    assert Lagrangian(LagrangianConfig(space="linear", min_weight=0.0, initial_weight=0.0)).weight == 0.0


def test_in_the_logarithm_every_gain_multiplies() -> None:
    lagrangian = Lagrangian(raw(learning_rate=0.5, initial_weight=2.0, proportional_gain=2.0, derivative_gain=10.0))
    assert lagrangian.weight == 2.0
    lagrangian.update(0.2)
    assert lagrangian.weight == pytest.approx(2 * math.exp(0.5 * 0.2 + 2 * 0.2), rel=1e-12)
    lagrangian.update(0.3)
    assert lagrangian.weight == pytest.approx(2 * math.exp(0.5 * 0.5 + 2 * 0.3 + 10 * 0.1), rel=1e-12)
    lagrangian.update(-0.5)
    assert lagrangian.weight == pytest.approx(2.0 * math.exp(-2 * 0.5), rel=1e-12)


@pytest.mark.parametrize(("violation", "bound"), [(1.0, 1e3), (-1.0, 1e-2)])
def test_weight_leaves_its_bound_in_the_logarithm_at_once(violation: float, bound: float) -> None:
    lagrangian = Lagrangian(LagrangianConfig(smoothing=0.0, proportional_gain=0.0))
    for _ in range(200):
        lagrangian.update(violation)
    assert lagrangian.weight == pytest.approx(bound, rel=1e-12)
    lagrangian.update(-violation)
    assert lagrangian.weight == pytest.approx(bound * math.exp(-0.1 * violation), rel=1e-12)


def test_gains_see_the_running_mean_of_the_violations() -> None:
    lagrangian = Lagrangian(linear(smoothing=0.75, learning_rate=1.0))
    lagrangian.update(0.4)  # the first is its own mean
    assert lagrangian.weight == pytest.approx(1.4, rel=1e-12)
    lagrangian.update(-0.4)  # 0.75 * 0.4 - 0.25 * 0.4 = 0.2
    assert lagrangian.weight == pytest.approx(1.6, rel=1e-12)


def test_large_violations_count_in_units_of_their_root_mean_square() -> None:
    lagrangian = Lagrangian(raw(learning_rate=1.0, proportional_gain=0.0, scale_memory=0.5, initial_weight=1.0))
    lagrangian.update(8.0)  # squares 64: counts as 1
    assert lagrangian.weight == pytest.approx(math.e, rel=1e-12)
    lagrangian.update(-2.0)  # squares (64 + 4) / 2
    assert lagrangian.weight == pytest.approx(math.exp(1 - 2 / math.sqrt(34)), rel=1e-12)
    small = Lagrangian(raw(learning_rate=1.0, proportional_gain=0.0, scale_memory=0.5))
    small.update(0.5)  # below 1 nothing is divided
    assert small.weight == pytest.approx(math.exp(0.5), rel=1e-12)


def scarce(updates: int, seed: int) -> tuple[list[float], list[float]]:
    """Returns the mean violations and the logarithms of the weight where each of eight pictures shows the concept
    rarely and then much: with a probability that falls with the weight, five updates late, at 35 times the ceiling."""
    chance, lagrangian, generator = 0.2, Lagrangian(), random.Random(seed)
    violations, logarithms = [], []
    for _ in range(updates):
        lagrangian.update(35 * sum(generator.random() < chance for _ in range(8)) / 8 - 1)
        chance += (min(1.0, 0.05 / lagrangian.weight) - chance) / 5
        violations.append(35 * chance - 1)
        logarithms.append(math.log(lagrangian.weight))
    return violations, logarithms


def test_scarce_hits_of_a_detector_settle_at_the_ceiling_with_the_usual_gains() -> None:
    # Cut off at the ceiling's double in place of divided, they would settle a third above it.
    runs = [scarce(600, seed) for seed in range(16)]
    assert abs(fmean(fmean(violations[100:]) for violations, _ in runs)) < 0.1
    assert fmean(pstdev(logarithms[100:]) for _, logarithms in runs) < 0.6
