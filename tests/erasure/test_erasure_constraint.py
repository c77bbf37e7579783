import math
from collections.abc import Sequence

import pytest
import torch

from erasure import (
    NUDITY,
    UCE,
    ConceptBatch,
    Edit,
    ImageConstraint,
    Lagrangian,
    LagrangianConfig,
    Objective,
    ObjectiveConstraint,
    ReferenceDistance,
    ReferenceDistanceConfig,
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


def test_violation_of_images_is_the_score_relative_to_the_ceiling() -> None:
    images = torch.tensor([0.0, 0.25, 1.0]).reshape(3, 1, 1, 1).expand(3, 3, 2, 2)
    violation = ImageConstraint(Redness(), ["naked"], ceiling=0.25).violation(images, ["a", "b", "c"])
    torch.testing.assert_close(violation, torch.tensor([-1.0, 0.0, 3.0]), rtol=1e-6, atol=0)


def test_gradient_of_a_violation_reaches_the_images() -> None:
    images = torch.full((2, 3, 4, 4), 0.5, requires_grad=True)
    ImageConstraint(Redness(), ["naked"], ceiling=0.5).violation(images, ["a", "b"]).sum().backward()
    assert images.grad is not None
    torch.testing.assert_close(images.grad[:, 0], torch.full((2, 4, 4), 2 / 16), rtol=1e-6, atol=0)


def test_plain_function_is_a_cost() -> None:
    constraint = ImageConstraint(lambda images, prompts: [0.2] * len(prompts), ["naked"])
    assert constraint.violation(torch.zeros(1, 3, 2, 2), ["naked"]).tolist() == pytest.approx([1.0])
    with pytest.raises(TypeError, match=r"ImageConstraint\.cost must be callable with \(images, prompts\)"):
        ImageConstraint(Redness, ["naked"])  # ty: ignore[invalid-argument-type]


@pytest.mark.parametrize("ceiling", [-1.0, 0.0, float("nan"), float("inf")])
def test_impossible_ceiling_is_refused(ceiling: float) -> None:
    with pytest.raises(ValueError, match=r"ImageConstraint\.ceiling must be (above 0|a finite number), got"):
        ImageConstraint(Redness(), ["naked"], ceiling=ceiling)
    with pytest.raises(ValueError, match=r"ObjectiveConstraint\.ceiling must be (above 0|a finite number), got"):
        ObjectiveConstraint(Constant(), NUDITY, ceiling=ceiling)


@pytest.mark.parametrize("prompts", [[], "naked", [1]])
def test_constraint_without_usable_prompts_is_refused(prompts: Sequence[str]) -> None:
    with pytest.raises((ValueError, TypeError), match="prompts"):
        ImageConstraint(Redness(), prompts)


def test_each_constraint_has_a_weight_of_its_own_by_default() -> None:
    first, second = (ImageConstraint(Redness(), ["naked"]) for _ in range(2))
    first.lagrangian.update(1.0)
    assert first.lagrangian.weight > second.lagrangian.weight


def test_given_lagrangian_is_the_one_that_is_used() -> None:
    lagrangian = Lagrangian(LagrangianConfig(initial_weight=7.0))
    assert ImageConstraint(Redness(), ["naked"], lagrangian).lagrangian is lagrangian
    assert ObjectiveConstraint(Constant(), NUDITY, None, lagrangian).lagrangian is lagrangian


def test_objective_constraint_prepares_its_objective_for_its_concept(policy: DiffusionPolicy) -> None:
    objective = Constant()
    ObjectiveConstraint(objective, NUDITY).prepare(policy)
    assert objective.prepared == [NUDITY]


def test_cost_of_an_objective_is_the_loss_relative_to_the_ceiling(policy: DiffusionPolicy) -> None:
    constraint = ObjectiveConstraint(Constant(), NUDITY, ceiling=0.2)
    costs = constraint.violation(policy, ConceptBatch(["naked", "nude"], [1, 2]))
    torch.testing.assert_close(costs, torch.tensor([1.5, 1.5]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3], ids=["small", "one", "large"])
def test_weight_moves_as_much_whatever_the_scale_of_the_loss(scale: float, policy: DiffusionPolicy) -> None:
    class Scaled(Constant):
        def loss(self, policy: DiffusionPolicy, batch: ConceptBatch) -> PerSample:
            return scale * super().loss(policy, batch)

    batch = ConceptBatch(["naked"], [1])
    # A quarter above the ceiling, ten times the ceiling, and a hundredth of it, as the gains see them.
    for ceiling, seen in ((0.4, 0.25), (0.05, 1.0), (50.0, -0.99)):
        constraint = ObjectiveConstraint(Scaled(), NUDITY, ceiling=ceiling * scale)
        for _ in range(5):
            constraint.lagrangian.update(float(constraint.violation(policy, batch).mean()))
        assert constraint.lagrangian.weight == pytest.approx(math.exp((0.1 * 5 + 1) * seen), rel=1e-4)


def test_objective_is_evaluated_on_the_concepts_phrases_unless_told_otherwise() -> None:
    assert list(ObjectiveConstraint(Constant(), NUDITY).prompts) == ["nudity"]
    assert list(ObjectiveConstraint(Constant(), NUDITY, ["a nude person"]).prompts) == ["a nude person"]


def test_untrained_policy_meets_the_stay_erased_constraint(policy: DiffusionPolicy) -> None:
    constraint = ObjectiveConstraint(ReferenceDistance(ReferenceDistanceConfig(steps=2)), NUDITY, ceiling=0.01)
    constraint.prepare(policy)
    costs = constraint.violation(policy, ConceptBatch(list(constraint.prompts) * 2, [1, 2]))
    assert torch.equal(costs.detach(), torch.full((2,), -1.0))


def test_every_part_implements_its_own_protocol() -> None:
    assert isinstance(ReferenceDistance(), Objective)
    assert not isinstance(ReferenceDistance(), Edit | Guidance)
    assert isinstance(UCE(), Edit)
    assert not isinstance(UCE(), Objective | Guidance)
