"""How often metrics order two images of one prompt as people did: preference accuracy, beside published numbers.

    python examples/evaluate_preference.py
    python examples/evaluate_preference.py --images test_images --rewards image-reward clip aesthetic blip
    accelerate launch --num_processes 4 examples/evaluate_preference.py --images test_images

By default a test is made in the tiny world: several pictures of each caption, ranked by what people of that world like.
With a folder of images it is ImageReward's test of 466 prompts and 2,720 ranked images, whose file is fetched when it
is first used; the images are published with ImageReward's dataset and lie as the file names them
(part-005658/images/0040/....webp). What is scored is kept, so that the same command goes on where it was interrupted.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import tyro
from accelerate.utils import gather_object

from overpaint.evaluation import DrawConfig, Estimate, ImageFolder, Report, generate, plan, to_images
from overpaint.evaluation.experiments.experiment import command_line
from overpaint.evaluation.experiments.published import (
    PREFERENCE_ACCURACY,
    Measured,
    published,
    published_comparison,
    tables_html,
    tables_markdown,
)
from overpaint.evaluation.images.plan import PlannedImage
from overpaint.evaluation.metrics.statistics import student_95
from overpaint.evaluation.prompts import IMAGE_REWARD_TEST, prompt_set
from overpaint.evaluation.report.page import Section
from overpaint.evaluation.report.table import Table
from overpaint.evaluation.scoring.pair_scores import (
    WORST_RANK,
    PreferenceAccuracy,
    RankedImages,
    preference_accuracy,
    read_ranked,
    score_ranked,
)
from overpaint.policy.atomic import write_text
from overpaint.settings import AnyPath, Distinct, Field, settings
from overpaint.tinyworld import REWARDS as TINY_WORLD_REWARDS
from overpaint.training import from_main, process_state
from rewards import reward_named
from rewards.combine import to_device
from rewards.public_files import fetch, sha256_of

PAPER_REWARDS = ("clip", "aesthetic", "blip", "image-reward")
TINY_REWARDS = ("tiny-image-reward", "compressibility", "tinyworld:Utility")
PUBLISHED_AS = {
    "clip": "CLIP score", "aesthetic": "Aesthetic score", "blip": "BLIP score", "image-reward": "ImageReward",
}  # fmt: skip
MEAN_OF_PROMPTS = "preference accuracy, mean of the prompts, %"


@settings
class Config:
    """Which metrics are tried on which test."""

    images: AnyPath | None = None
    """Folder of the images of the test; None makes a test in the tiny world."""

    test: AnyPath | None = None
    """A list of {"id", "prompt", "generations", "ranking"} in JSON; None is ImageReward's own, which is fetched."""

    rewards: Distinct[str] = ()
    """Names such as image-reward, or package.module:factory, called without arguments; none is the four metrics of the
    paper, or three for the tiny world."""

    output_dir: AnyPath = Path("runs/evaluate_preference")
    """Where everything is written."""

    batch_size: int = Field(16, ge=1)
    """Images of one size that are scored at a time."""

    device: str | None = None
    """Where the rewards are computed; None is the accelerator if there is one, and else the CPU."""

    tiny_prompts: int = Field(60, ge=1)
    """Captions of the tiny world's test."""

    tiny_images: int = Field(5, ge=2, le=WORST_RANK)
    """Pictures of each caption."""

    tiny_steps: int = Field(10, ge=1)
    """Denoising steps of each picture."""

    def __post_init__(self) -> None:
        """Checks that a test of one's own comes with its images."""
        if self.test is not None and self.images is None:
            raise ValueError(f"test must come with images, the folder of its images, got {self.test}")


class RankedSet(NamedTuple):
    """Ranked images, and where they are."""

    name: str
    """What it is called in tables; empty where published numbers are of the same test."""
    file: Path
    folder: Path
    ranked: tuple[RankedImages, ...]


def make_tiny_test(config: Config, device: str) -> RankedSet:
    """Draws pictures of the tiny world, those that are not there yet, and ranks those of one caption by their worth."""
    from overpaint import tinyworld

    root, file = config.output_dir / "images", config.output_dir / "test.json"
    captions = prompt_set("tiny-benign", limit=config.tiny_prompts)
    planned = plan({"benign": captions.texts}, images_per_prompt=config.tiny_images)
    drawing = DrawConfig(steps=config.tiny_steps, guidance_scale=3.0)
    generate(tinyworld.load_policy(device=device), planned, root, drawing, model="tiny")
    process_state().wait_for_everyone()
    from_main(partial(write_ranking, file, root, planned, config.tiny_images))
    return RankedSet("tiny world", file, root, read_ranked(file))


def write_ranking(file: Path, root: Path, planned: Sequence[PlannedImage], each: int) -> None:
    """Writes the pictures of each caption, `each` of them in a row of the plan, with their ranks by true worth."""
    from overpaint import tinyworld

    pictures, entries = ImageFolder.open(root, "tiny"), []
    for start in range(0, len(planned), each):
        places = range(start, start + each)
        own = [planned[k] for k in places]
        worth = tinyworld.utility(to_images(pictures.pixels(places)), [image.prompt for image in own]).tolist()
        best_first = sorted(set(worth), reverse=True)
        entries.append(
            {
                "id": own[0].id,
                "prompt": own[0].prompt,
                "generations": [f"tiny/{image.file_name}" for image in own],
                "ranking": [best_first.index(value) + 1 for value in worth],
            }
        )
    write_text(file, json.dumps(entries, indent=1) + "\n")


def given_test(config: Config, folder: Path) -> RankedSet:
    """Returns the test that the configuration names, or ImageReward's own."""
    file = config.test or fetch(IMAGE_REWARD_TEST)
    name = "" if sha256_of(file) == IMAGE_REWARD_TEST.sha256 else file.name
    return RankedSet(name, file, folder, read_ranked(file))


def percent(mean: float, error: float, prompts: int) -> Estimate:
    """Returns a fraction in percent, with the interval of as many independent prompts."""
    reach = math.nan if prompts < 2 else student_95(prompts - 1) * error
    return Estimate(100 * mean, 100 * error, 100 * (mean - reach), 100 * (mean + reach), prompts)


def measured(accuracies: dict[str, PreferenceAccuracy], test: RankedSet) -> list[Measured]:
    """Returns the accuracies under the names that they are published with."""
    found = []
    for name, accuracy in accuracies.items():
        ends = {
            PREFERENCE_ACCURACY: (accuracy.micro, accuracy.micro_error),
            MEAN_OF_PROMPTS: (accuracy.macro, accuracy.macro_error),
        }
        for metric, (mean, error) in ends.items():
            estimate = percent(mean, error, accuracy.prompts_with_pairs)
            found.append(Measured("preference", PUBLISHED_AS.get(name, name), metric, test.name, estimate))
    return found


def comparison_of(accuracies: dict[str, PreferenceAccuracy], test: RankedSet) -> tuple[Table, ...]:
    """Returns the accuracies beside the published ones."""
    return published_comparison(measured(accuracies, test), published("preference", PREFERENCE_ACCURACY))


def summary_text(accuracies: dict[str, PreferenceAccuracy]) -> str:
    """Returns a line for each metric."""
    width = max(map(len, accuracies))
    return "\n".join(
        f"{name:{width}}  {100 * own.micro:6.2f} %  {own.correct:,} of {own.pairs:,} pairs of "
        f"{own.prompts_with_pairs} prompts, {own.tied_pairs_skipped} ties of people left out"
        for name, own in accuracies.items()
    )


def write_report(config: Config, test: RankedSet, accuracies: dict[str, PreferenceAccuracy]) -> Path:
    """Writes the numbers as JSON and the page; returns the page."""
    numbers = {
        name: {key: None if math.isnan(value) else value for key, value in own._asdict().items()}
        for name, own in accuracies.items()
    }
    about = {"test": test.name or IMAGE_REWARD_TEST.name, "sha256": sha256_of(test.file), "accuracies": numbers}
    write_text(config.output_dir / "preference.json", json.dumps(about, indent=1) + "\n")
    tables = tables_html(comparison_of(accuracies, test))
    people = "what people of the tiny world like" if config.images is None else "people"
    page = config.output_dir / "report.html"
    Report(
        title="Preference accuracy",
        lead=f"How often a metric gives the better of two images of one prompt the higher score, by the ranks of "
        f"{people}: {len(test.ranked)} prompts, {sum(len(images.images) for images in test.ranked):,} images.",
        sections=[Section("preference", "Preference accuracy", tables)],
        pictures=[ImageFolder.open(test.folder, "tiny")] if config.images is None else [],
        notes=[
            "Pairs are two images of one prompt that people ranked differently; equal scores count as wrong.",
            "The accuracy is over all pairs, as ImageReward's test.py counts it; the mean of the prompts gives each "
            "prompt the same weight. Errors take the prompts as independent, not the pairs.",
            "Published numbers are of ImageReward's test set alone: accuracies on any other test stand in rows of "
            "their own, without a difference.",
            *summary_text(accuracies).split("\n"),
        ],
        commands=[command_line("python examples/evaluate_preference.py", config)],
        settings={**asdict(config), "rewards": ", ".join(accuracies)},
    ).save(page)
    return page


def journal_of(config: Config, name: str) -> Path:
    """Returns the file of what a reward has scored so far."""
    return config.output_dir / f"scores-{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}.jsonl"


def score_all(config: Config, names: Sequence[str], test: RankedSet, device: str) -> dict[str, list[list[float]]]:
    """Scores the test's images; under several processes each scores by its own rewards."""
    state = process_state()
    found: list[tuple[str, list[list[float]]]] = []
    for name in names[state.process_index :: state.num_processes]:
        reward = reward_named(name, TINY_WORLD_REWARDS)
        to_device(reward, device)
        journal = journal_of(config, name)
        scores = score_ranked(
            reward, test.ranked, test.folder, journal, name=name, device=device, batch_size=config.batch_size
        )
        found.append((name, scores))
    by_name = dict(gather_object(found) if state.num_processes > 1 else found)
    return {name: by_name[name] for name in names}


def main(config: Config) -> dict[str, PreferenceAccuracy]:
    """Scores, writes numbers and page, and says how often each metric agrees."""
    state = process_state()
    device = config.device or str(state.device)
    if config.images is None:
        names = config.rewards or TINY_REWARDS
        test = make_tiny_test(config, device)
    else:
        names = config.rewards or PAPER_REWARDS
        test = given_test(config, config.images)
    scores = score_all(config, names, test, device)
    rankings = [images.ranking for images in test.ranked]
    accuracies = {name: preference_accuracy(scores[name], rankings) for name in names}
    if state.is_main_process:
        page = write_report(config, test, accuracies)
        print(summary_text(accuracies))
        print(f"\n{tables_markdown(comparison_of(accuracies, test))}")
        print(f"\nThe report: {page}")
    return accuracies


if __name__ == "__main__":
    main(tyro.cli(Config))
    process_state().destroy_process_group()
