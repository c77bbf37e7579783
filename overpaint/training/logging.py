"""What a run writes down: metrics.jsonl always, trackers, grids of images, and a progress bar."""

import errno
import importlib.util
import json
import math
import os
import sys
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from overpaint.policy.atomic import append, naming, write_text
from overpaint.text_files import parsed_json

from .config import TrainingConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


class MetricsFile:
    """The metrics of a run, a line for each call of `write`.

    Every line holds `iteration` and the logged values; numbers that are not finite are null, since JSON has none.

    Args:
        path: The file. Lines of an interrupted run that come from `start` or later, or that were cut off, are
            dropped, because the resumed run writes them again.
        start: The iteration the run begins or goes on with.
    """

    def __init__(self, path: Path, *, start: int) -> None:
        self.path = path
        if path.exists():
            _keep_lines_before(path, start)
        with naming(path):
            self._file = path.open("ab", buffering=0)

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
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


RUN_ID = "wandb_run_id.txt"
"""File with the name wandb gives the run, so that a resumed run goes on in the same curves."""


def check_trackers(config: TrainingConfig) -> None:
    """Makes sure that every tracker can be used.

    Raises:
        ValueError: One is not installed; accelerate itself would go on silently without it.
    """
    for name in config.trackers:
        modules = ("tensorboard", "tensorboardX") if name == "tensorboard" else (name,)
        if not any(importlib.util.find_spec(module) for module in modules):
            raise ValueError(f"trackers must be installed, got {name!r}, which is not: pip install {name}")


def start_trackers(accelerator: "Accelerator", config: TrainingConfig, settings: Mapping[str, Any]) -> None:
    """Starts every tracker, with the settings of the run as its hyperparameters."""
    if not config.trackers:
        return
    folder = Path(config.output_dir)
    options = {}
    if "wandb" in config.trackers and accelerator.is_main_process:
        options["wandb"] = {"dir": str(folder), "name": folder.name, "id": _run_id(folder), "resume": "allow"}
    accelerator.init_trackers(config.project, config=_flat(settings), init_kwargs=options)


def log_image(accelerator: "Accelerator", name: str, image: Image.Image, iteration: int) -> None:
    """Sends one image to every tracker."""
    pixels = np.asarray(image)[None]
    for tracker in accelerator.trackers:
        # tensorboard takes the colours for the first axis unless it is told; wandb knows an image's axes.
        options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({name: pixels}, step=iteration, **options)


COLUMNS = ("iteration", "prompt", "image", "reward")


def log_table(
    accelerator: "Accelerator",
    name: str,
    images: Float[Tensor, "batch 3 H W"],
    prompts: Sequence[str],
    rewards: Sequence[float] | None,
    iteration: int,
) -> None:
    """Sends images as a table to wandb, a row for each; tensorboard has no tables."""
    for tracker in accelerator.trackers:
        if tracker.name != "wandb":
            continue
        import wandb

        pictures = [wandb.Image(Image.fromarray(array)) for array in _bytes_of(images)]
        numbers = [None] * len(pictures) if rewards is None else rewards
        rows = zip([iteration] * len(pictures), prompts, pictures, numbers, strict=True)
        tracker.log_table(name, columns=list(COLUMNS), data=[list(row) for row in rows], step=iteration)


def finish_trackers(accelerator: "Accelerator") -> None:
    """Sends what is still waiting. Unlike accelerate's own `end_training`, leaves the processes connected."""
    for tracker in accelerator.trackers:
        tracker.finish()


def _run_id(folder: Path) -> str:
    """Returns the run's name for wandb, a new one when the run is new."""
    file = folder / RUN_ID
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    return file.read_text(encoding="utf-8")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Returns nested settings as `training/learning_rate: 1e-05`, which all trackers take."""
    flat: dict[str, str | int | float | bool] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}/")
        else:
            flat[prefix + name] = value if isinstance(value, str | int | float) else json.dumps(value)
    return flat


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

    pixels = _bytes_of(images)
    for index, text in enumerate(texts):
        left, top = GAP + index % columns * across, GAP + index // columns * down
        picture = Image.fromarray(pixels[index])
        grid.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top))
        for number, line in enumerate(text):
            draw.text((left, top + height + 3 + number * LINE), line, fill="black", font=font)
    return grid


def _bytes_of(images: Float[Tensor, "batch 3 H W"]) -> np.ndarray:
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
