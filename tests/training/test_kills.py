"""Every kind of training, killed at twenty random moments, ends bit for bit as one that was not."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.training.killed_trainings import KINDS

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("killed_trainings.py")
KILLS = 20


def numbers(folder: Path) -> list[dict[str, Any]]:
    """The rows of the metrics, without how long anything took."""
    files = sorted(folder.rglob("metrics.jsonl"))  # a method may train several times
    assert files
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("seconds/")} for row in rows]


def pictures(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.png")}


def check(kind: str, kills: int, root: Path, pipeline: Path) -> dict[str, int]:
    """Runs the program, and holds every folder to what the undisturbed one has; returns the counts."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "golden")])}
    command = [sys.executable, str(PROGRAM), str(root), str(pipeline), kind, str(kills)]
    done = subprocess.run(command, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    whole = root / "whole"
    expected = load_file(whole / "end.safetensors")
    for folder in sorted(root.glob("killed-*")):
        found = load_file(folder / "end.safetensors")
        assert found.keys() == expected.keys()
        assert all(found[name].equal(value) for name, value in expected.items()), folder.name
        assert numbers(folder) == numbers(whole), folder.name
        assert pictures(folder) == pictures(whole), folder.name
        assert not list(folder.glob("checkpoints/.partial*")), folder.name
        assert sorted(path.name for path in folder.glob("checkpoints/*")) == sorted(
            path.name for path in whole.glob("checkpoints/*")
        )
    return json.loads((root / "counts.json").read_text())


@pytest.mark.proof
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_that_is_killed_twenty_times_ends_as_one_that_was_not(
    kind: str, tmp_path: Path, pipeline_dir: Path, record_property: Callable[[str, object], None]
) -> None:
    counts = check(kind, KILLS, tmp_path, pipeline_dir)
    assert counts["killed"] >= KILLS
    record_property("kills survived, to the bit", counts["killed"])
    record_property("kills survived, of them amid a checkpoint", counts["inside"])
    record_property("trainings killed and resumed", counts["runs"])


def test_three_kills_of_refl_change_nothing(tmp_path: Path, pipeline_dir: Path) -> None:
    assert check("refl-images", 3, tmp_path, pipeline_dir)["killed"] >= 3
