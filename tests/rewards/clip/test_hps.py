"""HPS v2: open_clip's checkpoint in transformers' network, against open_clip's forward pass written anew."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rewards import Reward, hps
from rewards.clip_encoder import ClipEncoder, ClipTokenizer
from rewards.hps import VIT_H_14, HPSv2, from_open_clip_names, resize_and_pad
from rewards.preprocess import CLIP_MEAN, CLIP_STD


class Block(nn.Module):
    """A block of either tower, with torch's own attention."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        layers = [("c_fc", nn.Linear(width, hidden)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(hidden, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """The blocks of either tower."""

    def __init__(self, width: int, heads: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    """open_clip's vision tower."""

    def __init__(self, width: int, patch: int, patches: int, dim: int, **sizes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(patches + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, **sizes)
        self.proj = nn.Parameter(torch.empty(width, dim))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """open_clip's CLIP, with its names of tensors."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.visual = Visual(16, patch=8, patches=16, dim=24, heads=2, hidden=32, layers=2)
        self.transformer = Transformer(24, heads=4, hidden=48, layers=2)
        self.token_embedding = nn.Embedding(vocab, 24)
        self.positional_embedding = nn.Parameter(torch.empty(12, 24))
        self.ln_final = nn.LayerNorm(24)
        self.text_projection = nn.Parameter(torch.empty(24, 24))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        generator = torch.Generator().manual_seed(3)
        for name, parameter in self.named_parameters():
            if name != "logit_scale":
                mean = 1.0 if ".ln_" in f".{name}" and name.endswith("weight") else 0.0
                nn.init.normal_(parameter, mean=mean, std=0.3, generator=generator)

    def cosines(self, squares: Tensor, ids: Tensor) -> Tensor:
        """Takes images in [0, 1] and ids that are padded with 0."""
        pixels = (squares - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
        future = torch.full((12, 12), -torch.inf).triu(1)
        text = self.ln_final(self.transformer(self.token_embedding(ids) + self.positional_embedding, future))
        text = text[torch.arange(len(ids)), ids.argmax(dim=1)] @ self.text_projection
        return functional.cosine_similarity(self.visual(pixels), text)


@pytest.fixture
def open_clip(tokenizer: ClipTokenizer) -> OpenClip:
    return OpenClip(len(tokenizer)).eval()


@pytest.fixture
def official(open_clip: OpenClip, tmp_path: Path) -> Path:
    """A checkpoint as the authors publish them, but small."""
    torch.save({"state_dict": open_clip.state_dict()}, tmp_path / "HPS_v2.1_compressed.pt")
    return tmp_path / "HPS_v2.1_compressed.pt"


@pytest.fixture
def score(official: Path, tokenizer: ClipTokenizer, config: dict[str, Any]) -> HPSv2:
    return HPSv2.from_official(official, tokenizer, config)


@pytest.fixture
def small(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the official checkpoints have the small network's sizes."""
    monkeypatch.setattr(hps, "VIT_H_14", config)


def test_it_is_a_differentiable_reward(score: HPSv2) -> None:
    assert isinstance(score, Reward)
    assert score.differentiable


def test_converted_network_scores_as_open_clips_does(
    score: HPSv2, open_clip: OpenClip, pictures: Tensor, prompts: list[str]
) -> None:
    tokens = score.encoder.tokenizer(prompts, 12)
    squares = pictures[:, :, :32, :32]
    expected = open_clip.cosines(squares, tokens.ids * tokens.mask)
    assert expected.std() > 0.05
    torch.testing.assert_close(score(squares, prompts), expected, rtol=0, atol=1e-5)


def test_gradient_to_the_images_is_that_of_open_clips_network(
    score: HPSv2, open_clip: OpenClip, pictures: Tensor, prompts: list[str]
) -> None:
    tokens = score.encoder.tokenizer(prompts, 12)
    images = pictures[:, :, :32, :32].clone().requires_grad_()
    (expected,) = torch.autograd.grad(open_clip.cosines(images, tokens.ids * tokens.mask).sum(), images)
    (gradient,) = torch.autograd.grad(score(images, prompts).sum(), images)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_every_tensor_of_open_clip_is_used_once(open_clip: OpenClip, score: HPSv2) -> None:
    converted = from_open_clip_names(open_clip.state_dict())
    assert converted.keys() == score.encoder.model.state_dict().keys()
    assert sum(t.numel() for t in converted.values()) == sum(t.numel() for t in open_clip.state_dict().values())


@pytest.mark.parametrize("name", ["visual.conv1.bias", "transformer.resblocks.0.ls_1.gamma", "module.logit_scale", "w"])
def test_unknown_tensor_is_refused(open_clip: OpenClip, name: str) -> None:
    with pytest.raises(ValueError, match=f"no tensor '{name}'"):
        from_open_clip_names({**open_clip.state_dict(), name: torch.zeros(3)})


def test_missing_tensor_is_refused(
    open_clip: OpenClip, tokenizer: ClipTokenizer, config: dict[str, Any], official: Path
) -> None:
    state = open_clip.state_dict()
    del state["text_projection"]
    torch.save({"state_dict": state}, official)
    with pytest.raises(ValueError, match=r"text_projection\.weight is missing"):
        HPSv2.from_official(official, tokenizer, config)


def test_file_without_a_state_dict_is_refused(open_clip: OpenClip, tokenizer: ClipTokenizer, official: Path) -> None:
    for content in (open_clip.state_dict(), [1], {"state_dict": {"epoch": 3}}):
        torch.save(content, official)
        with pytest.raises(ValueError, match=r"under state_dict, and .*HPS_v2\.1_compressed\.pt does not"):
            HPSv2.from_official(official, tokenizer)


def test_default_sizes_are_those_of_the_official_checkpoint(tokenizer: ClipTokenizer) -> None:
    with torch.device("meta"):
        encoder = ClipEncoder(VIT_H_14, tokenizer)
    assert {module.eps for module in encoder.modules() if isinstance(module, nn.LayerNorm)} == {1e-5}
    # HPS_v2.1_compressed.pt has 1,972,490,005 bytes, 2 for each weight and up to a kilobyte for each of 580 tensors.
    halves = 2 * sum(parameter.numel() for parameter in encoder.parameters())
    assert 0 < 1_972_490_005 - halves < 580 * 1024


def test_batch_and_order_do_not_matter(score: HPSv2, check_batches: Callable[[nn.Module], None]) -> None:
    check_batches(score)


def test_gradient_to_the_images_agrees_with_differences(
    score: HPSv2, check_gradient: Callable[[nn.Module], None]
) -> None:
    check_gradient(score)


def test_long_side_is_scaled_and_the_short_one_padded_with_black() -> None:
    grey = torch.full((1, 3, 12, 30), 0.5)
    padded = resize_and_pad(grey, 10)  # 4 x 10
    assert padded.shape == (1, 3, 10, 10)
    torch.testing.assert_close(padded[:, :, 3:7], torch.full((1, 3, 4, 10), 0.5), rtol=0, atol=1e-6)
    assert not padded[:, :, :3].any()
    assert not padded[:, :, 7:].any()


def test_odd_padding_has_one_more_on_the_right() -> None:
    padded = resize_and_pad(torch.ones(1, 3, 10, 5), 10)
    assert padded[0, 0, 0].tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0, 0]


def test_square_image_of_the_right_size_passes_unchanged() -> None:
    image = torch.rand(1, 3, 10, 10)
    assert torch.equal(resize_and_pad(image, 10), image)


def test_nothing_of_the_image_is_cropped(score: HPSv2) -> None:
    images = torch.rand(1, 3, 64, 32, generator=torch.Generator().manual_seed(4)).requires_grad_()
    score(images, ["a cat"]).sum().backward()
    assert images.grad is not None
    assert (images.grad.abs().sum(dim=(0, 1, 3)) > 0).all()


def test_saved_folder_is_loaded(score: HPSv2, pictures: Tensor, prompts: list[str], tmp_path: Path) -> None:
    score.save_pretrained(tmp_path / "converted")
    assert torch.equal(HPSv2.load(tmp_path / "converted")(pictures, prompts), score(pictures, prompts))


@pytest.mark.usefixtures("small")
def test_official_file_in_a_folder_is_loaded_by_version(
    score: HPSv2, official: Path, pictures: Tensor, prompts: list[str]
) -> None:
    score.encoder.tokenizer.save(official.parent)
    expected = score(pictures, prompts)
    assert torch.equal(HPSv2.load(official.parent)(pictures, prompts), expected)
    with pytest.raises(FileNotFoundError, match=r"HPS v2\.0 must hold HPS_v2_compressed\.pt.*hf download xswu/HPSv2"):
        HPSv2.load(official.parent, version="v2.0")
    official.rename(official.with_name("HPS_v2_compressed.pt"))
    assert torch.equal(HPSv2.load(official.parent, version="v2.0")(pictures, prompts), expected)


@pytest.mark.parametrize(("version", "name"), [("v2.1", "HPS_v2.1_compressed.pt"), ("v2.0", "HPS_v2_compressed.pt")])
def test_official_file_is_asked_of_the_hub(version: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(repository: str, name: str, *, revision: str) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(OSError, match=f"could not get {name} of xswu/HPSv2"):
        HPSv2.load(version=version)


@pytest.mark.usefixtures("unchecked")
def test_unknown_version_is_refused() -> None:
    with pytest.raises(ValueError, match=r"version must be 'v2\.1' or 'v2\.0', got 'v3'"):
        HPSv2.load(version="v3")  # ty: ignore[invalid-argument-type]


def test_wrong_pairs_are_refused(score: HPSv2, pictures: Tensor) -> None:
    with pytest.raises(ValueError, match="one string for each image, got 1 for 5 images"):
        score(pictures, ["a"])
