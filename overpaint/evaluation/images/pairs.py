"""Images that others made, with their prompts: a folder, or a table with a row for each.

Their headers are looked into before any work; they are sorted into batches of one size and read a batch ahead.
"""

import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from overpaint.evaluation.tables import TABLE_SUFFIXES, Row, read_table
from overpaint.image_files import IMAGE_SUFFIXES, UnreadableImage, image_size, images_below
from overpaint.settings import Index
from overpaint.text_files import did_you_mean, read_json

from .files import Pixels, check_model_name, read_image
from .plan import PlannedImage


class Pair(NamedTuple):
    """An image and what it was drawn for."""

    name: str
    """What the table calls the image, or its path within the folder."""
    path: Path
    prompt: str | None
    """None where there is none, which only rewards that do not read prompts can do with."""
    row: Row
    """What output tables say of it: the image's name, the prompt if there is one, and the table's other columns."""


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
        pairs.append(Pair(name, source.parent / name, _prompt(source, row.get(prompt_column), number), row))
    return pairs


def _of_folder(
    folder: Path, prompt: str | None, prompts: Path | None, image_column: str, prompt_column: str
) -> list[Pair]:
    names = images_below(folder)
    if not names:
        raise ValueError(f"{folder} must hold images ({', '.join(IMAGE_SUFFIXES)}), got none")
    texts: Sequence[str | None] = [prompt] * len(names)
    if prompts is not None:
        texts = _prompts_of(names, prompts, image_column, prompt_column)
    return [
        Pair(name, folder / name, text, {image_column: name} | ({} if text is None else {prompt_column: text}))
        for name, text in zip(names, texts, strict=True)
    ]


def _prompts_of(names: Sequence[str], file: Path, image_column: str, prompt_column: str) -> list[str]:
    """Returns the prompt of each image of a folder; prompts of images that are not there do not matter."""
    if file.suffix in TABLE_SUFFIXES:
        rows = read_table(file)
        _check_columns(file, rows, image_column, prompt_column)
        entries = [(row[image_column], row[prompt_column]) for row in rows]
        keys = list(names)
    elif file.suffix == ".json":
        entries = [(entry["id"], entry["prompt"]) for entry in _prompt_entries(file)]
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


def _prompt_entries(file: Path) -> list[dict[str, Any]]:
    """Reads a list of {"id", "prompt"}, or the `prompts.json` of drawn images, whose list is called images."""
    try:
        content = read_json(file)
        entries = content["images"] if isinstance(content, dict) else content
        return [{**entry, "id": str(entry["id"]), "prompt": entry["prompt"]} for entry in entries]
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
            raise ValueError(
                f"{path} must have a column {column!r}, got {', '.join(rows[0])}{did_you_mean(column, list(rows[0]))}"
            )


Size = tuple[int, int]
"""Width and height in pixels."""
Item = TypeVar("Item")


def image_sizes(pairs: Sequence[Pair], *, skip_broken: bool = False) -> list[Size | str]:
    """Reads the header of every image, which takes little time and finds most broken ones before any work.

    Returns:
        For each pair the size of its image, or why it cannot be read if broken ones are skipped.

    Raises:
        ValueError: An image is missing, is none, or has values without a known range, and broken ones are not skipped.
    """
    with ThreadPoolExecutor() as pool:
        sizes = list(pool.map(lambda pair: _size(pair.path), pairs))
    broken = [(pair, size) for pair, size in zip(pairs, sizes, strict=True) if isinstance(size, str)]
    if broken and not skip_broken:
        pair, why = broken[0]
        raise ValueError(f"images must be readable, got {len(broken)} of {len(pairs)} that are not: {pair.path}: {why}")
    return sizes


def places_by(keys: Sequence[Hashable]) -> list[list[int]]:
    """Returns the places of equal keys, in the order in which keys first occur."""
    places: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    return list(places.values())


def in_parts(groups: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Returns groups cut into batches."""
    return [list(group[k : k + batch_size]) for group in groups for k in range(0, len(group), batch_size)]


def batches_by_size(sizes: Sequence[Size | str], batch_size: int) -> list[list[int]]:
    """Returns the indices of images of one size, batch by batch, about in the order of the pairs."""
    return sorted(in_parts([group for group in places_by(sizes) if not isinstance(sizes[group[0]], str)], batch_size))


def read_ahead(
    batches: Mapping[int, Sequence[int]], read: Callable[[int], Item]
) -> Iterator[tuple[int, Sequence[int], list[Item]]]:
    """Yields the number of each batch, its indices and what was read of each, while the next batch is being read.

    Two batches at most are in memory, however many there are. `read` is called by several threads at once.
    """
    numbers = list(batches)
    with ThreadPoolExecutor() as pool:
        reading: list[list[Future[Item]]] = []
        for place, number in enumerate(numbers):
            soon = numbers[place + len(reading) : place + 2]
            reading += [[pool.submit(read, index) for index in batches[later]] for later in soon]
            yield number, batches[number], [future.result() for future in reading.pop(0)]


def image_files(folder: Path | str) -> list[Path]:
    """Returns the images of a folder and its subfolders, sorted by name; raises as `read_pairs`."""
    return [pair.path for pair in read_pairs(Path(folder))]


def in_batches(paths: Sequence[Path], batch_size: int) -> Iterator[tuple[list[int], Pixels]]:
    """Yields the images of files, a few of one size at a time, with their places; two batches are in memory at most.

    Raises:
        ValueError: There are no images, one cannot be read, or `batch_size` is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not paths:
        raise ValueError("paths must hold at least one image, got none")
    sizes = [_size(path) for path in paths]
    broken = [f"{path}: {size}" for path, size in zip(paths, sizes, strict=True) if isinstance(size, str)]
    if broken:
        raise ValueError(broken[0])
    batches = dict(enumerate(batches_by_size(sizes, batch_size)))
    for _, places, images in read_ahead(batches, lambda place: read_image(paths[place])):
        yield list(places), torch.stack(images)


def _size(path: Path) -> Size | str:
    """Returns the size of an image, or why it cannot be read."""
    try:
        return image_size(path)
    except FileNotFoundError as error:
        return f"it cannot be read: {error}"
    except UnreadableImage as error:
        return f"it {error.why}"


UNKNOWN_SEED = -1
"""Stands for the seed of an image that another system drew."""


@dataclass(frozen=True, kw_only=True)
class OtherImages:
    """Images of which it is known what they show, and not how they were drawn."""

    folder: Path
    model: str
    """The name of the system."""
    planned: tuple[PlannedImage, ...]
    """What each image shows; no seed is known."""

    @property
    def config(self) -> None:
        """How the images were drawn: unknown."""
        return None

    @classmethod
    def open(cls, folder: Path | str, model: str, prompts: Path | str, *, kind: str = "benign") -> "OtherImages":
        """Opens a folder.

        Args:
            folder: Holds `<id>_<k>.png`, image k of the prompt `<id>`.
            model: What the system is called.
            prompts: A list of {"id", "prompt"} in JSON, the `prompts.json` of drawn images, or a table with the columns
                "image" and "prompt".
            kind: Kind of the prompts of which the file says none.

        Raises:
            FileNotFoundError: There is no folder or no such file.
            ValueError: There are no images, one has another name or no prompt, or the model's name cannot be that of a
                folder.
        """
        folder, prompts = Path(folder), Path(prompts)
        check_model_name(model)
        planned = []
        pairs = read_pairs(folder, prompts=prompts)
        entries = _prompt_entries(prompts) if prompts.suffix == ".json" else []
        kinds = {entry["id"]: entry["kind"] for entry in entries if "kind" in entry}
        for pair in pairs:
            match = re.fullmatch(r"([^/]+)_(0|[1-9]\d*)\.png", pair.name)
            if match is None or pair.prompt is None:
                raise ValueError(f"images in {folder} must be named <id>_<k>.png and have a prompt, got {pair.name}")
            found = kinds.get(match[1], kind)
            planned.append(PlannedImage(found, match[1], int(match[2]), pair.prompt, UNKNOWN_SEED))
        planned.sort(key=lambda image: (image.kind, _natural(image.id), image.copy))
        return cls(folder=folder, model=model, planned=tuple(planned))

    def pixels(self, positions: Sequence[Index]) -> Pixels:
        """Reads the images at these places of `planned`; they have to be of one size."""
        return torch.stack([read_image(self.folder / self.planned[k].file_name) for k in positions])


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Returns a key that sorts 2 before 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]
