"""Aesthetic score: the official head's numbers, and the head on CLIP's unit embeddings."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_case import GoldenCase, Tensors
from torch import Tensor, nn

from rewards import Reward, aesthetic
from rewards.aesthetic import HEAD, Aesthetic, AestheticHead
from rewards.clip_encoder import ClipEncoder
from rewards.public_files import sha256_of

CASE = GoldenCase("aesthetic_head", left_out={"layers": "words; an official file of these shapes is loaded below"})
AFFINE = GoldenCase("aesthetic_head_affine")
OFFICIAL_SHAPES = {"0": (1024, 768), "2": (128, 1024), "4": (64, 128), "6": (16, 64), "7": (1, 16)}


@pytest.fixture(scope="session")
def golden() -> Tensors:
    """Embeddings, and the official head's scores for them."""
    return CASE.tensors


@pytest.fixture(scope="session")
def affine() -> AestheticHead:
    """The official head, multiplied out in float64; frozen, not to be changed by a test."""
    weights = AFFINE.tensors
    head = AestheticHead((768, 1)).double().requires_grad_(False)
    head.load_state_dict({"layers.0.weight": weights["weight"][None], "layers.0.bias": weights["bias"]})
    return head


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in the official form with random weights."""
    generator = torch.Generator().manual_seed(5)
    state = {}
    for number, shape in OFFICIAL_SHAPES.items():
        state[f"layers.{number}.weight"] = torch.randn(shape, generator=generator) * shape[1] ** -0.5
        state[f"layers.{number}.bias"] = torch.randn(shape[0], generator=generator)
    path = tmp_path_factory.mktemp("head") / HEAD.name
    torch.save(state, path)
    return path


@pytest.fixture
def score(encoder: ClipEncoder) -> Aesthetic:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        return Aesthetic(encoder, AestheticHead((24, 8, 4, 1)))


def test_scores_are_the_official_ones(affine: AestheticHead, golden: Tensors) -> None:
    single_atol, double_atol = CASE.tolerance()
    exact = affine(golden["embedding"].double())
    torch.testing.assert_close(exact, golden["score_float64"], rtol=0, atol=double_atol)
    single = affine(golden["embedding"])
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, golden["score"], rtol=0, atol=single_atol)


def test_golden_head_is_that_of_the_published_file(affine: AestheticHead) -> None:
    for case in (CASE, AFFINE):
        assert HEAD.name in case.record["weights"]
        assert HEAD.sha256 in case.record["weights"]
    (layer,) = affine.layers
    assert isinstance(layer, nn.Linear)
    stated = CASE.record["affine_map"]
    assert [float(layer.weight.norm()), float(layer.bias)] == pytest.approx(
        [stated["weight_norm"], stated["bias"]], rel=1e-12
    )


def test_official_file_is_a_chain_of_linear_maps(official: Path) -> None:
    state = torch.load(official, weights_only=True)
    embeddings = torch.randn(3, 768, generator=torch.Generator().manual_seed(7))
    expected = embeddings
    for number in OFFICIAL_SHAPES:
        expected = expected @ state[f"layers.{number}.weight"].T + state[f"layers.{number}.bias"]
    head = AestheticHead.from_official(official)
    torch.testing.assert_close(head(embeddings), expected[:, 0], rtol=1e-5, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in head.parameters())


def test_head_collapses_to_one_layer(official: Path) -> None:
    head = AestheticHead.from_official(official)
    collapsed = head.collapsed()
    embeddings = torch.randn(3, 768, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    assert collapsed.widths == (768, 1)
    torch.testing.assert_close(collapsed(embeddings), head.double()(embeddings), rtol=0, atol=1e-12)


def test_it_is_a_differentiable_reward(score: Aesthetic) -> None:
    assert isinstance(score, Reward)
    assert score.differentiable


def test_prompts_do_not_matter_and_images_do(score: Aesthetic, pictures: Tensor, prompts: list[str]) -> None:
    scores = score(pictures, prompts)
    assert torch.equal(score(pictures, [""] * 5), scores)
    torch.testing.assert_close(scores, score.head(score.encoder.image_embeddings(pictures)), rtol=0, atol=0)


def test_batch_and_order_do_not_matter(score: Aesthetic, check_batches: Callable[[nn.Module], None]) -> None:
    check_batches(score)


def test_gradient_to_the_images_agrees_with_differences(
    score: Aesthetic, check_gradient: Callable[[nn.Module], None]
) -> None:
    check_gradient(score)


def test_head_stays_in_float32_under_autocast_and_in_half_precision(affine: AestheticHead, golden: Tensors) -> None:
    expected = affine(golden["embedding"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(affine(golden["embedding"]), expected)
    assert affine(golden["embedding"].bfloat16()).dtype == torch.float32


def test_folder_with_encoder_and_head_is_loaded(
    encoder: ClipEncoder, official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aesthetic, "HEAD", replace(HEAD, sha256=sha256_of(official)))
    encoder.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"must hold sac\+logos\+ava1-l14-linearMSE\.pth"):
        Aesthetic.load(tmp_path)
    (tmp_path / HEAD.name).write_bytes(official.read_bytes())
    with pytest.raises(ValueError, match="head must take the encoder's embeddings of width 24, got 768"):
        Aesthetic.load(tmp_path)
    # An encoder whose embeddings are as wide as the official one's.
    encoder.model.config.projection_dim = 768
    encoder.model.visual_projection = nn.Linear(16, 768, bias=False)
    encoder.model.text_projection = nn.Linear(24, 768, bias=False)
    encoder.save_pretrained(tmp_path)
    loaded = Aesthetic.load(tmp_path)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    loaded(images, ["", ""]).sum().backward()
    assert images.grad is not None


def test_head_with_other_content_is_refused(official: Path) -> None:
    with pytest.raises(ValueError, match="has other content than expected"):
        Aesthetic.load(official.parent)


@pytest.mark.parametrize(
    ("name", "message"),
    [("layers.1.weight", r"no tensor 'layers\.1\.weight'"), ("mlp.bias", r"no tensor 'mlp\.bias'")],
)
def test_foreign_tensor_is_refused(official: Path, tmp_path: Path, name: str, message: str) -> None:
    torch.save(torch.load(official, weights_only=True) | {name: torch.zeros(1)}, tmp_path / "head.pth")
    with pytest.raises(ValueError, match=message):
        AestheticHead.from_official(tmp_path / "head.pth")


def test_head_that_does_not_end_in_one_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"widths must be at least two, the last of them 1, got \(768, 2\)"):
        AestheticHead((768, 2))


def test_wrong_pairs_are_refused(score: Aesthetic, pictures: Tensor) -> None:
    with pytest.raises(ValueError, match="one string for each image, got 1 for 5 images"):
        score(pictures, ["a"])
