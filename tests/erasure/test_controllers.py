"""The rivals of the dual weight: one that never moves, and a switch."""

import json
import math

import pytest

from erasure import FixedWeight, Lagrangian, Switch, WeightController


@pytest.mark.parametrize("controller", [FixedWeight(), Lagrangian(), Switch()], ids=["fixed", "lagrangian", "switch"])
def test_every_controller_has_the_same_protocol(controller: WeightController) -> None:
    assert isinstance(controller, WeightController)
    assert (controller.weight, controller.other_weight) in ((1.0, 1.0), (1.0, 0.0))
    assert controller.description()["controller"] == type(controller).__name__
    with pytest.raises(ValueError, match="violation must be a finite number, got nan"):
        controller.update(math.nan)
    before = controller.state_dict()
    with pytest.raises(ValueError, match="state must have"):
        controller.load_state_dict({"another": 1.0})
    assert controller.state_dict() == before


def test_fixed_weight_never_moves() -> None:
    fixed = FixedWeight(3.0)
    fixed.update(100.0)
    assert (fixed.weight, fixed.other_weight) == (3.0, 1.0)
    fixed.load_state_dict(fixed.state_dict())
    assert fixed.weight == 3.0


def test_switch_erases_until_half_the_ceiling_and_retains_until_the_ceiling_is_exceeded() -> None:
    switch, phases = Switch(), []
    # Means of the last four, from the fourth on: 0.25, -0.25, -0.5 (retain), -0.5, 0.0 (not above), 0.25 (erase).
    for violation in (2.0, 0.0, 0.0, -1.0, 0.0, -1.0, 0.0, -1.0, 2.0, 0.0):
        switch.update(violation)
        phases.append((switch.weight, switch.other_weight))
    erase, retain = (1.0, 0.0), (0.0, 1.0)
    assert phases == [erase] * 5 + [retain] * 4 + [erase]
    assert switch.switches == 2


def test_switch_does_not_trust_its_first_rounds() -> None:
    switch = Switch()
    for _ in range(3):
        switch.update(-1.0)
        assert switch.weight == 1.0
    switch.update(-1.0)
    assert switch.weight == 0.0


@pytest.mark.parametrize("seen", [0, 2, 5])
def test_restored_switch_goes_on_as_if_never_stopped(seen: int) -> None:
    switch, restored = Switch(), Switch()
    violations = [-1.0, -1.0, 0.5, -1.0, -1.0, 2.0, 2.0, -1.0]
    for violation in violations[:seen]:
        switch.update(violation)
    restored.load_state_dict(json.loads(json.dumps(switch.state_dict())))
    for violation in violations[seen:]:
        switch.update(violation)
        restored.update(violation)
        assert restored.weight == switch.weight
    assert restored.state_dict() == switch.state_dict()


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_impossible_weight_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=r"FixedWeight\.weight must be (at least 0|a finite number), got"):
        FixedWeight(weight)


def test_impossible_switch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Switch\.rounds must be at least 1, got 0"):
        Switch(0)
    with pytest.raises(ValueError, match=r"Switch\.low must be at most high=-1\.0, got -0\.5"):
        Switch(high=-1.0)
