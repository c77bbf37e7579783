"""The learning curves and the pictures of the report page, as HTML."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from .curves import Curve, Panel, metrics_by_tag, panel_curves
from .grid import data_uri
from .images import ImageSource
from .plan import KINDS, kinds_of
from .svg import line_chart

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


def contact_sheets(pictures: Sequence[ImageSource], *, per_kind: int) -> str:
    """Shows the images of every model, a sheet for each kind: a row for each model, a column for each prompt."""
    planned = pictures[0].planned
    parts = [
        '<p class="note">One column is one prompt and one seed. The prompts are evenly spaced over all that were '
        "drawn; none was chosen by eye.</p>"
    ]
    for kind in kinds_of(planned):
        places = evenly_spaced([k for k, image in enumerate(planned) if image.kind == kind], per_kind)
        prompts = [planned[k].prompt for k in places]
        rows = [f'<tr><th scope="row">{escape(source.model)}</th>{_row(source, places)}</tr>' for source in pictures]
        cells = "".join(f'<td class="prompt">{escape(prompt)}</td>' for prompt in prompts)
        rows.append(f'<tr><th scope="row">prompt</th>{cells}</tr>')
        meaning = f"<figcaption>Prompts that {KINDS[kind]}.</figcaption>\n" if kind in KINDS else ""
        parts.append(
            f"<figure>\n<h3>{escape(kind.capitalize())}</h3>\n{meaning}"
            f'<div class="scroll" tabindex="0" role="region" aria-label="Pictures, {escape(kind)}">'
            '<table class="sheet"><tbody>\n' + "\n".join(rows) + "\n</tbody></table></div>\n</figure>"
        )
    return "\n".join(parts)


def evenly_spaced(places: Sequence[int], count: int) -> list[int]:
    """Returns `count` of the places, from the first to the last; all of them if there are fewer."""
    if len(places) <= count:
        return list(places)
    if count == 1:
        return [places[0]]
    return [places[round(k * (len(places) - 1) / (count - 1))] for k in range(count)]


def _row(source: ImageSource, places: Sequence[int]) -> str:
    cells = []
    for k, image in zip(places, source.pixels(places), strict=True):
        height, width = image.shape[-2:]
        # Small images are shown at a whole multiple of their size, so that all their pixels are as large.
        small = f' class="small" style="max-width:{SMALL // width * width}px"' if width <= SMALL else ""
        words = escape(f"{source.model}: {source.planned[k].prompt}")
        cells.append(f'<td><img{small} width="{width}" height="{height}" alt="{words}" src="{data_uri(image)}"></td>')
    return "".join(cells)


def _in_words(curve: Curve) -> str:
    first, last = curve.iterations[0], curve.iterations[-1]
    return f"{curve.label}: {curve.values[0]:.3g} at iteration {first}, {curve.values[-1]:.3g} at iteration {last}"
