"""Sets of prompts by name or from a file, checked as a whole before any work is done with them.

No text of a public set is part of this package: a named set is fetched once by pinned address and SHA-256, or read from
a file that somebody has got. See docs/evaluation.md for rows, sources and licences.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from overpaint.evaluation.tables import read_prompt_rows
from rewards.public_files import PublicFile, fetch

_ERASING = "https://raw.githubusercontent.com/rohitgandikota/erasing/3d10dd1b2df4ec4e74edcadac4200c7401585138/data"
_IMAGE_REWARD = "https://raw.githubusercontent.com/THUDM/ImageReward/1beb4e4de0932acbe7fc090c51208048b6269b58"
_IMAGE_REWARD_SOURCE = "THUDM/ImageReward, beside Xu et al. (2023), https://arxiv.org/abs/2304.05977"

IMAGE_REWARD_TEST = PublicFile(
    name="imagereward_test.json",
    url="https://raw.githubusercontent.com/THUDM/ImageReward/c1392c6dd0fd6ecd6d416c96959ab744a6d0a8fb/data/test.json",
    sha256="77cff6c2d0522006f52f0b637ef8302db1782b2b761e378c124a012a3c7fc58e",
    licence="Apache-2.0",
    source=_IMAGE_REWARD_SOURCE,
)
"""466 prompts with 2,720 ranked images and 6,399 pairs; the images themselves are published elsewhere."""

FETCHED: Mapping[str, PublicFile] = MappingProxyType(
    {
        "coco-30k": PublicFile(
            name="coco_30k.csv",
            url=f"{_ERASING}/coco_30k.csv",
            sha256="42c57b188c8f1f8a77cddfa11cde89e83fcbdd4dcd4fc6c840fb4e046d395383",
            licence="MIT, captions CC BY 4.0",
            source="rohitgandikota/erasing, captions of MS-COCO's validation set of 2014",
        ),
        "imagereward-100": PublicFile(
            name="imagereward_benchmark_prompts.json",
            url=f"{_IMAGE_REWARD}/benchmark/benchmark-prompts.json",
            sha256="34682e824ebb3ad8e2531b3cde1b362dc72e1e29946ff6fab77bb49e9edb4b21",
            licence="Apache-2.0 (DiffusionDB CC0)",
            source=_IMAGE_REWARD_SOURCE,
        ),
        "imagereward-test": IMAGE_REWARD_TEST,
        "diffusiondb": PublicFile(
            name="imagereward_refl_prompts.json",
            url=f"{_IMAGE_REWARD}/data/refl_data.json",
            sha256="47cc5f5c0faa36167c5bd10cdc3aee0b1072147b44d3ae18f77bd98f377ecbb8",
            licence="Apache-2.0 (DiffusionDB CC0)",
            source=_IMAGE_REWARD_SOURCE,
        ),
    }
)
"""Sets that are fetched when first used."""


class ByHand(NamedTuple):
    """A set of which no SHA-256 is known here, so that it is not fetched but has to be given as a file."""

    url: str
    """Where it is published."""
    file: str
    """What to save it as; the ending says how it is read."""
    columns: tuple[str, ...]
    """Columns that it has."""
    licence: str


BY_HAND: Mapping[str, ByHand] = MappingProxyType(
    {
        "drawbench": ByHand(
            "https://docs.google.com/spreadsheets/d/1y7nAbmR4FREi6npB1u-Bo3GFdwdOPYJc617rBOxIRHY",
            "drawbench.csv",
            ("Prompts", "Category"),
            "not stated",
        ),
        "partiprompts": ByHand(
            "https://raw.githubusercontent.com/google-research/parti/2c99f6652cbc7f0d0441aa91f4c7e7055bcb0071/"
            "PartiPrompts.tsv",
            "PartiPrompts.tsv",
            ("Prompt", "Category", "Challenge", "Note"),
            "Apache-2.0",
        ),
        "i2p": ByHand(
            f"{_ERASING}/unsafe-prompts4703.csv",
            "unsafe-prompts4703.csv",
            ("case_number", "prompt", "categories", "evaluation_seed"),
            "MIT",
        ),
    }
)
"""Sets that have to be given as files."""

TINY_KINDS: Mapping[str, str] = MappingProxyType(
    {f"tiny-{kind.replace('_', '-')}": kind for kind in ("explicit", "implicit", "neighbour", "benign", "held_out")}
)
"""Sets of captions of the tiny world, and the kind of each as `tinyworld.captions` knows it."""
TINY_COUNT = 200
"""Captions of a tiny set where no limit is given."""

NAMES = (*FETCHED, *BY_HAND, *TINY_KINDS)
"""All sets that have a name."""

TEXT_COLUMNS = ("prompt", "prompts", "text", "caption")
"""What a column with the prompt may be called, in any case; the first that is there is taken."""
ID_COLUMNS = ("id", "case_number", "image_id", "image")
"""What a column that names the prompt may be called, in any case; without any, the number of the row names it."""
SEED_COLUMNS = ("evaluation_seed", "sd_seed", "seed")
"""What a column with the seed to draw it from may be called, in any case."""
MAX_SEED = 2**64 - 1


class Prompt(NamedTuple):
    """One prompt."""

    id: str
    """Unique in its set; letters, digits, '.', '_' and '-', since it becomes part of file names."""
    text: str
    """As it was published, spaces at its ends included."""
    seed: int | None
    """The seed that its authors drew it from; None where they give none."""
    extras: Mapping[str, Any]
    """The other columns of its row, such as `Category`."""


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """Prompts that belong together."""

    name: str
    prompts: tuple[Prompt, ...]
    source: str
    """Who made it, or which file it was read from."""

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError(f"prompts must hold at least one, got none in {self.name}")

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompts without anything else."""
        return tuple(prompt.text for prompt in self.prompts)


def prompt_set(
    name_or_path: str | Path, *, limit: int | None = None, seed: int | None = None, folder: Path | None = None
) -> PromptSet:
    """Returns a set of prompts.

    Args:
        name_or_path: One of `NAMES`, or a file: a table (*.csv, *.tsv, *.jsonl, *.parquet), a JSON list of objects or
            of texts (*.json), or a prompt in each line (*.txt).
        limit: How many prompts at most, in the order of the set. A part of the set holds the first of each of as many
            equal stretches; or, with a seed, a random choice, of which smaller limits choose a part.
        seed: Chooses the prompts at random, or the captions of a tiny set. Without a limit it does nothing to others.
        folder: Where the file of a named set already lies; nothing is fetched then.

    Raises:
        ValueError: There is no such set, it has to be given as a file, `limit` is not positive, or a row is not as it
            has to be: an empty prompt, an id that is there already or cannot be part of a file name, a seed that is
            no whole number, bytes that are not UTF-8. The message names file, row and value. Rows count from 1.
        FileNotFoundError: There is no such file, or not in `folder`.
        OSError: A named set cannot be fetched.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    name = str(name_or_path)
    if name in TINY_KINDS:
        return _tiny(name, TINY_COUNT if limit is None else limit, seed or 0)
    if name in BY_HAND:
        raise ValueError(_how_to_get(name))
    if name in FETCHED:
        path, source = fetch(FETCHED[name], folder), FETCHED[name].source
    else:
        path, source = Path(name_or_path), name
        if not path.is_file():
            if path.suffix:
                raise FileNotFoundError(f"there is no file of prompts at {path}")
            raise ValueError(f"prompts must be one of {', '.join(NAMES)}, or a file, got {name!r}")
        name = path.stem
    prompts = _prompts(path)
    return PromptSet(name=name, prompts=_part(prompts, limit, seed), source=source)


def _prompts(path: Path) -> list[Prompt]:
    """Reads and checks every row."""
    rows = read_prompt_rows(path)
    if not rows:
        raise ValueError(f"{path} must hold at least one prompt, got none")
    names = rows[0]
    text_column = _column(names, TEXT_COLUMNS)
    if text_column is None:
        raise ValueError(f"{path} must have a column {' or '.join(TEXT_COLUMNS)}, got {', '.join(map(repr, names))}")
    id_column, seed_column = _column(names, ID_COLUMNS), _column(names, SEED_COLUMNS)
    used = {text_column, id_column, seed_column}
    first_rows: dict[str, int] = {}
    prompts = []
    for number, row in enumerate(rows, start=1):
        text = row.get(text_column)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{path} must hold a prompt in every row, got {text!r} in row {number}")
        key = f"{number:05d}" if id_column is None else _id(row.get(id_column), path, id_column, number)
        if key in first_rows:
            raise ValueError(f"{path} must name every prompt once, got {key!r} in rows {first_rows[key]} and {number}")
        first_rows[key] = number
        seed = None if seed_column is None else _seed(row.get(seed_column), path, seed_column, number)
        extras = {column: value for column, value in row.items() if column not in used}
        prompts.append(Prompt(key, text, seed, extras))
    return prompts


def _column(names: Mapping[str, Any], known: Sequence[str]) -> str | None:
    """Returns the first of the known columns that is there, in whatever case."""
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
    seed = int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]{1,20}", value) else value
    if type(seed) is not int or not 0 <= seed <= MAX_SEED:
        raise ValueError(
            f"{path} must hold in column {column!r} whole numbers from 0 to 2**64 - 1, got {value!r} in row {number}"
        )
    return seed


def _part(prompts: Sequence[Prompt], limit: int | None, seed: int | None) -> tuple[Prompt, ...]:
    """Returns some of the prompts, in their order; all where there are not more."""
    if limit is None or limit >= len(prompts):
        return tuple(prompts)
    if seed is None:
        return tuple(prompts[k * len(prompts) // limit] for k in range(limit))

    # By a hash rather than by a generator: equal on every version of Python, and a smaller choice is part of a larger.
    def chance(place: int) -> bytes:
        return hashlib.sha256(f"{seed}/{prompts[place].id}".encode()).digest()

    return tuple(prompts[place] for place in sorted(sorted(range(len(prompts)), key=chance)[:limit]))


def _tiny(name: str, count: int, seed: int) -> PromptSet:
    from overpaint import tinyworld

    texts = tinyworld.captions(TINY_KINDS[name], count, seed)
    prompts = tuple(Prompt(f"{name}-{k:04d}", text, None, {}) for k, text in enumerate(texts))
    return PromptSet(name=name, prompts=prompts, source=f"overpaint.tinyworld.captions, seed {seed}")


def _how_to_get(name: str) -> str:
    about = BY_HAND[name]
    return (
        f"prompts: {name} must be given as a file, because no SHA-256 of it is known to fetch it by: save {about.url} "
        f"as {about.file} (columns {', '.join(about.columns)}; licence: {about.licence}) and give the path of the "
        f"file in place of {name!r}"
    )
