"""Preference accuracy: how often a reward orders two images of one prompt as people did.

Source: Xu et al. (2023), https://arxiv.org/abs/2304.05977, section 4.1, and THUDM/ImageReward, `test.py`, which counts
over the pairs of all prompts; the paper's caption speaks of an average over prompts. Both are computed here.
"""

import json
import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from overpaint.evaluation.images.pairs import Pair, image_sizes
from overpaint.evaluation.metrics.statistics import mean_estimate
from overpaint.evaluation.prompts.prompt_sets import IMAGE_REWARD_TEST
from rewards import Reward
from rewards.public_files import fetch

from .pair_scores import score_pairs

WORST_RANK = 5
"""Ranks go from 1, the best, to this; images of one prompt may share a rank."""


class PreferenceAccuracy(NamedTuple):
    """How often the scores agree with people. Standard errors are NaN where there is one prompt only."""

    correct: int
    """Pairs that the scores order as people did; equal scores are wrong."""
    pairs: int
    """Pairs of one prompt's images that people ranked differently."""
    micro: float
    """Fraction of all pairs that are correct: what ImageReward's `test.py` prints."""
    micro_error: float
    """Standard error of `micro`. It takes the prompts as independent, not the pairs, which share images."""
    macro: float
    """Mean over prompts of each one's fraction; prompts without pairs do not count."""
    macro_error: float
    """Standard error of `macro`."""
    tied_pairs_skipped: int
    """Pairs to which people gave the same rank."""
    prompts_with_pairs: int
    """Prompts with at least one pair."""


class RankedImages(NamedTuple):
    """The images of one prompt, and how people ranked them."""

    id: str
    """Unique name of the prompt."""
    prompt: str
    """What the images were drawn for."""
    images: tuple[str, ...]
    """Path of each image, relative to the folder of images."""
    ranking: tuple[int, ...]
    """Rank of each image: 1 is best, `WORST_RANK` worst."""


def preference_accuracy(scores: Sequence[Sequence[float]], rankings: Sequence[Sequence[int]]) -> PreferenceAccuracy:
    """Compares the order of scores with the ranks that people gave.

    Args:
        scores: For each prompt the score of each of its images; higher is better.
        rankings: For each prompt the rank of each of its images; 1 is best.

    Raises:
        ValueError: Scores and ranks differ in number, a score is not finite, or no two images are ranked differently.
    """
    if len(scores) != len(rankings):
        raise ValueError(f"scores must be of as many prompts as rankings, got {len(scores)} and {len(rankings)}")
    correct, pairs, tied = [], [], 0
    for index, (own, ranks) in enumerate(zip(scores, rankings, strict=True)):
        if len(own) != len(ranks):
            raise ValueError(f"scores[{index}] must hold one for each of {len(ranks)} images, got {len(own)}")
        if not all(map(math.isfinite, own)):
            raise ValueError(f"scores[{index}] must be finite, got {list(own)}")
        right, untied = 0, 0
        for (one, its_rank), (other, other_rank) in combinations(zip(own, ranks, strict=True), 2):
            if its_rank == other_rank:
                tied += 1
                continue
            untied += 1
            right += one > other if its_rank < other_rank else other > one
        if untied:
            correct.append(right)
            pairs.append(untied)
    if not pairs:
        raise ValueError("rankings must hold at least one pair of images of one prompt with different ranks, got none")

    outcomes = [float(k < right) for right, untied in zip(correct, pairs, strict=True) for k in range(untied)]
    prompts = [str(prompt) for prompt, untied in enumerate(pairs) for _ in range(untied)]
    micro = mean_estimate(outcomes, prompts)
    macro = mean_estimate([right / untied for right, untied in zip(correct, pairs, strict=True)])
    return PreferenceAccuracy(
        correct=sum(correct),
        pairs=sum(pairs),
        micro=micro.mean,
        micro_error=micro.error,
        macro=macro.mean,
        macro_error=macro.error,
        tied_pairs_skipped=tied,
        prompts_with_pairs=len(pairs),
    )


def read_ranked(path: Path | None = None) -> tuple[RankedImages, ...]:
    """Reads ranked images in the format of ImageReward's test.json.

    Args:
        path: The file; ImageReward's own, fetched when first used, if it is not given.

    Raises:
        ValueError: It is not a list of "id", "prompt", "generations" and "ranking", an id occurs twice, an image has no
            rank, or a rank is not a whole number from 1 to 5. The message names the entry.
    """
    path = path or fetch(IMAGE_REWARD_TEST)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{path} must be JSON, got {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path} must hold a list, got {type(entries).__name__}")
    ranked: dict[str, RankedImages] = {}
    for index, entry in enumerate(entries):
        images = _checked(entry, f"entry {index} of {path}")
        if images.id in ranked:
            raise ValueError(f"id must be unique in {path}, got {images.id!r} again in entry {index}")
        ranked[images.id] = images
    return tuple(ranked.values())


def score_ranked(
    reward: Reward,
    ranked: Sequence[RankedImages],
    folder: Path,
    journal: Path,
    *,
    name: str = "reward",
    device: torch.device | str = "cpu",
    batch_size: int = 16,
    progress: bool = True,
) -> list[list[float]]:
    """Scores ranked images with a reward, for `preference_accuracy`.

    Args:
        reward: Scores the images, as they are stored, for their prompt.
        ranked: Which images.
        folder: Where their paths begin.
        journal: File of what is finished, with which a killed run goes on; it is left there, so that a repeated call
            scores nothing anew.
        name: What the reward is called in the journal, which is of one reward only.
        device: Where the reward wants its images.
        batch_size: Images that are scored at once; they are of one size.
        progress: Whether a progress bar is shown.

    Returns:
        For each prompt the score of each of its images.

    Raises:
        ValueError: Images are missing or cannot be read, of which those that show at once are found before any is
            scored; `batch_size` is not positive; the journal is of another reward or of other images; or the reward
            gave not one finite number for each image.
    """
    pairs = [
        Pair(image, folder / image, images.prompt, {"image": image, "prompt": images.prompt})
        for images in ranked
        for image in images.images
    ]
    sizes = image_sizes(pairs)
    found = score_pairs(pairs, sizes, {name: reward}, journal, batch_size=batch_size, device=device, progress=progress)
    scores = iter(found.scores[name])
    # None stands for images that were skipped, and none is.
    return [[cast(float, next(scores)) for _ in images.images] for images in ranked]


def _checked(entry: Any, where: str) -> RankedImages:
    """Returns one entry of the file, which is whatever JSON can hold."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be an object, got {type(entry).__name__}")
    for name in ("id", "prompt"):
        if not isinstance(entry.get(name), str):
            raise ValueError(f"{name} of {where} must be a string, got {entry.get(name)!r}")
    where = f"{entry['id']!r}, {where},"
    images, ranking = entry.get("generations"), entry.get("ranking")
    if not isinstance(images, list) or not images or not all(isinstance(image, str) for image in images):
        raise ValueError(f"generations of {where} must be a list of paths, got {images!r}")
    if not isinstance(ranking, list) or len(ranking) != len(images):
        raise ValueError(
            f"ranking of {where} must be a list with one rank for each of {len(images)} images, got {ranking!r}"
        )
    for rank in ranking:
        if type(rank) is not int or not 1 <= rank <= WORST_RANK:
            raise ValueError(f"ranking of {where} must hold whole numbers from 1 to {WORST_RANK}, got {rank!r}")
    return RankedImages(entry["id"], entry["prompt"], tuple(images), tuple(ranking))
