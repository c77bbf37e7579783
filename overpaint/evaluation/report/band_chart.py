"""Learning curves of several runs each, as means with bands: an SVG that stands alone, for documentation."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from .svg import nice_ticks

WIDTH, HEIGHT = 640, 340
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 56, 44
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a5c00", "#555555")
"""Okabe and Ito's palette, darkened where it would be pale on white."""
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 4", "1 2")


class Band(NamedTuple):
    """A mean and its spread over runs."""

    label: str
    x: tuple[float, ...]
    mean: tuple[float, ...]
    spread: tuple[float, ...]
    """Standard deviation over the runs at each point."""


def band_of(label: str, runs: Sequence[Sequence[tuple[float, float]]]) -> Band:
    """Returns mean and standard deviation over runs, at the points that all of them have.

    Args:
        label: Name in the legend.
        runs: The points (x, value) of each run.

    Raises:
        ValueError: There are no runs, or they have no point in common.
    """
    if not runs:
        raise ValueError(f"runs must hold at least one, got none for {label!r}")
    known = [dict(run) for run in runs]
    shared = sorted(set(known[0]).intersection(*known[1:]))
    if not shared:
        raise ValueError(f"runs must have a point in common, got none for {label!r}")
    values = [[run[x] for run in known] for x in shared]
    means = [math.fsum(some) / len(some) for some in values]
    spreads = [
        math.sqrt(math.fsum((value - mean) ** 2 for value in some) / max(1, len(some) - 1))
        for some, mean in zip(values, means, strict=True)
    ]
    return Band(label, tuple(shared), tuple(means), tuple(spreads))


def band_chart(bands: Sequence[Band], *, title: str, x_label: str, y_label: str) -> str:
    """Draws curves with bands of one standard deviation.

    Args:
        bands: One to six.
        title: What is seen.
        x_label: What is told to the right.
        y_label: What is told upwards.

    Raises:
        ValueError: There are none, or more than can be told apart.
    """
    if not 1 <= len(bands) <= len(COLOURS):
        raise ValueError(f"bands must be 1 to {len(COLOURS)}, got {len(bands)}")
    edges = [m + sign * s for band in bands for m, s in zip(band.mean, band.spread, strict=True) for sign in (-1, 1)]
    ys = nice_ticks(min(edges), max(edges))
    xs = nice_ticks(min(band.x[0] for band in bands), max(band.x[-1] for band in bands))
    last = max(band.x[-1] for band in bands)

    def right(x: float) -> float:
        return LEFT + (x - xs[0]) / (last - xs[0] or 1) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return TOP + (ys[-1] - y) / (ys[-1] - ys[0]) * (HEIGHT - TOP - BOTTOM)

    def path(x: Sequence[float], y: Sequence[float]) -> str:
        return "L".join(f"{right(a):.1f} {down(b):.1f}" for a, b in zip(x, y, strict=True))

    ends = "; ".join(f"{band.label} ends at {band.mean[-1]:.3g} ± {band.spread[-1]:.2g}" for band in bands)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="12">',
        f"<title>{escape(title)}: {escape(ends)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="18" font-size="14" font-weight="600" fill="#222">{escape(title)}</text>',
    ]
    for y in ys:
        parts.append(f'<path d="M{LEFT} {down(y):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down(y) + 4:.1f}" text-anchor="end" fill="#444">{_number(y)}</text>')
    parts += [
        f'<text x="{right(x):.1f}" y="{HEIGHT - 26}" text-anchor="middle" fill="#444">{_number(x)}</text>'
        for x in xs
        if x <= last
    ]
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end" fill="#444">{escape(x_label)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text x="14" y="{middle}" text-anchor="middle" fill="#444" transform="rotate(-90 14 {middle})">'
        f"{escape(y_label)}</text>"
    )
    at = float(LEFT)
    for band, colour, dash in zip(bands, COLOURS, DASHES, strict=False):
        upper = [m + s for m, s in zip(band.mean, band.spread, strict=True)]
        lower = [m - s for m, s in zip(band.mean, band.spread, strict=True)]
        around = path(band.x, upper) + "L" + path(band.x[::-1], lower[::-1])
        parts.append(f'<path d="M{around}Z" fill="{colour}" fill-opacity="0.15"/>')
        line = f'fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"'
        parts.append(f'<path d="M{path(band.x, band.mean)}" {line}/>')
        parts.append(f'<path d="M{at:.0f} 36h24" {line}/>')
        parts.append(f'<text x="{at + 30:.0f}" y="40" fill="#222">{escape(band.label)}</text>')
        at += 30 + 7.2 * len(band.label) + 18
    return "\n".join([*parts, "</svg>"]) + "\n"


def _number(value: float) -> str:
    return f"{value:.6g}".replace("-", "\u2212")
