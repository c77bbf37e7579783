"""Grids of images with their captions."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP = 8
"""Pixels between images, and around them."""
LINE = 13
"""Pixels from one line of a caption to the next."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def image_grid(
    images: Float[Tensor, "batch 3 H W"],
    captions: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    side: int = 128,
) -> Image.Image:
    """Returns the images in rows, each above its caption, which is broken between words.

    Args:
        images: RGB in [0, 1]; values outside are clamped.
        captions: One text for each image; a word wider than the image is cut.
        columns: Images in a row at most; as near to a square as their number allows if not given.
        side: Images narrower than this many pixels are enlarged by a whole factor, so that their pixels stay sharp.

    Raises:
        ValueError: There are no images, or not one caption for each.
    """
    count, _, height, width = images.shape
    if count == 0:
        raise ValueError("images must hold at least one image, got none")
    if captions is not None and len(captions) != count:
        raise ValueError(f"captions must be one for each of {count} images, got {len(captions)}")

    factor = max(1, math.ceil(side / width))
    width, height = width * factor, height * factor
    font = ImageFont.load_default()
    texts = [_lines(caption, width, font) for caption in captions or [""] * count]
    longest = max(map(len, texts))
    columns = math.ceil(math.sqrt(count)) if columns is None else min(columns, count)
    rows = math.ceil(count / columns)
    across, down = width + GAP, height + GAP + (LINE * longest + 4 if longest else 0)
    grid = Image.new("RGB", (columns * across + GAP, rows * down + GAP), "white")
    draw = ImageDraw.Draw(grid)

    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for index, text in enumerate(texts):
        left, top = GAP + index % columns * across, GAP + index // columns * down
        picture = Image.fromarray(np.ascontiguousarray(pixels[index]))
        grid.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top))
        for number, line in enumerate(text):
            draw.text((left, top + height + 3 + number * LINE), line, fill="black", font=font)
    return grid


def _lines(text: str, width: int, font: Font) -> list[str]:
    """Breaks a text between words into lines that fit a width."""
    lines: list[str] = []
    for word in text.split():
        while font.getlength(word) > width:
            word = word[:-1]
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
