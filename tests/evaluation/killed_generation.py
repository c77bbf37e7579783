"""Draws into folders in children that are killed, then goes on; test_generation_kills.py looks at what came out.

A program of its own because it forks, which a test runner with its threads should not.

    killed_generation.py ROOT PIPELINE

    ROOT/every   killed at every single file operation
    ROOT/random  a tiny Stable Diffusion, killed at ten random moments
    ROOT/two     two processes at a time, of which the first is killed
"""

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from overpaint.evaluation import DrawConfig, generate, plan
from overpaint.policy import DiffusionPolicy

PLANNED = plan({"explicit": ["a striped red circle", "a striped square"], "benign": ["a red circle", "a blue dog"]})
CONFIG = DrawConfig(steps=2)
WRITES = os.O_WRONLY | os.O_RDWR


class Noise:
    """Draws the noise of each seed; the last bit depends on the batch, as with a network."""

    def draw(self, prompts: Any, *, seeds: Any, height: Any, **rest: Any) -> torch.Tensor:
        noise = [torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(noise) * 0.99 + 0.01 * (sum(seeds) % 7) / 7


def in_child(work: Callable[[], object]) -> int:
    """Does the work in a fork; returns how it ended, 0 for well and -9 for killed."""
    return ended(begun(work))


def begun(work: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        try:
            # tqdm's own lock is one for all forks, and stays locked when one is killed that holds it.
            tqdm.set_lock(threading.RLock())
            work()
        finally:
            os._exit(1 if sys.exc_info()[0] else 0)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(operation: int, root: Path) -> None:
    """Kills this process just before it changes something within a folder for the n-th time.

    A file that is opened to be written first gets a few bytes, as if the kill came amid the writing.
    """
    left = operation

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
        if not (is_write or event in ("os.rename", "os.remove", "os.truncate", "os.mkdir")):
            return
        if not str(arguments[0]).startswith(str(root)):
            return
        left -= 1
        if left == 0:
            if is_write:
                left = -1  # the hook hears what it does itself
                os.write(os.open(arguments[0], os.O_WRONLY | os.O_CREAT | os.O_APPEND), b'{"file": "benig')
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def draw(policy: Any, root: Path, *, rank: int = 0, world_size: int = 1) -> None:
    generate(policy, PLANNED, root, CONFIG, model="m", batch_size=3, rank=rank, world_size=world_size, progress=False)


def every(root: Path) -> None:
    """Kills a run of its own at each file operation, until there is none left to be killed at."""
    assert in_child(lambda: draw(Noise(), root / "whole")) == 0
    operation, end = 0, -signal.SIGKILL
    while end == -signal.SIGKILL:
        operation += 1
        folder = root / f"killed-{operation:03d}"

        def killed(folder: Path = folder, operation: int = operation) -> None:
            die_at(operation, folder)
            draw(Noise(), folder)

        end = in_child(killed)
        assert in_child(lambda folder=folder: draw(Noise(), folder)) == 0
    assert end == 0


def at_random(root: Path, pipeline: str) -> None:
    """Kills one run again and again: seven times from within, at a file operation, and three times by the clock."""
    policy = DiffusionPolicy.from_pretrained(pipeline, device="cpu")
    assert in_child(lambda: draw(policy, root / "whole")) == 0
    folder, dice = root / "killed", random.Random(0)
    for kill in range(10):

        def killed(kill: int = kill) -> None:
            if kill not in (2, 5, 8):
                die_at(dice.randint(1, 3), folder)
            draw(policy, folder)

        dice.random()
        child = begun(killed)
        if kill in (2, 5, 8):
            time.sleep(dice.uniform(0.0, 0.1))
            os.kill(child, signal.SIGKILL)
        assert ended(child) == -signal.SIGKILL
    assert in_child(lambda: draw(policy, folder)) == 0


def two(root: Path) -> None:
    """Lets two processes fill a folder; in others the first of them is killed, and one, two or three go on."""
    assert in_child(lambda: draw(Noise(), root / "whole")) == 0
    for operation in range(1, 13):
        folder = root / f"killed-{operation:02d}"

        def first(folder: Path = folder, operation: int = operation) -> None:
            die_at(operation, folder)
            draw(Noise(), folder, rank=0, world_size=2)

        second = begun(lambda folder=folder: draw(Noise(), folder, rank=1, world_size=2))
        assert in_child(first) in (-signal.SIGKILL, 0)
        assert ended(second) == 0
        count = 1 + operation % 3
        later = [begun(lambda f=folder, r=r, c=count: draw(Noise(), f, rank=r, world_size=c)) for r in range(count)]
        assert [ended(child) for child in later] == [0] * count


if __name__ == "__main__":
    torch.set_num_threads(1)
    every(Path(sys.argv[1], "every"))
    two(Path(sys.argv[1], "two"))
    at_random(Path(sys.argv[1], "random"), sys.argv[2])
