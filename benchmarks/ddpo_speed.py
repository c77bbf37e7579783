"""What the DDPO trainer costs beyond its model calls, what it saves over a plain loop, and by what.

    OMP_NUM_THREADS=1 python benchmarks/ddpo_speed.py
    python benchmarks/ddpo_speed.py --architecture stable-diffusion --precision bf16 --samples-per-round 16 \
        --updates-per-round 2 --sampling-batch-size 8 --minibatch-size 8 --minibatch-sizes 4 16 --compile   # on a GPU

A round of the trainer stands against the same model calls made by hand, with the same shapes: UNet forwards of the
sampling, VAE decoding, the reward, forward and backward of each minibatch, and the optimizer's steps. And it stands
against a loop with the structure of the authors' code, which trains on one step of one small batch at a time. A table
then says what each measure brings: the size of the minibatches, fewer steps, and so on.

All take turns in one process, with weights that stay put; medians count. On a CPU they are timed in CPU-seconds, so
that other load on the machine touches all alike, and on a GPU on the clock. The tiny world is the hard case: its
networks are a thousandth of Stable Diffusion's, and what is around them is the same. Stable Diffusion's have random
weights built here, since speed does not depend on their values.
"""

import statistics
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import tyro
from torch import Tensor

from benchmarks import gpu, timing
from benchmarks.ddpo_by_hand import BareRound, PlainRound
from benchmarks.random_models import BUILDERS, FamilyName, stable_diffusion
from benchmarks.random_rewards import random_reward
from benchmarks.timing import Timer, Work, temporary_run
from ddpo import DDPOConfig, DDPOTrainer
from overpaint.policy import Conditioning, DiffusionPolicy, LoRAConfig, Trajectory
from overpaint.settings import AnyPath, Count, Field, Share, settings
from overpaint.training import TrainingRun
from rewards import Reward

TARGET = 1.10
SIDE = 64
"""Of the images of small random networks, in pixels."""
TRAINER, BARE = "trainer", "bare calls"
STILL = 1e-12
"""Learning rate of the trainer, which has to be positive, and moves no weight by anything that matters."""


@settings
class Config:
    """Shapes of a round, and what is measured. What is not here has the trainer's default."""

    architecture: Literal["tiny", "stable-diffusion", "sdxl", "sd3", "flux"] = "tiny"
    """The tiny world with its ImageReward; Stable Diffusion v1.4 and ImageReward with random weights; or a small random
    network of another family with the tiny world's ImageReward, against the bare calls alone."""

    device: Literal["cpu", "cuda"] | None = None
    """None is the GPU, or the CPU where there is none; Stable Diffusion on a CPU has to be asked for."""

    precision: Literal["no", "bf16"] = "no"
    """What the networks compute in: float32 or bf16."""

    samples_per_round: Count = 64
    """Images of a round."""

    updates_per_round: Count = 4
    """Updates of a round."""

    sampling_batch_size: Count = 32
    """Images that are drawn at a time."""

    minibatch_size: Count = 32
    """Pairs of sample and step that go through the UNet at a time in an update."""

    steps: Count = 10
    """Denoising steps."""

    guidance_scale: float = Field(3.0, gt=1)
    """Classifier-free guidance, above 1: each UNet call has twice the batch."""

    plain_batch_sizes: tuple[Count, ...] = (4, 2)
    """Small batches of the plain loop. On a GPU the authors take 4."""

    minibatch_sizes: tuple[Count, ...] = (4, 16, 80)
    """Further sizes for the table; they must divide the pairs of an update, of which there are 160 by default."""

    timestep_fractions: tuple[Share, ...] = (0.4, 0.2)
    """Shares of the steps for the table; the pairs that are left must divide by `minibatch_size`."""

    compile: bool = False
    """Whether the table has the trainer with a UNet that went through `torch.compile`."""

    repeats: int = Field(8, ge=2)
    """Timed rounds of trainer, bare calls and plain loop, after one that is not."""

    table_repeats: int = Field(3, ge=0)
    """Timed rounds of each line of the table, after one that is not; 0 leaves the table out."""

    output: AnyPath | None = None
    """JSON file for the results; None prints only."""

    def __post_init__(self) -> None:
        """Checks what the trainer's settings check."""
        self.ddpo()

    def ddpo(self) -> DDPOConfig:
        """Returns the trainer's settings."""
        return DDPOConfig(
            samples_per_round=self.samples_per_round,
            updates_per_round=self.updates_per_round,
            sampling_batch_size=self.sampling_batch_size,
            minibatch_size=self.minibatch_size,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            height=SIDE if self.family else None,
            width=SIDE if self.family else None,
        )

    @property
    def family(self) -> FamilyName | None:
        """The other family whose small random network it is, if any."""
        return None if self.architecture in ("tiny", "stable-diffusion") else self.architecture


class Calls(NamedTuple):
    """Samples that go through the UNet in a round, both branches of guidance counted."""

    forward_only: int
    differentiated: int


class Row(NamedTuple):
    """What was measured of one way to do a round."""

    name: str
    calls: Calls
    seconds: list[float]
    relative: float
    """Median of the seconds over that of the trainer, which took turns with it."""


# The rounds.


class Bench(NamedTuple):
    """A policy in a training run, its reward and its prompts: what rounds are made of."""

    run: TrainingRun
    policy: DiffusionPolicy
    reward: Reward
    prompts: list[str]

    def trainer(self, config: DDPOConfig, *, recomputed: bool = False) -> Work:
        """Returns a round of the trainer, its lines in metrics.jsonl and its grid of pictures included.

        Args:
            config: Its settings.
            recomputed: Whether it has to take all old log-probabilities again. That is what other shapes of minibatches
                than those of the drawing may lead to in half precision. Here those of the drawing are falsified, so
                that it happens in any precision.
        """
        trainer = DDPOTrainer(self.policy, self.reward, self.prompts, config)
        trainer.prepare(self.run)
        draw = trainer.collector.draw

        def falsified(conditioning: Conditioning, seeds: Sequence[int]) -> Trajectory:
            trajectory = draw(conditioning, seeds)
            return trajectory._replace(log_probs=trajectory.log_probs + 1.0)

        if recomputed:
            trainer.collector.draw = falsified
        return lambda: self.run.log(trainer.tagged(trainer.step(self.run), self.run))


@contextmanager
def bench(config: Config, device: torch.device, *, compile: bool = False) -> Generator[Bench, None, None]:
    """Yields what rounds are made of, for the length of a training run."""
    from overpaint import tinyworld

    torch.manual_seed(0)
    lora = LoRAConfig(rank=8, alpha=8.0)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    if config.architecture != "stable-diffusion":
        options: Any = {"lora": lora, "dtype": dtype, "device": device, "compile": compile}
        if config.family is None:
            policy = tinyworld.load_policy(**options)
        else:
            policy = DiffusionPolicy(BUILDERS[config.family](device, tiny=True), **options)
        reward, prompts = tinyworld.load_reward().to(device), tinyworld.captions("train", 32, 0)
    else:
        pipeline = stable_diffusion(device, tiny=False)
        policy = DiffusionPolicy(pipeline, lora=lora, dtype=dtype, device=device, compile=compile)
        reward, prompts = random_reward("image-reward", device), [gpu.PROMPT]
    policy.encode(["", *prompts])  # once a run, and so no part of a round
    with temporary_run(policy, iterations=1, learning_rate=STILL, mixed_precision=config.precision) as run:
        yield Bench(run, policy, reward, prompts)


def contestants(config: Config, bench: Bench) -> dict[str, Work]:
    """Returns the trainer, the bare calls and the plain loops."""
    ddpo = config.ddpo()
    by_hand = (bench.policy, bench.reward, bench.prompts, ddpo, bench.run.autocast)
    rounds: dict[str, Work] = {TRAINER: bench.trainer(ddpo), BARE: BareRound(*by_hand)}
    for size in () if config.family else config.plain_batch_sizes:
        rounds[f"plain loop, batches of {size}"] = PlainRound(*by_hand, batch_size=size)
    return rounds


def variants(config: Config, bench: Bench) -> dict[str, Work]:
    """Returns the lines of the table: the trainer as it is, and with one setting changed."""
    ddpo = config.ddpo()
    changed = {f"{size} pairs a minibatch": replace(ddpo, minibatch_size=size) for size in config.minibatch_sizes}
    for fraction in config.timestep_fractions:
        changed[f"{fraction:g} of the steps"] = replace(ddpo, timestep_fraction=fraction)
    changed["divergence in the loss"] = replace(ddpo, kl_weight=0.1)
    rounds = {TRAINER: bench.trainer(ddpo)} | {name: bench.trainer(settings) for name, settings in changed.items()}
    if config.minibatch_sizes:
        size = config.minibatch_sizes[-1]
        again = bench.trainer(replace(ddpo, minibatch_size=size), recomputed=True)
        rounds[f"{size} pairs, old log-probabilities again"] = again
    return rounds


# How they are measured.


def count_calls(policy: DiffusionPolicy, work: Work) -> Calls:
    """Runs a round and counts what goes through the UNet."""
    network, counts = policy.network, [0, 0]

    def counted(*inputs: Any, **options: Any) -> Any:
        latents: Tensor = inputs[0] if inputs else options["hidden_states"]
        counts[torch.is_grad_enabled()] += len(latents)
        return network(*inputs, **options)

    policy.network = counted
    try:
        work()
    finally:
        policy.network = network
    return Calls(*counts)


def measure(policy: DiffusionPolicy, rounds: Mapping[str, Work], timer: Timer, *, repeats: int) -> list[Row]:
    """Times rounds in turn, after one of each that is not timed; the trainer is among them."""
    calls = {name: count_calls(policy, work) for name, work in rounds.items()}
    seconds = timing.take_turns(rounds, range(repeats), timer=timer)
    return [Row(name, calls[name], times, timing.ratio(times, seconds[TRAINER])) for name, times in seconds.items()]


def compiled_row(config: Config, device: torch.device, timer: Timer, of_trainer: float) -> Row | None:
    """Measures the trainer with a compiled UNet, after the others; None where nothing can be compiled."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(2, device=device))
    except Exception as error:  # whatever the compiler lacks, the other lines stand
        print(f"torch.compile does not work here, and is left out: {type(error).__name__}")
        return None
    with bench(config, device, compile=True) as compiled:
        work = compiled.trainer(config.ddpo())
        work()
        row = measure(compiled.policy, {TRAINER: work}, timer, repeats=config.table_repeats)[0]
    return row._replace(name="compiled UNet", relative=statistics.median(row.seconds) / of_trainer)


# What is written down.


def table(rows: list[Row], unit: str) -> str:
    """Returns the rows as a Markdown table."""
    heads = ["round", f"{unit}, median", "lowest", "over the trainer's", "through the UNet", "with gradient"]
    lines = []
    for row in rows:
        numbers = (statistics.median(row.seconds), min(row.seconds), row.relative)
        lines.append([row.name, *(f"{number:.3f}" for number in numbers), *map(str, row.calls)])
    return timing.markdown_table(heads, lines)


def summary(rows: list[Row]) -> str:
    """Returns the two ratios that the benchmark is about."""
    relative = {row.name: row.relative for row in rows}
    lines = [f"trainer over bare calls: {1 / relative[BARE]:.3f} (target: at most {TARGET:.2f})"]
    others = [name for name in relative if name not in (TRAINER, BARE)]
    return "\n".join(lines + [f"{name} over trainer: {relative[name]:.2f}" for name in others])


def chosen_device(config: Config) -> torch.device:
    """Returns where rounds are run, which is where a training run puts its networks.

    Raises:
        SystemExit: It is not what was asked for, or Stable Diffusion would run on a CPU without having been asked to.
    """
    found = "cuda" if torch.cuda.is_available() else "cpu"
    if config.device is None and found == "cpu" and config.architecture == "stable-diffusion":
        raise SystemExit("torch sees no CUDA device, and a round of Stable Diffusion takes hours without: --device cpu")
    if config.device not in (None, found):
        hint = "; CUDA_VISIBLE_DEVICES= hides a GPU" if found == "cuda" else ""
        raise SystemExit(f"device must be {found!r}, which a training run takes here, got {config.device!r}{hint}")
    return torch.device(found)


def main(config: Config) -> list[Row]:
    """Measures everything and prints it.

    Raises:
        SystemExit: As `chosen_device`.
    """
    device = chosen_device(config)
    unit = "seconds" if device.type == "cuda" else "CPU-seconds"
    timer = partial(timing.seconds, device=device)
    name = timing.device_name(device)
    print(f"{config.architecture}, {config.precision}; {name}; torch {torch.__version__}", flush=True)
    tables = []
    with bench(config, device) as made:
        tables.append(measure(made.policy, contestants(config, made), timer, repeats=config.repeats))
        print(table(tables[0], unit), summary(tables[0]), sep="\n\n", flush=True)
        if config.table_repeats:
            tables.append(measure(made.policy, variants(config, made), timer, repeats=config.table_repeats))
    if config.table_repeats:
        if config.compile:
            row = compiled_row(config, device, timer, statistics.median(tables[1][0].seconds))
            tables[1] += [] if row is None else [row]
        print(f"\n{table(tables[1], unit)}")
    written = [[row._asdict() | {"calls": row.calls._asdict()} for row in rows] for rows in tables]
    timing.write_results(config.output, config, device=name, unit=unit, tables=written)
    return [row for rows in tables for row in rows]


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
