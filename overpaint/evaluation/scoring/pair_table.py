"""Tables as files: CSV, JSON lines and Parquet are read, CSV and Parquet are written with columns of scores."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy

from overpaint.policy.atomic import atomic_file, write_text

Row = dict[str, Any]
"""The cells of one row by the names of their columns, which are the same in all rows of a table."""

TABLE_SUFFIXES = (".csv", ".jsonl", ".parquet")
"""Endings of the names of files that can be read."""
OUTPUT_SUFFIXES = (".csv", ".parquet")
"""Endings of the names of files that can be written."""


def read_table(path: Path) -> list[Row]:
    """Reads a table by the ending of its name. Cells of a CSV are text; a key missing from a JSON line is None.

    Raises:
        ValueError: The ending is unknown, or the file is no such table; the message names the line.
        ImportError: It is Parquet, and pyarrow is missing.
    """
    if path.suffix == ".csv":
        return _read_csv(path)
    if path.suffix == ".jsonl":
        return _read_json_lines(path)
    if path.suffix != ".parquet":
        raise ValueError(f"a table must be named {' or '.join(f'*{s}' for s in TABLE_SUFFIXES)}, got {path}")
    parquet = _pyarrow("pyarrow.parquet")
    try:
        return parquet.read_table(path).to_pylist()
    except ValueError as error:  # pyarrow's ArrowInvalid is one
        raise ValueError(f"{path} must be a Parquet file: {error}") from error


def check_output(rows: Sequence[Row], names: Sequence[str], path: Path) -> None:
    """Checks, before there are scores to lose, that a table with such columns of scores can be written.

    Raises:
        ValueError: The ending is unknown, there is such a file, a column has that name already, or a column's values
            are of types that do not mix in Parquet.
        ImportError: It is Parquet, and pyarrow is missing.
    """
    if path.suffix not in OUTPUT_SUFFIXES:
        raise ValueError(f"output must be named {' or '.join(f'*{s}' for s in OUTPUT_SUFFIXES)}, got {path}")
    if path.exists():
        raise ValueError(f"output must not exist yet, got {path}; delete it or choose another name")
    taken = [name for name in names if name in rows[0]]
    if taken:
        raise ValueError(f"rewards must not be named like columns of the table, got {taken[0]!r}")
    if path.suffix == ".parquet":
        _columns(rows)


def write_table(rows: Sequence[Row], scores: Mapping[str, Sequence[float | None]], path: Path) -> None:
    """Writes the rows with a column for each reward, whole or not at all; scores keep float32's precision."""
    if path.suffix == ".csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*rows[0], *scores])
        for k, row in enumerate(rows):
            values = (column[k] for column in scores.values())
            writer.writerow([*map(_text, row.values()), *("" if v is None else str(numpy.float32(v)) for v in values)])
        write_text(path, text.getvalue())
        return
    pyarrow = _pyarrow("pyarrow")
    columns = _columns(rows)
    columns |= {name: pyarrow.array(values, type=pyarrow.float32()) for name, values in scores.items()}
    with atomic_file(path) as partial:
        _pyarrow("pyarrow.parquet").write_table(pyarrow.table(columns), partial)


def _read_csv(path: Path) -> list[Row]:
    rows = []
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise ValueError(f"{path} must name every column once, got {header}")
            for cells in reader:
                if cells and len(cells) != len(header):
                    raise ValueError(
                        f"{path} must have {len(header)} cells in every row, got {len(cells)} in line {reader.line_num}"
                    )
                if cells:
                    rows.append(dict(zip(header, cells, strict=True)))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} must be a CSV file in UTF-8, got {error} in line {reader.line_num}") from error
    return rows


def _read_json_lines(path: Path) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path} must hold JSON in every line, got {error} in line {number}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path} must hold an object in every line, got {row!r} in line {number}")
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def _text(value: Any) -> str:
    """Returns a cell as a CSV holds it."""
    if value is None:
        return ""
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def _columns(rows: Sequence[Row]) -> dict[str, Any]:
    """Returns the columns as pyarrow's arrays."""
    pyarrow = _pyarrow("pyarrow")
    columns = {}
    for name in rows[0]:
        try:
            columns[name] = pyarrow.array([row[name] for row in rows])
        except (pyarrow.ArrowException, OverflowError) as error:
            raise ValueError(
                f"column {name!r} must hold values of one type to be written as Parquet: {error}; write a CSV"
            ) from error
    return columns


def _pyarrow(module: str) -> Any:
    """Imports a module of pyarrow, or says how to get it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "pyarrow":
            raise
        raise ImportError(
            "Parquet needs the package pyarrow, which the extra parquet brings: pip install overpaint[parquet]"
        ) from error
