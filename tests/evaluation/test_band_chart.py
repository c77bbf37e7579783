"""Curves of several runs as means with bands."""

import math
import xml.etree.ElementTree as ElementTree

import pytest

from overpaint.evaluation.report.band_chart import Band, band_chart, band_of


def test_a_band_is_mean_and_standard_deviation_where_all_runs_have_a_point() -> None:
    band = band_of("a", [[(0.0, 1.0), (5.0, 2.0), (10.0, 9.0)], [(0.0, 3.0), (5.0, 2.0)]])
    assert band.x == (0.0, 5.0)
    assert band.mean == (2.0, 2.0)
    assert band.spread == pytest.approx((math.sqrt(2), 0.0))


@pytest.mark.parametrize("runs", [[], [[(0.0, 1.0)], [(1.0, 1.0)]]])
def test_runs_that_share_nothing_are_refused(runs: list[list[tuple[float, float]]]) -> None:
    with pytest.raises(ValueError, match="runs must"):
        band_of("a", runs)


def test_a_chart_says_in_words_and_shows_in_shape_how_each_curve_ends() -> None:
    up = Band("up & away", (0.0, 10.0), (0.0, 1.0), (0.0, 0.5))
    down = Band("down", (0.0, 10.0), (1.0, 0.0), (0.0, 0.0))
    root = ElementTree.fromstring(band_chart([up, down], title="t", x_label="queries", y_label="reward"))
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"up & away", "down", "queries", "reward", "t"} <= set(texts)
    (title,) = [element.text for element in root.iter() if element.tag.endswith("title")]
    assert title == "t: up & away ends at 1 ± 0.5; down ends at 0 ± 0"
    lines = [e.get("d", "") for e in root.iter() if e.get("stroke-width") == "2" and "L" in e.get("d", "")]
    first, last = (float(point.split()[1]) for point in lines[0][1:].split("L"))
    assert first > last  # upwards, where SVG counts downwards


def test_charts_that_cannot_be_told_apart_are_refused() -> None:
    band = Band("a", (0.0,), (1.0,), (0.0,))
    for bands in ([], [band] * 7):
        with pytest.raises(ValueError, match="bands must be 1 to 6"):
            band_chart(bands, title="t", x_label="x", y_label="y")
