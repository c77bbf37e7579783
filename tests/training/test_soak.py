"""Long trainings hold no more memory and no more open files at their end than after their first hundreds of updates."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UPDATES, WARM_UP = 2000, 500


@pytest.mark.proof
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads what the process holds from /proc")
@pytest.mark.parametrize("trainer", ["refl", "ddpo"])
def test_two_thousand_updates_hold_no_more_than_five_hundred(
    trainer: str, tmp_path: Path, pipeline_dir: Path, record_property: Callable[[str, object], None]
) -> None:
    program = Path(__file__).with_name("soaking_program.py")
    command = [sys.executable, str(program), str(tmp_path), str(pipeline_dir), trainer, str(UPDATES)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    seen = [row for row in json.loads((tmp_path / "seen.json").read_text()) if row[0] >= WARM_UP]
    updates, memory, files = zip(*seen, strict=True)
    assert len(seen) >= 30
    assert statistics.linear_regression(updates, memory).slope * 1000 < 1, memory
    assert len(set(files)) == 1, files
    record_property("updates without growing", UPDATES)
