import itertools
import math
import random
import re
from xml.etree import ElementTree

import pytest

from overpaint.evaluation.metrics.statistics import Estimate
from overpaint.evaluation.report.pareto import (
    HEIGHT,
    LEFT,
    WIDTH,
    Point,
    front,
    pareto_chart,
    pareto_section,
    place_labels,
)
from overpaint.evaluation.report.svg import Frame


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


def chart(points: tuple[Point, ...]) -> str:
    return pareto_chart(points, title="What <erasing> costs", x_label="rate", y_label="reward")


def test_the_front_is_what_nothing_beats_in_both_respects() -> None:
    assert front(POINTS) == ("A & B, recovered", "as it came")
    assert front(POINTS[:4]) == ("A & B", "as it came")  # C has the same rate and less reward
    twins = (point("a", 0.1, 0.1), point("b", 0.1, 0.1))
    assert front(twins) == ("a", "b")  # equals do not beat each other


def test_points_lie_where_their_numbers_are_with_error_bars_and_the_front_as_stairs() -> None:
    root = ElementTree.fromstring(chart(POINTS))
    marks = {group.get("data-model"): group.find("circle") for group in root.iter("g")}
    places = {name: (float(c.get("cx", "")), float(c.get("cy", ""))) for name, c in marks.items() if c is not None}
    # Rates from 0.21 to 0.94 are drawn from 0.2 to 1 and 3 % more on both sides, rewards from 0 to 0.6.
    frame = Frame(0.176, 1.024, 0.0, 0.6, 30, WIDTH, HEIGHT, LEFT)
    for one in POINTS:
        assert places[one.method] == pytest.approx((frame.x(one.concept_rate.mean), frame.y(one.reward.mean)), abs=0.06)
        group = next(group for group in root.iter("g") if group.get("data-model") == one.method)
        across, up = group.findall("line")[:2]
        assert float(across.get("x1", "")) == pytest.approx(frame.x(one.concept_rate.low), abs=0.06)
        assert float(across.get("x2", "")) == pytest.approx(frame.x(one.concept_rate.high), abs=0.06)
        assert float(up.get("y1", "")) == pytest.approx(frame.y(one.reward.low), abs=0.06)
        assert float(up.get("y2", "")) == pytest.approx(frame.y(one.reward.high), abs=0.06)
    (stairs,) = (path.get("d", "") for path in root.iter("path") if path.get("class") == "front")
    x, y = places["A & B, recovered"]
    end_x, end_y = places["as it came"]
    assert stairs.startswith(f"M{x:.1f} {frame.y(0.0):.1f}V{y:.1f}H{end_x:.1f}V{end_y:.1f}H")
    assert {c.get("class") for c in root.iter("circle")} == {"mark", "mark best", "mark made best"}


def test_an_arrow_leads_from_a_model_to_what_was_made_of_it() -> None:
    root = ElementTree.fromstring(chart(POINTS))
    (line,) = (one for one in root.iter("line") if one.get("class") == "arrow")
    (head,) = root.iter("polygon")
    tip = [float(number) for number in head.get("points", "").split()[0].split(",")]
    circles = {group.get("data-model"): group.find("circle") for group in root.iter("g")}
    start, end = ([float(circles[name].get(key)) for key in ("cx", "cy")] for name in ("A & B", "A & B, recovered"))  # ty: ignore
    assert math.dist(tip, end) == pytest.approx(7, abs=0.2)
    assert math.dist([float(line.get(key, "")) for key in ("x1", "y1")], start) == pytest.approx(6, abs=0.2)
    assert chart(POINTS[:4]).count("arrow") == 0


def test_the_chart_is_told_in_words() -> None:
    root = ElementTree.fromstring(chart(POINTS))
    assert root.get("role") == "img"
    assert [root[0].tag, root[0].text] == ["title", "What <erasing> costs"]
    words = root[1].text or ""
    assert words.startswith("as it came: concept rate 0.900, reward 0.500; A & B: concept rate 0.300, reward 0.200;")
    assert words.endswith(
        "A & B, recovered: concept rate 0.250, reward 0.400, made of A & B. On the front: A & B, recovered, as it came."
    )


@pytest.mark.parametrize("seed", range(5))
def test_names_overlap_neither_each_other_nor_a_point_and_stay_on_the_chart(seed: int) -> None:
    chance = random.Random(seed)
    # Twenty methods, most of them crowded into a corner.
    points = [point(f"method {k}, recovered", chance.random() ** 3, chance.random() ** 3) for k in range(20)]
    frame = Frame(0.0, 1.0, 0.0, 1.0, 30, WIDTH, HEIGHT, LEFT)
    boxes = place_labels(points, frame)
    assert len(boxes) == 20
    for one, other in itertools.combinations(boxes.values(), 2):
        assert not one.meets(other)
    for box in boxes.values():
        assert box.left >= LEFT
        assert box.right <= WIDTH
        assert box.top >= 0
        assert box.bottom <= frame.y(0.0)
        for one in points:
            x, y = frame.x(one.concept_rate.mean), frame.y(one.reward.mean)
            assert not (box.left < x < box.right and box.top < y < box.bottom)


def test_a_section_lists_the_numbers_of_the_chart() -> None:
    section = pareto_section(POINTS)
    assert section[:2] == ("pareto", "What erasing costs")
    root = ElementTree.fromstring(f"<main>{section.html}</main>")
    rows = [["".join(cell.itertext()) for cell in row] for row in root.iter("tr")]
    assert rows[0] == ["model", "concept rate (lower is better)", "ImageReward (higher is better)", "on the front"]
    assert rows[2] == ["A & B", "0.300 [0.260, 0.340]", "0.200 [0.100, 0.300]", ""]
    assert rows[5] == ["A & B, recovered", "0.250 [0.210, 0.290]", "0.400 [0.300, 0.500]", "yes"]
    assert "an arrow leads" in section.html
    assert "an arrow leads" not in pareto_section(POINTS[:4]).html


def test_a_single_measurement_without_an_interval_is_a_point_without_bars() -> None:
    alone = Estimate(0.5, math.nan, math.nan, math.nan, 1)
    text = chart((Point("one", alone, alone),))
    assert text.count('class="bar"') == 0
    assert text.count("<circle") == 1
    assert not re.search(r"\bnan\b", text)


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
        chart(points)
