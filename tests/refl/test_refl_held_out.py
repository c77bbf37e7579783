"""The held-out reward: the best weights are kept, and training stops when the two rewards part ways."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from overpaint.policy import ClassifierFree, DiffusionPolicy
from overpaint.policy.types import Images, PerSample
from overpaint.training import EarlyStopping, HeldOut, TrainingConfig, read_metrics
from refl import ReFLConfig, ReFLTrainer

HELD_OUT = ["a yellow square", "two cats", "a large dog"]


class Blackness:
    """Falls as redness rises."""

    differentiable = False

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        return -images[:, 0].mean(dim=(1, 2))


@pytest.fixture
def watch(redness: Any) -> EarlyStopping:
    return EarlyStopping(HeldOut(HELD_OUT, redness, batch_size=2), patience=2)


def set_weights(policy: DiffusionPolicy, value: float) -> None:
    policy.load_trainable_state({name: torch.full_like(p, value) for name, p in policy.trainable_state().items()})


def weights(policy: DiffusionPolicy) -> set[float]:
    return {float(number) for value in policy.trainable_state().values() for number in value.unique()}


def test_best_weights_are_kept_by_hand_made_numbers(watch: EarlyStopping, policy: DiffusionPolicy) -> None:
    for iteration, held_out in enumerate([0.1, 0.4, 0.3, 0.4]):  # as good as the best is not better
        set_weights(policy, float(iteration))
        watch.note(policy, iteration=iteration, trained=0.0, held_out=held_out)
    assert (watch.best, watch.best_iteration) == (0.4, 1)
    watch.restore(policy)
    assert weights(policy) == {1.0}


@pytest.mark.parametrize(
    ("trained", "held_out", "stops"),
    [
        ([1.0, 1.1, 1.2], [0.5, 0.4, 0.4], True),  # up and down, twice in a row
        ([1.0, 1.1, 1.2], [0.5, 0.4, 0.6], False),  # the held-out one has recovered
        ([1.0, 1.1, 0.9, 1.1], [0.5, 0.4, 0.3, 0.4], False),  # between the two the trained one was below its start
        ([1.0, 0.9, 0.8], [0.5, 0.4, 0.3], False),  # both fall: nothing is exploited
        ([1.0, 1.1, 1.2], [0.5, 0.5, 0.5], False),  # as good as its best
        ([1.0, 1.1, 1.2, 1.3], [0.5, 0.6, 0.5, 0.5], True),  # below its best, not below its start
    ],
)
def test_patience_counts_looks_in_a_row_at_which_the_two_have_parted(
    trained: list[float], held_out: list[float], stops: bool, watch: EarlyStopping, policy: DiffusionPolicy
) -> None:
    for iteration, numbers in enumerate(zip(trained, held_out, strict=True)):
        assert not watch.should_stop
        watch.note(policy, iteration=iteration, trained=numbers[0], held_out=numbers[1])
    assert watch.should_stop == stops


def test_without_patience_nothing_stops(redness: Any, policy: DiffusionPolicy) -> None:
    watch = EarlyStopping(HeldOut(HELD_OUT, redness), patience=0)
    for iteration in range(5):
        watch.note(policy, iteration=iteration, trained=float(iteration), held_out=-float(iteration))
    assert watch.apart == 4
    assert not watch.should_stop


def test_only_weights_with_which_the_constraint_held_are_kept(redness: Any, policy: DiffusionPolicy) -> None:
    watch = EarlyStopping(HeldOut(HELD_OUT, redness), patience=0, constrained=True)
    looks = [
        ([], 0.9),  # before training nothing is known of the cost
        ([0.3, 0.1], 0.8),
        ([0.1, -0.2], 0.4),  # held on average
        ([0.3, 0.2], 0.7),
        ([-0.1, -0.1], 0.5),
        ([-0.1, -0.1], 0.3),
    ]
    for iteration, (costs, held_out) in enumerate(looks):
        for cost in costs:
            watch.note_cost(cost)
        set_weights(policy, float(iteration))
        watch.note(policy, iteration=iteration, trained=0.0, held_out=held_out)
    assert (watch.best, watch.best_iteration) == (0.5, 4)
    watch.restore(policy)
    assert weights(policy) == {4.0}


@pytest.mark.parametrize(
    ("costs", "held"),
    [
        ([0.04], True),
        ([0.06], False),
        ([0.04] * 16, True),
        ([0.06] * 16, False),
        ([0.0, 0.2] * 8, False),  # 0.10 with a standard error of 0.03
        ([-0.32, 0.5] * 8, True),  # 0.09 with a standard error of 0.11
        ([-0.28, 0.5] * 8, False),  # 0.11 with a standard error of 0.10: more than twice what is tolerated
        ([0.0, 10.0], False),  # noise does not make up for a violation
    ],
)
def test_a_constraint_holds_to_a_twentieth_or_to_its_standard_error(
    redness: Any, policy: DiffusionPolicy, costs: Any, held: bool
) -> None:
    watch = EarlyStopping(HeldOut(HELD_OUT, redness), patience=0, constrained=True)
    for cost in costs:
        watch.note_cost(cost)
    watch.note(policy, iteration=3, trained=0.0, held_out=0.5)
    assert (watch.best_iteration == 3) == held


def test_a_cost_that_is_not_finite_says_nothing(redness: Any, policy: DiffusionPolicy) -> None:
    def watching() -> EarlyStopping:
        return EarlyStopping(HeldOut(HELD_OUT, redness), patience=0, constrained=True)

    watch = watching()
    for cost in (0.04, math.nan, math.inf, 0.03):
        watch.note_cost(cost)
    old = watch.state_dict() | {"costs": [0.04, math.nan]}  # of a run that took notice of it
    watch.note(policy, iteration=3, trained=0.0, held_out=0.5)
    assert watch.best_iteration == 3
    resumed = watching()
    resumed.load_state_dict(old)
    resumed.note(policy, iteration=4, trained=0.0, held_out=0.5)
    assert resumed.best_iteration == 4


def test_without_any_weights_that_count_the_last_ones_stay(redness: Any, policy: DiffusionPolicy) -> None:
    watch = EarlyStopping(HeldOut(HELD_OUT, redness), patience=0, constrained=True)
    watch.note_cost(0.1)
    set_weights(policy, 1.0)
    watch.note(policy, iteration=0, trained=0.0, held_out=0.5)
    set_weights(policy, 2.0)
    watch.restore(policy)
    assert weights(policy) == {2.0}


def test_state_of_a_watch_goes_into_another(watch: EarlyStopping, redness: Any, policy: DiffusionPolicy) -> None:
    other = EarlyStopping(HeldOut(HELD_OUT, redness), patience=2)
    other.load_state_dict(watch.state_dict())  # before any look
    assert (other.start, other.best_iteration) == (None, -1)
    set_weights(policy, 1.0)
    watch.note(policy, iteration=7, trained=0.1, held_out=0.5)
    set_weights(policy, 2.0)
    watch.note(policy, iteration=9, trained=0.2, held_out=0.4)
    watch.note_cost(0.25)
    other.load_state_dict(watch.state_dict())
    assert (other.start, other.best, other.best_iteration, other.apart) == (0.1, 0.5, 7, 1)
    numbers = [{**each.state_dict(), "weights": None} for each in (other, watch)]
    assert numbers[0] == numbers[1]
    assert numbers[0]["costs"] == [0.25]
    other.restore(policy)
    assert weights(policy) == {1.0}


def test_parts_of_the_prompts_add_up_to_the_whole(watch: EarlyStopping, policy: DiffusionPolicy, redness: Any) -> None:
    def measure(part: slice) -> Any:
        return watch.evaluate(policy, Blackness(), part=part, steps=3, guidance=ClassifierFree(2.0))

    whole, parts = measure(slice(0, 3)), [measure(slice(0, 2)), measure(slice(2, 3))]
    assert whole.images.shape == (3, 3, 64, 64)
    torch.testing.assert_close(torch.cat([part.images for part in parts]), whole.images, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat([part.held_out for part in parts]), whole.held_out, rtol=0, atol=1e-5)
    assert torch.equal(whole.held_out, redness(whole.images, HELD_OUT))
    assert torch.equal(whole.trained, -whole.held_out)


def test_same_images_are_looked_at_each_time(watch: EarlyStopping, policy: DiffusionPolicy) -> None:
    looks = [watch.evaluate(policy, Blackness(), part=slice(0, 3), steps=3, guidance=ClassifierFree(1.0)) for _ in "ab"]
    assert torch.equal(looks[0].images, looks[1].images)


def test_prompts_that_are_held_out_are_checked(redness: Any) -> None:
    with pytest.raises(ValueError, match="prompts must not be empty"):
        EarlyStopping(HeldOut([], redness), patience=0)


def test_training_stops_and_goes_back_when_the_trained_reward_is_exploited(
    policy: DiffusionPolicy,
    redness: Any,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
) -> None:
    start = policy.trainable_state()
    config = run_config(iterations=20)
    settings = small(evaluate_every=2, patience=2)
    trainer = ReFLTrainer(policy, redness, prompts, settings, held_out=HeldOut(HELD_OUT, Blackness()))
    trainer.train(config)
    lines = read_metrics(config.output_dir / "metrics.jsonl")
    looks = [(line["iteration"], line["reward/held_out"]) for line in lines if "reward/held_out" in line]
    assert looks[0][1] == max(score for _, score in looks)
    assert looks[-1][0] < 20
    assert max(line["iteration"] for line in lines if "reward/mean" in line) == looks[-1][0] - 1
    assert all(torch.equal(value, start[name]) for name, value in policy.trainable_state().items())
    assert len(list((config.output_dir / "images").glob("held_out-*.png"))) == len(looks)


def test_training_ends_with_the_weights_of_its_best_look(
    policy: DiffusionPolicy,
    redness: Any,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
) -> None:
    trainer = ReFLTrainer(policy, redness, prompts, small(evaluate_every=2), held_out=HeldOut(HELD_OUT, redness))
    config = run_config(iterations=5)
    trainer.train(config)
    watch = trainer.early_stopping
    assert watch is not None
    lines = read_metrics(config.output_dir / "metrics.jsonl")
    looks = {line["iteration"]: line["reward/held_out"] for line in lines if "reward/held_out" in line}
    assert list(looks) == [0, 2, 4, 5]  # and once more after the last iteration
    assert watch.best == max(looks.values())
    assert looks[watch.best_iteration] == watch.best

    def score() -> Tensor:
        look = watch.evaluate(policy, redness, part=slice(0, 3), steps=4, guidance=ClassifierFree(1.0))
        return look.held_out.mean()

    assert float(score()) == pytest.approx(watch.best, abs=1e-6)


@pytest.mark.parametrize("ema_decay", [None, 0.75])
def test_policy_ends_with_the_last_averages_where_the_constraint_held_at_no_look(
    ema_decay: float | None,
    make_policy: Callable[..., DiffusionPolicy],
    redness: Any,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
    green_constraint: Callable[..., Any],
) -> None:
    ends = []
    for name, held_out in (("watched", HeldOut(HELD_OUT, redness)), ("unwatched", None)):
        policy = make_policy(train="xattn-kv")
        constraint = green_constraint(ceiling=1e-9)  # no picture is that dark
        trainer = ReFLTrainer(policy, redness, prompts, small(), erasure=constraint, held_out=held_out)
        trainer.train(run_config(name, iterations=2, ema_decay=ema_decay))
        assert trainer.early_stopping is None or trainer.early_stopping.best_iteration == -1
        ends.append(policy.trainable_state())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
