"""What is learned on the tiny world's flow transformer: rewards by three trainers, and erasing by two methods.

    python benchmarks/flow.py
    python benchmarks/flow.py --seeds 0 --queries 128

ReFL, Flow-GRPO and DiffusionNFT raise the tiny world's ImageReward at equal numbers of reward queries. The weights that
did best on 96 held-out prompts are kept; other prompts are drawn before and after, with the same seeds. ESD and
EraseFlow erase stripes, and ReFL wins back the reward of what they leave while a detector keeps stripes out. What is
finished is kept.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

from ddpo import DDPOTrainer, NFTConfig, NFTTrainer
from erasure import Erasure, ErasureMethod, ImageConstraint, Lagrangian, method_named
from erasure import erase as erase_by
from examples import ddpo_finetune
from overpaint import DiffusionPolicy, LoRAConfig, TrainingConfig, tinyworld
from overpaint.evaluation.experiments.experiment import (
    CONCEPT_RATE,
    IMAGE_REWARD,
    Experiment,
    draw_and_score,
    evaluate,
    tiny_world,
)
from overpaint.evaluation.experiments.options import TINY_FLOW
from overpaint.evaluation.experiments.study import MethodLine, Spread, methods_table, spread
from overpaint.evaluation.experiments.work import work_through
from overpaint.evaluation.images.plan import DrawConfig
from overpaint.evaluation.metrics.statistics import paired_difference
from overpaint.evaluation.report.charts import band_of, series_chart, svg
from overpaint.evaluation.scoring.score import Scores
from overpaint.policy import ClassifierFree
from overpaint.policy.atomic import write_text
from overpaint.settings import AnyPath, Distinct, Field, settings
from overpaint.training import HeldOut, read_metrics
from refl import ReFLConfig, ReFLTrainer, pairs_from_policy

ALGORITHMS: Mapping[str, ddpo_finetune.Algorithm] = {"Flow-GRPO": "grpo", "DiffusionNFT": "nft"}
TRAINERS = ("ReFL", *ALGORITHMS)
ERASERS = ("ESD", "EraseFlow")
RECOVERED = "recovered"
STEPS = 10
HELD_OUT = 96
"""Prompts by which the best weights are chosen."""


@settings
class Config:
    """What is trained, and for how long."""

    seeds: Distinct[int] = Field((0, 1, 2), min_length=1)
    """Of training, prompts and pictures."""

    names: Distinct[str] = Field((*TRAINERS, *ERASERS), min_length=1)
    """Which trainers and erasers."""

    queries: int = Field(1280, ge=64, multiple_of=64)
    """Images that each trainer may have scored."""

    recovery_iterations: int = Field(160, ge=1)
    """Updates that win back the reward of an erased model."""

    pairs: int = Field(256, ge=1)
    """Pictures of the original, without the concept, that the pretraining term is about meanwhile."""

    prompts: int = Field(200, ge=2)
    """Held-out prompts, and prompts of each kind where a concept is erased."""

    workers: int = Field(2, ge=1)
    """Processes at a time, with one thread each."""

    output_dir: AnyPath = Path("runs/flow")
    """Where everything is kept."""

    def __post_init__(self) -> None:
        """Checks that the names are known."""
        if unknown := [name for name in self.names if name not in (*TRAINERS, *ERASERS)]:
            raise ValueError(f"names must be of {', '.join((*TRAINERS, *ERASERS))}, got {unknown[0]!r}")


class Run(NamedTuple):
    """One model that is trained and measured."""

    name: str
    """In `TRAINERS` or `ERASERS`."""
    seed: int
    recovers: bool = False
    """Whether the reward of what the eraser left is won back."""

    @property
    def label(self) -> str:
        """What the progress bar calls it."""
        return f"{self.name}{f', {RECOVERED}' if self.recovers else ''}, seed {self.seed}"

    def folder(self, config: Config) -> Path:
        """Returns where it is kept."""
        return config.output_dir / f"{self.name}{f'-{RECOVERED}' if self.recovers else ''}" / f"seed-{self.seed}"

    def found(self, config: Config) -> dict[str, float] | None:
        """Returns what was measured, if it was."""
        path = self.folder(config) / "found.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def training(folder: Path, iterations: int, learning_rate: float, seed: int) -> TrainingConfig:
    """Returns the settings of a run that goes on where it was interrupted."""
    return TrainingConfig(
        output_dir=folder, iterations=iterations, learning_rate=learning_rate, checkpoint_every=20, resume=True,
        seed=seed, progress=False,
    )  # fmt: skip


def refl_config(**others: Any) -> ReFLConfig:
    """Returns ReFL's settings: the reward of one late step of ten."""
    return ReFLConfig(
        batch_size=8, micro_batch_size=8, pretraining_batch_size=16, steps=STEPS, first_reward_step=STEPS // 2,
        last_reward_step=STEPS - 1, guidance_scale=3.0, reward_scale=0.05, **others,
    )  # fmt: skip


def raise_reward(run: Run, config: Config, policy: DiffusionPolicy, about: Experiment) -> int:
    """Trains by one of the trainers; returns the reward queries of an iteration."""
    prompts = about.prompts("train", 1000, run.seed + 300)
    held_out = HeldOut(about.prompts("held_out", HELD_OUT, 200), about.reward, batch_size=48)
    if run.name == "ReFL":
        count, rate = 8, 5e-4
        trainer: Any = ReFLTrainer(policy, about.reward, prompts, refl_config(evaluate_every=40), held_out=held_out)
    else:
        chosen = ddpo_finetune.Config(policy=TINY_FLOW, algorithm=ALGORITHMS[run.name])
        settings, rate = ddpo_finetune.settings_of(chosen), ddpo_finetune.run_config(chosen).learning_rate
        count = settings.samples_per_round
        kind: Any = NFTTrainer if isinstance(settings, NFTConfig) else DDPOTrainer
        trainer = kind(policy, about.reward, prompts, settings, held_out=held_out)
    trainer.train(training(run.folder(config), config.queries // count, rate, run.seed))
    return count


def tune(run: Run, config: Config) -> dict[str, float]:
    """Trains for the reward, and compares held-out prompts before and after."""
    about, policy = tiny_world(), tinyworld.load_flow_policy(lora=LoRAConfig(rank=8, alpha=8))
    drawing = DrawConfig(steps=STEPS, guidance_scale=1.0 if run.name == "DiffusionNFT" else 3.0)
    splits = {"benign": about.prompts("benign", config.prompts, run.seed + 100)}
    evaluated = partial(
        draw_and_score, policy, about.measures, splits, drawing, seed=run.seed, progress=False, model=run.name
    )
    before = evaluated().scores
    count = raise_reward(run, config, policy, about)
    after = evaluated().scores
    change, utility = (difference(after, before, measure) for measure in (IMAGE_REWARD, "true utility"))
    return {
        "queries per iteration": float(count),
        "before": mean(before, IMAGE_REWARD, "benign"),
        "after": mean(after, IMAGE_REWARD, "benign"),
        "change": change.mean,
        "standard error over prompts": change.error,
        "change of true utility": utility.mean,
    }


def difference(after: Scores, before: Scores, measure: str) -> Spread:
    """Returns the paired difference of a measure on benign prompts."""
    one = paired_difference(after.column(measure, "benign").values, before.column(measure, "benign").values)
    return Spread(one.mean, one.error)


def mean(scores: Scores, measure: str, kind: str) -> float:
    """Returns the mean of a measure over a kind of prompts."""
    return scores.column(measure, kind).estimate.mean


def eraser(name: str, seed: int) -> ErasureMethod:
    """Returns a method with the settings that were found for this model."""
    return method_named(name.lower(), tinyworld.FLOW_PRESETS[name.lower()], seed=seed)


def erase(run: Run, config: Config) -> dict[str, float]:
    """Erases stripes, or wins back the reward of an erased model under a constraint; and measures what came of it."""
    about = tiny_world()
    chain = "ancestral" if run.name == "EraseFlow" and not run.recovers else None
    lora = LoRAConfig(rank=64, alpha=64) if run.recovers else None
    policy = tinyworld.load_flow_policy(lora=lora, chain=chain)
    measured = partial(
        evaluate, policy, about, DrawConfig(steps=STEPS, guidance_scale=3.0), prompts_per_kind=config.prompts,
        seed=run.seed, progress=False, model=run.name,
    )  # fmt: skip
    before, folder = measured().scores, run._replace(recovers=False).folder(config) / "erasure"
    if run.recovers:
        recover(run, config, policy, about, Erasure.load(folder))
    else:
        erasure = erase_by(eraser(run.name, run.seed), policy, about.concept, progress=False)
        erasure.save(folder)
        erasure.apply(policy)
    after = measured().scores
    change, utility = (difference(after, before, measure) for measure in (IMAGE_REWARD, "true utility"))
    return {
        "explicit": mean(after, CONCEPT_RATE, "explicit"),
        "implicit": mean(after, CONCEPT_RATE, "implicit"),
        "neighbour kept": mean(after, "neighbour kept", "neighbour"),
        "accuracy": mean(after, "accuracy", "benign"),
        IMAGE_REWARD: mean(after, IMAGE_REWARD, "benign"),
        "against the original": change.mean,
        "true utility against the original": utility.mean,
    }


def recover(run: Run, config: Config, policy: DiffusionPolicy, about: Experiment, erasure: Erasure) -> None:
    """Raises the reward of an erased model, with a detector's mean on prompts of the concept below its ceiling.

    The pretraining term is about pictures that the original drew, without the concept.
    """
    assert about.detector is not None, "the tiny world's stripes have one"
    prompts = [*about.prompts("explicit", 120, 7), *about.prompts("implicit", 120, 7)]
    constraint = ImageConstraint(about.detector.score, prompts, Lagrangian(), ceiling=about.detector.ceiling)
    train = about.prompts("train", 1000, run.seed + 300)
    kept = [caption for caption in about.concept.preserve if caption.strip()]
    pairs = pairs_from_policy(
        policy, [caption for pair in zip(train, cycle(kept), strict=False) for caption in pair], count=config.pairs,
        steps=STEPS, guidance=ClassifierFree(3.0), seed=run.seed, batch_size=32,
    )  # fmt: skip
    erasure.apply(policy)
    trainer = ReFLTrainer(
        policy, about.reward, train, refl_config(erasure_batch_size=8, caption_dropout=0.33), pretraining=pairs,
        erasure=constraint,
    )  # fmt: skip
    run_config = training(run.folder(config), config.recovery_iterations, 3e-3, run.seed)
    trainer.train(replace(run_config, schedule="cosine"))


def work(run: Run, config: Config) -> None:
    """Does one run and writes what it found."""
    found = tune(run, config) if run.name in TRAINERS else erase(run, config)
    write_text(run.folder(config) / "found.json", json.dumps(found))


def lines_of(runs: Mapping[str, Sequence[Run]], config: Config) -> list[MethodLine]:
    """Returns a line for each name: means over seeds, and their standard errors."""
    lines = []
    for name, those in runs.items():
        found = [one for run in those if (one := run.found(config)) is not None]
        lines.append(MethodLine(name, {title: spread([one[title] for one in found]) for title in found[0]}))
    return lines


def curve(run: Run, config: Config) -> list[tuple[float, float]]:
    """Returns the reward of held-out prompts by the reward queries before."""
    found = run.found(config)
    assert found is not None, "all runs are done"
    rows = read_metrics(run.folder(config) / "metrics.jsonl")
    tag, count = "reward/held_out", found["queries per iteration"]
    return [(row["iteration"] * count, row[tag]) for row in rows if tag in row]


def main(config: Config) -> str:
    """Does what is missing, prints both tables, and draws reward against queries."""
    trainers = {name: [Run(name, seed) for seed in config.seeds] for name in TRAINERS if name in config.names}
    erased = {name: [Run(name, seed) for seed in config.seeds] for name in ERASERS if name in config.names}
    recovered = {f"{name}, {RECOVERED}": [run._replace(recovers=True) for run in runs] for name, runs in erased.items()}
    stages = [[run for runs in group.values() for run in runs] for group in (trainers | erased, recovered)]
    work_through(
        stages, lambda run: run.found(config) is not None, partial(work, config=config), workers=config.workers,
        desc="runs",
    )  # fmt: skip
    tables = [methods_table(lines_of(runs, config)).markdown() for runs in (trainers, erased | recovered) if runs]
    if trainers:
        bands = {name: band_of([curve(run, config) for run in runs]) for name, runs in trainers.items()}
        chart = series_chart(
            bands, bands=True, title=f"Held-out prompts, {len(config.seeds)} seeds", x_label="reward queries",
            y_label=f"{IMAGE_REWARD}, each trainer's own way to draw",
        )  # fmt: skip
        write_text(config.output_dir / "reward.svg", svg(chart.spec))
    text = "\n\n".join(tables)
    write_text(config.output_dir / "tables.md", text + "\n")
    print(text)
    return text


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
