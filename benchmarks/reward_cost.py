"""What each reward costs for an image: time, parameters and memory, at full size with random weights.

    python -m benchmarks.reward_cost                       # about ten minutes on one core; the largest takes 5 GB
    python -m benchmarks.reward_cost --device cuda --batch 16
    python -m benchmarks.reward_cost --rewards blip pick --output cost.json

Each reward is measured in a process of its own, so that peak memory is its own. On a CPU time is processor time over
all threads, and memory is the whole process, which takes some 0.5 GiB without any network; on CUDA time is that of the
clock and memory what tensors take. Backward goes to the pixels, with frozen weights. The detectors nudenet and opennsfw
run on the CPU either way, in onnxruntime's own threads, and neither tells its number of parameters. The text part of
the alignment reward is measured without the vision-language model before it.
"""

import math
import multiprocessing
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro
from torch import nn

from benchmarks import timing
from benchmarks.random_rewards import BUILDERS, random_reward
from overpaint.settings import AnyPath, Field, settings
from rewards import ImageReward
from rewards.blip import BLIPScore

PROMPT = "a red circle"
NAN = math.nan


@settings
class Config:
    """What is measured."""

    rewards: tuple[str, ...] = Field(tuple(BUILDERS), min_length=1)
    """Names of rewards."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where the networks run."""

    batch: int = Field(1, ge=1)
    """Images at once."""

    side: int = Field(512, ge=1)
    """Width and height of the images, in pixels."""

    repeats: int = Field(3, ge=1)
    """Timed runs of each kind, after one that is not; the median counts."""

    checkpointing: bool = False
    """Whether rewards that can (image-reward and blip) compute blocks anew in the backward pass."""

    tiny: bool = False
    """Tiny networks: shows that the program runs, and measures nothing."""

    output: AnyPath | None = None
    """JSON file for the results; None prints only."""

    def __post_init__(self) -> None:
        """Checks the names."""
        if unknown := [name for name in self.rewards if name not in BUILDERS]:
            raise ValueError(f"rewards must be some of {', '.join(BUILDERS)}, got {unknown[0]!r}")


class Cost(NamedTuple):
    """One line of the table; what could not be measured, or does not exist, is NaN."""

    reward: str
    parameters: float = NAN
    """Number of weights."""
    forward_seconds: float = NAN
    """Time for one image, without gradients."""
    backward_seconds: float = NAN
    """Time for one image, forward and backward to its pixels."""
    forward_gib: float = NAN
    """Peak memory of forward, weights included."""
    backward_gib: float = NAN
    """Peak memory of forward and backward, weights included."""
    error: str = ""
    """Why there are no numbers."""


def measure(name: str, config: Config) -> Cost:
    """Measures one reward in this process."""
    torch.manual_seed(0)
    device = torch.device(config.device)
    reward = random_reward(name, device, tiny=config.tiny)
    if isinstance(reward, ImageReward | BLIPScore):
        reward.gradient_checkpointing = config.checkpointing
    images = torch.rand(config.batch, 3, config.side, config.side, device=device)
    prompts = [PROMPT] * config.batch
    parameters = sum(p.numel() for p in reward.parameters()) if isinstance(reward, nn.Module) else NAN
    if name == "compressibility":
        parameters = 0

    def forward() -> None:
        with torch.no_grad():
            reward(images, prompts)

    def backward() -> None:
        inputs = images.clone().requires_grad_()
        torch.autograd.grad(reward(inputs, prompts).sum(), inputs)

    seconds, gib = measured(forward, config)
    backward_seconds, backward_gib = measured(backward, config) if reward.differentiable else (NAN, NAN)
    return Cost(name, parameters, seconds, backward_seconds, gib, backward_gib)


def measured(work: timing.Work, config: Config) -> tuple[float, float]:
    """Returns the median time of the work for one image, and in GiB the most memory that it took."""
    device = torch.device(config.device)
    work()
    # The peak so far, that of making the network among others, is forgotten.
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    seconds = statistics.median(timing.seconds(work, device) for _ in range(config.repeats)) / config.batch
    if device.type == "cuda":
        return seconds, torch.cuda.max_memory_allocated() / 2**30
    # Not getrusage's maximum, which cannot be reset and begins with that of the parent process.
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return seconds, next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**20


def measure_apart(name: str, config: Config) -> Cost:
    """Measures one reward in a new process; what goes wrong there is noted in the result."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        try:
            return pool.submit(measure, name, config).result()
        except BrokenProcessPool:
            return Cost(name, error="the process died, perhaps for want of memory")
        except (ImportError, RuntimeError, OSError) as error:
            return Cost(name, error=f"{type(error).__name__}: {error}".splitlines()[0])


def table(costs: Sequence[Cost]) -> str:
    """Returns the costs as text, one line each."""
    heads = ("parameters", "forward s", "fwd+bwd s", "forward GiB", "fwd+bwd GiB")
    lines = [f"{'reward':16}" + "".join(f"{head:>13}" for head in heads)]
    for cost in costs:
        numbers = [f"{cost.parameters / 1e6:,.1f} M", f"{cost.forward_seconds:.3f}", f"{cost.backward_seconds:.3f}"]
        numbers += [f"{cost.forward_gib:.2f}", f"{cost.backward_gib:.2f}"]
        cells = "".join(f"{'-' if 'nan' in number else number:>13}" for number in numbers)
        lines.append(f"{cost.reward:16}" + (f"  {cost.error}" if cost.error else cells))
    return "\n".join(lines)


def main(config: Config) -> list[Cost]:
    """Measures every reward, and prints the table."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this needs a CUDA device, and torch sees none; --device cpu measures on the CPU")
    costs = [measure_apart(name, config) for name in config.rewards]
    unit = "seconds" if config.device == "cuda" else f"CPU-seconds, {torch.get_num_threads()} threads"
    print(f"Per image, batch {config.batch}, {config.side} x {config.side} pixels, {config.device} ({unit}), float32:")
    print(table(costs))
    timing.write_results(config.output, config, costs=[cost._asdict() for cost in costs])
    return costs


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
