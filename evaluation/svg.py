"""Line charts as SVG, for a page that brings its own colours.

A chart names no colour and no font: the page's style sheet gives both, for light, dark and
printed pages, through classes such as `curve-0`.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from .curves import Curve, smoothed

WIDTH, HEIGHT = 460, 240
LEFT, RIGHT, BOTTOM = 48, 12, 36
CURVE_STYLES = 4
"""How many curves the style sheet tells apart."""
RAW_POINTS = 30
"""Curves with more points than this are drawn smoothed, over their values as logged."""


class Frame(NamedTuple):
    """Where iterations and values lie on the chart."""

    first: float
    last: float
    low: float
    high: float
    top: int

    def x(self, iteration: float | int) -> float:
        """Returns how far right an iteration lies."""
        return LEFT + (iteration - self.first) / (self.last - self.first) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Returns how far down a value lies."""
        return self.top + (self.high - value) / (self.high - self.low) * (HEIGHT - self.top - BOTTOM)


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
    parts += _axes(frame, ticks)
    for k, curve in enumerate(curves):
        parts += _curve(frame, curve, k)
    for label, level in references.items():
        parts += _reference(frame, label, level)
    if len(curves) > 1:
        parts += _legend(curves)
    return "\n".join([*parts, "</svg>"])


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


def _axes(frame: Frame, ticks: Sequence[float]) -> list[str]:
    right = WIDTH - RIGHT
    parts = []
    for tick in ticks:
        y = frame.y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_tick(tick)}</text>')
    for tick in nice_ticks(frame.first, frame.last):
        # The enclosing ticks may lie outside the chart, and half an iteration is none.
        if frame.first <= tick <= frame.last and tick == round(tick):
            x = frame.x(tick)
            parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 18}" text-anchor="middle">{_tick(tick)}</text>')
    parts.append(f'<text class="tick" x="{right}" y="{HEIGHT - 3}" text-anchor="end">iteration</text>')
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


def _reference(frame: Frame, label: str, level: float) -> list[str]:
    y, right = frame.y(level), WIDTH - RIGHT
    return [
        f'<line class="reference" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>',
        f'<text class="reference" x="{right}" y="{y - 5:.1f}" text-anchor="end">{escape(label)}</text>',
    ]


def _legend(curves: Sequence[Curve]) -> list[str]:
    parts = []
    x = float(LEFT)
    for style, curve in enumerate(curves):
        parts.append(f'<line class="line curve-{style}" x1="{x:.1f}" x2="{x + 22:.1f}" y1="12" y2="12"/>')
        parts.append(f'<text class="legend" x="{x + 29:.1f}" y="16">{escape(curve.label)}</text>')
        x += 29 + 6.4 * len(curve.label) + 20
    return parts


def _tick(value: float) -> str:
    return f"{value:.6g}".replace("-", "\u2212")


def _path(frame: Frame, xs: Sequence[float], values: Sequence[float]) -> str:
    return "M" + "L".join(f"{x:.1f} {frame.y(value):.1f}" for x, value in zip(xs, values, strict=True))
