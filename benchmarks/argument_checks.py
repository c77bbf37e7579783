"""What checking arguments costs: its share of an iteration of ReFL and of a round of DDPO, on the tiny world.

    python benchmarks/argument_checks.py

Every check is timed by itself, in CPU-seconds of its thread: a share of a thousandth would be lost in what two timed
iterations differ by. The tiny world is the hard case: its networks are a thousandth of Stable Diffusion's, and the
checks are the same.
"""

import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import tyro

from benchmarks import ddpo_speed, overhead
from benchmarks.timing import temporary_run
from ddpo import DDPOTrainer
from overpaint import tinyworld
from overpaint.checked import Checks
from overpaint.policy import LoRAConfig
from overpaint.settings import Field, settings
from refl import ReFLTrainer

TARGET = 0.005


@settings
class Config:
    """How often."""

    iterations: int = Field(3, ge=1)
    """Timed iterations of each trainer, after one that is not."""


class Cost(NamedTuple):
    """What the checks of some iterations took."""

    calls: int
    seconds: float
    share: float
    """Of the CPU-seconds of the iterations."""


@contextmanager
def timed_checks() -> Generator[list[float], None, None]:
    """Yields the CPU-seconds of each check that is made meanwhile."""
    check, spent = Checks.__call__, []

    def timed(checks: Checks, args: tuple[Any, ...], values: dict[str, Any]) -> None:
        start = time.thread_time()
        check(checks, args, values)
        spent.append(time.thread_time() - start)

    Checks.__call__ = timed  # ty: ignore[invalid-assignment]  the same arguments
    try:
        yield spent
    finally:
        Checks.__call__ = check


def measure(trainer: Any, iterations: int) -> Cost:
    """Times iterations of a trainer, after one in which annotations are read."""
    with temporary_run(trainer.policy, iterations=iterations + 1) as run, timed_checks() as spent:
        trainer.prepare(run)
        start = 0.0
        for iteration in run.iterations():
            if iteration == 1:
                spent.clear()
                start = time.process_time()
            run.log(trainer.tagged(trainer.step(run), run))
        return Cost(len(spent), sum(spent), sum(spent) / (time.process_time() - start))


def main(config: Config) -> dict[str, Cost]:
    """Measures both trainers and prints what the checks cost."""
    torch.manual_seed(0)
    prompts, reward = tinyworld.captions("benign", 8, 0), tinyworld.load_reward()
    costs = {}
    makers = {
        "ReFL": lambda policy: ReFLTrainer(policy, reward, prompts, overhead.Config().refl()),
        "DDPO": lambda policy: DDPOTrainer(policy, reward, prompts, ddpo_speed.Config().ddpo()),
    }
    for name, make in makers.items():
        trainer = make(tinyworld.load_policy(lora=LoRAConfig(rank=8, alpha=8)))
        cost = costs[name] = measure(trainer, config.iterations)
        told = f"{cost.calls} checks, {cost.seconds * 1000:.1f} CPU-milliseconds"
        print(f"{name}: {told}, {cost.share:.3%} of all (target: at most {TARGET:.1%})")
    return costs


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
