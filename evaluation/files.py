"""Files that are whole or not there: each is written under another name first, then renamed."""

import io
import os
from contextlib import suppress
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


def png_bytes(pixels: UInt8[Tensor, "3 H W"]) -> bytes:
    """Returns what a PNG of the image holds; the same image always gives the same bytes."""
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(file, format="PNG")
    return file.getvalue()


def write_png(pixels: UInt8[Tensor, "3 H W"], path: Path) -> None:
    """Writes one image whole or not at all; raises as `write_bytes`."""
    write_bytes(path, png_bytes(pixels))


def read_png(path: Path) -> UInt8[Tensor, "3 H W"]:
    """Reads one image as bytes."""
    with Image.open(path) as image:
        return torch.from_numpy(numpy.array(image.convert("RGB"))).permute(2, 0, 1)


def write_text(path: Path, text: str, *, writer: str = "") -> None:
    """Writes a text file whole or not at all; see `write_bytes`."""
    write_bytes(path, text.encode(), writer=writer)


def write_bytes(path: Path, content: bytes, *, writer: str = "") -> None:
    """Writes a file whole or not at all.

    Args:
        path: The file; its folder is made.
        content: What it holds.
        writer: Tells processes apart that may write the same file at the same time.

    Raises:
        OSError: The disk is full, for example; the message names the file, and nothing of it is left.
    """
    temporary = _temporary(path, writer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


def forget_partial(path: Path, *, writer: str = "") -> None:
    """Removes what a `write_bytes` of the same writer left when it was killed."""
    _temporary(path, writer).unlink(missing_ok=True)


def _temporary(path: Path, writer: str) -> Path:
    return path.with_name(f".{path.name}{writer}.tmp")
