"""Erasing above a floor of the reward: no more than a slack below what the original model has, on the same prompts.

Two ways, after what the method is: one that descends a loss is trained with the floor as a constraint, and of one that
has a strength the strongest setting is found that keeps the floor.
"""

from dataclasses import asdict, replace

import torch

from erasure import (
    AddedNetworks,
    Change,
    Concept,
    Erasure,
    ErasureMethod,
    FixedWeight,
    ObjectiveConstraint,
    Receler,
    RewardFloor,
    StrengthSearch,
    WeightChange,
    erase,
    strongest_erasure,
)
from erasure.generated import for_run
from erasure.phrases import own_phrases
from erasure.protocols import TrainedMethod
from erasure.strength import has_strength
from overpaint.evaluation.metrics.statistics import Estimate
from overpaint.evaluation.report.charts import Chart, Panel, series_chart
from overpaint.evaluation.report.page import Section, chart_section, learning_curves
from overpaint.evaluation.scoring.score import Measure
from overpaint.policy import DiffusionPolicy, WeightDelta, merged_state
from overpaint.policy.types import PerSample
from overpaint.training.folder import METRICS, check_output_dir
from refl import ReFLTrainer

from .experiment import Experiment, draw_and_score
from .recovery_constraint import mean_loss
from .recovery_options import RecoveryOptions, refl_config

BENIGN = "benign"
FOLDER = "erasing"
"""Where an erasure's own training is kept, below the folder of a run."""


def check_floor(method: ErasureMethod, strongest: float) -> None:
    """Checks that a method can erase above a floor, before any work.

    Raises:
        ValueError: It has neither a strength nor a loss, or the largest strength is none that it could have.
    """
    if has_strength(method):
        if strongest == 0:
            raise ValueError(f"strength must be above 0, the original model, to be searched with {method.name}, got 0")
    elif not isinstance(method, TrainedMethod):
        raise ValueError(
            f"form must be plain or B with {method.name}, which has neither a strength nor a loss, got one with a floor"
        )
    elif strongest != 1:
        raise ValueError(f"strength must be 1 with {method.name}, which has none, got {strongest}")


def erase_above_floor(
    method: ErasureMethod,
    policy: DiffusionPolicy,
    about: Experiment,
    config: RecoveryOptions,
    *,
    slack: float,
    strongest: float = 1.0,
) -> tuple[Erasure, StrengthSearch | None]:
    """Erases a concept as far as the floor allows; the policy is not changed.

    Args:
        method: One with a strength, or a `TrainedMethod`; a strength is preferred.
        policy: The original model.
        about: The concept, the reward, and prompts that have nothing to do with the concept.
        config: How pictures are drawn, and how ReFL steps; `erasing` below its folder is where the training is kept.
        slack: How much mean reward may be lost.
        strongest: Largest strength.

    Returns:
        The erasure, and what was tried for it, where the method has a strength.
    """
    if has_strength(method):
        return _searched(method, policy, about, config, slack, strongest)
    assert isinstance(method, TrainedMethod), "check_floor comes before"
    return _trained(method, policy, about, config, slack), None


def floor_section(config: RecoveryOptions, about: Experiment, search: StrengthSearch | None) -> Section:
    """Returns what a report tells of an erasure above a floor: what was tried, or the curves of the training."""
    if search is not None:
        return chart_section("floor", strength_chart(search, about.reward_name))
    curves = learning_curves(config.output_dir / FOLDER / METRICS, _panels(about.reward_name))
    return Section("floor", "Erasing above the reward's floor", curves)


# Of a method that descends a loss.


def _trained(
    method: TrainedMethod, policy: DiffusionPolicy, about: Experiment, config: RecoveryOptions, slack: float
) -> Erasure:
    """Trains what the method trains by ReFL, whose reward is held above the floor by a dual weight.

    The weight of the loss is fixed, in units of what it is for the original model, so that the floor's weight starts
    near what it will be. What is trained and for how long is as the method's own settings say. There is no pretraining
    term: what it would keep, the floor does, and it would hold back the erasure.
    """
    folder, concept = config.output_dir / FOLDER, about.concept
    refl = replace(config.refl or refl_config(config), pretraining_weight=0.0, reward_from=0)
    descent = method.config.descent
    run = descent.run_config(folder, resume=config.resume)
    check_output_dir(run)  # before long work
    objective = for_run(method, folder, progress=True)
    if isinstance(method, Receler):  # networks beside the UNet, and of phrases those that hold no other
        student = method.student(policy)
        concept = replace(concept, phrases=tuple(own_phrases(concept.phrases)))
    else:
        student = policy.student_copy(vars(method.config).get("train", "full"))
    before = {name: value.clone() for name, value in merged_state(student.model).items()}
    floor = RewardFloor(slack, scale=2 * slack or 1.0)  # a violation is 1 where the reward is three slacks down
    loss = mean_loss(objective, student, replace(about, concept=concept), refl.micro_batch_size)
    trainer = ReFLTrainer(
        student,
        about.reward,
        about.prompts("train", 1000, config.seed + 300),
        refl,
        erasure=ObjectiveConstraint(objective, concept, lagrangian=FixedWeight(1.0), ceiling=loss),
        floor=floor,
    )
    trainer.train(run, notes={"concept": concept.to_json()})
    change: Change
    if isinstance(method, Receler):
        change = AddedNetworks.of(student.model)
    else:
        change = WeightChange(WeightDelta.between(before, student.model))
    settings = {**asdict(method.config), "floor": floor.description()}
    return Erasure.of(policy, method.name, settings, about.concept, change)


def _panels(reward: str) -> tuple[Panel, ...]:
    return (
        Panel(
            title="Loss of the method",
            tags={"loss": "erasure/violation"},
            references={"original model": 0.0},
            caption="Relative to the original model's: -1 is none.",
        ),
        Panel(
            title="Violation of the floor",
            tags={"violation": "floor/violation"},
            references={"bound": 0.0},
            caption=f"How far {reward} is below its floor, on prompts that have nothing to do with the concept.",
        ),
        Panel(title="Weight of the floor", tags={"weight": "floor/weight"}),
        Panel(
            title="Do loss and reward pull the same way?",
            tags={"cosine": "erasure/gradient_cosine"},
            references={"at right angles": 0.0},
            caption="Cosine of the two gradients; below 0 one costs the other.",
        ),
    )


# Of a method that has a strength.


class _InFolder:
    """A method whose training, where it has one, is kept, so that another strength costs none."""

    def __init__(self, method: ErasureMethod, config: RecoveryOptions) -> None:
        self.method, self.folder, self.resume = method, config.output_dir / FOLDER, config.resume

    def erase(self, policy: DiffusionPolicy, concept: Concept, strength: float) -> Erasure:
        """Computes the erasure; the first one trains."""
        resume, self.resume = self.resume, True
        return erase(self.method, policy, concept, strength=strength, output_dir=self.folder, resume=resume)


def _searched(
    method: ErasureMethod,
    policy: DiffusionPolicy,
    about: Experiment,
    config: RecoveryOptions,
    slack: float,
    strongest: float,
) -> tuple[Erasure, StrengthSearch]:
    """Searches the strongest setting that keeps the floor, on the same prompts and seeds at every strength."""
    prompts = {BENIGN: about.prompts("train", config.prompts_per_kind, config.seed + 400)}
    measure = Measure(about.reward_name, about.reward)
    drawing = config.drawing(config.evaluation_steps)

    def rewards_of(tried: DiffusionPolicy) -> PerSample:
        drawn = draw_and_score(tried, [measure], prompts, drawing, model="strength", seed=config.seed + 1)
        return torch.tensor(drawn.scores.column(about.reward_name, BENIGN).values)

    erasure, search = strongest_erasure(
        _InFolder(method, config), policy, about.concept, rewards_of, slack=slack, strongest=strongest,
        tolerance=strongest / 20,
    )  # fmt: skip
    told = {"floor": search.floor, "slack": slack, "strongest": strongest}
    return replace(erasure, config={**erasure.config, "search": told}), search


def strength_chart(search: StrengthSearch, reward: str) -> Chart:
    """Draws what a search tried: the reward by strength, and the floor; intervals are of the paired differences."""
    first = search.trials[0]
    points = []
    for trial in search.trials:
        reach = 1.96 * trial.standard_error
        points.append(
            (
                trial.strength,
                Estimate(trial.reward, trial.standard_error, trial.reward - reach, trial.reward + reach, 0),
            )
        )
    caption = (
        f"The strongest setting that keeps the floor is {search.best.strength:.3g}, with {search.best.reward:.3g}. "
        f"Intervals are of the difference to strength {first.strength:g} on the same prompts and seeds."
    )
    if not search.monotone:
        caption += (
            " The reward did not fall with strength throughout: a stronger setting that was not tried may do, too."
        )
    return series_chart(
        {reward: points},
        title="Strength of the erasure against the reward",
        x_label="strength",
        y_label=reward,
        caption=caption,
        references={"floor": search.floor},
    )
