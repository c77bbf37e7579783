"""Plain functions of images and prompts as rewards of ReFL, whose gradient is found out by trying."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy
import pytest
from torch import Tensor, nn

from erasure import ImageConstraint
from overpaint.policy import DiffusionPolicy
from overpaint.training import HeldOut, TrainingConfig, read_metrics
from refl import ReFLConfig, ReFLTrainer
from rewards import WeightedSum


def red(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images[:, 0].mean(dim=(1, 2))


def column(images: Tensor, prompts: Sequence[str]) -> list[Tensor]:
    return [image[0].mean()[None] for image in images]


class RedNetwork(nn.Module):
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images[:, 0].mean(dim=(1, 2))


def lengths(images: Tensor, prompts: Sequence[str]) -> list[int]:
    return [len(prompt) for prompt in prompts]


def rewards_of(config: TrainingConfig) -> list[float]:
    lines = read_metrics(config.output_dir / "metrics.jsonl")
    return [line[tag] for line in lines if "reward/mean" in line for tag in ("reward/mean", "train/grad_norm")]


@pytest.mark.parametrize("function", [red, column, RedNetwork(), WeightedSum([red], [1.0])])
def test_a_function_trains_as_the_same_reward_does(
    function: Any,
    make_policy: Callable[..., DiffusionPolicy],
    redness: Any,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
) -> None:
    runs = []
    for name, reward in (("reward", redness), ("function", function)):
        config = run_config(name, iterations=2)
        ReFLTrainer(make_policy(train="xattn"), reward, prompts, small()).train(config)
        runs.append(rewards_of(config))
    assert len(runs[0]) == 4
    assert runs[0] == pytest.approx(runs[1])


def test_functions_are_held_out_and_constrain(
    policy: DiffusionPolicy,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
) -> None:
    config = run_config(iterations=1)
    trainer = ReFLTrainer(
        policy,
        red,
        prompts,
        small(evaluate_every=1),
        erasure=ImageConstraint(red, prompts, ceiling=0.25),
        held_out=HeldOut(prompts, lengths),
    )
    metrics = trainer.train(config)
    assert metrics is not None
    assert metrics.erasure_violation > 0
    lines = read_metrics(config.output_dir / "metrics.jsonl")
    held_out = [line["reward/held_out"] for line in lines if "reward/held_out" in line]
    assert held_out[0] == pytest.approx(sum(map(len, prompts)) / len(prompts))


def by_numpy(images: Tensor, prompts: Sequence[str]) -> Any:
    return images.numpy().mean(axis=(1, 2, 3))


def by_array(images: Tensor, prompts: Sequence[str]) -> Any:
    return [float(numpy.asarray(image).mean()) for image in images]


def above_half(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return (images > 0.5).float().mean(dim=(1, 2, 3))


@pytest.mark.parametrize("function", [by_numpy, by_array, above_half, lengths])
def test_a_function_without_a_gradient_is_refused_before_any_work(
    function: Any,
    policy: DiffusionPolicy,
    prompts: list[str],
    run_config: Callable[..., TrainingConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(DiffusionPolicy, "draw", lambda *_, **__: pytest.fail("it has drawn images"))
    message = f"reward must be differentiable in the images for ReFL, got {function.__name__}, .*; use DDPO"
    with pytest.raises(ValueError, match=message):
        ReFLTrainer(policy, function, prompts).train(run_config())
    with pytest.raises(ValueError, match="reward must be differentiable"):
        ReFLTrainer(policy, WeightedSum([function], [2.0]), prompts[:1]).train(run_config("sum"))


def mean_of_all(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.mean()


def broken(images: Tensor, prompts: Sequence[str]) -> Tensor:
    raise RuntimeError("my own fault")


def of_nothing(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return (images * 0).sum(dim=(1, 2, 3)).sqrt()


def not_a_number(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.mean(dim=(1, 2, 3)) * float("nan")


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (mean_of_all, ValueError, "the reward mean_of_all must give one number for each of 2 images, got one number"),
        (broken, RuntimeError, "my own fault"),
        (of_nothing, ValueError, "reward must have a finite gradient, got one of of_nothing that is not"),
        (not_a_number, ValueError, "reward must have a finite score, got one of not_a_number that is not"),
    ],
)
def test_what_is_wrong_with_a_function_is_told_before_any_work(
    function: Any,
    error: type[Exception],
    message: str,
    policy: DiffusionPolicy,
    prompts: list[str],
    run_config: Callable[..., TrainingConfig],
) -> None:
    with pytest.raises(error, match=message):
        ReFLTrainer(policy, function, prompts).train(run_config())


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_called_is_refused_by_the_constructor(
    policy: DiffusionPolicy, redness: Any, prompts: list[str]
) -> None:
    with pytest.raises(TypeError, match=r"reward must be callable with .* the class Redness itself"):
        ReFLTrainer(policy, type(redness), prompts)
    with pytest.raises(TypeError, match=r"HeldOut\.reward must be an instance of Reward or callable, got 3"):
        ReFLTrainer(policy, red, prompts, held_out=HeldOut(prompts, 3))  # ty: ignore[invalid-argument-type]


def test_it_is_tried_on_two_images_of_the_policys_size(
    policy: DiffusionPolicy, prompts: list[str], small: Callable[..., ReFLConfig], run_config: Callable
) -> None:
    sizes = []

    def noted(images: Tensor, prompts: Sequence[str]) -> Tensor:
        sizes.append((tuple(images.shape), list(prompts)))
        return red(images, prompts)

    ReFLTrainer(policy, noted, prompts[:1], small()).train(run_config(iterations=1))
    side = policy.image_size
    assert sizes[0] == ((2, 3, side, side), [prompts[0], prompts[0]])
