"""How far half precision moves ImageReward's scores and gradients, on the golden network."""

import copy
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from rewards import ImageReward


class Outcome(NamedTuple):
    """Scores of three images for each of three prompts, and the gradients to the images."""

    scores: Tensor
    gradients: Tensor


def outcome(reward: ImageReward, images: Tensor, prompts: list[str]) -> Outcome:
    scores, gradients = [], []
    for prompt in prompts:
        inputs = images.clone().requires_grad_()
        scores.append(reward(inputs, [prompt] * len(inputs)))
        gradients.append(torch.autograd.grad(scores[-1].sum(), inputs)[0])
    return Outcome(torch.cat(scores).detach(), torch.cat(gradients))


@pytest.fixture(scope="module")
def images(golden: dict[str, Tensor]) -> Tensor:
    return golden["images"].float() / 255


@pytest.fixture(scope="module")
def exact(golden_reward: ImageReward, images: Tensor, golden_case: dict[str, Any]) -> Outcome:
    return outcome(golden_reward, images, golden_case["prompts"])


# Measured: 0.109 in bfloat16 (8 bits), 0.0049 in float16 (11 bits), 0.037 under autocast, which keeps the layer norms
# and the sums between layers in float32. Gradients keep their direction: the cosine is above 0.9998 in all three.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.15), (torch.float16, 0.01)])
def test_network_in_half_precision_scores_within_the_documented_error(
    golden_reward: ImageReward,
    images: Tensor,
    golden_case: dict[str, Any],
    exact: Outcome,
    dtype: torch.dtype,
    bound: float,
) -> None:
    half = outcome(copy.deepcopy(golden_reward).to(dtype), images, golden_case["prompts"])
    assert half.scores.dtype == half.gradients.dtype == torch.float32
    assert 0 < (half.scores - exact.scores).abs().max() < bound
    assert functional.cosine_similarity(half.gradients.flatten(1), exact.gradients.flatten(1)).min() > 0.999


def test_autocast_scores_within_the_documented_error(
    golden_reward: ImageReward, images: Tensor, golden_case: dict[str, Any], exact: Outcome
) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = outcome(golden_reward, images, golden_case["prompts"])
    assert half.scores.dtype == torch.float32
    assert 0 < (half.scores - exact.scores).abs().max() < 0.06
    assert functional.cosine_similarity(half.gradients.flatten(1), exact.gradients.flatten(1)).min() > 0.999


def test_images_in_half_precision_are_scored_in_the_networks(
    golden_reward: ImageReward, images: Tensor, golden_case: dict[str, Any]
) -> None:
    rounded = images.to(torch.bfloat16)
    inputs = rounded.clone().requires_grad_()
    scores = golden_reward(inputs, golden_case["prompts"])
    assert torch.equal(scores, golden_reward(rounded.float(), golden_case["prompts"]))
    assert torch.autograd.grad(scores.sum(), inputs)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_everything_works_in_half_precision(
    golden_reward: ImageReward, images: Tensor, golden_case: dict[str, Any], dtype: torch.dtype
) -> None:
    reward = copy.deepcopy(golden_reward).to(dtype)
    prompts = golden_case["prompts"]
    pictures = [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).contiguous().numpy()) for image in images]
    ranks, scores = reward.inference_rank(prompts[0], pictures)
    assert sorted(ranks) == [1, 2, 3]
    assert scores == pytest.approx(reward(images, [prompts[0]] * 3).tolist(), rel=0, abs=1e-3)

    plain = outcome(reward, images, prompts)
    reward.gradient_checkpointing = True
    checkpointed = outcome(reward, images, prompts)
    assert torch.equal(checkpointed.scores, plain.scores)
    assert torch.equal(checkpointed.gradients, plain.gradients)
