"""Line charts as SVG, for a page that brings its own colours.

A chart names no colour and no font: the page's style sheet gives both, for light, dark and
printed pages, through classes such as `curve-0`.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

from overpaint.evaluation.metrics.statistics import Estimate

from .curves import Curve, smoothed

WIDTH, HEIGHT = 460, 240
LEFT, RIGHT, BOTTOM = 48, 12, 36
WIDE, WIDE_HEIGHT, WIDE_LEFT = 680, 320, 56
"""Of charts that have a page's whole width; the height is that without a legend."""
CURVE_STYLES = 4
"""How many curves of single values are told apart, which cross often."""
SERIES_STYLES = 6
"""How many series of measured points are told apart; the style sheet has as many."""
RAW_POINTS = 30
"""Curves with more points than this are drawn smoothed, over their values as logged."""


class Frame(NamedTuple):
    """Where numbers lie on a chart."""

    first: float
    """At the left edge."""
    last: float
    """At the right edge."""
    low: float
    high: float
    top: int
    """Pixels kept free above, for a legend."""
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT

    def x(self, number: float | int) -> float:
        """Returns how far right a number lies."""
        return self.left + (number - self.first) / (self.last - self.first) * (self.width - self.left - RIGHT)

    def y(self, value: float) -> float:
        """Returns how far down a value lies."""
        return self.top + (self.high - value) / (self.high - self.low) * (self.height - self.top - BOTTOM)


def line_chart(curves: Sequence[Curve], *, title: str, description: str, references: Mapping[str, float]) -> str:
    """Draws curves over iterations, with a legend if there are several.

    Args:
        curves: One to four curves.
        title: What is seen, for those who hear the page.
        description: The same in more words, with numbers.
        references: Levels drawn as horizontal lines, by label.

    Raises:
        ValueError: There are no curves, or more than can be told apart.
    """
    if not 1 <= len(curves) <= CURVE_STYLES:
        raise ValueError(f"curves must be 1 to {CURVE_STYLES}, got {len(curves)}")
    first = float(min(curve.iterations[0] for curve in curves))
    last = max(float(max(curve.iterations[-1] for curve in curves)), first + 1)
    levels = [*(value for curve in curves for value in curve.values), *references.values()]
    ticks = nice_ticks(min(levels), max(levels))
    frame = Frame(first, last, ticks[0], ticks[-1], top=34 if len(curves) > 1 else 10)
    words = escape(f"{title}. {description}")
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{words}">']
    # Half an iteration is none.
    whole = [tick for tick in nice_ticks(frame.first, frame.last) if tick == round(tick)]
    parts += axes(frame, whole, ticks, x_label="iteration")
    for k, curve in enumerate(curves):
        parts += _curve(frame, curve, k)
    for label, level in references.items():
        parts += _reference(frame, label, level)
    if len(curves) > 1:
        parts += legend([curve.label for curve in curves], left=LEFT, width=math.inf)
    return "\n".join([*parts, "</svg>"])


def series_chart(
    series: Mapping[str, Sequence[tuple[float, Estimate]]], *, title: str, description: str, x_label: str, y_label: str
) -> str:
    """Draws measured points joined by lines, each with its 95 % interval, and a legend if there are several series.

    Args:
        series: One to six series of (x, measured), by name; x rises.
        title: What is seen.
        description: The same in more words, with numbers, for those who hear the page.
        x_label: What is told to the right.
        y_label: What is told upwards.

    Raises:
        ValueError: There are no series, more than can be told apart, one without points, or one whose x does not rise.
    """
    if not 1 <= len(series) <= SERIES_STYLES:
        raise ValueError(f"series must be 1 to {SERIES_STYLES}, got {len(series)}")
    for name, points in series.items():
        xs = [x for x, _ in points]
        if not xs or any(b <= a for a, b in pairwise(xs)):
            raise ValueError(f"series[{name!r}] must have points at rising x, got {xs}")
    edges = [edge for points in series.values() for _, one in points for edge in (one.mean, one.low, one.high)]
    known = [edge for edge in edges if math.isfinite(edge)]
    up = nice_ticks(min(known), max(known))
    across = sorted({x for points in series.values() for x, _ in points})
    margin = (across[-1] - across[0]) * 0.03 or 0.5
    names = list(series) if len(series) > 1 else []
    lines = max((line for _, line in legend_places(names, left=WIDE_LEFT, width=float(WIDE))), default=-1) + 1
    frame = Frame(
        across[0] - margin,
        across[-1] + margin,
        up[0],
        up[-1],
        30 + 20 * lines,
        WIDE,
        WIDE_HEIGHT + 20 * lines,
        WIDE_LEFT,
    )
    ticks = across if len(across) <= 8 else nice_ticks(across[0], across[-1])
    parts = [f'<svg class="chart" viewBox="0 0 {WIDE} {frame.height}" role="img">']
    parts.append(f"<title>{escape(title)}</title>\n<desc>{escape(description)}</desc>")
    parts += axes(frame, ticks, up, x_label=x_label, y_label=y_label)
    for style, points in enumerate(series.values()):
        # Side by side, so that no interval hides another.
        parts += _points(frame, points, style, shift=(style - (len(series) - 1) / 2) * 4)
    return "\n".join([*parts, *legend(names, left=WIDE_LEFT, width=float(WIDE)), "</svg>"])


def nice_ticks(low: float, high: float, *, most: int = 6) -> tuple[float, ...]:
    """Returns at most `most` round, evenly spaced numbers that enclose a range."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-3):
        pad = max(abs(low) * 0.1, 0.1)
        low, high = low - pad, high + pad
    magnitude = 10.0 ** math.floor(math.log10((high - low) / most))
    ticks: tuple[float, ...] = ()
    for factor in (1, 2, 5, 10, 20, 50):
        step = factor * magnitude
        start, stop = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        ticks = tuple(k * step for k in range(start, stop + 1))
        if len(ticks) <= most:
            break
    return ticks


def axes(frame: Frame, across: Sequence[float], up: Sequence[float], *, x_label: str, y_label: str = "") -> list[str]:
    """Draws the grid, the numbers at its edges and what they are.

    Args:
        frame: Where numbers lie.
        across: Numbers below the chart; those outside the frame are left out.
        up: Numbers beside the chart, each with a line.
        x_label: What is told to the right.
        y_label: What is told upwards; above the chart, at the left, so that it reads without turning the head.
    """
    right, floor = frame.width - RIGHT, frame.height - BOTTOM
    parts = []
    for tick in up:
        y = frame.y(tick)
        parts.append(f'<line class="grid" x1="{frame.left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{frame.left - 8}" y="{y + 4:.1f}" text-anchor="end">{_tick(tick)}</text>')
    reach = 1e-9 * (frame.last - frame.first)
    parts += [
        f'<text class="tick" x="{frame.x(tick):.1f}" y="{floor + 18}" text-anchor="middle">{_tick(tick)}</text>'
        for tick in across
        if frame.first - reach <= tick <= frame.last + reach
    ]
    parts.append(f'<text class="tick" x="{right}" y="{floor + 33}" text-anchor="end">{escape(x_label)}</text>')
    if y_label:
        parts.append(f'<text class="tick" x="{frame.left}" y="{frame.top - 14}">{escape(y_label)}</text>')
    return parts


def _curve(frame: Frame, curve: Curve, style: int) -> list[str]:
    xs = [frame.x(iteration) for iteration in curve.iterations]
    if len(xs) == 1:
        return [f'<circle class="dot curve-{style}" cx="{xs[0]:.1f}" cy="{frame.y(curve.values[0]):.1f}" r="3"/>']
    parts = []
    values = curve.values
    if len(xs) > RAW_POINTS:
        parts.append(f'<path class="raw curve-{style}" d="{_path(frame, xs, values)}"/>')
        values = smoothed(values, window=max(5, len(values) // 12))
    return [*parts, f'<path class="line curve-{style}" d="{_path(frame, xs, values)}"/>']


def _points(frame: Frame, points: Sequence[tuple[float, Estimate]], style: int, *, shift: float) -> list[str]:
    xs, means = [frame.x(x) + shift for x, _ in points], [one.mean for _, one in points]
    parts = [
        f'<line class="interval curve-{style}" x1="{x:.1f}" x2="{x:.1f}" '
        f'y1="{frame.y(one.low):.1f}" y2="{frame.y(one.high):.1f}"/>'
        for x, (_, one) in zip(xs, points, strict=True)
        if math.isfinite(one.low) and math.isfinite(one.high)
    ]
    if len(points) > 1:
        parts.append(f'<path class="line curve-{style}" d="{_path(frame, xs, means)}"/>')
    parts += [
        f'<circle class="dot curve-{style}" cx="{x:.1f}" cy="{frame.y(mean):.1f}" r="3.5"/>'
        for x, mean in zip(xs, means, strict=True)
    ]
    return parts


def _reference(frame: Frame, label: str, level: float) -> list[str]:
    y, right = frame.y(level), WIDTH - RIGHT
    return [
        f'<line class="reference" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>',
        f'<text class="reference" x="{right}" y="{y - 5:.1f}" text-anchor="end">{escape(label)}</text>',
    ]


def legend(labels: Sequence[str], *, left: int, width: float) -> list[str]:
    """Names the curves above a chart, in as many lines of 20 pixels as fit its width."""
    parts = []
    for style, (label, (x, line)) in enumerate(zip(labels, legend_places(labels, left=left, width=width), strict=True)):
        y = 12 + 20 * line
        parts.append(f'<line class="line curve-{style}" x1="{x:.1f}" x2="{x + 22:.1f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="legend" x="{x + 29:.1f}" y="{y + 4}">{escape(label)}</text>')
    return parts


def legend_places(labels: Sequence[str], *, left: int, width: float) -> list[tuple[float, int]]:
    """Returns how far right each label of a legend begins, and in which line from 0."""
    places = []
    x, line = float(left), 0
    for label in labels:
        reach = 29 + 6.4 * len(label)
        if x > left and x + reach > width:
            x, line = float(left), line + 1
        places.append((x, line))
        x += reach + 20
    return places


def _tick(value: float) -> str:
    return f"{value:.6g}".replace("-", "\u2212")


def _path(frame: Frame, xs: Sequence[float], values: Sequence[float]) -> str:
    return "M" + "L".join(f"{x:.1f} {frame.y(value):.1f}" for x, value in zip(xs, values, strict=True))
