"""What a batch is drawn from, and which part of it is a process's own."""

from collections.abc import Sequence
from typing import TypeVar

import torch

from .run import TrainingRun

Item = TypeVar("Item")


def draw_batch(run: TrainingRun, population: Sequence[Item], count: int) -> list[tuple[Item, int]]:
    """Draws items and a seed for each, for the batch of all processes, and returns this process's part.

    Args:
        run: Its generator draws.
        population: What is drawn from, with repetition.
        count: Size of the batch of all processes.

    Raises:
        ValueError: The batch cannot be divided evenly among the processes.
    """
    picks = torch.randint(len(population), (count,), generator=run.generator)
    seeds = torch.randint(2**31 - 1, (count,), generator=run.generator)
    mine = zip(run.shard(picks).tolist(), run.shard(seeds).tolist(), strict=True)
    return [(population[pick], seed) for pick, seed in mine]
