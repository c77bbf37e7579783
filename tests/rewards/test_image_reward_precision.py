"""How far half precision moves ImageReward's scores and gradients, on the golden network."""

import copy
from typing import NamedTuple

import pytest
import torch
from golden_case import Record, Tensors
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
def images(golden: Tensors) -> Tensor:
    return golden["images"].float() / 255


@pytest.fixture(scope="module")
def exact(golden_reward: ImageReward, images: Tensor, golden_case: Record) -> Outcome:
    return outcome(golden_reward, images, golden_case["prompts"])


def roundings(half: Outcome, exact: Outcome, dtype: torch.dtype) -> tuple[float, float]:
    """How far scores and gradients are off, in roundings: 2^-8 of a number in bfloat16, 2^-11 in float16.

    Of the scores it is the root of the mean square, which hangs less on the luck of one score than the largest does. Of
    the gradients it is the largest angle.
    """
    unit = torch.finfo(dtype).eps / 2
    scores = (half.scores - exact.scores).double().square().mean().sqrt()
    cosines = functional.cosine_similarity(half.gradients.double().flatten(1), exact.gradients.double().flatten(1))
    return float(scores) / unit, float((2 * (1 - cosines.min())).clamp(min=0).sqrt()) / unit


# On three kinds of kernels the scores were off by 10.7 to 13.6 roundings in bfloat16, by 4.0 to 4.6 in float16, and by
# 4.0 to 4.5 under autocast, which keeps the layer norms and the sums between layers in float32; the gradients by 3.4 to
# 4.5 in all three. Where the kernels round differently, the errors are others of the same size.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 40), (torch.float16, 15)])
def test_network_in_half_precision_scores_within_the_documented_error(
    golden_reward: ImageReward, images: Tensor, golden_case: Record, exact: Outcome, dtype: torch.dtype, bound: float
) -> None:
    half = outcome(copy.deepcopy(golden_reward).to(dtype), images, golden_case["prompts"])
    assert half.scores.dtype == half.gradients.dtype == torch.float32
    scores, gradients = roundings(half, exact, dtype)
    assert 0 < scores < bound
    assert 0 < gradients < 15


def test_autocast_scores_within_the_documented_error(
    golden_reward: ImageReward, images: Tensor, golden_case: Record, exact: Outcome
) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = outcome(golden_reward, images, golden_case["prompts"])
    assert half.scores.dtype == torch.float32
    scores, gradients = roundings(half, exact, torch.bfloat16)
    assert 0 < scores < 15
    assert 0 < gradients < 15


def test_images_in_half_precision_are_scored_in_the_networks(
    golden_reward: ImageReward, images: Tensor, golden_case: Record
) -> None:
    rounded = images.to(torch.bfloat16)
    inputs = rounded.clone().requires_grad_()
    scores = golden_reward(inputs, golden_case["prompts"])
    assert torch.equal(scores, golden_reward(rounded.float(), golden_case["prompts"]))
    assert torch.autograd.grad(scores.sum(), inputs)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_everything_works_in_half_precision(
    golden_reward: ImageReward, images: Tensor, golden_case: Record, dtype: torch.dtype
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
