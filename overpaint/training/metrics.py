"""metrics.jsonl: one JSON object on each line, always written, whatever the trackers."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from overpaint.policy.atomic import write_text


class MetricsFile:
    """The metrics of a run, a line for each call of `write`.

    Every line holds `iteration` and the logged values; numbers that are not finite are null, since JSON has none.

    Args:
        path: The file. Lines of an interrupted run that come from `start` or later, or that were cut off, are
            dropped, because the resumed run writes them again.
        start: The iteration the run begins or goes on with.
    """

    def __init__(self, path: Path, *, start: int) -> None:
        self.path = path
        if path.exists():
            _keep_lines_before(path, start)
        self._file = path.open("a", encoding="utf-8")

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        """Writes one line, and hands it to the operating system so that a killed process loses none."""
        finite = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        self._file.write(json.dumps({"iteration": iteration, **finite}) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Waits until all lines are on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics file as dicts; a last line that was cut off is left out."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries


def _keep_lines_before(path: Path, iteration: int) -> None:
    """Replaces the file, in one move, by the lines of earlier iterations."""
    kept = [json.dumps(entry) + "\n" for entry in read_metrics(path) if entry["iteration"] < iteration]
    write_text(path, "".join(kept))
