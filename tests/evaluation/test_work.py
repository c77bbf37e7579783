"""Pieces of work that several processes share."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from overpaint.evaluation.experiments.work import work_through


class Piece(NamedTuple):
    name: str
    needs: str = ""

    @property
    def label(self) -> str:
        return self.name


def make(piece: Piece, folder: Path) -> None:
    assert torch.get_num_threads() == 1
    if piece.name == "broken":
        raise ValueError("this one is broken")
    if piece.needs:
        assert (folder / piece.needs).read_text() == "made"
    (folder / piece.name).write_text("made")


def test_each_stage_waits_for_the_one_before_and_nothing_is_done_twice(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("made")
    touched = (tmp_path / "a").stat().st_mtime_ns
    stages = [[Piece("a"), Piece("b")], [Piece("c", needs="b"), Piece("d", needs="a")], [Piece("e", needs="d")]]
    work_through(stages, lambda p: (tmp_path / p.name).is_file(), partial(make, folder=tmp_path), workers=2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b", "c", "d", "e"]
    assert (tmp_path / "a").stat().st_mtime_ns == touched


def test_error_of_a_piece_ends_the_work_and_keeps_what_is_done(tmp_path: Path) -> None:
    stages = [[Piece("first"), Piece("broken")], [Piece("later")]]
    with pytest.raises(ValueError, match="this one is broken"):
        work_through(stages, lambda p: (tmp_path / p.name).is_file(), partial(make, folder=tmp_path), workers=1)
    assert [file.name for file in tmp_path.iterdir()] == ["first"]


ENDLESS = """
import os, time
from pathlib import Path
from overpaint.evaluation.experiments.work import work_through
from tests.evaluation.test_work import Piece, last

if __name__ == "__main__":
    work_through([[Piece("endless")]], lambda p: False, last, workers=1)
"""


def last(piece: Piece) -> None:
    Path(os.environ["TOLD"]).write_text(str(os.getpid()))
    time.sleep(600)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="tells the living from the dead by /proc")
def test_workers_end_with_who_began_them_even_if_that_is_killed(tmp_path: Path) -> None:
    program, told = tmp_path / "program.py", tmp_path / "pid"
    program.write_text(ENDLESS)
    environment = os.environ | {"TOLD": str(told), "PYTHONPATH": str(Path(__file__).parents[2])}
    main = subprocess.Popen([sys.executable, str(program)], env=environment, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: told.is_file() and told.read_text() != "", main)
        worker = int(told.read_text())
        assert alive(worker)
        main.send_signal(signal.SIGKILL)
        main.wait()
        wait_for(lambda: not alive(worker), None)
    finally:
        main.kill()
        main.wait()


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[bytes] | None) -> None:
    for _ in range(1200):
        if happened():
            return
        assert process is None or process.poll() is None, "the program has ended"
        time.sleep(0.05)
    pytest.fail("it did not happen within a minute")
