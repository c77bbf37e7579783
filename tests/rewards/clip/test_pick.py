"""PickScore: CLIP's logit with weights of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import Tensor, nn

from rewards import Reward
from rewards.clip_encoder import ClipEncoder
from rewards.pick import PickScore


@pytest.fixture
def score(encoder: ClipEncoder) -> PickScore:
    return PickScore(encoder)


def test_it_is_a_differentiable_reward(score: PickScore) -> None:
    assert isinstance(score, Reward)
    assert score.differentiable


def test_score_is_the_scaled_cosine(encoder: ClipEncoder, pictures: Tensor, prompts: list[str]) -> None:
    encoder.model.logit_scale.data.fill_(2.0)
    expected = 7.389056 * encoder.cosines(pictures, prompts)
    torch.testing.assert_close(PickScore(encoder)(pictures, prompts), expected, rtol=1e-5, atol=1e-6)


def test_batch_and_order_do_not_matter(score: PickScore, check_batches: Callable[[nn.Module], None]) -> None:
    score.encoder.model.logit_scale.data.zero_()  # the tolerance is for scores of about 1
    check_batches(score)


def test_gradient_to_the_images_agrees_with_differences(
    score: PickScore, check_gradient: Callable[[nn.Module], None]
) -> None:
    check_gradient(score)


def test_folder_is_loaded(score: PickScore, pictures: Tensor, prompts: list[str], tmp_path: Path) -> None:
    score.encoder.save_pretrained(tmp_path)
    assert torch.equal(PickScore.load(tmp_path)(pictures, prompts), score(pictures, prompts))


def test_weights_and_tokenizer_come_from_the_hub(
    score: PickScore, pictures: Tensor, prompts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score.encoder.save_pretrained(tmp_path)
    asked: list[Any] = []

    def download(repository: str, name: str, *, revision: str) -> str:
        asked.append((repository, name))
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    # The vocabulary of the test is not CLIP's, whose hash is known.
    with pytest.raises(ValueError, match=r"vocab\.json has other content"):
        PickScore.load()
    monkeypatch.setattr("rewards.checkpoint.sha256_of", lambda path: HASHES.get(path.name))
    assert torch.equal(PickScore.load()(pictures, prompts), score(pictures, prompts))
    assert asked[-4:] == [
        ("yuvalkirstain/PickScore_v1", "config.json"),
        ("yuvalkirstain/PickScore_v1", "model.safetensors"),
        ("openai/clip-vit-large-patch14", "vocab.json"),
        ("openai/clip-vit-large-patch14", "merges.txt"),
    ]


def test_wrong_pairs_are_refused(score: PickScore, pictures: Tensor) -> None:
    with pytest.raises(ValueError, match="one string for each image, got 1 for 5 images"):
        score(pictures, ["a"])


HASHES = {
    "vocab.json": "3f0c4f7d2086b61b38487075278ea9ed04edb53a03cbb045b86c27190fa8fb69",
    "merges.txt": "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a",
}
