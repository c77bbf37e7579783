"""Losses, advantages and weights against numbers of the authors' code."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from golden_case import GoldenCase, Record, Tensors
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
from overpaint.policy import Conditioning, DiffusionPolicy
from overpaint.training import TrainingConfig, TrainingRun

HALF_SQUARE = "half the mean square of new - old: ours are k1 and k3, of which k3 is the better estimate of the same"
THRESHOLD = "the filter with a fixed threshold is not built: its rewards have no scale that is known beforehand"
LOSS = GoldenCase(
    "ddpo_loss",
    left_out={"clip*/approx_kl": HALF_SQUARE, "hyperparameters/cases/*/approx_kl": HALF_SQUARE},
)
TRACKER = GoldenCase("stat_tracker")
RWR = GoldenCase(
    "rwr",
    left_out={"sparse_threshold/mask": THRESHOLD, "hyperparameters/threshold": THRESHOLD},
)


@pytest.fixture(scope="module")
def loss() -> Tensors:
    return LOSS.tensors


@pytest.fixture(scope="module")
def tracker() -> Tensors:
    return TRACKER.tensors


@pytest.fixture(scope="module")
def rwr() -> Tensors:
    return RWR.tensors


@pytest.fixture(params=LOSS.record["hyperparameters"]["cases"], ids=lambda case: case["prefix"].strip("/"))
def case(request: pytest.FixtureRequest, loss: Tensors) -> tuple[Record, Tensors]:
    """The settings of a case, and the tensors that belong to it by their short names."""
    return request.param, loss.under(request.param["prefix"])


def close(ours: Tensor, golden: Tensor | float) -> None:
    """Compares with the tolerance that the golden losses state."""
    atol, rtol = LOSS.tolerance("all")
    torch.testing.assert_close(ours, torch.as_tensor(golden, dtype=ours.dtype), atol=atol, rtol=rtol)


def close_weights(ours: Tensor, golden: Tensor) -> None:
    """Compares with the tolerance that the golden weights state."""
    (rtol,) = RWR.tolerance("weights")
    torch.testing.assert_close(ours, golden, atol=0, rtol=rtol)


# The loss.


def test_clipped_surrogate_and_its_gradient(case: tuple[Record, Tensors], loss: Tensors) -> None:
    settings, golden = case
    new = golden["new_log_probs"].clone().requires_grad_()
    losses = clipped_surrogate(
        new, loss["old_log_probs"], loss["advantages_clipped"], clip_range=settings["clip_range"]
    )
    close(losses, torch.maximum(golden["unclipped_loss"], golden["clipped_loss"]))
    close(losses.mean(), golden["loss"])
    close(losses.mean(), settings["loss"])
    losses.mean().backward()
    assert new.grad is not None
    close(new.grad, golden["grad_loss_wrt_new_log_probs"])


def test_ratio_clip_fraction_and_k3(case: tuple[Record, Tensors], loss: Tensors) -> None:
    settings, golden = case
    clip_range = settings["clip_range"]
    assert clip_range in LOSS.record["hyperparameters"]["clip_ranges"]
    new, old = golden["new_log_probs"], loss["old_log_probs"]
    largest, (clipped, k1, k3) = ratio_statistics(new, old, clip_range=clip_range)
    assert LOSS.record["tolerance"]["clipfrac"] == "exact"
    assert clipped / len(new) == golden["clipfrac"] == settings["clipfrac"]
    close(k3 / len(new), golden["approx_kl_k3_equation"])
    close(k1 / len(new), (old - new).mean())
    close(largest, (golden["ratio"] - 1).abs().max())
    # The largest of a single pair is that pair's own.
    for pair, ratio in enumerate(golden["ratio"]):
        one = slice(pair, pair + 1)
        close(ratio_statistics(new[one], old[one], clip_range=clip_range)[0], (ratio - 1).abs())


def test_score_function_and_its_gradient(loss: Tensors) -> None:
    old = loss["old_log_probs"].clone().requires_grad_()
    mean = score_function(old, loss["advantages_clipped"]).mean()
    close(mean, loss["sf/loss"])
    (gradient,) = torch.autograd.grad(mean, old)
    close(gradient, loss["sf/grad_wrt_log_probs"])


def test_clipped_surrogate_has_the_gradient_of_the_score_function_at_ratio_one(loss: Tensors) -> None:
    old = loss["old_log_probs"]
    for clip_range in LOSS.record["hyperparameters"]["clip_ranges"]:
        new = old.clone().requires_grad_()
        clipped_surrogate(new, old, loss["advantages_clipped"], clip_range=clip_range).mean().backward()
        assert new.grad is not None
        close(new.grad, loss["sf/grad_of_clipped_loss_at_ratio_1"])


def test_score_function_over_pairs_of_sample_and_step(loss: Tensors) -> None:
    log_probs = loss["sf_multi/log_probs"]
    samples, steps = log_probs.shape
    losses = score_function(log_probs.flatten(), loss["advantages_clipped"].repeat_interleave(steps))
    close(losses.mean(), loss["sf_multi/loss_mean_over_samples_and_steps"])
    sums = losses.view(samples, steps).sum(dim=1)
    close(sums.mean(), loss["sf_multi/loss_sum_over_steps_mean_over_samples"])


# Advantages.


def test_advantages_are_clipped_where_the_authors_clip_them(loss: Tensors) -> None:
    limit = DDPOConfig().max_advantage
    assert limit == LOSS.record["hyperparameters"]["adv_clip_max"] == TRACKER.record["adv_clip"]
    assert torch.equal(loss["advantages"].clamp(-limit, limit), loss["advantages_clipped"])


@pytest.mark.parametrize("code", ["ddpo_pytorch", "jannerm"])
def test_round_advantages(code: str, loss: Tensors) -> None:
    close(round_advantages(loss["batch_norm/rewards"]).float(), loss[f"batch_norm/advantages_{code}"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("sequence", TRACKER.record["sequences"], ids=lambda sequence: sequence["prefix"].strip("/"))
def test_prompt_statistics_over_batches(sequence: Record, dtype: torch.dtype, tracker: Tensors) -> None:
    absolute, relative, single = TRACKER.tolerance("advantages")
    assert absolute == relative
    tolerance = absolute if dtype == torch.float64 else single
    statistics = PromptStatistics(sequence["buffer_size"], sequence["min_count"])
    limit = TRACKER.record["adv_clip"]
    assert len(sequence["stats_after_each_batch"]) == sequence["batches"]
    for number, expected in enumerate(sequence["stats_after_each_batch"]):
        prefix = f"{sequence['prefix']}batch{number}/"
        assert len(tracker[f"{prefix}rewards"]) == sequence["batch_size"]
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


@pytest.mark.parametrize(
    "kind", RWR.record["hyperparameters"]["cases"], ids=lambda case: case["tensor"].removesuffix("/weights")
)
def test_softmax_weights(kind: Record, rwr: Tensors) -> None:
    prompts = [str(index) for index in rwr["prompt_index"].tolist()] if kind["by_prompt"] else None
    weights = softmax_weights(
        rwr["rewards"], inverse_temperature=kind["official_temperature_argument"], prompts=prompts
    )
    close_weights(weights, rwr[kind["tensor"]])
    (rtol,) = RWR.tolerance("weights")
    assert float(weights.sum()) == pytest.approx(kind["sum"], rel=rtol, abs=0)


def test_softmax_weights_of_one_batch(rwr: Tensors) -> None:
    """The authors' softmax of a single batch sums to one; ours to the number of samples."""
    temperature = RWRConfig().inverse_temperature  # the authors' own, and ours
    weights = softmax_weights(rwr["batch_softmax/rewards"], inverse_temperature=temperature)
    close_weights(weights / len(weights), rwr["batch_softmax/weights"])


def test_sparse_weights_of_all_samples(rwr: Tensors) -> None:
    percentile = float(RWR.record["hyperparameters"]["percentile"])
    weights = sparse_weights(rwr["rewards"], percentile=percentile)
    assert RWR.record["tolerance"]["masks"] == "exact"
    assert torch.equal(weights, rwr["sparse_percentile/mask"].float())
    assert torch.equal(weights.bool(), rwr["rewards"].double() >= rwr["sparse_percentile/cut"])


def test_sparse_weights_of_each_batch(rwr: Tensors) -> None:
    hyper = RWR.record["hyperparameters"]
    batches = rwr["rewards"].split(hyper["streaming_batch_size"])
    weights = torch.cat([sparse_weights(batch, percentile=float(hyper["percentile"])) for batch in batches])
    assert torch.equal(weights, rwr["sparse_percentile_per_batch8/mask"].float())


@pytest.mark.parametrize("percentile", RWR.record["hyperparameters"]["streaming"])
def test_sparse_weights_among_all_rewards_so_far(percentile: int, rwr: Tensors) -> None:
    """The authors' streaming filter is ours over everything seen, of which the newest part counts."""
    size = RWR.record["hyperparameters"]["streaming_batch_size"]
    golden = rwr.under(f"sparse_streaming{percentile}/")
    masks, cuts = golden["mask"].split(size), golden["cut_per_batch"]
    for number, (mask, cut) in enumerate(zip(masks, cuts, strict=True), start=1):
        seen = rwr["rewards"][: number * size]
        weights = sparse_weights(seen, percentile=float(percentile))
        assert torch.equal(weights.bool(), seen.double() >= cut)
        assert torch.equal(weights[-size:].bool(), mask)


@pytest.mark.parametrize("minibatch_size", [8, 3])
def test_weighted_loss_and_its_gradient(
    minibatch_size: int,
    rwr: Tensors,
    policy: DiffusionPolicy,
    redness: Any,
    prompts: list[str],
    run_config: Callable[..., TrainingConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One update of the trainer, with the golden noises and predictions in place of drawn ones and a network's."""
    count = len(rwr["loss/weights"])
    config = RWRConfig(batch_size=count, minibatch_size=minibatch_size, guidance_scale=1.0)
    trainer = RWRTrainer(policy, redness, prompts, config)
    prediction = rwr["loss/prediction"].clone().requires_grad_()
    clean = torch.arange(float(count)).view(-1, 1, 1, 1).expand_as(prediction)  # each latent tells its own index
    own_losses, mses = trainer._losses, []

    def with_golden_noise(clean: Tensor, conditioning: Conditioning, timesteps: Tensor, noise: Tensor) -> Tensor:
        mses.append(own_losses(clean, conditioning, timesteps, rwr["loss/noise"][clean[:, 0, 0, 0].long()]))
        return mses[-1]

    monkeypatch.setattr(trainer, "_losses", with_golden_noise)
    monkeypatch.setattr(policy, "add_noise", lambda clean, *_: clean)
    monkeypatch.setattr(policy, "predict_direction", lambda noised, *_: prediction[noised[:, 0, 0, 0].long()])
    with TrainingRun(policy, run_config()) as run:
        monkeypatch.setattr(run, "update", lambda: 0.0)  # nothing of the policy's own has a gradient
        loss, _ = trainer._update(run, torch.arange(count), ["a cat"] * count, clean, rwr["loss/weights"])

    (rtol,) = RWR.tolerance("loss")
    assert loss == pytest.approx(float(rwr["loss/loss"]), rel=rtol, abs=0)
    torch.testing.assert_close(torch.cat(mses), rwr["loss/mse_per_sample"], atol=0, rtol=rtol)
    assert prediction.grad is not None
    largest = float(rwr["loss/grad_prediction"].abs().max())
    torch.testing.assert_close(prediction.grad, rwr["loss/grad_prediction"], atol=rtol * largest, rtol=rtol)
