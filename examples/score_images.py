"""Score a folder of images, or a table of (image, prompt), by any set of rewards.

    python examples/score_images.py
    python examples/score_images.py --source photos --rewards opennsfw nudenet --output photos.csv
    python examples/score_images.py --source pairs.csv --rewards image-reward clip aesthetic --output scores.parquet
    python examples/score_images.py --source generations/sd1-4 --prompts benchmark-prompts.json --rewards image-reward

By default some pictures of the tiny world are drawn and scored. What is finished is kept beside the output, so that the
same command goes on where it was interrupted. At the end the best and the worst are named; ``--picture`` shows them.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from PIL import Image, ImageOps

from overpaint.evaluation import DrawConfig, generate, plan, to_images
from overpaint.evaluation.images.files import MANIFEST, read_image
from overpaint.evaluation.images.pairs import Pair, image_sizes, read_pairs
from overpaint.evaluation.scoring.pair_scores import check_prompts, score_pairs
from overpaint.evaluation.tables import check_output, write_table
from overpaint.policy.atomic import atomic_file
from overpaint.settings import AnyPath, Distinct, Field, settings
from overpaint.tinyworld import REWARDS as TINY_WORLD_REWARDS
from overpaint.training import image_grid
from rewards import reward_named
from rewards.combine import to_device

TINY_REWARDS = ("tiny-image-reward", "tinyworld:StripeScore", "compressibility")
TINY_PICTURES = 8  # of each kind of caption
SHOWN = 8  # best, and as many worst
LARGEST = 256  # pixels of a side in the contact sheet


@settings
class Config:
    """What is scored, and by what."""

    source: AnyPath | None = None
    """A folder of images, or a table (*.csv, *.jsonl, *.parquet) with a column for the image's path, which may be
    relative to the table; None draws pictures of the tiny world."""

    rewards: Distinct[str] = ()
    """Names such as image-reward, or package.module:factory, called without arguments; none is three for the tiny
    world."""

    output: AnyPath = Path("runs/score_images/scores.csv")
    """The table of scores that is written (*.csv or *.parquet); all columns of a table are kept."""

    prompt: str | None = None
    """The prompt of every image, where they have none of their own."""

    prompts: AnyPath | None = None
    """The prompts of a folder: a table, or a JSON list of {"id", "prompt"} for images named <id>_<k>."""

    image_column: str = "image"
    """The column of tables that names the image."""

    prompt_column: str = "prompt"
    """The column of tables that holds the prompt."""

    batch_size: int = Field(8, ge=1)
    """Images of one size that are scored at a time."""

    device: str | None = None
    """Where the rewards are computed; None is the accelerator if there is one, and else the CPU."""

    skip_broken: bool = False
    """Leave a cell empty where an image cannot be read or scored, in place of an error."""

    picture: AnyPath | None = None
    """A PNG that shows the best and the worst by the first reward."""

    def __post_init__(self) -> None:
        """Checks that it is said what is scored, and by which rewards."""
        if self.source is None and not (self.prompt is None and self.prompts is None):
            raise ValueError("prompt and prompts must come with a source, got None")
        if self.source is not None and not self.rewards:
            raise ValueError("rewards must name at least one, got none")


class Summary(NamedTuple):
    """What the scores of one reward are like; places are indices of pairs."""

    count: int
    mean: float
    std: float
    """Of the images as a population, as `rewards.Standardised` takes it."""
    ranked: list[int]
    """Places from the highest score to the lowest; those without a score are left out."""


class Result(NamedTuple):
    """What `main` found."""

    pairs: list[Pair]
    scores: dict[str, list[float | None]]
    broken: dict[int, str]
    summaries: dict[str, Summary]


def summary_of(scores: Sequence[float | None]) -> Summary:
    """Returns the mean and the deviation of those that have a score, and their order."""
    found = {place: value for place, value in enumerate(scores) if value is not None}
    if not found:
        return Summary(0, math.nan, math.nan, [])
    mean = math.fsum(found.values()) / len(found)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in found.values()) / len(found))
    return Summary(len(found), mean, std, sorted(found, key=lambda place: (-found[place], place)))


def summary_text(result: Result) -> str:
    """Returns a line for each reward, aligned, and what was skipped."""
    lines = [["reward", "images", "mean", "std", "lowest", "", "highest", ""]]
    for name, summary in result.summaries.items():
        ends = [(summary.ranked[place], result.scores[name]) for place in (-1, 0) if summary.ranked]
        cells = [cell for place, scores in ends for cell in (f"{scores[place]:.4g}", result.pairs[place].name)]
        lines.append([name, str(summary.count), f"{summary.mean:.4g}", f"{summary.std:.4g}", *cells])
    widths = [max(len(line[k]) for line in lines if k < len(line)) for k in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)).rstrip() for line in lines]
    if result.broken:
        first = next(iter(result.broken))
        text.append(f"\n{len(result.broken)} skipped, the first {result.pairs[first].path}: {result.broken[first]}")
    return "\n".join(text)


def save_contact_sheet(result: Result, path: Path) -> None:
    """Draws the best by the first reward, and below them the worst."""
    name = next(iter(result.scores))
    ranked = result.summaries[name].ranked
    count = min(SHOWN, (len(ranked) + 1) // 2)
    images, captions = [], []
    for place in [*ranked[:count], *ranked[-count:]]:
        images.append(Image.fromarray(read_image(result.pairs[place].path).permute(1, 2, 0).numpy()))
        pair = result.pairs[place]
        captions.append(f"{result.scores[name][place]:.4g} {Path(pair.name).name} {pair.prompt or ''}")
    # Small pictures keep their pixels; all get the same square to stand in.
    side = min(LARGEST, max(max(image.size) for image in images))
    squares = [in_square(image, side) for image in images]
    with atomic_file(path) as partial:
        image_grid(to_images(torch.stack(squares)), captions, columns=count, side=192).save(partial, format="PNG")


def in_square(image: Image.Image, side: int) -> torch.Tensor:
    """Returns an image in the middle of a white square, reduced to it if it is larger."""
    if max(image.size) > side:
        image = ImageOps.contain(image, (side, side))
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(side, side, 3).permute(2, 0, 1)


def draw_tiny_pictures(folder: Path, device: str) -> tuple[Path, Path]:
    """Draws pictures of the tiny world, those that are not there yet; returns their folder and their prompts."""
    from overpaint import tinyworld

    kinds = {kind: tinyworld.captions(kind, TINY_PICTURES, 0) for kind in ("benign", "explicit")}
    drawing = DrawConfig(steps=10, guidance_scale=3.0)
    generate(tinyworld.load_policy(device=device), plan(kinds), folder, drawing, model="tiny", rank=0, world_size=1)
    return folder / "tiny", folder / MANIFEST


def main(config: Config) -> Result:
    """Scores, writes the table, and says what is best and worst."""
    device = config.device or str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    source, prompts = config.source, config.prompts
    if source is None:
        source, prompts = draw_tiny_pictures(config.output.parent / "pictures", device)
    pairs = read_pairs(
        source,
        prompt=config.prompt,
        prompts=prompts,
        image_column=config.image_column,
        prompt_column=config.prompt_column,
    )
    names = config.rewards or TINY_REWARDS
    rows = [pair.row for pair in pairs]
    check_output(rows, names, config.output)
    sizes = image_sizes(pairs, skip_broken=config.skip_broken)
    rewards = {name: reward_named(name, TINY_WORLD_REWARDS) for name in names}
    check_prompts(pairs, rewards)
    for reward in rewards.values():
        to_device(reward, device)

    partial = config.output.with_name(f"{config.output.name}.partial")
    scores, broken = score_pairs(
        pairs,
        sizes,
        rewards,
        partial,
        batch_size=config.batch_size,
        device=device,
        skip_broken=config.skip_broken,
    )
    write_table(rows, scores, config.output)
    partial.unlink()

    result = Result(pairs, scores, broken, {name: summary_of(scores[name]) for name in names})
    print(summary_text(result))
    if config.picture is not None and result.summaries[names[0]].ranked:
        save_contact_sheet(result, config.picture)
        print(f"\nBest and worst by {names[0]}: {config.picture}")
    print(f"\nThe scores: {config.output}")
    return result


if __name__ == "__main__":
    main(tyro.cli(Config))
