"""Erasure methods side by side: means over seeds, as text and for a page."""

import math
from pathlib import Path

import pytest
import torch

from overpaint.evaluation import Column, DrawConfig, DrawnImages, Scores, plan, write_folder
from overpaint.evaluation.experiments.study import MethodLine, Spread, line_of, methods_table, pictured, spread

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


BENIGN = plan({"benign": ["a cat", "a dog"]})


def scores(model: str, **values: float) -> Scores:
    columns = tuple(Column(name, "benign", False, "higher", "", BENIGN, (one, one)) for name, one in values.items())
    return Scores(model=model, config=None, columns=columns)


def test_a_reward_has_a_column_of_its_own_name() -> None:
    of_two = scores("uce", aesthetic=5.0, ImageReward=0.5)
    assert line_of("uce", [of_two], reward="aesthetic").values == {
        "aesthetic": (5.0, pytest.approx(math.nan, nan_ok=True)),
        "ImageReward": (0.5, pytest.approx(math.nan, nan_ok=True)),
    }
    assert list(line_of("uce", [scores("uce", aesthetic=5.0)], {"minutes": [1.0]}, reward="aesthetic").values) == [
        *("aesthetic", "minutes"),
    ]
    assert list(line_of("uce", [of_two]).values) == ["ImageReward"]


def test_models_without_pictures_are_told_and_not_shown(tmp_path: Path) -> None:
    drawn = DrawnImages(
        model="uce", planned=BENIGN, config=DrawConfig(steps=2), stack=torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    )
    write_folder(drawn, tmp_path)
    some = pictured(tmp_path, [scores("before"), scores("uce")])
    assert [one.model for one in some["pictures"]] == [one.model for one in some["scores"]] == ["uce"]
    assert some["notes"] == [
        "Pictures are kept of the first of a command's seeds alone; here there are none of before."
    ]
    assert pictured(tmp_path, [scores("uce")])["notes"] == []
