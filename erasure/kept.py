"""Folders that keep long work: what the work was is recorded first, and every file is whole or not there."""

import json
import os
import platform
from pathlib import Path
from typing import Any


def claim(path: Path, record: dict[str, Any], what: str) -> None:
    """Writes what a folder is to hold, or checks that it is already there to hold the same.

    Args:
        path: File of the record; its folder is made if it is not there.
        record: What was asked for, as JSON knows it.
        what: What the folder holds, for the message.

    Raises:
        ValueError: The folder was claimed for something else.
    """
    if path.is_file():
        there = json.loads(path.read_text(encoding="utf-8"))
        if differing := sorted(key for key in there.keys() | record.keys() if there.get(key) != record.get(key)):
            raise ValueError(
                f"folder must be new or hold the same {what}, got {str(path.parent)!r}, whose {path.name} has another "
                f"{' and another '.join(differing)}"
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = beside(path)
    partial.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def beside(path: Path) -> Path:
    """Returns the name to write a file under before it takes its own; no two processes have the same."""
    return path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.partial")
