"""From the rows of a file to prompts: which column is what, and what each must hold."""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from overpaint.evaluation.images.plan import Prompt
from overpaint.evaluation.tables import read_prompt_rows
from overpaint.text_files import did_you_mean

TEXT_COLUMNS = ("prompt", "prompts", "text", "caption")
"""What a column with the prompt may be called, in any case; the first that is there is taken."""
ID_COLUMNS = ("id", "case_number", "image_id", "image")
"""What a column that names the prompt may be called, in any case; without any, the number of the row names it."""
IMAGE_COLUMNS = ("image_id", "image")
"""Those of them that name an image, and the prompt only if no other row has the same image."""
SEED_COLUMNS = ("evaluation_seed", "sd_seed", "seed")
"""What a column with the seed to draw it from may be called, in any case."""
GUIDANCE_COLUMNS = ("evaluation_guidance", "sd_guidance_scale", "guidance_scale", "guidance")
"""What a column with the scale of classifier-free guidance to draw it with may be called, in any case."""


class Columns(NamedTuple):
    """Names of columns that somebody gave; None is to be found by the usual names."""

    text: str | None = None
    id: str | None = None
    seed: str | None = None
    guidance: str | None = None


def read_prompts(path: Path, columns: Columns) -> list[Prompt]:
    """Reads and checks every row; what `prompt_set` says of files holds."""
    rows = read_prompt_rows(path)
    names = list(dict.fromkeys(name for row in rows for name in row))
    if not rows:
        raise ValueError(f"{path} must hold at least one prompt, got none")
    text_column = _column(path, "text_column", columns.text, names, TEXT_COLUMNS)
    if text_column is None:
        near = next((hint for name in names if (hint := did_you_mean(name, TEXT_COLUMNS))), "")
        raise ValueError(
            f"{path} must have a column {' or '.join(TEXT_COLUMNS)}, got {', '.join(map(repr, names))}{near}; "
            "any other is given as text_column"
        )
    id_column = _column(path, "id_column", columns.id, names, ID_COLUMNS)
    if columns.id is None and id_column is not None and id_column.lower() in IMAGE_COLUMNS:
        values = [str(row.get(id_column)) for row in rows]
        id_column = id_column if len(set(values)) == len(values) else None  # several captions of an image
    seed_column = _column(path, "seed_column", columns.seed, names, SEED_COLUMNS)
    guidance_column = _column(path, "guidance_column", columns.guidance, names, GUIDANCE_COLUMNS)
    used = {text_column, id_column, seed_column, guidance_column}
    first_rows: dict[str, int] = {}
    prompts, blank = [], []
    for number, row in enumerate(rows, start=1):
        text = row.get(text_column)
        if text is None or (isinstance(text, str) and not text.strip()):
            blank.append(number)
            continue
        if not isinstance(text, str):
            raise ValueError(f"{path} must hold text in column {text_column!r}, got {text!r} in row {number}")
        key = f"{number:05d}" if id_column is None else _id(row.get(id_column), path, id_column, number)
        if key in first_rows:
            raise ValueError(
                f"{path} must name every prompt once in column {id_column!r}, got {key!r} in rows {first_rows[key]} "
                f"and {number}; another is given as id_column"
            )
        first_rows[key] = number
        seed = None if seed_column is None else _seed(row.get(seed_column), path, seed_column, number)
        guidance = (
            None if guidance_column is None else _guidance(row.get(guidance_column), path, guidance_column, number)
        )
        extras = {column: value for column, value in row.items() if column not in used}
        prompts.append(Prompt(key, text, seed, extras, guidance))
    if not prompts:
        raise ValueError(f"{path} must hold at least one prompt, got {len(blank)} rows without text")
    if blank:
        shown = ", ".join(map(str, blank[:10])) + (", ..." if len(blank) > 10 else "")
        told = f"row {shown} holds" if len(blank) == 1 else f"{len(blank)} rows ({shown}) hold"
        warnings.warn(f"{path}: {told} no prompt and will be left out", stacklevel=3)
    return prompts


def _column(path: Path, option: str, given: str | None, names: Sequence[str], known: Sequence[str]) -> str | None:
    """Returns the column that was given, or the first of the known ones that is there, in whatever case."""
    if given is not None:
        if given not in names:
            raise ValueError(
                f"{option} must be a column of {path}, which has {', '.join(map(repr, names))}, got {given!r}"
                f"{did_you_mean(given, names)}"
            )
        return given
    there = {name.lower(): name for name in names}
    return next((there[name] for name in known if name in there), None)


def _id(value: object, path: Path, column: str, number: int) -> str:
    key = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", key):
        raise ValueError(
            f"{path} must hold in column {column!r} letters, digits, '.', '_' and '-', which become part of file "
            f"names, got {value!r} in row {number}"
        )
    return key


def _seed(value: object, path: Path, column: str, number: int) -> int | None:
    if value is None or value == "":
        return None
    # pandas writes whole numbers beside missing ones as 7.0
    whole = re.fullmatch(r"([0-9]{1,20})(\.0+)?", value) if isinstance(value, str) else None
    seed = int(whole[1]) if whole else int(value) if isinstance(value, float) and value.is_integer() else value
    if type(seed) is not int or not 0 <= seed < 2**64:
        raise ValueError(
            f"{path} must hold in column {column!r} whole numbers from 0 to 2**64 - 1, got {value!r} in row {number}"
        )
    return seed


def _guidance(value: object, path: Path, column: str, number: int) -> float | None:
    if value is None or value == "":
        return None
    try:
        scale = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else -1.0
    except ValueError:
        scale = -1.0
    if not 0 <= scale < float("inf"):
        raise ValueError(f"{path} must hold in column {column!r} numbers from 0 on, got {value!r} in row {number}")
    return scale
