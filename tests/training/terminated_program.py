"""A program that the tests send SIGTERM: trains in the folder it is given, and waits for the signal."""

import signal
import sys
import time
from pathlib import Path

from conftest import small_training


def wait(iteration: int) -> None:
    """Says at iteration 2 that the signal may come, and goes on when it has come."""
    if iteration != 2:
        return
    handler = signal.getsignal(signal.SIGTERM)
    arrived = []

    def note(number: int, frame: object) -> None:
        arrived.append(number)
        if callable(handler):
            handler(number, None)

    signal.signal(signal.SIGTERM, note)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    deadline = time.monotonic() + 60
    while not arrived and time.monotonic() < deadline:
        time.sleep(0.05)
    signal.signal(signal.SIGTERM, handler)


if __name__ == "__main__":
    small_training(Path(sys.argv[1]), checkpoint_every=100, each=wait)
