"""Erasure methods side by side: means over seeds, as text and for a page."""

import math

import pytest

from overpaint.evaluation.experiments.study import MethodLine, Spread, methods_table, spread

LINES = [
    MethodLine("before", {"explicit": Spread(1.0, math.nan)}),
    MethodLine("a & b", {"explicit": Spread(0.5, 0.25), "ImageReward": Spread(-0.125, math.nan)}),
]


def test_a_spread_is_the_mean_and_its_standard_error() -> None:
    assert spread([1.0, 2.0, 3.0]) == (2.0, pytest.approx(1 / math.sqrt(3)))
    assert str(spread([1.0, 3.0])) == "2.000 ± 1.000"
    assert str(spread([0.5])) == "0.500"
    with pytest.raises(ValueError, match="at least one number, got none"):
        spread([])


def test_tables_have_a_row_for_each_method_and_leave_unknown_cells_empty() -> None:
    assert methods_table(LINES).markdown().splitlines() == [
        "| method | explicit | ImageReward |",
        "| --- | ---: | ---: |",
        "| before | 1.000 |  |",
        "| a & b | 0.500 ± 0.250 | \u22120.125 |",
    ]
    page = str(methods_table(LINES, caption="two <seeds>").html())
    assert page.count("<tr") == 3
    assert '<tr data-model="a &amp; b"><th scope="row">a &amp; b</th>' in page
    assert '<td class="number"></td>' in page
    assert "\u22120.125" in page
    assert "two &lt;seeds&gt;" in page
