"""Charts by Altair: learning curves, series with intervals, bands over seeds, and what is given up for what.

A chart is a Vega-Lite specification. `svg` draws it without a browser; a page shows that drawing, and its script puts
the live chart in its place, with tooltips and zoom. Colours are those of light paper; a page's style sheet maps each to
its counterpart in the dark.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from overpaint.evaluation.metrics.statistics import Estimate
from overpaint.training import read_metrics

from .table import Cell, Column, Line, Table, interval_cell, render

COLOURS = ("#2f5d8a", "#b9602a", "#3f7f63", "#8a5a97", "#8a6d1f", "#5d636b")
"""Of series; `--curve-0` to `--curve-5` of the page's style sheet."""
DASHES = ([1, 0], [7, 4], [1.5, 4], [9, 3, 2, 3], [4, 3], [12, 3])
"""Of series, so that no one has to tell colours apart."""
SERIES = len(COLOURS)
"""How many series a chart can tell apart."""
INK, SOFT, FAINT, RULE, PAPER = "#22252a", "#555a62", "#696e76", "#e2dfd8", "#fdfcfa"
WIDTH, HEIGHT = 700, 400
"""Of the plot of a wide chart, in pixels."""
LETTER, LINE = 6.6, 14.0
"""Pixels that a label takes for each letter, and for its line."""
RADIUS = 6.0
RAW_POINTS = 30
"""Curves with more points than this are drawn smoothed, over their values as logged."""


class Chart(NamedTuple):
    """What is drawn, and the same in words and in numbers."""

    title: str
    words: str
    """The chart told, for those who hear the page."""
    spec: dict[str, Any]
    """Vega-Lite."""
    table: Table
    """The numbers of the chart."""
    caption: str = ""

    def html(self) -> Any:
        """Returns a figure for a page: the drawing, what to look for, and the numbers."""
        spec = json.dumps(self.spec, ensure_ascii=False).replace("<", "\\u003c")
        return render("chart.html.j2", chart=self, spec=spec, drawing=svg(self.spec))


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


class Band(NamedTuple):
    """A mean and its spread over runs."""

    label: str
    x: tuple[float, ...]
    mean: tuple[float, ...]
    spread: tuple[float, ...]
    """Standard deviation over the runs at each point."""


class Point(NamedTuple):
    """Where one method lies."""

    method: str
    concept_rate: Estimate
    """How often the concept still shows, in [0, 1]; lower is better."""
    reward: Estimate
    """How much people like the images; higher is better."""
    before: str = ""
    """The method that this one started from, whose point an arrow leaves; empty for none."""


def svg(spec: Mapping[str, Any]) -> str:
    """Returns a specification as an SVG, drawn by vl-convert; for documents and for pages without scripts."""
    return _svg(json.dumps(spec, sort_keys=True))


@cache
def _svg(spec: str) -> str:
    import vl_convert

    return vl_convert.vegalite_to_svg(spec)


@cache
def script() -> str:
    """Returns Vega's own scripts as one, for a page that is read without a network."""
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")


# Learning curves.


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

    Away from the ends this is the moving average; at the ends, where the window is cut short, a line follows a curve
    that rises or falls, and an average would not.
    """
    import numpy as np

    reach = window // 2
    result = []
    for k in range(len(values)):
        places = np.arange(max(k - reach, 0), min(k + reach + 1, len(values)))
        near = np.asarray([values[j] for j in places])
        away = places - places.mean()
        slope = float(away @ near / (away @ away)) if len(places) > 1 else 0.0
        result.append(float(near.mean()) + slope * (k - float(places.mean())))
    return tuple(result)


def learning_chart(panel: Panel, curves: Sequence[Curve]) -> Chart:
    """Draws curves over iterations; where values are many, smoothed and as logged.

    Raises:
        ValueError: There are no curves, or more than can be told apart.
    """
    import altair as alt

    labels = _told_apart([curve.label for curve in curves], "curves")
    rows = [
        {"curve": c.label, "iteration": x, "value": y, "line": line}
        for c in curves
        for x, y, line in zip(c.iterations, c.values, _lines(c.values), strict=True)
    ]
    x = alt.X("iteration:Q", title="iteration", axis=alt.Axis(tickMinStep=1), scale=alt.Scale(nice=False))
    y = alt.Y("line:Q", title=None, scale=alt.Scale(zero=False))
    base: Any = alt.Chart().encode(x=x, tooltip=["curve:N", "iteration:Q", "value:Q"])
    layers = [base.mark_line().encode(y=y, **_series("curve", labels))]
    if any(len(curve.values) > RAW_POINTS for curve in curves):
        raw = base.mark_line(strokeWidth=1, opacity=0.28)
        layers.append(raw.encode(y="value:Q", color=_series("curve", labels)["color"]))
    if any(len(curve.values) == 1 for curve in curves):
        layers.append(base.mark_point(filled=True, opacity=1).encode(y=y, color=_series("curve", labels)["color"]))
    for label, level in panel.references.items():
        rule: Any = alt.Chart(alt.Data(values=[{"level": level, "label": label}]))
        layers.append(rule.mark_rule(color=FAINT, strokeDash=[2, 3]).encode(y="level:Q"))
        text = rule.mark_text(align="right", dy=-7, color=SOFT).encode(x=alt.value(400), y="level:Q", text="label:N")
        layers.append(text)
    words = "; ".join(
        f"{c.label}: {c.values[0]:.3g} at iteration {c.iterations[0]}, {c.values[-1]:.3g} at iteration "
        f"{c.iterations[-1]}"
        for c in curves
    )
    known = {curve.label: dict(zip(curve.iterations, curve.values, strict=True)) for curve in curves}
    every = sorted({iteration for values in known.values() for iteration in values})
    shown = [every[round(k * (len(every) - 1) / 20)] for k in range(21)] if len(every) > 21 else every
    lines = [
        Line(str(at), [Cell(f"{values[at]:.4g}" if at in values else "\u2013") for values in known.values()])
        for at in shown
    ]
    columns = [Column("iteration", True), *map(Column, known)]
    table = Table(label=f"Numbers of {panel.title}", columns=columns, lines=lines)
    return Chart(
        panel.title, words, _spec(alt.layer(*layers, data=alt.Data(values=rows)), 400, 190), table, panel.caption
    )


def _lines(values: Sequence[float]) -> Sequence[float]:
    return values if len(values) <= RAW_POINTS else smoothed(values, max(5, len(values) // 12))


# Series of measured points, and bands over seeds.


def series_chart(
    series: Mapping[str, Sequence[tuple[float, Estimate]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    caption: str = "",
) -> Chart:
    """Draws measured points joined by lines, each with its 95 % interval, such as reward against guidance.

    Args:
        series: One to six series of (x, measured), by name; x rises.
        title: What is seen.
        x_label: What is told to the right.
        y_label: What is told upwards.
        caption: What to look for.

    Raises:
        ValueError: There are no series, more than can be told apart, one without points, or one whose x does not rise.
    """
    import altair as alt

    labels = _told_apart(list(series), "series")
    for name, points in series.items():
        xs = [x for x, _ in points]
        if not xs or any(b <= a for a, b in pairwise(xs)):
            raise ValueError(f"series[{name!r}] must have points at rising x, got {xs}")
    rows = [
        {"series": name, "x": x, "mean": one.mean} | ({"low": one.low, "high": one.high} if _has_interval(one) else {})
        for name, points in series.items()
        for x, one in points
    ]
    base: Any = alt.Chart().encode(
        x=alt.X("x:Q", title=x_label, scale=alt.Scale(zero=False, padding=12)),
        tooltip=["series:N", alt.Tooltip("x:Q", title=x_label), "mean:Q", "low:Q", "high:Q"],
        **_series("series", labels),
    )
    scale = alt.Scale(zero=False)
    bars = base.mark_rule(opacity=0.65, strokeDash=[1, 0]).encode(y=alt.Y("low:Q", scale=scale), y2="high:Q")
    y = alt.Y("mean:Q", title=y_label, scale=scale)
    layers = alt.layer(
        bars,
        base.mark_line().encode(y=y),
        base.mark_point(filled=True, size=45, opacity=1).encode(y=y),
        data=alt.Data(values=rows),
    )
    words = "; ".join(
        f"{name}: {', '.join(f'{one.mean:.3g} at {x:g}' for x, one in points)}" for name, points in series.items()
    )
    known = {name: dict(points) for name, points in series.items()}
    lines = [
        Line(f"{x:g}", [interval_cell(points[x]) if x in points else Cell("\u2013") for points in known.values()])
        for x in sorted({x for points in series.values() for x, _ in points})
    ]
    table = Table(
        label="Numbers of the chart",
        columns=[Column(x_label, True), *map(Column, series)],
        lines=lines,
        caption=f"{y_label}: mean [95 %].",
    )
    bars_are = f"{caption} Bars are 95 % intervals.".strip()
    return Chart(title, f"{words}.", _spec(layers, WIDTH, 260), table, bars_are)


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


def band_chart(bands: Sequence[Band], *, title: str, x_label: str, y_label: str) -> Chart:
    """Draws curves with bands of one standard deviation over runs.

    Args:
        bands: One to six.
        title: What is seen.
        x_label: What is told to the right.
        y_label: What is told upwards.

    Raises:
        ValueError: There are none, or more than can be told apart.
    """
    import altair as alt

    labels = _told_apart([band.label for band in bands], "bands")
    rows = [
        {"run": band.label, "x": x, "mean": mean, "low": mean - spread, "high": mean + spread}
        for band in bands
        for x, mean, spread in zip(band.x, band.mean, band.spread, strict=True)
    ]
    base: Any = alt.Chart().encode(
        x=alt.X("x:Q", title=x_label, scale=alt.Scale(nice=False)),
        tooltip=["run:N", "x:Q", "mean:Q", "low:Q", "high:Q"],
    )
    y = alt.Y("mean:Q", title=y_label, scale=alt.Scale(zero=False))
    area = base.mark_area(opacity=0.15).encode(
        y=alt.Y("low:Q", scale=alt.Scale(zero=False)), y2="high:Q", color=_series("run", labels)["color"]
    )
    layers = alt.layer(
        area, base.mark_line().encode(y=y, **_series("run", labels)), title=title, data=alt.Data(values=rows)
    )
    ends = "; ".join(f"{band.label} ends at {band.mean[-1]:.3g} ± {band.spread[-1]:.2g}" for band in bands)
    lines = [
        Line(band.label, [Cell(f"{band.mean[0]:.3g}"), Cell(f"{band.mean[-1]:.3g}", f"± {band.spread[-1]:.2g}")])
        for band in bands
    ]
    columns = [Column("run", True), Column("begins at"), Column("ends at")]
    table = Table(label="Numbers of the chart", columns=columns, lines=lines)
    return Chart(title, ends, _spec(layers, WIDTH, 260), table, "Bands are one standard deviation over runs.")


# What is given up for what.


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
) -> Chart:
    """Draws methods as points with error bars, the Pareto front, and arrows from a model to what was made of it.

    Args:
        points: One for each method, at least one.
        title: What is seen.
        x_label: Of the concept rate.
        y_label: Of the reward.

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
    caption = "Means with their 95 % intervals. The dashed line joins the methods that none beats in both respects"
    caption += "; an arrow leads from a model to what was made of it." if any(one.before for one in points) else "."
    lines = [
        Line(
            one.method,
            [interval_cell(one.concept_rate), interval_cell(one.reward), Cell("yes" if one.method in best else "")],
            data={"model": one.method},
        )
        for one in points
    ]
    columns = [Column("model", True), Column(x_label), Column(y_label), Column("on the front", True)]
    table = Table(label="Numbers of the chart", columns=columns, lines=lines)
    return Chart(title, in_words(points), _spec(chart, WIDTH, HEIGHT), table, caption)


def in_words(points: Sequence[Point]) -> str:
    """Tells the chart: every method with its numbers, and which are on the front."""
    told = [
        f"{one.method}: concept rate {one.concept_rate.mean:.3f}, reward {one.reward.mean:.3f}"
        + (f", made of {one.before}" if one.before else "")
        for one in points
    ]
    return f"{'; '.join(told)}. On the front: {', '.join(front(points))}."


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
        if _has_interval(estimate):
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


def _has_interval(estimate: Estimate) -> bool:
    return math.isfinite(estimate.low) and math.isfinite(estimate.high)


# What all charts share.


def _told_apart(labels: list[str], what: str) -> list[str]:
    if not 1 <= len(labels) <= SERIES:
        raise ValueError(f"{what} must be 1 to {SERIES}, got {len(labels)}")
    return labels


def _series(name: str, labels: list[str]) -> dict[str, Any]:
    """Returns colour and dash of each series, with a legend where there are several."""
    import altair as alt

    legend = alt.Legend(title=None, orient="bottom", symbolType="stroke", symbolSize=320) if len(labels) > 1 else None
    colour = alt.Scale(domain=labels, range=list(COLOURS[: len(labels)]))
    dash = alt.Scale(domain=labels, range=list(DASHES[: len(labels)]))
    return {
        "color": alt.Color(f"{name}:N", scale=colour, legend=legend),
        "strokeDash": alt.StrokeDash(f"{name}:N", scale=dash, legend=legend),
    }


def _spec(chart: Any, width: int, height: int) -> dict[str, Any]:
    """Returns the specification, in the page's style, that can be zoomed with the shift key held."""
    import altair as alt

    zoom = alt.selection_interval(bind="scales", zoom="wheel![event.shiftKey]")
    text = {"labelColor": FAINT, "titleColor": SOFT, "titleFontWeight": "normal", "titleFontSize": 12}
    axis = {**text, "domain": False, "ticks": False, "gridColor": RULE, "labelPadding": 6}
    return (
        chart.add_params(zoom)
        .properties(width=width, height=height, background="transparent")
        .configure_view(stroke=None)
        .configure_axis(**axis)
        .configure_axisX(grid=False, titleAnchor="end", format=".6~f")
        .configure_axisY(titleAngle=0, titleAlign="left", titleAnchor="end", titleX=0, titleY=-12)
        .configure_legend(labelColor=SOFT, labelFontSize=12)
        .configure_title(color=INK, anchor="start", fontSize=14)
        .configure_text(fontSize=12)
        .to_dict()
    )
