"""SIGTERM and Ctrl-C: finish the iteration, save, say how to go on, exit."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from overpaint.training import INTERRUPTED, TERMINATED, TrainingConfig, TrainingRun, read_run_record
from overpaint.training.signals import ONE_PRESS, Termination


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Ctrl-C as in a terminal: a shell that starts pytest in the background has it ignored, here and in children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.proof("SIGTERM and Ctrl-C: saved within an iteration")
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
    before = handlers()
    config = TrainingConfig(output_dir=tmp_path, iterations=5, progress=False)

    def loop() -> Any:
        with TrainingRun(stand_in(), config) as run:
            for _ in run.iterations():
                assert not set(handlers()) & set(before)
                if leave == "break":
                    break
                run.update()  # an error, for want of a backward

    if leave == "break":
        loop()
    else:
        with pytest.raises(RuntimeError, match="must follow"):
            loop()
    assert handlers() == before


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


def test_other_threads_leave_signals_alone() -> None:
    before = handlers()
    seen = []

    def work() -> None:
        with Termination() as termination:
            seen.append((handlers(), termination.requested))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


# Ctrl-C.


def start(folder: Path, signals: int) -> subprocess.Popen:
    """Starts a program that trains in a folder and says when the signals may come."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, str(Path(__file__).with_name("interrupted_program.py")), str(folder), str(signals)]
    environment = os.environ | {"PYTHONPATH": str(root)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.proof("SIGTERM and Ctrl-C: saved within an iteration")
@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent as POSIX has them")
def test_ctrl_c_saves_says_how_to_go_on_and_the_run_resumes_to_the_same_numbers(
    train: Callable, same: Callable, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with start(folder, 1) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        program.send_signal(signal.SIGINT)
        _, told = program.communicate(timeout=120)
    assert program.returncode == INTERRUPTED == 130
    assert "finishing this iteration, then saving; Ctrl-C again stops at once" in told
    assert f"stopped by Ctrl-C after 3 of 7 iterations, which are saved in {folder}: go on with resume=True" in told
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["iteration-00000003"]
    assert read_run_record(folder)["sessions"][-1]["outcome"] == "stopped by a signal"
    same(train(folder, resume=True, checkpoint_every=100), train(tmp_path / "whole"))


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent as POSIX has them")
def test_second_ctrl_c_aborts_at_once(tmp_path: Path) -> None:
    with start(tmp_path / "run", 2) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        program.send_signal(signal.SIGINT)
        assert program.stdout.readline() == "ready\n"
        time.sleep(ONE_PRESS)
        program.send_signal(signal.SIGINT)
        _, told = program.communicate(timeout=120)
    assert "KeyboardInterrupt" in told
    assert program.returncode != INTERRUPTED or "stopped by Ctrl-C" not in told
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.proof("SIGTERM and Ctrl-C: saved within an iteration")
@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent as POSIX has them")
def test_ctrl_c_reaches_all_processes_of_a_launcher_once(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(Path(__file__).with_name("slow_program.py")), str(tmp_path / "run")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
    program = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    with program:
        assert program.stdout is not None
        for line in program.stdout:
            if line == "iteration 1\n":
                os.killpg(program.pid, signal.SIGINT)  # as a terminal does; torchrun then passes it on
                break
        told = program.stdout.read()
    assert told.count("stopped by Ctrl-C after 2 of 40 iterations") == 1
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["iteration-00000002"]


def test_signals_of_one_press_are_one(capfd: pytest.CaptureFixture) -> None:
    with Termination() as termination:
        for _ in range(3):  # from the terminal, and from a launcher that passes it on
            signal.raise_signal(signal.SIGINT)
        assert (termination.requested, termination.interrupted) == (True, True)
    assert capfd.readouterr().err.count("finishing this iteration") == 1


def test_ctrl_c_aborts_at_once_where_there_is_nothing_to_go_on_with() -> None:
    with pytest.raises(KeyboardInterrupt), Termination(interrupts=False):
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_is_left_alone_at_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "ps1", "In [1]: ", raising=False)  # as IPython and notebooks set it
    with pytest.raises(KeyboardInterrupt), Termination():
        signal.raise_signal(signal.SIGINT)


def test_another_handler_of_ctrl_c_is_left_alone() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup leaves it
    try:
        with Termination() as termination:
            signal.raise_signal(signal.SIGINT)
            assert not termination.requested
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
