"""Before the first update of a round nothing has changed, and every ratio says so, in any precision and any shape."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpo import DDPOConfig, DDPOMetrics, DDPOTrainer, gradient
from ddpo.gradient import PolicyGradient
from overpaint.policy import DiffusionPolicy, LoRAConfig, Trajectory
from overpaint.training import TrainingConfig, TrainingRun

SAMPLING = 8
"""Images that are drawn at a time."""

MINIBATCHES = (1, 2, 4, 8, 16)

PRECISIONS: dict[str, tuple[torch.dtype, str]] = {
    "float32": (torch.float32, "no"),
    "bf16": (torch.bfloat16, "no"),
    "fp16": (torch.float16, "no"),
    "bf16-autocast": (torch.float32, "bf16"),
}
"""Precision of the frozen weights, and of autocast; autocast to fp16 needs a GPU."""

OneRound = Callable[..., DDPOMetrics]


def stir(policy: DiffusionPolicy) -> None:
    """Moves every trained weight, so that the LoRA takes part in the rounding."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.1)


@pytest.fixture
def one_round(redness: Any, prompts: list[str], run_config: Callable[..., TrainingConfig]) -> OneRound:
    """Does a real round of two steps and one update, from the same weights each time."""
    number = iter(range(100))

    def do(policy: DiffusionPolicy, minibatch_size: int, *, mixed_precision: str = "no", **changes: Any) -> DDPOMetrics:
        settings: dict[str, Any] = {
            "samples_per_round": SAMPLING,
            "updates_per_round": 1,
            "sampling_batch_size": SAMPLING,
            "minibatch_size": minibatch_size,
            "steps": 2,
            "baseline": "round",
        }
        start = policy.trainable_state()
        trainer = DDPOTrainer(policy, redness, prompts, DDPOConfig(**settings | changes))
        name = f"run-{next(number)}"
        with TrainingRun(policy, run_config(name, iterations=1, mixed_precision=mixed_precision)) as run:
            trainer.prepare(run)
            metrics = trainer.step(run)
        policy.load_trainable_state(start)
        return metrics

    return do


@pytest.mark.parametrize("precision", PRECISIONS)
def test_ratios_are_one_before_the_first_update(
    precision: str, make_policy: Callable[..., DiffusionPolicy], one_round: OneRound
) -> None:
    dtype, mixed_precision = PRECISIONS[precision]
    policy = make_policy(lora=LoRAConfig(), dtype=dtype)
    stir(policy)
    rounds = {size: one_round(policy, size, mixed_precision=mixed_precision) for size in MINIBATCHES}
    starts = {size: metrics.ratio_start for size, metrics in rounds.items()}
    assert starts[SAMPLING] == 0.0  # to the last bit
    assert {size: start for size, start in starts.items() if start > 1e-4} == {}
    assert {size: metrics.clip_fraction for size, metrics in rounds.items()} == dict.fromkeys(MINIBATCHES, 0.0)


def test_ratios_part_once_the_weights_have_moved(
    make_policy: Callable[..., DiffusionPolicy], one_round: OneRound
) -> None:
    policy = make_policy(lora=LoRAConfig())
    stir(policy)
    metrics = one_round(policy, SAMPLING, samples_per_round=2 * SAMPLING, updates_per_round=2)
    assert metrics.ratio_start == 0.0
    assert metrics.ratio_max > 1e-4
    assert 0 < metrics.clip_fraction <= 0.5  # of both updates, and none in the first
    assert metrics.approx_kl_k3 > 0


# A processor whose rounding depends on the shape of a batch, as those of GPUs does in half precision.


class ShapedRounding:
    """Moves the output of a UNet by something that depends on the size of the batch, and counts its calls."""

    def __init__(self, size: float) -> None:
        self.size = size
        self.calls = 0

    def __call__(self, unet: nn.Module, arguments: Any, output: tuple[Tensor]) -> tuple[Tensor]:
        self.calls += 1
        generator = torch.Generator().manual_seed(len(output[0]))
        return (output[0] + self.size * torch.randn(output[0].shape[1:], generator=generator),)


@pytest.fixture
def rounding(policy: DiffusionPolicy) -> Iterator[ShapedRounding]:
    """The tiny policy's rounding, far beyond what the clip range bears."""
    stir(policy)
    rounding = ShapedRounding(1e-2)
    with policy.unet.register_forward_hook(rounding):
        yield rounding


@pytest.mark.parametrize("size", [1, 4, 16])
def test_ratios_are_one_where_every_shape_rounds_differently(
    size: int, policy: DiffusionPolicy, rounding: ShapedRounding, one_round: OneRound
) -> None:
    assert one_round(policy, size).ratio_start == 0.0


def test_log_probabilities_of_the_rollout_would_not_do_there(
    policy: DiffusionPolicy, rounding: ShapedRounding, one_round: OneRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_they_were(updates: PolicyGradient, run: TrainingRun, trajectory: Trajectory, parts: Any) -> Trajectory:
        return trajectory

    monkeypatch.setattr(PolicyGradient, "with_old_log_probs", as_they_were)
    assert one_round(policy, SAMPLING).ratio_start == 0.0
    assert one_round(policy, 4).ratio_start > 1e-3


def test_shapes_that_round_alike_cost_a_few_forwards_and_others_one_for_each(
    policy: DiffusionPolicy, rounding: ShapedRounding, one_round: OneRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient, "PROBED_PAIRS", 8)
    rollout, divergence = 2, 1  # two steps of one batch, and the reference's part of policy/kl

    def calls(size: int) -> int:
        rounding.calls = 0
        one_round(policy, size)
        return rounding.calls

    assert calls(SAMPLING) == rollout + divergence + 2
    assert calls(4) == rollout + divergence + 2 * 4
    rounding.size = 0.0
    assert calls(4) == rollout + divergence + 4 + 2
    policy.unet.to(torch.bfloat16)  # half precision is not trusted with a probe
    assert calls(4) == rollout + divergence + 4 + 4
