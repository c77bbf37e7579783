"""The tables of the report page, as HTML."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .compare import Comparison, Row
from .statistics import Estimate
from .table import number, row_digits

MINUS = "\u2212"


def results_table(comparison: Comparison) -> str:
    """Lays out what the page is about: a mean for each model, and below it the change from the first."""
    first, *others = comparison.models
    caption = "Mean \u00b1 standard error."
    if others:
        caption += (
            f" Below it the paired difference from \u201c{escape(first)}\u201d, on the same prompts and seeds; "
            "coloured where its 95 % interval leaves out zero, green for better and orange for worse."
        )
    bodies = []
    for measure in dict.fromkeys(row.measure for row in comparison.rows):
        rows = [row for row in comparison.rows if row.measure == measure]
        way = f'<span class="way">{rows[0].better} is better</span>' if rows[0].better != "neither" else ""
        name = f'<th scope="rowgroup" rowspan="{len(rows)}">{escape(measure)}{way}</th>'
        lines = []
        for k, row in enumerate(rows):
            cells = "".join(_result(row, place) for place in range(len(comparison.models)))
            kind = f'<th scope="row" class="kind">{escape(row.kind)}</th>'
            lines.append(f"<tr>{name if k == 0 else ''}{kind}{cells}</tr>")
        bodies.append("<tbody>\n" + "\n".join(lines) + "\n</tbody>")
    heads = "".join(f'<th scope="col" class="number">{escape(model)}</th>' for model in comparison.models)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Results">'
        f'<table class="results">\n<caption>{caption}</caption>\n'
        f'<thead><tr><th scope="col">measure</th><th scope="col">prompts</th>{heads}</tr></thead>\n'
        + "\n".join(bodies)
        + "\n</table></div>"
    )


def numbers_table(comparison: Comparison) -> str:
    """Lists every number with its count and its 95 % interval."""
    first, *others = comparison.models
    groups = []
    for row in comparison.rows:
        digits = row_digits(row) + 1
        lines = []
        for place, model in enumerate(comparison.models):
            texts = [row.measure, row.kind] if place == 0 else ["", ""]
            numbers = [str(row.estimates[place].count), _interval(row.estimates[place], digits)]
            if others:
                numbers.append(_interval(row.differences[place - 1], digits, sign=True) if place > 0 else "")
            cells = [f"<td>{escape(text)}</td>" for text in [*texts, model]]
            cells += [f'<td class="number">{text}</td>' for text in numbers]
            lines.append(f"<tr>{''.join(cells)}</tr>")
        groups.append('<tbody class="group">\n' + "\n".join(lines) + "\n</tbody>")
    intervals = "Wilson\u2019s for rates" + (" and Newcombe\u2019s for their paired differences" if others else "")
    change_head = f'<th scope="col" class="number">change from {escape(first)} [95 %]</th>' if others else ""
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="All numbers"><table class="plain">\n'
        f"<caption>95 % intervals: {intervals}, Student\u2019s t for everything else.</caption>\n"
        '<thead><tr><th scope="col">measure</th><th scope="col">prompts</th><th scope="col">model</th>'
        '<th scope="col" class="number">images</th><th scope="col" class="number">mean [95 %]</th>'
        f"{change_head}</tr></thead>\n" + "\n".join(groups) + "\n</table></div>"
    )


def settings_tables(settings: Mapping[str, Any]) -> str:
    """Lists settings; a mapping within becomes a table of its own, and one within that gets dotted names."""
    plain = {name: value for name, value in settings.items() if not isinstance(value, Mapping)}
    groups = {name: value for name, value in settings.items() if isinstance(value, Mapping)}
    parts = [_settings_table("run", plain)] if plain else []
    parts += [_settings_table(name, _flat(group)) for name, group in groups.items()]
    return f'<div class="settings">{"".join(parts)}</div>'


def model_list(models: Mapping[str, str]) -> str:
    """Says of each model what it is."""
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in models.items())
    return f'<dl class="models">{items}</dl>'


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
    return f'<td class="number">{text}</td>'


def _number(value: float, digits: int, *, sign: bool = False) -> str:
    text = number(value, digits, sign=sign)
    return "\u2013" if math.isnan(value) else text.replace("-", MINUS)


def _interval(estimate: Estimate, digits: int, *, sign: bool = False) -> str:
    mean, low, high = (_number(value, digits, sign=sign) for value in (estimate.mean, estimate.low, estimate.high))
    return f'{mean} <span class="error">[{low}, {high}]</span>'


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
