"""A second look at a policy in training, by a reward that it is not trained on."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from overpaint.policy import DiffusionPolicy, Guidance
from overpaint.policy.prompts import check_prompts
from overpaint.policy.types import Images, PerSample

from .types import Reward, scores_of


class HeldOut(NamedTuple):
    """What a policy is watched with: prompts that it is not trained on, and a reward that it is not trained on.

    The same seeds are drawn at every look, so that two looks differ by the policy alone.
    """

    prompts: Sequence[str]
    reward: Reward
    first_seed: int = 1_000_000
    batch_size: int = 16


class Look(NamedTuple):
    """What a process saw of its part of the held-out prompts."""

    images: Images
    trained: PerSample
    """By the reward that is trained."""
    held_out: PerSample
    """By the one that is not."""


class EarlyStopping:
    """Keeps the weights that the held-out reward liked best, and notices when it and the trained reward part ways.

    Over-optimisation shows as a trained reward above where it began while the held-out one is below its best. Under an
    erasure constraint only weights count with which it held: the mean cost since the look before was at most zero.

    Args:
        held_out: Prompts and reward.
        patience: Looks in a row at which the two have parted, after which training should stop; 0 never stops.
        constrained: Whether there is an erasure constraint, whose costs `note_cost` is told.

    Raises:
        ValueError: There are no prompts, or one is not a string.
    """

    def __init__(self, held_out: HeldOut, *, patience: int, constrained: bool = False) -> None:
        self.held_out = held_out._replace(prompts=check_prompts(held_out.prompts))
        self.patience = patience
        self.best = -math.inf
        self.best_iteration = -1
        self.start: float | None = None
        self.parted = 0
        self.last_iteration = -1
        self.constrained = constrained
        self._costs: list[float] = []
        self._weights: dict[str, Tensor] = {}

    @torch.no_grad()
    def measure(
        self, policy: DiffusionPolicy, reward: Reward, *, part: slice, steps: int, guidance: Guidance, eta: float = 0.0
    ) -> Look:
        """Draws a part of the prompts, without noise in the steps where eta is 0, and scores it by both rewards."""
        prompts, first, size = self.held_out.prompts, self.held_out.first_seed, self.held_out.batch_size
        seeds = range(first, first + len(prompts))[part]
        prompts = prompts[part]
        images = policy.draw(prompts, seeds=seeds, steps=steps, guidance=guidance, eta=eta, batch_size=size)

        def scores(judge: Reward) -> PerSample:
            parts = enumerate(images.split(size))
            return torch.cat(
                [scores_of("reward at a look", judge, some, prompts[k * size : (k + 1) * size]) for k, some in parts]
            )

        return Look(images, scores(reward), scores(self.held_out.reward))

    def note_cost(self, cost: float) -> None:
        """Takes notice of the mean cost of an iteration."""
        self._costs.append(cost)

    def note(self, policy: DiffusionPolicy, *, iteration: int, trained: float, held_out: float) -> None:
        """Takes notice of the means of a look; keeps the weights if the constraint held and none was better.

        A second look in the same iteration, as after a run that was resumed there, counts for nothing.
        """
        if iteration == self.last_iteration:
            return
        self.last_iteration = iteration
        if self.start is None:
            self.start = trained
        held = not self.constrained or (bool(self._costs) and math.fsum(self._costs) <= 0)
        self._costs = []
        if held and held_out > self.best:
            self.best, self.best_iteration, self.parted = held_out, iteration, 0
            self._weights = {name: value.cpu() for name, value in policy.trainable_state().items()}
        elif held_out < self.best and trained > self.start:
            self.parted += 1
        else:
            self.parted = 0

    @property
    def should_stop(self) -> bool:
        """Whether the two rewards have parted ways for as long as patience allows."""
        return 0 < self.patience <= self.parted

    def restore(self, policy: DiffusionPolicy) -> None:
        """Gives the policy the best weights; does nothing where no look found any that count."""
        if self._weights:
            policy.load_trainable_state(self._weights)

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that an interrupted run needs."""
        numbers: dict[str, Any] = {
            "best_iteration": self.best_iteration,
            "last_iteration": self.last_iteration,
            "parted": self.parted,
            "costs": self._costs,
        }
        if self.start is not None:
            numbers["start"] = self.start
        if self.best_iteration >= 0:
            numbers["best"] = self.best
        return {"numbers": numbers, "weights": self._weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` returned."""
        numbers = state["numbers"]
        self.best_iteration, self.parted = numbers["best_iteration"], numbers["parted"]
        self.last_iteration = numbers["last_iteration"]
        self._costs = list(numbers["costs"])
        self.start, self.best = numbers.get("start"), numbers.get("best", -math.inf)
        self._weights = dict(state["weights"])
