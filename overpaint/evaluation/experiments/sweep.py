"""Models in several settings, of size and guidance, and what was measured of them in the words of published numbers."""

from collections.abc import Sequence
from typing import NamedTuple

from overpaint.evaluation.metrics.statistics import Estimate
from overpaint.evaluation.report.figures import curve_section
from overpaint.evaluation.report.page import Section
from overpaint.evaluation.report.svg import SERIES_STYLES
from overpaint.evaluation.scoring.score import Scores

from .models import published_as
from .published import GUIDANCE_SCALES, OWN_SIZE
from .published_comparison import Measured

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
    best of them is told as well, as that paper does.

    Args:
        experiment: One of `published.EXPERIMENTS`.
        results: Of any models and settings.
        name_settings: Whether a setting has a name; without one there must be one for each model.
    """
    found = [
        Measured(
            experiment,
            published_as(result.cell.name),
            column.measure,
            result.setting if name_settings else "",
            column.estimate,
        )
        for result in results
        for column in result.scores.columns
    ]
    best: dict[tuple[str, str], Measured] = {}
    for result in results if name_settings else ():
        if result.cell.model in _like_the_paper(results):
            for column in result.scores.columns:
                one = Measured(experiment, published_as(result.cell.name), column.measure, OWN_SIZE, column.estimate)
                key = one.model, one.metric
                if key not in best or best[key].estimate.mean < one.estimate.mean:
                    best[key] = one
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
    groups = [models] if len(lines) <= SERIES_STYLES else [[model] for model in models]
    sections = []
    for number, group in enumerate(groups):
        for place, column in enumerate(drawn[0].scores.columns):
            series: dict[str, list[tuple[float, Estimate]]] = {
                f"{model}, {side}²": [(one.cell.scale or 0.0, one.scores.columns[place].estimate) for one in line]
                for (model, side), line in lines.items()
                if model in group
            }
            of = "" if len(groups) == 1 else f" of {group[0]}"
            sections.append(
                curve_section(
                    series,
                    anchor=f"guidance-{number}-{place}",
                    heading=f"{column.measure}{of} by guidance",
                    x_label="guidance scale",
                    y_label=column.measure,
                )
            )
    return sections


def _like_the_paper(results: Sequence[Result]) -> set[str]:
    """Returns the models that were drawn and scored as in ImageReward's paper, at no other size and scale besides."""
    wanted = {float(scale) for scale in GUIDANCE_SCALES}
    by_model: dict[str, list[Result]] = {}
    for result in results:
        by_model.setdefault(result.cell.model, []).append(result)
    return {
        model
        for model, own in by_model.items()
        if {one.cell.scale for one in own} == wanted
        and all(one.cell.size is None and one.scored_size == 256 for one in own)
    }
