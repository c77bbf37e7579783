"""Settings of DDPO and of reward-weighted regression: what is refused, and what is just allowed."""

import re
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from typing import Any

import jaxtyping
import pytest

from ddpo import DDPOConfig, RWRConfig

INFINITY, NAN = float("inf"), float("nan")
ROUND = {"samples_per_round": 12, "erasure_samples_per_round": 12}


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Turns the type checker off, which users do not have and which would refuse a wrong word first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"estimator": "reinforce"}, "estimator must be 'importance' or 'score', got 'reinforce'"),
        ({"baseline": "none"}, "baseline must be 'prompt', 'group', 'centred', 'round' or 'critic', got 'none'"),
        ({"step_weights": "none"}, "step_weights must be 'equal' or 'signal', got 'none'"),
        ({"samples_per_round": 0}, "samples_per_round must be at least 1, got 0"),
        ({"updates_per_round": 0}, "updates_per_round must be at least 1, got 0"),
        ({"sampling_batch_size": 0}, "sampling_batch_size must be at least 1, got 0"),
        ({"minibatch_size": -8}, "minibatch_size must be at least 1, got -8"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"images_per_prompt": 0}, "images_per_prompt must be at least 1, got 0"),
        ({"buffer_size": 0}, "buffer_size must be at least 1, got 0"),
        ({"min_count": 0}, "min_count must be at least 1, got 0"),
        ({"erasure_samples_per_round": 0}, "erasure_samples_per_round must be at least 1, got 0"),
        ({"evaluate_every": 0}, "evaluate_every must be at least 1, got 0"),
        ({"kl_every": 0}, "kl_every must be at least 1, got 0"),
        ({"pictures_every": 0}, "pictures_every must be at least 1, got 0"),
        ({"estimator": "score"}, "updates_per_round must be 1 with 'score', got 4"),
        ({"samples_per_round": 250}, "samples_per_round must divide evenly among updates_per_round=4, got 250"),
        ({"min_count": 33}, "min_count must be at most buffer_size=32, got 33"),
        ({"images_per_prompt": 3}, "samples_per_round must divide by images_per_prompt=3, got 256"),
        ({"baseline": "group"}, "images_per_prompt must be at least 2 with 'group', got 1"),
        ({"baseline": "centred"}, "images_per_prompt must be at least 2 with 'centred', got 1"),
        ({"eta": 0.0}, "eta must be above 0, got 0.0"),
        ({"eta": 1.01}, "eta must be at most 1, got 1.01"),
        ({"eta": NAN}, "eta must be a finite number, got nan"),
        ({"clip_range": 0.0}, "clip_range must be above 0, got 0.0"),
        ({"clip_range": 1.0}, "clip_range must be below 1, got 1.0"),
        ({"clip_range": NAN}, "clip_range must be a finite number, got nan"),
        ({"max_advantage": 0.0}, "max_advantage must be above 0, got 0.0"),
        ({"max_advantage": NAN}, "max_advantage must be above 0, got nan"),
        ({"timestep_fraction": 0.0}, "timestep_fraction must be above 0, got 0.0"),
        ({"timestep_fraction": 1.1}, "timestep_fraction must be at most 1, got 1.1"),
        ({"guidance_scale": -0.1}, "guidance_scale must be at least 0, got -0.1"),
        ({"guidance_scale": INFINITY}, "guidance_scale must be a finite number, got inf"),
        ({"kl_weight": -1.0}, "kl_weight must be at least 0, got -1.0"),
        ({"kl_weight": NAN}, "kl_weight must be a finite number, got nan"),
        ({"patience": -1}, "patience must be at least 0, got -1"),
    ],
    ids=lambda value: None if isinstance(value, str) else ",".join(f"{k}={v}" for k, v in value.items()),
)
def test_ddpo_setting_that_breaks_its_rule_is_named_with_rule_and_value(
    changes: dict[str, Any], message: str, unchecked: None
) -> None:
    with pytest.raises(ValueError, match=f"^DDPOConfig\\.{re.escape(message)}$"):
        DDPOConfig(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"estimator": "score", "updates_per_round": 1},
        {"updates_per_round": 12, **ROUND},
        {"samples_per_round": 4, "updates_per_round": 4},
        {"updates_per_round": 1, "samples_per_round": 1, "erasure_samples_per_round": 1},
        {"baseline": "group", "images_per_prompt": 2},
        {"baseline": "centred", "images_per_prompt": 2},
        {"baseline": "group", "images_per_prompt": 64},
        {"steps": 1, "timestep_fraction": 1e-6},
        {"eta": 1.0, "clip_range": 0.999, "max_advantage": INFINITY},
        {"eta": 1e-3, "clip_range": 1e-9, "guidance_scale": 0.0, "kl_weight": 0.0},
        {"buffer_size": 1, "min_count": 1, "evaluate_every": 1, "pictures_every": 1, "patience": 0},
        {"minibatch_size": 1, "sampling_batch_size": 1},
        {"step_weights": "signal", "timestep_fraction": 1.0},
    ],
    ids=str,
)
def test_ddpo_settings_at_the_edge_of_their_rules_are_taken(changes: dict[str, Any]) -> None:
    DDPOConfig(**changes)


@pytest.mark.parametrize(
    ("steps", "fraction", "trained"), [(50, 1.0, 50), (50, 0.5, 25), (50, 0.001, 1), (3, 0.5, 2), (1, 1.0, 1)]
)
def test_trained_steps_are_at_least_one(steps: int, fraction: float, trained: int) -> None:
    assert DDPOConfig(steps=steps, timestep_fraction=fraction).trained_of(steps) == trained


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weighting": "linear"}, "weighting must be 'softmax' or 'sparse', got 'linear'"),
        ({"samples_per_round": 0}, "samples_per_round must be at least 1, got 0"),
        ({"sampling_batch_size": 0}, "sampling_batch_size must be at least 1, got 0"),
        ({"epochs_per_round": 0}, "epochs_per_round must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"minibatch_size": 0}, "minibatch_size must be at least 1, got 0"),
        ({"steps": -1}, "steps must be at least 1, got -1"),
        ({"evaluate_every": 0}, "evaluate_every must be at least 1, got 0"),
        ({"eta": -0.1}, "eta must be at least 0, got -0.1"),
        ({"eta": 1.1}, "eta must be at most 1, got 1.1"),
        ({"guidance_scale": -1.0}, "guidance_scale must be at least 0, got -1.0"),
        ({"guidance_scale": NAN}, "guidance_scale must be a finite number, got nan"),
        ({"inverse_temperature": -0.2}, "inverse_temperature must be at least 0, got -0.2"),
        ({"inverse_temperature": INFINITY}, "inverse_temperature must be a finite number, got inf"),
        ({"percentile": 100.0}, "percentile must be below 100, got 100.0"),
        ({"percentile": -1.0}, "percentile must be at least 0, got -1.0"),
        ({"patience": -1}, "patience must be at least 0, got -1"),
    ],
    ids=lambda value: None if isinstance(value, str) else ",".join(f"{k}={v}" for k, v in value.items()),
)
def test_rwr_setting_that_breaks_its_rule_is_named_with_rule_and_value(
    changes: dict[str, Any], message: str, unchecked: None
) -> None:
    with pytest.raises(ValueError, match=f"^RWRConfig\\.{re.escape(message)}$"):
        RWRConfig(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"eta": 0.0, "percentile": 0.0, "inverse_temperature": 0.0, "guidance_scale": 0.0},
        {"eta": 1.0, "percentile": 99.9},
        dict.fromkeys(("samples_per_round", "epochs_per_round", "batch_size", "minibatch_size", "steps"), 1),
        {"batch_size": 3, "minibatch_size": 8},
    ],
    ids=str,
)
def test_rwr_settings_at_the_edge_of_their_rules_are_taken(changes: dict[str, Any]) -> None:
    RWRConfig(**changes)


@pytest.mark.parametrize("config", [DDPOConfig(), RWRConfig()], ids=["ddpo", "rwr"])
def test_settings_cannot_be_changed_afterwards(config: Any) -> None:
    with pytest.raises(FrozenInstanceError):
        config.steps = 3
