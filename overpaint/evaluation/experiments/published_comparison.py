"""Measured numbers beside published ones: what ran, what others report, and how far apart the two are.

A published number is never a stand-in for a measurement: where nothing ran, the table says *not run*.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from overpaint.evaluation.metrics.statistics import Estimate
from overpaint.evaluation.report.result_tables import MINUS

from .published import SOURCES, Published

NOT_RUN = "not run"
NONE = "\u2013"
"""Stands where there is no number."""


class Measured(NamedTuple):
    """A number of our own, named as a published one is."""

    experiment: str
    model: str
    metric: str
    setting: str
    """As `Published.setting`; empty where there is only one."""
    estimate: Estimate
    """In the unit of the published numbers: an accuracy in percent, for example."""


class Row(NamedTuple):
    """One model in one setting."""

    model: str
    setting: str
    published: tuple[float | None, ...]
    """One for each source of the table; None where a source has no number."""
    measured: Estimate | None
    """None where nothing ran."""

    @property
    def differences(self) -> tuple[float | None, ...]:
        """Measured minus published, for each source; None where either is missing."""
        if self.measured is None:
            return (None,) * len(self.published)
        mean = self.measured.mean
        return tuple(None if value is None else mean - value for value in self.published)


class Table(NamedTuple):
    """All models and settings of one metric in one experiment."""

    experiment: str
    metric: str
    sources: tuple[str, ...]
    """Keys of `SOURCES`, in the order in which they first occur."""
    rows: tuple[Row, ...]
    digits: int
    """Decimals: as many as the most exact published number has; three where nothing is published."""


def beside_tables(measured: Sequence[Measured], published: Sequence[Published]) -> tuple[Table, ...]:
    """Sets numbers side by side, a table for each metric of each experiment.

    Rows are in the order of the published numbers; what was measured and not published comes after them.

    Raises:
        ValueError: A number of ours, or of one source, occurs twice.
    """
    ours: dict[tuple[str, str, str, str], Estimate] = {}
    for one in measured:
        key = (one.experiment, one.metric, one.model, one.setting)
        if key in ours:
            raise ValueError(f"measured must hold each number once, got {_named(key)} twice")
        ours[key] = one.estimate
    theirs: dict[tuple[str, str, str, str], dict[str, float]] = {}
    for number in published:
        key = (number.experiment, number.metric, number.model, number.setting)
        values = theirs.setdefault(key, {})
        if number.source in values:
            raise ValueError(f"published must hold each number of {number.source} once, got {_named(key)} twice")
        values[number.source] = number.value
    keys = list(dict.fromkeys([*theirs, *ours]))
    return tuple(
        _table(experiment, metric, [key for key in keys if key[:2] == (experiment, metric)], ours, theirs)
        for experiment, metric in dict.fromkeys(key[:2] for key in keys)
    )


def beside_published(measured: Sequence[Measured], published: Sequence[Published]) -> str:
    """Lays the tables out as HTML: ours with its standard error, a column for each source, and the differences.

    Raises:
        ValueError: A number occurs twice.
    """
    return "\n".join(map(_html, beside_tables(measured, published)))


def beside_published_text(measured: Sequence[Measured], published: Sequence[Published]) -> str:
    """Lays the tables out as Markdown, for terminals and documents.

    Raises:
        ValueError: A number occurs twice.
    """
    return "\n\n".join(map(_markdown, beside_tables(measured, published)))


def _table(
    experiment: str,
    metric: str,
    keys: Sequence[tuple[str, str, str, str]],
    ours: Mapping[tuple[str, str, str, str], Estimate],
    theirs: Mapping[tuple[str, str, str, str], Mapping[str, float]],
) -> Table:
    sources = tuple(dict.fromkeys(source for key in keys for source in theirs.get(key, {})))
    rows = tuple(
        Row(key[2], key[3], tuple(theirs.get(key, {}).get(source) for source in sources), ours.get(key)) for key in keys
    )
    known = [value for row in rows for value in row.published if value is not None]
    return Table(experiment, metric, sources, rows, max(map(_decimals, known)) if known else 3)


def _html(table: Table) -> str:
    settings = any(row.setting for row in table.rows)
    names = ["model", "setting"] if settings else ["model"]
    heads = "".join(f'<th scope="col" rowspan="2">{name}</th>' for name in names)
    count = len(table.sources)
    heads += '<th scope="col" rowspan="2" class="number">measured</th>'
    if count:
        heads += f'<th scope="colgroup" colspan="{count}" class="number over">published</th>'
        heads += f'<th scope="colgroup" colspan="{count}" class="number over">measured {MINUS} published</th>'
    sources = "".join(f'<th scope="col" class="number">{escape(source)}</th>' for source in table.sources)
    sources = f"<tr>{sources * 2}</tr>" if count else ""
    lines = []
    for row in table.rows:
        cells = f'<th scope="row">{escape(row.model)}</th>'
        cells += f'<td class="setting">{escape(row.setting)}</td>' if settings else ""
        cells += f'<td class="number ours">{_ours_html(row.measured, table.digits)}</td>'
        cells += "".join(f'<td class="number">{_number(value, table.digits)}</td>' for value in row.published)
        cells += "".join(
            f'<td class="number">{_number(value, table.digits, sign=True)}</td>' for value in row.differences
        )
        lines.append(f'<tr data-model="{escape(row.model)}">{cells}</tr>')
    ran = sum(row.measured is not None for row in table.rows)
    caption = f"{ran} of {len(table.rows)} measured here, mean \u00b1 standard error; the others were not run."
    if ran == len(table.rows):
        caption = "All measured here, mean \u00b1 standard error."
    caption += "".join(f" {_source_html(source)}." for source in table.sources)
    return (
        f'<h3>{escape(table.metric)}</h3>\n<div class="scroll" tabindex="0" role="region" '
        f'aria-label="{escape(table.metric)}, measured and published">'
        f'<table class="plain beside">\n<caption>{caption}</caption>\n'
        f"<thead><tr>{heads}</tr>{sources}</thead>\n"
        "<tbody>\n" + "\n".join(lines) + "\n</tbody></table></div>"
    )


def _markdown(table: Table) -> str:
    settings = any(row.setting for row in table.rows)
    columns = ["model", *(["setting"] if settings else []), "measured", *table.sources]
    columns += [f"measured {MINUS} {source}" for source in table.sources]
    words = 2 if settings else 1
    lines = [columns, ["---"] * words + ["---:"] * (len(columns) - words)]
    for row in table.rows:
        cells = [row.model, *([row.setting] if settings else [])]
        cells.append(_ours_text(row.measured, table.digits))
        cells += [_number(value, table.digits) for value in row.published]
        cells += [_number(value, table.digits, sign=True) for value in row.differences]
        lines.append([cell.replace("|", "\\|") for cell in cells])
    return f"{table.metric}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ours_html(estimate: Estimate | None, digits: int) -> str:
    if estimate is None:
        return f'<span class="not-run">{NOT_RUN}</span>'
    if math.isnan(estimate.error):
        return _number(estimate.mean, digits)
    error = _number(estimate.error, digits)
    return f'{_number(estimate.mean, digits)} <span class="error">\u00b1 {error}</span>'


def _ours_text(estimate: Estimate | None, digits: int) -> str:
    if estimate is None:
        return NOT_RUN
    mean = _number(estimate.mean, digits)
    return mean if math.isnan(estimate.error) else f"{mean} \u00b1 {_number(estimate.error, digits)}"


def _source_html(key: str) -> str:
    """Says what the key of a source stands for, with a link where its address is known."""
    source = SOURCES.get(key)
    if source is None:
        return escape(key)
    title = escape(source.title)
    named = f'<a href="{escape(source.url)}">{title}</a>' if source.url else title
    return f"<b>{escape(key)}</b>: {named} ({source.year})"


def _number(value: float | None, digits: int, *, sign: bool = False) -> str:
    if value is None or math.isnan(value):
        return NONE
    return f"{value:{'+' if sign else ''}z.{digits}f}".replace("-", MINUS)


def _decimals(value: float) -> int:
    """Returns how many decimals a number was published with; zeros at the end are not seen."""
    whole, _, decimals = f"{value!r}".partition(".")
    return 0 if "e" in whole or decimals in ("", "0") else len(decimals)


def _named(key: tuple[str, str, str, str]) -> str:
    experiment, metric, model, setting = key
    return f"{metric} of {model}{f' at {setting}' if setting else ''} in {experiment}"
