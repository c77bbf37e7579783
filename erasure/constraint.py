"""What a trainer holds at or below zero while it raises a reward: a violation, prompts to measure it on, its weight.

Two kinds, after what the cost is computed from: images (`ImageConstraint`) or noise predictions
(`ObjectiveConstraint`). Both violations are relative to a ceiling, `cost / ceiling - 1`: costs differ by orders of
magnitude between detectors and methods, and the gains of the weight should not. A trainer draws prompts from `prompts`,
adds `lagrangian.weight` times the mean violation to its loss, and once for each update gives `lagrangian.update` the
mean over all processes. Prompts are plain, or a mix with hard ones that are mined (`ConceptPrompts`), and may be
attacked before each update (`SoftAttack`).
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from overpaint.policy import DiffusionPolicy
from overpaint.policy.types import Images, PerSample
from overpaint.settings import Positive
from overpaint.training import Stateful, TrainingRun
from overpaint.training.record import shown
from rewards import RewardLike, as_reward, scores_of

from .concept import Concept
from .concept_prompts import ConceptPrompts
from .controllers import WeightController
from .lagrangian import Lagrangian
from .protocols import ConceptBatch, Learner, Objective
from .soft_attack import Judged, SoftAttack


@runtime_checkable
class WordsBesidePrompts(Protocol):
    """An objective that puts words of its own beside prompts."""

    def check_prompts(self, policy: DiffusionPolicy, prompts: Sequence[str]) -> None:
        """Checks that they have room there, without drawing anything.

        Raises:
            ValueError: They have none beside a prompt, or several text encoders read the prompts.
        """
        ...


class _Constraint:
    """What both kinds have: prompts, an attack on them, a ceiling, and the weight of the violation."""

    def __init__(
        self,
        prompts: Sequence[str],
        lagrangian: WeightController | None,
        attack: SoftAttack | None,
        ceiling: Positive,
    ) -> None:
        self.prompts = ConceptPrompts.of(prompts)
        self.lagrangian = lagrangian or Lagrangian()
        self.attack = attack
        self.ceiling = float(ceiling)

    def check(self, policy: DiffusionPolicy) -> None:
        """Checks that what is put beside the prompts has room there, without drawing anything.

        Raises:
            ValueError: It has none beside a prompt, or the policy's prompts are read by several text encoders.
        """
        if self.attack is not None:
            self.attack.check(policy, self.prompts)

    def state(self) -> dict[str, Stateful]:
        """Returns what belongs in the checkpoints of a run, by name."""
        mined: dict[str, Stateful] = {"concept_prompts": self.prompts} if self.prompts.mines else {}
        return {"erasure": self.lagrangian, **mined}

    def measured(self, run: TrainingRun) -> dict[str, float]:
        """Returns what mining and attacks have measured since the last call, by tag; every process has to call it."""
        mined = {"erasure/hard_share_violation": self.prompts.hard_violation} if self.prompts.mines else {}
        return mined if self.attack is None else mined | self.attack.measured(run)

    def _shared(self) -> dict[str, Any]:
        """Returns what both kinds have to tell."""
        return {
            "ceiling": self.ceiling,
            "prompts": self.prompts.description(),
            "lagrangian": self.lagrangian.description(),
            **({} if self.attack is None else {"attack": shown(self.attack)}),
        }


class ImageConstraint(_Constraint):
    """A score of images of the concept, kept at or below a ceiling on average.

    Args:
        cost: Any reward, or plain function of images and prompts, that grows with the concept, such as the probability
            of nudity that a classifier gives. ReFL needs it differentiable.
        prompts: Prompts that elicit the concept, at least one, which the images are drawn for; `ConceptPrompts` to mix
            them and to mine hard ones.
        lagrangian: What weighs the violation; by default dual ascent as `LagrangianConfig` has it.
        ceiling: Highest mean score that still counts as erased, above 0, in the units of the score.
        attack: What makes prompts hard before each update; for ReFL, which has a gradient to them.
    """

    def __init__(
        self,
        cost: RewardLike,
        prompts: Sequence[str],
        lagrangian: WeightController | None = None,
        *,
        ceiling: Positive = 0.1,
        attack: SoftAttack | None = None,
    ) -> None:
        super().__init__(prompts, lagrangian, attack, ceiling)
        self.cost = as_reward(cost, "ImageConstraint.cost")

    def description(self) -> dict[str, Any]:
        """Returns what is constrained and how, for the record of a run."""
        return {"cost": shown(self.cost), **self._shared()}

    def violation(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Returns score / ceiling - 1 for each image: -1 without the concept, 0 at the ceiling, 1 at twice that.

        Raises:
            ScoresError: The cost does not give one number for each image.
        """
        return self.relative(scores_of("erasure cost", self.cost, images, prompts))

    def judged(self, images: Images, prompts: Sequence[str]) -> Judged:
        """Returns the violation of images, and what an attack with a score of its own climbs."""
        score = None if self.attack is None else self.attack.score
        climbed = None if score is None else scores_of("attack score", score, images, prompts)
        return Judged(self.violation(images, prompts), climbed)

    def relative(self, scores: PerSample) -> PerSample:
        """Returns the violation of images that the cost has scored already."""
        return scores / self.ceiling - 1


class ObjectiveConstraint(_Constraint):
    """An erasure loss on noise predictions, kept at or below a ceiling on average.

    Args:
        objective: The loss.
        concept: What the objective is prepared for.
        prompts: Prompts that elicit the concept, which the loss is evaluated on; the concept's phrases by default, and
            `ConceptPrompts` to mix them and to mine hard ones.
        lagrangian: What weighs the violation; by default dual ascent as `LagrangianConfig` has it.
        ceiling: Highest mean loss that still counts as erased, above 0, in the units of the loss, which for most
            objectives are those of the squared noise.
        attack: What makes prompts hard before each update, by the loss.
    """

    def __init__(
        self,
        objective: Objective,
        concept: Concept,
        prompts: Sequence[str] | None = None,
        lagrangian: WeightController | None = None,
        *,
        ceiling: Positive = 1e-3,
        attack: SoftAttack | None = None,
    ) -> None:
        super().__init__(concept.phrases if prompts is None else prompts, lagrangian, attack, ceiling)
        if attack is not None and attack.score is not None:
            raise ValueError(
                f"SoftAttack.score must be None with an objective, which has no images, got {attack.score!r}"
            )
        self.objective = objective
        self.concept = concept
        self._learned: dict[str, float] = {}

    def description(self) -> dict[str, Any]:
        """Returns what is constrained and how, for the record of a run."""
        return {"objective": shown(self.objective), "concept": self.concept.to_json(), **self._shared()}

    def state(self) -> dict[str, Stateful]:
        """Returns what belongs in the checkpoints of a run, by name: also what the objective learns."""
        learned = {"objective": self.objective} if isinstance(self.objective, Learner) else {}
        return super().state() | learned

    def learn(self, run: TrainingRun) -> None:
        """Lets an objective learn, once after every update of the policy; every process has to call it."""
        if isinstance(self.objective, Learner):
            self._learned = self.objective.learn(run)

    def measured(self, run: TrainingRun) -> dict[str, float]:
        """Returns what mining and attacks have measured, and what the objective has learned last."""
        return super().measured(run) | self._learned

    def check(self, policy: DiffusionPolicy) -> None:
        """See `_Constraint`; also what the objective puts beside the prompts."""
        super().check(policy)
        if isinstance(self.objective, WordsBesidePrompts):
            self.objective.check_prompts(policy, self.prompts)

    def prepare(self, policy: DiffusionPolicy) -> None:
        """Checks prompts, and prepares the objective for the policy; once, before the first update.

        Raises:
            ValueError: As `check`, and as the objective's `prepare`.
        """
        self.check(policy)
        self.objective.prepare(policy, self.concept)

    def violation(self, policy: DiffusionPolicy, batch: ConceptBatch) -> PerSample:
        """Returns loss / ceiling - 1 for each sample; gradients flow. -1 is no loss at all, 1 twice the ceiling."""
        return self.objective.loss(policy, batch) / self.ceiling - 1


ErasureConstraint = ImageConstraint | ObjectiveConstraint
"""What a trainer takes to keep a concept erased."""


def check_sharded(run: TrainingRun, erasure: ErasureConstraint | None) -> None:
    """Checks that all processes call a sharded network equally often.

    Raises:
        ValueError: The network is sharded, and an objective denoises each sample to a step of its own, or an attack is
            made on some prompts.
    """
    if not run.config.shard or run.num_processes == 1 or erasure is None:
        return
    objective = isinstance(erasure, ObjectiveConstraint)
    if objective or erasure.attack is not None:
        raise ValueError(
            f"TrainingConfig.shard must be False with {'an ObjectiveConstraint' if objective else 'an attack'}, for "
            "which the processes call the network a different number of times, got True"
        )
