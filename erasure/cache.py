"""Cache folders for long work: a record says what the work was, and is written first."""

import json
from pathlib import Path
from typing import Any

from overpaint.policy.atomic import this_process, write_text
from overpaint.text_files import read_json_object


def claim(path: Path, record: dict[str, Any], what: str) -> None:
    """Writes a record of what a folder is to hold, as JSON, or checks that it is there already and the same.

    Raises:
        ValueError: The folder was claimed for something else; `what` names its content.
    """
    if path.is_file():
        there = read_json_object(path)
        if differing := sorted(key for key in there.keys() | record.keys() if there.get(key) != record.get(key)):
            raise ValueError(
                f"folder must be new or hold the same {what}, got {str(path.parent)!r}, whose {path.name} has another "
                f"{' and another '.join(differing)}"
            )
        return
    write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n", writer=this_process())
