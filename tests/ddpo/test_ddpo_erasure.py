"""DDPO under the constraint that a concept stays erased."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from ddpo import DDPOConfig, DDPOTrainer, round_advantages
from ddpo.baseline import Baseline
from erasure import (
    NUDITY,
    UCE,
    ImageConstraint,
    Lagrangian,
    LagrangianConfig,
    ObjectiveConstraint,
    ReferenceDistance,
    ReferenceDistanceConfig,
)
from overpaint.policy import ClassifierFree, DiffusionPolicy
from overpaint.policy.types import Images, PerSample
from overpaint.training import HeldOut, TrainingConfig, read_metrics

PLAIN: dict[str, Any] = {
    "space": "linear",
    "proportional_gain": 0.0,
    "smoothing": 0.0,
    "min_weight": 0.0,
    "max_violation": math.inf,
    "scale_memory": 0.0,
}
"""Settings of plain dual ascent on the weight itself."""

CONCEPT = ["a plain circle", "a striped circle"]


class Greenness:
    """The mean of green, without a gradient; remembers what it was asked about."""

    differentiable = False

    def __init__(self) -> None:
        self.prompts: list[str] = []

    @torch.no_grad()
    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        self.prompts += prompts
        return images[:, 1].mean(dim=(1, 2))


def small(**changes: Any) -> DDPOConfig:
    """Settings of a round that takes a moment, with one update."""
    settings: dict[str, Any] = {
        "samples_per_round": 8,
        "updates_per_round": 1,
        "sampling_batch_size": 8,
        "minibatch_size": 8,
        "steps": 2,
        "guidance_scale": 1.0,
        "baseline": "round",
        "pictures_every": 100,
        "erasure_samples_per_round": 8,
    }
    return DDPOConfig(**settings | changes)


def green_constraint(ceiling: float, **settings: Any) -> ImageConstraint:
    return ImageConstraint(Greenness(), CONCEPT, Lagrangian(LagrangianConfig(**PLAIN, **settings)), ceiling=ceiling)


def stay_erased(**settings: Any) -> ObjectiveConstraint:
    """The constraint that predictions for the concept stay where they are."""
    objective = ReferenceDistance(ReferenceDistanceConfig(steps=3))
    return ObjectiveConstraint(
        objective, NUDITY, ["nude"], Lagrangian(LagrangianConfig(**PLAIN, **settings)), ceiling=1e-6
    )


def columns(config: TrainingConfig, *tags: str) -> list[list[float]]:
    lines = read_metrics(config.output_dir / "metrics.jsonl")
    return [[line[tag] for line in lines if tag in line] for tag in tags]


def test_cost_falls_and_its_weight_follows(
    make_policy: Callable[..., DiffusionPolicy],
    redness: Any,
    prompts: list[str],
    run_config: Callable[..., TrainingConfig],
) -> None:
    tuned = make_policy(train="full")
    constraint = green_constraint(0.3, initial_weight=6.0, learning_rate=0.3)

    def cost() -> float:
        wanted = list(constraint.prompts) * 20
        guidance = ClassifierFree(1.0)
        images = tuned.draw(wanted, seeds=range(40), steps=6, guidance=guidance, eta=1.0, batch_size=40)
        return float(constraint.violation(images, wanted).mean())

    before = cost()
    config = run_config(iterations=4, learning_rate=3e-3)
    settings = small(
        estimator="score",
        samples_per_round=16,
        erasure_samples_per_round=48,
        sampling_batch_size=64,
        minibatch_size=128,
        steps=6,
        step_weights="signal",
    )
    DDPOTrainer(tuned, redness, prompts, settings, erasure=constraint).train(config)
    assert cost() < before - 7e-3  # falls by 0.014 to 0.017, with three seeds

    weights, costs = columns(config, "erasure/weight", "erasure/violation")
    assert weights[0] == 6.0
    assert all(value > 0 for value in costs)
    for k in range(3):  # plain dual ascent, once a round, with the cost that the round has measured
        assert weights[k + 1] == pytest.approx(weights[k] + 0.3 * costs[k], abs=1e-5)
    assert constraint.lagrangian.weight == pytest.approx(weights[-1] + 0.3 * costs[-1], abs=1e-5)


def test_cost_is_asked_about_samples_of_the_concept_only(
    policy: DiffusionPolicy, redness: Any, prompts: list[str], run_config: Callable[..., TrainingConfig]
) -> None:
    # The second batch is half of the prompts and half of the concept.
    constraint = green_constraint(0.3, learning_rate=0.1)
    detector = constraint.cost
    assert isinstance(detector, Greenness)
    settings = small(samples_per_round=12, erasure_samples_per_round=4)
    metrics = DDPOTrainer(policy, redness, prompts, settings, erasure=constraint).train(run_config(iterations=1))
    assert metrics is not None
    assert len(detector.prompts) == 4
    assert set(detector.prompts) <= set(CONCEPT)
    assert metrics.erasure_violation == pytest.approx(constraint.lagrangian.weight / 0.1 - 10.0, rel=1e-5)


def test_concept_samples_are_worth_their_reward_less_the_weighted_cost(
    policy: DiffusionPolicy,
    redness: Any,
    prompts: list[str],
    run_config: Callable[..., TrainingConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judged: list[tuple[Any, Any]] = []
    judge = Baseline.advantages

    def remember(baseline: Baseline, run: Any, asked: Any, graded: Any, *rest: Any) -> Any:
        judged.append((graded, judge(baseline, run, asked, graded, *rest)))
        return judged[-1][1]

    monkeypatch.setattr(Baseline, "advantages", remember)
    constraint = green_constraint(0.3, initial_weight=3.0)
    DDPOTrainer(policy, redness, prompts, small(), erasure=constraint).train(run_config(iterations=1))
    ((graded, verdict),) = judged
    assert len(graded.rewards) == 16
    assert len(graded.costs) == 8
    own, concept = graded.rewards[:8], graded.rewards[8:] - 3.0 * (graded.costs / 0.3 - 1)
    # Both in standard deviations of the ordinary reward: the weight says what cost is worth in it.
    compared = (concept - concept.mean()) / (own.double().std(correction=0) + 1e-6)
    expected = torch.cat([round_advantages(own), compared.clamp(-5, 5)]).float()
    torch.testing.assert_close(verdict.advantages, expected[:, None].expand(-1, 2), rtol=1e-4, atol=1e-4)


def test_constraint_that_holds_loses_its_weight(
    policy: DiffusionPolicy, redness: Any, prompts: list[str], run_config: Callable[..., TrainingConfig]
) -> None:
    constraint = green_constraint(0.9, initial_weight=0.5, learning_rate=0.9)
    config = run_config(iterations=3)
    DDPOTrainer(policy, redness, prompts, small(), erasure=constraint).train(config)
    weights, costs = columns(config, "erasure/weight", "erasure/violation")
    assert all(cost < 0 for cost in costs)
    assert weights[0] == 0.5
    assert weights[1] == pytest.approx(0.5 + 0.9 * costs[0], abs=1e-6)
    assert weights[2] == 0.0


def test_objective_on_noise_predictions_is_a_constraint_too(
    policy: DiffusionPolicy, redness: Any, prompts: list[str], run_config: Callable[..., TrainingConfig]
) -> None:
    UCE().erase(policy, NUDITY).apply(policy)
    constraint = stay_erased(initial_weight=1e-6, learning_rate=1e-9)
    config = run_config(iterations=3)
    settings = small(samples_per_round=16, updates_per_round=2)
    DDPOTrainer(policy, redness, prompts, settings, erasure=constraint).train(config)
    weights, costs, samples = columns(config, "erasure/weight", "erasure/violation", "samples")
    # Nothing has moved at the first update, and something at the second: the cost is their mean.
    assert costs[0] > -1 / 2
    assert costs[-1] > 0
    assert weights[1] == pytest.approx(1e-6 + 1e-9 * 2 * costs[0], rel=1e-5)  # once for each update
    assert constraint.lagrangian.weight == pytest.approx(weights[2] + 1e-9 * 2 * costs[2], rel=1e-5)
    assert samples == [16.0, 32.0, 48.0]  # its prompts are not drawn as images


def test_objective_keeps_a_policy_where_it_was(
    policy: DiffusionPolicy, redness: Any, prompts: list[str], run_config: Callable[..., TrainingConfig]
) -> None:
    start, last = policy.trainable_state(), []
    for name, weight in (("free", 0.0), ("held", 1e-4)):
        policy.load_trainable_state(start)
        config = run_config(name, iterations=5)
        constraint = stay_erased(initial_weight=weight, learning_rate=0.0)
        DDPOTrainer(policy, redness, prompts, small(), erasure=constraint).train(config)
        last.append(columns(config, "erasure/violation")[0][-1])
    assert 1 + last[1] < 0.5 * (1 + last[0])


@pytest.mark.parametrize("ema_decay", [None, 0.75])
def test_policy_ends_with_the_last_averages_where_the_constraint_held_at_no_look(
    ema_decay: float | None,
    policy: DiffusionPolicy,
    redness: Any,
    prompts: list[str],
    run_config: Callable[..., TrainingConfig],
) -> None:
    start, ends = policy.trainable_state(), []
    for name, held_out in (("watched", HeldOut(["a dog"], redness)), ("unwatched", None)):
        policy.load_trainable_state(start)
        constraint = green_constraint(1e-9)  # no picture is that dark
        trainer = DDPOTrainer(policy, redness, prompts, small(), erasure=constraint, held_out=held_out)
        trainer.train(run_config(name, iterations=2, ema_decay=ema_decay))
        assert trainer.early_stopping is None or trainer.early_stopping.best_iteration == -1
        ends.append(policy.trainable_state())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
