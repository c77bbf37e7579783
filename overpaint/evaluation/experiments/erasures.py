"""Erasure methods side by side: one line for each, means over seeds, as text and as a table for a page."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from overpaint.evaluation.report.result_tables import MINUS
from overpaint.evaluation.scoring.score import Scores

COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("explicit", "concept rate", "explicit"),
    ("implicit", "concept rate", "implicit"),
    ("neighbour kept", "neighbour kept", "neighbour"),
    ("accuracy", "accuracy", "benign"),
    ("ImageReward", "ImageReward", "benign"),
)
"""Title of a column, and the measure and the kind of prompts that it is of."""


class Spread(NamedTuple):
    """A mean over seeds."""

    mean: float
    error: float
    """Standard error over the seeds; NaN for one."""

    def __str__(self) -> str:
        """Shows both, the error only where there is one."""
        return f"{self.mean:.3f}" if math.isnan(self.error) else f"{self.mean:.3f} ± {self.error:.3f}"


class Line(NamedTuple):
    """What one method did."""

    method: str
    values: Mapping[str, Spread]
    """By the title of the column; those that were not measured are missing."""


def spread(values: Sequence[float]) -> Spread:
    """Returns the mean of some numbers and its standard error.

    Raises:
        ValueError: There are none.
    """
    if not values:
        raise ValueError("values must hold at least one, got none")
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Spread(mean, math.nan)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Spread(mean, math.sqrt(variance / len(values)))


def line_of(method: str, scores: Sequence[Scores], others: Mapping[str, Sequence[float]] | None = None) -> Line:
    """Returns the line of a method.

    Args:
        method: Name for the table.
        scores: Of the erased model, one for each seed. Measures that a subject does not have are left out.
        others: Further columns with a number for each seed, such as minutes.
    """
    values = {}
    for title, measure, kind in COLUMNS:
        found = [
            column.estimate.mean
            for one in scores
            for column in one.columns
            if (column.measure, column.kind) == (measure, kind)
        ]
        if found:
            values[title] = spread(found)
    values |= {title: spread(numbers) for title, numbers in (others or {}).items() if numbers}
    return Line(method, values)


def markdown_table(lines: Sequence[Line]) -> str:
    """Returns the lines as a table of Markdown; cells without a value are empty."""
    titles, rows = _cells(lines)
    return "\n".join(f"| {' | '.join(row)} |" for row in [titles, ["---"] * len(titles), *rows])


def html_table(lines: Sequence[Line], *, caption: str) -> str:
    """Returns the same table for a page; see `overpaint.evaluation.Section`."""
    titles, rows = _cells(lines)
    heads = "".join(
        f'<th scope="col"{" class=number" * (k > 0)}>{escape(title)}</th>' for k, title in enumerate(titles)
    )
    body = [
        f'<tr data-model="{escape(method)}"><th scope="row">{escape(method)}</th>'
        + "".join(f'<td class="number">{escape(cell).replace("-", MINUS)}</td>' for cell in cells)
        + "</tr>"
        for method, *cells in rows
    ]
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="All methods"><table class="plain">\n'
        f"<caption>{escape(caption)}</caption>\n<thead><tr>{heads}</tr></thead>\n"
        "<tbody>\n" + "\n".join(body) + "\n</tbody></table></div>"
    )


def _cells(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Returns the titles, and a row of texts for each line."""
    titles = list(dict.fromkeys(title for line in lines for title in line.values))
    rows = [
        [line.method, *(str(line.values[title]) if title in line.values else "" for title in titles)] for line in lines
    ]
    return ["method", *titles], rows
