"""What a round requests: prompts and seeds of all processes, and which of them are a process's own."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from erasure import ConceptPrompts
from overpaint.training import TrainingRun


class SampleRequest(NamedTuple):
    """Samples that all processes draw together, the same in each of them."""

    prompts: list[str]
    """One for each sample of all processes."""

    seeds: list[int]
    """One for each sample of all processes."""

    mine: Int[Tensor, " mine"]
    """Indices of this process's samples: equal parts of each update's, update by update."""

    @property
    def my_prompts(self) -> list[str]:
        """The prompts of this process's samples."""
        return [self.prompts[sample] for sample in self.mine.tolist()]

    @property
    def my_seeds(self) -> list[int]:
        """The seeds of this process's samples."""
        return [self.seeds[sample] for sample in self.mine.tolist()]

    def gathered(self, run: TrainingRun, values: Shaped[Tensor, "mine ..."]) -> Shaped[Tensor, "all ..."]:
        """Returns what each sample of all processes has, in their order, from what each process has; on the CPU."""
        order = run.gather(self.mine).cpu()
        everyone = torch.empty(len(order), *values.shape[1:], dtype=values.dtype)
        everyone[order] = run.gather(values).cpu()
        return everyone


def draw_requests(
    run: TrainingRun, population: Sequence[str], count: int, *, updates: int = 1, images_per_prompt: int = 1
) -> SampleRequest:
    """Draws prompts and seeds for a round of all processes.

    Since they are drawn at random, the samples of an update are simply the next ones; nothing is shuffled.

    Args:
        run: Its generator draws, and it tells the processes apart.
        population: What prompts are drawn from, with repetition; by its own mix where it has one.
        count: Samples of all processes.
        updates: Parts of equal size, each of which is divided evenly among the processes.
        images_per_prompt: Samples in a row with the same prompt.
    """
    picked = ConceptPrompts.of(population).pick(count // images_per_prompt, run.generator)
    seeds = torch.randint(2**31 - 1, (count,), generator=run.generator)
    prompts = [prompt for prompt in picked for _ in range(images_per_prompt)]
    mine = torch.cat([run.shard(part) for part in torch.arange(count).chunk(updates)])
    return SampleRequest(prompts, seeds.tolist(), mine)


class Pairs(NamedTuple):
    """Steps of samples; on the policy's device."""

    samples: Int[Tensor, " pairs"]
    """Indices among this process's samples."""

    steps: Int[Tensor, " pairs"]
    """Indices of denoising steps, counted from noise."""

    def between(self, first: int, end: int) -> "Pairs":
        """Returns the pairs of the samples from an index up to another, in their order."""
        chosen = (self.samples >= first) & (self.samples < end)
        return Pairs(self.samples[chosen], self.steps[chosen])

    def minibatches(self, size: int) -> list["Pairs"]:
        """Returns the pairs in parts of a size."""
        return [Pairs(*part) for part in zip(self.samples.split(size), self.steps.split(size), strict=True)]


def pairs_of_update(
    run: TrainingRun,
    kinds: Sequence[SampleRequest],
    update: int,
    *,
    updates: int,
    possible_steps: Sequence[int],
    trained_steps: int,
    chosen_steps: Int[Tensor, " trained"] | None = None,
) -> Pairs:
    """Returns the pairs of sample and step that this process trains on in an update, shuffled.

    Args:
        run: Its generator draws, and it tells the processes apart.
        kinds: What was requested; this process has the samples of the first, then those of the next.
        update: Index of the update in the round.
        updates: How many there are.
        possible_steps: Denoising steps of a sample that can be trained on.
        trained_steps: How many of them are.
        chosen_steps: Which ones; None draws them for each sample anew.
    """
    samples, chosen, first, possible = [], [], 0, torch.tensor(list(possible_steps))
    for request in kinds:
        count = len(request.mine) // updates
        samples.append(torch.arange(count) + first + update * count)
        if chosen_steps is not None:
            chosen.append(chosen_steps.expand(count, trained_steps))
        elif trained_steps == len(possible):
            chosen.append(possible.expand(count, trained_steps))
        else:
            keys = torch.rand(len(request.prompts) // updates, len(possible), generator=run.generator)
            chosen.append(run.shard(possible[keys.argsort(dim=1)[:, :trained_steps]]))
        first += len(request.mine)
    # One draw of the run's generator, however many processes there are.
    seed = int(torch.randint(2**31 - 1, (), generator=run.generator))
    order = torch.randperm(sum(map(len, samples)) * trained_steps, generator=torch.Generator().manual_seed(seed))
    pairs = (torch.cat(samples).repeat_interleave(trained_steps), torch.cat(chosen).flatten())
    return Pairs(*(part[order].to(run.device) for part in pairs))
