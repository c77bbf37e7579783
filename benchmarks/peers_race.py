"""Sides of peers.py in turn: a process for each, its bill in CPU-seconds, and a judge that neither pays for."""

import json
import math
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch

from benchmarks.peers_environment import ROOT
from benchmarks.peers_settings import Settings
from overpaint.policy import ClassifierFree, DiffusionPolicy
from rewards import Reward


class Look(NamedTuple):
    """What held-out prompts said of a side at some point."""

    rounds: int
    queries: int
    """Images that the reward had graded by then."""
    seconds: float
    """CPU-seconds that all rounds had taken by then."""
    reward: float


@dataclass(kw_only=True)
class Record:
    """What is known of a side."""

    seconds: list[float] = field(default_factory=list)
    """CPU-seconds of each round."""

    rewards: list[float] = field(default_factory=list)
    """Mean reward of the samples of each round, before its updates."""

    looks: list[Look] = field(default_factory=list)
    """Held-out rewards, the first one before any training."""

    @property
    def total(self) -> float:
        """CPU-seconds of all rounds."""
        return sum(self.seconds)

    def to_json(self) -> dict[str, Any]:
        """Returns what `from_json` takes."""
        return asdict(self) | {"looks": [look._asdict() for look in self.looks]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Record":
        """Takes what `to_json` returned."""
        looks = [Look(**look) for look in values["looks"]]
        return cls(seconds=values["seconds"], rewards=values["rewards"], looks=looks)


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
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()

    def play(self) -> None:
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


class Judge:
    """Draws held-out prompts with fixed seeds and returns their mean reward; the noise is the same at every look.

    Args:
        policy: What weights are loaded into.
        reward: What grades.
        prompts: None that are trained on.
        settings: How images are drawn, which is as in training, noise of the steps included.
    """

    def __init__(self, policy: DiffusionPolicy, reward: Reward, prompts: Sequence[str], settings: Settings) -> None:
        self.policy = policy
        self.reward = reward
        self.prompts = prompts
        self.steps = settings.ddpo.steps
        self.guidance = ClassifierFree(settings.ddpo.guidance_scale)
        self.eta = settings.ddpo.eta

    @torch.no_grad()
    def __call__(self, weights: Path | None = None) -> float:
        """Judges saved weights, or those that the policy has."""
        if weights is not None:
            from safetensors.torch import load_file

            self.policy.load_trainable_state(load_file(weights))
        seeds = range(len(self.prompts))
        images = self.policy.draw(self.prompts, seeds=seeds, steps=self.steps, guidance=self.guidance, eta=self.eta)
        return float(self.reward(images, self.prompts).mean())


def race(
    sides: Mapping[str, Side],
    judge: Judge,
    *,
    rounds: int,
    pacemaker: str,
    follower: str,
    look_every: int,
    say: Callable[[str], None],
) -> None:
    """Lets the side that has used the least time play, so that other load on the machine touches all alike.

    Args:
        sides: By name.
        judge: Looks at every side before the first round, after every `look_every` and after the last.
        rounds: How many each side plays.
        pacemaker: A side whose time counts.
        follower: A side that plays until it has used as much time as the pacemaker, however many rounds that is.
        look_every: Rounds between two looks.
        say: Is told of every look.
    """
    start = judge()
    for side in sides.values():
        side.record.looks.append(Look(0, 0, 0.0, start))

    def look(name: str) -> None:
        side, count = sides[name], len(sides[name].record.seconds)
        seen = Look(count, count * side.samples_per_round, side.record.total, judge(side.weights))
        side.record.looks.append(seen)
        say(f"{name}: round {count}, {seen.seconds:.0f} CPU-seconds, held-out reward {seen.reward:.4f}")

    def finished(name: str) -> bool:
        leader = sides[pacemaker].record
        if name == follower:
            return len(leader.seconds) == rounds and sides[name].record.total >= leader.total
        return len(sides[name].record.seconds) == rounds

    while playing := [name for name in sides if not finished(name)]:
        name = min(playing, key=lambda name: sides[name].record.total)
        sides[name].play()
        if len(sides[name].record.seconds) % look_every == 0 or finished(name):
            look(name)
    for name, side in sides.items():
        if side.record.looks[-1].rounds < len(side.record.seconds):
            look(name)


def seconds_until(level: float, looks: Sequence[Look]) -> float:
    """Returns the CPU-seconds after which a level was first reached, on straight lines between looks.

    Infinity if it never was.
    """
    before = looks[0]
    if before.reward >= level:
        return before.seconds
    for look in looks[1:]:
        if look.reward >= level:
            share = (level - before.reward) / (look.reward - before.reward)
            return before.seconds + share * (look.seconds - before.seconds)
        before = look
    return math.inf


def reward_after(seconds: float, looks: Sequence[Look]) -> float:
    """Returns the held-out reward after some CPU-seconds, on straight lines between looks, and then the last."""
    for before, look in pairwise(looks):
        if seconds < look.seconds:
            share = (seconds - before.seconds) / (look.seconds - before.seconds)
            return before.reward + share * (look.reward - before.reward)
    return looks[-1].reward
