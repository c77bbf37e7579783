"""What a run writes down of itself, and when."""

import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from overpaint.policy.types import Images, PerSample
from overpaint.training import TrainingConfig, TrainingRun, read_run_record
from overpaint.training.record import commit_of, prompts_record, reward_record


def config_of(folder: Path, **changes: Any) -> TrainingConfig:
    settings: dict[str, Any] = {"iterations": 4, "checkpoint_every": 2, "progress": False} | changes
    return TrainingConfig(output_dir=folder, **settings)


def test_record_is_there_from_the_start_and_complete_at_the_end(stand_in: Callable, tmp_path: Path) -> None:
    policy = stand_in()
    about = {"model": {"weights": "abc"}, "notes": {"path": tmp_path}}
    with TrainingRun(policy, config_of(tmp_path), name="ReFL", about=about) as run:
        first = read_run_record(tmp_path)
        for iteration in run.iterations():
            if iteration == 2:
                assert read_run_record(tmp_path)["sessions"][0]["iterations_done"] == 2
    last = read_run_record(tmp_path)
    assert first["run"] == last["run"]
    assert first["run"] == {
        "name": "ReFL",
        "iterations": 4,
        "trained_weights": sum(weight.numel() for weight in policy.trainable_parameters()),
        "device": first["run"]["device"],
        "processes": 1,
        "precision": "no",
    }
    assert first["run"]["device"].startswith("cpu: ")
    assert first["model"] == {"weights": "abc"}
    assert first["notes"] == {"path": str(tmp_path)}
    assert first["settings"] == json.loads((tmp_path / "run_config.json").read_text())
    assert first["libraries"]["torch"] == version("torch")
    assert (first["sessions"][0]["outcome"], first["sessions"][0]["ended"]) == ("running", None)
    (session,) = last["sessions"]
    assert (session["outcome"], session["first_iteration"], session["iterations_done"]) == ("finished", 0, 4)
    assert session["started"] <= session["ended"]
    assert 0 < session["seconds"] == last["seconds"]


def test_resuming_adds_a_session_and_its_time(stand_in: Callable, tmp_path: Path) -> None:
    def fail_in_the_last_iteration() -> None:
        with TrainingRun(stand_in(), config_of(tmp_path)) as run:
            for iteration in run.iterations():
                assert iteration != 3, "as a reward may"

    with pytest.raises(AssertionError, match="as a reward may"):
        fail_in_the_last_iteration()
    with TrainingRun(stand_in(), config_of(tmp_path, resume=True)) as run:
        list(run.iterations())
    record = read_run_record(tmp_path)
    assert [(s["first_iteration"], s["iterations_done"], s["outcome"]) for s in record["sessions"]] == [
        (0, 3, "failed: AssertionError: as a reward may\nassert 3 != 3"),
        (2, 4, "finished"),
    ]
    assert record["seconds"] == pytest.approx(sum(session["seconds"] for session in record["sessions"]))


def test_loop_that_is_left_has_stopped_early(stand_in: Callable, tmp_path: Path) -> None:
    with TrainingRun(stand_in(), config_of(tmp_path)) as run:
        for _ in run.iterations():
            break
    assert read_run_record(tmp_path)["sessions"][0]["outcome"] == "stopped early"


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format": 0}'])
def test_folder_without_a_readable_record_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json"):
        read_run_record(tmp_path)


def test_prompts_and_rewards_are_told_apart() -> None:
    class Detector:
        differentiable = True

        def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
            raise NotImplementedError

    many = prompts_record(["a cat"] * 7)
    assert (many["count"], many["first"]) == (7, ["a cat"] * 5)
    assert many["sha256"] != prompts_record(["a cat"] * 6 + ["a dog"])["sha256"]
    told = reward_record(Detector())
    assert told["class"].endswith(".Detector")
    assert (told["differentiable"], " at 0x" in told["repr"]) == (True, False)


def test_a_network_that_rewards_is_known_by_its_weights() -> None:
    class Judge(nn.Linear):
        differentiable = True

        def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
            raise NotImplementedError

    judge = Judge(2, 1)
    before = reward_record(judge)
    with torch.no_grad():
        judge.bias.add_(1)
    after = reward_record(judge)
    assert before.keys() == {"class", "differentiable", "weights"}
    assert before["weights"] != after["weights"]


def test_commit_is_that_of_a_checkout_and_none_elsewhere(tmp_path: Path) -> None:
    assert commit_of(tmp_path) is None
    (tmp_path / ".git").mkdir()  # nothing that git would read
    assert commit_of(tmp_path) is None
