"""SIGTERM, which schedulers send before they take a machine away.

It has to reach the training itself: torchrun, and `accelerate launch` with several processes, pass it on, but
`accelerate launch` with one process dies of it alone. Schedulers that signal the whole process group reach both.
"""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

TERMINATED = 143
"""Exit code of a run that SIGTERM ended after saving a checkpoint: 128 + 15, as a shell would report it."""


class Termination:
    """Notes a SIGTERM instead of dying of it, for as long as the block lasts.

    Python lets only the main thread handle signals; elsewhere the block changes nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None
        self._installed = False

    def __enter__(self) -> "Termination":
        """Installs the handler."""
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._note)
            self._installed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Puts the previous handler back."""
        if self._installed:
            # None stands for a handler that was not installed from Python and cannot be put back.
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._previous is None else self._previous)
            self._installed = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Handles the signal."""
        self.requested = True
