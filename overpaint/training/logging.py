"""What a run writes down and shows: metrics.jsonl, grids of images, and a progress bar."""

import errno
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from overpaint.policy.atomic import append, naming, write_text
from overpaint.settings import AnyFloat, Count, Index
from overpaint.text_files import parsed_json


class MetricsFile:
    """The metrics of a run, a line for each call of `write`.

    Every line holds `iteration` and the logged values; numbers that are not finite are null, since JSON has none.

    Args:
        path: The file. Lines of an interrupted run that come from `start` or later, or that were cut off, are
            dropped, because the resumed run writes them again.
        start: The iteration the run begins or goes on with.
    """

    def __init__(self, path: Path, *, start: Index) -> None:
        self.path = path
        if path.exists():
            _keep_lines_before(path, start)
        with naming(path):
            self._file = path.open("ab", buffering=0)

    def write(self, iteration: Index, values: Mapping[str, AnyFloat]) -> None:
        """Writes one line, and hands it to the operating system so that a killed process loses none.

        Raises:
            OSError: The disk is full, for example, or the file is not there any more; the message names it.
        """
        finite = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        self._check_there()
        append(self._file, json.dumps({"iteration": iteration, **finite}).encode() + b"\n")

    def sync(self) -> None:
        """Waits until all lines are on the disk; raises as `write`."""
        self._check_there()
        with naming(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _check_there(self) -> None:
        """Raises where the file is gone or another has taken its place: what is written would be lost unseen."""
        if not os.path.samestat(self.path.stat(), os.fstat(self._file.fileno())):
            raise FileNotFoundError(errno.ENOENT, "another file has taken the place of the run's own", str(self.path))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics file as dicts; what was cut off or damaged is left out."""
    entries = []
    for line in path.read_bytes().splitlines():
        with suppress(ValueError):
            entry = parsed_json(line, str(path))
            if isinstance(entry, dict) and isinstance(entry.get("iteration"), int):
                entries.append(entry)
    return entries


def _keep_lines_before(path: Path, iteration: int) -> None:
    """Replaces the file, in one move, by the lines of earlier iterations."""
    kept = [json.dumps(entry) + "\n" for entry in read_metrics(path) if entry["iteration"] < iteration]
    write_text(path, "".join(kept))


GAP = 8
"""Pixels between images, and around them."""
LINE = 13
"""Pixels from one line of a caption to the next."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def image_grid(
    images: Float[Tensor, "batch 3 H W"],
    captions: Sequence[str] | None = None,
    *,
    columns: Count | None = None,
    side: Count = 128,
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

    pixels = image_bytes(images)
    for index, text in enumerate(texts):
        left, top = GAP + index % columns * across, GAP + index // columns * down
        picture = Image.fromarray(pixels[index])
        grid.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top))
        for number, line in enumerate(text):
            draw.text((left, top + height + 3 + number * LINE), line, fill="black", font=font)
    return grid


def image_bytes(images: Float[Tensor, "batch 3 H W"]) -> np.ndarray:
    """Returns images in [0, 1] as Pillow reads them: 8 bits a colour, colours last."""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    return np.ascontiguousarray(pixels.cpu().numpy())


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


SHOWN = ("reward/", "erasure/", "train/loss")
"""Beginnings of the tags that the bar shows, in this order: the reward, then the constraint, then the loss."""


def progress_bar(items: Iterable[Any] | None = None, *, shown: bool = True, **options: Any) -> tqdm:
    """Returns tqdm's bar on stderr, which writes every half minute where stderr is a file, not ten times a second.

    Args:
        items: What is counted while it is gone through; None where `update` counts.
        shown: Whether there is a bar at all.
        options: Others of tqdm, such as `total` and `desc`.
    """
    seconds = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(items, disable=not shown, mininterval=seconds, maxinterval=100 * seconds, dynamic_ncols=True, **options)


def tell(line: str) -> None:
    """Writes a line on stderr, above any bar."""
    tqdm.write(line, file=sys.stderr)


class Progress:
    """A bar that counts iterations and shows the latest reward and constraint.

    Args:
        name: What stands before the bar.
        total: Number of iterations in all.
        done: Number of iterations done before.
        shown: Whether there is a bar at all.
        told: What runs where, a line above the bar.
    """

    def __init__(self, *, name: str, total: int, done: int, shown: bool, told: str) -> None:
        self._latest: dict[str, float] = {}
        if shown:
            tell(told)
        self._bar = progress_bar(shown=shown, desc=name, total=total, initial=done, unit="it")

    def show(self, metrics: Mapping[str, float], skipped: int) -> None:
        """Shows the latest values, and the number of skipped updates once there is one."""
        self._latest.update(metrics)
        self._bar.set_postfix_str(postfix(self._latest, skipped), refresh=False)

    def advance(self) -> None:
        """Counts one iteration."""
        self._bar.update()

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()


def postfix(metrics: Mapping[str, float], skipped: int) -> str:
    """Returns what stands behind the bar, such as `reward/mean 0.512, erasure/violation -0.02`."""
    parts = [f"{tag} {value:.3g}" for start in SHOWN for tag, value in metrics.items() if tag.startswith(start)]
    return ", ".join(parts + ([f"skipped {skipped}"] if skipped else []))
