"""Settings of ReFL: what is refused, and the loss that a margin makes."""

from typing import Any

import pytest
import torch

from refl import ReFLConfig, hinge


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"micro_batch_size": 0}, "micro_batch_size must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"truncation_steps": 0}, "truncation_steps must be at least 1, got 0"),
        ({"pretraining_batch_size": -1}, "pretraining_batch_size must be at least 1, got -1"),
        ({"erasure_batch_size": 0}, "erasure_batch_size must be at least 1, got 0"),
        ({"evaluate_every": 0}, "evaluate_every must be at least 1, got 0"),
        ({"low_variance_noises": -1}, "low_variance_noises must be at least 0, got -1"),
        ({"patience": -1}, "patience must be at least 0, got -1"),
        ({"last_reward_step": 40}, r"last_reward_step must be below steps=40, got 40"),
        ({"last_reward_step": -1}, r"last_reward_step must be at least 0, got -1"),
        (
            {"first_reward_step": 39, "last_reward_step": 38},
            r"first_reward_step must be at most last_reward_step=38",
        ),
        ({"first_reward_step": -1}, r"first_reward_step must be at least 0, got -1"),
        ({"truncation_steps": 32}, "truncation_steps must be at most first_reward_step \\+ 1 = 31, got 32"),
        (
            {"truncation_steps": 2, "low_variance_noises": 2},
            "truncation_steps must be 1 with low_variance_noises, got 2",
        ),
        ({"eta": 1.1}, r"eta must be at most 1, got 1.1"),
        ({"eta": -0.1}, r"eta must be at least 0, got -0.1"),
        ({"guidance_scale": -1.0}, "guidance_scale must be at least 0, got -1.0"),
        ({"pretraining_weight": float("inf")}, "pretraining_weight must be a finite number, got inf"),
        ({"reward_scale": 0.0}, "reward_scale must be above 0, got 0.0"),
        ({"reward_scale": float("nan")}, "reward_scale must be a finite number, got nan"),
        ({"reward_margin": float("inf")}, "reward_margin must be a finite number, got inf"),
    ],
)
def test_setting_that_breaks_its_rule_is_named_with_rule_and_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^ReFLConfig.{message}"):
        ReFLConfig(**changes)


@pytest.mark.parametrize(
    "changes",
    [{"truncation_steps": 31}, {"first_reward_step": 39}, {"steps": 1, "first_reward_step": 0, "last_reward_step": 0}],
)
def test_settings_at_the_edge_of_their_rules_are_taken(changes: dict[str, Any]) -> None:
    ReFLConfig(**changes)


def test_hinge_by_hand() -> None:
    rewards = torch.tensor([-1.0, 0.5, 2.0, 3.0], requires_grad=True)
    values = hinge(rewards, margin=2.0)
    assert values.tolist() == [3.0, 1.5, 0.0, 0.0]
    values.sum().backward()
    assert rewards.grad is not None
    assert rewards.grad.tolist() == [-1.0, -1.0, 0.0, 0.0]
