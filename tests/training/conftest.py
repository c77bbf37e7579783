"""A policy of a few dozen weights, and a small training that uses everything a run offers.

The programs in this folder that tests launch as processes of their own import this file too.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from overpaint.training import TrainingConfig, TrainingRun, read_metrics


class StandIn:
    """As much of a policy as a training run needs: a two-layer network whose first bias is frozen."""

    def __init__(self, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.unet = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        self.unet[0].bias.requires_grad_(False)
        self.network: Callable[..., Any] = self.unet

    def to(self, device: torch.device) -> "StandIn":
        self.unet.to(device)
        return self

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.unet.parameters() if parameter.requires_grad]

    def trainable_state(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.unet.named_parameters() if p.requires_grad}

    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        named = dict(self.unet.named_parameters())
        with torch.no_grad():
            for name, tensor in state.items():
                named[name].copy_(tensor)


class Dual:
    """A weight that follows a violation, as the dual variable of a constraint does."""

    def __init__(self) -> None:
        self.weight = 0.1

    def update(self, violation: float) -> None:
        self.weight += 0.3 * violation

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight = state["weight"]


class Outcome(NamedTuple):
    """What a training leaves."""

    weights: dict[str, Tensor]
    average: dict[str, Tensor] | None
    dual: float
    metrics: list[dict[str, Any]]


class KilledError(Exception):
    """Stands for a process that dies: the run saves nothing when it sees an exception."""


def small_training(
    output_dir: Path,
    *,
    die_at: int | None = None,
    each: Callable[[int], None] | None = None,
    pictures: bool = False,
    **settings: Any,
) -> Outcome:
    """Trains a new stand-in for a few iterations, drawing from every generator there is."""
    settings = {"iterations": 7, "learning_rate": 1e-2, "checkpoint_every": 2, "progress": False} | settings
    config = TrainingConfig(output_dir=output_dir, **settings)
    policy, dual = StandIn(), Dual()
    with TrainingRun(policy, config, state={"dual": dual}) as run:
        order = torch.randperm(16, generator=run.generator)  # a preparation that has to be the same when resumed
        for iteration in run.iterations():
            with run.autocast():
                batch = torch.randn(8, 4, generator=run.generator) + order[iteration] / 16
                batch = run.shard(batch)
                output = policy.network(batch + 0.1 * torch.rand(()))
                other = policy.network(-batch)  # a second forward before the first backward
                error = (output - random.random()).square().mean(dim=1)
                cost = other.abs().mean() - float(np.random.rand())  # noqa: NPY002 (the global one is meant)
            run.backward(error.float().mean(), sync=False)
            run.backward(dual.weight * cost.float())
            if iteration == die_at:
                raise KilledError
            grad_norm = run.update()
            violation = run.mean(cost)
            dual.update(violation)
            loss = run.mean(error)
            run.log({"train/loss": loss, "train/grad_norm": grad_norm})
            run.log({"reward/mean": -loss, "erasure/violation": violation, "erasure/weight": dual.weight})
            if pictures:
                run.log_images(
                    "round", torch.rand(2, 3, 64, 64), ["one", "two"], rewards=torch.tensor([loss, violation])
                )
            if each is not None:
                each(iteration)
        average = None
        if config.ema_decay is not None:
            with run.ema_weights():
                average = policy.trainable_state()
    return Outcome(policy.trainable_state(), average, dual.weight, read_metrics(output_dir / "metrics.jsonl"))


def assert_same(outcome: Outcome, expected: Outcome) -> None:
    """Compares two trainings bit by bit."""
    assert outcome.metrics == expected.metrics
    assert outcome.dual == expected.dual
    for ours, theirs in ((outcome.weights, expected.weights), (outcome.average, expected.average)):
        assert (ours is None) == (theirs is None)
        for name, tensor in (theirs or {}).items():
            assert ours is not None
            assert torch.equal(ours[name], tensor), name


@pytest.fixture(scope="session")
def stand_in() -> Callable[..., StandIn]:
    return StandIn


@pytest.fixture(scope="session")
def train() -> Callable[..., Outcome]:
    return small_training


@pytest.fixture(scope="session")
def killed() -> type[KilledError]:
    return KilledError


@pytest.fixture(scope="session")
def same() -> Callable[[Outcome, Outcome], None]:
    return assert_same
