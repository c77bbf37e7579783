"""Wrong input to ImageReward gives an error that names what is wrong, before any work."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from golden_case import Record
from safetensors.torch import load_file, save_file
from torch import Tensor

from rewards import ImageReward, ImageRewardConfig, blip_network, image_reward
from rewards.public_files import sha256_of


@pytest.mark.parametrize(
    ("images", "prompts", "error", "message"),
    [
        (torch.rand(3, 16, 16), ["a"], TypeError, r"images must be an instance of Float.* of shape \[3, 16, 16\]"),
        (
            torch.rand(1, 4, 16, 16),
            ["a"],
            TypeError,
            r"images must be .*Float.* of shape \[1, 4, 16, 16\]",
        ),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), ["a"], TypeError, "an instance of Float.* got a uint8"),
        (torch.rand(2, 3, 16, 16), ["a"], ValueError, "one string for each image, got 1 for 2 images"),
        (torch.rand(1, 3, 16, 16), "a", TypeError, "prompts must be a sequence, got 'a'"),
        (torch.rand(2, 3, 16, 16), ["a", 3], TypeError, r"prompts\[1\] must be a valid string, got 3"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_pairs_are_refused(
    reward: ImageReward, images: Tensor, prompts: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        reward(images, prompts)


@pytest.mark.usefixtures("unchecked")
def test_wrong_arguments_of_score_are_refused(reward: ImageReward, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no image at .*missing\.png"):
        reward.score("a cat", tmp_path / "missing.png")
    with pytest.raises(TypeError, match="image must be an instance of Image or a valid string or an instance of Path"):
        reward.score("a cat", [torch.rand(3, 16, 16)])  # ty: ignore[invalid-argument-type]
    with pytest.raises(TypeError, match="prompt must be a valid string, got 7"):
        reward.inference_rank(7, ["picture.png"])  # ty: ignore[invalid-argument-type]
    with pytest.raises(ValueError, match="at least one image"):
        reward.score("a cat", [])


def test_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be ImageReward-v1\.0, or a path that exists, got 'ImageReward-v7'"):
        ImageReward.load("ImageReward-v7")


@pytest.mark.parametrize("name", [(), ("ImageReward-v1.0",)])
def test_known_name_asks_the_hub_for_the_weights_at_one_revision(
    monkeypatch: pytest.MonkeyPatch, name: tuple[str, ...]
) -> None:
    asked = []

    def offline(repository: str, name: str, revision: str) -> str:
        asked.append((repository, name, revision))
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(OSError, match=r"could not get ImageReward\.pt of THUDM/ImageReward .* give the folder"):
        ImageReward.load(*name)
    assert asked == [("THUDM/ImageReward", "ImageReward.pt", image_reward.WEIGHTS.revision)]


def test_vocabulary_comes_from_the_hub_where_it_is_not_given(
    golden_weights: Path,
    golden_config: ImageRewardConfig,
    golden_case: Record,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(golden_case["vocab"]) + "\n", encoding="utf-8")
    files = replace(blip_network.VOCABULARY, files={"vocab.txt": sha256_of(vocabulary)})
    monkeypatch.setattr(blip_network, "VOCABULARY", files)
    hub = {("google-bert/bert-base-uncased", "vocab.txt", files.revision): str(vocabulary)}
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda repository, name, revision: hub[repository, name, revision]
    )
    reward = ImageReward.from_official(golden_weights, golden_config)
    assert reward.tokenizer.vocabulary == tuple(golden_case["vocab"])


def test_weights_of_other_sizes_are_refused(
    golden_weights: Path, golden_config: ImageRewardConfig, golden_case: Record
) -> None:
    for values, message in [
        ({"vision_layers": 3}, r"vision\.encoder\.layers\.2.* is missing"),
        ({"vision_layers": 1}, r"vision\.encoder\.layers\.1.* is unknown"),
        ({"text_intermediate_size": 60}, r"has shape \[64, 32\] and not \[60, 32\]"),
    ]:
        with pytest.raises(ValueError, match=f"weights must fit the config.*{message}"):
            ImageReward.from_official(golden_weights, replace(golden_config, **values), golden_case["vocab"])


def test_checkpoint_with_a_foreign_tensor_is_refused(
    golden_weights: Path, golden_config: ImageRewardConfig, golden_case: Record, tmp_path: Path
) -> None:
    state = load_file(golden_weights) | {"blip.itm_head.weight": torch.zeros(2)}
    save_file(state, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match=r"no tensor 'itm_head\.weight'"):
        ImageReward.from_official(tmp_path / "foreign.safetensors", golden_config, golden_case["vocab"])


def test_files_that_are_no_checkpoints_are_refused(
    golden_config: ImageRewardConfig, golden_case: Record, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        ImageReward.from_official(tmp_path / "missing.pt", golden_config, golden_case["vocab"])
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="must map names to tensors"):
        ImageReward.load(tmp_path / "list.pt", vocab=tmp_path)
    torch.save({"weight": Path("an object that is no tensor")}, tmp_path / "object.pt")
    with pytest.raises(ValueError, match=r"must hold tensors, numbers and texts only.* it needs "):
        ImageReward.load(tmp_path / "object.pt", vocab=tmp_path)


def test_incomplete_folder_is_refused(reward: ImageReward, tmp_path: Path) -> None:
    reward.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold vocab\.txt"):
        ImageReward.from_pretrained(tmp_path)


def test_folder_with_an_unknown_field_is_refused(reward: ImageReward, tmp_path: Path) -> None:
    reward.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(values | {"num_heads": 3}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"ImageRewardConfig\.num_heads must be one of .*, got num_heads=3"):
        ImageReward.from_pretrained(tmp_path)


def test_vocabulary_larger_than_the_network_is_refused(reward: ImageReward) -> None:
    with pytest.raises(ValueError, match="vocab_size must cover the tokenizer's 16 ids, got 15"):
        ImageReward(ImageRewardConfig(vocab_size=15), reward.tokenizer)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text_heads": 7}, "text_heads must divide hidden_size, got 7 and 768"),
        ({"vision_heads": 6}, "vision_heads must divide vision_hidden_size, got 6 and 1024"),
        ({"patch_size": 15}, "patch_size must divide image_size, got 15 and 224"),
        ({"text_layers": 0}, "text_layers must be at least 1, got 0"),
        ({"vision_heads": True}, "vision_heads must be a valid integer, got True"),
        ({"head_widths": (8, -1)}, r"head_widths\[1\] must be at least 1, got -1"),
        ({"std": 0.0}, "std must be above 0, got 0.0"),
        ({"mean": float("nan")}, "mean must be a finite number, got nan"),
        ({"max_length": 513}, "max_length must be at most max_positions=512, got 513"),
        ({"max_length": 1}, "max_length must be at least 2, got 1"),
        ({"image_std": (0.2, 0.0, 0.2)}, r"image_std\[1\] must be above 0, got 0.0"),
        ({"image_mean": (0.5, 0.5)}, r"image_mean\[2\] must be given, got nothing"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_config_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageRewardConfig(**values)
