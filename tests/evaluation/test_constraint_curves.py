"""How the constraints of the study's models were weighed."""

import json
from pathlib import Path

from overpaint.evaluation.experiments.constraint_curves import Weighed, ends_table
from overpaint.evaluation.report.charts import svg


def metrics(path: Path, weights: list[float]) -> Path:
    lines = [
        {"iteration": k, "erasure/weight": value, "erasure/violation": -2 * value} for k, value in enumerate(weights)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_curves_are_the_mean_of_the_models_that_had_the_constraint(tmp_path: Path) -> None:
    (tmp_path / "other").write_text('{"iteration": 0, "train/loss": 1.0}\n', encoding="utf-8")
    paths = {"a": metrics(tmp_path / "a", [1.0, 2.0]), "b": metrics(tmp_path / "b", [3.0, 4.0, 5.0])}
    weighed = Weighed.read("held", "erasure", {**paths, "other": tmp_path / "other", "missing": tmp_path / "missing"})
    assert list(weighed.runs) == ["a", "b"]
    charts = weighed.charts()
    assert list(charts) == ["held-violation", "held-weight"]
    assert charts["held-weight"].words == "weight: 2 at 0, 3 at 1."  # two updates are all that both have
    assert charts["held-violation"].words == "violation: -4 at 0, -6 at 1."
    assert "mean of 2 models" in svg(charts["held-weight"].spec)
    assert Weighed.read("held", "floor", paths).charts() == {}


def test_ends_are_of_the_last_ten_updates(tmp_path: Path) -> None:
    weighed = Weighed.read("held", "erasure", {"a": metrics(tmp_path / "a", [100.0, *[1.0, 3.0] * 5])})
    text = ends_table([weighed]).markdown()
    assert "| a | \u22124.000 ± 2.108 | 2.000 ± 1.054 |" in text
