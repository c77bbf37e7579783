"""Scores of (image, prompt) pairs by several rewards, with a journal, and how often they order images as people did.

Source of preference accuracy: Xu et al. (2023), https://arxiv.org/abs/2304.05977, section 4.1, and THUDM/ImageReward,
`test.py`, which counts over the pairs of all prompts; the paper's caption speaks of an average over prompts. Both are
computed here.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from overpaint.evaluation.images.files import Read, pixels_or_reason, to_images
from overpaint.evaluation.images.pairs import Pair, Size, batches_by_size, image_sizes, read_ahead
from overpaint.evaluation.metrics.statistics import mean_estimate
from overpaint.evaluation.prompts import IMAGE_REWARD_TEST
from overpaint.policy.atomic import append
from overpaint.policy.sealed import DamagedFileError, sealed, unsealed
from overpaint.text_files import read_bytes, read_json
from overpaint.training.logging import progress_bar
from rewards import Reward, RewardLike, as_reward
from rewards.public_files import fetch
from rewards.types import reads_prompts, scores_of


class Journal:
    """Records of one job, each on a line of its own and flushed when it is written; use it in a `with` statement.

    Each carries the hash of its content. The first line says which job it is: what has to be the same for the records
    to be of use, by name. The last may be torn, if the job was killed while it was written: it is cut off and counts as
    not written.

    Raises:
        ValueError: The file tells of another job, or is damaged before its last line.
    """

    def __init__(self, path: Path, job: Mapping[str, Any]) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        lines, whole_bytes = _whole_lines(path)
        if lines:
            for name, value in job.items():
                if lines[0].get(name) != value:
                    raise ValueError(
                        f"{path} was begun with {name} {lines[0].get(name)!r}, got {value!r}; "
                        f"ask for the same to go on, or delete the file to begin again"
                    )
            self.records = lines[1:]
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        self._file.truncate(whole_bytes)
        if not lines:
            self._write(dict(job))

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes a record, which from then on survives the death of the program.

        Raises:
            OSError: The disk is full, for example; the message names the file, and no part of the record is in it.
        """
        self._write(record)
        self.records.append(dict(record))

    def __enter__(self) -> "Journal":
        """Returns the journal itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        append(self._file, sealed(record))


def _whole_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Returns the lines that are whole, and how many bytes they take."""
    lines: list[dict[str, Any]] = []
    whole_bytes = 0
    texts = read_bytes(path).splitlines(keepends=True) if path.exists() else []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(unsealed(text, f"line {number} of {path}"))
            whole_bytes += len(text)
        except DamagedFileError as error:
            if number < len(texts):
                raise ValueError(f"{error}; delete the file to begin again") from error
    return lines, whole_bytes


class PairScores(NamedTuple):
    """What the rewards say of each pair."""

    scores: dict[str, list[float | None]]
    """One number for each pair by each reward; None where there is no score."""
    broken: dict[int, str]
    """Why there is none, by the index of the pair."""


def score_pairs(
    pairs: Sequence[Pair],
    sizes: Sequence[Size | str],
    rewards: Mapping[str, RewardLike],
    journal: Path,
    *,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    skip_broken: bool = False,
    progress: bool = True,
) -> PairScores:
    """Scores pairs, those that are not in the journal yet.

    A batch holds images of one size. Which images it holds depends on all pairs and not on what is finished, so that
    a run that was interrupted gives the same numbers as one that was not.

    Args:
        pairs: What is scored.
        sizes: What `image_sizes` says of them.
        rewards: By what, each by a name.
        journal: File of finished batches. It is left there when all is done.
        batch_size: Images scored at a time.
        device: Where the rewards want their images.
        skip_broken: Whether images that cannot be read or scored are left out, in place of an error.
        progress: Whether a progress bar is shown.

    Raises:
        ValueError: A reward needs prompts that are not there, the journal is of other rewards or images, an image
            cannot be read, or a score is not one finite number.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    scorers = {name: as_reward(reward, f"rewards[{name!r}]") for name, reward in rewards.items()}
    check_prompts(pairs, scorers)
    batches = batches_by_size(sizes, batch_size)
    job = {"format": 1, "rewards": sorted(rewards), "batch_size": batch_size, "images": len(pairs)}
    with Journal(journal, job) as finished:
        # What an earlier run skipped is tried again if nothing may be skipped now.
        done = {r["batch"]: r for r in finished.records if skip_broken or not r["broken"]}
        for record in done.values():
            _check_batch(record, batches, pairs, journal)
        todo = {number: batch for number, batch in enumerate(batches) if number not in done}
        count = sum(len(batches[number]) for number in done)
        total = sum(map(len, batches))
        with progress_bar(total=total, initial=count, desc="scoring", unit="image", shown=progress) as bar:
            for number, batch, images in read_ahead(todo, lambda index: pixels_or_reason(pairs[index].path)):
                broken = {index: image for index, image in zip(batch, images, strict=True) if isinstance(image, str)}
                if not broken or skip_broken:
                    scores, unscored = _score_batch(batch, images, pairs, scorers, device)
                    broken |= unscored
                if broken and not skip_broken:
                    index, why = next(iter(broken.items()))
                    raise ValueError(
                        f"{pairs[index].path}: {why}; {bar.n} of {total} images are finished and kept in {journal}: "
                        "put this one right and run again, or skip broken images"
                    )
                done[number] = {
                    "batch": number,
                    "pairs": _digest(batch, pairs),
                    "scores": scores,
                    "broken": {str(index): why for index, why in broken.items()},
                }
                finished.append(done[number])
                bar.update(len(batch))
    all_scores: dict[str, list[float | None]] = {name: [None] * len(pairs) for name in rewards}
    all_broken = {index: size for index, size in enumerate(sizes) if isinstance(size, str)}
    for number, batch in enumerate(batches):
        for name in rewards:
            for index, value in zip(batch, done[number]["scores"][name], strict=True):
                all_scores[name][index] = value
        all_broken |= {int(index): why for index, why in done[number]["broken"].items()}
    return PairScores(all_scores, dict(sorted(all_broken.items())))


def check_prompts(pairs: Sequence[Pair], rewards: Mapping[str, Reward]) -> None:
    """Raises a ValueError unless every pair has a prompt, or no reward reads them."""
    missing = [pair.name for pair in pairs if pair.prompt is None]
    readers = [name for name, reward in rewards.items() if reads_prompts(reward)]
    if missing and readers:
        raise ValueError(
            f"{' and '.join(readers)} must have a prompt for every image, got none for {len(missing)} of {len(pairs)}, "
            f"the first {missing[0]}; give prompts, or a reward that does without (one with reads_prompts = False)"
        )


@torch.no_grad()
def _score_batch(
    batch: Sequence[int],
    images: Sequence[Read],
    pairs: Sequence[Pair],
    rewards: Mapping[str, Reward],
    device: torch.device | str,
) -> tuple[dict[str, list[float | None]], dict[int, str]]:
    """Returns the scores of a batch by each reward, and why some of its images that were read have none."""
    unscored: dict[int, str] = {}
    whole = {index: image for index, image in zip(batch, images, strict=True) if not isinstance(image, str)}
    scores: dict[str, list[float | None]] = {name: [None] * len(batch) for name in rewards}
    if not whole:
        return scores, unscored
    stack = to_images(torch.stack(list(whole.values())).to(device))
    prompts = [pairs[index].prompt or "" for index in whole]
    for name, reward in rewards.items():
        values = dict(zip(whole, scores_of(name, reward, stack, prompts).tolist(), strict=True))
        unscored |= {index: f"{name} gives it {v}" for index, v in values.items() if not math.isfinite(v)}
        found = (values.get(index, math.nan) for index in batch)
        scores[name] = [value if math.isfinite(value) else None for value in found]
    return scores, unscored


def _digest(batch: Sequence[int], pairs: Sequence[Pair]) -> str:
    """Returns what differs if a batch holds other images or prompts, or an image's file was written anew."""
    facts = []
    for index in batch:
        about = pairs[index].path.stat()
        facts.append([index, pairs[index].name, pairs[index].prompt, about.st_size, about.st_mtime_ns])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _check_batch(record: Mapping[str, Any], batches: Sequence[list[int]], pairs: Sequence[Pair], journal: Path) -> None:
    """Checks that a finished batch is still one of these pairs."""
    number = record["batch"]
    if number >= len(batches) or record["pairs"] != _digest(batches[number], pairs):
        where = f", at {pairs[batches[number][0]].name}" if number < len(batches) else ""
        raise ValueError(
            f"{journal} is of other images or prompts, or images were written anew since{where}; "
            "put them back to go on, or delete it to begin again"
        )


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
        both = list(combinations(zip(own, ranks, strict=True), 2))
        untied = [(a, b) if rank < other else (b, a) for (a, rank), (b, other) in both if rank != other]
        tied += len(both) - len(untied)
        if untied:
            correct.append(sum(better > worse for better, worse in untied))
            pairs.append(len(untied))
    if not pairs:
        raise ValueError("rankings must hold at least one pair of images of one prompt with different ranks, got none")

    outcomes = [float(k < right) for right, count in zip(correct, pairs, strict=True) for k in range(count)]
    prompts = [str(prompt) for prompt, count in enumerate(pairs) for _ in range(count)]
    micro = mean_estimate(outcomes, prompts)
    macro = mean_estimate([right / count for right, count in zip(correct, pairs, strict=True)])
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
    entries = read_json(path)
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
    reward: RewardLike,
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
        journal: As for `score_pairs`; a repeated call scores nothing anew.
        name: What the reward is called in the journal, which is of one reward only.
        device: Where the reward wants its images.
        batch_size: Images that are scored at once; they are of one size.
        progress: Whether a progress bar is shown.

    Returns:
        For each prompt the score of each of its images.

    Raises:
        ValueError: As `score_pairs`; images that are missing are found before any is scored.
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
