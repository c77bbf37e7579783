import base64
import io

import pytest
import torch
from PIL import Image

from overpaint.evaluation.images.files import data_uri


@pytest.mark.parametrize(("side", "shown"), [(64, 64), (512, 256)])
def test_embedded_images_are_exact_when_small_and_reduced_when_large(side: int, shown: int) -> None:
    pixels = torch.tensor([80, 200, 7], dtype=torch.uint8).reshape(3, 1, 1).expand(3, side, side)
    kind, _, content = data_uri(pixels).partition(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        assert image.size == (shown, shown)
        assert image.getpixel((shown // 2, shown // 2)) == (80, 200, 7)
