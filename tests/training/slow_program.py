"""A program that the tests launch in two processes and interrupt: each iteration takes a while."""

import sys
import time
from pathlib import Path

from conftest import small_training

from overpaint.training import process_state


def each(iteration: int) -> None:
    """Says where the run is, and leaves time for a signal."""
    if process_state().is_main_process:
        sys.stdout.write(f"iteration {iteration}\n")
        sys.stdout.flush()
    time.sleep(2)


if __name__ == "__main__":
    small_training(Path(sys.argv[1]), checkpoint_every=100, each=each, iterations=40)
