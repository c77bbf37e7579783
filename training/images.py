"""Grids of images with their captions."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

TILE = 128
"""Images narrower than this many pixels are enlarged by a whole factor, so that a caption fits below them."""
CAPTION_HEIGHT = 16
MARGIN = 2


def image_grid(images: Float[Tensor, "batch 3 H W"], captions: Sequence[str] | None = None) -> Image.Image:
    """Returns the images in rows, as near to a square as their number allows, each above its caption.

    Args:
        images: RGB in [0, 1]; values outside are clamped.
        captions: One text for each image, cut to the width of the image.

    Raises:
        ValueError: There are no images, or not one caption for each.
    """
    count, _, height, width = images.shape
    if count == 0:
        raise ValueError("images must hold at least one image, got none")
    if captions is not None and len(captions) != count:
        raise ValueError(f"captions must be one for each of {count} images, got {len(captions)}")

    factor = math.ceil(TILE / width)
    tile = (width * factor, height * factor)
    below = CAPTION_HEIGHT if captions is not None else 0
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    grid = Image.new(
        "RGB", (columns * (tile[0] + MARGIN) + MARGIN, rows * (tile[1] + below + MARGIN) + MARGIN), "white"
    )
    draw = ImageDraw.Draw(grid)
    font = ImageFont.load_default(size=CAPTION_HEIGHT - 5)

    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for index in range(count):
        row, column = divmod(index, columns)
        corner = (MARGIN + column * (tile[0] + MARGIN), MARGIN + row * (tile[1] + below + MARGIN))
        picture = Image.fromarray(np.ascontiguousarray(pixels[index])).resize(tile, Image.Resampling.NEAREST)
        grid.paste(picture, corner)
        if captions is not None:
            text = captions[index].replace("\n", " ")
            while text and font.getlength(text) > tile[0]:
                text = text[:-1]
            draw.text((corner[0], corner[1] + tile[1] + 1), text, fill="black", font=font)
    return grid
