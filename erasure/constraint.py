"""What a trainer holds at or below zero while it raises a reward: a cost, prompts to measure it on, and its weight.

Two kinds, after what the cost is computed from: images (`ImageConstraint`), in the units of the cost, or noise
predictions (`ObjectiveConstraint`), relative to a ceiling, since losses differ by orders of magnitude between methods
and the gains of the weight should not. A trainer draws prompts from `prompts`, adds `lagrangian.weight` times the mean
cost to its loss, and once for each update gives `lagrangian.update` the mean cost over all processes.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol, runtime_checkable

from overpaint.policy import DiffusionPolicy
from overpaint.policy.prompts import check_prompts
from overpaint.policy.types import Images, PerSample
from overpaint.training.record import prompts_record, shown
from rewards import RewardLike, as_reward, scores_of

from .concept import Concept
from .lagrangian import Lagrangian, LagrangianConfig
from .protocols import ConceptBatch, Objective


@runtime_checkable
class ImageCost(Protocol):
    """How far each image is from being free of a concept; at or below zero it is free. ReFL needs it differentiable."""

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Returns the cost of each image, in the cost's own units. Images are RGB in [0, 1]."""
        ...


class ScoreCeiling:
    """The excess of a detector's score over a ceiling.

    Args:
        detector: Any reward, or plain function, that grows with the concept, such as the probability of nudity that a
            classifier gives.
        ceiling: Highest score that still counts as erased, in the detector's own units; finite.
    """

    def __init__(self, detector: RewardLike, ceiling: float = 0.1) -> None:
        if not math.isfinite(ceiling):
            raise ValueError(f"ScoreCeiling.ceiling must be finite, got {ceiling}")
        self.detector = as_reward(detector, "ScoreCeiling.detector")
        self.ceiling = ceiling

    def __repr__(self) -> str:
        """Shows the detector and the ceiling."""
        return f"ScoreCeiling({self.detector!r}, ceiling={self.ceiling})"

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Returns score - ceiling for each image."""
        return scores_of("detector", self.detector, images, prompts) - self.ceiling


class ImageConstraint:
    """A cost on images of the concept, kept at or below zero on average.

    Args:
        cost: How far an image is from being free of the concept. ReFL needs it differentiable.
        prompts: Prompts that elicit the concept, at least one, which the images are drawn for.
        lagrangian: Weight of the cost; plain dual ascent by default.
    """

    def __init__(self, cost: ImageCost, prompts: Sequence[str], lagrangian: Lagrangian | None = None) -> None:
        self.cost = cost
        self.prompts = check_prompts(prompts)
        self.lagrangian = lagrangian or Lagrangian()

    def description(self) -> dict[str, Any]:
        """Returns what is constrained and how, for the record of a run."""
        return {"cost": shown(self.cost), **_shared(self)}


class ObjectiveConstraint:
    """An erasure loss on noise predictions, kept at or below a ceiling on average.

    Its cost is relative, `loss / ceiling - 1`: -1 where there is no loss at all, 0 at the ceiling, 1 at twice that.

    Args:
        objective: The loss.
        concept: What the objective is prepared for.
        prompts: Prompts that elicit the concept, which the loss is evaluated on; the concept's phrases by default.
        lagrangian: Weight of the relative cost. By default plain dual ascent from 1, in which a loss of twice its
            ceiling or more counts as twice: the weight doubles in 10 updates of such a loss, and halves in 5 of none.
        ceiling: Highest mean loss that still counts as erased, above 0, in the units of the loss, which for most
            objectives are those of the squared noise.
    """

    def __init__(
        self,
        objective: Objective,
        concept: Concept,
        prompts: Sequence[str] | None = None,
        lagrangian: Lagrangian | None = None,
        *,
        ceiling: float = 1e-3,
    ) -> None:
        if not 0 < ceiling < math.inf:
            raise ValueError(f"ObjectiveConstraint.ceiling must be finite and above 0, got {ceiling}")
        self.objective = objective
        self.concept = concept
        self.prompts = check_prompts(concept.phrases if prompts is None else prompts)
        self.lagrangian = lagrangian or Lagrangian(LagrangianConfig(max_violation=1.0))
        self.ceiling = ceiling

    def description(self) -> dict[str, Any]:
        """Returns what is constrained and how, for the record of a run."""
        concept = self.concept.to_json()
        return {"objective": shown(self.objective), "concept": concept, "ceiling": self.ceiling, **_shared(self)}

    def prepare(self, policy: DiffusionPolicy) -> None:
        """Prepares the objective for the policy; once, before the first update. Raises as the objective's `prepare`."""
        self.objective.prepare(policy, self.concept)

    def cost(self, policy: DiffusionPolicy, batch: ConceptBatch) -> PerSample:
        """Returns loss / ceiling - 1 for each sample; gradients flow."""
        return self.objective.loss(policy, batch) / self.ceiling - 1


def _shared(constraint: ImageConstraint | ObjectiveConstraint) -> dict[str, Any]:
    """Returns what both kinds have to tell."""
    return {"prompts": prompts_record(constraint.prompts), "lagrangian": asdict(constraint.lagrangian.config)}


ErasureConstraint = ImageConstraint | ObjectiveConstraint
"""What a trainer takes to keep a concept erased."""
