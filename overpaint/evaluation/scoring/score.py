"""Scores: the value of every image by every measure, over one process or several, and as a table."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

from overpaint.evaluation.images.files import ImageSource, to_images
from overpaint.evaluation.images.pairs import UNKNOWN_SEED, OtherImages, in_parts, places_by, read_ahead
from overpaint.evaluation.images.plan import KINDS, DrawConfig, PlannedImage, kinds_of
from overpaint.evaluation.metrics.statistics import Estimate, mean_estimate, rate_estimate
from overpaint.evaluation.tables import OUTPUT_SUFFIXES, Row, write_table
from overpaint.policy.atomic import write_text
from overpaint.policy.types import Images
from overpaint.settings import AnyFloat, Count
from overpaint.text_files import read_json_object
from overpaint.training import process_state
from overpaint.training.logging import progress_bar
from rewards.types import as_scores

from .pair_scores import Journal

Metric = Callable[[Images, Sequence[str]], Tensor | Sequence[float] | Sequence[bool]]
"""Gives one number, or one yes or no, for each image and its prompt; every `rewards.Reward` is one."""

Better = Literal["higher", "lower", "neither"]


class Measure(NamedTuple):
    """A metric, with what a reader of its numbers needs to know."""

    name: str
    metric: Metric
    kinds: tuple[str, ...] = ()
    """Kinds of prompts it is taken on; empty for all."""
    better: Better = "higher"
    """Which way is better."""
    note: str = ""
    """What the number means: version, labels, threshold and count rule of a detector, for example."""


def _digest(shown: Sequence[PlannedImage], pixels: Sequence[UInt8[Tensor, "3 _ _"]]) -> str:
    """Returns what differs if a batch holds other images, prompts or seeds."""
    digest = hashlib.blake2b(json.dumps([list(image) for image in shown]).encode(), digest_size=16)
    for image in pixels:
        digest.update(str(tuple(image.shape)).encode())
        digest.update(image.contiguous().numpy())
    return digest.hexdigest()


def _measured(
    measures: Sequence[Measure],
    shown: Sequence[PlannedImage],
    pixels: Sequence[UInt8[Tensor, "3 _ _"]],
    device: torch.device | str,
) -> dict[str, Any]:
    """Returns the values of a batch of one kind by each measure that is taken on it, and which of them are rates."""
    taken = [measure for measure in measures if not measure.kinds or shown[0].kind in measure.kinds]
    values = {measure.name: [math.nan] * len(shown) for measure in taken}
    rates = set()
    for places in places_by([image.shape for image in pixels]) if taken else []:
        stack = to_images(torch.stack([pixels[place] for place in places]).to(device))
        prompts = [shown[place].prompt for place in places]
        for measure in taken:
            numbers, is_rate = _apply(measure, stack, prompts)
            for place, number in zip(places, numbers, strict=True):
                values[measure.name][place] = number
            if is_rate:
                rates.add(measure.name)
    return {"values": values, "rates": sorted(rates)}


def _apply(measure: Measure, images: Images, prompts: Sequence[str]) -> tuple[list[float], bool]:
    """Returns a metric's values and whether they are yes or no."""
    with torch.no_grad():
        values = as_scores(f"measures[{measure.name!r}]", measure.metric(images, prompts), images)
    numbers = values.double().tolist()
    for number, prompt in zip(numbers, prompts, strict=True):
        if not math.isfinite(number):
            raise ValueError(f"measures[{measure.name!r}]: values must be finite, got {number} for prompt {prompt!r}")
    return numbers, values.dtype == torch.bool


def _check_measures(measures: Sequence[Measure], kinds: Sequence[str]) -> None:
    """Raises a ValueError unless measures can be told apart and are of kinds that exist."""
    names = [measure.name for measure in measures]
    if not names:
        raise ValueError("measures must hold at least one, got none")
    if len(set(names)) < len(names):
        raise ValueError(f"measures must have unique names, got {names}")
    # A process's shard may lack a kind that is drawn elsewhere, so that the usual ones always pass.
    known = dict.fromkeys((*kinds, *KINDS))
    for measure in measures:
        for kind in measure.kinds:
            if kind not in known:
                raise ValueError(f"measures[{measure.name!r}].kinds must be among {', '.join(known)}, got {kind!r}")


class Column(NamedTuple):
    """The values of one measure on the images of one kind."""

    measure: str
    kind: str
    is_rate: bool
    """Whether the values are yes (1) or no (0)."""
    better: Better
    note: str
    images: tuple[PlannedImage, ...]
    values: tuple[AnyFloat, ...]
    """One for each image, in the same order."""

    @property
    def estimate(self) -> Estimate:
        """The mean, its standard error and its 95 % interval; images of one prompt count as dependent."""
        return (rate_estimate if self.is_rate else mean_estimate)(self.values, self.prompts)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompt of each image: what shares one, under whatever id, counts as dependent."""
        return tuple(image.prompt for image in self.images)


def of_measure(columns: Sequence[Any], measure: str, kind: str) -> Any:
    """Returns the column, or row, of a measure on a kind; a ValueError names those that there are."""
    for column in columns:
        if (column.measure, column.kind) == (measure, kind):
            return column
    there = ", ".join(f"{column.measure} on {column.kind}" for column in columns)
    raise ValueError(f"measure, kind must be one of those there ({there}), got {measure} on {kind}")


def model_names(scores: Sequence["Scores"]) -> tuple[str, ...]:
    """Returns the names of the models; a ValueError says that two share one."""
    models = tuple(one.model for one in scores)
    if len(set(models)) < len(models):
        raise ValueError(f"scores must be of models with unique names, got {list(models)}")
    return models


@dataclass(frozen=True, kw_only=True)
class Scores:
    """All values of one model."""

    model: str
    config: DrawConfig | None
    """How the images were drawn; None where another system drew them."""
    columns: tuple[Column, ...]
    """By measure, then by kind."""

    def column(self, measure: str, kind: str) -> Column:
        """Returns one column.

        Raises:
            ValueError: The measure was not taken on this kind.
        """
        return of_measure(self.columns, measure, kind)

    def save(self, path: Path | str) -> None:
        """Writes all values as JSON, whole or not at all."""
        columns = [{**one._asdict(), "images": [image.to_dict() for image in one.images]} for one in self.columns]
        config = self.config and asdict(self.config)
        content = {"format": 1, "model": self.model, "config": config, "columns": columns}
        write_text(Path(path), json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> "Scores":
        """Reads what `save` wrote; a ValueError where it is something else."""
        content = read_json_object(Path(path))
        try:
            columns = []
            for column in content["columns"]:
                images = tuple(map(PlannedImage.from_dict, column.pop("images")))
                columns.append(Column(images=images, values=tuple(column.pop("values")), **column))
            config = content["config"] and DrawConfig(**content["config"])
            return cls(model=content["model"], config=config, columns=tuple(columns))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} must hold scores as they are saved, got {error!r}") from error


def score(
    images: ImageSource | OtherImages,
    measures: Sequence[Measure],
    *,
    chunk: Count = 32,
    size: Count | None = None,
    device: torch.device | str = "cpu",
    journal: Path | str | None = None,
    progress: bool = True,
) -> Scores:
    """Takes measures of the images of one model, a few images at a time.

    Args:
        images: Images in memory or in a folder, which may be of several sizes.
        measures: What is measured; names are unique.
        chunk: Images handed to a metric at a time; all of one kind and one size.
        size: Side in pixels of the square that every image is cropped and scaled to before it is measured, by
            Pillow's antialiased bicubic interpolation; None leaves images as they are.
        device: Where the metrics want their images.
        journal: A file that keeps what is finished: after a kill at any moment the same call goes on, and gives what an
            undisturbed one gives. It is left there when all is done.
        progress: Whether a progress bar is shown.

    Raises:
        ValueError: Two measures share a name, a measure names an unknown kind, a metric returned a number of values
            other than that of its images, or one that is not finite, or the journal is of other images or measures.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    kinds = kinds_of(images.planned)
    _check_measures(measures, kinds)
    batches = dict(enumerate(in_parts(places_by([image.kind for image in images.planned]), chunk)))
    job = {
        "format": 1,
        "model": images.model,
        "measures": [[measure.name, list(measure.kinds)] for measure in measures],
        "chunk": chunk,
        "size": size,
        "images": len(images.planned),
    }
    values: dict[tuple[str, str], list[float]] = {}
    rates: dict[tuple[str, str], bool] = {}

    def read(place: int) -> UInt8[Tensor, "3 H W"]:
        pixels = images.pixels([place])[0]
        if size is None or pixels.shape[1:] == (size, size):
            return pixels
        image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)  # antialiased, in 8 bits
        return torch.from_numpy(numpy.array(image)).permute(2, 0, 1)

    with (
        nullcontext() if journal is None else Journal(Path(journal), job) as finished,
        progress_bar(total=len(images.planned), desc=f"scoring {images.model}", unit="image", shown=progress) as bar,
    ):
        done = {} if finished is None else {record["batch"]: record for record in finished.records}
        for number, batch, pixels in read_ahead(batches, read):
            shown = [images.planned[place] for place in batch]
            record = done.get(number)
            digest = None if finished is None else _digest(shown, pixels)
            if record is None:
                record = dict[str, Any](batch=number, images=digest) | _measured(measures, shown, pixels, device)
                if finished is not None:
                    finished.append(record)
            elif record["images"] != digest:
                raise ValueError(
                    f"{journal} is of other images or prompts, at {shown[0].file_name}; "
                    "put them back to go on, or delete it to begin again"
                )
            for name, found in record["values"].items():
                values.setdefault((name, shown[0].kind), []).extend(found)
                rates[name, shown[0].kind] = name in record["rates"]
            bar.update(len(batch))
    columns = tuple(
        Column(
            measure=measure.name,
            kind=kind,
            is_rate=rates[measure.name, kind],
            better=measure.better,
            note=measure.note,
            images=tuple(image for image in images.planned if image.kind == kind),
            values=tuple(values[measure.name, kind]),
        )
        for measure in measures
        for kind in kinds
        if (measure.name, kind) in values
    )
    return Scores(model=images.model, config=images.config, columns=columns)


COLUMNS = ("model", "file", "kind", "id", "copy", "prompt", "seed")
"""What a row says of its image, before what was measured of it."""


def score_rows(scores: Sequence[Scores]) -> list[Row]:
    """Returns one row for each image of each model, with `COLUMNS` and every measure.

    A measure that was not taken of an image is None, and so is a seed that is not known. A ValueError says that two
    models share a name, or that a measure is named like one of `COLUMNS`.
    """
    model_names(scores)
    measures = list(dict.fromkeys(column.measure for one in scores for column in one.columns))
    for name in measures:
        if name in COLUMNS:
            raise ValueError(f"measures must not be named like columns of the table, got {name!r}")
    rows = []
    for one in scores:
        values: dict[PlannedImage, dict[str, float]] = {}
        for column in one.columns:
            for image, value in zip(column.images, column.values, strict=True):
                values.setdefault(image, {})[column.measure] = value
        for image, found in values.items():
            seed = None if image.seed == UNKNOWN_SEED else image.seed
            row = {"model": one.model, "file": image.file_name, **image._asdict(), "seed": seed}
            rows.append({name: row[name] for name in COLUMNS} | {name: found.get(name) for name in measures})
    return rows


def write_scores(scores: Sequence[Scores], path: Path | str) -> None:
    """Writes `score_rows` as *.csv or *.parquet, whole or not at all; values keep float32's precision.

    Raises:
        ValueError: There are no scores, the ending is unknown, or a name occurs twice.
        ImportError: It is Parquet, and pyarrow is missing.
    """
    path = Path(path)
    if path.suffix not in OUTPUT_SUFFIXES:
        raise ValueError(f"path must be named {' or '.join(f'*{s}' for s in OUTPUT_SUFFIXES)}, got {path}")
    rows = score_rows(scores)
    if not rows:
        raise ValueError("scores must hold at least one image, got none")
    measures = [name for name in rows[0] if name not in COLUMNS]
    values = {name: [row.pop(name) for row in rows] for name in measures}
    write_table(rows, values, path)


def gather(scores: Scores, planned: Sequence[PlannedImage]) -> Scores:
    """Brings the scores of all processes' shards together, on every process, in the order of the whole plan."""
    from accelerate.utils import gather_object

    if process_state().num_processes == 1:
        return scores
    return merge(gather_object([scores]), planned)


def merge(parts: Sequence[Scores], planned: Sequence[PlannedImage]) -> Scores:
    """Joins the scores of shards, in the order of the plan.

    Raises:
        ValueError: The parts are of different models or settings, or do not hold each planned image once.
    """
    model, config = parts[0].model, parts[0].config
    for part in parts[1:]:
        if (part.model, part.config) != (model, config):
            raise ValueError(f"parts must be of one model, got {model}, {config} and {part.model}, {part.config}")
    pieces: dict[tuple[str, str], list[Column]] = {}
    for column in (column for part in parts for column in part.columns):
        pieces.setdefault((column.measure, column.kind), []).append(column)
    merged = [
        _joined(pieces[measure, kind], [image for image in planned if image.kind == kind])
        for measure in dict.fromkeys(measure for measure, _ in pieces)
        for kind in kinds_of(planned)
        if (measure, kind) in pieces
    ]
    return Scores(model=model, config=config, columns=tuple(merged))


def _joined(pieces: Sequence[Column], planned: Sequence[PlannedImage]) -> Column:
    pairs = [pair for piece in pieces for pair in zip(piece.images, piece.values, strict=True)]
    values = dict(pairs)
    if len(pairs) != len(planned) or values.keys() != set(planned):
        raise ValueError(
            f"parts must hold each of {len(planned)} planned images of kind {pieces[0].kind!r} once, "
            f"got {len(pairs)} values of {len(values)} images"
        )
    return pieces[0]._replace(images=tuple(planned), values=tuple(values[image] for image in planned))
