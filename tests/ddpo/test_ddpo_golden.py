"""Losses, advantages and weights against numbers of the authors' code.

Left out, because they are not built: `approx_kl` of the authors' code, which is half the mean square of new - old where
ours are k1 and k3; and the filters of regression with a fixed threshold.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ddpo import (
    DDPOConfig,
    PromptStatistics,
    RWRConfig,
    RWRTrainer,
    clipped_surrogate,
    round_advantages,
    score_function,
    softmax_weights,
    sparse_weights,
)
from ddpo.loss import ratio_statistics
from policy import DiffusionPolicy
from training import TrainingConfig, TrainingRun

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
LOSS_CASES: list[dict[str, Any]] = json.loads((GOLDEN / "ddpo_loss.json").read_text())["hyperparameters"]["cases"]
SEQUENCES: list[dict[str, Any]] = json.loads((GOLDEN / "stat_tracker.json").read_text())["sequences"]
RWR: dict[str, Any] = json.loads((GOLDEN / "rwr.json").read_text())["hyperparameters"]


@pytest.fixture(scope="module")
def loss() -> dict[str, Tensor]:
    return load_file(GOLDEN / "ddpo_loss.safetensors")


@pytest.fixture(scope="module")
def tracker() -> dict[str, Tensor]:
    return load_file(GOLDEN / "stat_tracker.safetensors")


@pytest.fixture(scope="module")
def rwr() -> dict[str, Tensor]:
    return load_file(GOLDEN / "rwr.safetensors")


@pytest.fixture(params=LOSS_CASES, ids=lambda case: case["prefix"].strip("/"))
def case(request: pytest.FixtureRequest, loss: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """A clip range, and the tensors that belong to it by their short names."""
    prefix = request.param["prefix"]
    return request.param["clip_range"], {
        name.removeprefix(prefix): value for name, value in loss.items() if name.startswith(prefix)
    }


def close(ours: Tensor, golden: Tensor) -> None:
    """Compares with the tolerance that the golden losses state."""
    torch.testing.assert_close(ours, golden, atol=1e-6, rtol=1e-6)


# The loss.


def test_clipped_surrogate_and_its_gradient(case: tuple[float, dict[str, Tensor]], loss: dict[str, Tensor]) -> None:
    clip_range, golden = case
    new = golden["new_log_probs"].clone().requires_grad_()
    losses = clipped_surrogate(new, loss["old_log_probs"], loss["advantages_clipped"], clip_range=clip_range)
    close(losses, torch.maximum(golden["unclipped_loss"], golden["clipped_loss"]))
    close(losses.mean(), golden["loss"])
    losses.mean().backward()
    assert new.grad is not None
    close(new.grad, golden["grad_loss_wrt_new_log_probs"])


def test_ratio_clip_fraction_and_k3(case: tuple[float, dict[str, Tensor]], loss: dict[str, Tensor]) -> None:
    clip_range, golden = case
    new, old = golden["new_log_probs"], loss["old_log_probs"]
    largest, (clipped, k1, k3) = ratio_statistics(new, old, clip_range=clip_range)
    assert clipped / len(new) == golden["clipfrac"]
    close(k3 / len(new), golden["approx_kl_k3_equation"])
    close(k1 / len(new), (old - new).mean())
    close(largest, (golden["ratio"] - 1).abs().max())
    # The largest of a single pair is that pair's own.
    for pair, ratio in enumerate(golden["ratio"]):
        one = slice(pair, pair + 1)
        close(ratio_statistics(new[one], old[one], clip_range=clip_range)[0], (ratio - 1).abs())


def test_score_function_and_its_gradient(loss: dict[str, Tensor]) -> None:
    old = loss["old_log_probs"].clone().requires_grad_()
    mean = score_function(old, loss["advantages_clipped"]).mean()
    close(mean, loss["sf/loss"])
    (gradient,) = torch.autograd.grad(mean, old)
    close(gradient, loss["sf/grad_wrt_log_probs"])


def test_clipped_surrogate_has_the_gradient_of_the_score_function_at_ratio_one(loss: dict[str, Tensor]) -> None:
    old = loss["old_log_probs"]
    new = old.clone().requires_grad_()
    clipped_surrogate(new, old, loss["advantages_clipped"], clip_range=1e-4).mean().backward()
    assert new.grad is not None
    close(new.grad, loss["sf/grad_of_clipped_loss_at_ratio_1"])


def test_score_function_over_pairs_of_sample_and_step(loss: dict[str, Tensor]) -> None:
    log_probs = loss["sf_multi/log_probs"]
    samples, steps = log_probs.shape
    losses = score_function(log_probs.flatten(), loss["advantages_clipped"].repeat_interleave(steps))
    close(losses.mean(), loss["sf_multi/loss_mean_over_samples_and_steps"])
    sums = losses.view(samples, steps).sum(dim=1)
    close(sums.mean(), loss["sf_multi/loss_sum_over_steps_mean_over_samples"])


# Advantages.


def test_advantages_are_clipped_where_the_authors_clip_them(loss: dict[str, Tensor]) -> None:
    limit = DDPOConfig().max_advantage
    assert torch.equal(loss["advantages"].clamp(-limit, limit), loss["advantages_clipped"])


@pytest.mark.parametrize("code", ["ddpo_pytorch", "jannerm"])
def test_round_advantages(code: str, loss: dict[str, Tensor]) -> None:
    close(round_advantages(loss["batch_norm/rewards"]).float(), loss[f"batch_norm/advantages_{code}"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("sequence", SEQUENCES, ids=lambda sequence: sequence["prefix"].strip("/"))
def test_prompt_statistics_over_batches(
    sequence: dict[str, Any], dtype: torch.dtype, tracker: dict[str, Tensor]
) -> None:
    tolerance = 1e-6 if dtype == torch.float64 else 1e-5
    statistics = PromptStatistics(sequence["buffer_size"], sequence["min_count"])
    limit = DDPOConfig().max_advantage
    assert len(sequence["stats_after_each_batch"]) == sequence["batches"]
    for number, expected in enumerate(sequence["stats_after_each_batch"]):
        prefix = f"{sequence['prefix']}batch{number}/"
        prompts = [sequence["prompts"][index] for index in tracker[f"{prefix}prompt_index"].tolist()]
        advantages = statistics.advantages(tracker[f"{prefix}rewards"].to(dtype), prompts)
        golden = tracker[f"{prefix}advantages"]
        torch.testing.assert_close(advantages, golden, atol=tolerance, rtol=tolerance)
        clipped = tracker[f"{prefix}advantages_clipped"]
        torch.testing.assert_close(advantages.clamp(-limit, limit), clipped, atol=tolerance, rtol=tolerance)

        buffers = statistics.state_dict()["buffers"]
        assert {prompt: len(kept) for prompt, kept in buffers.items()} == {
            prompt: numbers["count"] for prompt, numbers in expected.items()
        }
        for prompt, numbers in expected.items():
            kept = torch.tensor(buffers[prompt], dtype=torch.float64)
            # Rewards in float32 are good to 1e-7 of themselves, which is about 1e-5 of a small deviation.
            assert float(kept.mean()) == pytest.approx(numbers["mean"], rel=tolerance)
            assert float(kept.std(correction=0)) == pytest.approx(numbers["std"], rel=tolerance, abs=tolerance)


# Regression.


@pytest.mark.parametrize("kind", RWR["cases"], ids=lambda case: case["tensor"].removesuffix("/weights"))
def test_softmax_weights(kind: dict[str, Any], rwr: dict[str, Tensor]) -> None:
    prompts = [str(index) for index in rwr["prompt_index"].tolist()] if kind["by_prompt"] else None
    weights = softmax_weights(
        rwr["rewards"], inverse_temperature=kind["official_temperature_argument"], prompts=prompts
    )
    torch.testing.assert_close(weights, rwr[kind["tensor"]], atol=0, rtol=1e-5)
    assert float(weights.sum()) == pytest.approx(kind["sum"], rel=1e-5)


def test_softmax_weights_of_one_batch(rwr: dict[str, Tensor]) -> None:
    """The authors' softmax of a single batch sums to one; ours to the number of samples."""
    weights = softmax_weights(rwr["batch_softmax/rewards"], inverse_temperature=0.2)
    torch.testing.assert_close(weights / len(weights), rwr["batch_softmax/weights"], atol=0, rtol=1e-5)


def test_sparse_weights_of_all_samples(rwr: dict[str, Tensor]) -> None:
    weights = sparse_weights(rwr["rewards"], percentile=float(RWR["percentile"]))
    assert torch.equal(weights, rwr["sparse_percentile/mask"].float())
    assert rwr["rewards"].double()[weights.bool()].min() >= rwr["sparse_percentile/cut"]


def test_sparse_weights_of_each_batch(rwr: dict[str, Tensor]) -> None:
    batches = rwr["rewards"].split(RWR["streaming_batch_size"])
    weights = torch.cat([sparse_weights(batch, percentile=float(RWR["percentile"])) for batch in batches])
    assert torch.equal(weights, rwr["sparse_percentile_per_batch8/mask"].float())


@pytest.mark.parametrize("percentile", RWR["streaming"])
def test_sparse_weights_among_all_rewards_so_far(percentile: int, rwr: dict[str, Tensor]) -> None:
    """The authors' streaming filter is ours over everything seen, of which the newest part counts."""
    rewards, size = rwr["rewards"], RWR["streaming_batch_size"]
    parts = [
        sparse_weights(rewards[: first + size], percentile=float(percentile))[first:]
        for first in range(0, len(rewards), size)
    ]
    assert torch.equal(torch.cat(parts), rwr[f"sparse_streaming{percentile}/mask"].float())


@pytest.mark.parametrize("minibatch_size", [8, 3])
def test_weighted_loss_and_its_gradient(
    minibatch_size: int,
    rwr: dict[str, Tensor],
    policy: DiffusionPolicy,
    redness: Any,
    prompts: list[str],
    run_config: Callable[..., TrainingConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One update of the trainer, with the golden noises and predictions in place of drawn ones and a network's."""
    config = RWRConfig(batch_size=8, minibatch_size=minibatch_size, guidance_scale=1.0)
    trainer = RWRTrainer(policy, redness, prompts, config)
    prediction = rwr["loss/prediction"].clone().requires_grad_()
    clean = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 4, 6, 6)  # each latent tells its own index
    own_losses, mses = trainer._losses, []

    def with_golden_noise(clean: Tensor, embeddings: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        mses.append(own_losses(clean, embeddings, timesteps, rwr["loss/noise"][clean[:, 0, 0, 0].long()]))
        return mses[-1]

    monkeypatch.setattr(trainer, "_losses", with_golden_noise)
    monkeypatch.setattr(policy, "add_noise", lambda clean, *_: clean)
    monkeypatch.setattr(policy, "predict_noise", lambda noised, *_: prediction[noised[:, 0, 0, 0].long()])
    with TrainingRun(policy, run_config()) as run:
        monkeypatch.setattr(run, "update", lambda: 0.0)  # nothing of the policy's own has a gradient
        loss, _ = trainer._update(run, torch.arange(8), ["a cat"] * 8, clean, rwr["loss/weights"])

    assert loss == pytest.approx(float(rwr["loss/loss"]), rel=1e-5)
    torch.testing.assert_close(torch.cat(mses), rwr["loss/mse_per_sample"], atol=0, rtol=1e-5)
    assert prediction.grad is not None
    largest = float(rwr["loss/grad_prediction"].abs().max())
    torch.testing.assert_close(prediction.grad, rwr["loss/grad_prediction"], atol=1e-5 * largest, rtol=1e-5)
