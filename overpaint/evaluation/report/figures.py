"""The curves and the pictures of the report page, as HTML."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from jaxtyping import UInt8
from torch import Tensor

from overpaint.evaluation.images.files import ImageSource, data_uri
from overpaint.evaluation.images.plan import KINDS, PlannedImage, kinds_of
from overpaint.evaluation.metrics.statistics import Estimate
from overpaint.evaluation.scoring.score import Scores

from .curves import Curve, Panel, metrics_by_tag, panel_curves
from .page import Section
from .result_tables import MINUS
from .svg import line_chart, series_chart
from .table import number

SMALL = 128
"""Images up to this width, in pixels, are enlarged towards it with their pixels sharp."""


def learning_curves(path: Path, panels: Sequence[Panel]) -> str:
    """Draws the panels from the metrics of a run; one whose tags were not logged says so."""
    metrics = metrics_by_tag(path)
    figures = []
    for panel in panels:
        curves = panel_curves(panel, metrics)
        if curves:
            words = "; ".join(map(_in_words, curves))
            chart = line_chart(curves, title=panel.title, description=words, references=panel.references)
        else:
            chart = '<p class="note">Not logged in this run.</p>'
        caption = f"<figcaption>{escape(panel.caption)}</figcaption>" if panel.caption else ""
        figures.append(f"<figure>\n<h3>{escape(panel.title)}</h3>\n{chart}\n{caption}</figure>")
    return (
        '<p class="note">Where values are many, the heavy line is their moving average '
        "and the faint one is as logged.</p>\n"
        '<div class="curves">\n' + "\n".join(figures) + "\n</div>"
    )


def contact_sheets(pictures: Sequence[ImageSource], *, per_kind: int, scores: Sequence[Scores] = ()) -> str:
    """Shows the images of every model, prompt by prompt within each kind, with what each image scored.

    Args:
        pictures: Of every model, on the same prompts and seeds.
        per_kind: Prompts shown of each kind.
        scores: Of any of the models; their values stand under the images.
    """
    planned = pictures[0].planned
    values = values_by_image(scores)
    across = _across(len(pictures))
    # Four or five pictures leave room for the prompt beside them on a wide page.
    sheet = "sheet aside" if across in (4, 5) else "sheet"
    parts = [
        '<p class="note">The images of one prompt have one seed. The prompts are evenly spaced over all that were '
        "drawn; none was chosen by eye.</p>"
    ]
    for kind in kinds_of(planned):
        places = evenly_spaced([k for k, image in enumerate(planned) if image.kind == kind], per_kind)
        columns = [source.pixels(places) for source in pictures]
        cards = []
        for row, place in enumerate(places):
            image = planned[place]
            shots = "".join(
                _shot(source.model, image, column[row], values.get((source.model, image), ()))
                for source, column in zip(pictures, columns, strict=True)
            )
            cards.append(
                f'<article class="card" data-group data-prompt="{escape(image.prompt)}"><h4>{escape(image.prompt)}</h4>'
                f'<div class="shots">{shots}</div></article>'
            )
        meaning = f'<p class="note">Prompts that {KINDS[kind]}.</p>\n' if kind in KINDS else ""
        parts.append(
            f'<div class="{sheet}" data-group data-kind="{escape(kind)}" style="--across:{across}">\n'
            f"<h3>{escape(kind.capitalize())}</h3>\n{meaning}"
            '<div class="cards">\n' + "\n".join(cards) + "\n</div>\n</div>"
        )
    return "\n".join(parts)


def curve_section(
    series: Mapping[str, Sequence[tuple[float, Estimate]]],
    *,
    anchor: str,
    heading: str,
    x_label: str,
    y_label: str,
    caption: str = "",
) -> Section:
    """Makes a section of measured points joined by lines, such as reward against guidance, with their numbers.

    Args:
        series: One to six series of (x, measured), by name; x rises.
        anchor: Of the section.
        heading: Of the section; also the title of the chart.
        x_label: What is told to the right.
        y_label: What is told upwards.
        caption: What to look for.

    Raises:
        ValueError: There are no series, more than can be told apart, one without points, or one whose x does not rise.
    """
    words = "; ".join(
        f"{name}: {', '.join(f'{one.mean:.3g} at {x:g}' for x, one in points)}" for name, points in series.items()
    )
    chart = series_chart(series, title=heading, description=f"{words}.", x_label=x_label, y_label=y_label)
    heads = "".join(f'<th scope="col" class="number">{escape(name)}</th>' for name in series)
    known = {name: dict(points) for name, points in series.items()}
    rows = []
    for x in sorted({x for points in series.values() for x, _ in points}):
        cells = "".join(f'<td class="number">{_point(points.get(x))}</td>' for points in known.values())
        rows.append(f'<tr><th scope="row" class="number">{x:g}</th>{cells}</tr>')
    return Section(
        anchor,
        heading,
        f'<figure>\n<div class="scroll wide" tabindex="0" role="region" aria-label="Chart">\n{chart}\n</div>\n'
        f"<figcaption>{escape(caption)} Bars are 95 % intervals.</figcaption>\n</figure>\n"
        "<details><summary>The numbers of the chart</summary>\n"
        '<div class="scroll" tabindex="0" role="region" aria-label="Numbers of the chart"><table class="plain">\n'
        f"<caption>{escape(y_label)}: mean [95 %].</caption>\n"
        f'<thead><tr><th scope="col" class="number">{escape(x_label)}</th>{heads}</tr></thead>\n'
        "<tbody>\n" + "\n".join(rows) + "\n</tbody></table></div>\n</details>",
    )


def values_by_image(scores: Sequence[Scores]) -> dict[tuple[str, PlannedImage], list[tuple[str, float, bool]]]:
    """Returns measure, value and whether it is yes or no, for every image of every model."""
    values: dict[tuple[str, PlannedImage], list[tuple[str, float, bool]]] = {}
    for one in scores:
        for column in one.columns:
            for image, value in zip(column.images, column.values, strict=True):
                values.setdefault((one.model, image), []).append((column.measure, value, column.is_rate))
    return values


def evenly_spaced(places: Sequence[int], count: int) -> list[int]:
    """Returns `count` of the places, from the first to the last; all of them if there are fewer."""
    if len(places) <= count:
        return list(places)
    if count == 1:
        return [places[0]]
    return [places[round(k * (len(places) - 1) / (count - 1))] for k in range(count)]


def _shot(
    model: str, planned: PlannedImage, image: UInt8[Tensor, "3 H W"], values: Sequence[tuple[str, float, bool]]
) -> str:
    height, width = image.shape[-2:]
    # Small images are shown at a whole multiple of their size, so that all their pixels are as large.
    small = f' class="small" style="max-width:{SMALL // width * width}px"' if width <= SMALL else ""
    words = escape(f"{model}: {planned.prompt}")
    lines = "".join(
        f"<div><dt>{escape(measure)}</dt><dd>{_score(value, is_rate)}</dd></div>" for measure, value, is_rate in values
    )
    scores = f"<dl>{lines}</dl>" if lines else ""
    return (
        f'<figure class="shot" data-model="{escape(model)}">'
        f'<img{small} width="{width}" height="{height}" alt="{words}" src="{data_uri(image)}">'
        f"<figcaption>{escape(model)}{scores}</figcaption></figure>"
    )


def _score(value: float, is_rate: bool) -> str:
    if is_rate:
        return "yes" if value else "no"
    return number(value, 2 if abs(value) < 10 else 1).replace("-", MINUS)


def _across(models: int) -> int:
    """Returns how many pictures stand side by side, at most seven, so that the rows of a prompt are about as full."""
    return math.ceil(models / math.ceil(models / 7))


def _point(estimate: Estimate | None) -> str:
    if estimate is None:
        return "\u2013"
    mean, low, high = (number(value, 3).replace("-", MINUS) for value in (estimate.mean, estimate.low, estimate.high))
    return f'{mean} <span class="error">[{low}, {high}]</span>' if math.isfinite(estimate.low) else mean


def _in_words(curve: Curve) -> str:
    first, last = curve.iterations[0], curve.iterations[-1]
    return f"{curve.label}: {curve.values[0]:.3g} at iteration {first}, {curve.values[-1]:.3g} at iteration {last}"
