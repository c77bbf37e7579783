"""A program that trains with wandb in the folder it is given; with --kill, wandb's own process dies in between.

With --untracked it trains without: what stands for an undisturbed run has to be a program, too, since the tests' type
checker draws from Python's generator.
"""

import sys
import time
from pathlib import Path

import psutil
from conftest import small_training


def kill(iteration: int) -> None:
    """Kills wandb's process after the third iteration."""
    if iteration == 2 and "--kill" in sys.argv:
        time.sleep(0.5)  # it has taken something by then
        services = [child for child in psutil.Process().children(recursive=True) if "wandb" in child.name()]
        assert services
        for service in services:
            service.kill()


if __name__ == "__main__":
    trackers = () if "--untracked" in sys.argv else ("wandb",)
    small_training(Path(sys.argv[1]), pictures=True, trackers=trackers, each=kill)
