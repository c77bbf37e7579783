import base64
import io
from pathlib import Path

import pytest
import torch
from PIL import Image

from evaluation import Pixels, save_grid
from evaluation.grid import data_uri


def colours(count: int, side: int) -> Pixels:
    stack = torch.zeros(count, 3, side, side, dtype=torch.uint8)
    for k in range(count):
        stack[k] = torch.tensor([40 * k, 200, 7], dtype=torch.uint8).reshape(3, 1, 1)
    return stack


def test_a_grid_enlarges_small_images_by_a_whole_factor_and_sets_them_in_rows(tmp_path: Path) -> None:
    save_grid(colours(5, 48), [""] * 5, tmp_path / "new" / "grid.png", columns=3, side=128)
    with Image.open(tmp_path / "new" / "grid.png") as grid:
        # 48 pixels become 144, three times; gaps of 8 around.
        assert grid.size == (3 * 152 + 8, 2 * 152 + 8)
        for k in range(5):
            left, top = 8 + k % 3 * 152, 8 + k // 3 * 152
            for corner in ((left, top), (left + 143, top + 143)):
                assert grid.getpixel(corner) == (40 * k, 200, 7)
        assert grid.getpixel((8 + 2 * 152 + 70, 8 + 152 + 70)) == (255, 255, 255)


def test_captions_are_drawn_below_and_broken_between_words(tmp_path: Path) -> None:
    save_grid(colours(1, 128), ["a photo of a large striped red star on a pink background"], tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.height > 128 + 2 * 8 + 2 * 13
        below = grid.crop((0, 136, grid.width, grid.height)).convert("L")
        assert min(below.tobytes()) < 64


def test_captions_and_images_have_to_match(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="captions must be one for each of at least one image, got 1 for 2"):
        save_grid(colours(2, 8), ["a"], tmp_path / "grid.png")
    with pytest.raises(ValueError, match="got 0 for 0"):
        save_grid(colours(0, 8), [], tmp_path / "grid.png")


@pytest.mark.parametrize(("side", "shown"), [(64, 64), (512, 256)])
def test_embedded_images_are_exact_when_small_and_reduced_when_large(side: int, shown: int) -> None:
    kind, _, content = data_uri(colours(3, side)[2]).partition(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        assert image.size == (shown, shown)
        assert image.getpixel((shown // 2, shown // 2)) == (80, 200, 7)
