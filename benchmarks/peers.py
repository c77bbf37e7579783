"""This project's DDPO trainer against TRL's, on the tiny world.

    python benchmarks/peers.py                      # an hour or more on one core
    python benchmarks/peers.py --rounds 4 --seeds 0  # the program itself

TRL 0.23.1 is the last release with a `DDPOTrainer`. It is installed into an environment of its own, beside the very
versions of torch, diffusers and the others that this project runs with. Three sides train the same LoRA on the same
prompts and reward:

- "TRL";
- "same": this project's trainer with the same arithmetic, batch by batch;
- "own": this project's trainer with the settings of examples/ddpo_finetune.py.

Each is a process with one thread; the one that has used the least time goes next. Time is that of the processor, and
of rounds only: setting up is not counted, nor is evaluation. One program evaluates all sides, on prompts that are not
trained on, with the same seeds.
"""

import json
import math
import shutil
import statistics
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.peers_child import RewardName, load_reward
from benchmarks.peers_environment import make_environment, requirements
from benchmarks.peers_race import Evaluator, Record, Side, race, reward_after, seconds_until
from benchmarks.peers_settings import NEVER, Settings, our_job, own_settings, trl_job
from benchmarks.timing import write_results
from ddpo import DDPOConfig
from overpaint import tinyworld
from overpaint.evaluation.report.charts import band_of, series_chart, svg
from overpaint.settings import AnyPath, Count, Field, NonNegative, Positive, Seed, settings

TRL, SAME, OWN = "TRL", "same", "own"
ROUND_TARGET = 1.0
"""Time of a round, "same" over "TRL"."""
REWARD_TARGET = 0.67
"""Time until the reward that TRL ends with, "own" over "TRL"."""


@settings
class Config:
    """What is compared, and for how long. What is not here has TRL's default."""

    reward: RewardName = "image-reward"
    """The tiny world's ImageReward, or minus the size of the image as a JPEG."""

    rounds: int = Field(20, ge=1)
    """Rounds of TRL."""

    seeds: tuple[Seed, ...] = Field((0, 1, 2), min_length=1)
    """Seeds of training."""

    samples_per_round: Count = 64
    """Images of a round."""

    updates_per_round: Count = 4
    """Updates of a round."""

    batch_size: Count = 8
    """Images drawn at a time, and steps of images trained on at a time."""

    steps: Count = 4
    """Denoising steps of an image, as in examples/ddpo_finetune.py."""

    guidance_scale: NonNegative = 3.0
    """Classifier-free guidance."""

    learning_rate: Positive | None = None
    """Of "TRL" and "same"; None is that of "own"."""

    prompts: Count = 32
    """Prompts that are trained on: few enough for statistics of each."""

    held_out: int = Field(64, ge=1)
    """Held-out prompts of an evaluation."""

    evaluate_every: int = Field(2, ge=1)
    """Rounds between two evaluations."""

    environment: AnyPath = Path("runs/peers/venv")
    """TRL's environment, made where there is none."""

    output_dir: AnyPath = Path("runs/peers/results")
    """Where everything else is written. Seeds that are found there finished are not run again."""

    def __post_init__(self) -> None:
        """Checks that no seed comes twice."""
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different numbers, got {self.seeds}")

    def ddpo(self) -> DDPOConfig:
        """Returns what TRL and this project have in common: no picture grid, no divergence; TRL's buffer."""
        return DDPOConfig(
            samples_per_round=self.samples_per_round,
            updates_per_round=self.updates_per_round,
            sampling_batch_size=self.batch_size,
            minibatch_size=self.batch_size,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            buffer_size=16,
            kl_every=NEVER,
            pictures_every=NEVER,
        )

    def sides(self, seed: int) -> dict[str, Settings]:
        """Returns the settings of each side for a seed."""
        folder = self.output_dir.absolute() / f"seed-{seed}"
        prompts = tinyworld.captions("train", self.prompts, 0)
        own = own_settings(reward=self.reward, prompts=prompts, output_dir=folder / OWN / "run", seed=seed)
        rate = self.learning_rate or own.run.learning_rate
        run = replace(own.run, output_dir=folder / SAME / "run", learning_rate=rate)
        same = replace(own, ddpo=self.ddpo(), run=run)
        return {TRL: same, SAME: same, OWN: own}


Records = dict[str, Record]
"""The sides of one seed."""


def run_seed(config: Config, seed: int, trl_python: Path) -> Records:
    """Trains all sides with one seed, or reads what an earlier run found.

    Raises:
        ValueError: There is an earlier run with other settings.
    """
    folder = config.output_dir.absolute() / f"seed-{seed}"
    settings = config.sides(seed)
    wanted = {
        "evaluations": [config.rounds, config.evaluate_every, config.held_out],
        **{name: our_job(side) for name, side in settings.items()},
    }
    file = folder / "records.json"
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["settings"] != wanted:
            raise ValueError(f"output_dir must be new for other settings, and {file} was made with different ones")
        return {name: Record(**values) for name, values in found["records"].items()}

    evaluator = Evaluator(
        tinyworld.load_policy(lora=settings[TRL].lora, device="cpu"),
        load_reward(config.reward),
        tinyworld.captions("held_out", config.held_out, 0),
        settings[TRL],
    )
    with ExitStack() as stack:
        sides = {}
        for name, side in settings.items():
            python, program = (trl_python, "trl") if name == TRL else (Path(sys.executable), "ours")
            job = trl_job(side) if name == TRL else our_job(side)
            count = side.ddpo.samples_per_round
            shutil.rmtree(folder / name, ignore_errors=True)  # what an interrupted comparison left
            started = Side(python, f"benchmarks.peers_{program}", job, folder / name, samples_per_round=count)
            sides[name] = stack.enter_context(started)
        race(
            sides,
            evaluator,
            rounds=config.rounds,
            pacemaker=TRL,
            follower=OWN,
            evaluate_every=config.evaluate_every,
            report=lambda line: print(f"seed {seed}, {line}", file=sys.stderr, flush=True),
        )
    records = {name: side.record for name, side in sides.items()}
    content = {"settings": wanted, "records": {name: asdict(record) for name, record in records.items()}}
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return records


def summary(records: Mapping[int, Records]) -> dict[str, Any]:
    """Returns the numbers that the targets are about, by what they are called in the table."""
    rounds = {
        name: statistics.median(second for sides in records.values() for second in sides[name].seconds)
        for name in (TRL, SAME, OWN)
    }
    reached = {}
    for seed, sides in records.items():
        start, *_, level = (evaluation.reward for evaluation in sides[TRL].evaluations)
        theirs, ours = (seconds_until(level, sides[name].evaluations) for name in (TRL, OWN))
        reached[seed] = {
            "start": start,
            "level": level,
            TRL: theirs,
            OWN: ours,
            # A side that learned nothing is no yardstick.
            "ratio": ours / theirs if theirs > 0 else math.nan,
        }
    return {"cpu_seconds_per_round": rounds, "ratio": rounds[SAME] / rounds[TRL], "reached": reached}


def table(records: Mapping[int, Records]) -> str:
    """Writes the results as text."""
    found = summary(records)
    first = next(iter(records.values()))
    lines = ["CPU-seconds per round, median over all seeds"]
    for name, seconds in found["cpu_seconds_per_round"].items():
        lines.append(f"  {name:5}{seconds:9.2f}")
    lines += [f"  same / TRL {found['ratio']:.3f} (target: at most {ROUND_TARGET:.2f})", ""]
    lines += [f"Held-out reward, mean over {len(records)} seeds", f"  {'queries':>8}{TRL:>10}{SAME:>10}"]
    for k, evaluation in enumerate(first[TRL].evaluations):
        means = [
            statistics.fmean(sides[name].evaluations[k].reward for sides in records.values()) for name in (TRL, SAME)
        ]
        lines.append(f"  {evaluation.queries:8}" + "".join(f"{mean:10.4f}" for mean in means))
    rounds = first[TRL].evaluations[-1].rounds
    lines += ["", f"CPU-seconds until the held-out reward of TRL after {rounds} rounds"]
    lines.append(f"  {'seed':>4}{'start':>9}{'level':>9}{TRL:>9}{OWN:>9}{'ratio':>8}")
    for seed, row in found["reached"].items():
        lines.append(
            f"  {seed:4}{row['start']:9.4f}{row['level']:9.4f}{row[TRL]:9.1f}{row[OWN]:9.1f}{row['ratio']:8.3f}"
        )
    mean = statistics.fmean(row["ratio"] for row in found["reached"].values())
    lines.append(f"  own / TRL, mean over seeds {mean:.3f} (target: at most {REWARD_TARGET:.2f})")
    if math.isnan(mean):
        lines.append("  (nan: TRL had learned nothing, so there is no level to reach)")
    return "\n".join(lines)


def figures(records: Mapping[int, Records]) -> dict[str, str]:
    """Draws held-out reward over reward queries and over CPU-seconds, as SVG by file name."""
    charts = {}
    common = min(side.total for sides in records.values() for side in sides.values())
    times = [common * k / 20 for k in range(21)]
    for name, label in (("queries", "reward queries"), ("seconds", "CPU-seconds")):
        bands = {}
        for side in (TRL, SAME, OWN):
            runs = [sides[side].evaluations for sides in records.values()]
            if name == "queries":
                points = [[(float(one.queries), one.reward) for one in run] for run in runs]
            else:
                points = [[(time, reward_after(time, run)) for time in times] for run in runs]
            bands[side] = band_of(points)
        chart = series_chart(bands, title="Held-out reward", x_label=label, y_label="held-out reward", bands=True)
        charts[f"peers-{name}.svg"] = svg(chart.spec)
    return charts


def main(config: Config) -> dict[str, Any]:
    """Runs what is missing, prints the table and saves the numbers."""
    torch.set_num_threads(1)
    python = make_environment(config.environment).absolute()
    records = {seed: run_seed(config, seed, python) for seed in config.seeds}
    print(table(records))
    results = {
        "versions": requirements(),
        **summary(records),
        "records": {seed: {name: asdict(side) for name, side in sides.items()} for seed, sides in records.items()},
    }
    for name, chart in figures(records).items():
        (config.output_dir / name).write_text(chart, encoding="utf-8")
    file = config.output_dir / "peers.json"
    write_results(file, config, **results)
    print(f"\nAll numbers: {file}; curves: peers-queries.svg and peers-seconds.svg beside it")
    return results


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
