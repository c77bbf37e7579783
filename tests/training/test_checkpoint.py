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

from training import Checkpoint, CheckpointFolder, load_checkpoint
from training.tree import pack, unpack

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
