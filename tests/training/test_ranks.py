"""A process that fails ends the others with its error; what they saved is whole, and any number of them goes on."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from overpaint.training import load_checkpoint

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("failing_rank_program.py")
SECONDS = 60
"""After which all processes have to have ended."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def start(folder: Path, failure: str, *, rank: int = 1, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Runs the program to its end, however that comes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    folder.mkdir(exist_ok=True)
    return subprocess.run(
        [*command, str(PROGRAM), str(folder), failure, str(rank)], env=environment, capture_output=True, text=True
    )


def assert_close(folder: Path, whole: Path) -> None:
    for name in ("weights", "average"):
        found, expected = (load_file(one / f"{name}.safetensors") for one in (folder, whole))
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes in which nothing fails."""
    folder = tmp_path_factory.mktemp("whole")
    done = start(folder, "none")
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.proof("failing processes: the others ended with the error, the run went on")
@pytest.mark.parametrize(
    ("failure", "rank", "processes"),
    [
        ("ValueError", 1, 2),
        ("ValueError", 0, 2),
        ("KeyError", 1, 2),
        ("OSError", 1, 2),
        ("MemoryError", 0, 2),
        ("KeyboardInterrupt", 1, 2),
        ("SystemExit", 1, 2),
        ("RecursionError", 3, 4),
        ("killed", 1, 2),
        ("killed", 0, 2),
        ("killed", 2, 4),
    ],
)
def test_one_process_that_fails_ends_all_with_its_error_and_the_run_goes_on(
    failure: str, rank: int, processes: int, whole: Path, tmp_path: Path
) -> None:
    done = start(tmp_path, failure, rank=rank, processes=processes)
    assert done.returncode != 0
    assert time.time() - float((tmp_path / "failed-at").read_text()) < SECONDS
    word = "SIGKILL" if failure == "killed" else "as the test wants it"
    assert word in done.stderr, done.stderr[-4000:]
    assert load_checkpoint(tmp_path / "checkpoints" / "iteration-00000003").iteration == 3
    again = start(tmp_path, "none", processes=processes)
    assert again.returncode == 0, again.stderr[-4000:]
    assert_close(tmp_path, whole)


@pytest.mark.proof("runs that went on with another number of processes")
@pytest.mark.parametrize("processes", [1, 4])
def test_another_number_of_processes_goes_on_to_the_same_weights(processes: int, whole: Path, tmp_path: Path) -> None:
    start(tmp_path, "killed")
    done = start(tmp_path, "none", processes=processes)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"the checkpoint has the global generators of 2 processes, and there are {processes} now" in done.stderr
    assert_close(tmp_path, whole)
