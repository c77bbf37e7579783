"""The size of the images, the pictures that are logged, and what a run records of it all."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from overpaint.policy import ClassifierFree, DiffusionPolicy
from overpaint.policy.digest import policy_record
from overpaint.policy.types import Images, PerSample
from overpaint.training import HeldOut, TrainingConfig, read_run_record
from refl import ReFLConfig, ReFLTrainer, pairs_from_policy


class Sizes:
    """The mean of red; remembers the size of everything it saw, and the prompts."""

    differentiable = True

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []
        self.prompts: list[list[str]] = []

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        self.seen.append(tuple(images.shape[2:]))
        self.prompts.append(list(prompts))
        return images[:, 0].mean(dim=(1, 2))


@pytest.mark.parametrize("settings", [{}, {"low_variance_noises": 2}, {"truncation_steps": 2}])
def test_every_image_has_the_size_of_the_settings(
    settings: dict[str, Any],
    policy: DiffusionPolicy,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
    make_constraint: Callable[..., Any],
) -> None:
    reward, cost, other = Sizes(), Sizes(), Sizes()
    config = small(height=32, width=48, pretraining_weight=1.0, pretraining_pairs=6, **settings)
    trainer = ReFLTrainer(
        policy, reward, prompts, config, erasure=make_constraint(cost), held_out=HeldOut(["a dog"], other)
    )
    assert trainer.train(run_config(iterations=1)) is not None
    assert set(reward.seen) == set(cost.seen) == set(other.seen) == {(32, 48)}
    assert trainer.pretraining is not None
    assert trainer.pretraining.latents.shape == (6, 4, 4, 6)


def test_pairs_of_another_size_are_drawn_in_it(policy: DiffusionPolicy) -> None:
    pairs = pairs_from_policy(policy, ["a cat"], count=1, steps=2, height=32, seed=3)
    alone = policy.sample(policy.encode(["a cat"]), steps=2, seeds=[3], height=32, guidance=ClassifierFree(5.0))
    assert torch.equal(pairs.latents, alone)


@pytest.mark.parametrize("side", ["height", "width"])
def test_side_that_the_vae_cannot_make_is_refused_at_once(
    side: str, policy: DiffusionPolicy, prompts: list[str], small: Callable[..., ReFLConfig]
) -> None:
    with pytest.raises(
        ValueError, match=rf"ReFLConfig.{side} must be a positive multiple of the VAE's factor 8, got 36"
    ):
        ReFLTrainer(policy, Sizes(), prompts, small(**{side: 36}))


@pytest.mark.parametrize(
    ("batch", "asked", "drawn"), [(4, None, 16), (16, None, 64), (64, None, 64), (80, None, 80), (4, 6, 6)]
)
def test_number_of_pairs_that_are_drawn(
    batch: int,
    asked: int | None,
    drawn: int,
    small: Callable[..., ReFLConfig],
) -> None:
    config = small(pretraining_batch_size=batch, pretraining_pairs=asked)
    assert config.pool == drawn


def test_drawing_of_pairs_and_training_have_named_bars(
    policy: DiffusionPolicy,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
    capsys: pytest.CaptureFixture,
) -> None:
    config = small(pretraining_weight=1.0, pretraining_pairs=4)
    ReFLTrainer(policy, Sizes(), prompts, config).train(run_config(iterations=1, progress=True))
    shown = capsys.readouterr().err
    assert "pretraining pairs: 100%" in shown
    assert "ReFL: 100%" in shown


def test_pictures_of_training_prompts_are_logged_where_nothing_is_held_out(
    policy: DiffusionPolicy,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
) -> None:
    reward, config = Sizes(), run_config(iterations=3)
    ReFLTrainer(policy, reward, [*prompts, prompts[0]], small(evaluate_every=2)).train(config)
    names = sorted(path.name for path in (config.output_dir / "images").iterdir())
    assert names == [f"training_prompts-00000{iteration}.png" for iteration in (0, 2, 3)]
    assert reward.prompts.count(prompts) == 3


def test_logged_pictures_change_nothing_of_the_training(
    policy: DiffusionPolicy,
    make_policy: Callable[..., DiffusionPolicy],
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
) -> None:
    other = make_policy(lora=policy.lora)
    ReFLTrainer(policy, Sizes(), prompts, small(evaluate_every=1)).train(run_config("often"))
    ReFLTrainer(other, Sizes(), prompts, small(evaluate_every=100)).train(run_config("seldom"))
    for name, value in policy.trainable_state().items():
        assert torch.equal(value, other.trainable_state()[name]), name


def test_record_holds_what_made_the_result(
    policy: DiffusionPolicy,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
    make_constraint: Callable[..., Any],
) -> None:
    config, weights = run_config(iterations=1), policy_record(policy, untrained=True)["weights"]
    trainer = ReFLTrainer(
        policy, Sizes(), prompts, small(), erasure=make_constraint(Sizes()), held_out=HeldOut(["a dog"], Sizes())
    )
    trainer.train(config, notes={"model": "a/b", "erasure": {"method": "UCE"}})
    record = read_run_record(config.output_dir)
    assert record["run"]["name"] == "ReFL"
    assert (record["model"]["weights"], record["model"]["lora"]["rank"]) == (weights, 4)
    assert record["reward"]["class"].endswith("Sizes")
    assert record["prompts"]["count"] == len(prompts)
    assert record["held_out"]["prompts"]["first"] == ["a dog"]
    assert record["erasure"]["prompts"]["count"] > 0
    assert "learning_rate" in record["erasure"]["lagrangian"]
    assert record["notes"] == {"model": "a/b", "erasure": {"method": "UCE"}}
    assert record["settings"]["refl"]["batch_size"] == 4
