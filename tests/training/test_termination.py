"""SIGTERM: finish the iteration, save, exit."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from overpaint.training import TERMINATED, TrainingConfig, TrainingRun
from overpaint.training.signals import Termination


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGTERM to catch")
def test_terminated_program_saves_and_resumes_to_the_same_numbers(
    train: Callable, same: Callable, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, str(Path(__file__).with_name("terminated_program.py")), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(root)}
    program = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None
    assert program.stdout.readline() == "ready\n"
    program.send_signal(signal.SIGTERM)
    assert program.stdout.read() == ""
    assert program.wait(timeout=120) == TERMINATED == 143
    program.stdout.close()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["iteration-00000003"]
    same(train(folder, resume=True, checkpoint_every=100), train(tmp_path / "whole"))


def test_signal_in_the_loop_ends_it_after_the_iteration(stand_in: Callable, tmp_path: Path) -> None:
    done = []
    config = TrainingConfig(output_dir=tmp_path, iterations=5, progress=False)

    def loop() -> None:
        with TrainingRun(stand_in(), config) as run:
            for iteration in run.iterations():
                if iteration == 1:
                    signal.raise_signal(signal.SIGTERM)
                done.append(iteration)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        loop()
    assert caught.value.code == TERMINATED
    assert done == [0, 1]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["iteration-00000002"]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("leave", ["break", "error"])
def test_handler_is_put_back_however_the_loop_is_left(leave: str, stand_in: Callable, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    config = TrainingConfig(output_dir=tmp_path, iterations=5, progress=False)

    def loop() -> Any:
        with TrainingRun(stand_in(), config) as run:
            for _ in run.iterations():
                assert signal.getsignal(signal.SIGTERM) is not before
                if leave == "break":
                    break
                run.update()  # an error, for want of a backward

    if leave == "break":
        loop()
    else:
        with pytest.raises(RuntimeError, match="must follow"):
            loop()
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_threads_leave_signals_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work() -> None:
        with Termination() as termination:
            seen.append((signal.getsignal(signal.SIGTERM), termination.requested))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, False)]
