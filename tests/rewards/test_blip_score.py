"""The BLIP score: the official numbers, and what holds for every network of its structure."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from golden_case import GoldenCase, Record, Tensors
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from rewards import BlipTokenizer, ImageRewardConfig, Reward
from rewards.blip import OFFICIAL_URL, BLIPScore, BLIPScoreConfig
from rewards.named import FACTORIES
from rewards.preprocess import pil_to_square

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "cat", "dog", "on", "the", "table", "##s")


@pytest.fixture(scope="session")
def official_state(golden_weights: Path) -> dict[str, Tensor]:
    """The golden network in the layout of BLIP's own checkpoint, with what its pretraining leaves in it."""
    state = {name.removeprefix("blip."): tensor for name, tensor in load_file(golden_weights).items()}
    state = {name: tensor for name, tensor in state.items() if not name.startswith("mlp.")}
    averages = {f"{name.replace('.', '_m.', 1)}": torch.zeros_like(tensor) for name, tensor in state.items()}
    others = {
        "text_decoder.bert.embeddings.word_embeddings.weight": torch.zeros(118, 32),
        "text_decoder.cls.predictions.bias": torch.zeros(118),
        "itm_head.weight": torch.zeros(2, 32),
        "itm_head.bias": torch.zeros(2),
        "image_queue": torch.zeros(256, 4),
        "text_queue": torch.zeros(256, 4),
        "queue_ptr": torch.zeros(1, dtype=torch.long),
        "temp": torch.tensor(0.07),
    }
    assert "visual_encoder_m.cls_token" in averages
    return state | averages | others


@pytest.fixture(scope="session")
def blip_config(golden_config: ImageRewardConfig) -> BLIPScoreConfig:
    """Sizes of the golden network."""
    towers = {name: getattr(golden_config, name) for name in BLIPScoreConfig.__dataclass_fields__ if name in SHARED}
    return BLIPScoreConfig(**towers)


SHARED = ImageRewardConfig.__dataclass_fields__.keys() & BLIPScoreConfig.__dataclass_fields__.keys()


@pytest.fixture(scope="session")
def golden_blip(
    official_state: dict[str, Tensor],
    blip_config: BLIPScoreConfig,
    golden_case: Record,
    tmp_path_factory: pytest.TempPathFactory,
) -> BLIPScore:
    """The golden network, read from a file like BLIP's; frozen, not to be changed by a test."""
    path = tmp_path_factory.mktemp("blip") / "model_large.pth"
    torch.save({"model": official_state}, path)
    return BLIPScore.from_official(path, blip_config, golden_case["vocab"])


def test_a_folder_with_the_official_file_and_a_vocabulary_is_loaded(
    official_state: dict[str, Tensor], blip_config: BLIPScoreConfig, golden_case: Record, tmp_path: Path
) -> None:
    torch.save({"model": official_state}, tmp_path / "model_large.pth")
    (tmp_path / "vocab.txt").write_text("\n".join(golden_case["vocab"]) + "\n", encoding="utf-8")
    loaded = BLIPScore.from_path(tmp_path, blip_config)
    assert loaded.tokenizer.vocabulary == tuple(golden_case["vocab"])
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.fixture
def blip() -> BLIPScore:
    """A fresh trainable network of a few thousand weights."""
    config = BLIPScoreConfig(
        image_size=16,
        patch_size=8,
        vision_hidden_size=12,
        vision_layers=2,
        vision_heads=2,
        vision_intermediate_size=24,
        vocab_size=len(WORDS) + 2,
        hidden_size=16,
        text_layers=2,
        text_heads=4,
        text_intermediate_size=32,
        max_positions=24,
        max_length=12,
        projection_size=6,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BLIPScore(config, BlipTokenizer(WORDS))


def atol() -> float:
    (absolute,) = GoldenCase("image_reward_small").tolerance("blip_scores")
    return absolute


def test_scores_are_the_official_ones(golden_blip: BLIPScore, golden: Tensors, golden_case: Record) -> None:
    scores = golden_blip(golden["images"].float() / 255, golden_case["prompts"])
    torch.testing.assert_close(scores, golden["blip_scores"], rtol=0, atol=atol())


@pytest.mark.parametrize("index", [0, 1])
def test_files_score_as_officially(golden_blip: BLIPScore, golden: Tensors, golden_case: Record, index: int) -> None:
    picture = Image.fromarray(golden[f"file_image{index}/image"].permute(1, 2, 0).contiguous().numpy())
    squares = pil_to_square(picture, 224)[None].expand(3, -1, -1, -1)
    scores = golden_blip(squares, golden_case["prompts"])
    torch.testing.assert_close(scores, golden[f"file_image{index}/blip_scores"], rtol=0, atol=atol())


def test_default_sizes_are_those_of_blip_large() -> None:
    with torch.device("meta"):
        network = BLIPScore(BLIPScoreConfig(), BlipTokenizer(WORDS))
    # The 446.666 million values of ImageReward's file, without its head and the position ids.
    head = [768, 1024, 128, 64, 16, 1]
    in_the_head = sum((a + 1) * b for a, b in pairwise(head))
    assert sum(p.numel() for p in network.parameters()) + in_the_head + 512 == pytest.approx(446.666e6, abs=500)


def test_a_tensor_that_pretraining_does_not_explain_is_refused(
    official_state: dict[str, Tensor], blip_config: BLIPScoreConfig, golden_case: Record, tmp_path: Path
) -> None:
    missing = {name: tensor for name, tensor in official_state.items() if name != "text_proj.bias"}
    for state, message in [
        (official_state | {"temperature": torch.zeros(1)}, "no tensor 'temperature'"),
        (official_state | {"mlp.layers.0.bias": torch.zeros(1)}, r"head\.0\.bias is unknown"),
        (missing, r"text_proj\.bias is missing"),
    ]:
        torch.save({"model": state}, tmp_path / "model_large.pth")
        with pytest.raises(ValueError, match=message):
            BLIPScore.from_official(tmp_path / "model_large.pth", blip_config, golden_case["vocab"])


def test_absent_weights_are_told_how_to_be_got(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"have to be given by their path: save {OFFICIAL_URL} as model_large"):
        BLIPScore.load()
    with pytest.raises(FileNotFoundError, match=r"nothing at .*none\.pth: save"):
        BLIPScore.load(tmp_path / "none.pth")


def test_file_of_another_size_is_refused_by_load(official_state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"model": official_state}, tmp_path / "model_large.pth")
    words = [*WORDS, *map(str, range(30522 - len(WORDS)))]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match="weights must fit the config"),
    ):
        BLIPScore.load(tmp_path / "model_large.pth", vocab=tmp_path / "vocab.txt")


def test_saved_network_scores_exactly_the_same(
    blip: BLIPScore, pictures: Tensor, prompts: list[str], tmp_path: Path
) -> None:
    blip.save_pretrained(tmp_path / "folder")
    loaded = BLIPScore.load(tmp_path / "folder")
    assert loaded.config == blip.config
    assert torch.equal(loaded(pictures, prompts), blip(pictures, prompts))
    (tmp_path / "folder" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold model\.safetensors"):
        BLIPScore.load(tmp_path / "folder")


def test_folder_with_an_unknown_field_is_refused(blip: BLIPScore, tmp_path: Path) -> None:
    blip.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(values | {"mean": 0.2}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"BLIPScoreConfig\.mean must be one of .*, got mean=0\.2"):
        BLIPScore.load(tmp_path)


def test_it_is_a_differentiable_reward_with_a_short_name(blip: BLIPScore) -> None:
    assert isinstance(blip, Reward)
    assert blip.differentiable
    assert FACTORIES["blip"] == MethodType(vars(BLIPScore.load.__func__)["__wrapped__"], BLIPScore)  # unchecked


def test_score_is_the_cosine_of_the_two_embeddings(blip: BLIPScore, pictures: Tensor, prompts: list[str]) -> None:
    images, texts = blip.image_embeddings(pictures), blip.text_embeddings(prompts)
    assert images.shape == texts.shape == (5, 6)
    torch.testing.assert_close(images.norm(dim=1), torch.ones(5), rtol=1e-6, atol=0)
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(5), rtol=1e-6, atol=0)
    torch.testing.assert_close(blip(pictures, prompts), (images @ texts.T).diagonal(), rtol=0, atol=1e-6)


def test_score_does_not_depend_on_the_rest_of_the_batch(blip: BLIPScore, pictures: Tensor, prompts: list[str]) -> None:
    together = blip(pictures, prompts)
    alone = torch.cat([blip(pictures[i : i + 1], prompts[i : i + 1]) for i in range(5)])
    order = torch.tensor([3, 0, 4, 2, 1])
    permuted = blip(pictures[order], [prompts[i] for i in order])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
    torch.testing.assert_close(permuted, together[order], rtol=0, atol=1e-5)


def test_image_gradient_is_that_of_finite_differences(blip: BLIPScore) -> None:
    # Scores are float32, so the step is large; measured, the two agree to 5e-4.
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(2, 3, 24, 20, generator=generator, requires_grad=True)
    gradient = torch.autograd.grad(blip(images, ["a cat", "red dogs"]).sum(), images)[0]
    for _ in range(3):
        direction = torch.randn(images.shape, generator=generator)
        step = 3e-3 / direction.norm() * images.numel() ** 0.5 * 0.3
        with torch.no_grad():
            up, down = (blip(images + sign * step * direction, ["a cat", "red dogs"]).sum() for sign in (1, -1))
        expected = (up - down).double() / (2 * step)
        found = (gradient * direction).sum().double()
        torch.testing.assert_close(found, expected, rtol=3e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_checkpointing_keeps_scores_and_gradients_bit_identical(
    blip: BLIPScore, pictures: Tensor, prompts: list[str], mode: str
) -> None:
    blip.train(mode == "train")
    results = []
    for enabled in (False, True):
        blip.gradient_checkpointing = enabled
        images = pictures.clone().requires_grad_()
        scores = blip(images, prompts)
        results.append((scores, *torch.autograd.grad(scores.sum(), [images, *blip.vision.parameters()])))
    assert all(torch.equal(plain, checkpointed) for plain, checkpointed in zip(*results, strict=True))


def test_loaded_weights_are_frozen_and_gradients_still_reach_the_images(
    golden_blip: BLIPScore, golden: Tensors, golden_case: Record
) -> None:
    images = (golden["images"].float() / 255).requires_grad_()
    golden_blip(images, golden_case["prompts"]).sum().backward()
    assert not golden_blip.training
    assert not any(p.requires_grad or p.grad is not None for p in golden_blip.parameters())
    assert images.grad is not None
    assert images.grad.abs().sum(dim=(1, 2, 3)).min() > 0


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.05), (torch.float16, 0.005)])
def test_half_precision_moves_scores_little(
    blip: BLIPScore, pictures: Tensor, prompts: list[str], dtype: torch.dtype, bound: float
) -> None:
    full = blip(pictures, prompts)
    half = blip.to(dtype)(pictures, prompts)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("images", "prompts", "error", "message"),
    [
        (torch.rand(3, 16, 16), ["a"], TypeError, "images must be an instance of Float"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), ["a"], TypeError, "images must be an instance of Float"),
        (torch.rand(2, 3, 16, 16), ["a"], ValueError, "one string for each image, got 1 for 2 images"),
        (torch.rand(2, 3, 16, 16), ["a", 3], TypeError, r"prompts\[1\] must be a valid string, got 3"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_pairs_are_refused(
    blip: BLIPScore, images: Tensor, prompts: Sequence[Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        blip(images, prompts)


def test_wrong_sizes_are_refused(blip: BLIPScore) -> None:
    with pytest.raises(ValueError, match="projection_size must be at least 1, got 0"):
        BLIPScoreConfig(projection_size=0)
    with pytest.raises(ValueError, match="text_heads must divide hidden_size, got 7 and 768"):
        BLIPScoreConfig(text_heads=7)
    with pytest.raises(ValueError, match="vocab_size must cover the tokenizer's 16 ids, got 15"):
        BLIPScore(BLIPScoreConfig(vocab_size=15), blip.tokenizer)
