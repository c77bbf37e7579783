"""A program that the tests send SIGINT: trains in the folder it is given, and waits for as many as it is told."""

import signal
import sys
import time
from pathlib import Path

from conftest import small_training


def wait(iteration: int) -> None:
    """Says at iteration 2 that the signal may come, and waits until the run has noted it, or is aborted by it."""
    if iteration != 2:
        return
    handler = signal.getsignal(signal.SIGINT)
    arrived = []

    def note(number: int, frame: object) -> None:
        arrived.append(number)
        if callable(handler):
            handler(number, None)

    signal.signal(signal.SIGINT, note)
    deadline = time.monotonic() + 60
    for count in range(1, int(sys.argv[2]) + 1):
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while len(arrived) < count and time.monotonic() < deadline:
            time.sleep(0.05)
    signal.signal(signal.SIGINT, handler)


if __name__ == "__main__":
    small_training(Path(sys.argv[1]), checkpoint_every=100, each=wait)
