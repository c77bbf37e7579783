"""Checkpoints on the disk."""

import hashlib
import json
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overpaint.training import Checkpoint, CheckpointFolder, DamagedCheckpointError, load_checkpoint

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=12,
)


@given(TREES)
@settings(max_examples=40, deadline=None)
def test_state_survives_with_its_types(value: Any) -> None:
    with TemporaryDirectory() as folder:
        path = CheckpointFolder(Path(folder), keep=1).save(Checkpoint(1, {"w": torch.zeros(1)}, {"value": value}))
        restored = load_checkpoint(path).state["value"]
    assert restored == value
    assert repr(restored) == repr(value)  # tells 1 from 1.0 and from True


def test_tensors_of_the_state_keep_their_type(tmp_path: Path) -> None:
    state = {"moments": {0: torch.arange(3, dtype=torch.bfloat16)}, "keys": torch.arange(2, dtype=torch.int64)}
    restored = load_checkpoint(CheckpointFolder(tmp_path, keep=1).save(Checkpoint(1, {}, state))).state
    assert (restored["moments"][0].dtype, restored["keys"].dtype) == (torch.bfloat16, torch.int64)
    assert restored["moments"][0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("value", [np.arange(2), Path("somewhere"), print])
def test_what_could_not_be_read_again_is_refused_when_it_is_saved(value: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="state must be made of dicts, lists, tuples, numbers, strings and tensors"):
        CheckpointFolder(tmp_path, keep=1).save(Checkpoint(1, {}, {"a": [1, value]}))
    assert CheckpointFolder(tmp_path, keep=1).newest() is None


def test_a_state_that_would_run_code_is_damaged(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "ran").touch, ())

    path = CheckpointFolder(tmp_path / "run", keep=1).save(_checkpoint(3))
    torch.save({"a": Bomb()}, path / "state.pt")
    manifest = json.loads((path / "manifest.json").read_text())
    content = (path / "state.pt").read_bytes()
    manifest["files"]["state.pt"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedCheckpointError, match=r"state\.pt must hold tensors, numbers and texts only"):
        load_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def _checkpoint(iteration: int) -> Checkpoint:
    return Checkpoint(iteration, {"w": torch.full((3,), float(iteration))}, {"ordered": OrderedDict(a=1)})


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=2)
    for iteration in (5, 10, 100_000_000, 1_000_000_000):
        folder.save(_checkpoint(iteration))
    names = [path.name for path in folder.checkpoints()]
    assert names == ["iteration-100000000", "iteration-1000000000"]
    assert folder.newest() == 1_000_000_000
    assert {path.name for path in folder.path.iterdir()} == set(names)


def test_manifest_has_size_and_hash_of_every_other_file(tmp_path: Path) -> None:
    path = CheckpointFolder(tmp_path, keep=1).save(_checkpoint(3))
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["iteration"] == 3
    assert set(manifest["files"]) == {file.name for file in path.iterdir()} - {"manifest.json"}
    for name, entry in manifest["files"].items():
        assert entry["bytes"] == (path / name).stat().st_size
        assert len(entry["sha256"]) == 64


def test_checkpoint_reads_back_as_it_was(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(CheckpointFolder(tmp_path, keep=1).save(_checkpoint(3)))
    assert checkpoint.iteration == 3
    assert torch.equal(checkpoint.weights["w"], torch.full((3,), 3.0))
    assert checkpoint.state == {"ordered": {"a": 1}}


@pytest.mark.proof("damaged checkpoints set aside, completed or refused")
@pytest.mark.parametrize("file", ["weights.safetensors", "state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_damaged_newest_checkpoint_is_set_aside_for_the_one_before(file: str, damage: str, tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=3)
    for iteration in (1, 2, 3):
        newest = folder.save(_checkpoint(iteration))
    content = bytearray((newest / file).read_bytes())
    if damage == "missing":
        (newest / file).unlink()
    elif damage == "truncated":
        (newest / file).write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        (newest / file).write_bytes(content)
    with pytest.raises(DamagedCheckpointError):
        load_checkpoint(newest)
    with pytest.warns(RuntimeWarning, match=r"iteration-00000003 is damaged \(.+\); going on from iteration-00000002"):
        assert folder.newest() == 2
    assert {path.name for path in tmp_path.iterdir()} == {
        "iteration-00000001",
        "iteration-00000002",
        "damaged-iteration-00000003",
    }
    assert folder.newest() == 2  # without another warning


@pytest.mark.proof("damaged checkpoints set aside, completed or refused")
def test_folder_whose_checkpoints_are_all_damaged_is_an_error_and_left_alone(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=3)
    assert folder.newest() is None
    (folder.save(_checkpoint(1)) / "manifest.json").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"all are damaged: iteration-00000001: FileNotFoundError"):
        folder.newest()
    assert [path.name for path in folder.checkpoints()] == ["iteration-00000001"]


@pytest.mark.proof("damaged checkpoints set aside, completed or refused")
def test_checkpoint_whose_manifest_is_another_ones_is_damaged(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=3)
    for iteration in (1, 2):
        folder.save(_checkpoint(iteration))
    manifest = tmp_path / "iteration-00000002" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"iteration": 2', '"iteration": 3'))
    with pytest.warns(RuntimeWarning, match="its manifest is that of iteration 3"):
        assert folder.newest() == 1


@pytest.mark.proof("damaged checkpoints set aside, completed or refused")
def test_checkpoint_of_another_format_is_told(tmp_path: Path) -> None:
    path = CheckpointFolder(tmp_path, keep=3).save(_checkpoint(1)) / "manifest.json"
    path.write_text(path.read_text().replace('"format": 3', '"format": 4'))
    with pytest.raises(DamagedCheckpointError, match="format must be 3, got 4"):
        load_checkpoint(path.parent)


def test_saving_over_a_checkpoint_replaces_it_and_removes_leftovers(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=3)
    (tmp_path / ".partial-iteration-00000009").mkdir()
    folder.save(_checkpoint(3))
    folder.save(_checkpoint(3)._replace(weights={"w": torch.zeros(1)}))
    assert [path.name for path in tmp_path.iterdir()] == ["iteration-00000003"]
    assert folder.load(3).weights["w"].tolist() == [0]


@pytest.mark.proof("damaged checkpoints set aside, completed or refused")
@pytest.mark.parametrize("dies_in", ["rename", "rmtree"])
def test_a_save_that_was_killed_before_it_dropped_the_oldest_is_completed_when_the_folder_is_opened(
    dies_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    for iteration in (1, 2):
        folder.save(_checkpoint(iteration))
    owner: Any = Path if dies_in == "rename" else shutil
    real, calls = getattr(owner, dies_in), []

    def dying(path: Path, *args: Any, **options: Any) -> Any:
        calls.append(path)
        if path.name == "iteration-00000001" or dies_in == "rmtree":
            raise KeyboardInterrupt
        return real(path, *args, **options)

    monkeypatch.setattr(owner, dies_in, dying)
    with pytest.raises(KeyboardInterrupt):
        folder.save(_checkpoint(3))
    monkeypatch.undo()
    assert calls
    assert len(list(tmp_path.iterdir())) == 3
    assert folder.newest() == 3
    assert {path.name for path in tmp_path.iterdir()} == {"iteration-00000002", "iteration-00000003"}


def test_run_rotates_its_checkpoints(train: Callable, tmp_path: Path) -> None:
    train(tmp_path, keep_checkpoints=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["iteration-00000006", "iteration-00000007"]  # every second, and the last


def test_a_run_leaves_tensors_and_json_alone(train: Callable, tmp_path: Path) -> None:
    train(tmp_path)
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".pt", ".json", ".jsonl"}
