"""Apply measures to drawn images and keep the value of every image."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from policy.types import Images

from .files import write_text
from .images import ImageSource, to_images
from .plan import KINDS, DrawConfig, PlannedImage, kinds_of
from .statistics import Estimate, mean_estimate, rate_estimate

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
        """The mean, its standard error and its 95 % interval."""
        return rate_estimate(self.values) if self.is_rate else mean_estimate(self.values)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """All values of one model."""

    model: str
    config: DrawConfig
    """How the images were drawn."""
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
        content = {"format": 1, "model": self.model, "config": asdict(self.config), "columns": columns}
        write_text(Path(path), json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> "Scores":
        """Reads what `save` wrote."""
        content: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        columns = []
        for column in content["columns"]:
            images = tuple(PlannedImage(**image) for image in column.pop("images"))
            columns.append(Column(images=images, values=tuple(column.pop("values")), **column))
        return cls(model=content["model"], config=DrawConfig(**content["config"]), columns=tuple(columns))


def score(
    images: ImageSource,
    measures: Sequence[Measure],
    *,
    chunk: int = 32,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Scores:
    """Takes measures of the images of one model.

    Args:
        images: Images in memory or in a folder.
        measures: What is measured; names are unique.
        chunk: Images handed to a metric at a time; all of one kind.
        device: Where the metrics want their images.
        progress: Whether a progress bar is shown.

    Raises:
        ValueError: Two measures share a name, a measure names an unknown kind, or a
            metric returned a number of values other than that of its images, or one that is not finite.
    """
    kinds = kinds_of(images.planned)
    _check_measures(measures, kinds)
    values: dict[tuple[str, str], list[float]] = {}
    rates: dict[tuple[str, str], bool] = {}
    with tqdm(total=len(images.planned), desc=f"scoring {images.model}", unit="image", disable=not progress) as bar:
        for kind in kinds:
            taken = [measure for measure in measures if not measure.kinds or kind in measure.kinds]
            places = [k for k, image in enumerate(images.planned) if image.kind == kind]
            for start in range(0, len(places), chunk):
                batch = places[start : start + chunk]
                pixels = to_images(images.pixels(batch).to(device)) if taken else None
                prompts = [images.planned[k].prompt for k in batch]
                for measure in taken:
                    assert pixels is not None
                    numbers, is_rate = _apply(measure, pixels, prompts)
                    values.setdefault((measure.name, kind), []).extend(numbers)
                    rates[measure.name, kind] = is_rate
                bar.update(len(batch))
    columns = _columns(images.planned, measures, kinds, values, rates)
    return Scores(model=images.model, config=images.config, columns=columns)


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


def _apply(measure: Measure, images: Images, prompts: Sequence[str]) -> tuple[list[float], bool]:
    """Returns a metric's values and whether they are yes or no."""
    with torch.no_grad():
        values = torch.as_tensor(measure.metric(images, prompts))
    if values.shape != (len(prompts),):
        raise ValueError(
            f"measures[{measure.name!r}] must return one value for each of {len(prompts)} images, "
            f"got shape {tuple(values.shape)}"
        )
    numbers = values.double().tolist()
    for number, prompt in zip(numbers, prompts, strict=True):
        if not math.isfinite(number):
            raise ValueError(f"measures[{measure.name!r}]: values must be finite, got {number} for prompt {prompt!r}")
    return numbers, values.dtype == torch.bool


def _check_measures(measures: Sequence[Measure], kinds: Sequence[str]) -> None:
    names = [measure.name for measure in measures]
    if not names:
        raise ValueError("measures must hold at least one, got none")
    if len(set(names)) < len(names):
        raise ValueError(f"measures must have unique names, got {names}")
    for measure in measures:
        for kind in measure.kinds:
            # A process's shard may lack a kind that is drawn elsewhere, so that the usual ones always pass.
            if kind not in kinds and kind not in KINDS:
                known = ", ".join(dict.fromkeys((*kinds, *KINDS)))
                raise ValueError(f"measures[{measure.name!r}].kinds must be among {known}, got {kind!r}")
