"""A run that was interrupted ends like one that was not."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from overpaint.training import DamagedCheckpointError, TrainingConfig, TrainingRun

EVERYTHING = {"ema_decay": 0.7}


@pytest.fixture(scope="module")
def uninterrupted(train: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train(tmp_path_factory.mktemp("whole"), **EVERYTHING)


@pytest.mark.parametrize("die_at", range(7))
def test_resumed_equals_uninterrupted(
    die_at: int, uninterrupted: Any, train: Callable, killed: type[Exception], same: Callable, tmp_path: Path
) -> None:
    with pytest.raises(killed):
        train(tmp_path / "run", die_at=die_at, **EVERYTHING)
    torch.manual_seed(12345)  # a new process has other generators
    same(train(tmp_path / "run", resume=True, **EVERYTHING), uninterrupted)


def test_two_interruptions_are_as_good_as_one(
    uninterrupted: Any, train: Callable, killed: type[Exception], same: Callable, tmp_path: Path
) -> None:
    for die_at in (3, 5):
        with pytest.raises(killed):
            train(tmp_path / "run", die_at=die_at, resume=True, **EVERYTHING)
    same(train(tmp_path / "run", resume=True, **EVERYTHING), uninterrupted)


def test_same_seed_gives_the_same_run_and_another_seed_another(
    uninterrupted: Any, train: Callable, same: Callable, tmp_path: Path
) -> None:
    same(train(tmp_path / "again", **EVERYTHING), uninterrupted)
    other = train(tmp_path / "other", seed=1, **EVERYTHING)
    assert other.metrics[0] != uninterrupted.metrics[0]


def test_run_with_a_damaged_newest_checkpoint_resumes_from_the_one_before(
    uninterrupted: Any, train: Callable, killed: type[Exception], same: Callable, tmp_path: Path
) -> None:
    with pytest.raises(killed):
        train(tmp_path / "run", die_at=5, **EVERYTHING)
    file = tmp_path / "run" / "checkpoints" / "iteration-00000004" / "state.pt"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.warns(RuntimeWarning, match=r"iteration-00000004 is damaged.*going on from iteration-00000002"):
        outcome = train(tmp_path / "run", resume=True, **EVERYTHING)
    same(outcome, uninterrupted)
    assert not list((tmp_path / "run" / "checkpoints").glob(".partial*"))


def test_run_whose_checkpoints_are_all_damaged_does_not_start_anew(
    train: Callable, killed: type[Exception], tmp_path: Path
) -> None:
    with pytest.raises(killed):
        train(tmp_path, die_at=5)
    for path in tmp_path.glob("checkpoints/*/weights.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(DamagedCheckpointError, match="all are damaged"):
        train(tmp_path, resume=True)


def test_death_while_a_checkpoint_is_written_leaves_the_one_before(
    uninterrupted: Any,
    train: Callable,
    killed: type[Exception],
    same: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    synced: list[int] = []
    real = os.fsync

    def dying_fsync(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) > 9:  # metrics, four files and two folders in each checkpoint: the second one is half written
            raise killed
        real(descriptor)

    def dead(*arguments: Any, **options: Any) -> None:
        if len(synced) > 9:  # and what is dead cleans nothing up
            raise killed
        remove(*arguments, **options)

    remove = shutil.rmtree
    monkeypatch.setattr(os, "fsync", dying_fsync)
    monkeypatch.setattr(shutil, "rmtree", dead)
    with pytest.raises(killed):
        train(tmp_path / "run", **EVERYTHING)
    monkeypatch.undo()
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == [".partial-iteration-00000004", "iteration-00000002"]
    same(train(tmp_path / "run", resume=True, **EVERYTHING), uninterrupted)


def test_resuming_an_empty_folder_starts_anew(
    uninterrupted: Any, train: Callable, same: Callable, tmp_path: Path
) -> None:
    same(train(tmp_path / "new", resume=True, **EVERYTHING), uninterrupted)


def test_finished_run_resumes_as_finished_and_can_be_prolonged(
    uninterrupted: Any, train: Callable, same: Callable, tmp_path: Path
) -> None:
    train(tmp_path / "run", iterations=5, **EVERYTHING)
    done = train(tmp_path / "run", iterations=5, resume=True, **EVERYTHING)
    assert [entry["iteration"] for entry in done.metrics[::2]] == [0, 1, 2, 3, 4]
    same(train(tmp_path / "run", iterations=7, resume=True, **EVERYTHING), uninterrupted)


def test_folder_with_another_run_is_refused_and_left_alone(train: Callable, tmp_path: Path) -> None:
    train(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"output_dir must not hold another run unless resume is set, got .*metrics"):
        train(tmp_path, learning_rate=0.5)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_folder_that_is_a_file_is_refused(train: Callable, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="output_dir must be a folder"):
        train(tmp_path / "file")


def test_resuming_with_other_settings_is_refused(train: Callable, tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(ValueError, match=r"resume must keep the settings.*training.learning_rate 0.5 instead of 0.01"):
        train(tmp_path, resume=True, learning_rate=0.5)


def test_resuming_with_other_weights_or_state_is_refused(train: Callable, stand_in: Callable, tmp_path: Path) -> None:
    train(tmp_path)
    config = TrainingConfig(output_dir=tmp_path, iterations=7, learning_rate=1e-2, resume=True, progress=False)
    with pytest.raises(ValueError, match=r"state must name \['dual'\]"), TrainingRun(stand_in(), config):
        pass
    policy = stand_in()
    policy.unet[0].bias.requires_grad_(True)
    state = {"dual": torch.nn.Linear(1, 1)}
    with pytest.raises(ValueError, match=r"same weights.*'0.bias'"), TrainingRun(policy, config, state=state):
        pass


def test_metrics_after_the_checkpoint_are_dropped_before_they_are_written_again(
    train: Callable, killed: type[Exception], tmp_path: Path
) -> None:
    with pytest.raises(killed):
        train(tmp_path, die_at=5)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"iteration": 5, "train/lo')  # cut off by a kill
    resumed = train(tmp_path, resume=True)
    assert [entry["iteration"] for entry in resumed.metrics] == [i // 2 for i in range(14)]
    assert all(json.loads(line) for line in path.read_text().splitlines())


@pytest.mark.parametrize(
    "settings", [{"schedule": "cosine", "warmup_iterations": 3}, {"optimizer": "adafactor", "schedule": "linear"}]
)
def test_schedules_and_adafactor_resume_to_the_same_numbers(
    settings: dict[str, Any], train: Callable, killed: type[Exception], same: Callable, tmp_path: Path
) -> None:
    whole = train(tmp_path / "whole", **settings)
    with pytest.raises(killed):
        train(tmp_path / "run", die_at=5, **settings)
    same(train(tmp_path / "run", resume=True, **settings), whole)


def test_another_length_changes_a_schedule_and_is_refused(
    train: Callable, killed: type[Exception], tmp_path: Path
) -> None:
    with pytest.raises(killed):
        train(tmp_path, die_at=5, schedule="linear")
    with pytest.raises(ValueError, match=r"training.iterations 9 instead of 7"):
        train(tmp_path, resume=True, schedule="linear", iterations=9)
