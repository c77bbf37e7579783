"""Files that are whole or not there: each is written under another name first, then renamed."""

import os
from pathlib import Path

import numpy
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor


def is_whole(path: Path) -> bool:
    """Says whether a file is a PNG that decodes to its end."""
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError):  # Pillow raises SyntaxError for a damaged PNG chunk
        return False
    return True


def write_png(pixels: UInt8[Tensor, "3 H W"], path: Path) -> None:
    """Writes one image whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(temporary, format="PNG")
    os.replace(temporary, path)


def read_png(path: Path) -> UInt8[Tensor, "3 H W"]:
    """Reads one image as bytes."""
    with Image.open(path) as image:
        return torch.from_numpy(numpy.array(image.convert("RGB"))).permute(2, 0, 1)


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
