"""Sets of prompts, by name or from a file.

No text of a public set is part of this package: a named set is fetched once by pinned address and SHA-256 (see
`rewards.public_files`), or read from a file that somebody has got, and checked as a whole before any work is done with
it. See docs/evaluation.md for rows, sources and licences.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from overpaint.evaluation.images.plan import Prompt
from overpaint.settings import Count, Seed
from rewards.public_files import PublicFile, fetch

from .rows import Columns, read_prompts

Item = TypeVar("Item")

_ERASING = "3d10dd1b2df4ec4e74edcadac4200c7401585138/data"


def github_file(repository: str, path: str, name: str, sha256: str, licence: str, source: str) -> PublicFile:
    """Returns a public file of a repository, whose path begins with a commit."""
    url = f"https://raw.githubusercontent.com/{repository}/{path}"
    return PublicFile(name=name, url=url, sha256=sha256, licence=licence, source=f"{repository}, {source}")


def _image_reward(path: str, name: str, sha256: str, licence: str = "Apache-2.0 (DiffusionDB CC0)") -> PublicFile:
    source = "of Xu et al. (2023), https://arxiv.org/abs/2304.05977"
    return github_file("THUDM/ImageReward", path, name, sha256, licence, source)


IMAGE_REWARD_TEST = _image_reward(
    "c1392c6dd0fd6ecd6d416c96959ab744a6d0a8fb/data/test.json",
    "imagereward_test.json",
    "77cff6c2d0522006f52f0b637ef8302db1782b2b761e378c124a012a3c7fc58e",
    licence="Apache-2.0",
)
"""466 prompts with 2,720 ranked images and 6,399 pairs; the images themselves are published elsewhere."""

FETCHED: Mapping[str, PublicFile] = {
    "coco-30k": github_file(
        "rohitgandikota/erasing",
        f"{_ERASING}/coco_30k.csv",
        "coco_30k.csv",
        "42c57b188c8f1f8a77cddfa11cde89e83fcbdd4dcd4fc6c840fb4e046d395383",
        licence="MIT, captions CC BY 4.0",
        source="captions of MS-COCO's validation set of 2014",
    ),
    "imagereward-100": _image_reward(
        "1beb4e4de0932acbe7fc090c51208048b6269b58/benchmark/benchmark-prompts.json",
        "imagereward_benchmark_prompts.json",
        "34682e824ebb3ad8e2531b3cde1b362dc72e1e29946ff6fab77bb49e9edb4b21",
    ),
    "imagereward-test": IMAGE_REWARD_TEST,
    "diffusiondb": _image_reward(
        "1beb4e4de0932acbe7fc090c51208048b6269b58/data/refl_data.json",
        "imagereward_refl_prompts.json",
        "47cc5f5c0faa36167c5bd10cdc3aee0b1072147b44d3ae18f77bd98f377ecbb8",
    ),
}
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


BY_HAND: Mapping[str, ByHand] = {
    "drawbench": ByHand(
        url="https://docs.google.com/spreadsheets/d/1y7nAbmR4FREi6npB1u-Bo3GFdwdOPYJc617rBOxIRHY",
        file="drawbench.csv",
        columns=("Prompts", "Category"),
        licence="not stated",
    ),
    "partiprompts": ByHand(
        url="https://raw.githubusercontent.com/google-research/parti/2c99f6652cbc7f0d0441aa91f4c7e7055bcb0071/"
        "PartiPrompts.tsv",
        file="PartiPrompts.tsv",
        columns=("Prompt", "Category", "Challenge", "Note"),
        licence="Apache-2.0",
    ),
    "i2p": ByHand(
        url=f"https://raw.githubusercontent.com/rohitgandikota/erasing/{_ERASING}/unsafe-prompts4703.csv",
        file="unsafe-prompts4703.csv",
        columns=("case_number", "prompt", "categories", "evaluation_seed"),
        licence="MIT",
    ),
}
"""Sets that have to be given as files."""

TINY_KINDS: Mapping[str, str] = {
    f"tiny-{kind.replace('_', '-')}": kind for kind in ("explicit", "implicit", "neighbour", "benign", "held_out")
}
"""Sets of captions of the tiny world, and the kind of each as `tinyworld.captions` knows it."""
TINY_COUNT = 200
"""Captions of a tiny set where no limit is given."""

NAMES = (*FETCHED, *BY_HAND, *TINY_KINDS)
"""All sets that have a name."""


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
    name_or_path: str | Path,
    *,
    limit: Count | None = None,
    seed: Seed | None = None,
    folder: Path | None = None,
    text_column: str | None = None,
    id_column: str | None = None,
    seed_column: str | None = None,
    guidance_column: str | None = None,
) -> PromptSet:
    """Returns a set of prompts.

    Args:
        name_or_path: One of `NAMES`, or a file: a table (*.csv, *.tsv, *.jsonl, *.parquet), a JSON list of objects or
            of texts or MS-COCO's own file of captions (*.json), or a prompt in each line (*.txt).
        limit: How many prompts at most, in the order of the set. A part of the set holds the first of each of as many
            equal stretches; or, with a seed, a random choice, of which smaller limits choose a part.
        seed: Chooses the prompts at random, or the captions of a tiny set. Without a limit it does nothing to others.
        folder: Where the file of a named set already lies; nothing is fetched then.
        text_column: The column of a file that holds the prompt; None is the first of `TEXT_COLUMNS` that is there.
        id_column: The column that names the prompt; None is the first of `ID_COLUMNS`, or the number of the row.
        seed_column: The column with the seed to draw it from; None is the first of `SEED_COLUMNS`, if there is one.
        guidance_column: The column with the guidance scale to draw it with; None is the first of `GUIDANCE_COLUMNS`, if
            there is one.

    Rows without a prompt, as I2P has one, are left out, and a warning names them.

    Raises:
        ValueError: There is no such set or column, it has to be given as a file, `limit` is not positive, or a row is
            not as it has to be: a prompt that is no text, an id that is there already or cannot be part of a file name,
            a seed that is no whole number, a guidance scale below 0, bytes that are not UTF-8. The message names file,
            row and value. Rows count from 1.
        FileNotFoundError: There is no such file, or not in `folder`.
        OSError: A named set cannot be fetched.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    name = str(name_or_path)
    columns = Columns(text_column, id_column, seed_column, guidance_column)
    if name in TINY_KINDS:
        from overpaint import tinyworld

        seed = seed or 0
        texts = tinyworld.captions(TINY_KINDS[name], TINY_COUNT if limit is None else limit, seed)
        prompts = tuple(Prompt(f"{name}-{k:04d}", text, None, {}) for k, text in enumerate(texts))
        return PromptSet(name=name, prompts=prompts, source=f"overpaint.tinyworld.captions, seed {seed}")
    if name in BY_HAND:
        about = BY_HAND[name]
        raise ValueError(
            f"prompts: {name} must be given as a file, because no SHA-256 of it is known to fetch it by: save "
            f"{about.url} as {about.file} (columns {', '.join(about.columns)}; licence: {about.licence}) and give the "
            f"path of the file in place of {name!r}"
        )
    if name in FETCHED:
        path, source = fetch(FETCHED[name], folder), FETCHED[name].source
    else:
        path, source = Path(name_or_path), name
        if not path.is_file():
            if path.suffix:
                raise FileNotFoundError(f"there is no file of prompts at {path}")
            raise ValueError(f"prompts must be one of {', '.join(NAMES)}, or a file, got {name!r}")
        name = path.stem
    return PromptSet(name=name, prompts=_part(read_prompts(path, columns), limit, seed), source=source)


def _part(prompts: Sequence[Prompt], limit: int | None, seed: int | None) -> tuple[Prompt, ...]:
    """Returns some of the prompts, in their order; all where there are not more."""
    if limit is None or limit >= len(prompts):
        return tuple(prompts)
    if seed is None:
        return tuple(evenly(prompts, limit))

    # By a hash rather than by a generator: equal on every version of Python, and a smaller choice is part of a larger.
    def chance(place: int) -> bytes:
        return hashlib.sha256(f"{seed}/{prompts[place].id}".encode()).digest()

    return tuple(prompts[place] for place in sorted(sorted(range(len(prompts)), key=chance)[:limit]))


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """Returns the first of each of `count` equal stretches; all where there are not more."""
    if len(items) <= count:
        return list(items)
    return [items[k * len(items) // count] for k in range(count)]
