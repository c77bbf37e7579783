"""Arms are timed in turn, and results are written whole."""

import json
import math
from pathlib import Path

import pytest

from benchmarks import timing
from overpaint.settings import AnyPath, settings


@settings
class Config:
    """Where results go."""

    output: AnyPath | None = None


def test_each_arm_goes_first_in_turn_and_warm_up_is_not_counted() -> None:
    order: list[str] = []
    arms = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = timing.take_turns(arms, range(4), warm_up=1, timer=lambda work: (work(), float(len(order)))[1])
    assert "".join(order) == "abcbcacababc"
    assert times == {"a": [6.0, 8.0, 10.0], "b": [4.0, 9.0, 11.0], "c": [5.0, 7.0, 12.0]}


def test_ratio_is_that_of_the_medians() -> None:
    assert timing.ratio([3.0, 1.0, 100.0], [2.0, 2.0, 4.0]) == pytest.approx(1.5)


def test_comparison_has_medians_quartiles_ratio_and_target() -> None:
    text = timing.comparison({"trainer": [1.0, 2.0, 3.0], "bare": [1.0, 1.0, 1.0]}, unit="rounds", target=1.1)
    assert text.splitlines() == [
        "  trainer  2.000 CPU-seconds (quartiles 1.000 and 3.000, 3 rounds)",
        "  bare     1.000 CPU-seconds (quartiles 1.000 and 1.000, 3 rounds)",
        "  ratio    2.000 (target: at most 1.10)",
    ]


def test_what_was_not_measured_is_null_in_the_file(tmp_path: Path) -> None:
    config = Config(output=tmp_path / "results.json")
    timing.write_results(config.output, config, rows=[{"rate": math.nan, "pair": (1.0, math.inf)}])
    written = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert written["rows"] == [{"rate": None, "pair": [1.0, None]}]
    assert written["config"] == {"output": str(config.output)}


def test_without_a_file_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    timing.write_results(None, Config())
    assert list(tmp_path.iterdir()) == []
