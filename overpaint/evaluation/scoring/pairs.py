"""Pairs of image and prompt that others made: a folder of images, or a table with a row for each."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .pair_table import TABLE_SUFFIXES, Row, read_table

IMAGE_SUFFIXES = (".avif", ".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Endings, in lower case, of the names of files that count as images of a folder."""


class Pair(NamedTuple):
    """An image and what it was drawn for."""

    name: str
    """What the table calls the image, or its path within the folder."""
    path: Path
    prompt: str | None
    """None where there is none, which only rewards that do not read prompts can do with."""
    row: Row
    """All that is kept of it: the image's name, the prompt if there is one, and the table's other columns."""


def read_pairs(
    source: Path,
    *,
    prompt: str | None = None,
    prompts: Path | None = None,
    image_column: str = "image",
    prompt_column: str = "prompt",
) -> list[Pair]:
    """Reads the pairs of a folder, sorted by name, or of a table, in its order.

    Args:
        source: A folder, whose subfolders count too, or a table (*.csv, *.jsonl, *.parquet). Images that a table names
            by relative paths lie relative to it.
        prompt: The prompt of every image, where none has its own.
        prompts: For a folder, the prompts of its images: a table, or ImageReward's list of prompts in JSON.
        image_column: The column of tables that names the image.
        prompt_column: The column of tables that holds the prompt.

    Raises:
        FileNotFoundError: There is nothing at `source` or at `prompts`.
        ValueError: There are no images, or a table lacks what it must have, or an image of a folder has no prompt.
    """
    for path in (source, prompts):
        if path is not None and not path.exists():
            raise FileNotFoundError(f"there is no folder or table at {path}")
    if prompt is not None and prompts is not None:
        raise ValueError(f"prompt and prompts must not be given both, got {prompt!r} and {prompts}")
    if source.is_dir():
        return _of_folder(source, prompt, prompts, image_column, prompt_column)
    if prompts is not None:
        raise ValueError(f"prompts must not be given with a table, got {prompts}; they are a column of {source}")
    return _of_table(source, prompt, image_column, prompt_column)


def _of_table(source: Path, prompt: str | None, image_column: str, prompt_column: str) -> list[Pair]:
    rows = read_table(source)
    _check_columns(source, rows, image_column)
    if prompt is not None and prompt_column in rows[0]:
        raise ValueError(f"prompt must not be given with a table that has prompts of its own, got {prompt!r}")
    pairs = []
    for number, row in enumerate(rows, start=1):
        name = row[image_column]
        if not isinstance(name, str) or not name:
            raise ValueError(f"{source} must name a file in column {image_column!r}, got {name!r} in row {number}")
        if prompt is not None:
            row = {**row, prompt_column: prompt}
        text = _prompt(source, row.get(prompt_column), number)
        pairs.append(Pair(name, source.parent / name, text, row))
    return pairs


def _of_folder(
    folder: Path, prompt: str | None, prompts: Path | None, image_column: str, prompt_column: str
) -> list[Pair]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    shown = [k for k, name in enumerate(names) if not any(part.startswith(".") for part in name.split("/"))]
    if not shown:
        raise ValueError(f"{folder} must hold images ({', '.join(IMAGE_SUFFIXES)}), got none")
    paths, names = [paths[k] for k in shown], [names[k] for k in shown]
    texts: Sequence[str | None] = [prompt] * len(names)
    if prompts is not None:
        texts = _prompts_of(names, prompts, image_column, prompt_column)
    return [
        Pair(name, path, text, {image_column: name} | ({} if text is None else {prompt_column: text}))
        for name, path, text in zip(names, paths, texts, strict=True)
    ]


def _prompts_of(names: Sequence[str], file: Path, image_column: str, prompt_column: str) -> list[str]:
    """Returns the prompt of each image of a folder; prompts of images that are not there do not matter."""
    if file.suffix in TABLE_SUFFIXES:
        rows = read_table(file)
        _check_columns(file, rows, image_column, prompt_column)
        entries = [(row[image_column], row[prompt_column]) for row in rows]
        keys = list(names)
    elif file.suffix == ".json":
        entries = _image_reward_prompts(file)
        keys = [_prompt_id(name, file) for name in names]
    else:
        known = ", ".join(f"*{suffix}" for suffix in (*TABLE_SUFFIXES, ".json"))
        raise ValueError(f"prompts must be one of {known}, got {file}")
    found: dict[str, str] = {}
    for number, (key, text) in enumerate(entries, start=1):
        if found.setdefault(key, text) != text:
            raise ValueError(f"{file} must give {key!r} one prompt, got {found[key]!r} and {text!r}")
        if _prompt(file, text, number) is None:
            raise ValueError(f"{file} must give every image a prompt, got none in row {number}")
    missing = [name for name, key in zip(names, keys, strict=True) if key not in found]
    if missing:
        raise ValueError(f"{file} must give every image a prompt, got none for {len(missing)}, the first {missing[0]}")
    return [found[key] for key in keys]


def _image_reward_prompts(file: Path) -> list[tuple[str, Any]]:
    """Reads a list of {"id", "prompt"}, or the `prompts.json` of drawn images, whose list is called images."""
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
        entries = content["images"] if isinstance(content, dict) else content
        return [(str(entry["id"]), entry["prompt"]) for entry in entries]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{file} must be a list of {{"id", "prompt"}}, got {error!r}') from error


def _prompt_id(name: str, file: Path) -> str:
    match = re.fullmatch(r"(.+)_\d+", Path(name).stem)
    if match is None:
        raise ValueError(f"images must be named <id>_<k> to find their prompts in {file}, got {name}")
    return match[1]


def _prompt(source: Path, text: object, number: int) -> str | None:
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{source} must hold prompts that are text, got {text!r} in row {number}")
    return text


def _check_columns(path: Path, rows: Sequence[Row], *columns: str) -> None:
    if not rows:
        raise ValueError(f"{path} must hold at least one row, got none")
    for column in columns:
        if column not in rows[0]:
            raise ValueError(f"{path} must have a column {column!r}, got {', '.join(rows[0])}")
