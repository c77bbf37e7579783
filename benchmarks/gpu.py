"""Speed and memory of ReFL and of sampling at the models' full size, on the CUDA device at hand.

    python benchmarks/gpu.py                    # everything: about half an hour
    python benchmarks/gpu.py --batch-sizes 4 --no-compile
    python benchmarks/gpu.py --family flux --batch-sizes 1 --no-compile
    python benchmarks/gpu.py --tiny             # the program itself, in seconds on a CPU; measures nothing

Networks have the architecture of Stable Diffusion v1.4, or another family's, and ImageReward's, with random weights:
speed does not depend on their values, and nothing is downloaded. Images are 512 pixels wide, arithmetic is bf16. A ReFL
iteration is 35 denoising steps without gradient, one with it, decoding, ImageReward, backward, the denoising loss on as
many pairs, and AdamW.

The share of the peak is useful arithmetic (what the iteration does without any recomputation, as torch's own counter
counts it) over time, divided by what the same device reaches on large bf16 matrix products in the same run.
"""

import gc
import math
import statistics
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal, NamedTuple

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import timing
from benchmarks.random_models import BUILDERS, FamilyName
from benchmarks.random_rewards import random_reward
from benchmarks.timing import Work, temporary_run, unet_inputs
from overpaint.policy import ClassifierFree, DiffusionPolicy, LoRAConfig
from overpaint.settings import AnyPath, Field, settings
from refl import PretrainingPairs, ReFLConfig, ReFLTrainer

PROMPT = "a red circle"
REWARDED_STEP = 35  # the authors draw from 30 to 39; one step for all, so that iterations are comparable
REFL_STEPS = 40


@settings
class Config:
    """What is measured."""

    batch_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 4, 16), min_length=1)
    """Images per iteration, and images that are sampled together."""

    family: FamilyName = "sd"
    """Which model: Stable Diffusion v1.4, XL, 3.5 medium without T5, or FLUX.1 dev with a T5 of one layer."""

    size: int | None = Field(None, ge=16)
    """Side of the images in pixels; None is 512."""

    compile: bool = True
    """Whether to measure with torch.compile too; compiling takes a minute or two for each row."""

    sampling_steps: int = Field(50, ge=1)
    """Denoising steps of a sampled image."""

    repeats: int = Field(5, ge=1)
    """Timed runs of each row, after two that are not; the median counts."""

    tiny: bool = False
    """Tiny networks on the CPU, a few steps, no compilation: shows that the program runs, and measures nothing."""

    output: AnyPath | None = None
    """JSON file for the results; None prints only."""

    @property
    def side(self) -> int:
        """Side of the images in pixels."""
        return self.size or (64 if self.tiny else 512)


class Switches(NamedTuple):
    """One way to run the same arithmetic."""

    trained: Literal["nothing", "LoRA", "full"]
    checkpointing: bool = False
    compile: bool = False
    eight_bit: bool = False

    def __str__(self) -> str:
        """Names what is on."""
        on = [("checkpointing", self.checkpointing), ("compile", self.compile), ("AdamW8bit", self.eight_bit)]
        return ", ".join([self.trained, *(name for name, active in on if active)])


class Row(NamedTuple):
    """One line of the table; rate, memory and share are NaN where they could not be measured."""

    task: str
    """refl or sampling."""
    switches: str
    batch_size: int
    rate: float
    """Iterations per second for ReFL, images per second for sampling."""
    peak_gib: float
    """Most memory that tensors took, in GiB."""
    peak_share: float
    """Useful arithmetic per second over the measured bf16 matmul peak."""


def make_policy(switches: Switches, device: torch.device, *, tiny: bool, family: FamilyName = "sd") -> DiffusionPolicy:
    """Builds the policy: frozen weights in bf16, trained ones in float32."""
    full = switches.trained == "full"
    return DiffusionPolicy(
        BUILDERS[family](device, tiny=tiny),
        lora=LoRAConfig() if switches.trained == "LoRA" else None,
        train="full" if full else None,
        dtype=torch.float32 if full else torch.bfloat16,
        device=device,
        gradient_checkpointing=switches.checkpointing,
        compile=switches.compile,
    )


# What is run.


@contextmanager
def refl_iteration(
    config: Config, switches: Switches, batch_size: int, device: torch.device
) -> Generator[Work, None, None]:
    """Yields a function that takes one iteration of the trainer."""
    reward_step, steps = (2, 3) if config.tiny else (REWARDED_STEP, REFL_STEPS)
    policy = make_policy(switches, device, tiny=config.tiny, family=config.family)
    reward: Any = random_reward("image-reward", device, tiny=config.tiny)
    reward.gradient_checkpointing = switches.checkpointing
    refl = ReFLConfig(
        batch_size=batch_size,
        micro_batch_size=batch_size,
        pretraining_batch_size=batch_size,
        steps=steps,
        first_reward_step=reward_step,
        last_reward_step=reward_step,
        height=config.side,
        width=config.side,
    )
    latents, _ = unet_inputs(policy, [PROMPT] * batch_size, config.side)
    pairs = PretrainingPairs(latents, [PROMPT] * batch_size)
    trainer = ReFLTrainer(policy, reward, [PROMPT], refl, pretraining=pairs)
    optimizer = "adamw8bit" if switches.eight_bit else "adamw"
    with temporary_run(policy, iterations=1, mixed_precision="bf16", optimizer=optimizer) as run:
        trainer.prepare(run)
        yield lambda: trainer.step(run)


@contextmanager
def sampling(config: Config, switches: Switches, batch_size: int, device: torch.device) -> Generator[Work, None, None]:
    """Yields a function that draws one batch of images with classifier-free guidance."""
    policy = make_policy(switches, device, tiny=config.tiny, family=config.family)
    prompts, seeds, guidance = [PROMPT] * batch_size, list(range(batch_size)), ClassifierFree(5.0)
    steps = 2 if config.tiny else config.sampling_steps
    side = config.side
    yield lambda: policy.draw(
        prompts, seeds=seeds, steps=steps, guidance=guidance, batch_size=batch_size, height=side, width=side
    )


# How it is measured.


def matmul_peak(device: torch.device, *, size: int) -> float:
    """Returns what the device reaches on a product of two square bf16 matrices, in operations per second."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = [timing.seconds(lambda: a @ b, device) for _ in range(23)]
    return 2 * size**3 / min(times[3:])


def operations(work: Work) -> int:
    """Counts the floating-point operations of matrix products, convolutions and attention in one run."""
    work()  # encodes the prompts, which later runs have cached
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def measure(work: Work, device: torch.device, repeats: int, seconds_at_peak: float) -> tuple[float, float, float]:
    """Returns runs per second, GiB and the share of the peak; NaN for all three where memory runs out."""
    try:
        for _ in range(2):
            work()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        duration = statistics.median(timing.seconds(work, device) for _ in range(repeats))
    except torch.OutOfMemoryError:
        return math.nan, math.nan, math.nan
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else math.nan
    return 1 / duration, memory, seconds_at_peak / duration


def variants(config: Config) -> list[Switches]:
    """Returns the ways in which a ReFL iteration is run."""
    chosen = [Switches("LoRA"), Switches("LoRA", checkpointing=True), Switches("full", checkpointing=True)]
    if not config.tiny:
        chosen += [Switches("full"), Switches("full", checkpointing=True, eight_bit=True)]
        if config.compile:
            chosen += [Switches("LoRA", compile=True), Switches("LoRA", checkpointing=True, compile=True)]
    return chosen


def measured_rows(config: Config, device: torch.device, peak: float) -> Iterator[Row]:
    """Measures ReFL iterations and sampling, for each way to run them and each batch size."""
    plain = Switches("nothing")
    compiled = [plain._replace(compile=True)] if config.compile and not config.tiny else []
    useful: dict[str, int] = {}
    for switches in [*variants(config), plain, *compiled]:
        task, prepared = ("sampling", sampling) if switches.trained == "nothing" else ("refl", refl_iteration)
        if switches.trained not in useful:
            # Recomputation is no useful work: one image without it is counted, and the work grows with the batch.
            with prepared(config, Switches(switches.trained), 1, device) as work:
                useful[switches.trained] = operations(work)
        for batch_size in config.batch_sizes:
            _forget(device)
            with prepared(config, switches, batch_size, device) as work:
                batch_operations = useful[switches.trained] * batch_size
                rate, memory, share = measure(work, device, config.repeats, batch_operations / peak)
            rate *= batch_size if task == "sampling" else 1
            yield Row(task, str(switches), batch_size, rate, memory, share)


def table(rows: list[Row]) -> str:
    """Returns the rows as a Markdown table; what could not be measured is a dash."""
    heads = ["task", "trained, switches", "batch", "rate", "peak GiB", "share of bf16 peak"]
    lines = []
    for row in rows:
        unit = "iterations/s" if row.task == "refl" else "images/s"
        rate = "out of memory" if math.isnan(row.rate) else f"{row.rate:.3f} {unit}"
        memory = "-" if math.isnan(row.peak_gib) else f"{row.peak_gib:.1f}"
        share = "-" if math.isnan(row.peak_share) else f"{100 * row.peak_share:.1f} %"
        lines.append([row.task, row.switches, str(row.batch_size), rate, memory, share])
    return timing.markdown_table(heads, lines, words=2)


def main(config: Config) -> list[Row]:
    """Measures everything and prints it.

    Raises:
        SystemExit: There is no CUDA device, and the tiny run was not asked for.
    """
    if not config.tiny and not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device, and torch sees none; --tiny runs the program on a CPU")
    device = torch.device("cpu" if config.tiny else "cuda")
    torch.manual_seed(0)
    peak = matmul_peak(device, size=128 if config.tiny else 8192)
    name = "the CPU, tiny: these are no measurements" if config.tiny else torch.cuda.get_device_name(device)
    print(f"{name}; torch {torch.__version__}; bf16 matmul peak {peak / 1e12:.1f} TFLOP/s")
    rows = []
    for row in measured_rows(config, device, peak):
        rows.append(row)
        print(table([row]).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(rows))
    timing.write_results(config.output, config, device=name, matmul_peak=peak, rows=[row._asdict() for row in rows])
    return rows


def _forget(device: torch.device) -> None:
    """Frees what the row before left: memory, and what was compiled for its shapes."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
