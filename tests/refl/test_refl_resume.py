"""ReFL that was interrupted ends like ReFL that was not: weights, constraint, held-out watch, pairs, averages."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from overpaint.policy import DiffusionPolicy
from overpaint.training import HeldOut, TrainingConfig, read_metrics
from refl import ReFLConfig, ReFLTrainer
from tests.refl.mortal import KilledError, Mortal


class Outcome(NamedTuple):
    weights: dict[str, Tensor]
    weight: float
    best: tuple[float, int]
    metrics: list[dict[str, Any]]


@pytest.fixture
def train(
    make_policy: Callable[..., DiffusionPolicy],
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
    green_constraint: Callable[..., Any],
) -> Callable[..., Outcome]:
    """Trains a new policy with everything that has a state."""

    def run(name: str, *, reward: Mortal, blue: Mortal, iterations: int = 5, **settings: Any) -> Outcome:
        policy = make_policy(train="xattn-kv")
        constraint = green_constraint(ceiling=0.3, learning_rate=1.0, derivative_gain=1.0)
        config = run_config(name, iterations=iterations, checkpoint_every=2, ema_decay=0.5, **settings)
        settings_of_refl = small(
            batch_size=2, erasure_batch_size=2, pretraining_batch_size=2, pretraining_weight=1.0, evaluate_every=2
        )
        trainer = ReFLTrainer(
            policy, reward, prompts, settings_of_refl, erasure=constraint, held_out=HeldOut(prompts[:2], blue)
        )
        trainer.train(config)
        assert trainer.early_stopping is not None
        return Outcome(
            policy.trainable_state(),
            constraint.lagrangian.weight,
            (trainer.early_stopping.best, trainer.early_stopping.best_iteration),
            read_metrics(config.output_dir / "metrics.jsonl"),
        )

    return run


@pytest.fixture
def same() -> Callable[[Outcome, Outcome], None]:
    def compare(ours: Outcome, theirs: Outcome) -> None:
        assert ours.metrics == theirs.metrics
        assert ours.weight == theirs.weight
        assert ours.best == theirs.best
        assert all(torch.equal(value, theirs.weights[name]) for name, value in ours.weights.items())

    return compare


def test_resumed_equals_uninterrupted(train: Callable[..., Outcome], same: Callable) -> None:
    whole = train("whole", reward=Mortal(0), blue=Mortal(2))
    assert len({line["iteration"] for line in whole.metrics}) == 6

    # The reward is called for the probe, for the looks before iterations 0 and 2, and once in each iteration. So this
    # dies in iteration 3, after the checkpoint of two iterations.
    with pytest.raises(KilledError):
        train("run", reward=Mortal(0, dies_at=6), blue=Mortal(2))
    torch.manual_seed(12345)  # a new process has other generators
    same(train("run", reward=Mortal(0), blue=Mortal(2), resume=True), whole)

    # And this one in the last look, after the checkpoint of the last iteration.
    with pytest.raises(KilledError):
        train("late", reward=Mortal(0), blue=Mortal(2, dies_at=3))
    same(train("late", reward=Mortal(0), blue=Mortal(2), resume=True), whole)

    # What had ended is prolonged.
    train("short", reward=Mortal(0), blue=Mortal(2), iterations=3)
    same(train("short", reward=Mortal(0), blue=Mortal(2), resume=True), whole)
