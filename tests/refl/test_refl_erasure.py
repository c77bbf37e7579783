"""ReFL under the constraint that a concept stays erased."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from erasure import (
    NUDITY,
    UCE,
    FixedWeight,
    Lagrangian,
    LagrangianConfig,
    ObjectiveConstraint,
    ReferenceDistance,
    ReferenceDistanceConfig,
)
from overpaint.policy import ClassifierFree, DiffusionPolicy, LoRAConfig
from overpaint.policy.types import Images, PerSample
from overpaint.training import TrainingConfig, read_metrics
from refl import ReFLConfig, ReFLTrainer

PLAIN: dict[str, Any] = {
    "space": "linear",
    "proportional_gain": 0.0,
    "smoothing": 0.0,
    "min_weight": 0.0,
    "max_violation": math.inf,
    "scale_memory": 0.0,
}
"""Settings of plain dual ascent on the weight itself."""


class Minus:
    """The opposite of a reward."""

    differentiable = True

    def __init__(self, reward: Callable[[Images, Sequence[str]], PerSample]) -> None:
        self.reward = reward

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        return -self.reward(images, prompts)


@pytest.fixture
def stay_erased() -> ObjectiveConstraint:
    """The constraint that predictions for the concept stay where they are."""
    lagrangian = Lagrangian(LagrangianConfig(**PLAIN, initial_weight=1e-6, learning_rate=1e-9))
    return ObjectiveConstraint(
        ReferenceDistance(ReferenceDistanceConfig(steps=3)), NUDITY, lagrangian=lagrangian, ceiling=1e-6
    )


def test_cost_falls_and_its_weight_follows(
    policy: DiffusionPolicy,
    redness: Any,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
    green_constraint: Callable[..., Any],
) -> None:
    constraint = green_constraint(ceiling=0.3, **PLAIN, initial_weight=0.9, learning_rate=0.3)

    def cost() -> float:
        wanted = list(constraint.prompts) * 4
        images = policy.draw(wanted, seeds=range(8), steps=4, guidance=ClassifierFree(1.0))
        return float(constraint.violation(images, wanted).mean())

    before = cost()
    assert before > 0
    config = run_config(iterations=12)
    ReFLTrainer(policy, redness, prompts, small(), erasure=constraint).train(config)
    assert cost() < before - 3e-3  # falls by 0.007, as far as a random decoder lets it

    lines = [line for line in read_metrics(config.output_dir / "metrics.jsonl") if "erasure/weight" in line]
    weights, costs = ([line[f"erasure/{tag}"] for line in lines] for tag in ("weight", "violation"))
    assert weights[0] == 0.9
    for k in range(11):  # plain dual ascent, once for each update
        assert weights[k + 1] == pytest.approx(max(weights[k] + 0.3 * costs[k], 0.0), abs=1e-6)
    assert constraint.lagrangian.weight == pytest.approx(max(weights[-1] + 0.3 * costs[-1], 0.0), abs=1e-6)


def test_weight_scales_the_gradient_of_the_cost(
    policy: DiffusionPolicy,
    stir: Callable[[DiffusionPolicy], None],
    redness: Any,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    gradients: Callable[[ReFLTrainer], dict[str, Tensor]],
    green_constraint: Callable[..., Any],
    assert_equal_gradients: Callable,
) -> None:
    stir(policy)
    start = policy.trainable_state()
    taken = []
    for weight in (0.0, 1.0, 3.0):
        policy.load_trainable_state(start)
        constraint = green_constraint(**PLAIN, initial_weight=weight)
        taken.append(gradients(ReFLTrainer(policy, redness, prompts, small(), erasure=constraint)))
    none, once, thrice = taken
    tripled = {name: none[name] + 3 * (once[name] - none[name]) for name in none}
    assert_equal_gradients(tripled, thrice)
    assert max(float((once[name] - none[name]).abs().max()) for name in none) > 0


@pytest.mark.parametrize(("sign", "low", "high"), [(-1, 0.5, 1.0), (1, -1.0, -0.5)], ids=["same", "opposite"])
def test_cosine_tells_whether_reward_and_cost_pull_the_same_way(
    sign: int,
    low: float,
    high: float,
    policy: DiffusionPolicy,
    redness: Any,
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
    make_constraint: Callable[..., Any],
) -> None:
    constraint = make_constraint(redness if sign > 0 else Minus(redness))
    trainer = ReFLTrainer(policy, redness, constraint.prompts, small(), erasure=constraint)
    metrics = trainer.train(run_config(iterations=1))
    assert metrics is not None
    assert low <= metrics.gradient_cosine <= high


@pytest.mark.parametrize("trained", [{"lora": LoRAConfig()}, {"train": "xattn"}], ids=["lora", "xattn"])
def test_objective_on_noise_predictions_is_a_constraint_too(
    trained: dict[str, Any],
    make_policy: Callable[..., DiffusionPolicy],
    redness: Any,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
    stay_erased: ObjectiveConstraint,
) -> None:
    policy = make_policy(**trained)
    UCE().erase(policy, NUDITY).apply(policy)
    config = run_config(iterations=6)
    ReFLTrainer(policy, redness, prompts, small(), erasure=stay_erased).train(config)
    lines = [line for line in read_metrics(config.output_dir / "metrics.jsonl") if "erasure/violation" in line]
    assert lines[0]["erasure/violation"] == -1.0  # nothing has moved yet: all of the ceiling is left
    assert lines[0]["erasure/gradient_cosine"] == 0.0
    assert lines[-1]["erasure/violation"] > 0
    assert lines[1]["erasure/weight"] == pytest.approx(1e-6 - 1e-9, rel=1e-5)
    assert stay_erased.lagrangian.weight > lines[1]["erasure/weight"]


@pytest.mark.parametrize(
    ("broken", "updates", "answered"),
    [(True, 10, 0.1 * 10 + 1), (False, 5, -0.1 * 5 - 1)],  # a gross violation counts as 1, no loss as -1
    ids=["broken", "satisfied"],
)
def test_weight_of_an_objective_moves_by_orders_of_magnitude_in_a_few_updates(
    broken: bool,
    updates: int,
    answered: float,
    policy: DiffusionPolicy,
    stir: Callable[[DiffusionPolicy], None],
    redness: Any,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
) -> None:
    if broken:
        stir(policy)
    constraint = ObjectiveConstraint(
        ReferenceDistance(ReferenceDistanceConfig(steps=2)), NUDITY, ceiling=1e-6 if broken else 1e-3
    )
    config = run_config(iterations=updates, learning_rate=1e-9)
    ReFLTrainer(policy, redness, prompts, small(), erasure=constraint).train(config)
    lines = read_metrics(config.output_dir / "metrics.jsonl")
    costs = [line["erasure/violation"] for line in lines if "erasure/violation" in line]
    assert all(cost > 1 for cost in costs) if broken else all(cost < -0.99 for cost in costs)
    assert constraint.lagrangian.weight == pytest.approx(math.exp(answered), rel=1e-2)


def test_constraint_keeps_a_policy_where_it_was(
    make_policy: Callable[..., DiffusionPolicy],
    redness: Any,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
) -> None:
    distances = []
    for name, weight in (("free", 0.0), ("held", 1e-4)):
        policy = make_policy(train="xattn-kv")
        objective = ReferenceDistance(ReferenceDistanceConfig(steps=3))
        constraint = ObjectiveConstraint(objective, NUDITY, ["nude"], FixedWeight(weight), ceiling=1e-6)
        config = run_config(name, iterations=6)
        ReFLTrainer(policy, redness, prompts, small(), erasure=constraint).train(config)
        lines = read_metrics(config.output_dir / "metrics.jsonl")
        distances.append(1 + [line["erasure/violation"] for line in lines if "erasure/violation" in line][-1])
    assert distances[1] < 0.5 * distances[0]


def test_cost_without_a_gradient_is_refused(
    policy: DiffusionPolicy,
    redness: Any,
    detached: Any,
    prompts: list[str],
    run_config: Callable[..., TrainingConfig],
    make_constraint: Callable[..., Any],
) -> None:
    with pytest.raises(ValueError, match=r"erasure cost must be differentiable .* got Detached, .*use DDPO"):
        ReFLTrainer(policy, redness, prompts, erasure=make_constraint(detached)).train(run_config())


def test_low_variance_images_are_judged_with_the_prompt_they_were_drawn_for(
    policy: DiffusionPolicy,
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
    make_constraint: Callable[..., Any],
) -> None:
    class Listening:
        differentiable = True

        def __init__(self) -> None:
            self.heard: list[list[str]] = []

        def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
            self.heard.append(list(prompts))
            assert len(prompts) == len(images)
            return images.mean(dim=(1, 2, 3))

    reward, cost = Listening(), Listening()
    config = small(low_variance_noises=3, batch_size=2, erasure_batch_size=2)
    metrics = ReFLTrainer(policy, reward, ["a cat", "a dog"], config, erasure=make_constraint(cost)).train(
        run_config(iterations=1)
    )
    assert reward.heard.pop() == reward.heard.pop(1) == ["a cat", "a dog"]  # pictures for the log, start and end
    for judge in (reward, cost):
        probe, heard = judge.heard
        assert len(probe) == 2  # which a gradient is looked for with
        assert heard == [prompt for prompt in heard[::3] for _ in range(3)]
        assert len(heard) == 6
    assert metrics is not None
    assert torch.isfinite(torch.tensor(metrics)).all()


def test_reward_may_join_later(
    policy: DiffusionPolicy,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
    stay_erased: ObjectiveConstraint,
) -> None:
    asked: list[int] = []

    def reward(images: Images, texts: Sequence[str]) -> PerSample:
        asked.append(len(texts))
        return images.mean(dim=(1, 2, 3))

    config = run_config(iterations=4)
    trainer = ReFLTrainer(policy, reward, prompts, small(reward_from=3), erasure=stay_erased)
    trainer.train(config)
    lines = read_metrics(config.output_dir / "metrics.jsonl")
    assert [line["iteration"] for line in lines if "erasure/violation" in line] == [0, 1, 2, 3]
    assert [line["iteration"] for line in lines if "reward/mean" in line] == [3]
    assert [line["iteration"] for line in lines if "train/reward_loss" in line] == [3]
    assert [line["iteration"] for line in lines if "erasure/gradient_cosine" in line] == [3]
    assert not any("floor/violation" in line for line in lines)
    assert asked.count(4) == 1  # the batch of the last iteration; the others are of the trial before it


def test_reward_that_joins_later_needs_something_before_it(
    policy: DiffusionPolicy, redness: Any, prompts: list[str], small: Callable[..., ReFLConfig]
) -> None:
    with pytest.raises(ValueError, match=r"reward_from must be 0 but with an erasure and no floor, got 3 with no"):
        ReFLTrainer(policy, redness, prompts, small(reward_from=3))


def test_reward_that_would_never_join_is_refused_before_work(
    policy: DiffusionPolicy,
    redness: Any,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
    stay_erased: ObjectiveConstraint,
) -> None:
    trainer = ReFLTrainer(policy, redness, prompts, small(reward_from=3), erasure=stay_erased)
    with pytest.raises(ValueError, match=r"reward_from must be below iterations=3, got 3"):
        trainer.train(run_config(iterations=3))
