"""ImageReward against numbers of the official code: same scores, gradients and preprocessing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from rewards import ImageReward, ImageRewardConfig
from rewards.preprocess import normalise, pil_to_square


@pytest.fixture
def images(golden: dict[str, Tensor]) -> Tensor:
    return golden["images"].float() / 255


def picture(golden: dict[str, Tensor], index: int) -> Image.Image:
    return Image.fromarray(golden[f"file_image{index}/image"].permute(1, 2, 0).contiguous().numpy())


def test_token_ids_are_the_official_ones(
    golden_reward: ImageReward, golden: dict[str, Tensor], golden_case: dict[str, Any]
) -> None:
    tokens = golden_reward.tokenizer(golden_case["prompts"], golden_reward.config.max_length)
    assert torch.equal(tokens.ids, golden["input_ids"])
    assert torch.equal(tokens.mask, golden["attention_mask"])


def test_added_tokens_get_the_official_ids(golden_reward: ImageReward, golden_case: dict[str, Any]) -> None:
    ids = golden_reward.tokenizer(["[DEC] [ENC]"], 4).ids
    assert ids[0, 1:3].tolist() == [golden_case["added_tokens"]["[DEC]"], golden_case["added_tokens"]["[ENC]"]]


def test_scores_are_the_official_ones(
    golden_reward: ImageReward, golden: dict[str, Tensor], golden_case: dict[str, Any], images: Tensor
) -> None:
    scores = golden_reward(images, golden_case["prompts"])
    torch.testing.assert_close(scores, golden["scores"], rtol=0, atol=2e-5)


def test_every_prompt_scores_every_image_as_officially(
    golden_reward: ImageReward, golden: dict[str, Tensor], golden_case: dict[str, Any], images: Tensor
) -> None:
    scores = torch.stack([golden_reward(images, [prompt] * 3) for prompt in golden_case["prompts"]])
    torch.testing.assert_close(scores, golden["scores_every_prompt_image"], rtol=0, atol=2e-5)


def test_gradient_to_the_images_is_the_official_one(
    golden_reward: ImageReward, golden: dict[str, Tensor], golden_case: dict[str, Any], images: Tensor
) -> None:
    images.requires_grad_()
    golden_reward(images, golden_case["prompts"]).sum().backward()
    assert images.grad is not None
    # The golden gradient is with respect to the normalised images.
    gradient = images.grad * torch.tensor(golden_reward.config.image_std).view(1, 3, 1, 1)

    expected = golden["grad_image0"]
    torch.testing.assert_close(gradient[0], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    torch.testing.assert_close(gradient.flatten(1).norm(dim=1), golden["grad_norm_per_image"], rtol=1e-4, atol=0)
    sums = gradient.unflatten(3, (14, 16)).unflatten(2, (14, 16)).sum(dim=(3, 5))
    expected = golden["grad_patch_sums"]
    torch.testing.assert_close(sums, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_vision_tower_alone_is_the_official_one(
    golden_reward: ImageReward, golden: dict[str, Tensor], images: Tensor
) -> None:
    tokens = golden_reward.vision(normalise(images)).last_hidden_state
    torch.testing.assert_close(tokens[:, 0], golden["vision_cls"], rtol=0, atol=2e-5)
    torch.testing.assert_close(tokens.mean(dim=1), golden["vision_token_mean"], rtol=0, atol=2e-5)


def test_text_encoder_alone_is_the_official_one(golden_reward: ImageReward, golden: dict[str, Tensor]) -> None:
    output = golden_reward.text(golden["input_ids"], attention_mask=golden["attention_mask"], is_decoder=False)
    torch.testing.assert_close(output.last_hidden_state[:, 0], golden["text_only_cls"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("index", [0, 1])
def test_files_are_preprocessed_as_officially(golden: dict[str, Tensor], index: int) -> None:
    rows = normalise(pil_to_square(picture(golden, index), 224)[None])[0, :, 100:108]
    assert torch.equal(rows, golden[f"file_image{index}/preprocessed_rows_100_108"])


@pytest.mark.parametrize("index", [0, 1])
def test_files_score_as_officially(
    golden_reward: ImageReward, golden: dict[str, Tensor], golden_case: dict[str, Any], index: int, tmp_path: Path
) -> None:
    path = tmp_path / "picture.png"
    picture(golden, index).save(path)
    for image in (path, str(path), picture(golden, index)):
        scores = [golden_reward.score(prompt, image) for prompt in golden_case["prompts"]]
        assert scores == pytest.approx(golden[f"file_image{index}/scores"].tolist(), rel=0, abs=1e-4)


def test_default_sizes_are_those_of_the_official_checkpoint(golden_reward: ImageReward) -> None:
    with torch.device("meta"):
        reward = ImageReward(ImageRewardConfig(), golden_reward.tokenizer)
    # The official file has five more: the weights and biases of two unused projections, and the position ids.
    assert len(reward.state_dict()) == 625 - 5
    unused = (1024 + 1) * 256 + (768 + 1) * 256 + 512
    assert sum(tensor.numel() for tensor in reward.state_dict().values()) + unused == pytest.approx(446.666e6, abs=500)


def test_torch_file_with_the_prefix_of_distributed_training_loads(
    golden_weights: Path,
    golden_config: ImageRewardConfig,
    golden_case: dict[str, Any],
    golden_reward: ImageReward,
    tmp_path: Path,
) -> None:
    state = {f"module.{name}": tensor for name, tensor in load_file(golden_weights).items()}
    state["module.blip.text_encoder.embeddings.position_ids"] = torch.arange(48)[None]
    torch.save(state, tmp_path / "ImageReward.pt")
    (tmp_path / "vocab.txt").write_text("\n".join(golden_case["vocab"]) + "\n", encoding="utf-8")

    loaded = ImageReward.from_official(tmp_path / "ImageReward.pt", golden_config, tmp_path / "vocab.txt")
    expected = golden_reward.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
