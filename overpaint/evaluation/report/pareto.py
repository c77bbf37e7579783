"""What is given up for what: methods by how much of a concept still shows and how much their images are liked."""

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

from overpaint.evaluation.metrics.statistics import Estimate

from .page import Section
from .result_tables import MINUS
from .svg import Frame, axes, nice_ticks
from .table import number

WIDTH, HEIGHT, LEFT = 680, 430, 56
LETTER, LINE = 6.3, 14.0
"""Pixels that a label takes for each letter, and for its line."""
RADIUS = 5.0
REACHES = (8.0, 16.0, 26.0, *(38.0 + 14 * k for k in range(26)))
"""Pixels from a point at which its name is tried."""


class Point(NamedTuple):
    """Where one method lies."""

    method: str
    concept_rate: Estimate
    """How often the concept still shows, in [0, 1]; lower is better."""
    reward: Estimate
    """How much the images are liked; higher is better."""
    before: str = ""
    """The method that this one started from, whose point an arrow leaves; empty for none."""


class Box(NamedTuple):
    """A rectangle on the chart."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: "Box") -> bool:
        """Tells whether two rectangles have more than an edge in common."""
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


def front(points: Sequence[Point]) -> tuple[str, ...]:
    """Returns the methods that no other beats in one respect without losing in the other, by rising concept rate.

    By their means alone; how sure those are is what the error bars show.
    """
    best = [one for one in points if not any(_beats(other, one) for other in points)]
    return tuple(one.method for one in sorted(best, key=lambda one: (one.concept_rate.mean, one.method)))


def pareto_section(
    points: Sequence[Point],
    *,
    anchor: str = "pareto",
    heading: str = "What erasing costs",
    x_label: str = "concept rate (lower is better)",
    y_label: str = "ImageReward (higher is better)",
) -> Section:
    """Makes a section of the chart, and of its numbers in a table.

    Args:
        points: One for each method, at least one.
        anchor: Of the section.
        heading: Of the section.
        x_label: What the concept rate is a rate of.
        y_label: What the reward is.

    Raises:
        ValueError: As `pareto_chart`.
    """
    best = front(points)
    lines = []
    for one in points:
        cells = "".join(f'<td class="number">{_with_interval(value)}</td>' for value in (one.concept_rate, one.reward))
        cells += f"<td>{'yes' if one.method in best else ''}</td>"
        lines.append(f'<tr data-model="{escape(one.method)}"><th scope="row">{escape(one.method)}</th>{cells}</tr>')
    heads = "".join(f'<th scope="col" class="number">{escape(label)}</th>' for label in (x_label, y_label))
    caption = "Means with their 95 % intervals. The dashed line joins the methods that none beats in both respects"
    caption += "; an arrow leads from a model to what was made of it." if any(one.before for one in points) else "."
    table = (
        '<div class="scroll" tabindex="0" role="region" aria-label="Numbers of the chart"><table class="plain">\n'
        f'<thead><tr><th scope="col">model</th>{heads}<th scope="col">on the front</th></tr></thead>\n'
        "<tbody>\n" + "\n".join(lines) + "\n</tbody></table></div>"
    )
    chart = pareto_chart(points, title=heading, x_label=x_label, y_label=y_label)
    return Section(
        anchor,
        heading,
        f'<figure>\n<div class="scroll wide" tabindex="0" role="region" aria-label="Chart">\n{chart}\n</div>\n'
        f"<figcaption>{caption}</figcaption>\n</figure>\n<details><summary>The numbers of the chart</summary>\n{table}"
        "\n</details>",
    )


def pareto_chart(points: Sequence[Point], *, title: str, x_label: str, y_label: str) -> str:
    """Draws methods as points with error bars, the front, and arrows from a model to what was made of it.

    Args:
        points: One for each method, at least one.
        title: What is seen, for those who hear the page.
        x_label: Of the concept rate.
        y_label: Of the reward.

    Raises:
        ValueError: There are no points, two share a name, a mean is not finite, or `before` names none of them.
    """
    places = {one.method: one for one in points}
    if not points or len(places) < len(points):
        raise ValueError(f"points must be of at least one method, each once, got {[one.method for one in points]}")
    for one in points:
        if one.before and (one.before not in places or one.before == one.method):
            raise ValueError(f"before must be another method among {list(places)}, got {one.before!r} of {one.method}")
        if not (math.isfinite(one.concept_rate.mean) and math.isfinite(one.reward.mean)):
            raise ValueError(f"points must have finite means, got {one}")
    across = nice_ticks(*_range([one.concept_rate for one in points]))
    up = nice_ticks(*_range([one.reward for one in points]))
    margin = 0.03 * (across[-1] - across[0])  # a point at a rate of 0 is no half circle on the edge
    frame = Frame(across[0] - margin, across[-1] + margin, up[0], up[-1], 30, WIDTH, HEIGHT, LEFT)
    best = front(points)
    labels = place_labels(points, frame)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    parts.append(f"<title>{escape(title)}</title>\n<desc>{escape(in_words(points))}</desc>")
    parts += axes(frame, across, up, x_label=x_label, y_label=y_label)
    parts.append(f'<path class="front" d="{_stairs([places[method] for method in best], frame)}"/>')
    for one in points:
        shape = [*_error_bars(one, frame), *(_arrow(places[one.before], one, frame) if one.before else [])]
        kind = " ".join(("mark", *(["made"] if one.before else []), *(["best"] if one.method in best else [])))
        x, y = _place(one, frame)
        shape.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS:g}"/>')
        box = labels.get(one.method)
        if box is not None:
            shape += _label(one.method, box, x, y, strong=one.method in best)
        parts.append(f'<g data-model="{escape(one.method)}">' + "".join(shape) + "</g>")
    return "\n".join([*parts, "</svg>"])


def in_words(points: Sequence[Point]) -> str:
    """Tells the chart: every method with its numbers, and which are on the front."""
    told = [
        f"{one.method}: concept rate {one.concept_rate.mean:.3f}, reward {one.reward.mean:.3f}"
        + (f", made of {one.before}" if one.before else "")
        for one in points
    ]
    return f"{'; '.join(told)}. On the front: {', '.join(front(points))}."


def place_labels(points: Sequence[Point], frame: Frame) -> dict[str, Box]:
    """Finds a place for the name of every point, near it, within the chart, and clear of names and points.

    Error bars and arrows are crossed only where every nearer place would cross one too. A name for which the chart
    has no room left is missing.
    """
    marks = [
        Box(x - RADIUS - 2, y - RADIUS - 2, x + RADIUS + 2, y + RADIUS + 2)
        for x, y in (_place(p, frame) for p in points)
    ]
    strokes = [box for one in points for box in _strokes(one, points, frame)]
    placed: dict[str, Box] = {}
    for one in points:
        x, y = _place(one, frame)
        free = [
            box
            for box in _spots(x, y, LETTER * len(one.method), frame)
            if not any(box.meets(other) for other in (*marks, *placed.values()))
        ]
        if free:
            # The spots come from near to far; a crossed stroke counts as much as twelve spots further.
            crossed = [12 * sum(box.meets(stroke) for stroke in strokes) + k for k, box in enumerate(free)]
            placed[one.method] = free[crossed.index(min(crossed))]
    return placed


def _spots(x: float, y: float, width: float, frame: Frame) -> Iterator[Box]:
    """Yields rectangles around a point that lie within the chart, from near to far."""
    for reach in REACHES:
        # Beside and above come first; further out there is room for more directions.
        count = 8 if reach < 30 else 24
        for k in sorted(range(count), key=lambda k: (4 * k % count != 0, k)):
            across, down = math.cos(2 * math.pi * k / count), -math.sin(2 * math.pi * k / count)
            # The edge of the rectangle that faces the point keeps the distance.
            left = x + reach * across - width * (1 - _side(across)) / 2
            top = y + reach * down - LINE * (1 - _side(down)) / 2
            box = Box(left, top, left + width, top + LINE)
            within = box.left >= frame.left and box.right <= frame.width and box.top >= frame.top - 8
            if within and box.bottom <= frame.y(frame.low) - 2:
                yield box


def _side(direction: float) -> float:
    """Returns 1 or -1 where a direction leans to a side by more than 40 degrees, and less towards the middle."""
    return max(-1.0, min(1.0, 1.5 * direction))


def _strokes(one: Point, points: Sequence[Point], frame: Frame) -> list[Box]:
    """Returns small rectangles along the error bars of a point and the arrow that leads to it."""
    x, y = _place(one, frame)
    boxes = []
    if _has_interval(one.concept_rate):
        boxes.append(Box(frame.x(one.concept_rate.low), y - 1, frame.x(one.concept_rate.high), y + 1))
    if _has_interval(one.reward):
        boxes.append(Box(x - 1, frame.y(one.reward.high), x + 1, frame.y(one.reward.low)))
    if one.before:
        start_x, start_y = _place(next(other for other in points if other.method == one.before), frame)
        for k in range(1, 16):
            a, b = start_x + (x - start_x) * k / 16, start_y + (y - start_y) * k / 16
            boxes.append(Box(a - 3, b - 3, a + 3, b + 3))
    return boxes


def _error_bars(one: Point, frame: Frame) -> list[str]:
    x, y = _place(one, frame)
    bars = []
    if _has_interval(one.concept_rate):
        low, high = frame.x(one.concept_rate.low), frame.x(one.concept_rate.high)
        bars.append(f'<line class="bar" x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
    if _has_interval(one.reward):
        low, high = frame.y(one.reward.low), frame.y(one.reward.high)
        bars.append(f'<line class="bar" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
    return bars


def _arrow(start: Point, end: Point, frame: Frame) -> list[str]:
    """Draws an arrow between the rims of two points; none where they touch."""
    (x, y), (to_x, to_y) = _place(start, frame), _place(end, frame)
    length = math.hypot(to_x - x, to_y - y)
    if length < 2 * RADIUS + 8:
        return []
    across, down = (to_x - x) / length, (to_y - y) / length
    from_x, from_y = x + across * (RADIUS + 1), y + down * (RADIUS + 1)
    tip_x, tip_y = to_x - across * (RADIUS + 2), to_y - down * (RADIUS + 2)
    wings = [(tip_x - 7 * across + side * 3.5 * down, tip_y - 7 * down - side * 3.5 * across) for side in (1, -1)]
    head = " ".join(f"{a:.1f},{b:.1f}" for a, b in ((tip_x, tip_y), *wings))
    line = f'x1="{from_x:.1f}" y1="{from_y:.1f}" x2="{tip_x - 5 * across:.1f}" y2="{tip_y - 5 * down:.1f}"'
    return [f'<line class="arrow" {line}/>', f'<polygon class="arrow" points="{head}"/>']


def _label(name: str, box: Box, x: float, y: float, *, strong: bool) -> list[str]:
    """Writes a name, with a line to its point where it had to go further away."""
    near_x, near_y = min(max(x, box.left), box.right), min(max(y, box.top), box.bottom)
    parts = []
    if math.hypot(near_x - x, near_y - y) > 20:
        parts.append(f'<line class="leader" x1="{x:.1f}" y1="{y:.1f}" x2="{near_x:.1f}" y2="{near_y:.1f}"/>')
    middle = (box.left + box.right) / 2
    anchor, at = ("start", box.left) if middle > x + 1 else ("end", box.right) if middle < x - 1 else ("middle", middle)
    kind = "name best" if strong else "name"
    text = f'<text class="{kind}" x="{at:.1f}" y="{box.bottom - 3.5:.1f}" text-anchor="{anchor}">{escape(name)}</text>'
    return [*parts, text]


def _stairs(best: Sequence[Point], frame: Frame) -> str:
    """Returns the line below and right of which everything is beaten."""
    steps = []
    for k, one in enumerate(best):
        x, y = _place(one, frame)
        steps.append(f"M{x:.1f} {frame.y(frame.low):.1f}V{y:.1f}" if k == 0 else f"H{x:.1f}V{y:.1f}")
    return "".join(steps) + f"H{frame.x(frame.last):.1f}"


def _range(estimates: Sequence[Estimate]) -> tuple[float, float]:
    """Returns the least and the largest number that has to be on the chart."""
    edges = [edge for one in estimates for edge in (one.mean, one.low, one.high) if math.isfinite(edge)]
    return min(edges), max(edges)


def _place(one: Point, frame: Frame) -> tuple[float, float]:
    return frame.x(one.concept_rate.mean), frame.y(one.reward.mean)


def _has_interval(estimate: Estimate) -> bool:
    return math.isfinite(estimate.low) and math.isfinite(estimate.high)


def _beats(one: Point, other: Point) -> bool:
    """Tells whether a point is at least as good in both respects, and better in one."""
    here, there = (one.concept_rate.mean, -one.reward.mean), (other.concept_rate.mean, -other.reward.mean)
    return here != there and here[0] <= there[0] and here[1] <= there[1]


def _with_interval(estimate: Estimate) -> str:
    mean, low, high = (number(value, 3).replace("-", MINUS) for value in (estimate.mean, estimate.low, estimate.high))
    return f'{mean} <span class="error">[{low}, {high}]</span>' if _has_interval(estimate) else mean
