"""Does this ImageReward, with the official weights, give the scores that its authors published?

    python -m rewards.image_reward_check --images FOLDER
    python -m rewards.image_reward_check --images FOLDER --weights ImageReward.pt --vocab vocab.txt

Tests compare the network with the authors' code on random weights. This is the same for the weights themselves, once,
where they are at hand. The folder holds the authors' four example images, 1.webp to 4.webp. Prints a table and exits
with 1 where a score is off.

Source: the README of THUDM/ImageReward.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from overpaint.settings import AnyPath, settings

from .image_reward import ImageReward
from .preprocess import ImageFile

PROMPT = "a painting of an ocean with clouds and birds, day time, low depth field effect"
"""What the four images were drawn for."""
PUBLISHED = (0.58, 0.27, -1.41, -2.03)
"""The authors' scores of images 1 to 4, to two decimals."""
TOLERANCE = 0.01
"""Half a unit of the last decimal for rounding, and as much for other versions of the libraries."""
IMAGES = ("1.webp", "2.webp", "3.webp", "4.webp")
IMAGES_URL = "https://github.com/THUDM/ImageReward/tree/c1392c6dd0fd6ecd6d416c96959ab744a6d0a8fb/assets/images"
"""Where they are. No hash of them is published, so they are not fetched without being asked for."""


@settings
class Config:
    """What is checked."""

    images: AnyPath | None = None
    """Folder with the authors' images 1.webp to 4.webp."""
    weights: AnyPath | None = None
    """The file ImageReward.pt, or a folder of `ImageReward.save_pretrained`; fetched from the hub if not given."""
    vocab: AnyPath | None = None
    """bert-base-uncased's vocab.txt, for a file of weights; fetched from the hub if not given."""
    device: str = "cpu"
    """Where the network runs."""


class Comparison(NamedTuple):
    """One image's score."""

    image: str
    published: float
    computed: float


def check(
    reward: ImageReward,
    images: Sequence[ImageFile],
    *,
    prompt: str = PROMPT,
    expected: Sequence[float] = PUBLISHED,
) -> list[Comparison]:
    """Scores the images for the prompt, each alone as the authors' code does, beside the scores that are expected."""
    if len(images) != len(expected):
        raise ValueError(f"expected must hold one score for each of {len(images)} images, got {len(expected)}")
    rows = []
    for number, (image, score) in enumerate(zip(images, expected, strict=True), start=1):
        name = Path(image).name if isinstance(image, str | Path) else f"image {number}"
        rows.append(Comparison(name, score, reward.inference_rank(prompt, [image])[1][0]))
    return rows


def agrees(rows: Sequence[Comparison], tolerance: float = TOLERANCE) -> bool:
    """Whether every score is within the tolerance of the published one; no score that is not a number is."""
    return all(abs(row.computed - row.published) <= tolerance for row in rows)


def table(rows: Sequence[Comparison], tolerance: float = TOLERANCE) -> str:
    """Returns the comparisons as text, one line each."""
    lines = [f"{'image':10} {'published':>9} {'computed':>9} {'difference':>10}"]
    for row in rows:
        mark = "" if agrees([row], tolerance) else f"  off by more than {tolerance:g}"
        difference = row.computed - row.published
        lines.append(f"{row.image:10} {row.published:9.2f} {row.computed:9.4f} {difference:+10.4f}{mark}")
    return "\n".join(lines)


def image_paths(folder: Path | None) -> list[Path]:
    """Returns the paths of the authors' images in a folder.

    Raises:
        FileNotFoundError: There is no folder, or images are missing; the message says how to get them.
    """
    missing = IMAGES if folder is None else [name for name in IMAGES if not (folder / name).is_file()]
    if missing or folder is None:
        raise FileNotFoundError(
            f"images must be a folder with {', '.join(IMAGES)}, got {folder} without {', '.join(missing)}. Save them "
            f"from {IMAGES_URL}, and give the folder as --images"
        )
    return [folder / name for name in IMAGES]


def main(config: Config, expected: Sequence[float] = PUBLISHED) -> int:
    """Prints the table; returns 0 if every score is as published, else 1."""
    paths = image_paths(config.images)  # before the weights, which may be 1.8 GB to fetch
    reward = ImageReward.load(config.weights, vocab=config.vocab).to(config.device)
    rows = check(reward, paths, expected=expected)
    verdict = "All scores are as published." if agrees(rows) else "Scores are NOT as published."
    sys.stdout.write(f"{table(rows)}\n{verdict}\n")
    return 0 if agrees(rows) else 1


if __name__ == "__main__":
    import tyro

    try:
        sys.exit(main(tyro.cli(Config, description=__doc__)))
    except OSError as error:
        sys.exit(str(error))
