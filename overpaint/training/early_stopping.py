"""Early stopping: a held-out reward tells over-optimisation, and which weights were the best."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor

from overpaint.policy import DiffusionPolicy, Guidance
from overpaint.policy.prompts import check_prompts
from overpaint.policy.types import Images, PerSample
from overpaint.settings import AnyFloat, Count, Index, Seed, Share
from rewards import Reward, RewardLike, as_reward, scores_of

TOLERATED = 0.05
"""Mean violation, relative to its bound, with which a constraint counts as held: a dual weight settles where the mean
is 0, and a few dozen noisy updates do not tell it more finely. Up to twice that counts where the excess is less than
the mean's standard error; however noisy the updates are, no more does."""


class HeldOut(NamedTuple):
    """What a policy is evaluated with during training: prompts and a reward that it is not trained on.

    The same seeds are drawn in every evaluation, so that two evaluations differ by the policy alone.
    """

    prompts: Sequence[str]
    reward: RewardLike
    first_seed: Seed = 1_000_000
    batch_size: Count = 16


class HeldOutScores(NamedTuple):
    """What a process measured on its part of the held-out prompts."""

    images: Images
    trained: PerSample
    """By the reward that is trained."""
    held_out: PerSample
    """By the one that is not."""


class EarlyStopping:
    """Keeps the weights with the best held-out reward, and stops when it and the trained reward part ways.

    Over-optimisation shows as a trained reward above where it began while the held-out one is below its best. Under an
    erasure constraint only weights count with which it held: the mean cost since the evaluation before was at most
    `TOLERATED`, or above it by no more than the mean's standard error and no more than `TOLERATED` again.

    Args:
        held_out: Prompts and reward.
        patience: Evaluations in a row with the two rewards apart, after which training should stop; 0 never stops.
        constrained: Whether there is an erasure constraint, whose costs `note_cost` is told.

    Raises:
        ValueError: There are no prompts, or one is not a string.
    """

    def __init__(self, held_out: HeldOut, *, patience: Index, constrained: bool = False) -> None:
        self.held_out = held_out._replace(prompts=check_prompts(held_out.prompts))
        self.reward = as_reward(held_out.reward, "held-out reward")
        self.patience = patience
        self.best = -math.inf
        self.best_iteration = -1
        self.start: float | None = None
        self.apart = 0
        self.last_iteration = -1
        self.constrained = constrained
        self._costs: list[float] = []
        self._weights: dict[str, Tensor] = {}

    @classmethod
    def of(cls, config: Any, held_out: HeldOut | None, *, constrained: bool = False) -> "EarlyStopping | None":
        """Returns early stopping with a trainer's `patience`, or None where nothing is held out.

        Raises:
            ValueError: There is patience without anything held out; or as the class.
        """
        if held_out is not None:
            return cls(held_out, patience=config.patience, constrained=constrained)
        if config.patience:
            raise ValueError(f"{type(config).__name__}.patience must be 0 without held_out, got {config.patience}")
        return None

    @torch.no_grad()
    def evaluate(
        self,
        policy: DiffusionPolicy,
        reward: Reward,
        *,
        part: slice,
        steps: Count,
        guidance: Guidance,
        eta: Share = 0.0,
        height: Count | None = None,
        width: Count | None = None,
    ) -> HeldOutScores:
        """Draws a part of the prompts, without noise in the steps where eta is 0, and scores it by both rewards."""
        prompts, first, size = self.held_out.prompts, self.held_out.first_seed, self.held_out.batch_size
        seeds = range(first, first + len(prompts))[part]
        prompts = prompts[part]
        images = policy.draw(
            prompts,
            seeds=seeds,
            steps=steps,
            guidance=guidance,
            eta=eta,
            batch_size=size,
            height=height,
            width=width,
        )

        def scores(reward: Reward) -> PerSample:
            parts = enumerate(images.split(size))
            return torch.cat(
                [scores_of("held-out reward", reward, some, prompts[k * size : (k + 1) * size]) for k, some in parts]
            )

        return HeldOutScores(images, scores(reward), scores(self.reward))

    def note_cost(self, cost: AnyFloat) -> None:
        """Takes notice of the mean cost of an iteration; one that is not finite has skipped its update."""
        if math.isfinite(cost):
            self._costs.append(cost)

    def note(self, policy: DiffusionPolicy, *, iteration: Index, trained: float, held_out: float) -> None:
        """Takes notice of an evaluation's means; keeps the weights if the constraint held and none was better.

        A second evaluation in the same iteration, as after a run that was resumed there, counts for nothing.
        """
        if iteration == self.last_iteration:
            return
        self.last_iteration = iteration
        if self.start is None:
            self.start = trained
        held = not self.constrained or self._held()
        self._costs = []
        if held and held_out > self.best:
            self.best, self.best_iteration, self.apart = held_out, iteration, 0
            self._weights = {name: value.cpu() for name, value in policy.trainable_state().items()}
        elif held_out < self.best and trained > self.start:
            self.apart += 1
        else:
            self.apart = 0

    def _held(self) -> bool:
        """Says whether the constraint held since the evaluation before, as far as its costs tell."""
        if not self._costs:
            return False
        error = stdev(self._costs) / math.sqrt(len(self._costs)) if len(self._costs) > 1 else 0.0
        return fmean(self._costs) - min(error, TOLERATED) <= TOLERATED

    @property
    def should_stop(self) -> bool:
        """Whether the two rewards have been apart for as long as patience allows."""
        return 0 < self.patience <= self.apart

    def restore(self, policy: DiffusionPolicy) -> None:
        """Gives the policy the best weights; does nothing where no evaluation found any that count."""
        if self._weights:
            policy.load_trainable_state(self._weights)

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that an interrupted run needs."""
        return {
            "best": self.best,
            "best_iteration": self.best_iteration,
            "start": self.start,
            "apart": self.apart,
            "last_iteration": self.last_iteration,
            "costs": self._costs,
            "weights": self._weights,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` returned."""
        self.best, self.best_iteration, self.start = state["best"], state["best_iteration"], state["start"]
        self.apart, self.last_iteration = state["apart"], state["last_iteration"]
        self._costs = [cost for cost in state["costs"] if math.isfinite(cost)]
        self._weights = dict(state["weights"])
