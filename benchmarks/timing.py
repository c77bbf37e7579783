"""What benchmarks have in common: model calls by hand, work that is timed in turn, tables, results in a file."""

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from overpaint.policy import Conditioning, DiffusionPolicy
from overpaint.training import TrainingConfig, TrainingRun

Work = Callable[[], object]
Timer = Callable[[Work], float]

CPU = torch.device("cpu")


def clock(device: torch.device = CPU) -> float:
    """Returns a time in seconds: the processor's over all threads, or the clock's once a GPU has nothing left to do."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(work: Work, device: torch.device = CPU) -> float:
    """Times one run of the work, in CPU-seconds or on a GPU in seconds."""
    start = clock(device)
    work()
    return clock(device) - start


def take_turns(
    arms: Mapping[str, Work], rounds: Iterable[int], *, warm_up: int = 0, timer: Timer = seconds
) -> dict[str, list[float]]:
    """Times every arm once in each round, each going first in turn, so that other load on the machine touches all.

    Args:
        arms: By name.
        rounds: Numbers of the rounds, from 0.
        warm_up: Rounds that are not counted.
        timer: Times one run.

    Returns:
        The times of each arm, round by round.
    """
    names = list(arms)
    times: dict[str, list[float]] = {name: [] for name in names}
    for k in rounds:
        first = k % len(names)
        for name in names[first:] + names[:first]:
            taken = timer(arms[name])
            if k >= warm_up:
                times[name].append(taken)
    return times


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Returns the median of the times over that of the others."""
    return statistics.median(times) / statistics.median(others)


def comparison(times: Mapping[str, Sequence[float]], *, unit: str, target: float) -> str:
    """Writes medians and quartiles of two arms, and the ratio of the first to the second.

    Args:
        times: CPU-seconds of each arm, two or more.
        unit: What was timed, in the plural.
        target: The highest ratio that is wanted.
    """
    lines = []
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        quartiles = f"(quartiles {low:.3f} and {high:.3f}, {len(values)} {unit})"
        lines.append(f"  {name:8} {middle:.3f} CPU-seconds {quartiles}")
    return "\n".join([*lines, f"  ratio    {ratio(*times.values()):.3f} (target: at most {target:.2f})"])


def device_name(device: torch.device) -> str:
    """Returns what a GPU calls itself, or the CPU with its threads."""
    return f"CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> str:
    """Returns a Markdown table whose first columns hold words, and the others numbers."""
    alignment = "|---" * words + "|--:" * (len(heads) - words) + "|"
    head, *lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    return "\n".join([head, alignment, *lines])


def write_results(file: Path | None, config: Any, **results: Any) -> None:
    """Writes settings, torch's version and results as JSON, where there is a file to write."""
    if file is not None:
        content = _finite({"torch": torch.__version__, "config": asdict(config), **results})
        file.write_text(json.dumps(content, indent=1, default=str, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: what could not be measured or was never reached is null."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def temporary_run(policy: DiffusionPolicy, **options: Any) -> Generator[TrainingRun, None, None]:
    """Yields a training run in a folder that is deleted afterwards; options as `TrainingConfig` has them."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainingConfig(output_dir=Path(folder), progress=False, **options)
        with TrainingRun(policy, config) as run:
            yield run


class IdleOptimizer:
    """An optimizer whose step costs what a real one costs, and moves no weight: its step size is zero."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.adamw = torch.optim.AdamW(parameters, lr=0.0)

    def step(self) -> None:
        """Clips the gradients, makes AdamW's step and forgets them."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)


def unet_inputs(
    policy: DiffusionPolicy, prompts: Sequence[str], side: int | None = None
) -> tuple[Tensor, Conditioning]:
    """Returns random latents and the encoded prompts, for a call with one sample for each prompt."""
    shape = policy.latent_shape(side, side)
    return torch.randn(len(prompts), *shape, device=policy.device), policy.encode(prompts).to(policy.dtype)


def call_unet(policy: DiffusionPolicy, timestep: float, latents: Tensor, conditioning: Conditioning) -> Tensor:
    """Calls the policy's network at one timestep for all samples."""
    timesteps = torch.full((len(latents),), timestep, device=latents.device)
    return policy.family.call(policy.network, latents, timesteps, conditioning, policy.dtype)
