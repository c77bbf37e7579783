"""Charts by Altair: learning curves, and series with intervals or bands over runs.

A chart is a Vega-Lite specification. `svg` draws it without a browser; a page shows that drawing, and its script puts
the live chart in its place, with tooltips and zoom. Colours are those of light paper; a page's style sheet maps each to
its counterpart in the dark.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from overpaint.evaluation.metrics.statistics import Estimate
from overpaint.settings import Index
from overpaint.training import read_metrics

from .table import Cell, Column, Line, Table, interval_cell, render

COLOURS = ("#2f5d8a", "#b9602a", "#3f7f63", "#8a5a97", "#8a6d1f", "#5d636b")
"""Of series; `--curve-0` to `--curve-5` of the page's style sheet."""
DASHES = ([1, 0], [7, 4], [1.5, 4], [9, 3, 2, 3], [4, 3], [12, 3])
"""Of series, so that no one has to tell colours apart."""
SERIES = len(COLOURS)
"""How many series a chart can tell apart."""
INK, SOFT, FAINT, RULE = "#22252a", "#555a62", "#696e76", "#e2dfd8"
WIDTH, HEIGHT = 700, 400
"""Of the plot of a wide chart, in pixels."""
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
    iterations: tuple[Index, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Which tags are drawn below one heading: each on an axis of its own, or all on one that they share."""

    title: str
    """What the panel shows."""
    tags: Mapping[str, str]
    """Tag of each curve, by the label that readers see."""
    caption: str = ""
    """What to look for."""
    references: Mapping[str, float] = field(default_factory=dict)
    """Levels drawn as horizontal lines, by label: a ceiling, or where the original model stands."""
    same_unit: bool = False
    """Whether all tags are of one measure, so that their curves share an axis; two scales never do."""

    def __post_init__(self) -> None:
        if self.references and len(self.tags) > 1 and not self.same_unit:
            raise ValueError(
                f"references must be of a panel with one tag or with same_unit, got {list(self.references)} "
                f"for {list(self.tags)}"
            )


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


def panel_charts(panel: Panel, metrics: Mapping[str, Mapping[int, float]]) -> list[Chart]:
    """Draws a panel: a chart for each measure; none if nothing of it was logged."""
    curves = panel_curves(panel, metrics)
    if panel.same_unit or len(curves) < 2:
        return [learning_chart(panel, curves)] if curves else []
    *above, last = curves
    silent = replace(panel, caption="")  # what to look for is said once, below the last
    return [*(learning_chart(silent, [curve]) for curve in above), learning_chart(panel, [last])]


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
    """Draws one to six curves over iterations; where values are many, smoothed and as logged."""
    import altair as alt

    colour_and_dash = _series("curve", [curve.label for curve in curves])
    rows = []
    for c in curves:
        smooth = c.values if len(c.values) <= RAW_POINTS else smoothed(c.values, max(5, len(c.values) // 12))
        points = zip(c.iterations, c.values, smooth, strict=True)
        rows += [{"curve": c.label, "iteration": x, "value": y, "line": line} for x, y, line in points]
    x = alt.X("iteration:Q", title="iteration", axis=alt.Axis(tickMinStep=1), scale=alt.Scale(nice=False))
    # Several curves have a legend; a single one has its name above the axis.
    name = curves[0].label if len(curves) == 1 else None
    y = alt.Y("line:Q", title=name, scale=alt.Scale(zero=False))
    base: Any = alt.Chart().encode(x=x, color=colour_and_dash["color"], tooltip=["curve:N", "iteration:Q", "value:Q"])
    layers = [base.mark_line().encode(y=y, strokeDash=colour_and_dash["strokeDash"])]
    if any(len(curve.values) > RAW_POINTS for curve in curves):
        layers.append(base.mark_line(strokeWidth=1, opacity=0.28).encode(y=alt.Y("value:Q", title=name)))
    if any(len(curve.values) == 1 for curve in curves):
        layers.append(base.mark_point(filled=True, opacity=1).encode(y=y))
    layers += _levels(panel.references, name, 400)
    words = "; ".join(
        f"{c.label}: {', '.join(f'{c.values[k]:.3g} at iteration {c.iterations[k]}' for k in (0, -1))}" for c in curves
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
    spec = spec_of(alt.layer(*layers, data=alt.Data(values=rows)), 400, 190)
    return Chart(panel.title, words, spec, table, panel.caption)


# Series of measured points, and bands over runs.


def series_chart(
    series: Mapping[str, Sequence[tuple[float, Estimate]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    caption: str = "",
    bands: bool = False,
    references: Mapping[str, float] = MappingProxyType({}),
) -> Chart:
    """Draws measured points joined by lines, each with its 95 % interval, such as reward against guidance.

    Args:
        series: One to six series of (x, measured), by name; x rises.
        title: What is seen.
        x_label: What is told to the right.
        y_label: What is told upwards.
        caption: What to look for.
        bands: Whether series are those of `band_of`, drawn as lines with areas, below the title.
        references: Levels drawn as horizontal lines, by label.

    Raises:
        ValueError: There are no series, more than can be told apart, one without points, or one whose x does not rise.
    """
    import altair as alt

    colour_and_dash = _series("series", list(series))
    for name, points in series.items():
        xs = [x for x, _ in points]
        if not xs or any(b <= a for a, b in pairwise(xs)):
            raise ValueError(f"series[{name!r}] must have points at rising x, got {xs}")
    rows = [
        {"series": name, "x": x, "mean": one.mean} | ({"low": one.low, "high": one.high} if has_interval(one) else {})
        for name, points in series.items()
        for x, one in points
    ]
    measured = sorted({x for points in series.values() for x, _ in points})
    ticks = alt.Axis(values=measured) if len(measured) <= 8 else alt.Axis()
    scale = alt.Scale(nice=False) if bands else alt.Scale(zero=False, padding=12)
    base: Any = alt.Chart().encode(
        x=alt.X("x:Q", title=x_label, scale=scale, axis=ticks),
        tooltip=["series:N", alt.Tooltip("x:Q", title=x_label), "mean:Q", "low:Q", "high:Q"],
        **colour_and_dash,
    )
    y = alt.Y("mean:Q", title=y_label, scale=alt.Scale(zero=False))
    reach = base.mark_area(fillOpacity=0.15) if bands else base.mark_rule(opacity=0.65, strokeDash=[1, 0])
    layers = [reach.encode(y=alt.Y("low:Q", scale=alt.Scale(zero=False)), y2="high:Q"), base.mark_line().encode(y=y)]
    if not bands:
        layers.append(base.mark_point(filled=True, size=45, opacity=1).encode(y=y))
    layers += _levels(references, y_label, WIDTH)
    chart: Any = alt.layer(*layers, data=alt.Data(values=rows), **({"title": title} if bands else {}))
    words = "; ".join(
        f"{name}: {', '.join(f'{one.mean:.3g} at {x:g}' for x, one in points)}" for name, points in series.items()
    )
    known = {name: dict(points) for name, points in series.items()}
    lines = [
        Line(f"{x:g}", [interval_cell(points[x]) if x in points else Cell("\u2013") for points in known.values()])
        for x in measured
    ]
    table = Table(
        label="Numbers of the chart",
        columns=[Column(x_label, True), *map(Column, series)],
        lines=lines,
        caption=f"{y_label}: mean [{'one standard deviation' if bands else '95 %'}].",
    )
    reaches = "Bands are one standard deviation over runs." if bands else "Bars are 95 % intervals."
    return Chart(title, f"{words}.", spec_of(chart, WIDTH, 260), table, f"{caption} {reaches}".strip())


def band_of(runs: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, Estimate]]:
    """Returns the mean over runs at the points (x, value) that all of them have, as a series for `series_chart`.

    The ends of an estimate are one standard deviation away; its error is the standard error over the runs.

    Raises:
        ValueError: There are no runs, or they have no point in common.
    """
    known = [dict(run) for run in runs]
    shared = sorted(set(known[0]).intersection(*known[1:])) if known else []
    if not shared:
        raise ValueError(f"runs must be at least one and have a point in common, got {len(runs)} that have none")
    band = []
    for x in shared:
        values = [run[x] for run in known]
        mean = math.fsum(values) / len(values)
        spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / max(1, len(values) - 1))
        error = spread / math.sqrt(len(values))
        band.append((x, Estimate(mean, error, mean - spread, mean + spread, len(values))))
    return band


def has_interval(estimate: Estimate) -> bool:
    """Tells whether both ends are known."""
    return math.isfinite(estimate.low) and math.isfinite(estimate.high)


# What all charts share.


def _series(name: str, labels: list[str]) -> dict[str, Any]:
    """Returns colour and dash of each series, with a legend where there are several."""
    import altair as alt

    if not 1 <= len(labels) <= SERIES:
        raise ValueError(f"series must be 1 to {SERIES}, got {len(labels)}")
    symbols: dict[str, Any] = {"symbolType": "stroke", "symbolSize": 320, "symbolOpacity": 1, "symbolStrokeWidth": 2}
    legend = alt.Legend(title=None, orient="bottom", **symbols) if len(labels) > 1 else None
    colour = alt.Scale(domain=labels, range=list(COLOURS[: len(labels)]))
    dash = alt.Scale(domain=labels, range=list(DASHES[: len(labels)]))
    return {
        "color": alt.Color(f"{name}:N", scale=colour, legend=legend),
        "strokeDash": alt.StrokeDash(f"{name}:N", scale=dash, legend=legend),
    }


def _levels(references: Mapping[str, float], axis: str | None, width: int) -> list[Any]:
    """Returns the layers of horizontal lines, each with its label at its right end."""
    import altair as alt

    layers = []
    for label, level in references.items():
        y = alt.Y("level:Q", title=axis)
        rule: Any = alt.Chart(alt.Data(values=[{"level": level, "label": label}]))
        layers.append(rule.mark_rule(color=FAINT, strokeDash=[2, 3]).encode(y=y))
        text = rule.mark_text(align="right", dy=-7, color=SOFT)
        layers.append(text.encode(x=alt.value(width), y=y, text="label:N"))
    return layers


def spec_of(chart: Any, width: int, height: int) -> dict[str, Any]:
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
