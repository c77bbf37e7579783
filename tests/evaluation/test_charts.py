"""Charts: what is drawn, in data and in words, and what is refused."""

import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from overpaint.evaluation import Estimate, Panel
from overpaint.evaluation.report.charts import (
    HEIGHT,
    RAW_POINTS,
    WIDTH,
    Curve,
    band_of,
    learning_chart,
    metrics_by_tag,
    panel_charts,
    panel_curves,
    script,
    series_chart,
    smoothed,
    svg,
)
from overpaint.evaluation.report.pareto import Frame, Point, front, pareto_chart, place_labels

ONE = Estimate(0.5, 0.1, 0.3, 0.7, 9)


def data(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """All rows of a chart's data."""
    found = list(spec.get("data", {}).get("values", []))
    for layer in spec.get("layer", []):
        found += data(layer)
    return found


def marks(spec: dict[str, Any]) -> list[str]:
    found = [spec["mark"]["type"]] if "mark" in spec else []
    return found + [mark for layer in spec.get("layer", []) for mark in marks(layer)]


def texts(drawing: str) -> list[str]:
    return [
        "".join(text.itertext()) for text in ElementTree.fromstring(drawing).iter("{http://www.w3.org/2000/svg}text")
    ]


# Learning curves.


def test_metrics_are_read_by_tag_and_what_is_not_a_number_is_left_out(tmp_path: Path) -> None:
    lines = [
        {"iteration": 0, "reward/mean": 0.5, "train/loss": None},
        {"iteration": 1, "reward/mean": 1, "note": "hello"},
        {"iteration": 1, "reward/mean": 2.0},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"iteration": 2, "rew', encoding="utf-8")
    assert metrics_by_tag(path) == {"reward/mean": {0: 0.5, 1: 2.0}}


def test_a_panel_takes_its_tags_in_order_and_leaves_out_what_was_not_logged() -> None:
    panel = Panel(title="Reward", tags={"learned": "reward/mean", "true": "reward/true", "other": "no/such"})
    curves = panel_curves(panel, {"reward/true": {5: 0.1, 0: 0.2}, "reward/mean": {0: 1.0}})
    assert curves == (Curve("learned", (0,), (1.0,)), Curve("true", (0, 5), (0.2, 0.1)))


def test_two_measures_do_not_share_an_axis_and_one_measure_may() -> None:
    metrics = {"reward/a": {0: -2.0, 5: -1.0}, "reward/b": {0: 0.1, 5: 0.2}}
    panel = Panel(title="Held out", tags={"ImageReward": "reward/a", "utility": "reward/b"}, caption="Look.")
    charts = panel_charts(panel, metrics)
    assert [[row["value"] for row in data(chart.spec)] for chart in charts] == [[-2.0, -1.0], [0.1, 0.2]]
    assert [chart.caption for chart in charts] == ["", "Look."]
    for chart, label in zip(charts, panel.tags, strict=True):
        assert label in texts(svg(chart.spec))  # what the axis is of
    (shared,) = panel_charts(replace(panel, same_unit=True), metrics)
    assert [row["value"] for row in data(shared.spec)] == [-2.0, -1.0, 0.1, 0.2]
    (alone,) = panel_charts(panel, {"reward/b": metrics["reward/b"]})
    assert alone.caption == "Look."
    assert panel_charts(panel, {}) == []


def test_a_level_needs_to_know_its_axis() -> None:
    tags = {"ImageReward": "reward/a", "utility": "reward/b"}
    with pytest.raises(ValueError, match=r"references must be of .*, got \['before'\] for \['ImageReward', "):
        Panel(title="t", tags=tags, references={"before": 1.0})
    assert Panel(title="t", tags=tags, references={"before": 1.0}, same_unit=True).references == {"before": 1.0}


def test_smoothing_averages_inside_and_follows_a_straight_line_to_its_ends() -> None:
    assert smoothed([0.0, 3.0, 0.0, 3.0, 0.0, 3.0, 0.0], window=3)[1:-1] == pytest.approx((1.0, 2.0, 1.0, 2.0, 1.0))
    line = [0.5 * k - 2.0 for k in range(20)]
    assert smoothed(line, window=7) == pytest.approx(line, abs=1e-12)
    assert smoothed([4.0], window=5) == (4.0,)


def test_few_values_are_drawn_as_they_are_and_many_smoothed_over_them() -> None:
    panel = Panel(title="Reward", tags={}, caption="Look.", references={"before": 1.5})
    few = learning_chart(panel, [Curve("a", (0, 5), (0.0, 1.0)), Curve("b", (0, 5), (1.0, 3.0))])
    assert few.words == "a: 0 at iteration 0, 1 at iteration 5; b: 1 at iteration 0, 3 at iteration 5"
    assert marks(few.spec) == ["line", "rule", "text"]
    rows = [row for row in data(few.spec) if "curve" in row]
    assert [(row["curve"], row["iteration"], row["value"], row["line"]) for row in rows] == [
        ("a", 0, 0.0, 0.0), ("a", 5, 1.0, 1.0), ("b", 0, 1.0, 1.0), ("b", 5, 3.0, 3.0),
    ]  # fmt: skip
    assert few.table.markdown().splitlines()[2:] == ["| 0 | 0 | 1 |", "| 5 | 1 | 3 |"]
    count = RAW_POINTS + 1
    zigzag = Curve("a", tuple(range(count)), tuple(float(k % 2) for k in range(count)))
    many = learning_chart(panel, [zigzag])
    assert marks(many.spec) == ["line", "line", "rule", "text"]
    lines = [row["line"] for row in data(many.spec) if "curve" in row]
    assert max(lines) - min(lines) < 0.8
    assert len(many.table.lines) == 21  # evenly spaced over all, from the first to the last
    assert [many.table.lines[k].name for k in (0, -1)] == ["0", str(count - 1)]
    assert {"a", "b", "before"} <= set(texts(svg(few.spec)))
    assert "legend" not in svg(many.spec)  # a single curve needs none: its axis has its name
    assert texts(svg(many.spec)).count("a") == 1


def test_a_single_value_is_a_point() -> None:
    chart = learning_chart(Panel(title="t", tags={}), [Curve("a", (3,), (0.5,))])
    assert marks(chart.spec) == ["line", "point"]


@pytest.mark.parametrize("count", [0, 7])
def test_what_cannot_be_told_apart_is_refused(count: int) -> None:
    curves = [Curve(str(k), (0, 1), (0.0, 1.0)) for k in range(count)]
    with pytest.raises(ValueError, match=f"series must be 1 to 6, got {count}"):
        learning_chart(Panel(title="t", tags={}), curves)
    with pytest.raises(ValueError, match=f"series must be 1 to 6, got {count}"):
        series_chart({c.label: [(0.0, ONE)] for c in curves}, title="t", x_label="x", y_label="y")


# Bands and series.


def test_a_band_is_mean_and_standard_deviation_where_all_runs_have_a_point() -> None:
    band = band_of([[(0.0, 1.0), (5.0, 2.0), (10.0, 9.0)], [(0.0, 3.0), (5.0, 2.0)]])
    assert [x for x, _ in band] == [0.0, 5.0]
    assert band[0][1] == pytest.approx((2.0, 1.0, 2.0 - math.sqrt(2), 2.0 + math.sqrt(2), 2))
    assert band[1][1] == (2.0, 0.0, 2.0, 2.0, 2)
    assert band_of([[(0.0, 1.0)]]) == [(0.0, Estimate(1.0, 0.0, 1.0, 1.0, 1))]


@pytest.mark.parametrize("runs", [[], [[(0.0, 1.0)], [(1.0, 1.0)]]])
def test_runs_that_share_nothing_are_refused(runs: list[list[tuple[float, float]]]) -> None:
    with pytest.raises(ValueError, match="runs must"):
        band_of(runs)


def test_bands_are_areas_that_reach_one_standard_deviation() -> None:
    runs = {"DDPO <IS>": ([(0.0, 1.0), (64.0, 1.0)], [(0.0, 2.0), (64.0, 4.0)]), "RWR": ([(0.0, 1.0), (64.0, 1.5)],)}
    bands = {name: band_of(some) for name, some in runs.items()}
    chart = series_chart(bands, title="Reward", x_label="queries", y_label="reward", bands=True)
    assert chart.words == "DDPO <IS>: 1.5 at 0, 2.5 at 64; RWR: 1 at 0, 1.5 at 64."
    assert chart.caption == "Bands are one standard deviation over runs."
    assert marks(chart.spec) == ["area", "line"]
    (low, high) = (data(chart.spec)[1][name] for name in ("low", "high"))
    assert (low, high) == pytest.approx((2.5 - math.sqrt(4.5), 2.5 + math.sqrt(4.5)))
    drawing = svg(chart.spec)
    assert {"Reward", "queries", "DDPO <IS>", "RWR"} <= set(texts(drawing))
    assert drawing.count("stroke-dasharray") >= 1  # no one has to tell colours apart


def test_series_are_drawn_and_listed_with_their_intervals() -> None:
    series = {
        "<small>": [(1.5, Estimate(-2.0, 0.1, -2.2, -1.8, 9)), (3.0, Estimate(-1.0, 0.1, -1.2, -0.8, 9))],
        "large": [(3.0, Estimate(0.5, math.nan, math.nan, math.nan, 1))],
    }
    chart = series_chart(series, title="Guidance & reward", x_label="guidance", y_label="reward")
    assert chart.words == "<small>: -2 at 1.5, -1 at 3; large: 0.5 at 3."
    assert [row.keys() & {"low", "high"} for row in data(chart.spec)] == [{"low", "high"}, {"low", "high"}, set()]
    minus, dash = "\u2212", "\u2013"
    assert chart.table.markdown().splitlines() == [
        "| guidance | <small> | large |",
        "| --- | ---: | ---: |",
        f"| 1.5 | {minus}2.000 [{minus}2.200, {minus}1.800] | {dash} |",
        f"| 3 | {minus}1.000 [{minus}1.200, {minus}0.800] | 0.500 |",
    ]
    html = str(chart.html())
    assert "&lt;small&gt;" in html
    assert "<small>" not in html
    (spec,) = [part.partition("</script>")[0] for part in html.split('class="spec">')[1:]]
    assert json.loads(spec) == chart.spec


@pytest.mark.parametrize("points", [[], [(2.0, ONE), (1.0, ONE)]])
def test_series_whose_x_does_not_rise_are_refused(points: list[tuple[float, Estimate]]) -> None:
    with pytest.raises(ValueError, match=r"series\['a'\] must have points at rising x, got \["):
        series_chart({"a": points}, title="t", x_label="x", y_label="y")


# What is given up for what.


def point(method: str, rate: float, reward: float, before: str = "") -> Point:
    return Point(
        method,
        Estimate(rate, 0.02, rate - 0.04, rate + 0.04, 50),
        Estimate(reward, 0.05, reward - 0.1, reward + 0.1, 50),
        before,
    )


POINTS = (
    point("as it came", 0.9, 0.5),
    point("A & B", 0.3, 0.2),
    point("C", 0.3, 0.1),
    point("D", 0.5, 0.1),
    point("A & B, recovered", 0.25, 0.4, "A & B"),
)


def test_the_front_is_what_nothing_beats_in_both_respects() -> None:
    assert front(POINTS) == ("A & B, recovered", "as it came")
    assert front(POINTS[:4]) == ("A & B", "as it came")  # C has the same rate and less reward
    twins = (point("a", 0.1, 0.1), point("b", 0.1, 0.1))
    assert front(twins) == ("a", "b")  # equals do not beat each other


def test_points_lie_where_their_numbers_are_with_error_bars_and_the_front_as_stairs() -> None:
    chart = pareto_chart(POINTS, x_label="rate")
    rows = {row["model"]: row for row in data(chart.spec) if "model" in row}
    for one in POINTS:
        row = rows[one.method]
        assert (row["rate"], row["reward"]) == (one.concept_rate.mean, one.reward.mean)
        assert (row["rate_low"], row["reward_high"]) == (one.concept_rate.low, one.reward.high)
        assert row["best"] == (one.method in ("A & B, recovered", "as it came"))
    stairs = [(row["rate"], row["reward"]) for row in data(chart.spec) if row.keys() == {"rate", "reward"}]
    frame = Frame.around(POINTS)
    assert stairs == [(0.25, frame.up[0]), (0.25, 0.4), (0.9, 0.5), (frame.across[1], 0.5)]
    assert {"A & B", "rate", "ImageReward (higher is better)"} <= set(texts(svg(chart.spec)))


def test_an_arrow_leads_from_a_model_to_what_was_made_of_it() -> None:
    chart = pareto_chart(POINTS)
    (made,) = [row for row in data(chart.spec) if row.get("made")]
    assert made["model"] == "A & B, recovered"
    # From near (0.3, 0.2) to near (0.25, 0.4): to the left and up.
    assert 0.25 < made["tip_rate"] < made["from_rate"] < 0.3
    assert 0.2 < made["from_reward"] < made["tip_reward"] < 0.4
    assert -90 < made["angle"] < 0
    assert "an arrow leads" in chart.caption
    assert "an arrow leads" not in pareto_chart(POINTS[:4]).caption


def test_the_chart_is_told_in_words() -> None:
    words = pareto_chart(POINTS).words
    assert words.startswith("as it came: concept rate 0.900, reward 0.500; A & B: concept rate 0.300, reward 0.200; ")
    assert "A & B, recovered: concept rate 0.250, reward 0.400, made of A & B." in words
    assert words.endswith("On the front: A & B, recovered, as it came.")


@pytest.mark.parametrize("seed", range(6))
def test_names_overlap_neither_each_other_nor_a_point_and_stay_on_the_chart(seed: int) -> None:
    chance = random.Random(seed)
    # Twenty methods, most of them crowded into a corner.
    points = [point(f"method {k}, recovered", chance.random() ** 3, chance.random() ** 3) for k in range(20)]
    frame = Frame((0.0, 1.0), (0.0, 1.0))
    boxes = place_labels(points, frame)
    assert len(boxes) >= 19
    for one, other in itertools.combinations(boxes.values(), 2):
        assert not one.meets(other)
    for box in boxes.values():
        assert min(box.left, box.top) >= 0
        assert box.right <= WIDTH
        assert box.bottom <= HEIGHT
        for one in points:
            x, y = frame.place(one)
            assert not (box.left < x < box.right and box.top < y < box.bottom)


def test_a_place_in_pixels_stands_for_its_numbers() -> None:
    frame = Frame.around(POINTS)
    for one in POINTS:
        assert frame.values(*frame.place(one)) == pytest.approx((one.concept_rate.mean, one.reward.mean))


def test_the_table_lists_the_numbers_of_the_chart() -> None:
    lines = pareto_chart(POINTS).table.markdown().splitlines()
    assert lines[0] == "| model | concept rate (lower is better) | ImageReward (higher is better) | on the front |"
    assert lines[3] == "| A & B | 0.300 [0.260, 0.340] | 0.200 [0.100, 0.300] |  |"
    assert lines[6] == "| A & B, recovered | 0.250 [0.210, 0.290] | 0.400 [0.300, 0.500] | yes |"


def test_a_single_measurement_without_an_interval_is_a_point_without_bars() -> None:
    alone = Estimate(0.5, math.nan, math.nan, math.nan, 1)
    chart = pareto_chart((Point("one", alone, alone),))
    (row,) = [row for row in data(chart.spec) if "model" in row]
    assert not row.keys() & {"rate_low", "reward_low"}
    assert "nan" not in json.dumps(chart.spec).lower()
    assert "one" in texts(svg(chart.spec))


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ((), r"points must be of at least one method, each once, got \[\]"),
        ((POINTS[0], POINTS[0]), r"each once, got \['as it came', 'as it came'\]"),
        ((point("a", 0.1, 0.1, "b"),), r"before must be another method among \['a'\], got 'b' of a"),
        ((point("a", 0.1, math.nan),), "points must have finite means, got"),
    ],
)
def test_points_that_cannot_be_drawn_are_refused(points: tuple[Point, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pareto_chart(points)


def test_the_script_of_charts_is_whole_and_ends_no_element() -> None:
    assert "vegaEmbed" in script()
    assert "</script" not in script()
    assert len(script()) < 1_500_000
