"""Signals that end a run: SIGTERM, which schedulers send before they take a machine away, and Ctrl-C.

SIGTERM has to reach the training itself: torchrun, and `accelerate launch` with several processes, pass it on, but
`accelerate launch` with one process dies of it alone. Schedulers that signal the whole process group reach both, and so
does a terminal with Ctrl-C.
"""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

TERMINATED = 143
"""Exit code of a run that SIGTERM ended after saving a checkpoint: 128 + 15, as a shell would report it."""

INTERRUPTED = 130
"""The same for Ctrl-C: 128 + 2."""

ONE_PRESS = 1.0
"""Seconds in which several SIGINTs are one: the terminal sends Ctrl-C to all processes, and torchrun passes it on."""


class Termination:
    """Notes SIGTERM and the first Ctrl-C instead of dying of them, for as long as the block lasts.

    A second Ctrl-C aborts at once. Python lets only the main thread handle signals; elsewhere the block changes
    nothing. Ctrl-C is left as it is where somebody goes on without the run, as in a notebook, and where another handler
    than Python's own is installed.

    Args:
        interrupts: Whether Ctrl-C is noted; otherwise it aborts at once.
        told: Whether this process tells what the first Ctrl-C does.
    """

    def __init__(self, *, interrupts: bool = True, told: bool = True) -> None:
        self.requested = False
        self.interrupted = False
        self._interrupts = interrupts
        self._told = told
        self._first = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Termination":
        """Installs the handlers."""
        if threading.current_thread() is threading.main_thread():
            self._previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._terminate)
            usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
            if self._interrupts and usual and not _is_interactive():
                self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Puts the previous handlers back."""
        while self._previous:
            number, handler = self._previous.popitem()
            # None stands for a handler that was not installed from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        """Handles SIGTERM."""
        self.requested = True

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """Handles Ctrl-C."""
        now = time.monotonic()
        if self.interrupted and now - self._first > ONE_PRESS:
            signal.default_int_handler(number, frame)
        if not self.interrupted:
            self._first = now
            if self._told:
                with suppress(OSError):  # past Python's stream, which the signal may have interrupted in the middle
                    os.write(2, b"\nfinishing this iteration, then saving; Ctrl-C again stops at once\n")
        self.requested = self.interrupted = True


def _is_interactive() -> bool:
    """Returns whether somebody types at a prompt: Python's, IPython's or a notebook's, which all set `sys.ps1`."""
    return "ps1" in vars(sys)
