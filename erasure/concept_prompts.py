"""The prompts that a constraint is measured on: a mix of explicit, implicit and hard ones.

Hard ones are mined: the constraint's violation on a prompt's pictures is remembered, and prompts whose pictures still
show the concept are drawn more often, as prioritized experience replay draws transitions by their error (Schaul et al.
2016, https://arxiv.org/abs/1511.05952, equation 1, proportional form, without its importance weights: it is wanted that
hard prompts count for more).
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from itertools import accumulate, pairwise
from statistics import fmean
from typing import Any, overload

import torch

from overpaint.policy.prompts import check_prompts
from overpaint.policy.types import PerSample
from overpaint.settings import Count, Field, settings
from overpaint.training import TrainingRun
from overpaint.training.record import prompts_record


@settings
class ConceptPromptsConfig:
    """What a batch is mixed of, and how hard prompts are mined.

    Shares are relative to each other, and those of kinds of which there are no prompts do not count: by default half of
    a batch is explicit, a quarter implicit and a quarter hard, or two thirds and a third where nothing is implicit.
    """

    explicit_share: float = Field(2.0, ge=0)
    """Part of a batch that is drawn from the explicit prompts, each as likely as any other."""

    implicit_share: float = Field(1.0, ge=0)
    """Likewise from the implicit prompts."""

    hard_share: float = Field(1.0, ge=0)
    """Part of a batch that is drawn from all prompts, each counted once, those with the largest violation most often.
    Zero: nothing is mined."""

    memory: float = Field(0.8, ge=0, lt=1)
    """How much of a prompt's average violation is kept when its pictures are judged again."""

    temperature: float = Field(1.0, gt=0)
    """How little the violation decides in the hard part: a prompt's chance is that of its average violation, as far as
    it is above zero, to the power of 1 / temperature. At 1 twice the violation is twice as often; a high one makes all
    prompts that violate alike, a low one takes the worst alone."""


class ConceptPrompts(Sequence[str]):
    """Prompts that elicit a concept, in place of a plain list of them where a constraint takes its prompts.

    As a sequence it is the explicit prompts and then the implicit ones.

    Args:
        explicit: Prompts that name the concept, at least one.
        implicit: Prompts that bring it unnamed.
        config: The mix, and the mining.

    Raises:
        ValueError: A prompt is not a string, there is no explicit one, or all shares of the kinds that are there are
            zero.
    """

    def __init__(
        self, explicit: Sequence[str], implicit: Sequence[str] = (), config: ConceptPromptsConfig | None = None
    ) -> None:
        self.config = config or ConceptPromptsConfig()
        self.explicit = check_prompts(explicit)
        self.implicit = check_prompts(implicit) if len(implicit) else []
        self._all = self.explicit + self.implicit
        self._each = list(dict.fromkeys(self._all))  # of which hard ones are drawn
        self._average: dict[str, float] = {}
        if not sum(self._shares()):
            raise ValueError(f"ConceptPromptsConfig must share a batch out among prompts that are there, got {self!r}")

    @classmethod
    def of(cls, prompts: Sequence[str]) -> "ConceptPrompts":
        """Returns the prompts themselves, or plain ones as explicit ones of which none is mined.

        Raises:
            ValueError: As `check_prompts`.
        """
        return prompts if isinstance(prompts, cls) else cls(prompts, config=ConceptPromptsConfig(hard_share=0.0))

    def __repr__(self) -> str:
        """Shows how many there are of each kind, and the settings."""
        return f"ConceptPrompts({len(self.explicit)} explicit, {len(self.implicit)} implicit, {self.config!r})"

    def __len__(self) -> int:
        return len(self._all)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """Returns a prompt, or some."""
        return self._all[index]

    def description(self) -> dict[str, Any]:
        """Returns what is drawn from, for the record of a run: the mix too where there is more than one kind."""
        record = prompts_record(self._all)
        return record if self._plain else record | {"implicit": len(self.implicit), "mix": asdict(self.config)}

    @property
    def mines(self) -> bool:
        """Whether there is something to remember."""
        return self.config.hard_share > 0

    @property
    def _plain(self) -> bool:
        return not (self.implicit or self.mines)

    # Drawing.

    def pick(self, count: Count, generator: torch.Generator) -> list[str]:
        """Draws the prompts of a batch, of all processes.

        The number of each kind is its share of the batch, exactly where that is whole; what is left over from rounding
        down goes to one kind or another at random, so that each has its share on average. The order is random.
        """
        kinds = [self.explicit, self.implicit, self._each]
        if self._plain:
            return [self.explicit[pick] for pick in torch.randint(len(self), (count,), generator=generator).tolist()]
        picked: list[str] = []
        for kind, (population, number) in enumerate(zip(kinds, self._numbers(count, generator), strict=True)):
            if not number:
                continue
            weights = torch.ones(len(population), dtype=torch.float64) if kind < 2 else self._hardness()
            chosen = torch.multinomial(weights, number, replacement=True, generator=generator)
            picked += [population[pick] for pick in chosen.tolist()]
        return [picked[place] for place in torch.randperm(count, generator=generator).tolist()]

    def draw(self, run: TrainingRun, count: Count) -> list[tuple[str, int]]:
        """Draws prompts and a seed for each, and returns this process's part, as `training.draw_batch` does.

        Args:
            run: Its generator draws.
            count: Size of the batch of all processes.

        Raises:
            ValueError: The batch cannot be divided evenly among the processes.
        """
        prompts = self.pick(count, run.generator)
        seeds = torch.randint(2**31 - 1, (count,), generator=run.generator).tolist()
        return run.shard(list(zip(prompts, seeds, strict=True)))

    def _shares(self) -> list[float]:
        """Returns the shares of the kinds that there are prompts of."""
        cfg = self.config
        return [cfg.explicit_share, cfg.implicit_share if self.implicit else 0.0, cfg.hard_share]

    def _numbers(self, count: int, generator: torch.Generator) -> list[int]:
        """Returns how many of each kind a batch has: systematic sampling, whose one draw rounds all numbers."""
        shares = self._shares()
        # Rounded, so that no number hangs on the last bit of a double, and the last bound is the count itself.
        bounds = [0.0, *(round(count * bound / sum(shares), 9) for bound in accumulate(shares))]
        start = float(torch.rand((), dtype=torch.float64, generator=generator))
        ranks = [math.floor(bound + start) for bound in bounds]
        return [last - first for first, last in pairwise(ranks)]

    def _hardness(self) -> torch.Tensor:
        """Returns the weight of each prompt in the hard part; all the same where none is known to violate."""
        violations = torch.tensor([max(self._average.get(prompt, 0.0), 0.0) for prompt in self._each]).double()
        worst = violations.max()
        return (violations / worst) ** (1 / self.config.temperature) if worst > 0 else torch.ones_like(violations)

    # Mining.

    def note(self, run: TrainingRun, prompts: Sequence[str], violations: PerSample) -> None:
        """Remembers what a batch has shown, of all processes; every process calls it with its own part.

        The average of a prompt moves once, towards the mean over its samples. Nothing is remembered where nothing is
        mined, nor of a violation that is not finite.

        Args:
            run: Gathers the parts.
            prompts: Of this process's samples.
            violations: Of the same, relative as the constraint has them.
        """
        if not self.mines:
            return
        places = {prompt: place for place, prompt in enumerate(self._each)}
        indices = run.gather(torch.tensor([places[prompt] for prompt in prompts])).tolist()
        seen: defaultdict[str, list[float]] = defaultdict(list)
        for index, violation in zip(indices, run.gather(violations.detach().float()).tolist(), strict=True):
            if math.isfinite(violation):
                seen[self._each[index]].append(violation)
        memory = self.config.memory
        for prompt, values in seen.items():
            mean = fmean(values)  # exactly rounded, whatever order the processes are in
            before = self._average.get(prompt, mean)
            self._average[prompt] = memory * before + (1 - memory) * mean

    @property
    def hard(self) -> dict[str, float]:
        """The average violation of the prompts that violate, the worst first."""
        found = {prompt: average for prompt, average in self._average.items() if average > 0}
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    @property
    def hard_violation(self) -> float:
        """The violation that the hard part's samples have on average, as far as it is remembered; else 0."""
        known = torch.tensor([self._average.get(prompt, math.nan) for prompt in self._each]).double()
        weights = self._hardness()[known.isfinite()]
        return float(known[known.isfinite()] @ weights / weights.sum()) if len(weights) else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Returns what has been remembered."""
        return {"average": dict(self._average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned.

        Raises:
            ValueError: It is of other prompts, or an average is not finite. Nothing is changed.
        """
        average = state["average"]
        if unknown := set(average) - set(self._all):
            raise ValueError(f"state must be of these prompts, got one of {min(unknown)!r}")
        if bad := [prompt for prompt, value in average.items() if not math.isfinite(value)]:
            raise ValueError(f"state['average'] must be finite, got {average[bad[0]]} for {bad[0]!r}")
        self._average = {prompt: float(value) for prompt, value in average.items()}
