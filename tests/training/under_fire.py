"""Work in forks that are killed again and again, until it is done."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.evaluation.killed_generation import begun, die_at, ended


def under_fire(work: Callable[[Path], None], root: Path, kills: int, seed: str, *, half: str = ".partial*") -> None:
    """Does some work once in peace, and then under fire.

    Every other kill comes at one of the next thirty changes of a file, and else by the clock.

        ROOT/whole     done without a kill
        ROOT/killed-N  killed at random moments, begun again each time; as many as it takes to kill so many times
        ROOT/counts.json

    Args:
        work: Does it in a folder, and goes on with what it finds there.
        root: The folder.
        kills: How many.
        seed: Of the moments.
        half: The names of what is being written, by which kills inside of a write are counted.
    """
    dice, start = random.Random(seed), time.perf_counter()
    assert ended(begun(lambda: work(root / "whole"))) == 0, seed
    taken = time.perf_counter() - start
    killed = inside = runs = 0
    while killed < kills:
        folder, end = root / f"killed-{runs}", -signal.SIGKILL
        while end == -signal.SIGKILL:
            by_clock, moment = killed % 2 == 1, dice.uniform(0, taken / 4)
            operation = dice.randint(1, 30)

            def shot(folder: Path = folder, operation: int = 0 if by_clock or killed >= kills else operation) -> None:
                if operation:
                    die_at(operation, folder)
                work(folder)

            process = begun(shot)
            if by_clock and killed < kills:
                time.sleep(moment)
                os.kill(process, signal.SIGKILL)
            end = ended(process)
            assert end in (0, -signal.SIGKILL), f"{seed}: what was begun again ended with {end}"
            killed += end == -signal.SIGKILL
            inside += end == -signal.SIGKILL and any(folder.glob(f"**/{half}"))
        runs += 1
    (root / "counts.json").write_text(json.dumps({"killed": killed, "inside": inside, "runs": runs}))
