"""Rewards that any picture has, settings that take a moment, and a look at the gradient of an iteration."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor

from erasure import ImageConstraint, Lagrangian, LagrangianConfig
from overpaint.policy import DiffusionPolicy
from overpaint.policy.types import Images, PerSample
from overpaint.training import TrainingConfig, TrainingRun
from refl import PretrainingPairs, ReFLConfig, ReFLTrainer

PROMPTS = ["a red circle", "a blue square", "a cat", "two dogs", "a large green triangle"]


class Redness:
    """The mean of red: as trivial as a differentiable reward can be."""

    differentiable = True

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        return images[:, 0].mean(dim=(1, 2))


class Detached:
    """A reward that says it has a gradient, and has none."""

    differentiable = True

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        return images.detach().mean(dim=(1, 2, 3))


def small_config(**changes: Any) -> ReFLConfig:
    """Settings of a few denoising steps, by default without the pretraining term."""
    settings: dict[str, Any] = {
        "batch_size": 4,
        "micro_batch_size": 4,
        "steps": 4,
        "first_reward_step": 2,
        "last_reward_step": 3,
        "reward_scale": 1.0,
        "pretraining_weight": 0.0,
        "pretraining_batch_size": 4,
        "erasure_batch_size": 4,
    }
    return ReFLConfig(**settings | changes)


def stir_weights(policy: DiffusionPolicy) -> None:
    """Moves every trained weight, so that both halves of a LoRA get a gradient."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


@pytest.fixture
def redness() -> Redness:
    return Redness()


@pytest.fixture
def detached() -> Detached:
    return Detached()


@pytest.fixture
def prompts() -> list[str]:
    return list(PROMPTS)


@pytest.fixture
def small() -> Callable[..., ReFLConfig]:
    return small_config


@pytest.fixture
def stir() -> Callable[[DiffusionPolicy], None]:
    return stir_weights


@pytest.fixture
def run_config(tmp_path: Path) -> Callable[..., TrainingConfig]:
    """Makes settings of a short run in a folder of its own name."""

    def make(name: str = "run", **changes: Any) -> TrainingConfig:
        settings: dict[str, Any] = {"iterations": 3, "learning_rate": 1e-2, "progress": False}
        return TrainingConfig(output_dir=tmp_path / name, **settings | changes)

    return make


@pytest.fixture
def pairs() -> PretrainingPairs:
    """Six random latents with captions."""
    latents = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    return PretrainingPairs(latents, [f"a {word}" for word in ("cat", "dog", "red", "blue", "circle", "square")])


@pytest.fixture
def gradients(tmp_path: Path) -> Callable[[ReFLTrainer], dict[str, Tensor]]:
    """Returns the gradient of one iteration by name of the weight, whatever the clipping does to it later."""

    def of(trainer: ReFLTrainer) -> dict[str, Tensor]:
        config = TrainingConfig(output_dir=tmp_path / "gradients", iterations=1, progress=False)
        taken: dict[str, Tensor] = {}
        with TrainingRun(trainer.policy, config) as run:
            trainer.prepare(run)
            update = run.update

            def look_and_update() -> float:
                names = trainer.policy.trainable_state()
                for name, parameter in zip(names, trainer.policy.trainable_parameters(), strict=True):
                    assert parameter.grad is not None
                    taken[name] = parameter.grad.clone()
                return update()

            run.update = look_and_update
            trainer.step(run)
        return taken

    return of


@pytest.fixture
def assert_equal_gradients() -> Callable[[dict[str, Tensor], dict[str, Tensor]], None]:
    """Compares two gradients: no entry may differ by more than a millionth of the largest one."""

    def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
        assert ours.keys() == theirs.keys()
        largest = max(float(gradient.abs().max()) for gradient in theirs.values())
        assert largest > 0
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-6 * largest, msg=name)

    return compare


class Greenness:
    """The mean of green, which the constraints of these tests keep down."""

    differentiable = True

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        return images[:, 1].mean(dim=(1, 2))


@pytest.fixture
def make_constraint() -> Callable[..., ImageConstraint]:
    """Makes a constraint on images of any cost, with its own prompts."""

    def make(cost: Any, *, ceiling: float = 0.1, **settings: Any) -> ImageConstraint:
        lagrangian = Lagrangian(LagrangianConfig(**settings))
        return ImageConstraint(cost, ["a plain circle", "a striped circle"], lagrangian, ceiling=ceiling)

    return make


@pytest.fixture
def green_constraint(make_constraint: Callable[..., ImageConstraint]) -> Callable[..., ImageConstraint]:
    """Makes the constraint that green stays at or below a ceiling."""

    def make(ceiling: float = 0.1, **settings: Any) -> ImageConstraint:
        return make_constraint(Greenness(), ceiling=ceiling, **settings)

    return make


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Turns the shape checker off, which users do not have: what is tested is the message that they get."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
