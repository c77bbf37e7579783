"""Generation that is killed and continued ends like one that was not, at whatever moment the kill comes."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from overpaint.evaluation import ImageFolder
from overpaint.evaluation.images.files import read_image_rows

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("killed_generation.py")


@pytest.fixture(scope="module")
def drawn(pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the program left: folders that were killed, and beside them one that was not."""
    root = tmp_path_factory.mktemp("killed")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), str(root), str(pipeline_dir)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return root


def contents(root: Path) -> dict[str, bytes]:
    """Everything that must be the same: all but the seconds that rows tell."""
    files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    rows = [json.loads(line) for line in files.pop("m/manifest.jsonl").splitlines()]
    return {**files, "rows": json.dumps([{**row, "seconds": 0} for row in rows]).encode()}


def assert_whole(root: Path) -> None:
    folder = ImageFolder.open(root, "m")
    rows = read_image_rows(root / "m")
    assert [row.file for row in rows] == [image.file_name for image in folder.planned]
    for row in rows:
        assert row.sha256 == hashlib.sha256((root / "m" / row.file).read_bytes()).hexdigest()


@pytest.mark.proof("generation killed and gone on with, to the byte")
def test_a_kill_at_any_file_operation_changes_nothing(drawn: Path) -> None:
    killed = sorted((drawn / "every").glob("killed-*"))
    assert len(killed) > 3 * 4  # each of the four images is opened, renamed and given a row
    for root in killed:
        assert_whole(root)
        assert contents(root) == contents(drawn / "every" / "whole"), root.name


@pytest.mark.proof("generation killed and gone on with, to the byte")
def test_ten_kills_at_random_moments_leave_a_stable_diffusions_images_to_the_byte(drawn: Path) -> None:
    assert_whole(drawn / "random" / "killed")
    assert contents(drawn / "random" / "killed") == contents(drawn / "random" / "whole")


@pytest.mark.proof("generation killed and gone on with, to the byte")
def test_two_processes_of_which_one_is_killed_leave_what_one_alone_does(drawn: Path) -> None:
    killed = sorted((drawn / "two").glob("killed-*"))
    assert len(killed) == 12
    for root in killed:
        assert_whole(root)
        assert contents(root) == contents(drawn / "two" / "whole"), root.name


@pytest.mark.slow
def test_two_processes_that_accelerate_counts_leave_what_one_alone_does(
    pipeline_dir: Path, tmp_path: Path, torchrun: Callable[..., str]
) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "from overpaint.evaluation import DrawConfig, generate, plan\n"
        "from overpaint.policy import DiffusionPolicy\n"
        "from overpaint.training import process_state\n"
        "state = process_state()\n"
        "assert state.num_processes == int(sys.argv[3])\n"
        "policy = DiffusionPolicy.from_pretrained(sys.argv[1], device='cpu')\n"
        "planned = plan({'benign': ['a red circle', 'a blue dog', 'a cat', 'two dogs', 'a green square']})\n"
        "generate(policy, planned, sys.argv[2], DrawConfig(steps=2), model='m', batch_size=2, progress=False)\n"
        "state.wait_for_everyone()\n"
        "state.destroy_process_group()\n",
        encoding="utf-8",
    )
    for processes, root in ((2, "two"), (1, "one")):
        torchrun(program, pipeline_dir, tmp_path / root, processes, processes=processes)
    assert_whole(tmp_path / "two")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
