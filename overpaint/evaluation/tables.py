"""Tables as files: CSV, TSV, JSON, JSON lines, Parquet and lines of text are read, CSV and Parquet are written.

pandas reads and writes delimited text, pyarrow Parquet. Cells of text stay text (an id "007" keeps its zeros), and JSON
is read by the standard library, since pandas would turn whole numbers beside missing ones into floats.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from overpaint.policy.atomic import atomic_file, write_text
from overpaint.text_files import LARGEST, read_json, read_json_lines, read_text, text_lines

Row = dict[str, Any]
"""The cells of one row by the names of their columns, which are the same in all rows of a table."""

TABLE_SUFFIXES = (".csv", ".jsonl", ".parquet")
"""Endings of the names of files that can be read."""
PROMPT_SUFFIXES = (".txt", ".tsv", ".json", *TABLE_SUFFIXES)
"""Endings of the names of files that prompts can be read from."""
PARQUET_ROWS = 256
"""Rows that are read at a time."""
ROW, CELL = 64, 8
"""Bytes that a row and a cell take in memory, whatever they hold."""
OUTPUT_SUFFIXES = (".csv", ".parquet")
"""Endings of the names of files that can be written."""


def read_table(path: Path) -> list[Row]:
    """Reads a table by the ending of its name. Cells of a CSV are text; a key missing from a JSON line is None.

    Raises:
        ValueError: The ending is unknown, or the file is no such table; the message names the row or the line.
    """
    if path.suffix == ".csv":
        return _read_delimited(path)
    if path.suffix == ".jsonl":
        rows = list(read_json_lines(path).values())
        names = dict.fromkeys(name for row in rows for name in row)
        return [{name: row.get(name) for name in names} for row in rows]
    if path.suffix != ".parquet":
        raise ValueError(f"a table must be named {_listed(TABLE_SUFFIXES)}, got {path}")
    return _read_parquet(path)


def read_prompt_rows(path: Path) -> list[Row]:
    """Reads the rows of a file by the ending of its name; what has no columns gets one that is called prompt.

    A *.tsv has no quoting: a quotation mark is part of the text, as in PartiPrompts.

    Raises:
        ValueError: The ending is unknown, or the file is not what it says. The message names the row or the line.
    """
    if path.suffix not in PROMPT_SUFFIXES:
        raise ValueError(f"a file of prompts must be named {_listed(PROMPT_SUFFIXES)}, got {path}")
    if path.suffix in TABLE_SUFFIXES:
        return read_table(path)
    if path.suffix == ".tsv":
        return _read_delimited(path, sep="\t", quoting=csv.QUOTE_NONE)
    if path.suffix == ".json":
        return _read_json_rows(path)
    return [{"prompt": line} for line in text_lines(read_text(path))]


def check_output(rows: Sequence[Row], names: Sequence[str], path: Path) -> None:
    """Checks, before there are scores to lose, that a table with such columns of scores can be written.

    Raises:
        ValueError: The ending is unknown, there is such a file, a column has that name already, or a column's values
            are of types that do not mix in Parquet.
    """
    if path.suffix not in OUTPUT_SUFFIXES:
        raise ValueError(f"output must be named {_listed(OUTPUT_SUFFIXES)}, got {path}")
    if path.exists():
        raise ValueError(f"output must not exist yet, got {path}; delete it or choose another name")
    taken = [name for name in names if name in rows[0]]
    if taken:
        raise ValueError(f"rewards must not be named like columns of the table, got {taken[0]!r}")
    if path.suffix == ".parquet":
        _arrow_columns(rows)


def write_table(rows: Sequence[Row], scores: Mapping[str, Sequence[float | None]], path: Path) -> None:
    """Writes the rows with a column for each reward, whole or not at all; scores keep float32's precision."""
    if path.suffix == ".csv":
        import pandas

        cells = {name: pandas.Series([_text(row[name]) for row in rows], dtype=object) for name in rows[0]}
        values = {name: pandas.Series(column, dtype="float32") for name, column in scores.items()}
        write_text(path, pandas.DataFrame(cells | values).to_csv(index=False, lineterminator="\n"))
        return
    import pyarrow
    from pyarrow import parquet

    columns = _arrow_columns(rows)
    columns |= {name: pyarrow.array(values, type=pyarrow.float32()) for name, values in scores.items()}
    with atomic_file(path) as partial:
        parquet.write_table(pyarrow.table(columns), partial)


def _listed(suffixes: Sequence[str]) -> str:
    return " or ".join(f"*{suffix}" for suffix in suffixes)


def _read_delimited(path: Path, **options: Any) -> list[Row]:
    """Reads CSV or TSV as text, cell by cell; lines without anything are left out of a CSV, and an error in a TSV."""
    import pandas

    text = read_text(path)
    if not text.strip("\r\n"):
        return []
    try:
        # pandas would rename a column that occurs twice and fill short rows up: the header is read as a row, and a
        # missing cell is None, which an empty one is not.
        table = pandas.read_csv(
            io.StringIO(text, newline=""), header=None, dtype=object, na_filter=False, engine="python",
            skip_blank_lines=False, **options,
        )  # fmt: skip
    except (pandas.errors.ParserError, csv.Error) as error:
        raise ValueError(f"{path} must be a table with as many cells in every row, got: {error}") from error
    header, *lines = table.to_numpy().tolist()
    if len(set(header)) < len(header):
        raise ValueError(f"{path} must name every column once, got {header}")
    rows = [cells for cells in lines if cells[0] is not None or path.suffix == ".tsv"]
    for number, cells in enumerate(rows, start=1):
        if None in cells:
            found = [cell for cell in cells if cell is not None]
            raise ValueError(f"{path} must have {len(header)} cells in every row, got {found!r} in row {number}")
    return [dict(zip(header, cells, strict=True)) for cells in rows]


def _read_parquet(path: Path) -> list[Row]:
    """Reads a Parquet file a few rows at a time: a value that is repeated takes no room in it, and much in memory."""
    import pyarrow
    from pyarrow import parquet

    rows: list[Row] = []
    size = 0
    try:
        schema = parquet.read_schema(path)
        texts = [column.name for column in schema if _is_text(column.type)]
        with parquet.ParquetFile(path, read_dictionary=texts) as file:
            claimed = sum(file.metadata.row_group(k).total_byte_size for k in range(file.metadata.num_row_groups))
            for batch in [] if claimed > LARGEST else file.iter_batches(batch_size=PARQUET_ROWS):
                size += len(batch) * (ROW + CELL * len(batch.columns)) + sum(map(_decoded_bytes, batch.columns))
                if size > LARGEST:
                    break
                rows += batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:  # the latter for what does not decompress
        raise ValueError(f"{path} must be a Parquet file: {error}") from error
    if max(claimed, size) > LARGEST:
        raise ValueError(f"{path} must hold at most {LARGEST} bytes when decompressed, got more; split it")
    return rows


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    tests = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    return any(test(kind) for test in tests)


def _decoded_bytes(column: Any) -> int:
    """Returns the bytes of a column's values, of which those that are repeated lie there once."""
    from pyarrow import compute, types

    functions: Any = compute  # made when it is imported
    if not types.is_dictionary(column.type):
        return column.nbytes
    if not _is_text(column.type.value_type):
        return column.dictionary_decode().nbytes
    lengths = functions.take(functions.binary_length(column.dictionary), column.indices)
    return int(functions.sum(lengths).as_py() or 0)


def _read_json_rows(path: Path) -> list[Row]:
    """Reads a list of objects or of texts, or the captions of an annotation file of MS-COCO."""
    content = read_json(path)
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        content = content["annotations"]
    if not isinstance(content, list):
        keys = f"an object with {', '.join(map(repr, content))}" if isinstance(content, dict) else repr(content)
        raise ValueError(f"{path} must hold a list, or MS-COCO's object with 'annotations', got {keys[:200]}")
    rows: list[Row] = [{"prompt": entry} if isinstance(entry, str) else entry for entry in content]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{path} must hold objects or texts, got {row!r} in row {number}")
    return rows


def _text(value: Any) -> str:
    """Returns a cell as a CSV holds it."""
    if value is None:
        return ""
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def _arrow_columns(rows: Sequence[Row]) -> dict[str, Any]:
    """Returns the columns as pyarrow's arrays."""
    import pyarrow

    columns = {}
    for name in rows[0]:
        try:
            columns[name] = pyarrow.array([row[name] for row in rows])
        except (pyarrow.ArrowException, OverflowError) as error:
            raise ValueError(
                f"column {name!r} must hold values of one type to be written as Parquet: {error}; write a CSV"
            ) from error
    return columns
