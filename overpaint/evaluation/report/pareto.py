"""The Pareto chart: how often a concept still shows, and what the images are worth, with a place for every name."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from overpaint.evaluation.metrics.statistics import Estimate

from .charts import COLOURS, FAINT, HEIGHT, INK, SOFT, WIDTH, Chart, has_interval, spec_of
from .table import Cell, Column, Line, Table, interval_cell

LETTER, LINE = 6.6, 14.0
"""Pixels that a label takes for each letter, and for its line."""
RADIUS = 6.0
"""Of a point, in pixels."""


class Point(NamedTuple):
    """Where one method lies."""

    method: str
    concept_rate: Estimate
    """How often the concept still shows, in [0, 1]; lower is better."""
    reward: Estimate
    """A reward of the images, in its own unit; higher is better."""
    before: str = ""
    """The method that this one started from, whose point an arrow leaves; empty for none."""


def front(points: Sequence[Point]) -> tuple[str, ...]:
    """Returns the methods that no other beats in one respect without losing in the other, by rising concept rate.

    By their means alone; how sure those are is what the error bars show.
    """
    best = [one for one in points if not any(_beats(other, one) for other in points)]
    return tuple(one.method for one in sorted(best, key=lambda one: (one.concept_rate.mean, one.method)))


def pareto_chart(
    points: Sequence[Point],
    *,
    title: str = "What erasing costs",
    x_label: str = "concept rate (lower is better)",
    y_label: str = "ImageReward (higher is better)",
    bars: str = "95 % intervals",
) -> Chart:
    """Draws methods as points with error bars, the Pareto front, and arrows from a model to what was made of it.

    Args:
        points: The methods.
        title: Of the chart.
        x_label: Of the concept rate.
        y_label: Of the reward.
        bars: What the ends of the estimates are.

    Raises:
        ValueError: There are no points, two share a name, a mean is not finite, or `before` names none of them.
    """
    import altair as alt

    _check_points(points)
    best, places = front(points), {one.method: one for one in points}
    frame = Frame.around(points)
    labels = place_labels(points, frame)
    rows = [
        _point_row(one, places.get(one.before), one.method in best, labels.get(one.method), frame) for one in points
    ]
    x = alt.X("rate:Q", title=x_label, scale=alt.Scale(domain=frame.across, nice=False))
    y = alt.Y("reward:Q", title=y_label, scale=alt.Scale(domain=frame.up, nice=False))
    base: Any = alt.Chart().encode(x=x, y=y).transform_filter("indexof(hidden, datum.model) < 0")
    colour = alt.condition("datum.made", alt.value(COLOURS[1]), alt.value(COLOURS[0]))
    tooltip = [alt.Tooltip("model:N"), alt.Tooltip("rate:Q", format=".3f"), alt.Tooltip("reward:Q", format=".3f")]
    stairs = [{"rate": places[m].concept_rate.mean, "reward": places[m].reward.mean} for m in best]
    stairs = [{**stairs[0], "reward": frame.up[0]}, *stairs, {**stairs[-1], "rate": frame.across[1]}]
    line: Any = alt.Chart(alt.Data(values=stairs)).encode(x=x, y=y)
    layers = [line.mark_line(interpolate="step-after", color=FAINT, strokeWidth=1.3, strokeDash=[5, 4])]
    bar = base.mark_rule(color=FAINT, strokeWidth=1.2)
    layers += [bar.encode(x="rate_low:Q", x2="rate_high:Q"), bar.encode(y="reward_low:Q", y2="reward_high:Q")]
    if any(one.before for one in points):
        made = base.transform_filter("datum.made")
        ends = {"x": "from_rate:Q", "y": "from_reward:Q", "x2": "tip_rate:Q", "y2": "tip_reward:Q"}
        layers.append(made.mark_rule(color=COLOURS[1], strokeWidth=1.5).encode(**ends))
        tip = made.mark_point(shape="triangle", filled=True, size=55, color=COLOURS[1], opacity=1)
        layers.append(tip.encode(x="tip_rate:Q", y="tip_reward:Q", angle=alt.Angle("angle:Q", scale=None)))
    leader = base.transform_filter("datum.far").mark_rule(color=FAINT, strokeWidth=0.8)
    layers.append(leader.encode(x2="label_x:Q", y2="label_y:Q"))
    for condition, ink, filled in (("datum.best", INK, True), ("!datum.best", SOFT, False)):
        some = base.transform_filter(condition)
        point = some.mark_point(size=110, strokeWidth=2, opacity=1, filled=filled)
        layers.append(point.encode(color=colour, tooltip=tooltip))
        name = some.mark_text(align="left", baseline="bottom", color=ink)
        layers.append(name.encode(x="label_left:Q", y="label_bottom:Q", text="name:N"))
    # What the page's filter has hidden; it sets this parameter.
    chart = alt.layer(*layers, data=alt.Data(values=rows)).add_params(alt.param(name="hidden", value=[]))
    caption = f"Means with their {bars}. The dashed line joins the methods that none beats in both respects"
    caption += "; an arrow leads from a model to what was made of it." if any(one.before for one in points) else "."
    lines = [
        Line(
            one.method,
            [interval_cell(one.concept_rate), interval_cell(one.reward), Cell("yes" if one.method in best else "")],
            data={"model": one.method},
        )
        for one in points
    ]
    told = [
        f"{one.method}: concept rate {one.concept_rate.mean:.3f}, reward {one.reward.mean:.3f}"
        + (f", made of {one.before}" if one.before else "")
        for one in points
    ]
    words = f"{'; '.join(told)}. On the front: {', '.join(best)}."
    columns = [Column("model", True), Column(x_label), Column(y_label), Column("on the front", True)]
    table = Table(label="Numbers of the chart", columns=columns, lines=lines)
    return Chart(title, words, spec_of(chart, WIDTH, HEIGHT), table, caption)


class Frame(NamedTuple):
    """The ranges of a chart's axes, over its plot."""

    across: tuple[float, float]
    up: tuple[float, float]

    @classmethod
    def around(cls, points: Sequence[Point]) -> "Frame":
        """Returns ranges that hold all means and intervals, and some room."""
        ranges = []
        for estimates in ([one.concept_rate for one in points], [one.reward for one in points]):
            edges = [edge for one in estimates for edge in (one.mean, one.low, one.high) if math.isfinite(edge)]
            room = 0.08 * (max(edges) - min(edges)) or 0.1
            ranges.append((min(edges) - room, max(edges) + room))
        return cls(*ranges)

    def place(self, one: Point) -> tuple[float, float]:
        """Returns where a point is, in pixels from the upper left corner of the plot."""
        across = (one.concept_rate.mean - self.across[0]) / (self.across[1] - self.across[0])
        up = (one.reward.mean - self.up[0]) / (self.up[1] - self.up[0])
        return across * WIDTH, (1 - up) * HEIGHT

    def values(self, x: float, y: float) -> tuple[float, float]:
        """Returns what numbers a place in pixels stands for."""
        across = self.across[0] + x / WIDTH * (self.across[1] - self.across[0])
        return across, self.up[0] + (1 - y / HEIGHT) * (self.up[1] - self.up[0])


class Box(NamedTuple):
    """A rectangle on the plot, in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: "Box") -> bool:
        """Tells whether two rectangles have more than an edge in common."""
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom


def place_labels(points: Sequence[Point], frame: Frame) -> dict[str, Box]:
    """Finds a place for the name of every point, as near as there is one, clear of other names and points.

    Vega-Lite places labels at one fixed distance, whatever they cover. A name for which the chart has no room left is
    missing.
    """
    r = RADIUS + 2
    taken = [Box(x - r, y - r, x + r, y + r) for x, y in map(frame.place, points)]
    placed: dict[str, Box] = {}
    for one in points:
        for box in _spots(*frame.place(one), LETTER * len(one.method)):
            if not any(box.meets(other) for other in taken):
                placed[one.method] = box
                taken.append(box)
                break
    return placed


def _spots(x: float, y: float, width: float) -> Iterator[Box]:
    """Yields rectangles around a point that lie within the plot, from near to far; beside and above come first."""
    for reach in (9.0, 17.0, *(28.0 + 14 * k for k in range(26))):
        count = 8 if reach < 20 else 24
        for k in sorted(range(count), key=lambda k: (4 * k % count != 0, k)):
            across, down = math.cos(2 * math.pi * k / count), -math.sin(2 * math.pi * k / count)
            # The edge of the rectangle that faces the point keeps the distance.
            left = x + reach * across - width * (1 - max(-1.0, min(1.0, 1.5 * across))) / 2
            top = y + reach * down - LINE * (1 - max(-1.0, min(1.0, 1.5 * down))) / 2
            if 0 <= left <= WIDTH - width and 0 <= top <= HEIGHT - LINE:
                yield Box(left, top, left + width, top + LINE)


def _point_row(one: Point, before: Point | None, best: bool, label: Box | None, frame: Frame) -> dict[str, Any]:
    """Returns what is drawn of a point, as data of the chart."""
    row: dict[str, Any] = {"model": one.method, "rate": one.concept_rate.mean, "reward": one.reward.mean, "best": best}
    row |= {"made": before is not None, "far": False} | ({} if before is None else _arrow(before, one, frame))
    for name, estimate in (("rate", one.concept_rate), ("reward", one.reward)):
        if has_interval(estimate):
            row |= {f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    if label is not None:
        x, y = frame.place(one)
        near = min(max(x, label.left), label.right), min(max(y, label.top), label.bottom)
        row["name"], row["far"] = one.method, math.hypot(near[0] - x, near[1] - y) > 20
        row["label_left"], row["label_bottom"] = frame.values(label.left, label.bottom - 1)
        row["label_x"], row["label_y"] = frame.values(*near)
    return row


def _arrow(start: Point, end: Point, frame: Frame) -> dict[str, float]:
    """Returns an arrow between the rims of two points, and how its head is turned."""
    (x, y), (to_x, to_y) = frame.place(start), frame.place(end)
    length = math.hypot(to_x - x, to_y - y) or 1.0
    across, down = (to_x - x) / length, (to_y - y) / length
    begin, tip = min(RADIUS + 1, length / 3), min(RADIUS + 5, length / 3)
    from_rate, from_reward = frame.values(x + begin * across, y + begin * down)
    tip_rate, tip_reward = frame.values(to_x - tip * across, to_y - tip * down)
    ends = {"from_rate": from_rate, "from_reward": from_reward, "tip_rate": tip_rate, "tip_reward": tip_reward}
    return {**ends, "angle": math.degrees(math.atan2(down, across)) + 90}


def _check_points(points: Sequence[Point]) -> None:
    places = {one.method: one for one in points}
    if not points or len(places) < len(points):
        raise ValueError(f"points must be of at least one method, each once, got {[one.method for one in points]}")
    for one in points:
        if one.before and (one.before not in places or one.before == one.method):
            raise ValueError(f"before must be another method among {list(places)}, got {one.before!r} of {one.method}")
        if not (math.isfinite(one.concept_rate.mean) and math.isfinite(one.reward.mean)):
            raise ValueError(f"points must have finite means, got {one}")


def _beats(one: Point, other: Point) -> bool:
    """Tells whether a point is at least as good in both respects, and better in one."""
    here, there = (one.concept_rate.mean, -one.reward.mean), (other.concept_rate.mean, -other.reward.mean)
    return here != there and here[0] <= there[0] and here[1] <= there[1]
