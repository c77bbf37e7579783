"""Images as PNG: files that are whole or not there, and text that a page can hold."""

import base64
import io
from pathlib import Path

import numpy
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from overpaint.policy.atomic import write_bytes


def is_whole(path: Path) -> bool:
    """Says whether a file is a PNG that decodes to its end."""
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError):  # Pillow raises SyntaxError for a damaged PNG chunk
        return False
    return True


def png_bytes(pixels: UInt8[Tensor, "3 H W"]) -> bytes:
    """Returns what a PNG of the image holds; the same image always gives the same bytes."""
    file = io.BytesIO()
    _picture(pixels).save(file, format="PNG")
    return file.getvalue()


def data_uri(pixels: UInt8[Tensor, "3 H W"], *, largest: int = 256) -> str:
    """Returns an image as a PNG in text, reduced to `largest` pixels a side if it is larger."""
    shown = _picture(pixels)
    shown.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    shown.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def write_png(pixels: UInt8[Tensor, "3 H W"], path: Path) -> None:
    """Writes one image whole or not at all; raises as `write_bytes`."""
    write_bytes(path, png_bytes(pixels))


def read_png(path: Path) -> UInt8[Tensor, "3 H W"]:
    """Reads one image as bytes."""
    with Image.open(path) as image:
        return torch.from_numpy(numpy.array(image.convert("RGB"))).permute(2, 0, 1)


def _picture(pixels: UInt8[Tensor, "3 H W"]) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
