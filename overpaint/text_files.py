"""Text files that people give: the one place where they are decoded, cut into lines, and read as JSON.

- UTF-8, with or without a byte order mark; UTF-16 and UTF-32 where a mark says so. Other encodings are refused, with
  the place of the first byte that is not UTF-8.
- Lines end at a line feed, with or without a carriage return. Unicode's separators (U+2028 and the like) are part of a
  text, and `str.splitlines` would cut there.
- A file is at most `LARGEST` bytes, which bounds the memory that any content of it can take; what JSON nests beyond
  Python's limit of recursion is refused.
"""

import codecs
import json
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark is the beginning of this one
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order marks and what follows them."""

LARGEST = 2**27
"""Bytes that a file of text may have: 128 MiB, a million prompts."""


def read_bytes(path: Path) -> bytes:
    """Returns what a file holds; a ValueError where it is too large."""
    with path.open("rb") as file:
        content = file.read(LARGEST + 1) if path.stat().st_size <= LARGEST else None
    if content is None or len(content) > LARGEST:  # a pipe has no size before it is read
        raise ValueError(f"{path} must have at most {LARGEST} bytes, got more; split it, or give another file")
    return content


def read_text(path: Path) -> str:
    """Returns what a file holds, without a byte order mark.

    Raises:
        ValueError: It is too large, or in another encoding; the message names file, line and byte.
    """
    content = read_bytes(path)
    encoding = next((name for mark, name in MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        expected = "UTF-8" if encoding.startswith("utf-8") else f"{encoding.upper()}, as its byte order mark says"
        raise ValueError(
            f"{path} must be {expected}, got {content[error.start : error.end]!r} in line {line} (byte {error.start}): "
            f"{error.reason}; save it as UTF-8"
        ) from error
    if encoding == "utf-8" and "\0" in text:  # every other byte of UTF-16's Latin letters
        raise ValueError(
            f"{path} must be UTF-8, got a zero byte (byte {content.index(0)}), as UTF-16 without a byte order mark and "
            "files that are no text have; save it as UTF-8"
        )
    return text


def text_lines(text: str) -> list[str]:
    """Returns the lines of a text, without what ends them; nothing follows the last line feed."""
    lines = text.replace("\r\n", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def read_json(path: Path) -> Any:
    """Returns what a JSON file holds; a ValueError that names the file where it is none."""
    return parsed_json(read_text(path), str(path))


def read_json_object(path: Path) -> dict[str, Any]:
    """Returns the object that a JSON file holds; a ValueError that names the file where it holds something else."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found


def parsed_json(text: str | bytes, name: str) -> Any:
    """Returns what a text says in JSON; a ValueError that begins with the name of its source where it is none."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{name} must be JSON of few levels, got more than {sys.getrecursionlimit()}") from error
    except ValueError as error:  # also what is no UTF-8, and a number of thousands of digits
        raise ValueError(f"{name} must be JSON, got {error}") from error


def read_json_lines(path: Path) -> dict[int, dict[str, Any]]:
    """Returns the object of each line that is not blank, by the number of the line, from 1.

    Raises:
        ValueError: A line is no JSON or no object; the message names file and line.
    """
    found = {}
    for number, line in enumerate(text_lines(read_text(path)), start=1):
        if not line.strip():
            continue
        value = parsed_json(line, f"{path}, line {number},")
        if not isinstance(value, dict):
            raise ValueError(f"{path} must hold an object in every line, got {value!r} in line {number}")
        found[number] = value
    return found


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Returns the end of a message that names what is written much like a name; nothing where there is nothing."""
    lowered = {one.lower(): one for one in known}
    close = get_close_matches(name.lower(), lowered, n=1)
    return f"; did you mean {lowered[close[0]]!r}?" if close else ""
