"""Images side by side: each in its place, to the byte, with the whole of its caption below it."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ImageFont

from overpaint.training import image_grid
from overpaint.training.logging import _lines


def colours(count: int, side: int) -> torch.Tensor:
    colour = torch.tensor([[40.0 * k, 200.0, 7.0] for k in range(count)]) / 255
    return colour[:, :, None, None].expand(count, 3, side, side)


def test_every_image_is_in_its_place_with_its_pixels_sharp() -> None:
    images = torch.rand(5, 3, 4, 8, generator=torch.Generator().manual_seed(0)) * 1.2 - 0.1
    grid = np.asarray(image_grid(images))
    factor, gap = 16, 8  # eight pixels are enlarged to 128
    assert grid.shape == (2 * (64 + gap) + gap, 3 * (128 + gap) + gap, 3)
    expected = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for index in range(5):
        row, column = divmod(index, 3)
        top, left = gap + row * (64 + gap), gap + column * (128 + gap)
        tile = grid[top : top + 64, left : left + 128]
        np.testing.assert_array_equal(tile[::factor, ::factor], expected[index])
        np.testing.assert_array_equal(tile[factor - 1 :: factor, factor - 1 :: factor], expected[index])
    assert (grid[-72:-8, -136:-8] == 255).all()  # the sixth place is empty


@pytest.mark.parametrize(("pixels", "shown"), [(48, 144), (128, 128), (200, 200)])
def test_small_images_are_enlarged_by_a_whole_factor_and_set_in_as_many_columns_as_asked(
    pixels: int, shown: int
) -> None:
    grid = image_grid(colours(5, pixels), [""] * 5, columns=3, side=128)
    step = shown + 8
    assert grid.size == (3 * step + 8, 2 * step + 8)
    for k in range(5):
        left, top = 8 + k % 3 * step, 8 + k // 3 * step
        for corner in ((left, top), (left + shown - 1, top + shown - 1)):
            assert grid.getpixel(corner) == (40 * k, 200, 7)
    assert image_grid(colours(2, pixels), columns=3).size[0] == 2 * step + 8


def test_captions_stand_below_their_images_and_not_beside_them() -> None:
    images = colours(2, 128)
    plain = np.asarray(image_grid(images))
    grid = np.asarray(image_grid(images, ["a photo of a large striped red star on a pink background", "éü\nß"]))
    below = grid.shape[0] - plain.shape[0]
    assert below >= 2 * 13
    np.testing.assert_array_equal(grid[:136], plain[:136])
    for left in (8, 144):
        assert grid[136:, left : left + 128].min() < 64
    for gap in (grid[:, :6], grid[:, 138:142], grid[:, 274:]):  # a letter may begin a pixel to the left of its line
        assert (gap == 255).all()


def test_captions_are_broken_between_words_and_only_a_word_that_does_not_fit_is_cut() -> None:
    font = ImageFont.load_default()
    text = "a striped red circle, and a great deal more than fits into one line\nor two"
    lines = _lines(text, 128, font)
    assert " ".join(lines) == text.replace("\n", " ")
    assert max(map(font.getlength, lines)) <= 128
    for line, following in pairwise(lines):
        assert font.getlength(f"{line} {following.split()[0]}") > 128
    long = "x" * 100
    first, cut, last = _lines(f"a {long} b", 128, font)
    assert (first, last) == ("a", "b")
    assert long.startswith(cut)
    assert font.getlength(cut) <= 128 < font.getlength(f"{cut}x")
    assert _lines(" ", 128, font) == []


@pytest.mark.parametrize(
    ("count", "captions", "message"),
    [
        (0, None, "images must hold"),
        (0, [], "images must hold"),
        (2, ["one"], "captions must be one for each of 2 images, got 1"),
        (2, [], "captions must be one for each of 2 images, got 0"),
    ],
)
def test_a_grid_of_nothing_or_with_missing_captions_is_refused(count: int, captions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_grid(torch.zeros(count, 3, 8, 8), captions)
