"""Plain functions of images and prompts as rewards of DDPO and RWR."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from torch import Tensor

from ddpo import DDPOConfig, DDPOTrainer, RewardError, RWRConfig, RWRTrainer, ScoringConfig
from overpaint.policy import DiffusionPolicy
from overpaint.training import HeldOut, TrainingConfig, read_metrics
from rewards import WeightedSum


def by_numpy(images: Tensor, prompts: Sequence[str]) -> Any:
    return images.numpy()[:, 0].mean(axis=(1, 2))


def small_ddpo(**changes: Any) -> DDPOConfig:
    settings: dict[str, Any] = {"samples_per_round": 4, "sampling_batch_size": 4, "minibatch_size": 4, "steps": 4}
    return DDPOConfig(**settings | changes)


def small_rwr(**changes: Any) -> RWRConfig:
    settings: dict[str, Any] = {"samples_per_round": 4, "sampling_batch_size": 4, "batch_size": 4, "steps": 4}
    return RWRConfig(**settings | changes)


TRAINERS = [(DDPOTrainer, small_ddpo), (RWRTrainer, small_rwr)]


@pytest.mark.parametrize(("trainer", "config"), TRAINERS)
def test_a_function_without_a_gradient_trains_as_the_same_reward_does(
    trainer: Any,
    config: Callable[..., Any],
    make_policy: Callable[..., DiffusionPolicy],
    redness: Any,
    prompts: list[str],
    run_config: Callable[..., TrainingConfig],
) -> None:
    runs = []
    for name, reward in (("reward", redness), ("function", by_numpy), ("sum", WeightedSum([by_numpy], [1.0]))):
        settings = run_config(name, iterations=1)
        held_out = HeldOut(prompts, lambda images, prompts: [1.0] * len(prompts))
        policy = make_policy(train="xattn")
        trainer(policy, reward, prompts, config(evaluate_every=1), held_out=held_out).train(settings)
        lines = read_metrics(settings.output_dir / "metrics.jsonl")
        runs.append([line["reward/mean"] for line in lines if "reward/mean" in line])
        assert {line["reward/held_out"] for line in lines if "reward/held_out" in line} == {1.0}
    assert len(runs[0]) == 1
    assert runs[0] == pytest.approx(runs[1], rel=1e-6)
    assert runs[0] == pytest.approx(runs[2], rel=1e-6)


@pytest.mark.parametrize(("trainer", "config"), TRAINERS)
def test_a_wrong_number_of_scores_is_told_with_the_functions_name_and_not_tried_again(
    trainer: Any,
    config: Callable[..., Any],
    make_policy: Callable[..., DiffusionPolicy],
    prompts: list[str],
    run_config: Callable[..., TrainingConfig],
) -> None:
    calls = []

    def mean_of_all(images: Tensor, prompts: Sequence[str]) -> float:
        calls.append(len(images))
        return float(images.mean())

    message = "at try 1 of 2, with ScoresError: the reward mean_of_all must give one number for each of 4 images"
    with pytest.raises(RewardError, match=message):
        trainer(make_policy(train="xattn"), mean_of_all, prompts, config(), scoring=ScoringConfig(attempts=2)).train(
            run_config()
        )
    assert calls == [4]


@pytest.mark.parametrize(("trainer", "config"), TRAINERS)
def test_what_is_no_reward_is_refused_by_the_constructor(
    trainer: Any,
    config: Callable[..., Any],
    make_policy: Callable[..., DiffusionPolicy],
    redness: Any,
    prompts: list[str],
) -> None:
    for reward, found in ((type(redness), "the class Redness"), (lambda images: [], "<lambda>")):
        with pytest.raises(TypeError, match=rf"reward must be callable with \(images, prompts\), got {found}"):
            trainer(make_policy(train="xattn"), reward, prompts, config())
