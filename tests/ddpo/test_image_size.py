"""The size of the images that the trainers by sampling draw, and the names of their bars."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from ddpo import DDPOConfig, DDPOTrainer, RWRConfig, RWRTrainer
from overpaint.policy import DiffusionPolicy
from overpaint.policy.types import Images, PerSample
from overpaint.training import HeldOut, TrainingConfig, read_run_record


class Sizes:
    """The mean of red; remembers the size of everything it saw."""

    differentiable = False

    def __init__(self) -> None:
        self.seen: set[tuple[int, ...]] = set()

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        self.seen.add(tuple(images.shape[2:]))
        return images[:, 0].mean(dim=(1, 2))


def ddpo(policy: DiffusionPolicy, *arguments: Any, held_out: HeldOut | None = None, **size: Any) -> DDPOTrainer:
    config = DDPOConfig(
        samples_per_round=4, updates_per_round=2, sampling_batch_size=2, minibatch_size=2, steps=2, **size
    )
    return DDPOTrainer(policy, *arguments, config, held_out=held_out)


def rwr(policy: DiffusionPolicy, *arguments: Any, held_out: HeldOut | None = None, **size: Any) -> RWRTrainer:
    config = RWRConfig(
        samples_per_round=4, sampling_batch_size=2, epochs_per_round=1, batch_size=2, minibatch_size=2, steps=2, **size
    )
    return RWRTrainer(policy, *arguments, config, held_out=held_out)


@pytest.mark.parametrize(("make", "name"), [(ddpo, "DDPO"), (rwr, "RWR")])
def test_every_image_has_the_size_of_the_settings(
    make: Callable[..., DDPOTrainer | RWRTrainer],
    name: str,
    policy: DiffusionPolicy,
    prompts: list[str],
    run_config: Callable[..., TrainingConfig],
    capsys: pytest.CaptureFixture,
) -> None:
    reward, other, config = Sizes(), Sizes(), run_config(iterations=1, progress=True)
    trainer = make(policy, reward, prompts, held_out=HeldOut(["a dog"], other), height=32, width=48)
    assert trainer.train(config, notes={"task": "red"}) is not None
    assert reward.seen == other.seen == {(32, 48)}
    assert f"{name}: 100%" in capsys.readouterr().err
    record = read_run_record(config.output_dir)
    assert (record["run"]["name"], record["notes"], record["prompts"]["count"]) == (name, {"task": "red"}, len(prompts))


@pytest.mark.parametrize("side", ["height", "width"])
@pytest.mark.parametrize("make", [ddpo, rwr])
def test_side_that_the_vae_cannot_make_is_refused_at_once(
    make: Callable[..., Any], side: str, policy: DiffusionPolicy, prompts: list[str]
) -> None:
    with pytest.raises(ValueError, match=rf"Config.{side} must be a positive multiple of the VAE's factor 8, got 36"):
        make(policy, Sizes(), prompts, **{side: 36})
