import json
import re
from pathlib import Path

import pytest

from overpaint.evaluation.report.curves import Curve, Panel, metrics_by_tag, panel_curves, smoothed
from overpaint.evaluation.report.svg import line_chart, nice_ticks


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


def test_smoothing_averages_inside_and_follows_a_straight_line_to_its_ends() -> None:
    assert smoothed([0.0, 3.0, 0.0, 3.0, 0.0, 3.0, 0.0], window=3)[1:-1] == pytest.approx((1.0, 2.0, 1.0, 2.0, 1.0))
    line = [0.5 * k - 2.0 for k in range(20)]
    assert smoothed(line, window=7) == pytest.approx(line, abs=1e-12)
    assert smoothed([4.0], window=5) == (4.0,)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)),
        (-0.31, 0.74, (-0.5, 0.0, 0.5, 1.0)),
        (0.0, 199.0, (0, 50, 100, 150, 200)),
        (3.0, 3.0, (2.6, 2.8, 3.0, 3.2, 3.4)),
        (0.0, 0.0, (-0.1, -0.05, 0.0, 0.05, 0.1)),
    ],
)
def test_ticks_are_round_and_enclose_the_range(low: float, high: float, ticks: tuple[float, ...]) -> None:
    assert nice_ticks(low, high) == pytest.approx(ticks, abs=1e-12)


def test_a_chart_draws_each_curve_within_its_frame() -> None:
    long = Curve("learned", tuple(range(100)), tuple(k / 100 for k in range(100)))
    chart = line_chart(
        [long, Curve("true", (0, 50, 99), (0.2, 0.4, 0.3)), Curve("one", (7,), (0.5,))],
        title="Reward",
        description="rises",
        references={"before <em>": 0.35},
    )
    assert chart.count('<path class="line') == 2
    assert chart.count('<path class="raw') == 1  # only the long curve is drawn smoothed over its values
    assert chart.count("<circle") == 1
    assert chart.count('class="legend"') == 3
    assert 'aria-label="Reward. rises"' in chart
    assert "before &lt;em&gt;</text>" in chart
    numbers = [float(number) for path in re.findall(r' d="([^"]*)"', chart) for number in re.findall(r"[\d.-]+", path)]
    assert min(numbers) >= 0
    assert max(numbers) <= 460


def test_a_single_curve_needs_no_legend() -> None:
    chart = line_chart([Curve("learned", (0, 1), (0.0, 1.0))], title="t", description="d", references={})
    assert "legend" not in chart


def test_more_curves_than_can_be_told_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="curves must be 1 to 4, got 5"):
        line_chart([Curve("c", (0,), (0.0,))] * 5, title="t", description="d", references={})
