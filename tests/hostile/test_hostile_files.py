"""Files that mean harm are refused in words, by everything that reads such files, and nothing in them is run."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SECONDS, GROWTH = 60, 600
"""What a refusal may take at most, in time and in MiB."""


@pytest.mark.slow
@pytest.mark.proof
def test_hostile_files_are_refused_by_name_with_little_time_and_memory_and_nothing_is_run(
    pipeline_dir: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    root = HERE.parents[1]
    program, environment = HERE / "hostile_files_program.py", os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, str(program), str(pipeline_dir), str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) > 500
    assert not [one for one in found if one["executed"]]
    assert not [one for one in found if not {"ValueError", "DamagedCheckpointError"} & set(one["kinds"])]
    assert not [one for one in found if not any(name in one["told"] for name in one["names"])]
    assert not [one for one in found if one["seconds"] > SECONDS or one["grown"] > GROWTH]
    record_property("hostile files refused", len(found))
