"""The dual weight finds its equilibrium: from far away, without oscillation, and that of a problem with a known one."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean, pstdev

import pytest
import torch

from erasure import NUDITY, ConceptBatch, ImageConstraint, Lagrangian, LagrangianConfig, ObjectiveConstraint
from overpaint.policy import DiffusionPolicy
from overpaint.policy.types import PerSample

PROGRAM = '''
"""Minimises (x - 2)² / 2 + (y - 1)² / 2 subject to x + y <= 1; the first process writes what it led to."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from erasure import Lagrangian, LagrangianConfig
from overpaint.training import TrainingConfig, TrainingRun, process_state


class Point(nn.Module):
    """Two parameters, as a policy."""

    def __init__(self):
        super().__init__()
        self.unet = nn.Linear(2, 1, bias=False)
        nn.init.zeros_(self.unet.weight)
        self.vae = self.text_encoder = nn.Module()
        self.network = self.unet

    def trainable_parameters(self):
        return list(self.unet.parameters())

    def trainable_state(self):
        return {"weight": self.unet.weight.detach().clone()}

    def load_trainable_state(self, state):
        self.unet.weight.data.copy_(state["weight"])


folder, processes = Path(sys.argv[1]), int(sys.argv[2])
# Every sample has its own target and its own ceiling, whose means over the batch are those of the problem.
targets = torch.tensor([[1.0, 3.0], [3.0, -1.0], [2.5, 0.0], [1.5, 2.0]])
bounds = torch.tensor([0.25, 1.75, 0.5, 1.5])
for name, settings in json.loads(sys.argv[3]).items():
    point, lagrangian = Point(), Lagrangian(LagrangianConfig(**settings))
    # With a large epsilon and no momentum AdamW takes plain gradient steps, at a rate of 1000 / 1e4.
    config = TrainingConfig(
        output_dir=folder / name, iterations=300, learning_rate=1000.0, adam_epsilon=1e4, adam_betas=(0.0, 0.999),
        weight_decay=0.0, max_grad_norm=1e6, progress=False, checkpoint_every=300,
    )
    with TrainingRun(point, config, state={"lagrangian": lagrangian}) as run:
        assert run.num_processes == processes
        for _ in run.iterations():
            mine, allowed = run.shard(targets), run.shard(bounds)
            objective = (point.unet.weight - mine).square().sum(dim=1).mean() / 2
            violation = (point.network(torch.ones(1, 2)).squeeze() - allowed).mean()
            run.backward(objective + lagrangian.weight * violation)
            run.update()
            lagrangian.update(run.mean(violation.detach()))
        if run.is_main:
            found = [*point.unet.weight.detach().flatten().tolist(), lagrangian.weight]
            (folder / f"{name}.json").write_text(json.dumps(found))
process_state().destroy_process_group()
'''


@pytest.mark.proof("dual weights find a known optimum, in one process and in two")
@pytest.mark.parametrize("processes", [1, 2])
def test_known_optimum_is_found_by_one_process_and_by_two(
    processes: int, tmp_path: Path, torchrun: Callable[..., str]
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    controls = {
        "pid": {},
        "plain": {"space": "linear", "min_weight": 0.0, "proportional_gain": 0.0, "smoothing": 0.0},
    }
    torchrun(program, tmp_path, processes, json.dumps(controls), processes=processes)
    for name in controls:  # where x - 2 + w = 0, y - 1 + w = 0 and x + y = 1
        assert json.loads((tmp_path / f"{name}.json").read_text()) == pytest.approx([1.0, 0.0, 1.0], abs=1e-3)


class Response:
    """A policy in one number: a cost in units of its ceiling, which follows the weight with a delay.

    It goes to 1 / weight, so that the equilibrium is a weight of 1.
    """

    def __init__(self, delay: float) -> None:
        self.delay = delay
        self.cost = 2.0

    def answer(self, weight: float) -> None:
        self.cost += (1 / weight - self.cost) / self.delay


class Scripted:
    """An objective whose loss is what the response says, in units of 0.01."""

    def __init__(self, response: Response) -> None:
        self.response = response

    def prepare(self, policy: DiffusionPolicy, concept: object) -> None:
        pass

    def loss(self, policy: DiffusionPolicy, batch: ConceptBatch) -> PerSample:
        return torch.full((len(batch.seeds),), 0.01 * self.response.cost)


def weights_of_images(response: Response, config: LagrangianConfig, noise: Iterator[float]) -> Iterator[float]:
    constraint = ImageConstraint(lambda images, prompts: images.mean(dim=(1, 2, 3)), ["nude"] * 2, Lagrangian(config))
    while True:
        images = torch.full((2, 3, 2, 2), 0.1 * response.cost)
        violation = float(constraint.violation(images, constraint.prompts).mean())
        constraint.lagrangian.update(violation + next(noise))
        response.answer(constraint.lagrangian.weight)
        yield constraint.lagrangian.weight


def weights_of_objective(
    response: Response, config: LagrangianConfig, noise: Iterator[float], policy: DiffusionPolicy
) -> Iterator[float]:
    constraint = ObjectiveConstraint(Scripted(response), NUDITY, None, Lagrangian(config), ceiling=0.01)
    while True:
        violation = float(constraint.violation(policy, ConceptBatch(["nude"] * 2, [1, 2])).mean())
        constraint.lagrangian.update(violation + next(noise))
        response.answer(constraint.lagrangian.weight)
        yield constraint.lagrangian.weight


def gaussian(std: float) -> Iterator[float]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield std * float(torch.randn((), generator=generator))


@pytest.mark.parametrize("kind", ["images", "objective"])
@pytest.mark.parametrize(("delay", "updates"), [(1, 70), (5, 70), (20, 110)], ids=["none", "short", "long"])
@pytest.mark.parametrize("start", [0.01, 100.0], ids=["below", "above"])
def test_weight_reaches_its_equilibrium_from_a_hundred_times_too_low_and_too_high(
    kind: str, delay: float, updates: int, start: float, policy: DiffusionPolicy
) -> None:
    response, config = Response(delay), LagrangianConfig(initial_weight=start)
    weights = (
        weights_of_images(response, config, gaussian(0.0))
        if kind == "images"
        else weights_of_objective(response, config, gaussian(0.0), policy)
    )
    curve = [next(weights) for _ in range(200)]
    assert all(0.8 < weight < 1.25 for weight in curve[updates:])
    assert curve[-1] == pytest.approx(1.0, rel=0.01)
    assert response.cost == pytest.approx(1.0, abs=0.05)  # the violation at the end, within 5 % of the ceiling


def test_additive_ascent_takes_hundreds_of_updates_for_the_same_way() -> None:
    weights = weights_of_images(Response(5), LagrangianConfig(space="linear", initial_weight=100.0), gaussian(0.0))
    assert [next(weights) for _ in range(200)][-1] > 50


@pytest.mark.parametrize("delay", [1, 5, 20])
def test_weight_does_not_oscillate_beyond_the_noise(delay: float) -> None:
    # Violations with a standard deviation of a quarter of the ceiling: the weight stays within 25 per cent, on average
    # over its equilibrium, and so does not swing.
    weights = weights_of_images(Response(delay), LagrangianConfig(), gaussian(0.25))
    settled = [math.log(next(weights)) for _ in range(600)][200:]
    assert pstdev(settled) < 0.25
    assert abs(fmean(settled)) < 0.05


class Drift:
    """A policy whose cost grows or shrinks, in the logarithm, by how far the weight is from 1: nothing damps it."""

    def __init__(self) -> None:
        self.log_cost = math.log(2)

    def violation(self) -> float:
        return math.expm1(self.log_cost)

    def answer(self, weight: float) -> None:
        self.log_cost = max(self.log_cost + 0.1 * (1 - min(weight, 4.0)), -8.0)


def test_pid_ends_the_oscillation_of_plain_dual_ascent() -> None:
    def spread(proportional_gain: float) -> float:
        lagrangian, policy, curve = Lagrangian(LagrangianConfig(proportional_gain=proportional_gain)), Drift(), []
        for _ in range(300):
            lagrangian.update(policy.violation())
            policy.answer(lagrangian.weight)
            curve.append(math.log(lagrangian.weight))
        return pstdev(curve[200:])

    assert spread(0.0) > 1.0
    assert spread(1.0) < 0.01
