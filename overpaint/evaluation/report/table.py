"""A comparison as an aligned table for the terminal, and its numbers as text."""

import math

from overpaint.evaluation.experiments.compare import Comparison, Row
from overpaint.evaluation.scoring.score import Better

ARROWS: dict[Better, str] = {"higher": "\u2191", "lower": "\u2193", "neither": " "}


def text_table(comparison: Comparison) -> str:
    """Lays a comparison out in columns: mean ± standard error, and below it the paired difference."""
    first, *others = comparison.models
    header = ["measure", "kind", "n", *comparison.models]
    lines = [header, []]
    last_measure = None
    for row in comparison.rows:
        digits = row_digits(row)
        measure = "" if row.measure == last_measure else f"{row.measure} {ARROWS[row.better]}".rstrip()
        means = [f"{number(one.mean, digits)} ± {number(one.error, digits)}" for one in row.estimates]
        lines.append([measure, row.kind, str(row.estimates[0].count), *means])
        if others:
            changes = [
                f"{number(one.mean, digits, sign=True)} ± {number(one.error, digits)}" for one in row.differences
            ]
            lines.append(["", "", "", "", *changes])
        last_measure = row.measure
    widths = [max(len(line[k]) for line in lines if line) for k in range(len(header))]
    lines[1] = ["-" * width for width in widths]
    # Words are set to the left, numbers to the right.
    text = [
        "  ".join(
            cell.ljust(w) if k < 2 else cell.rjust(w) for k, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    legend = "Mean ± standard error"
    if others:
        legend += f"; below it the paired difference from {first}, same prompts and seeds"
    arrows = [
        f"{ARROWS[way]} {way} is better" for way in ("higher", "lower") if any(r.better == way for r in comparison.rows)
    ]
    legend = ". ".join([legend, ", ".join(arrows)]) if arrows else legend
    return "\n".join([*(line.rstrip() for line in text), "", f"{legend}."])


def row_digits(row: Row) -> int:
    """Returns how many decimals suit the numbers of a row: three below ten, fewer for larger numbers."""
    largest = max(abs(one.mean) for one in row.estimates)
    return 3 if largest < 10 else 2 if largest < 100 else 1


def number(value: float, digits: int, *, sign: bool = False) -> str:
    """Writes a number; a dash where it is not known."""
    if math.isnan(value):
        return "-"
    return f"{value:{'+' if sign else ''}z.{digits}f}"
