"""Apply measures to drawn images and keep the value of every image."""

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor
from tqdm import tqdm

from overpaint.evaluation.images.images import ImageSource
from overpaint.evaluation.images.other_images import OtherImages
from overpaint.evaluation.images.pair_images import read_ahead
from overpaint.evaluation.images.plan import DrawConfig, PlannedImage, kinds_of
from overpaint.evaluation.metrics.statistics import Estimate, mean_estimate, rate_estimate
from overpaint.policy.atomic import write_text

from .journal import Journal
from .measure import Better, Measure, check_measures, digest_of, fitted, measured
from .measure import Metric as Metric


class Column(NamedTuple):
    """The values of one measure on the images of one kind."""

    measure: str
    kind: str
    is_rate: bool
    """Whether the values are yes (1) or no (0)."""
    better: Better
    note: str
    images: tuple[PlannedImage, ...]
    values: tuple[float, ...]
    """One for each image, in the same order."""

    @property
    def estimate(self) -> Estimate:
        """The mean, its standard error and its 95 % interval; images of one prompt count as dependent."""
        return (rate_estimate if self.is_rate else mean_estimate)(self.values, self.prompts)

    @property
    def prompts(self) -> tuple[str, ...]:
        """What names the prompt of each image."""
        return tuple(image.id for image in self.images)


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
        for column in self.columns:
            if (column.measure, column.kind) == (measure, kind):
                return column
        there = ", ".join(f"{column.measure} on {column.kind}" for column in self.columns)
        raise ValueError(f"measure, kind must be one of those scored ({there}), got {measure} on {kind}")

    def save(self, path: Path | str) -> None:
        """Writes all values as JSON, whole or not at all."""
        columns = [
            {**column._asdict(), "images": [image._asdict() for image in column.images]} for column in self.columns
        ]
        config = None if self.config is None else asdict(self.config)
        content = {"format": 1, "model": self.model, "config": config, "columns": columns}
        write_text(Path(path), json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> "Scores":
        """Reads what `save` wrote."""
        content: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        columns = []
        for column in content["columns"]:
            images = tuple(PlannedImage(**image) for image in column.pop("images"))
            columns.append(Column(images=images, values=tuple(column.pop("values")), **column))
        config = None if content["config"] is None else DrawConfig(**content["config"])
        return cls(model=content["model"], config=config, columns=tuple(columns))


def score(
    images: ImageSource | OtherImages,
    measures: Sequence[Measure],
    *,
    chunk: int = 32,
    size: int | None = None,
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
    check_measures(measures, kinds)
    batches = _batches(images.planned, chunk)
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
        return pixels if size is None else fitted(pixels, size)

    with (
        nullcontext() if journal is None else Journal(Path(journal), job) as finished,
        tqdm(total=len(images.planned), desc=f"scoring {images.model}", unit="image", disable=not progress) as bar,
    ):
        done = {} if finished is None else {record["batch"]: record for record in finished.records}
        for number, batch, pixels in read_ahead(batches, read):
            shown = [images.planned[place] for place in batch]
            record = done.get(number)
            digest = None if finished is None else digest_of(shown, pixels)
            if record is None:
                fresh: dict[str, Any] = {"batch": number, "images": digest}
                record = fresh | measured(measures, shown, pixels, device)
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
    columns = _columns(images.planned, measures, kinds, values, rates)
    return Scores(model=images.model, config=images.config, columns=columns)


def _batches(planned: Sequence[PlannedImage], chunk: int) -> dict[int, list[int]]:
    """Returns the places of images of one kind, batch by batch."""
    places: dict[str, list[int]] = {}
    for place, image in enumerate(planned):
        places.setdefault(image.kind, []).append(place)
    return dict(enumerate(some[k : k + chunk] for some in places.values() for k in range(0, len(some), chunk)))


def _columns(
    planned: Sequence[PlannedImage],
    measures: Sequence[Measure],
    kinds: Sequence[str],
    values: Mapping[tuple[str, str], Sequence[float]],
    rates: Mapping[tuple[str, str], bool],
) -> tuple[Column, ...]:
    return tuple(
        Column(
            measure=measure.name,
            kind=kind,
            is_rate=rates[measure.name, kind],
            better=measure.better,
            note=measure.note,
            images=tuple(image for image in planned if image.kind == kind),
            values=tuple(values[measure.name, kind]),
        )
        for measure in measures
        for kind in kinds
        if (measure.name, kind) in values
    )
