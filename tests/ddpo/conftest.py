"""A reward that any picture has, and settings of a short run; `policy` is the tiny one of the folder above."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from overpaint.policy.types import Images, PerSample
from overpaint.training import TrainingConfig

PROMPTS = ["a red circle", "a blue square", "a cat", "two dogs", "a large green triangle"]


class Redness:
    """The mean of red, as a judge that has no gradient."""

    differentiable = False

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        return images[:, 0].mean(dim=(1, 2))


@pytest.fixture
def redness() -> Redness:
    return Redness()


@pytest.fixture
def prompts() -> list[str]:
    return list(PROMPTS)


@pytest.fixture
def run_config(tmp_path: Path) -> Callable[..., TrainingConfig]:
    """Makes settings of a short run in a folder of its own name."""

    def make(name: str = "run", **changes: Any) -> TrainingConfig:
        settings: dict[str, Any] = {"iterations": 2, "learning_rate": 1e-2, "progress": False}
        return TrainingConfig(output_dir=tmp_path / name, **settings | changes)

    return make
