"""The trainer as a whole: it learns, it is repeatable, and it touches nothing but what it should."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from overpaint.policy import ClassifierFree, DiffusionPolicy
from overpaint.policy.types import Images, PerSample
from overpaint.training import HeldOut, TrainingConfig, TrainingRun, read_metrics
from refl import PretrainingPairs, ReFLConfig, ReFLTrainer

Judge = Callable[[Images, Sequence[str]], PerSample]


def mean_score(policy: DiffusionPolicy, reward: Judge, prompts: list[str]) -> float:
    """Scores the same images before and after training."""
    images = policy.draw(prompts, seeds=range(len(prompts)), steps=4, guidance=ClassifierFree(1.0))
    return float(reward(images, prompts).mean())


def snapshot(policy: DiffusionPolicy) -> dict[str, Tensor]:
    parts = {"unet": policy.unet, "vae": policy.vae, "text_encoder": policy.text_encoder}
    return {
        f"{part}.{name}": value.clone()
        for part, network in parts.items()
        for name, value in network.state_dict().items()
    }


# Learning.


@pytest.mark.parametrize("trained", [{}, {"train": "xattn"}], ids=["lora", "xattn"])
def test_trivial_reward_goes_up(
    trained: dict[str, Any],
    make_policy: Callable[..., DiffusionPolicy],
    policy: DiffusionPolicy,
    redness: Any,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
) -> None:
    tuned = make_policy(**trained) if trained else policy
    before = mean_score(tuned, redness, prompts)
    config = run_config(iterations=12)
    ReFLTrainer(tuned, redness, prompts, small()).train(config)
    # The random decoder normalises its channels, so that their means hardly move: by 0.0013 and 0.0015 here.
    assert mean_score(tuned, redness, prompts) > before + 5e-4

    lines = read_metrics(config.output_dir / "metrics.jsonl")
    rewards = [line["reward/mean"] for line in lines if "reward/mean" in line]
    assert len(rewards) == 12
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4
    assert {line["train/reward_step"] for line in lines if "train/reward_step" in line} == {2, 3}


def test_reward_above_the_margin_does_not_pull(
    policy: DiffusionPolicy,
    redness: Any,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
) -> None:
    metrics = ReFLTrainer(policy, redness, prompts, small(reward_margin=0.0)).train(run_config(iterations=1))
    assert metrics is not None
    assert metrics.grad_norm == metrics.reward_loss == 0.0
    assert metrics.reward > 0.0


# Invariants.


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_micro_batch_size_does_not_change_the_gradient(
    micro_batch_size: int,
    policy: DiffusionPolicy,
    stir: Callable[[DiffusionPolicy], None],
    redness: Any,
    prompts: list[str],
    pairs: PretrainingPairs,
    small: Callable[..., ReFLConfig],
    gradients: Callable[[ReFLTrainer], dict[str, Tensor]],
    assert_equal_gradients: Callable,
    green_constraint: Callable[[], Any],
    make_policy: Callable[..., DiffusionPolicy],
) -> None:
    stir(policy)
    weights = policy.trainable_state()
    taken = []
    for size in (4, micro_batch_size):
        policy.load_trainable_state(weights)
        config = small(micro_batch_size=size, pretraining_weight=0.5)
        trainer = ReFLTrainer(policy, redness, prompts, config, pretraining=pairs, erasure=green_constraint())
        taken.append(gradients(trainer))
    assert_equal_gradients(taken[1], taken[0])


def test_only_the_lora_changes_and_all_of_it_does(
    policy: DiffusionPolicy,
    redness: Any,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
) -> None:
    before = snapshot(policy)
    ReFLTrainer(policy, redness, prompts, small(pretraining_weight=1.0)).train(run_config(iterations=2))
    changed = {name for name, value in snapshot(policy).items() if not torch.equal(value, before[name])}
    assert changed == {f"unet.{name}" for name in policy.trainable_state()}


def test_same_seed_is_the_same_run_and_another_seed_another(
    make_policy: Callable[..., DiffusionPolicy],
    redness: Any,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
) -> None:
    outcomes = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        tuned = make_policy(train="xattn-kv")
        config = run_config(name, seed=seed, iterations=2)
        ReFLTrainer(tuned, redness, prompts, small(pretraining_weight=1.0)).train(config)
        outcomes.append((read_metrics(config.output_dir / "metrics.jsonl"), tuned.trainable_state()))
    one, two, three = outcomes
    assert one[0] == two[0]
    assert all(torch.equal(one[1][name], two[1][name]) for name in one[1])
    assert one[0] != three[0]


def test_every_weight_gets_a_gradient_in_mixed_precision(
    policy: DiffusionPolicy,
    stir: Callable[[DiffusionPolicy], None],
    redness: Any,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
) -> None:
    # Autocast remembers rounded weights; what it remembers from the rollout, which is without gradient, must not be
    # used in the graded step.
    stir(policy)
    before = policy.trainable_state()
    metrics = ReFLTrainer(policy, redness, prompts, small()).train(
        run_config(iterations=1, mixed_precision="bf16", weight_decay=0.0, learning_rate=1e-3)
    )
    assert metrics is not None
    assert metrics.grad_norm > 0
    assert all((value != before[name]).any() for name, value in policy.trainable_state().items())


def test_average_of_the_weights_is_what_training_ends_with(
    make_policy: Callable[..., DiffusionPolicy],
    redness: Any,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
) -> None:
    ends, start = [], make_policy(train="xattn-kv").trainable_state()
    for name, decay in (("last", None), ("average", 0.75)):
        tuned = make_policy(train="xattn-kv")
        ReFLTrainer(tuned, redness, prompts, small()).train(run_config(name, iterations=1, ema_decay=decay))
        ends.append(tuned.trainable_state())
    for name, value in start.items():
        torch.testing.assert_close(ends[1][name], 0.75 * value + 0.25 * ends[0][name])


def test_metrics_are_means_over_the_batch_before_the_update(
    policy: DiffusionPolicy,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
) -> None:
    class Remembering:
        differentiable = True

        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
            scores = images.mean(dim=(1, 2, 3))
            self.seen.append(scores.detach())
            return scores

    reward = Remembering()
    trainer = ReFLTrainer(policy, reward, prompts, small(micro_batch_size=3, reward_margin=0.5))
    with TrainingRun(policy, run_config(iterations=1)) as run:
        metrics = trainer.step(run)
    seen = torch.cat(reward.seen)
    assert len(seen) == 4
    assert metrics.reward == pytest.approx(float(seen.mean()), rel=1e-6)
    assert metrics.reward_loss == pytest.approx(float((0.5 - seen).clamp(min=0).mean()), rel=1e-6, abs=1e-9)


def test_logged_tags_are_those_of_what_is_switched_on(
    policy: DiffusionPolicy,
    redness: Any,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
    green_constraint: Callable[[], Any],
) -> None:
    def tags(name: str, trainer: ReFLTrainer) -> set[str]:
        config = run_config(name, iterations=1)
        trainer.train(config)
        return set().union(*read_metrics(config.output_dir / "metrics.jsonl")) - {"iteration"}

    plain = {"reward/mean", "train/reward_loss", "train/grad_norm", "train/reward_step", "train/distance"}
    plain.add("train/learning_rate")
    assert tags("plain", ReFLTrainer(policy, redness, prompts, small())) == plain
    full = ReFLTrainer(
        policy,
        redness,
        prompts,
        small(pretraining_weight=1.0),
        erasure=green_constraint(),
        held_out=HeldOut(prompts[:2], redness),
    )
    more = {"train/pretraining_loss", "reward/validation", "reward/held_out"}
    more |= {"erasure/violation", "erasure/weight", "erasure/gradient_cosine"}
    assert tags("full", full) == plain | more


def test_every_logged_tag_is_defined_in_the_documentation() -> None:
    root = Path(__file__).resolve().parents[2]
    text = (root / "docs" / "refl.md").read_text(encoding="utf-8")
    source = "".join((root / file).read_text() for file in ("refl/trainer.py", "overpaint/training/loop.py"))
    tags = {word for word in source.split('"') if word.startswith(("reward/", "train/", "erasure/", "floor/"))}
    assert len(tags) == 15
    assert [tag for tag in sorted(tags) if f"| `{tag}` |" not in text] == []


# Numbers that are no numbers.


@pytest.mark.parametrize("where", ["reward", "cost"])
def test_update_that_is_not_finite_is_skipped_and_counted(
    where: str,
    policy: DiffusionPolicy,
    redness: Any,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
    make_constraint: Callable[..., Any],
) -> None:
    class NotANumber:
        differentiable = True

        def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
            return images.mean(dim=(1, 2, 3)) * math.nan

    reward, cost = (NotANumber(), redness) if where == "reward" else (redness, NotANumber())
    constraint = make_constraint(cost)
    before, weight = policy.trainable_state(), constraint.lagrangian.weight
    trainer = ReFLTrainer(policy, reward, prompts, small(), erasure=constraint)
    with TrainingRun(policy, run_config(iterations=1)) as run:
        trainer.step(run)
        assert run.skipped == 1
    assert all(torch.equal(value, before[name]) for name, value in policy.trainable_state().items())
    if where == "cost":
        assert constraint.lagrangian.weight == weight


# Bad input.


def test_reward_that_says_it_has_no_gradient_is_refused(
    policy: DiffusionPolicy, redness: Any, prompts: list[str]
) -> None:
    redness.differentiable = False
    with pytest.raises(ValueError, match=r"reward must be differentiable .* got Redness, .*use DDPO"):
        ReFLTrainer(policy, redness, prompts)


def test_reward_without_the_gradient_it_promises_is_refused_before_any_work(
    policy: DiffusionPolicy,
    detached: Any,
    prompts: list[str],
    run_config: Callable[..., TrainingConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("drew images")

    monkeypatch.setattr(policy, "sample", forbidden)
    with pytest.raises(ValueError, match=r"reward must be differentiable .* got Detached, .*use DDPO"):
        ReFLTrainer(policy, detached, prompts).train(run_config())


def test_reward_whose_gradient_ends_in_its_own_weights_is_refused(
    policy: DiffusionPolicy, prompts: list[str], run_config: Callable[..., TrainingConfig]
) -> None:
    class OwnWeights:
        differentiable = True
        layer = torch.nn.Linear(3, 1)

        def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
            return self.layer(images.detach().mean(dim=(2, 3)))[:, 0]

    with pytest.raises(ValueError, match=r"reward must be differentiable .* got OwnWeights, .*use DDPO"):
        ReFLTrainer(policy, OwnWeights(), prompts).train(run_config())


def test_reward_of_another_shape_is_refused(
    policy: DiffusionPolicy, prompts: list[str], run_config: Callable[..., TrainingConfig]
) -> None:
    class Pixels:
        differentiable = True

        def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
            return images.mean(dim=1)

    with pytest.raises(ValueError, match=r"reward must give one number for each of 2 images, got \(2, 64, 64\)"):
        ReFLTrainer(policy, Pixels(), prompts).train(run_config())


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts must not be empty"),
        ("a cat", "prompts must be a sequence, got 'a cat'"),
        (["a cat", 3], r"prompts\[1\] must be a valid string, got 3"),
    ],
)
def test_bad_prompts_are_refused(
    prompts: Any, message: str, policy: DiffusionPolicy, redness: Any, unchecked: None
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        ReFLTrainer(policy, redness, prompts)


def test_policy_without_trained_weights_is_refused(
    make_policy: Callable[..., DiffusionPolicy], redness: Any, prompts: list[str]
) -> None:
    with pytest.raises(ValueError, match="policy must have trainable weights: load it with lora= or train="):
        ReFLTrainer(make_policy(), redness, prompts)


def test_patience_without_anything_held_out_is_refused(
    policy: DiffusionPolicy, redness: Any, prompts: list[str], small: Callable[..., ReFLConfig]
) -> None:
    with pytest.raises(ValueError, match=r"ReFLConfig\.patience must be 0 without held_out, got 2"):
        ReFLTrainer(policy, redness, prompts, small(patience=2))
