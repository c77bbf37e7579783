from collections.abc import Sequence

import pytest
import torch

from erasure import (
    NUDITY,
    UCE,
    ConceptBatch,
    Edit,
    ImageConstraint,
    ImageCost,
    Lagrangian,
    LagrangianConfig,
    Objective,
    ObjectiveConstraint,
    ReferenceDistance,
    ReferenceDistanceConfig,
    ScoreCeiling,
)
from overpaint.policy import DiffusionPolicy, Guidance
from overpaint.policy.types import Images, PerSample


class Redness:
    """A detector of red."""

    differentiable = True

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        return images[:, 0].mean(dim=(1, 2))


class Constant:
    """An objective with a loss of 0.5 that remembers what it was prepared for."""

    def __init__(self) -> None:
        self.prepared: list[object] = []

    def prepare(self, policy: DiffusionPolicy, concept: object) -> None:
        self.prepared.append(concept)

    def parameters(self, policy: DiffusionPolicy) -> list[torch.nn.Parameter]:
        return policy.trainable_parameters()

    def loss(self, policy: DiffusionPolicy, batch: ConceptBatch) -> PerSample:
        return torch.full((len(batch.seeds),), 0.5)


def test_score_ceiling_is_the_excess_over_the_ceiling() -> None:
    images = torch.tensor([0.0, 0.25, 1.0]).reshape(3, 1, 1, 1).expand(3, 3, 2, 2)
    costs = ScoreCeiling(Redness(), 0.25)(images, ["a", "b", "c"])
    torch.testing.assert_close(costs, torch.tensor([-0.25, 0.0, 0.75]), rtol=1e-6, atol=0)


def test_gradient_of_a_score_ceiling_reaches_the_images() -> None:
    images = torch.full((2, 3, 4, 4), 0.5, requires_grad=True)
    ScoreCeiling(Redness())(images, ["a", "b"]).sum().backward()
    assert images.grad is not None
    torch.testing.assert_close(images.grad[:, 0], torch.full((2, 4, 4), 1 / 16), rtol=1e-6, atol=0)


def test_ceiling_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ScoreCeiling\.ceiling must be finite, got nan"):
        ScoreCeiling(Redness(), float("nan"))


@pytest.mark.parametrize("prompts", [[], "naked", [1]])
def test_constraint_without_usable_prompts_is_refused(prompts: Sequence[str]) -> None:
    with pytest.raises((ValueError, TypeError), match="prompts"):
        ImageConstraint(ScoreCeiling(Redness()), prompts)


def test_each_constraint_has_a_weight_of_its_own_by_default() -> None:
    first, second = (ImageConstraint(ScoreCeiling(Redness()), ["naked"]) for _ in range(2))
    first.lagrangian.update(1.0)
    assert first.lagrangian.weight > second.lagrangian.weight


def test_given_lagrangian_is_the_one_that_is_used() -> None:
    lagrangian = Lagrangian(LagrangianConfig(initial_weight=7.0))
    assert ImageConstraint(ScoreCeiling(Redness()), ["naked"], lagrangian).lagrangian is lagrangian
    assert ObjectiveConstraint(Constant(), NUDITY, None, lagrangian).lagrangian is lagrangian


def test_objective_constraint_prepares_its_objective_for_its_concept(policy: DiffusionPolicy) -> None:
    objective = Constant()
    ObjectiveConstraint(objective, NUDITY).prepare(policy)
    assert objective.prepared == [NUDITY]


def test_cost_of_an_objective_is_the_loss_relative_to_the_ceiling(policy: DiffusionPolicy) -> None:
    constraint = ObjectiveConstraint(Constant(), NUDITY, ceiling=0.2)
    costs = constraint.cost(policy, ConceptBatch(["naked", "nude"], [1, 2]))
    torch.testing.assert_close(costs, torch.tensor([1.5, 1.5]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3], ids=["small", "one", "large"])
def test_weight_moves_as_much_whatever_the_scale_of_the_loss(scale: float, policy: DiffusionPolicy) -> None:
    class Scaled(Constant):
        def loss(self, policy: DiffusionPolicy, batch: ConceptBatch) -> PerSample:
            return scale * super().loss(policy, batch)

    batch = ConceptBatch(["naked"], [1])
    for ceiling, updates, factor in ((0.25 * scale, 10, 2.0), (0.05 * scale, 10, 2.0), (50.0 * scale, 5, 0.505)):
        constraint = ObjectiveConstraint(Scaled(), NUDITY, ceiling=ceiling)
        before = constraint.lagrangian.weight
        for _ in range(updates):
            constraint.lagrangian.update(float(constraint.cost(policy, batch).mean()))
        # Twice the ceiling, ten times the ceiling, and a hundredth of it.
        assert constraint.lagrangian.weight == pytest.approx(factor * before, rel=1e-4)


def test_objective_is_evaluated_on_the_concepts_phrases_unless_told_otherwise() -> None:
    assert ObjectiveConstraint(Constant(), NUDITY).prompts == ["nudity"]
    assert ObjectiveConstraint(Constant(), NUDITY, ["a nude person"]).prompts == ["a nude person"]


def test_untrained_policy_meets_the_stay_erased_constraint(policy: DiffusionPolicy) -> None:
    constraint = ObjectiveConstraint(ReferenceDistance(ReferenceDistanceConfig(steps=2)), NUDITY, ceiling=0.01)
    constraint.prepare(policy)
    costs = constraint.cost(policy, ConceptBatch(constraint.prompts * 2, [1, 2]))
    assert torch.equal(costs.detach(), torch.full((2,), -1.0))


@pytest.mark.parametrize("ceiling", [-1.0, 0.0, float("nan")])
def test_impossible_ceiling_of_an_objective_is_refused(ceiling: float) -> None:
    with pytest.raises(ValueError, match=r"ObjectiveConstraint\.ceiling must be finite and above 0"):
        ObjectiveConstraint(Constant(), NUDITY, ceiling=ceiling)


def test_every_part_implements_its_own_protocol() -> None:
    assert isinstance(ReferenceDistance(), Objective)
    assert not isinstance(ReferenceDistance(), Edit | Guidance)
    assert isinstance(UCE(), Edit)
    assert not isinstance(UCE(), Objective | Guidance)
    assert isinstance(ScoreCeiling(Redness()), ImageCost)
