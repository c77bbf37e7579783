import math
import re
from collections.abc import Sequence
from xml.etree import ElementTree

import pytest

from overpaint.evaluation.experiments.published import (
    Measured,
    Published,
    published_comparison,
    tables_html,
    tables_markdown,
)
from overpaint.evaluation.metrics.statistics import Estimate

PUBLISHED = (
    Published("captions", "Model <A>", "ImageReward", "256²", -1.5598, "study"),
    Published("captions", "Model <A>", "ImageReward", "512²", 0.25, "study"),
    Published("captions", "Model B", "ImageReward", "256²", -1.1, "study"),
    Published("captions", "Model <A>", "ImageReward", "256²", -0.0857, "ImageReward"),
    Published("captions", "Model B", "FID", "", 20.0, "ImageReward"),
)


def measured(value: float, *, model: str = "Model <A>", setting: str = "256²", error: float = 0.02) -> Measured:
    return Measured("captions", model, "ImageReward", setting, Estimate(value, error, value - 1, value + 1, 10))


def beside_published(ours: list[Measured], theirs: Sequence[Published]) -> str:
    return str(tables_html(published_comparison(ours, theirs)))


def test_each_metric_has_a_table_and_each_model_and_setting_a_row_with_differences_where_both_are_known() -> None:
    rewards, fid = published_comparison([measured(-1.5), measured(0.125, model="tiny world")], PUBLISHED)
    assert (rewards.label, fid.label) == ("ImageReward", "FID")
    assert [column.title for column in rewards.columns[3:]] == ["study", "ImageReward"] * 2
    rows = [[line.name, *map(str, line.cells)] for line in rewards.lines]
    dash = "\u2013"
    assert rows == [
        ["Model <A>", "256²", "-1.5000 ± 0.0200", "-1.5598", "-0.0857", "+0.0598", "-1.4143"],
        ["Model <A>", "512²", "not run", "0.2500", dash, dash, dash],
        ["Model B", "256²", "not run", "-1.1000", dash, dash, dash],
        ["tiny world", "256²", "0.1250 ± 0.0200", dash, dash, dash, dash],
    ]
    assert [[line.name, *map(str, line.cells)] for line in fid.lines] == [["Model B", "not run", "20", dash]]


def test_a_page_shows_measured_beside_published_and_says_what_was_not_run() -> None:
    html = beside_published([measured(-1.5)], PUBLISHED[:4])
    root = ElementTree.fromstring(f"<main>{html}</main>")
    rows = [["".join(cell.itertext()) for cell in row] for row in root.iter("tr")]
    minus, dash = "\u2212", "\u2013"
    assert rows == [
        ["model", "setting", "measured", "published", f"measured {minus} published"],
        ["study", "ImageReward"] * 2,
        [
            "Model <A>",
            "256²",
            f"{minus}1.5000 ± 0.0200",
            f"{minus}1.5598",
            f"{minus}0.0857",
            "+0.0598",
            f"{minus}1.4143",
        ],
        ["Model <A>", "512²", "not run", "0.2500", dash, dash, dash],
        ["Model B", "256²", "not run", f"{minus}1.1000", dash, dash, dash],
    ]
    assert [cell.get("scope") for row in root.iter("tr") for cell in row if cell.tag == "th"] == [
        *("col", "col", "col", "colgroup", "colgroup"),
        *("col",) * 4,
        *("row",) * 3,
    ]
    (caption,) = root.iter("caption")
    text = "".join(caption.itertext())
    assert text.startswith("1 of 3 measured here, mean ± standard error; the others were not run.")
    assert "(2023)" in text
    assert [link.get("href") for link in caption.iter("a")] == ["https://arxiv.org/abs/2304.05977"]


def test_where_all_was_measured_and_nothing_published_the_table_is_that_of_the_measurements() -> None:
    html = beside_published([measured(0.5, setting="", error=math.nan)], ())
    root = ElementTree.fromstring(f"<main>{html}</main>")
    rows = [["".join(cell.itertext()) for cell in row] for row in root.iter("tr")]
    assert rows[0] == ["model", "measured"]
    assert rows[-1] == ["Model <A>", "0.500"]
    assert "All measured here" in html


def test_the_same_in_markdown() -> None:
    text = tables_markdown(published_comparison([measured(-1.5), measured(2.0, model="a|b")], PUBLISHED))
    theirs = [f"published: {source}" for source in ("study", "ImageReward")]
    changes = [f"measured \u2212 published: {source}" for source in ("study", "ImageReward")]
    assert text.splitlines() == [
        "ImageReward",
        "",
        f"| model | setting | measured | {theirs[0]} | {theirs[1]} | {changes[0]} | {changes[1]} |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        "| Model <A> | 256² | −1.5000 ± 0.0200 | −1.5598 | −0.0857 | +0.0598 | −1.4143 |",  # noqa: RUF001
        "| Model <A> | 512² | not run | 0.2500 | – | – | – |",  # noqa: RUF001
        "| Model B | 256² | not run | −1.1000 | – | – | – |",  # noqa: RUF001
        "| a\\|b | 256² | 2.0000 ± 0.0200 | – | – | – | – |",  # noqa: RUF001
        "",
        "FID",
        "",
        f"| model | measured | {theirs[1]} | {changes[1]} |",
        "| --- | ---: | ---: | ---: |",
        "| Model B | not run | 20 | – |",  # noqa: RUF001
    ]


def test_rows_can_be_filtered_by_model_and_nothing_measured_is_no_table_of_zeros() -> None:
    html = beside_published([], PUBLISHED)
    assert re.findall(r'<tr data-model="([^"]*)"', html) == ["Model &lt;A&gt;"] * 2 + ["Model B"] * 2
    assert html.count(">not run</td>") == 4
    assert beside_published([], ()) == ""


def test_numbers_that_occur_twice_are_refused() -> None:
    with pytest.raises(
        ValueError, match="measured must hold each number once, got ImageReward of Model <A> at 256² in"
    ):
        published_comparison([measured(0.1), measured(0.2)], ())
    with pytest.raises(
        ValueError, match="published must hold each number of study once, got ImageReward of Model B at"
    ):
        published_comparison([], [*PUBLISHED, PUBLISHED[2]._replace(value=3.0)])
