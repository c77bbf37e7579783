"""One kind of table, for a page, for a document and for a terminal; and the tables that reports are made of."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple

from overpaint.evaluation.metrics.statistics import Estimate, ranks, spearman
from overpaint.evaluation.scoring.compare import Comparison, Row
from overpaint.evaluation.scoring.score import Better

MINUS, NONE = "\u2212", "\u2013"
ARROWS: dict[Better, str] = {"higher": "\u2191", "lower": "\u2193", "neither": " "}
MOST_ACROSS = 5
"""Models that the columns of a table of results show; more are shown in rows."""


class Cell(NamedTuple):
    """A number or words, and how sure it is."""

    text: str = ""
    error: str = ""
    """Behind it, paler: a standard error or an interval."""
    change: str = ""
    """Below it: the difference from the first model."""
    change_error: str = ""
    verdict: str = ""
    """Whether the change is "better", "worse" or "unclear"."""
    style: str = ""
    """Class on a page."""

    def __str__(self) -> str:
        """Returns number and error in one line."""
        return f"{self.text} {self.error}".rstrip()

    @property
    def below(self) -> str:
        """The change in one line."""
        return f"{self.change} {self.change_error}".rstrip()


class Column(NamedTuple):
    """What stands above cells."""

    title: str
    words: bool = False
    """Whether its cells are words, set to the left, and not numbers."""
    over: str = ""
    """Title that it shares with its neighbours."""
    hint: str = ""
    """Behind the title, paler."""
    data: Mapping[str, str] = {}
    """What the page's filter goes by: a model, a kind."""


class Line(NamedTuple):
    """A row: its name and its cells."""

    name: str
    cells: Sequence[Cell]
    group: str = ""
    """What it belongs to, said once above all lines of that group."""
    hint: str = ""
    """Behind the group, paler."""
    data: Mapping[str, str] = {}
    group_data: Mapping[str, str] = {}


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; `html`, `markdown` and `text` write it."""

    label: str
    """What it is, for those who hear the page."""
    columns: Sequence[Column]
    """The first one is that of the names."""
    lines: Sequence[Line]
    caption: Any = ""
    """Plain text, or Markup."""
    style: str = "plain"
    """Class on a page."""

    def html(self) -> str:
        """Returns the table for a page; it scrolls where it is wide."""
        overs = [list(some) for _, some in groupby(self.columns, key=lambda column: column.over or id(column))]
        groups = [list(some) for _, some in groupby(self.lines, key=lambda line: (line.group, line.hint))]
        return render("table.html.j2", table=self, overs=overs, groups=groups)

    def markdown(self) -> str:
        """Returns the table as Markdown, with a true minus sign."""
        rows = [[f"{c.over}: {c.title}" if c.over else c.title for c in self.columns]]
        rows.append(["---" if column.words else "---:" for column in self.columns])
        for line in self.lines:
            rows.append([line.name, *(str(c) + (f"<br>{c.below}" if c.change else "") for c in line.cells)])
            pairs = zip(rows[-1], self.columns, strict=True)
            rows[-1] = [cell.replace("|", "\\|") if c.words else cell.replace("-", MINUS) for cell, c in pairs]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def text(self) -> str:
        """Returns the table in columns, for a terminal; a group is said in a column of its own."""
        grouped = any(line.group for line in self.lines)
        words = [True] * grouped + [column.words for column in self.columns]
        first = [self.label] * grouped
        rows: list[list[str]] = [[*first, *(column.title for column in self.columns)], []]
        group = None
        for line in self.lines:
            said = f"{line.group} {line.hint}".rstrip()
            rows.append([*[said if said != group else ""] * grouped, line.name, *map(str, line.cells)])
            if any(cell.change for cell in line.cells):
                rows.append([""] * (grouped + 1) + [cell.below for cell in line.cells])
            group = said
        widths = [max(len(row[k]) for row in rows if row) for k in range(len(words))]
        rows[1] = ["-" * width for width in widths]
        return "\n".join(
            "  ".join(c.ljust(w) if left else c.rjust(w) for c, w, left in zip(row, widths, words, strict=True))
            .replace(NONE, "-")
            .rstrip()
            for row in rows
        )


@cache
def _templates() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("overpaint.evaluation.report")
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters["minus"] = lambda text: str(text).replace("-", MINUS)
    return made


def render(template: str, **values: Any) -> Any:
    """Returns a template of this package filled in; all values but Markup are escaped."""
    from markupsafe import Markup

    return Markup(_templates().get_template(template).render(**values))


def number(value: float | None, digits: int, *, sign: bool = False, unknown: str = "-") -> str:
    """Writes a number; a dash where it is not known."""
    if value is None or math.isnan(value):
        return unknown
    return f"{value:{'+' if sign else ''}z.{digits}f}"


def row_digits(row: Row) -> int:
    """Returns how many decimals suit the numbers of a row: three below ten, fewer for larger numbers."""
    largest = max(abs(one.mean) for one in row.estimates)
    return 3 if largest < 10 else 2 if largest < 100 else 1


def interval_cell(estimate: Estimate, digits: int = 3, *, sign: bool = False) -> Cell:
    """Returns a mean with its 95 % interval, where it has one."""
    mean, low, high = (
        number(value, digits, sign=sign, unknown=NONE) for value in (estimate.mean, estimate.low, estimate.high)
    )
    return Cell(mean, f"[{low}, {high}]" if math.isfinite(estimate.low) else "")


def text_table(comparison: Comparison) -> str:
    """Lays a comparison out for a terminal: mean ± standard error, and below it the paired difference."""
    first, *others = comparison.models
    columns = [Column("kind", True), Column("n"), *map(Column, comparison.models)]
    lines = []
    for row in comparison.rows:
        count = Cell(str(row.estimates[0].count))
        cells = [count, *(_result(row, place) for place in range(len(comparison.models)))]
        lines.append(Line(row.kind, cells, f"{row.measure} {ARROWS[row.better]}".rstrip()))
    legend = "Mean ± standard error"
    if others:
        legend += f"; below it the paired difference from {first}, same prompts and seeds"
    arrows = ", ".join(
        f"{arrow} {way} is better"
        for way, arrow in ARROWS.items()
        if way != "neither" and any(row.better == way for row in comparison.rows)
    )
    table = Table(label="measure", columns=columns, lines=lines)
    return f"{table.text()}\n\n{'. '.join([legend, arrows] if arrows else [legend])}."


def results_table(comparison: Comparison) -> Table:
    """Lays out what a page is about: a mean for each model, and the change from the first.

    A column stands for each model, or a row where there are many.
    """
    first, *others = comparison.models
    caption = "Mean \u00b1 standard error."
    if others:
        alike = "prompts and seeds" if comparison.by == "image" else "prompts"
        caption += (
            f" Below it the paired difference from \u201c{first}\u201d, on the same {alike}; "
            "coloured where its 95 % interval leaves out zero, green for better and orange for worse."
        )
    places = range(len(comparison.models))
    if len(comparison.models) <= MOST_ACROSS:
        columns = [Column("prompts", True), *(Column(model, data={"model": model}) for model in comparison.models)]
        lines = [
            Line(row.kind, [_result(row, place) for place in places], row.measure, _way(row), {"kind": row.kind})
            for row in comparison.rows
        ]
    else:
        columns = [Column("model", True)]
        columns += [Column(r.measure, False, "", f"{r.kind} {_way(r)}", {"kind": r.kind}) for r in comparison.rows]
        lines = [
            Line(model, [_result(row, place) for row in comparison.rows], data={"model": model})
            for place, model in enumerate(comparison.models)
        ]
    return Table(label="Results", columns=columns, lines=lines, caption=caption, style="results")


def numbers_table(comparison: Comparison) -> Table:
    """Lists every number with its count and its 95 % interval."""
    first, *others = comparison.models
    lines = []
    for row in comparison.rows:
        digits = row_digits(row) + 1
        for place, model in enumerate(comparison.models):
            cells = [Cell(str(row.estimates[place].count)), interval_cell(row.estimates[place], digits)]
            if others:
                change = interval_cell(row.differences[place - 1], digits, sign=True) if place > 0 else Cell()
                cells.append(change)
            lines.append(Line(model, cells, row.measure, row.kind, {"model": model}, {"kind": row.kind}))
    intervals = "Wilson\u2019s for rates" + (" and Newcombe\u2019s for their paired differences" if others else "")
    rest = "Student\u2019s t" if comparison.intervals == "closed" else "the bootstrap over prompts (BCa)"
    columns = [Column("model", True), Column("images"), Column("mean [95 %]")]
    return Table(
        label="All numbers",
        columns=[*columns, Column(f"change from {first} [95 %]")] if others else columns,
        lines=lines,
        caption=f"95 % intervals: {intervals}, {rest} for everything else.",
    )


Means = Mapping[str, Mapping[str, float]]
"""The mean of each model, by metric."""


def agreement(means: Means, people: Mapping[str, float]) -> dict[str, float]:
    """Returns Spearman's correlation of each metric's ranking with that of people, in [-1, 1].

    Of means, which may be of any of the models, more is better; of the ranks that people gave them 1 is best.

    Raises:
        ValueError: A metric has fewer than two of the models, or gives all the same.
    """
    found = {}
    for metric, values in means.items():
        models = [model for model in values if model in people]
        found[metric] = spearman(ranks([values[model] for model in models]), [people[model] for model in models])
    return found


def rank_table(means: Means, people: Mapping[str, float], *, ranked_by: str, caption: str = "") -> Table:
    """Lays models out in the order of people, with the mean and rank of each by each metric, and the correlations.

    Means and ranks are those of `agreement`; `ranked_by` says who gave the ranks, such as "people".
    """
    known = {metric: {m: v for m, v in values.items() if m in people} for metric, values in means.items()}
    places = {metric: dict(zip(own, ranks(list(own.values())), strict=True)) for metric, own in known.items() if own}
    models = sorted({model for own in known.values() for model in own}, key=people.__getitem__)

    def cell(metric: str, model: str) -> Cell:
        if model not in known[metric]:
            return Cell("not run", style="not-run")
        return Cell(f"{known[metric][model]:.4f}", f"({places[metric][model]:g})")

    lines = [Line(model, [*(cell(metric, model) for metric in means), Cell(f"{people[model]:g}")]) for model in models]
    found = [Cell(f"{value:.2f}") for value in agreement(means, people).values()]
    return Table(
        label="Models in order",
        columns=[Column("model", True), *map(Column, (*means, ranked_by))],
        lines=[*lines, Line(f"Spearman with {ranked_by}", [*found, Cell()])],
        caption=f"Mean of each model, and its rank in brackets, best first by {ranked_by}. {caption}".rstrip(),
    )


def _way(row: Row) -> str:
    return f"{row.better} is better" if row.better != "neither" else ""


def _result(row: Row, place: int) -> Cell:
    digits, here = row_digits(row), row.estimates[place]
    cell = Cell(number(here.mean, digits), f"\u00b1 {number(here.error, digits, unknown=NONE)}")
    if place == 0:
        return cell
    change = row.differences[place - 1]
    return cell._replace(
        change=number(change.mean, digits, sign=True),
        change_error=f"\u00b1 {number(change.error, digits, unknown=NONE)}",
        verdict=row.verdicts[place - 1],
    )
