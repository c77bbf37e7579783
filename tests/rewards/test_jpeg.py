"""JPEG sizes against the golden case, and against Pillow called by hand."""

import io
from typing import Any

import numpy
import PIL
import pytest
import torch
from golden_case import GoldenCase
from PIL import Image, features

from rewards import Compressibility, Incompressibility, Reward

CASE = GoldenCase(
    "jpeg",
    left_out={
        "images/*/formula": "words about how the picture was computed",
        "images/*/perturbed_size_kB_if_truncated_instead_of_rounded": "what other code than the authors' gets",
        "encoder/jpeg": "the version of the format, not of the encoder",
    },
)
NOISE = torch.rand(3, 3, 24, 40, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a cat"] * 3


@pytest.fixture(scope="module")
def tolerance() -> float:
    """Half a byte in ten thousand with the golden encoder; with another what the golden case says."""
    encoder = CASE.record["encoder"]
    (other,) = CASE.tolerance()
    same = (PIL.__version__, features.version("libjpeg_turbo")) == (encoder["pillow"], encoder["libjpeg_turbo"])
    return 5e-6 if same else other  # float32 keeps a size of 11 kB to 1e-6 kB


@pytest.mark.parametrize("number", range(len(CASE.record["images"])))
def test_sizes_are_the_golden_ones(number: int, tolerance: float) -> None:
    image, tensors = CASE.record["images"][number], CASE.tensors
    name = image["name"]
    assert image["size_kB"] == image["incompressibility"] == tensors["sizes_kB"][number]
    whole = tensors[f"{name}/image"].permute(2, 0, 1)[None].float() / 255
    perturbed = tensors[f"{name}/image_float_perturbed"][None]  # below 0 in places, and between the levels elsewhere

    assert Incompressibility()(whole, ["x"]).item() == pytest.approx(image["incompressibility"], rel=tolerance)
    assert Compressibility()(whole, ["x"]).item() == pytest.approx(image["compressibility"], rel=tolerance)
    assert Incompressibility()(perturbed, ["x"]).item() == pytest.approx(image["perturbed_size_kB"], rel=tolerance)


def test_compressibility_is_minus_incompressibility_and_both_are_rewards_without_gradient() -> None:
    for reward in (Compressibility(), Incompressibility()):
        assert isinstance(reward, Reward)
        assert not reward.differentiable
    assert torch.equal(Compressibility()(NOISE, PROMPTS), -Incompressibility()(NOISE, PROMPTS))


def test_a_flat_image_is_more_compressible_than_noise() -> None:
    grey = torch.full((1, 3, 24, 40), 0.5)
    assert Compressibility()(grey, ["x"]) > Compressibility()(NOISE[:1], ["x"])


@pytest.mark.parametrize("quality", [1, 50, 100])
def test_size_is_that_of_the_file_that_pillow_writes_with_this_quality(quality: int) -> None:
    pixels = numpy.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=numpy.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=quality)
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    # Whole bytes, divided by 1000 and rounded to float32.
    assert Incompressibility(quality=quality)(images, ["x"]).item() == pytest.approx(len(file.getvalue()) / 1000)


def test_an_image_scores_the_same_whatever_is_in_its_batch() -> None:
    together = Compressibility()(NOISE, PROMPTS)
    alone = torch.cat([Compressibility()(image[None], ["other words"]) for image in NOISE])
    assert torch.equal(together, alone)
    assert torch.equal(Compressibility()(NOISE.flip(0), PROMPTS), together.flip(0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_scores_are_float32_for_images_of_any_precision(dtype: torch.dtype) -> None:
    images = (NOISE * 2).round() / 2  # 0, 0.5 and 1 are exact in all of them
    scores = Compressibility()(images.to(dtype), PROMPTS)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, Compressibility()(images, PROMPTS))


def test_images_of_a_policy_in_training_are_scored_without_a_graph() -> None:
    scores = Compressibility()(NOISE.clone().requires_grad_(), PROMPTS)
    assert not scores.requires_grad


def test_values_out_of_range_count_as_black_and_white() -> None:
    images = NOISE * 3 - 1
    assert torch.equal(Compressibility()(images, PROMPTS), Compressibility()(images.clamp(0, 1), PROMPTS))


def test_an_empty_batch_has_no_scores() -> None:
    assert Compressibility()(NOISE[:0], []).shape == (0,)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_image_that_is_not_finite_is_refused_and_not_scored_as_something(value: float) -> None:
    images = NOISE.clone()
    images[1, 0, 3, 4] = value
    with pytest.raises(ValueError, match="images must be finite, got NaN or infinity in image 1 of 3"):
        Compressibility()(images, PROMPTS)


@pytest.mark.parametrize("reward", [Compressibility, Incompressibility])
@pytest.mark.parametrize("quality", [0, 101, -5])
def test_a_quality_out_of_range_is_refused(reward: type, quality: int) -> None:
    with pytest.raises(ValueError, match=rf"\.quality must be at (least 1|most 100), got {quality}"):
        reward(quality=quality)


def test_a_quality_that_is_no_whole_number_is_refused() -> None:
    half: Any = 95.5
    with pytest.raises(TypeError, match=r"quality must be a valid integer, got 95\.5"):
        Compressibility(quality=half)


@pytest.mark.parametrize("reward", [Compressibility(), Incompressibility()])
def test_images_without_a_prompt_each_are_refused(reward: Reward) -> None:
    with pytest.raises(ValueError, match="prompts must hold one string for each image, got 1 for 3 images"):
        reward(NOISE, ["a cat"])


@pytest.mark.gpu
def test_scores_are_on_the_images_device_and_equal_those_on_the_cpu() -> None:
    scores = Compressibility()(NOISE.cuda(), PROMPTS)
    assert scores.is_cuda
    assert torch.equal(scores.cpu(), Compressibility()(NOISE, PROMPTS))
