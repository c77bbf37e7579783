"""Compare models on the same prompts and seeds."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .files import write_text
from .plan import DrawConfig
from .score import Better, Column, Scores
from .statistics import Estimate, paired_difference, paired_rate_difference


class Row(NamedTuple):
    """One measure on one kind of prompts, for every model."""

    measure: str
    kind: str
    is_rate: bool
    better: Better
    note: str
    estimates: tuple[Estimate, ...]
    """One for each model."""
    differences: tuple[Estimate, ...]
    """Paired differences from the first model, one for each of the others."""

    @property
    def verdicts(self) -> tuple[str, ...]:
        """Says of each difference whether it is `better`, `worse` or `unclear`.

        Unclear is a difference whose 95 % interval holds zero, and any of a measure of which
        neither direction is better.
        """
        verdicts = []
        for difference in self.differences:
            certain = difference.low > 0 or difference.high < 0
            if self.better == "neither" or not certain:
                verdicts.append("unclear")
            else:
                verdicts.append("better" if (difference.mean > 0) == (self.better == "higher") else "worse")
        return tuple(verdicts)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What several models scored on the same prompts and seeds."""

    models: tuple[str, ...]
    """The first is what the others are compared with."""
    config: DrawConfig
    """How the images of all models were drawn."""
    rows: tuple[Row, ...]

    def row(self, measure: str, kind: str) -> Row:
        """Returns one row.

        Raises:
            ValueError: The measure was not taken on this kind.
        """
        for row in self.rows:
            if (row.measure, row.kind) == (measure, kind):
                return row
        there = ", ".join(f"{row.measure} on {row.kind}" for row in self.rows)
        raise ValueError(f"measure, kind must be one of those compared ({there}), got {measure} on {kind}")

    def as_dict(self) -> dict[str, Any]:
        """Returns the comparison as JSON knows it; what is not known, such as the error of one value, is None."""
        rows = [
            {
                "measure": row.measure,
                "kind": row.kind,
                "is_rate": row.is_rate,
                "better": row.better,
                "note": row.note,
                "models": dict(zip(self.models, map(_known, row.estimates), strict=True)),
                "differences": dict(zip(self.models[1:], map(_known, row.differences), strict=True)),
                "verdicts": dict(zip(self.models[1:], row.verdicts, strict=True)),
            }
            for row in self.rows
        ]
        return {"format": 1, "models": list(self.models), "config": asdict(self.config), "rows": rows}

    def save(self, path: Path | str) -> None:
        """Writes the comparison as JSON, whole or not at all."""
        write_text(Path(path), json.dumps(self.as_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def compare(scores: Sequence[Scores]) -> Comparison:
    """Compares models that were scored on the same prompts, seeds and settings.

    Args:
        scores: Scores of each model; the others are compared with the first.

    Raises:
        ValueError: The models are not paired: two share a name, or differ in settings, measures, prompts or seeds.
    """
    if not scores:
        raise ValueError("scores must hold at least one model, got none")
    models = tuple(one.model for one in scores)
    if len(set(models)) < len(models):
        raise ValueError(f"scores must be of models with unique names, got {list(models)}")
    first, *others = scores
    for other in others:
        _check_paired(first, other)
    rows = []
    for column in first.columns:
        rest = [other.column(column.measure, column.kind) for other in others]
        difference = paired_rate_difference if column.is_rate else paired_difference
        rows.append(
            Row(
                measure=column.measure,
                kind=column.kind,
                is_rate=column.is_rate,
                better=column.better,
                note=column.note,
                estimates=tuple(one.estimate for one in (column, *rest)),
                differences=tuple(difference(one.values, column.values) for one in rest),
            )
        )
    return Comparison(models=models, config=first.config, rows=tuple(rows))


def _check_paired(first: Scores, other: Scores) -> None:
    pair = f"{first.model} and {other.model}"
    if first.config != other.config:
        raise ValueError(f"scores: {pair} must be drawn with the same settings, got {first.config} and {other.config}")
    columns: Mapping[tuple[str, str], Column] = {(column.measure, column.kind): column for column in other.columns}
    if {(column.measure, column.kind) for column in first.columns} != columns.keys():
        got = [sorted({f"{column.measure} on {column.kind}" for column in one.columns}) for one in (first, other)]
        raise ValueError(f"scores: {pair} must have the same measures, got {got[0]} and {got[1]}")
    for column in first.columns:
        twin = columns[column.measure, column.kind]
        where = f"scores: {pair}, {column.measure} on {column.kind}:"
        if column.is_rate != twin.is_rate:
            raise ValueError(f"{where} values must be rates for both or for neither")
        if len(column.images) != len(twin.images):
            raise ValueError(
                f"{where} must be of the same images, got {len(column.images)} and {len(twin.images)} of them"
            )
        for one, two in zip(column.images, twin.images, strict=True):
            if one != two:
                raise ValueError(
                    f"{where} must be of the same prompts and seeds in the same order, got {one} and {two}"
                )


def _known(estimate: Estimate) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in estimate._asdict().items()}
