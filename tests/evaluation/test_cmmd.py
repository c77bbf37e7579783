"""CMMD of vectors, held against sums over all pairs, and the embeddings of image files."""

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from overpaint.evaluation.images.files import to_images, write_png
from overpaint.evaluation.metrics.distances import clip_embeddings, cmmd
from rewards import ClipEncoder, ClipTokenizer


def unit(count: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(count, 12, generator=generator) + shift, dim=1)


def by_hand(first: Tensor, second: Tensor, unbiased: bool) -> float:
    def mean(one: Tensor, other: Tensor, apart: bool) -> float:
        values = [
            math.exp(-sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / (2 * 10.0**2))
            for i, x in enumerate(one.double().tolist())
            for j, y in enumerate(other.double().tolist())
            if not (apart and i == j)
        ]
        return math.fsum(values) / len(values)

    return 1000 * (mean(first, first, unbiased) + mean(second, second, unbiased) - 2 * mean(first, second, False))


@pytest.mark.parametrize("unbiased", [False, True])
def test_it_is_the_sum_over_all_pairs(unbiased: bool) -> None:
    first, second = unit(9, 0), unit(7, 1, shift=0.4)
    expected = by_hand(first, second, unbiased)
    # float64 keeps 1000 * 1e-15 of values near 1; the smaller is about 1.
    assert cmmd(first, second, unbiased=unbiased) == pytest.approx(expected, abs=1e-10)


def test_two_points_have_the_closed_form() -> None:
    # All of one set at one point, all of the other at the opposite: 2 (1 - exp(-4 / 200)).
    point = unit(1, 0)
    expected = 2000 * (1 - math.exp(-4 / 200))
    assert cmmd(point.repeat(3, 1), -point.repeat(5, 1)) == pytest.approx(expected, rel=1e-6)


def test_equal_sets_are_at_zero_and_order_does_not_matter() -> None:
    first, second = unit(20, 0), unit(30, 1, shift=0.3)
    assert cmmd(first, first) == pytest.approx(0, abs=1e-11)
    assert cmmd(first, first, unbiased=True) < 0
    assert cmmd(first, second) == pytest.approx(cmmd(second, first), abs=1e-11)
    assert cmmd(first.flip(0), second) == pytest.approx(cmmd(first, second), abs=1e-11)
    assert cmmd(first, unit(30, 1, shift=0.6)) > cmmd(first, second) > 0


@pytest.mark.parametrize("block", [1, 7, 30])
def test_blocks_do_not_matter(block: int) -> None:
    first, second = unit(20, 0), unit(30, 1, shift=0.3)
    assert cmmd(first, second, block=block) == pytest.approx(cmmd(first, second), abs=1e-11)


def test_the_two_estimators_differ_by_what_an_image_is_to_itself() -> None:
    # Over fresh draws of one distribution the unbiased one has mean 0, the biased one about 2 (1 - E k) / n.
    pairs = [(unit(16, 2 * k), unit(16, 2 * k + 1)) for k in range(200)]
    plain = sum(cmmd(one, other) for one, other in pairs) / 200
    unbiased = sum(cmmd(one, other, unbiased=True) for one, other in pairs) / 200
    assert plain == pytest.approx(2 * 1000 * (1 - math.exp(-2 / 200)) / 16, rel=0.02)
    assert abs(unbiased) < 0.02


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (unit(1, 0), unit(2, 0), "first must hold at least 2 vectors, got 1"),
        (unit(2, 0), unit(2, 0)[:, :5], "must be of one dimension, got 12 and 5"),
        (unit(2, 0), 2 * unit(2, 0), "second must hold vectors of length 1, got one that is 1 off"),
        (unit(2, 0), unit(2, 0) * math.nan, "second must hold vectors of length 1, got one that is nan off"),
    ],
)
def test_vectors_that_are_no_embeddings_are_refused(first: Tensor, second: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cmmd(first, second)


@pytest.fixture
def encoder() -> ClipEncoder:
    """A fresh network whose weights are large enough for every image to be told from the others."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = ClipTokenizer({piece: index for index, piece in enumerate(pieces)}, [])
    shared = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = {
        "projection_dim": 8,
        "text_config": shared | {"vocab_size": len(tokenizer), "max_position_embeddings": 8},
        "vision_config": shared | {"image_size": 16, "patch_size": 8},
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = ClipEncoder(config, tokenizer)
        for parameter in encoder.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
    return encoder


def test_embeddings_are_in_the_order_of_the_files_whatever_the_batch(encoder: ClipEncoder, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    paths, images = [], []
    for k in range(7):
        side = 16 if k % 3 else 24
        images.append(torch.randint(0, 256, (3, side, side), generator=generator, dtype=torch.uint8))
        paths.append(tmp_path / f"{k}.png")
        write_png(images[-1], paths[-1])
    with torch.no_grad():
        expected = torch.cat([encoder.image_embeddings(to_images(image[None])) for image in images])
    assert float((expected @ expected.T).triu(1).max()) < 0.999
    for batch_size in (1, 3, 16):
        torch.testing.assert_close(
            clip_embeddings(encoder, paths, batch_size=batch_size), expected, atol=1e-6, rtol=1e-5
        )


def test_files_that_are_no_images_are_refused(encoder: ClipEncoder, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:45])
    with pytest.raises(ValueError, match=r"b\.png cannot be read"):
        clip_embeddings(encoder, [tmp_path / "a.png", tmp_path / "b.png"])
    with pytest.raises(ValueError, match="paths must hold at least one image, got none"):
        clip_embeddings(encoder, [])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        clip_embeddings(encoder, [tmp_path / "a.png"], batch_size=0)
