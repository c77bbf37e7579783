"""Learning curves out of `metrics.jsonl`, the file that every training run writes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from overpaint.training import read_metrics


class Curve(NamedTuple):
    """The values of one tag over the iterations of a run."""

    label: str
    iterations: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Which tags are drawn together."""

    title: str
    """What the panel shows."""
    tags: Mapping[str, str]
    """Tag of each curve, by the label that readers see."""
    caption: str = ""
    """What to look for."""
    references: Mapping[str, float] = field(default_factory=dict)
    """Levels drawn as horizontal lines, by label: a ceiling, or where the original model stands."""


def metrics_by_tag(path: Path | str) -> dict[str, dict[int, float]]:
    """Reads the finite values of every tag, by iteration; of two lines on one iteration the later counts."""
    values: dict[str, dict[int, float]] = {}
    for entry in read_metrics(Path(path)):
        for tag, value in entry.items():
            if tag != "iteration" and isinstance(value, int | float) and math.isfinite(value):
                values.setdefault(tag, {})[entry["iteration"]] = float(value)
    return values


def panel_curves(panel: Panel, metrics: Mapping[str, Mapping[int, float]]) -> tuple[Curve, ...]:
    """Returns the curves of a panel; tags that were not logged are left out."""
    curves = []
    for label, tag in panel.tags.items():
        points = sorted(metrics.get(tag, {}).items())
        if points:
            iterations, values = zip(*points, strict=True)
            curves.append(Curve(label, iterations, values))
    return tuple(curves)


def smoothed(values: Sequence[float], window: int) -> tuple[float, ...]:
    """Returns at each value the height of the straight line fitted to the `window` values around it.

    Away from the ends this is the moving average; at the ends, where the window is cut short, a
    line follows a curve that rises or falls, and an average would not.
    """
    reach = window // 2
    result = []
    for k in range(len(values)):
        places = range(max(k - reach, 0), min(k + reach + 1, len(values)))
        middle = math.fsum(places) / len(places)
        mean = math.fsum(values[j] for j in places) / len(places)
        spread = math.fsum((j - middle) ** 2 for j in places)
        slope = math.fsum((j - middle) * values[j] for j in places) / spread if spread else 0.0
        result.append(mean + slope * (k - middle))
    return tuple(result)
