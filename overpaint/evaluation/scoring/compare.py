"""Compare models on the same prompts and seeds."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from overpaint.evaluation.images.plan import DrawConfig
from overpaint.evaluation.metrics.statistics import (
    Estimate,
    bootstrap_interval,
    correlation,
    joined_rates,
    mean_estimate,
    means_by_cluster,
    paired_rate_difference,
)
from overpaint.evaluation.scoring.score import Better, Column, Scores, model_names, of_measure
from overpaint.policy.atomic import write_text

Pairing = Literal["image", "prompt"]
"""What is compared with what: images of the same prompt and seed, or the images of the same prompt."""
Intervals = Literal["closed", "bootstrap"]
"""How the intervals of means are found; those of rates are always in closed form."""


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
        words = {"higher": ("worse", "better"), "lower": ("better", "worse"), "neither": ("unclear", "unclear")}
        return tuple(
            words[self.better][one.mean > 0] if one.low > 0 or one.high < 0 else "unclear" for one in self.differences
        )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What several models scored on the same prompts and seeds."""

    models: tuple[str, ...]
    """The first is what the others are compared with."""
    config: DrawConfig | None
    """How the images were drawn by all models of which it is known; None where it is known of none, or differs."""
    rows: tuple[Row, ...]
    by: Pairing = "image"
    """What was paired: images of the same prompt and seed, or the means of each prompt."""
    intervals: Intervals = "closed"
    """How the intervals of means were found, see `compare`."""

    def row(self, measure: str, kind: str) -> Row:
        """Returns one row.

        Raises:
            ValueError: The measure was not taken on this kind.
        """
        return of_measure(self.rows, measure, kind)

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
        how = {"config": self.config and asdict(self.config), "by": self.by, "intervals": self.intervals}
        return {"format": 1, "models": list(self.models), **how, "rows": rows}

    def save(self, path: Path | str) -> None:
        """Writes the comparison as JSON, whole or not at all."""
        write_text(Path(path), json.dumps(self.as_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def compare(scores: Sequence[Scores], *, by: Pairing = "image", intervals: Intervals = "closed") -> Comparison:
    """Compares models that were scored on the same prompts, and on the same seeds and settings where these are known.

    Images of one prompt count as dependent in all errors and intervals.

    Args:
        scores: Scores of each model; the others are compared with the first.
        by: "image" pairs images of the same prompt and seed; "prompt" pairs the means of the images of a prompt,
            whatever their seeds, settings and number, as it must be with images that another system drew.
        intervals: "closed" are Student's t intervals; "bootstrap" draws prompts, BCa, which fits skewed values better
            and is too narrow below about 20 prompts. Rates have Wilson's and Newcombe's intervals in both.

    Raises:
        ValueError: The models are not paired: two share a name, or differ in settings, measures, prompts or seeds.
    """
    if by not in ("image", "prompt"):
        raise ValueError(f"by must be 'image' or 'prompt', got {by!r}")
    if intervals not in ("closed", "bootstrap"):
        raise ValueError(f"intervals must be 'closed' or 'bootstrap', got {intervals!r}")
    if not scores:
        raise ValueError("scores must hold at least one model, got none")
    models = model_names(scores)
    first, *others = scores
    for other in others:
        _check_paired(first, other, by)
    rows = []
    for column in first.columns:
        rest = [other.column(column.measure, column.kind) for other in others]
        rows.append(
            Row(
                measure=column.measure,
                kind=column.kind,
                is_rate=column.is_rate,
                better=column.better,
                note=column.note,
                estimates=tuple(
                    one.estimate if one.is_rate else _interval(one.estimate, one.values, one.prompts, intervals)
                    for one in (column, *rest)
                ),
                differences=tuple(_difference(one, column, by, intervals) for one in rest),
            )
        )
    known = {one.config for one in scores if one.config is not None}
    config = known.pop() if len(known) == 1 else None
    return Comparison(models=models, config=config, rows=tuple(rows), by=by, intervals=intervals)


def _difference(after: Column, before: Column, by: Pairing, intervals: Intervals) -> Estimate:
    """Returns the paired difference of two columns."""
    if by == "image":
        if after.is_rate:
            return paired_rate_difference(after.values, before.values, after.prompts)
        changes = [a - b for a, b in zip(after.values, before.values, strict=True)]
        return _interval(mean_estimate(changes, after.prompts), changes, after.prompts, intervals)
    before_means, after_means = (means_by_cluster(column.values, column.prompts) for column in (before, after))
    pairs = [(after_means[prompt], mean) for prompt, mean in before_means.items()]
    changes = [a - b for a, b in pairs]
    change = mean_estimate(changes)
    if after.is_rate:
        return joined_rates(after.estimate, before.estimate, change, correlation(*zip(*pairs, strict=True)))
    return _interval(change, changes, tuple(before_means), intervals)


def _interval(estimate: Estimate, values: Sequence[float], prompts: Sequence[str], intervals: Intervals) -> Estimate:
    """Returns an estimate of values with the interval that was chosen."""
    if intervals == "closed":
        return estimate
    return estimate._replace(**bootstrap_interval(values, prompts)._asdict())


def _check_paired(first: Scores, other: Scores, by: Pairing) -> None:
    pair = f"{first.model} and {other.model}"
    if by == "image" and (first.config is None or other.config is None):
        raise ValueError(f"scores: {pair} must both be drawn from known seeds, got another system's; compare by prompt")
    if by == "image" and first.config != other.config:
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
        if by == "image":
            _check_same_images(where, column, twin)
        else:
            _check_same_prompts(where, column, twin)


def _check_same_images(where: str, column: Column, twin: Column) -> None:
    if len(column.images) != len(twin.images):
        raise ValueError(f"{where} must be of the same images, got {len(column.images)} and {len(twin.images)} of them")
    for one, two in zip(column.images, twin.images, strict=True):
        if one != two:
            raise ValueError(f"{where} must be of the same prompts and seeds in the same order, got {one} and {two}")


def _check_same_prompts(where: str, column: Column, twin: Column) -> None:
    texts = [{image.id: image.prompt for image in one.images} for one in (column, twin)]
    for name in texts[0] | texts[1]:
        one, two = texts[0].get(name), texts[1].get(name)
        if one != two:
            raise ValueError(f"{where} must be of the same prompts, got {one!r} and {two!r} for {name!r}")


def _known(estimate: Estimate) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in estimate._asdict().items()}
