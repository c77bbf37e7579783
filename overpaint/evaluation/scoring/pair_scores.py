"""Scores of (image, prompt) pairs by several rewards, batch by batch, with a journal that a killed run goes on from."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from overpaint.evaluation.images.files import to_images
from overpaint.evaluation.images.pairs import Pair, Read, Size, batches_by_size, read_ahead, read_image
from rewards import Reward
from rewards.combine import reads_prompts
from rewards.types import scores_of


class Journal:
    """Records of one job, each on a line of its own and flushed when it is written; use it in a `with` statement.

    The first line says which job it is. The last may be torn, if the job was killed while it was written: it is cut off
    and counts as not written.

    Args:
        path: The file; begun if it is not there.
        job: What has to be the same for the records to be of use, by name.

    Raises:
        ValueError: The file tells of another job, or is damaged before its last line.
    """

    def __init__(self, path: Path, job: Mapping[str, Any]) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        lines, whole_bytes = _whole_lines(path)
        if lines:
            _check_job(path, lines[0], job)
            self.records = lines[1:]
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        self._file.truncate(whole_bytes)
        if not lines:
            self._write(dict(job))

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes a record, which from then on survives the death of the program."""
        self.records.append(dict(record))
        self._write(record)

    def __enter__(self) -> "Journal":
        """Returns the journal itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()


def _whole_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Returns the lines that are whole, and how many bytes they take."""
    if not path.exists():
        return [], 0
    lines: list[dict[str, Any]] = []
    whole_bytes = 0
    texts = path.read_bytes().splitlines(keepends=True)
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text) if text.endswith(b"\n") else None
        except ValueError:
            line = None
        if not isinstance(line, dict):
            if number == len(texts):
                break
            raise ValueError(f"{path} is damaged in line {number}; delete it to begin again")
        lines.append(line)
        whole_bytes += len(text)
    return lines, whole_bytes


def _check_job(path: Path, begun: Mapping[str, Any], job: Mapping[str, Any]) -> None:
    for name, value in job.items():
        if begun.get(name) != value:
            raise ValueError(
                f"{path} was begun with {name} {begun.get(name)!r}, got {value!r}; "
                f"ask for the same to go on, or delete the file to begin again"
            )


class PairScores(NamedTuple):
    """What the rewards say of each pair."""

    scores: dict[str, list[float | None]]
    """One number for each pair by each reward; None where there is no score."""
    broken: dict[int, str]
    """Why there is none, by the index of the pair."""


def score_pairs(
    pairs: Sequence[Pair],
    sizes: Sequence[Size | str],
    rewards: Mapping[str, Reward],
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
    check_prompts(pairs, rewards)
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
        with tqdm(total=total, initial=count, desc="scoring", unit="image", disable=not progress) as bar:
            for number, batch, images in read_ahead(todo, lambda index: read_image(pairs[index].path)):
                broken = {index: image for index, image in zip(batch, images, strict=True) if isinstance(image, str)}
                if not broken or skip_broken:
                    scores, unscored = _score_batch(batch, images, pairs, rewards, device)
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
    return _gathered(sizes, batches, done, rewards)


def check_prompts(pairs: Sequence[Pair], rewards: Mapping[str, Reward]) -> None:
    """Checks that every pair has a prompt if a reward reads them.

    Raises:
        ValueError: One has none.
    """
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


def _gathered(
    sizes: Sequence[Size | str],
    batches: Sequence[list[int]],
    done: Mapping[int, Mapping[str, Any]],
    rewards: Mapping[str, Reward],
) -> PairScores:
    """Puts the scores of all batches in the order of the pairs."""
    scores: dict[str, list[float | None]] = {name: [None] * len(sizes) for name in rewards}
    broken = {index: size for index, size in enumerate(sizes) if isinstance(size, str)}
    for number, batch in enumerate(batches):
        for name in rewards:
            for index, value in zip(batch, done[number]["scores"][name], strict=True):
                scores[name][index] = value
        broken |= {int(index): why for index, why in done[number]["broken"].items()}
    return PairScores(scores, dict(sorted(broken.items())))
