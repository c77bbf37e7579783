"""What a trainer holds at or below zero while it raises a reward: a violation, prompts to measure it on, its weight.

Two kinds, after what the cost is computed from: images (`ImageConstraint`) or noise predictions
(`ObjectiveConstraint`). Both violations are relative to a ceiling, `cost / ceiling - 1`: costs differ by orders of
magnitude between detectors and methods, and the gains of the weight should not. A trainer draws prompts from `prompts`,
adds `lagrangian.weight` times the mean violation to its loss, and once for each update gives `lagrangian.update` the
mean over all processes.
"""

import math
from collections.abc import Sequence
from typing import Any

from overpaint.policy import DiffusionPolicy
from overpaint.policy.prompts import check_prompts
from overpaint.policy.types import Images, PerSample
from overpaint.training.record import prompts_record, shown
from rewards import RewardLike, as_reward, scores_of

from .concept import Concept
from .controllers import WeightController
from .lagrangian import Lagrangian
from .protocols import ConceptBatch, Objective


class ImageConstraint:
    """A score of images of the concept, kept at or below a ceiling on average.

    Args:
        cost: Any reward, or plain function of images and prompts, that grows with the concept, such as the probability
            of nudity that a classifier gives. ReFL needs it differentiable.
        prompts: Prompts that elicit the concept, at least one, which the images are drawn for.
        lagrangian: What weighs the violation; by default dual ascent as `LagrangianConfig` has it.
        ceiling: Highest mean score that still counts as erased, above 0, in the units of the score.
    """

    def __init__(
        self,
        cost: RewardLike,
        prompts: Sequence[str],
        lagrangian: WeightController | None = None,
        *,
        ceiling: float = 0.1,
    ) -> None:
        self.cost = as_reward(cost, "ImageConstraint.cost")
        self.prompts = check_prompts(prompts)
        self.lagrangian = lagrangian or Lagrangian()
        self.ceiling = _checked(ceiling, "ImageConstraint")

    def description(self) -> dict[str, Any]:
        """Returns what is constrained and how, for the record of a run."""
        return {"cost": shown(self.cost), **_shared(self)}

    def violation(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Returns score / ceiling - 1 for each image: -1 without the concept, 0 at the ceiling, 1 at twice that.

        Raises:
            ScoresError: The cost does not give one number for each image.
        """
        return self.relative(scores_of("erasure cost", self.cost, images, prompts))

    def relative(self, scores: PerSample) -> PerSample:
        """Returns the violation of images that the cost has scored already."""
        return scores / self.ceiling - 1


class ObjectiveConstraint:
    """An erasure loss on noise predictions, kept at or below a ceiling on average.

    Args:
        objective: The loss.
        concept: What the objective is prepared for.
        prompts: Prompts that elicit the concept, which the loss is evaluated on; the concept's phrases by default.
        lagrangian: What weighs the violation; by default dual ascent as `LagrangianConfig` has it.
        ceiling: Highest mean loss that still counts as erased, above 0, in the units of the loss, which for most
            objectives are those of the squared noise.
    """

    def __init__(
        self,
        objective: Objective,
        concept: Concept,
        prompts: Sequence[str] | None = None,
        lagrangian: WeightController | None = None,
        *,
        ceiling: float = 1e-3,
    ) -> None:
        self.objective = objective
        self.concept = concept
        self.prompts = check_prompts(concept.phrases if prompts is None else prompts)
        self.lagrangian = lagrangian or Lagrangian()
        self.ceiling = _checked(ceiling, "ObjectiveConstraint")

    def description(self) -> dict[str, Any]:
        """Returns what is constrained and how, for the record of a run."""
        return {"objective": shown(self.objective), "concept": self.concept.to_json(), **_shared(self)}

    def prepare(self, policy: DiffusionPolicy) -> None:
        """Prepares the objective for the policy; once, before the first update. Raises as the objective's `prepare`."""
        self.objective.prepare(policy, self.concept)

    def violation(self, policy: DiffusionPolicy, batch: ConceptBatch) -> PerSample:
        """Returns loss / ceiling - 1 for each sample; gradients flow. -1 is no loss at all, 1 twice the ceiling."""
        return self.objective.loss(policy, batch) / self.ceiling - 1


def _checked(ceiling: float, owner: str) -> float:
    if not 0 < ceiling < math.inf:
        raise ValueError(f"{owner}.ceiling must be finite and above 0, got {ceiling}")
    return float(ceiling)


def _shared(constraint: ImageConstraint | ObjectiveConstraint) -> dict[str, Any]:
    """Returns what both kinds have to tell."""
    return {
        "ceiling": constraint.ceiling,
        "prompts": prompts_record(constraint.prompts),
        "lagrangian": constraint.lagrangian.description(),
    }


ErasureConstraint = ImageConstraint | ObjectiveConstraint
"""What a trainer takes to keep a concept erased."""
