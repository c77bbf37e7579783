"""Line charts as SVG, for a page that brings its own colours.

A chart names no colour and no font: the page's style sheet gives both, for light, dark and
printed pages, through the classes `curve-0`, `curve-1`, ... and the custom properties of `page.py`.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape

from .curves import Curve, smoothed

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 34, 36
CURVE_STYLES = 4
"""How many curves a style sheet tells apart."""
RAW_POINTS = 30
"""Curves with more points than this are drawn smoothed over their raw values."""


def line_chart(curves: Sequence[Curve], *, title: str, description: str, references: Mapping[str, float]) -> str:
    """Draws curves over iterations.

    Args:
        curves: One to four curves.
        title: What is seen, for those who hear the page.
        description: The same in more words, with numbers.
        references: Levels drawn as horizontal lines, by label.

    Raises:
        ValueError: There are no curves, or more than can be told apart.
    """
    if not 1 <= len(curves) <= CURVE_STYLES:
        raise ValueError(f"curves: must be 1 to {CURVE_STYLES}, got {len(curves)}")
    first = min(curve.iterations[0] for curve in curves)
    last = max(max(curve.iterations[-1] for curve in curves), first + 1)
    levels = [*(value for curve in curves for value in curve.values), *references.values()]
    ticks = nice_ticks(min(levels), max(levels))
    low, high = ticks[0], ticks[-1]

    def x(iteration: float) -> float:
        return LEFT + (iteration - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{title}. {description}")}">'
    ]
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{_tick(tick)}</text>')
    for tick in _whole(nice_ticks(first, last, most=6), first, last):
        parts.append(
            f'<text class="tick" x="{x(tick):.1f}" y="{HEIGHT - 18}" text-anchor="middle">{_tick(tick)}</text>'
        )
    parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">iteration</text>')
    for label, level in references.items():
        parts.append(
            f'<line class="reference" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(level):.1f}" y2="{y(level):.1f}"/>'
        )
        parts.append(
            f'<text class="reference" x="{WIDTH - RIGHT}" y="{y(level) - 4:.1f}" text-anchor="end">{escape(label)}</text>'
        )
    legend = LEFT
    for k, curve in enumerate(curves):
        points = [(x(iteration), y(value)) for iteration, value in zip(curve.iterations, curve.values, strict=True)]
        if len(points) > RAW_POINTS:
            parts.append(f'<path class="raw curve-{k}" d="{_path(points)}"/>')
            calm = smoothed(curve.values, window=max(5, len(points) // 12))
            points = [(across, y(value)) for (across, _), value in zip(points, calm, strict=True)]
        parts.append(f'<path class="line curve-{k}" d="{_path(points)}"/>')
        if len(points) == 1:
            parts.append(f'<circle class="dot curve-{k}" cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="3"/>')
        parts.append(f'<line class="line curve-{k}" x1="{legend}" x2="{legend + 18}" y1="12" y2="12"/>')
        parts.append(f'<text class="legend" x="{legend + 24}" y="16">{escape(curve.label)}</text>')
        legend += 24 + 6.6 * len(curve.label) + 22
    parts.append("</svg>")
    return "\n".join(parts)


def nice_ticks(low: float, high: float, *, most: int = 6) -> tuple[float, ...]:
    """Returns round, evenly spaced numbers that enclose a range, `most` of them or fewer."""
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-3):
        pad = max(abs(low) * 0.1, 0.1)
        low, high = low - pad, high + pad
    magnitude = 10.0 ** math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 2.5, 5, 10, 20, 25, 50):
        step = factor * magnitude
        start, stop = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if stop - start < most:
            break
    return tuple(k * step for k in range(start, stop + 1))


def _whole(ticks: Sequence[float], first: float, last: float) -> list[float]:
    """Returns the ticks of iterations that lie in the chart; half an iteration is none."""
    return [tick for tick in ticks if first <= tick <= last and tick == round(tick)]


def _tick(value: float) -> str:
    return f"{value:.6g}".replace("-", "\u2212")


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{across:.1f} {down:.1f}" for across, down in points)
