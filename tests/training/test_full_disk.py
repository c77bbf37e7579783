"""A disk that is full, read-only or gone: the run ends with the reason, and goes on to the same numbers afterwards."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from overpaint.training import CheckpointFolder, read_metrics, read_run_record

Record = Callable[[str, int], None]
FILLED, CHECKPOINT = 2, 2
"""Iteration after which the disk is full, and that of the last checkpoint until then."""


def pictures(folder: Path) -> dict[str, bytes]:
    """Returns the files of a run's pictures by name."""
    return {file.name: file.read_bytes() for file in (folder / "images").iterdir()}


@pytest.fixture
def whole(train: Callable[..., Any], tmp_path: Path) -> tuple[Any, dict[str, bytes]]:
    """What an undisturbed run leaves."""
    folder = tmp_path / "whole"
    return train(folder, pictures=True, checkpoint_every=2), pictures(folder)


@pytest.fixture
def goes_on(
    train: Callable[..., Any], same: Callable[..., None], whole: tuple[Any, dict[str, bytes]]
) -> Callable[[Path], None]:
    """Resumes a run, and compares all that it leaves with an undisturbed one, bit for bit."""

    def resume(folder: Path) -> None:
        same(train(folder, pictures=True, resume=True), whole[0])
        assert pictures(folder) == whole[1]
        assert not list(folder.rglob("*.partial*"))
        assert read_run_record(folder)["sessions"][-1]["outcome"] == "finished"

    return resume


def at(iteration: int, happens: Callable[[], Any]) -> Callable[[int], None]:
    """Returns what a run calls after each iteration: something that happens after one of them."""
    return lambda done: happens() if done == iteration else None


@pytest.mark.proof
def test_a_run_ends_with_the_reason_wherever_the_disk_gets_full_and_goes_on_once_there_is_room(
    train: Callable[..., Any], goes_on: Callable[[Path], None], small_disk: Any, record_property: Record
) -> None:
    page, ends, places = 4096, 0, set()
    for pages in range(1000):
        folder = small_disk.path / "run"
        error = None
        try:
            train(folder, pictures=True, each=at(FILLED, lambda left=pages: small_disk.fill(leave=left * page)))
        except OSError as raised:
            error = raised
        if error is None:
            break  # with this much room left, all of it fits
        assert error.errno == errno.ENOSPC
        assert "No space left on device" in str(error)
        assert Path(error.filename).is_relative_to(folder)
        places.add(Path(error.filename).parent.name)
        small_disk.clear()
        newest = CheckpointFolder(folder / "checkpoints", keep=3).newest()
        assert newest is not None
        assert newest >= CHECKPOINT
        rows = read_metrics(folder / "metrics.jsonl")
        assert {row["iteration"] for row in rows} >= set(range(newest))
        goes_on(folder)
        shutil.rmtree(folder)
        ends += 1
    assert places >= {"images", "checkpoints"}
    assert ends >= 10
    record_property("disk full: runs that ended with the reason and went on", ends)


@pytest.mark.proof
@pytest.mark.parametrize("part", ["", "checkpoints", "images"])
def test_a_folder_that_becomes_read_only_ends_the_run_and_loses_nothing(
    part: str, train: Callable[..., Any], goes_on: Callable[[Path], None], small_disk: Any, record_property: Record
) -> None:
    folder = small_disk.path / "run"
    mounts: list[Any] = []

    def protect() -> None:
        mounts.append(small_disk.read_only(folder / part))
        mounts[0].__enter__()

    with pytest.raises(OSError, match="Read-only file system") as caught:
        train(folder, pictures=True, each=at(FILLED, protect))
    mounts[0].__exit__(None, None, None)
    assert caught.value.errno == errno.EROFS
    assert Path(caught.value.filename).is_relative_to(folder / part)
    goes_on(folder)
    record_property("read-only folder: runs that ended with the reason and went on", 1)


@pytest.mark.proof
def test_a_folder_that_is_gone_ends_the_run_is_not_made_anew_and_the_run_goes_on_when_it_is_back(
    train: Callable[..., Any], goes_on: Callable[[Path], None], tmp_path: Path, record_property: Record
) -> None:
    folder, aside = tmp_path / "run", tmp_path / "aside"
    with pytest.raises(FileNotFoundError) as caught:
        train(folder, pictures=True, each=at(FILLED, lambda: folder.rename(aside)))
    assert caught.value.filename == str(folder / "metrics.jsonl")
    assert not folder.exists()
    assert any("record of the run could not be completed" in note for note in caught.value.__notes__)
    aside.rename(folder)
    goes_on(folder)
    record_property("vanished folder: runs that ended with the reason and went on", 1)


@pytest.mark.proof
@pytest.mark.parametrize("replaced", [True, False])
def test_a_metrics_file_that_was_taken_away_or_replaced_is_noticed(
    replaced: bool, train: Callable[..., Any], tmp_path: Path, record_property: Record
) -> None:
    metrics = tmp_path / "run" / "metrics.jsonl"

    def take_away() -> None:
        metrics.rename(tmp_path / "earlier")
        if replaced:
            shutil.copy(tmp_path / "earlier", metrics)

    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        train(tmp_path / "run", each=at(FILLED, take_away))
    record_property("vanished folder: metrics that were taken away, noticed", 1)


@pytest.mark.proof
@pytest.mark.parametrize("part", ["checkpoints", "images"])
def test_a_part_that_is_removed_is_made_anew(
    part: str, train: Callable[..., Any], same: Callable[..., None], whole: Any, tmp_path: Path, record_property: Record
) -> None:
    folder = tmp_path / "run"
    outcome = train(folder, pictures=True, each=at(FILLED, lambda: shutil.rmtree(folder / part)))
    same(outcome, whole[0])
    assert CheckpointFolder(folder / "checkpoints", keep=3).newest() == 7
    record_property("vanished folder: parts made anew", 1)


@pytest.mark.proof
def test_a_run_cannot_begin_where_it_could_not_write(
    train: Callable[..., Any], small_disk: Any, record_property: Record
) -> None:
    (small_disk.path / "run").mkdir()
    with small_disk.read_only(small_disk.path / "run"), pytest.raises(OSError, match=r"Read-only .*run_config\.json"):
        train(small_disk.path / "run")
    small_disk.fill(leave=0)
    with pytest.raises(OSError, match=r"No space left on device: '.*run_config\.json'"):
        train(small_disk.path / "run")
    record_property("disk full: runs that did not begin", 2)
