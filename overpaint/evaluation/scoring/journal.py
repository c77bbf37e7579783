"""What a long job has finished so far: a file of JSON lines that only grows, and that a killed job leaves usable."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any


class Journal:
    """Records of one job, each on a line of its own and flushed when it is written; use it in a `with` statement.

    The first line says which job it is. The last may be torn, if the job was killed while it was written: it is cut off
    and counts as not written.

    Args:
        path: The file; begun if it is not there.
        job: What has to be the same for the records to be of use, by name.

    Raises:
        ValueError: The file tells of another job, or is damaged before its last line.
    """

    def __init__(self, path: Path, job: Mapping[str, Any]) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        lines, whole_bytes = _whole_lines(path)
        if lines:
            _check_job(path, lines[0], job)
            self.records = lines[1:]
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        self._file.truncate(whole_bytes)
        if not lines:
            self._write(dict(job))

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes a record, which from then on survives the death of the program."""
        self.records.append(dict(record))
        self._write(record)

    def __enter__(self) -> "Journal":
        """Returns the journal itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()


def _whole_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Returns the lines that are whole, and how many bytes they take."""
    if not path.exists():
        return [], 0
    lines: list[dict[str, Any]] = []
    whole_bytes = 0
    texts = path.read_bytes().splitlines(keepends=True)
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text) if text.endswith(b"\n") else None
        except ValueError:
            line = None
        if not isinstance(line, dict):
            if number == len(texts):
                break
            raise ValueError(f"{path} is damaged in line {number}; delete it to begin again")
        lines.append(line)
        whole_bytes += len(text)
    return lines, whole_bytes


def _check_job(path: Path, begun: Mapping[str, Any], job: Mapping[str, Any]) -> None:
    for name, value in job.items():
        if begun.get(name) != value:
            raise ValueError(
                f"{path} was begun with {name} {begun.get(name)!r}, got {value!r}; "
                f"ask for the same to go on, or delete the file to begin again"
            )
