"""Sides of peers.py in turn: a process for each, timed in CPU-seconds, and an evaluation that no side pays for."""

import json
import math
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from safetensors.torch import load_file

from benchmarks.peers_environment import ROOT
from benchmarks.peers_settings import Settings
from overpaint.policy import ClassifierFree, DiffusionPolicy
from rewards import Reward


@dataclass
class Evaluation:
    """What a side was worth at some point."""

    rounds: int
    queries: int
    """Images that the reward had scored by then."""
    seconds: float
    """CPU-seconds that all rounds had taken by then."""
    reward: float
    """Mean reward on held-out prompts."""


@dataclass(kw_only=True)
class Record:
    """What is known of a side."""

    seconds: list[float] = Field(default_factory=list)
    """CPU-seconds of each round."""

    rewards: list[float] = Field(default_factory=list)
    """Mean reward of the samples of each round, before its updates."""

    evaluations: list[Evaluation] = Field(default_factory=list)
    """The first one is before any training."""

    @property
    def total(self) -> float:
        """CPU-seconds of all rounds."""
        return sum(self.seconds)


class Side:
    """A trainer in a process of its own, on one core and without a GPU, that does a round when it is told to.

    Args:
        python: Whose environment it runs in.
        program: The child's module.
        job: What the child reads.
        folder: Where its job, its log and its weights are put.
        samples_per_round: Images that it draws in a round.
    """

    def __init__(
        self, python: Path, program: str, job: Mapping[str, Any], folder: Path, *, samples_per_round: int
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.samples_per_round = samples_per_round
        self.record = Record()
        self.weights = folder / "weights.safetensors"
        self._log = folder / "log.txt"
        file = folder / "job.json"
        file.write_text(json.dumps(job, indent=1) + "\n", encoding="utf-8")
        alone = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [str(python), "-m", program, str(file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **alone},
                cwd=ROOT,
            )

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def step(self) -> None:
        """Has one round done and its weights saved.

        Raises:
            RuntimeError: The process has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(f"{self.weights}\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError) as error:
            self._process.wait(timeout=60)  # until it has said why
            last = self._log.read_text(encoding="utf-8").strip().splitlines()[-1:]
            raise RuntimeError(f"a side has ended, see {self._log}: {' '.join(last)}") from error
        self.record.seconds.append(answer["seconds"])
        self.record.rewards.append(answer["reward"])


class Evaluator:
    """Draws held-out prompts with the same seeds each time and returns their mean reward.

    Args:
        policy: What weights are loaded into.
        reward: Scores the images.
        prompts: None that are trained on.
        settings: How images are drawn, which is as in training, noise of the steps included.
    """

    def __init__(self, policy: DiffusionPolicy, reward: Reward, prompts: Sequence[str], settings: Settings) -> None:
        self.policy = policy
        self.reward = reward
        self.prompts = prompts
        self.ddpo = settings.ddpo

    @torch.no_grad()
    def __call__(self, weights: Path | None = None) -> float:
        """Evaluates saved weights, or those that the policy has."""
        if weights is not None:
            self.policy.load_trainable_state(load_file(weights))
        guidance = ClassifierFree(self.ddpo.guidance_scale)
        images = self.policy.draw(
            self.prompts, seeds=range(len(self.prompts)), steps=self.ddpo.steps, guidance=guidance, eta=self.ddpo.eta
        )
        return float(self.reward(images, self.prompts).mean())


def race(
    sides: Mapping[str, Side],
    evaluator: Evaluator,
    *,
    rounds: int,
    pacemaker: str,
    follower: str,
    evaluate_every: int,
    report: Callable[[str], None],
) -> None:
    """Gives each round to the side that has used the least time, so that other load on the machine touches all alike.

    Args:
        sides: By name.
        evaluator: Evaluates every side before the first round, after every `evaluate_every` and after the last.
        rounds: How many each side does.
        pacemaker: A side whose time counts.
        follower: A side that goes on until it has used as much time as the pacemaker, however many rounds that is.
        evaluate_every: Rounds between two evaluations.
        report: Is given a line for every evaluation.
    """
    records = {name: side.record for name, side in sides.items()}
    start = evaluator()
    for record in records.values():
        record.evaluations.append(Evaluation(0, 0, 0.0, start))

    def evaluate(name: str) -> None:
        side, record, count = sides[name], records[name], len(records[name].seconds)
        found = Evaluation(count, count * side.samples_per_round, record.total, evaluator(side.weights))
        record.evaluations.append(found)
        report(f"{name}: round {count}, {found.seconds:.0f} CPU-seconds, held-out reward {found.reward:.4f}")

    def finished(name: str) -> bool:
        leader = records[pacemaker]
        if name == follower:
            return len(leader.seconds) == rounds and records[name].total >= leader.total
        return len(records[name].seconds) == rounds

    while running := [name for name in sides if not finished(name)]:
        name = min(running, key=lambda name: records[name].total)
        sides[name].step()
        if len(records[name].seconds) % evaluate_every == 0 or finished(name):
            evaluate(name)
    for name, record in records.items():
        if record.evaluations[-1].rounds < len(record.seconds):
            evaluate(name)


def seconds_until(level: float, evaluations: Sequence[Evaluation]) -> float:
    """Returns the CPU-seconds after which a level was first reached, on straight lines between evaluations.

    Infinity if it never was.
    """
    if evaluations[0].reward >= level:
        return evaluations[0].seconds
    for before, after in pairwise(evaluations):
        if after.reward >= level:
            share = (level - before.reward) / (after.reward - before.reward)
            return before.seconds + share * (after.seconds - before.seconds)
    return math.inf


def reward_after(seconds: float, evaluations: Sequence[Evaluation]) -> float:
    """Returns the held-out reward after some CPU-seconds, on straight lines between evaluations, and then the last."""
    return float(np.interp(seconds, [e.seconds for e in evaluations], [e.reward for e in evaluations]))
