"""CLIP score: one cosine, and what each convention makes of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import Tensor, nn

from rewards import Reward
from rewards.clip import CLIPScore, CLIPScoreConfig
from rewards.clip_encoder import ClipEncoder

PRESETS = {
    "image_reward": CLIPScoreConfig.image_reward(),
    "torchmetrics": CLIPScoreConfig.torchmetrics(),
    "hessel": CLIPScoreConfig.hessel(),
    "mace": CLIPScoreConfig.mace(),
}


@pytest.fixture
def score(encoder: ClipEncoder) -> CLIPScore:
    return CLIPScore(encoder)


def test_it_is_a_differentiable_reward(score: CLIPScore) -> None:
    assert isinstance(score, Reward)
    assert score.differentiable


def test_score_is_the_cosine_of_each_pair(
    encoder: ClipEncoder, score: CLIPScore, pictures: Tensor, prompts: list[str]
) -> None:
    images, texts = encoder.image_embeddings(pictures), encoder.text_embeddings(prompts)
    torch.testing.assert_close(score(pictures, prompts), (images @ texts.T).diagonal(), rtol=0, atol=1e-6)


def test_each_convention_is_its_formula(encoder: ClipEncoder, pictures: Tensor, prompts: list[str]) -> None:
    cosines = encoder.cosines(pictures, prompts)
    prefixed = encoder.cosines(pictures, [f"A photo depicts {prompt}" for prompt in prompts])
    assert cosines.min() < 0 < cosines.max()
    assert prefixed.min() < 0
    expected = {
        "image_reward": cosines,
        "torchmetrics": (100 * cosines).clamp(min=0),
        "hessel": 2.5 * prefixed.clamp(min=0),
        "mace": encoder.model.logit_scale.exp() * cosines,
    }
    for name, config in PRESETS.items():
        torch.testing.assert_close(CLIPScore(encoder, config)(pictures, prompts), expected[name], rtol=1e-5, atol=1e-5)


def test_batch_and_order_do_not_matter(score: CLIPScore, check_batches: Callable[[nn.Module], None]) -> None:
    check_batches(score)


def test_gradient_to_the_images_agrees_with_differences(
    score: CLIPScore, check_gradient: Callable[[nn.Module], None]
) -> None:
    check_gradient(score)


@pytest.mark.parametrize("preset", PRESETS)
def test_folder_is_loaded_whatever_the_convention(
    score: CLIPScore, pictures: Tensor, prompts: list[str], tmp_path: Path, preset: str
) -> None:
    score.encoder.save_pretrained(tmp_path)
    score.config = PRESETS[preset]
    loaded = CLIPScore.load(tmp_path, PRESETS[preset])
    assert torch.equal(loaded(pictures, prompts), score(pictures, prompts))


@pytest.mark.parametrize(
    ("preset", "repository", "weights"),
    [
        ("image_reward", "openai/clip-vit-large-patch14", "model.safetensors"),
        ("torchmetrics", "openai/clip-vit-large-patch14", "model.safetensors"),
        ("hessel", "openai/clip-vit-base-patch32", "pytorch_model.bin"),
        ("mace", "openai/clip-vit-base-patch32", "pytorch_model.bin"),
    ],
)
def test_checkpoint_of_the_convention_is_asked_of_the_hub(
    preset: str, repository: str, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def offline(repository: str, name: str, *, revision: str) -> str:
        asked.append((repository, len(revision)))
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(OSError, match=f"could not get config.json.*hf download {repository} .*{weights} vocab.json"):
        CLIPScore.load(config=PRESETS[preset])
    assert asked == [(repository, 40)]


@pytest.mark.parametrize(
    ("images", "prompts", "error", "message"),
    [
        (torch.rand(3, 32, 32), ["a"], TypeError, "images must be an instance of Float"),
        (torch.rand(2, 3, 32, 32), ["a"], ValueError, "one string for each image, got 1 for 2 images"),
        (torch.rand(1, 3, 32, 32), "a", TypeError, "prompts must be a sequence, got 'a'"),
        (torch.rand(2, 3, 32, 32), ["a", 3], TypeError, r"prompts\[1\] must be a valid string, got 3"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_pairs_are_refused(
    score: CLIPScore, images: Tensor, prompts: Any, error: type[Exception], message: str
) -> None:
    score.config = CLIPScoreConfig.hessel()
    with pytest.raises(error, match=message):
        score(images, prompts)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scale": 0.0}, "scale must be above 0 or 'logit', got 0.0"),
        ({"scale": float("inf")}, "got inf"),
        ({"scale": "logits"}, "got 'logits'"),
        ({"scale": True}, "got True"),
        ({"checkpoint": "ViT-H/14"}, "checkpoint must be 'ViT-L/14' or 'ViT-B/32', got 'ViT-H/14'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_config_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CLIPScoreConfig(**values)
