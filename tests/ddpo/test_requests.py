"""What a round asks for: however many processes there are, it is the same, and each has its even share."""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Barrier
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from ddpo.requests import Pairs, SampleRequest, draw_requests, pairs_of_update
from overpaint.training import TrainingRun

Result = TypeVar("Result")
POPULATION = ["a cat", "a dog", "a red circle"]
COUNT = 48
"""Samples of a round: what 4 updates of 4 processes divide evenly, in groups of 3."""


class StandInRun(TrainingRun):
    """As much of a run as asking needs: a process that is a thread, with the real way of taking its part."""

    def __init__(self, process: int, processes: int, meeting: Barrier, table: list[Tensor], seed: int = 0) -> None:
        self.process_index = process
        self.num_processes = processes
        self.device = torch.device("cpu")
        self.generator = torch.Generator().manual_seed(seed)
        self.meeting = meeting
        self.table = table

    def gather(self, values: Tensor) -> Tensor:
        self.table[self.process_index] = values
        self.meeting.wait(30.0)
        everything = torch.cat(self.table)
        self.meeting.wait(30.0)  # nobody puts something new on the table before all have read it
        return everything


def together(processes: int, work: Callable[[StandInRun], Result], seed: int = 0) -> list[Result]:
    """Returns what each of some processes made of the same work."""
    meeting, table = Barrier(processes), [torch.empty(0)] * processes
    runs = [StandInRun(process, processes, meeting, table, seed) for process in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        return list(pool.map(work, runs))


def global_pairs(
    processes: int,
    *,
    updates: int = 2,
    steps: int = 5,
    trained_steps: int = 5,
    chosen_steps: Tensor | None = None,
    of_concept: int = 0,
) -> list[list[tuple[str, int, int]]]:
    """Returns the (kind, sample, step) of all processes in each update, process by process."""

    def work(run: StandInRun) -> list[list[tuple[str, int, int]]]:
        kinds = {"prompts": draw_requests(run, POPULATION, COUNT, updates=updates)}
        if of_concept:
            kinds["concept"] = draw_requests(run, ["naked"], of_concept, updates=updates)
        held = [(name, sample) for name, asked in kinds.items() for sample in asked.mine.tolist()]
        found = []
        for update in range(updates):
            pairs = pairs_of_update(
                run,
                list(kinds.values()),
                update,
                updates=updates,
                possible_steps=range(steps),
                trained_steps=trained_steps,
                chosen_steps=chosen_steps,
            )
            found.append(
                [
                    (*held[sample], step)
                    for sample, step in zip(pairs.samples.tolist(), pairs.steps.tolist(), strict=True)
                ]
            )
        return found

    each = together(processes, work)
    sizes = {len(update) for found in each for update in found}
    assert len(sizes) == 1, "every process trains on equally many pairs in every update"
    return [[pair for found in each for pair in found[update]] for update in range(updates)]


# Asking.


@pytest.mark.parametrize("updates", [1, 2, 4])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_out_all_samples_and_evenly_those_of_each_update(processes: int, updates: int) -> None:
    shares = together(processes, lambda run: draw_requests(run, POPULATION, COUNT, updates=updates))
    assert sorted(sample for asked in shares for sample in asked.mine.tolist()) == list(range(COUNT))
    size = COUNT // updates
    for asked in shares:
        owners = [sample // size for sample in asked.mine.tolist()]
        assert owners == sorted(owners), "a process has its samples update by update"
        assert Counter(owners) == dict.fromkeys(range(updates), size // processes)


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_asks_for_the_same(processes: int) -> None:
    def work(run: StandInRun) -> SampleRequest:
        return draw_requests(run, POPULATION, COUNT, updates=2, images_per_prompt=3)

    (alone,) = together(1, work)
    for asked in together(processes, work):
        assert asked.prompts == alone.prompts
        assert asked.seeds == alone.seeds
    assert len(alone.prompts) == len(alone.seeds) == len(set(alone.seeds)) == COUNT
    assert set(alone.prompts) == set(POPULATION)
    (other,) = together(1, work, seed=1)
    assert other.seeds != alone.seeds


def test_own_prompts_and_seeds_are_those_of_own_samples() -> None:
    for asked in together(2, lambda run: draw_requests(run, POPULATION, COUNT, updates=2)):
        mine = asked.mine.tolist()
        assert asked.my_prompts == [asked.prompts[sample] for sample in mine]
        assert asked.my_seeds == [asked.seeds[sample] for sample in mine]
        assert len(mine) == COUNT // 2


def test_images_of_a_prompt_lie_side_by_side_and_have_different_seeds() -> None:
    (asked,) = together(1, lambda run: draw_requests(run, [str(n) for n in range(1000)], COUNT, images_per_prompt=3))
    triples = [asked.prompts[first : first + 3] for first in range(0, COUNT, 3)]
    assert all(len(set(triple)) == 1 for triple in triples)
    assert len(set(asked.prompts)) > 10
    assert len(set(asked.seeds)) == COUNT


@pytest.mark.parametrize("updates", [1, 4])
@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_gathered_values_are_in_the_order_of_the_samples(processes: int, updates: int, dtype: torch.dtype) -> None:
    def work(run: StandInRun) -> Tensor:
        asked = draw_requests(run, POPULATION, COUNT, updates=updates)
        return asked.gathered(run, asked.mine.to(dtype) * 10)

    for everyone in together(processes, work):
        assert everyone.dtype == dtype
        assert everyone.tolist() == [10 * sample for sample in range(COUNT)]


# Pairs.


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_all_steps_of_all_samples_are_trained_on_once(processes: int) -> None:
    updates = global_pairs(processes, of_concept=16)
    everything = {("prompts", sample, step) for sample in range(COUNT) for step in range(5)}
    everything |= {("concept", sample, step) for sample in range(16) for step in range(5)}
    trained = [pair for update in updates for pair in update]
    assert len(trained) == len(everything)
    assert set(trained) == everything
    for number, update in enumerate(updates):  # each on its part of either kind
        assert {sample // (COUNT // 2) for kind, sample, _ in update if kind == "prompts"} == {number}
        assert {sample // 8 for kind, sample, _ in update if kind == "concept"} == {number}


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("trained_steps", [5, 2])
@pytest.mark.parametrize("of_concept", [0, 16])
def test_any_number_of_processes_trains_on_the_same_pairs_in_each_update(
    processes: int, trained_steps: int, of_concept: int
) -> None:
    alone = global_pairs(1, trained_steps=trained_steps, of_concept=of_concept)
    shared = global_pairs(processes, trained_steps=trained_steps, of_concept=of_concept)
    assert [sorted(update) for update in shared] == [sorted(update) for update in alone]


def test_share_of_the_steps_is_drawn_anew_for_each_sample_without_repetition() -> None:
    updates = global_pairs(1, steps=10, trained_steps=4, of_concept=16)
    steps: dict[tuple[str, int], list[int]] = {}
    for kind, sample, step in (pair for update in updates for pair in update):
        steps.setdefault((kind, sample), []).append(step)
    assert len(steps) == COUNT + 16
    assert all(len(chosen) == len(set(chosen)) == 4 for chosen in steps.values())
    assert len({tuple(sorted(chosen)) for chosen in steps.values()}) > 20
    assert {step for chosen in steps.values() for step in chosen} == set(range(10))


@pytest.mark.parametrize("processes", [1, 2])
def test_steps_that_were_chosen_are_those_of_every_sample(processes: int) -> None:
    chosen = torch.tensor([0, 3])
    updates = global_pairs(processes, trained_steps=2, chosen_steps=chosen, of_concept=16)
    expected = [("concept", sample, step) for sample in range(16) for step in (0, 3)]
    expected += [("prompts", sample, step) for sample in range(COUNT) for step in (0, 3)]
    assert sorted(pair for update in updates for pair in update) == expected


def test_pairs_are_shuffled_and_differently_in_each_update() -> None:
    first, second = global_pairs(1)
    assert first != sorted(first)
    size = COUNT // 2
    assert [(sample - size, step) for _, sample, step in second] != [(sample, step) for _, sample, step in first]
    # Not whole samples either: neighbours belong to different ones nearly always.
    assert sum(left[1] == right[1] for left, right in pairwise(first)) < len(first) / 4


def test_minibatches_are_the_pairs_in_their_order() -> None:
    pairs = Pairs(torch.arange(12), torch.arange(12) * 2)
    parts = pairs.minibatches(4)
    assert [len(part.samples) for part in parts] == [4, 4, 4]
    assert torch.equal(torch.cat([part.samples for part in parts]), pairs.samples)
    assert torch.equal(torch.cat([part.steps for part in parts]), pairs.steps)


@pytest.mark.parametrize("trained_steps", [5, 2])
def test_generator_ends_in_the_same_state_in_all_processes_however_many(trained_steps: int) -> None:
    def work(run: StandInRun) -> Tensor:
        kinds = [draw_requests(run, POPULATION, COUNT, updates=2), draw_requests(run, POPULATION, 16, updates=2)]
        for update in range(2):
            pairs_of_update(run, kinds, update, updates=2, possible_steps=range(5), trained_steps=trained_steps)
        return run.generator.get_state()

    (alone,) = together(1, work)
    for processes in (2, 4):
        assert all(torch.equal(state, alone) for state in together(processes, work))
