"""Checkpoints on the disk."""

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overpaint.training import Checkpoint, CheckpointFolder, DamagedCheckpointError, load_checkpoint
from overpaint.training.tree import pack, unpack

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=12,
)


@given(TREES)
@settings(max_examples=40, deadline=None)
def test_packed_values_survive_json_with_their_types(value: Any) -> None:
    packed, tensors = pack(value)
    restored = unpack(json.loads(json.dumps(packed)), tensors)
    assert restored == value
    assert repr(restored) == repr(value)  # tells 1 from 1.0 and from True


def test_packed_tensors_are_copies_of_the_same_type() -> None:
    tensor = torch.arange(3, dtype=torch.bfloat16)
    value = {0: [tensor, tensor], "array": np.arange(2, dtype=np.uint32), "scalar": np.float64(0.1)}
    packed, tensors = pack(value, "optimizer")
    assert set(tensors) == {"optimizer/0/0", "optimizer/0/1", "optimizer/array"}
    tensor += 1
    restored = unpack(packed, tensors)
    assert restored[0][1].dtype == torch.bfloat16
    assert restored[0][1].tolist() == [0, 1, 2]
    assert restored["array"].dtype == np.uint32
    assert restored["scalar"] == 0.1


def test_what_cannot_be_packed_is_named() -> None:
    with pytest.raises(TypeError, match="state/a/1 must be made of"):
        pack({"a": [1, {2, 3}]}, "state")


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


@pytest.mark.parametrize("file", ["weights.safetensors", "state.safetensors", "state.json", "manifest.json"])
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


def test_folder_whose_checkpoints_are_all_damaged_is_an_error_and_left_alone(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=3)
    assert folder.newest() is None
    (folder.save(_checkpoint(1)) / "manifest.json").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"all are damaged: iteration-00000001: FileNotFoundError"):
        folder.newest()
    assert [path.name for path in folder.checkpoints()] == ["iteration-00000001"]


def test_checkpoint_whose_manifest_is_another_ones_is_damaged(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=3)
    for iteration in (1, 2):
        folder.save(_checkpoint(iteration))
    manifest = tmp_path / "iteration-00000002" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"iteration": 2', '"iteration": 3'))
    with pytest.warns(RuntimeWarning, match="its manifest is that of iteration 3"):
        assert folder.newest() == 1


def test_checkpoint_of_another_format_is_told(tmp_path: Path) -> None:
    path = CheckpointFolder(tmp_path, keep=3).save(_checkpoint(1)) / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(DamagedCheckpointError, match="format must be 1, got 2"):
        load_checkpoint(path.parent)


def test_saving_over_a_checkpoint_replaces_it_and_removes_leftovers(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=3)
    (tmp_path / ".partial-iteration-00000009").mkdir()
    folder.save(_checkpoint(3))
    folder.save(_checkpoint(3)._replace(weights={"w": torch.zeros(1)}))
    assert [path.name for path in tmp_path.iterdir()] == ["iteration-00000003"]
    assert folder.load(3).weights["w"].tolist() == [0]


def test_run_rotates_its_checkpoints(train: Callable, tmp_path: Path) -> None:
    train(tmp_path, keep_checkpoints=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["iteration-00000006", "iteration-00000007"]  # every second, and the last


def test_nothing_in_a_checkpoint_is_a_pickle(train: Callable, tmp_path: Path) -> None:
    train(tmp_path)
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json", ".jsonl"}
