"""Images side by side: as a PNG file with captions, and one by one as text that a page can hold."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .images import Pixels

GAP = 8
"""Pixels between images."""
LINE = 13
"""Pixels from one line of a caption to the next."""


def save_grid(images: Pixels, captions: Sequence[str], path: Path | str, *, columns: int = 8, side: int = 128) -> None:
    """Writes images as one PNG, row by row, each with its caption below.

    Args:
        images: What is shown; `to_pixels` makes bytes of floats.
        captions: One for each image; long ones are broken between words. May be empty strings.
        path: Where the PNG goes.
        columns: Images in a row.
        side: Width in pixels that small images are enlarged to, by a whole factor, so that their pixels stay sharp.

    Raises:
        ValueError: There are no images, or not as many captions.
    """
    if len(images) == 0 or len(images) != len(captions):
        raise ValueError(f"captions must be one for each of at least one image, got {len(captions)} for {len(images)}")
    cells = [enlarged(picture(image), side) for image in images]
    width, height = cells[0].size
    font = ImageFont.load_default()
    texts = [_wrapped(caption, width, font) for caption in captions]
    lines = max(len(text) for text in texts)
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    step_across, step_down = width + GAP, height + GAP + (LINE * lines + 4 if lines else 0)
    sheet = Image.new("RGB", (columns * step_across + GAP, rows * step_down + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for k, (cell, text) in enumerate(zip(cells, texts, strict=True)):
        left, top = GAP + k % columns * step_across, GAP + k // columns * step_down
        sheet.paste(cell, (left, top))
        for number, line in enumerate(text):
            pen.text((left, top + height + 3 + number * LINE), line, fill="black", font=font)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG")


def data_uri(image: UInt8[Tensor, "3 H W"], *, largest: int = 256) -> str:
    """Returns an image as a PNG in text, reduced to `largest` pixels a side if it is larger."""
    shown = picture(image)
    shown.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    shown.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def picture(image: UInt8[Tensor, "3 H W"]) -> Image.Image:
    """Returns an image as Pillow knows it."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def enlarged(image: Image.Image, side: int) -> Image.Image:
    """Returns an image enlarged by the smallest whole factor that makes it `side` pixels wide or wider."""
    factor = max(1, -(-side // image.width))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Breaks a text between words into lines that fit a width; a word that does not fit stays whole."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
