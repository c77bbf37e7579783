"""What the dual weight is worth: against a switch and fixed weights, and a floor of the reward against nearness.

    python benchmarks/rivals.py
    python benchmarks/rivals.py --seeds 0 --iterations 10

Two comparisons on the tiny world, each at equal samples and updates. First the recovery of a model that was erased by
ESD: what weighs the constraint, dual ascent, FlowErase-RL's switch, or a weight that is never moved. Then erasing by
ESD's loss on the original model: what holds the pictures of other prompts, a floor of the reward or a ceiling of the
divergence from the original, each at several bounds. What is finished is kept.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from erasure import (
    ESD,
    Erasure,
    FixedWeight,
    ImageConstraint,
    Lagrangian,
    ObjectiveConstraint,
    ReferenceDivergence,
    RewardFloor,
    Switch,
    WeightController,
)
from erasure.erased import is_saved
from erasure.floor import QualityConstraint
from overpaint import LoRAConfig, TrainingConfig, tinyworld
from overpaint.evaluation.experiments.experiment import CONCEPT_RATE, IMAGE_REWARD, evaluate, tiny_world
from overpaint.evaluation.experiments.study import MethodLine, methods_table, spread
from overpaint.evaluation.experiments.work import work_through
from overpaint.evaluation.images.plan import DrawConfig
from overpaint.evaluation.metrics.statistics import Estimate
from overpaint.evaluation.report.charts import svg
from overpaint.evaluation.report.pareto import Point, pareto_chart
from overpaint.policy.atomic import write_text
from overpaint.policy.unet_rows import counted_rows
from overpaint.settings import AnyPath, Distinct, Field, Seed, settings
from overpaint.training.logging import read_metrics
from refl import ReFLConfig, ReFLTrainer

CONTROLLERS: Mapping[str, Any] = {
    "dual weight": Lagrangian,
    "switch": Switch,
    "fixed 0.1": partial(FixedWeight, 0.1),
    "fixed 1": partial(FixedWeight, 1.0),
    "fixed 10": partial(FixedWeight, 10.0),
}
"""What weighs the constraint of a recovery."""

ERASING = "esd"
"""What the recoveries begin with."""

BOUNDS: Mapping[str, Any] = {
    "floor, slack 0": partial(RewardFloor, 0.0, 0.1),
    "floor, slack 0.2": partial(RewardFloor, 0.2, 0.1),
    "floor, slack 0.5": partial(RewardFloor, 0.5, 0.1),
    "divergence 0.03": partial(ReferenceDivergence, 3e-2),
    "divergence 0.3": partial(ReferenceDivergence, 0.3),
    "divergence 3": partial(ReferenceDivergence, 3.0),
}
"""What holds other pictures while a concept is erased."""

RECOVERING_RATE, ERASING_RATE = 1e-3, 3e-3
"""Learning rates: at the lower one 40 updates of ESD's loss end before the concept is gone, whatever bounds them."""


@settings
class Config:
    """What is compared."""

    seeds: Distinct[Seed] = Field((0, 1, 2), min_length=1)
    """Of training, prompts and pictures."""

    names: Distinct[str] = Field((*CONTROLLERS, *BOUNDS), min_length=1)
    """Which of them."""

    iterations: int = Field(40, ge=1)
    """Updates of each run."""

    prompts_per_kind: int = Field(100, ge=1)
    """Prompts of each kind in the evaluation."""

    steps: int = Field(10, ge=2)
    """Denoising steps."""

    workers: int = Field(2, ge=1)
    """Processes at a time, with one thread each."""

    output_dir: AnyPath = Path("runs/rivals")
    """Where everything is kept."""

    def __post_init__(self) -> None:
        """Checks that the names are known."""
        if unknown := [name for name in self.names if name not in (*CONTROLLERS, *BOUNDS)]:
            raise ValueError(f"names must be of {', '.join((*CONTROLLERS, *BOUNDS))}, got {unknown[0]!r}")


class Run(NamedTuple):
    """One training."""

    name: str
    """In `CONTROLLERS` or `BOUNDS`, or `ERASING`."""
    seed: int

    @property
    def label(self) -> str:
        """What the progress bar calls it."""
        return f"{self.name}, seed {self.seed}"

    def folder(self, config: Config) -> Path:
        """Returns where it is kept."""
        return config.output_dir / self.name.replace(" ", "-").replace(",", "") / f"seed-{self.seed}"

    def found(self, config: Config) -> dict[str, float] | None:
        """Returns what was measured, if it was; nothing of an erasure that is there."""
        if self.name == ERASING:
            return {} if is_saved(self.folder(config)) else None
        path = self.folder(config) / "found.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def erase(run: Run, config: Config) -> None:
    """Makes and keeps what the recoveries of a seed begin with."""
    method(run.seed).erase(tinyworld.load_policy(), tiny_world().concept, progress=False).save(run.folder(config))


def method(seed: int) -> ESD:
    """Returns what erases."""
    esd = ESD(tinyworld.PRESETS["esd"])
    esd.config = replace(esd.config, descent=replace(esd.config.descent, seed=seed))
    return esd


def train(run: Run, config: Config) -> None:
    """Does one run and measures it."""
    if run.name == ERASING:
        erase(run, config)
        return
    about, folder = tiny_world(), run.folder(config)
    drawing = DrawConfig(steps=config.steps, guidance_scale=3.0)
    refl = ReFLConfig(
        batch_size=8, micro_batch_size=8, erasure_batch_size=8, pretraining_batch_size=16, steps=config.steps,
        first_reward_step=config.steps // 2, last_reward_step=config.steps - 1, guidance_scale=3.0, reward_scale=0.05,
        evaluate_every=config.iterations,
    )  # fmt: skip
    policy = tinyworld.load_policy(lora=LoRAConfig(rank=8, alpha=8))
    prompts = [*about.prompts("explicit", 120, 7), *about.prompts("implicit", 120, 7)]
    floor: QualityConstraint | None = None
    start = time.process_time()
    if recovers := run.name in CONTROLLERS:
        Erasure.load(Run(ERASING, run.seed).folder(config)).apply(policy)
        weight: WeightController = CONTROLLERS[run.name]()
        assert about.detector is not None, "the tiny world's stripes have one"
        constraint = ImageConstraint(about.detector.score, prompts, weight, ceiling=about.detector.ceiling)
    else:
        floor = BOUNDS[run.name]()
        constraint = ObjectiveConstraint(method(run.seed), about.concept, prompts, FixedWeight(1.0), ceiling=0.1)
    trainer = ReFLTrainer(
        policy, about.reward, about.prompts("train", 1000, run.seed + 300), refl, erasure=constraint, floor=floor
    )
    with counted_rows() as rows:
        trainer.train(
            TrainingConfig(
                output_dir=folder, iterations=config.iterations, checkpoint_every=20, resume=True, seed=run.seed,
                learning_rate=RECOVERING_RATE if recovers else ERASING_RATE, progress=False,
            )
        )  # fmt: skip
    seconds = time.process_time() - start
    scores = evaluate(
        policy, about, drawing, model=run.name, prompts_per_kind=config.prompts_per_kind, seed=run.seed, progress=False
    ).scores
    side = "erasure" if recovers else "floor"
    violations = [
        row[f"{side}/violation"] for row in read_metrics(folder / "metrics.jsonl") if f"{side}/violation" in row
    ]
    found = {
        "violation integral": sum(max(0.0, one) for one in violations),
        "violation, last ten": sum(violations[-10:]) / len(violations[-10:]),
        "explicit": scores.column(CONCEPT_RATE, "explicit").estimate.mean,
        "implicit": scores.column(CONCEPT_RATE, "implicit").estimate.mean,
        IMAGE_REWARD: scores.column(IMAGE_REWARD, "benign").estimate.mean,
        "accuracy": scores.column("accuracy", "benign").estimate.mean,
        "UNet rows, thousands": rows.total / 1000,
        "CPU seconds": seconds,
    }
    write_text(folder / "found.json", json.dumps(found))


def lines_of(names: Sequence[str], config: Config) -> list[MethodLine]:
    """Returns a line for each name: means over seeds."""
    lines = []
    for name in names:
        found = [one for seed in config.seeds if (one := Run(name, seed).found(config)) is not None]
        lines.append(MethodLine(name, {title: spread([one[title] for one in found]) for title in found[0]}))
    return lines


def point(line: MethodLine) -> Point:
    """Returns where a run lies: how often the concept shows on implicit prompts, and the reward."""

    def estimate(title: str) -> Estimate:
        one = line.values[title]
        reach = 0.0 if one.error != one.error else one.error
        return Estimate(one.mean, one.error, one.mean - reach, one.mean + reach, 0)

    return Point(line.method, estimate("implicit"), estimate(IMAGE_REWARD))


def main(config: Config) -> str:
    """Does what is missing, and prints both tables."""
    work_through(
        [
            [Run(ERASING, seed) for seed in config.seeds],
            [Run(name, seed) for name in config.names for seed in config.seeds],
        ],
        lambda run: run.found(config) is not None,
        partial(train, config=config),
        workers=config.workers,
        desc="runs",
    )
    parts = [[name for name in kind if name in config.names] for kind in (CONTROLLERS, BOUNDS)]
    tables = [methods_table(lines_of(names, config)).markdown() for names in parts if names]
    if parts[1]:
        chart = pareto_chart(
            [point(line) for line in lines_of(parts[1], config)],
            title="A floor of the reward, or nearness to the original",
            x_label="concept rate of implicit prompts (lower is better)",
        )
        write_text(config.output_dir / "bounds.svg", svg(chart.spec))
    text = "\n\n".join(tables)
    write_text(config.output_dir / "tables.md", text + "\n")
    print(text)
    return text


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config))
