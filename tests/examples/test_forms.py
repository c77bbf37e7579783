"""The forms of the main job: the erasure alone, subject to a floor of the reward, and what is made of it afterwards."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from erasure import Erasure, StrengthSearch, Trial
from examples import refl_erase_nudity as program
from overpaint.evaluation.experiments.program import settings_from_command_line
from overpaint.evaluation.experiments.reward_floor import strength_chart
from overpaint.training import read_metrics
from tests.examples.of_a_user import CONCEPT, SETTINGS, YAML

ESD = ["--method", "esd", "--eraser.descent.iterations", "3", "--eraser.descent.learning-rate", "1e-3"]
ESD += ["--eraser.steps", "2", "--eraser.train", "xattn"]
RECEIVE = ["--settings", "recovery.yaml"]


@pytest.fixture(autouse=True)
def model(here: Path, pipeline_dir: Path) -> None:
    """The user's model as a folder, and settings without those of a method."""
    Path("model").symlink_to(pipeline_dir)
    Path("mine.yaml").write_text(re.sub(r"eraser: .*\n", "", YAML))


def run(folder: str, *options: str) -> dict[str, Any]:
    """Runs the main job on the user's model and concept, and returns its numbers."""
    words = ["--policy", "model", *SETTINGS, *RECEIVE, *CONCEPT, *options, "--output-dir", folder]
    program.main(settings_from_command_line(program.Config, program.complete, words))
    return json.loads(Path(folder, "comparison.json").read_text())


def test_plain_erases_and_no_more() -> None:
    found = run("plain", "--form", "plain")
    assert found["models"] == ["before", "erased"]
    assert Path("plain/pipeline/model_index.json").is_file()
    assert Path("plain/erasure/erasure.json").is_file()
    assert not [name for name in ("lora", "metrics.jsonl", "checkpoints") if Path("plain", name).exists()]
    page = Path("plain/report.html").read_text()
    assert "UCE was applied to model, against gogh." in page
    assert "ReFL then" not in page
    with pytest.raises(ValueError, match="output_dir must not hold another erasure, got plain"):
        run("plain", "--form", "plain")


def test_of_a_method_with_a_strength_the_strongest_setting_above_the_floor_is_taken() -> None:
    run("lax", "--form", "A", "--floor", "10")
    assert Erasure.load("lax/erasure").config["strength"] == 1.0
    found = run("strict", "--form", "A", "--floor", "0", "--strength", "4")
    assert found["models"] == ["before", "erased"]
    config = Erasure.load("strict/erasure").config
    assert config["search"]["strongest"] == 4.0
    assert 0 <= config["strength"] <= 4
    page = Path("strict/report.html").read_text()
    assert "Strength of the erasure against the reward" in page
    assert "UCE above a floor of the reward was applied" in page
    assert "--form A" in Path("strict/README.md").read_text()


def test_a_method_that_trains_and_has_a_strength_trains_once() -> None:
    small = ["--eraser.descent.iterations", "2", "--eraser.images", "1", "--eraser.steps", "2"]
    small += ["--eraser.templates", "a {}", "--eraser.prior", "a cat", "--eraser.prior-size", "None"]
    run("mace", "--form", "A", "--method", "mace", "--floor", "0", *small)
    (metrics,) = Path("mace/erasing").glob("phrase-*/metrics.jsonl")
    assert len(list(read_metrics(metrics))) == 2
    assert "search" in Erasure.load("mace/erasure").config


def test_of_a_method_with_a_loss_it_is_trained_with_the_reward_above_its_floor() -> None:
    found = run("floored", "--form", "A", "--floor", "0.125", *ESD)
    assert found["models"] == ["before", "erased"]
    logged = list(read_metrics(Path("floored/erasing/metrics.jsonl")))
    assert len([entry for entry in logged if "floor/weight" in entry]) == 3  # the method's own iterations
    first = next(entry for entry in logged if "floor/violation" in entry)
    assert first["floor/violation"] == pytest.approx(-0.5, abs=1e-5)  # paired with itself, before the first update
    assert "train/pretraining_loss" not in first
    assert first["erasure/weight"] == 1.0
    erasure = Erasure.load("floored/erasure")
    assert (erasure.method, erasure.config["floor"]["slack"]) == ("ESD", 0.125)
    assert all(".attn2." in name for name in erasure.delta.tensors)  # what the method trains, and no LoRA
    page = Path("floored/report.html").read_text()
    assert "Erasing above the reward&#39;s floor" in page or "Erasing above the reward's floor" in page
    assert "Weight of the floor" in page

    both = run("both", "--form", "A+B", "--floor", "0.125", *ESD)
    assert both["models"] == ["before", "erased", "recovered"]
    again = Erasure.load("both/erasure")
    assert all(torch.equal(value, again.delta.tensors[name]) for name, value in erasure.delta.tensors.items())
    assert Path("both/lora").is_dir()


def test_a_reward_that_joins_a_recovery_late_counts_from_the_first_update_above_the_floor() -> None:
    late = ["--constraint", "destruction", "--destruction.pictures", "4", "--refl.reward-from", "1"]
    found = run("late", "--form", "A+B", "--floor", "0.125", *ESD, *late)
    assert found["models"] == ["before", "erased", "recovered"]
    logged = list(read_metrics(Path("late/erasing/metrics.jsonl")))
    assert len([entry for entry in logged if "floor/violation" in entry]) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--form", "A", "--erasure", "somewhere"], "form must be B for a model that is erased already, got A"),
        (["--form", "plain", "--ceiling", "1"], "ceiling must be left out with the form plain, which recovers nothing"),
        (["--form", "A", "--attacked"], "attacked must be left out with the form A, which recovers nothing, got True"),
        (
            ["--form", "A", "--constraint", "none"],
            "constraint must be left out with the form A, which recovers nothing",
        ),
        (["--form", "A", "--method", "esd", "--strength", "2"], "strength must be 1 with ESD, which has none, got 2"),
        (["--form", "A", "--strength", "0"], "strength must be above 0, the original model, .* with UCE, got 0"),
    ],
)
def test_what_contradicts_is_said_before_any_work(options: list[str], message: str) -> None:
    with pytest.raises((ValueError, SystemExit)) as refused:
        run("nothing", *options)
    assert re.search(message, str(refused.value))
    assert not Path("nothing").exists()


def test_the_chart_of_a_search_tells_strengths_the_floor_and_what_is_not_sure() -> None:
    trials = (Trial(0.0, 0.5, 0.0, 0.0), Trial(0.5, 0.45, -0.05, 0.01), Trial(1.0, 0.2, -0.3, 0.02))
    chart = strength_chart(StrengthSearch(0.4, trials[1], trials, monotone=True), "ImageReward")
    assert "0.5 at 0, 0.45 at 0.5, 0.2 at 1" in chart.words
    assert '"floor"' in json.dumps(chart.spec)
    assert "strongest setting that keeps the floor is 0.5, with 0.45" in chart.caption
    assert "did not fall" not in chart.caption
    unsure = strength_chart(StrengthSearch(0.4, trials[1], trials, monotone=False), "ImageReward")
    assert "a stronger setting that was not tried may do, too" in unsure.caption
