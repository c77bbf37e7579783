"""Files of prompts as rows: tables, JSON lists, and texts with a prompt in each line."""

import json
from pathlib import Path

from overpaint.evaluation.scoring.pair_table import TABLE_SUFFIXES, Row, read_table

PROMPT_SUFFIXES = (".txt", ".tsv", ".json", *TABLE_SUFFIXES)
"""Endings of the names of files that prompts can be read from."""


def read_prompt_rows(path: Path) -> list[Row]:
    """Reads the rows of a file by the ending of its name; what has no columns gets one that is called prompt.

    A *.tsv has no quoting: a quotation mark is part of the text, as in PartiPrompts.

    Raises:
        ValueError: The ending is unknown, or the file is not what it says. The message names the row or the line.
        ImportError: It is Parquet, and pyarrow is missing.
    """
    if path.suffix not in PROMPT_SUFFIXES:
        raise ValueError(f"a file of prompts must be named {' or '.join(f'*{s}' for s in PROMPT_SUFFIXES)}, got {path}")
    if path.suffix == ".parquet":
        return read_table(path)
    text = _decoded(path)
    if path.suffix == ".txt":
        return [{"prompt": line} for line in _lines(text)]
    if path.suffix == ".tsv":
        return _tab_separated(path, text)
    if path.suffix == ".json":
        return _json_list(path, text)
    return read_table(path)


def _decoded(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} must be UTF-8, got {content[error.start : error.end]!r} in line {line}: {error.reason}"
        ) from error


def _lines(text: str) -> list[str]:
    """Returns the lines; unlike `str.splitlines`, it keeps separators of Unicode within them."""
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if not lines[-1] else lines


def _tab_separated(path: Path, text: str) -> list[Row]:
    lines = [line.split("\t") for line in _lines(text)]
    if not lines:
        return []
    header = lines[0]
    if len(set(header)) < len(header):
        raise ValueError(f"{path} must name every column once, got {header}")
    for number, cells in enumerate(lines[1:], start=1):
        if len(cells) != len(header):
            raise ValueError(f"{path} must have {len(header)} cells in every row, got {cells!r} in row {number}")
    return [dict(zip(header, cells, strict=True)) for cells in lines[1:]]


def _json_list(path: Path, text: str) -> list[Row]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, got {error}") from error
    if not isinstance(content, list):
        raise ValueError(f"{path} must hold a list, got {type(content).__name__}")
    rows: list[Row] = [{"prompt": entry} if isinstance(entry, str) else entry for entry in content]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{path} must hold objects or texts, got {row!r} in row {number}")
    return rows
