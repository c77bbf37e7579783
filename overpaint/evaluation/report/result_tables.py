"""The tables of the report page, as HTML."""

import math
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from html import escape
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from overpaint.evaluation.experiments.compare import Comparison, Row
from overpaint.evaluation.metrics.statistics import Estimate

from .table import number, row_digits

MINUS = "\u2212"
LIBRARIES = ("overpaint", "torch", "diffusers", "transformers", "accelerate", "peft", "numpy", "pillow")
"""Distributions whose versions a report names."""
MOST_ACROSS = 5
"""Models that the columns of a table show; more are shown in rows."""


def results_table(comparison: Comparison) -> str:
    """Lays out what the page is about: a mean for each model, and below it the change from the first."""
    first, *others = comparison.models
    caption = "Mean \u00b1 standard error."
    if others:
        alike = "prompts and seeds" if comparison.by == "image" else "prompts"
        caption += (
            f" Below it the paired difference from \u201c{escape(first)}\u201d, on the same {alike}; "
            "coloured where its 95 % interval leaves out zero, green for better and orange for worse."
        )
    table = _by_kind(comparison) if len(comparison.models) <= MOST_ACROSS else _by_model(comparison)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Results">'
        f'<table class="results">\n<caption>{caption}</caption>\n{table}\n</table></div>'
    )


def numbers_table(comparison: Comparison) -> str:
    """Lists every number with its count and its 95 % interval."""
    first, *others = comparison.models
    groups = []
    for row in comparison.rows:
        digits = row_digits(row) + 1
        lines = [f'<tr class="over"><th scope="rowgroup" colspan="{4 if others else 3}">{_measure_of(row)}</th></tr>']
        for place, model in enumerate(comparison.models):
            numbers = [str(row.estimates[place].count), _interval(row.estimates[place], digits)]
            if others:
                numbers.append(_interval(row.differences[place - 1], digits, sign=True) if place > 0 else "")
            cells = "".join(f'<td class="number">{text}</td>' for text in numbers)
            lines.append(f'<tr data-model="{escape(model)}"><th scope="row">{escape(model)}</th>{cells}</tr>')
        body = f'<tbody class="group" data-group data-kind="{escape(row.kind)}">'
        groups.append(f"{body}\n" + "\n".join(lines) + "\n</tbody>")
    intervals = "Wilson\u2019s for rates" + (" and Newcombe\u2019s for their paired differences" if others else "")
    rest = "Student\u2019s t" if comparison.intervals == "closed" else "the bootstrap over prompts (BCa)"
    change_head = f'<th scope="col" class="number">change from {escape(first)} [95 %]</th>' if others else ""
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="All numbers"><table class="plain">\n'
        f"<caption>95 % intervals: {intervals}, {rest} for everything else.</caption>\n"
        '<thead><tr><th scope="col">model</th>'
        '<th scope="col" class="number">images</th><th scope="col" class="number">mean [95 %]</th>'
        f"{change_head}</tr></thead>\n" + "\n".join(groups) + "\n</table></div>"
    )


def run_section(
    *,
    started: datetime | None,
    written: datetime,
    commands: Sequence[str],
    versions: Mapping[str, str],
    hashes: Mapping[str, str],
    settings: Mapping[str, Any],
) -> str:
    """Tells what ran and when, with which libraries, on which weights, and how to do it again."""
    dates = [*([("started", started)] if started is not None else []), ("page written", written)]
    lines = "".join(f"<dt>{name}</dt><dd>{moment(date)}</dd>" for name, date in dates)
    parts = [f'<dl class="dates">{lines}</dl>']
    parts += [f"<pre><code>{escape(command)}</code></pre>" for command in commands]
    tables = _settings_table("versions", versions) if versions else ""
    tables += _settings_table("weights, as hashes", hashes) if hashes else ""
    return "".join(parts) + f'<div class="settings">{tables}{_settings(settings)}</div>'


def library_versions() -> dict[str, str]:
    """Returns the versions of Python and of the installed libraries that numbers depend on."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def moment(date: datetime) -> str:
    """Writes a date to the minute, for people and for machines."""
    return f'<time datetime="{escape(date.isoformat(timespec="seconds"))}">{date:%-d %B %Y, %H:%M %Z}</time>'


def model_list(models: Mapping[str, str]) -> str:
    """Says of each model what it is."""
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in models.items())
    return f'<dl class="models">{items}</dl>'


def _by_kind(comparison: Comparison) -> str:
    """Lays out a column for each model and a row for each kind of prompts, below the name of the measure."""
    heads = "".join(
        f'<th scope="col" class="number" data-model="{escape(model)}">{escape(model)}</th>'
        for model in comparison.models
    )
    bodies = []
    for measure in dict.fromkeys(row.measure for row in comparison.rows):
        rows = [row for row in comparison.rows if row.measure == measure]
        columns = len(comparison.models) + 1
        lines = [
            f'<tr class="over"><th scope="rowgroup" colspan="{columns}">{escape(measure)}{_way(rows[0])}</th></tr>'
        ]
        for row in rows:
            cells = "".join(
                f'<td class="number" data-model="{escape(model)}">{_result(row, place)}</td>'
                for place, model in enumerate(comparison.models)
            )
            kind = f'<th scope="row" class="kind">{escape(row.kind)}</th>'
            lines.append(f'<tr data-kind="{escape(row.kind)}">{kind}{cells}</tr>')
        bodies.append("<tbody data-group>\n" + "\n".join(lines) + "\n</tbody>")
    return f'<thead><tr><th scope="col">prompts</th>{heads}</tr></thead>\n' + "\n".join(bodies)


def _by_model(comparison: Comparison) -> str:
    """Lays out a row for each model and a column for each measure and kind of prompts."""
    # Each column has a whole heading of its own, so that a kind can be hidden without shifting the others.
    heads = "".join(
        f'<th scope="col" class="number" data-kind="{escape(row.kind)}">{escape(row.measure)}'
        f'<span class="way">{escape(row.kind)}</span>{_way(row)}</th>'
        for row in comparison.rows
    )
    lines = []
    for place, model in enumerate(comparison.models):
        cells = "".join(
            f'<td class="number" data-kind="{escape(row.kind)}">{_result(row, place)}</td>' for row in comparison.rows
        )
        lines.append(f'<tr data-model="{escape(model)}"><th scope="row" class="kind">{escape(model)}</th>{cells}</tr>')
    return f'<thead><tr><th scope="col">model</th>{heads}</tr></thead>\n<tbody>\n' + "\n".join(lines) + "\n</tbody>"


def _way(row: Row) -> str:
    return f' <span class="way">{row.better} is better</span>' if row.better != "neither" else ""


def _measure_of(row: Row) -> str:
    return f'{escape(row.measure)} <span class="way">{escape(row.kind)}</span>'


def _result(row: Row, place: int) -> str:
    digits = row_digits(row)
    here = row.estimates[place]
    text = f'<span class="mean">{_number(here.mean, digits)}</span> '
    text += f'<span class="error">\u00b1 {_number(here.error, digits)}</span>'
    if place > 0:
        change, verdict = row.differences[place - 1], row.verdicts[place - 1]
        word = "" if verdict == "unclear" else f'<span class="hidden"> ({verdict})</span>'
        text += (
            f'<span class="change {verdict}">{_number(change.mean, digits, sign=True)} '
            f'<span class="error">\u00b1 {_number(change.error, digits)}</span>{word}</span>'
        )
    return text


def _number(value: float, digits: int, *, sign: bool = False) -> str:
    text = number(value, digits, sign=sign)
    return "\u2013" if math.isnan(value) else text.replace("-", MINUS)


def _interval(estimate: Estimate, digits: int, *, sign: bool = False) -> str:
    mean, low, high = (_number(value, digits, sign=sign) for value in (estimate.mean, estimate.low, estimate.high))
    return f'{mean} <span class="error">[{low}, {high}]</span>'


def _settings(settings: Mapping[str, Any]) -> str:
    """Lists settings; a mapping within becomes a table of its own, and one within that gets dotted names."""
    plain = {name: value for name, value in settings.items() if not isinstance(value, Mapping)}
    groups = {name: value for name, value in settings.items() if isinstance(value, Mapping)}
    parts = [_settings_table("run", plain)] if plain else []
    return "".join([*parts, *(_settings_table(name, _flat(group)) for name, group in groups.items())])


def _settings_table(name: str, settings: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(str(value))}</td></tr>' for key, value in settings.items()
    )
    return f'<div><h3>{escape(name)}</h3><table class="plain"><tbody>{rows}</tbody></table></div>'


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def notes_list(notes: Sequence[str]) -> str:
    """Lists what a reader has to know."""
    return '<ul class="notes">' + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>"
