"""Every probe, killed at twenty random moments and begun again, finds what one finds that was not."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from overpaint.evaluation.probes.registry import PROBES
from overpaint.evaluation.probes.result import ProbeResult

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = Path(__file__).with_name("killed_probes.py")
KILLS = 20


def files(folder: Path) -> dict[str, bytes]:
    """Pictures, ceilings and floors; what a kill left half written does not count."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != "result.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found if path.suffix != ".partial"}


def check(name: str, kills: int, root: Path) -> int:
    """Runs the program, and holds every folder to what the undisturbed one has; returns how many kills there were."""
    command = [sys.executable, str(PROGRAM), str(root), name, str(kills)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    whole = root / "whole"
    expected = replace(ProbeResult.load(whole / "result.json"), seconds=0.0)
    for folder in sorted(root.glob("killed-*")):
        assert replace(ProbeResult.load(folder / "result.json"), seconds=0.0) == expected, folder.name
        assert files(folder) == files(whole), folder.name
    return json.loads((root / "counts.json").read_text())["killed"]


@pytest.mark.proof
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", PROBES)
def test_a_probe_that_is_killed_twenty_times_finds_what_one_finds_that_was_not(
    name: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    killed = check(name, KILLS, tmp_path)
    assert killed >= KILLS
    record_property("kills of probes that changed nothing", killed)


def test_three_kills_of_a_probe_change_nothing(tmp_path: Path) -> None:
    assert check("noise", 3, tmp_path) >= 3
