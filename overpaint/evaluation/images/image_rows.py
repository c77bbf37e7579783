"""One row of JSON for each image that `generate` drew: what it shows, how large it is, what it took, and its hash.

    <root>/<model>/.drawn-<rank>.jsonl  rows of one process, each added once its image is in place
    <root>/<model>/manifest.jsonl       all rows in the order of the plan, once all images are there

An image counts as drawn if there is a row with the hash of its file. So a kill between image and row, a row that was
cut short, and a file that was cut short or changed all lead to the same: the image is drawn again.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from overpaint.policy.atomic import write_text

from .plan import PlannedImage

ROWS = "manifest.jsonl"
JOURNALS = ".drawn-*.jsonl"


class ImageRow(NamedTuple):
    """What is known of one image."""

    file: str
    kind: str
    id: str
    copy: int
    prompt: str
    seed: int
    width: int
    """In pixels."""
    height: int
    """In pixels."""
    seconds: float
    """Its share of the time that its batch took to draw."""
    batch: int
    """How many images were drawn together with it, itself included."""
    sha256: str
    """Of the file."""


def read_image_rows(folder: Path | str) -> tuple[ImageRow, ...]:
    """Reads the rows of a finished folder, in the order of the plan.

    Raises:
        ValueError: The folder has none, as one that another system filled, or one that is not finished.
    """
    path = Path(folder) / ROWS
    if not path.is_file():
        raise ValueError(f"folder must hold {ROWS}, got {folder}, which does not: `generate` has not finished it")
    return tuple(_read(path))


def known_rows(folder: Path) -> dict[str, list[ImageRow]]:
    """Returns all rows that were written so far, by file; lines that are not whole are left out."""
    rows: dict[str, list[ImageRow]] = {}
    for path in (folder / ROWS, *sorted(folder.glob(JOURNALS))):
        for row in _read(path):
            rows.setdefault(row.file, []).append(row)
    return rows


def drawn_row(path: Path, rows: Iterable[ImageRow]) -> ImageRow | None:
    """Returns the row that tells of an image's file as it is; None if the image is missing or damaged or has none."""
    rows = tuple(rows)
    if not rows:
        return None
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None
    return next((row for row in rows if row.sha256 == digest), None)


def append_row(folder: Path, rank: int, row: ImageRow) -> None:
    """Adds a row to those of one process; from then on it survives the death of the program.

    Raises:
        OSError: The disk is full, for example; the message names the file, and no part of the row is left in it.
    """
    path = folder / f".drawn-{rank}.jsonl"
    line = json.dumps(row._asdict(), ensure_ascii=False).encode() + b"\n"
    with path.open("ab", buffering=0) as file:
        begin = file.tell()
        if begin and not _ends_a_line(path):
            line = b"\n" + line
        try:
            written = 0
            while written < len(line):  # an unbuffered file may take a part, and complain about the rest only
                written += file.write(line[written:]) or 0
        except OSError as error:
            file.truncate(begin)
            raise OSError(error.errno, error.strerror, str(path)) from error


def finish_rows(folder: Path, planned: Sequence[PlannedImage], *, writer: str = "") -> bool:
    """Brings the rows of all processes together if all images are there; says whether they are.

    Whichever process comes last does it; two that come at once write the same.
    """
    journals = sorted(folder.glob(JOURNALS))
    rows = known_rows(folder)
    if not journals and (folder / ROWS).exists() and rows.keys() == {image.file_name for image in planned}:
        return True
    found = []
    for image in planned:
        row = drawn_row(folder / image.file_name, rows.get(image.file_name, ()))
        if row is None:
            return False
        found.append(row)
    lines = [json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in found]
    write_text(folder / ROWS, "".join(lines), writer=writer)
    for journal in journals:
        journal.unlink(missing_ok=True)
    return True


def _read(path: Path) -> list[ImageRow]:
    rows = []
    with suppress(FileNotFoundError):  # a process that finished has just removed it
        for line in path.read_bytes().splitlines():
            with suppress(ValueError, TypeError):
                rows.append(ImageRow(**json.loads(line)))
    return rows


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"
