"""Levels, steps and densities of rectified flow are those of the authors' code."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from golden_case import GoldenCase
from torch import Tensor

from overpaint.policy.ddim import gaussian_log_prob
from overpaint.policy.flow import (
    clean_of,
    deviation_and_direction,
    flow_mean_and_std,
    flow_schedule,
    mean_slope,
    noise_of,
    noised,
    shift_of,
)
from overpaint.policy.types import Plan

RELEASED = ("sde", "cps", "dance")
"""Chains that the authors' code has."""
CASE = GoldenCase("flow/flow_step")
COMBINATIONS = CASE.record["combinations"]
BASE = {
    "num_train_timesteps": 1000,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


def schedule_of(combination: Any) -> Plan:
    config = {**BASE, **dict(combination["scheduler"])}
    dynamic = "use_dynamic_shifting" in combination["scheduler"]
    tokens = combination["image_tokens"] if dynamic else None
    return flow_schedule(config, combination["steps"], tokens=tokens, even=dynamic)


def check(name: str, found: Tensor) -> None:
    expected = CASE.tensors[name]
    tolerance = CASE._content["tensors"][name]["tol"]
    bound = tolerance * (expected.abs().max().item() or 1.0)
    torch.testing.assert_close(
        found.to(expected.dtype), expected, rtol=0, atol=bound, msg=lambda text: f"{name}: {text}"
    )


def batches() -> Iterator[tuple[Any, str, list[int]]]:
    for combination in COMBINATIONS:
        for name, steps in combination["rows"].items():
            yield combination, f"{combination['prefix']}/{name}", list(steps)


@pytest.mark.parametrize("combination", COMBINATIONS, ids=lambda one: one["prefix"])
def test_levels_are_those_of_the_pipelines(combination: Any) -> None:
    plan = schedule_of(combination)
    check(f"{combination['prefix']}/sigmas", torch.cat([plan.levels, plan.next_levels[-1:]]))
    check(f"{combination['prefix']}/timesteps", plan.timesteps)
    if "mu" in combination:
        assert shift_of(BASE, combination["image_tokens"]) == pytest.approx(combination["mu"], abs=1e-9)


@pytest.mark.parametrize(
    ("combination", "prefix", "steps"), list(batches()), ids=lambda one: one if type(one) is str else ""
)
def test_predictions_steps_and_densities(combination: Any, prefix: str, steps: list[int]) -> None:
    plan, row = schedule_of(combination), CASE.tensors.under(f"{prefix}/")
    latents, velocity, noise = row["latents"], row["velocity"], row["noise"]
    levels, following = plan.levels[steps], plan.next_levels[steps]
    check(f"{prefix}/clean", clean_of(latents, velocity, levels))
    check(f"{prefix}/epsilon", noise_of(latents, velocity, levels))
    check(f"{prefix}/noised", noised(latents, noise, levels))
    second = plan.levels[1]
    for chain in RELEASED:
        still, std = flow_mean_and_std(latents, velocity, levels, following, eta=0.0, chain=chain, second_level=second)
        check(f"{prefix}/euler", still)
        assert not std.any()

        eta = combination["noise_level"][chain]
        learned = velocity.clone().requires_grad_()
        mean, std = flow_mean_and_std(latents, learned, levels, following, eta=eta, chain=chain, second_level=second)
        check(f"{prefix}/{chain}/mean", mean)
        if f"{chain}/std" not in row:  # a step without a density
            assert std.min() == 0
            continue
        check(f"{prefix}/{chain}/std", std)
        after = mean.detach() + std.view(-1, 1, 1, 1) * noise
        check(f"{prefix}/{chain}/next", after)
        log_probs = gaussian_log_prob(row[f"{chain}/next"].double(), mean.double(), std.double())
        check(f"{prefix}/{chain}/log_prob", log_probs)
        (gradient,) = torch.autograd.grad(log_probs.sum(), [learned])
        check(f"{prefix}/{chain}/log_prob_grad", gradient)
        if chain == "cps":
            check(f"{prefix}/cps/log_prob_released", -(row["cps/next"] - mean).square().flatten(1).mean(dim=1))


def test_even_levels_are_fluxs_and_others_end_at_the_smallest_of_training() -> None:
    assert flow_schedule(BASE, 4, even=True).levels.tolist() == [1.0, 0.75, 0.5, 0.25]
    assert flow_schedule(BASE, 4, even=False).levels.tolist() == pytest.approx([1.0, 0.667, 0.334, 0.001])


@pytest.mark.parametrize("chain", RELEASED)
def test_slope_is_how_far_a_mean_moves(chain: Any) -> None:
    plan = schedule_of(COMBINATIONS[0])
    options = {"eta": 0.6, "chain": chain, "second_level": plan.levels[1]}
    zero = torch.zeros(len(plan.levels), 4, 1, 1)
    at_one, _ = flow_mean_and_std(zero, zero + 1, plan.levels, plan.next_levels, **options)
    torch.testing.assert_close(
        mean_slope(plan.levels, plan.next_levels, **options), at_one[:, 0, 0, 0].abs(), rtol=1e-5, atol=1e-7
    )


def test_cps_keeps_the_level_of_the_noise_as_ddim_does() -> None:
    plan = schedule_of(COMBINATIONS[0])
    std, direction = deviation_and_direction(
        plan.levels, plan.next_levels, eta=0.8, chain="cps", second_level=plan.levels[1]
    )
    torch.testing.assert_close(std.square() + direction.square(), plan.next_levels.double().square())


def test_impossible_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        flow_schedule(BASE, 0, even=True)
    with pytest.raises(ValueError, match="tokens must be given to a schedule that is shifted by size, got None"):
        flow_schedule({**BASE, "use_dynamic_shifting": True}, 4, even=True)
