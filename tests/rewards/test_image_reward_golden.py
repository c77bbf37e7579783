"""ImageReward against numbers of the official code: same scores, gradients and preprocessing."""

from pathlib import Path

import pytest
import torch
from golden_case import GoldenCase, Record, Tensors, image_reward_config
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from rewards import ImageReward, ImageRewardConfig
from rewards.preprocess import normalise, pil_to_square

BERT = "what every BERT has, and the network does not read"
CASE = GoldenCase(
    "image_reward_small",
    left_out={
        "*blip_scores": "of the network without ImageReward's head, in test_blip_score.py",
        "weights_file": "words about the file beside it",
        "tokenizer": "words about what the token ids are compared for",
        "config/head": "words; the tensors of the file fit or it does not load",
        "config/encoder_width_note": "words about a field of BERT's configuration",
        "config/text/[!hlmnv]*": BERT,
        "config/text/hidden_[ad]*": BERT,
        "config/text/model_type": BERT,
        "config/vision/qkv_bias": "the tensors of the file fit or it does not load",
        "config/vision/activation": "words; the tower's numbers are compared",
    },
)


@pytest.fixture(scope="session")
def golden() -> Tensors:
    return CASE.tensors


@pytest.fixture(scope="session")
def golden_case() -> Record:
    return CASE.record


def atol(name: str = "scores") -> float:
    (absolute,) = CASE.tolerance(name)
    return absolute


@pytest.fixture
def images(golden: Tensors) -> Tensor:
    return golden["images"].float() / 255


def picture(golden: Tensors, index: int) -> Image.Image:
    return Image.fromarray(golden[f"file_image{index}/image"].permute(1, 2, 0).contiguous().numpy())


def test_token_ids_are_the_official_ones(golden_reward: ImageReward, golden: Tensors, golden_case: Record) -> None:
    tokens = golden_reward.tokenizer(golden_case["prompts"], golden_reward.config.max_length)
    assert torch.equal(tokens.ids, golden["input_ids"])
    assert torch.equal(tokens.mask, golden["attention_mask"])


def test_added_tokens_get_the_official_ids(golden_reward: ImageReward, golden_case: Record) -> None:
    ids = golden_reward.tokenizer(["[DEC] [ENC]"], 4).ids
    assert ids[0, 1:3].tolist() == [golden_case["added_tokens"]["[DEC]"], golden_case["added_tokens"]["[ENC]"]]


def test_scores_are_the_official_ones(
    golden_reward: ImageReward, golden: Tensors, golden_case: Record, images: Tensor
) -> None:
    scores = golden_reward(images, golden_case["prompts"])
    torch.testing.assert_close(scores, golden["scores"], rtol=0, atol=atol())


def test_every_prompt_scores_every_image_as_officially(
    golden_reward: ImageReward, golden: Tensors, golden_case: Record, images: Tensor
) -> None:
    scores = torch.stack([golden_reward(images, [prompt] * len(images)) for prompt in golden_case["prompts"]])
    torch.testing.assert_close(scores, golden["scores_every_prompt_image"], rtol=0, atol=atol())


def test_gradient_to_the_images_is_the_official_one(
    golden_reward: ImageReward, golden: Tensors, golden_case: Record, images: Tensor
) -> None:
    images.requires_grad_()
    golden_reward(images, golden_case["prompts"]).sum().backward()
    assert images.grad is not None
    # The golden gradient is with respect to the normalised images.
    gradient = images.grad * torch.tensor(golden_reward.config.image_std).view(1, 3, 1, 1)

    part, rtol = CASE.tolerance("grad")
    expected = golden["grad_image0"]
    torch.testing.assert_close(gradient[0], expected, rtol=rtol, atol=part * float(expected.abs().max()))
    torch.testing.assert_close(gradient.flatten(1).norm(dim=1), golden["grad_norm_per_image"], rtol=rtol, atol=0)
    sums = gradient.unflatten(3, (14, 16)).unflatten(2, (14, 16)).sum(dim=(3, 5))
    expected = golden["grad_patch_sums"]
    torch.testing.assert_close(sums, expected, rtol=rtol, atol=part * float(expected.abs().max()))


def test_vision_tower_alone_is_the_official_one(golden_reward: ImageReward, golden: Tensors, images: Tensor) -> None:
    tokens = golden_reward.vision(normalise(images)).last_hidden_state
    torch.testing.assert_close(tokens[:, 0], golden["vision_cls"], rtol=0, atol=atol())
    torch.testing.assert_close(tokens.mean(dim=1), golden["vision_token_mean"], rtol=0, atol=atol())


def test_text_encoder_alone_is_the_official_one(golden_reward: ImageReward, golden: Tensors) -> None:
    output = golden_reward.text(golden["input_ids"], attention_mask=golden["attention_mask"], is_decoder=False)
    torch.testing.assert_close(output.last_hidden_state[:, 0], golden["text_only_cls"], rtol=0, atol=atol())


@pytest.mark.parametrize("index", [0, 1])
def test_files_are_preprocessed_as_officially(golden: Tensors, index: int) -> None:
    rows = normalise(pil_to_square(picture(golden, index), 224)[None])[0, :, 100:108]
    assert torch.equal(rows, golden[f"file_image{index}/preprocessed_rows_100_108"])


@pytest.mark.parametrize("index", [0, 1])
def test_files_score_as_officially(
    golden_reward: ImageReward, golden: Tensors, golden_case: Record, index: int, tmp_path: Path
) -> None:
    path = tmp_path / "picture.png"
    picture(golden, index).save(path)
    for image in (path, str(path), picture(golden, index)):
        scores = [golden_reward.score(prompt, image) for prompt in golden_case["prompts"]]
        assert scores == pytest.approx(golden[f"file_image{index}/scores"].tolist(), rel=0, abs=atol("file_path"))


def test_settings_are_those_of_the_official_network(
    golden_config: ImageRewardConfig, golden_reward: ImageReward, golden_weights: Path
) -> None:
    record = CASE.record
    text, vision = record["config"]["text"], record["config"]["vision"]
    assert golden_config == image_reward_config(record)
    assert list(golden_config.image_mean) == record["image_mean"]
    assert list(golden_config.image_std) == record["image_std"]
    assert golden_config.text_layer_norm_eps == text["layer_norm_eps"]
    assert golden_config.vision_layer_norm_eps == vision["layer_norm_eps"]
    # The position ids are no parameters, and both projections to this width are not used.
    state = load_file(golden_weights)
    positions = state.pop("blip.text_encoder.embeddings.position_ids")
    assert len(positions[0]) == text["max_position_embeddings"]
    assert (
        len(state["blip.vision_proj.bias"]) == len(state["blip.text_proj.bias"]) == record["config"]["projection_dim"]
    )
    assert sum(tensor.numel() for tensor in state.values()) == record["parameters"]
    unused = sum(tensor.numel() for name, tensor in state.items() if "_proj." in name)
    assert sum(tensor.numel() for tensor in golden_reward.state_dict().values()) == record["parameters"] - unused


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
    golden_case: Record,
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
