"""Compare DDPO-IS, DDPO-SF, RWR and RWR-sparse at equal numbers of reward queries, over several seeds.

    python examples/ddpo_compare.py --task image-reward
    python examples/ddpo_compare.py --task compressibility --seeds 0 1 2

Every run is one of ``examples/ddpo_finetune.py`` in a folder of its own; those that are there and whole are not run
again. The curves, mean and standard deviation over the seeds on held-out prompts, are written beside them. A folder
holds runs of one policy and one number of queries; seeds and algorithms can be added.
"""

import json
from dataclasses import replace
from pathlib import Path

import ddpo_finetune
import tyro

from erasure.cache import claim
from overpaint.evaluation import Estimate
from overpaint.evaluation.experiments.options import TINY_WORLD, TINY_WORLDS
from overpaint.evaluation.experiments.tasks import TaskName, tiny_task
from overpaint.evaluation.report.charts import band_of, series_chart, svg
from overpaint.policy.atomic import write_text
from overpaint.settings import AnyPath, Distinct, Field, Seed, settings
from overpaint.training import read_metrics

REWARD, HELD_OUT = "reward/validation", "reward/held_out"


@settings
class Config:
    """Which runs are compared."""

    task: TaskName = "image-reward"
    """What is asked of the policy."""

    policy: str = TINY_WORLD
    """The tiny world, or a folder or hub id of a Stable Diffusion."""

    algorithms: Distinct[ddpo_finetune.Algorithm] = ("ddpo-is", "ddpo-sf", "rwr", "rwr-sparse")
    """What is compared."""

    seeds: Distinct[Seed] = Field((0, 1, 2), min_length=1)
    """One run of each algorithm for each."""

    queries: int = Field(1920, ge=1)
    """Images that each run may score for training, in whole rounds; RWR on a checkpoint scores 10,240 in a round."""

    prompts_per_split: int = Field(200, ge=1)
    """Prompts of each split in a run's evaluation."""

    output_dir: AnyPath = Path("runs/ddpo_compare")
    """Folder of the folders of the runs."""

    def run(self, algorithm: ddpo_finetune.Algorithm, seed: int) -> ddpo_finetune.Config:
        """Returns the settings of one run.

        Raises:
            ValueError: The queries do not suffice for one round.
        """
        whole = ddpo_finetune.Config(
            policy=self.policy,
            task=self.task,
            algorithm=algorithm,
            seed=seed,
            prompts_per_split=self.prompts_per_split,
            output_dir=self.output_dir / self.task / f"{algorithm}-{seed}",
            resume=True,
        )
        per_round = ddpo_finetune.settings_of(whole).samples_per_round
        if self.queries < per_round:
            raise ValueError(
                f"queries must be at least the {per_round} of one round of {algorithm}, got {self.queries}"
            )
        return replace(whole, rounds=self.queries // per_round)


def points(folder: Path, tag: str, queries_per_round: int) -> list[tuple[float, float]]:
    """Returns the values of a tag in a run, by the reward queries before."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [(float(line["iteration"] * queries_per_round), line[tag]) for line in lines if tag in line]


Bands = dict[str, dict[str, list[tuple[float, Estimate]]]]
"""Mean and spread over the seeds, by the queries before; of each tag, and by algorithm."""


def columns(band: list[tuple[float, Estimate]]) -> dict[str, list[float]]:
    """Returns the reward queries, and mean and standard deviation over the seeds."""
    means = [one.mean for _, one in band]
    return {"x": [x for x, _ in band], "mean": means, "spread": [one.high - one.mean for _, one in band]}


def deciding(config: Config) -> dict[str, str]:
    """Returns the settings that decide the numbers of a run."""
    others = ("algorithms", "seeds", "output_dir")
    return {name: str(value) for name, value in vars(config).items() if name not in others}


def check(config: Config) -> None:
    """Raises a `ValueError` where there is no such model, or the tiny world has no such task."""
    ddpo_finetune.Config(policy=config.policy).check()
    if config.policy in TINY_WORLDS:
        tiny_task(config.task, count=1)


def main(config: Config) -> Bands:
    """Makes the runs that are missing, prints the table, and draws the curves.

    Raises:
        ValueError: The folder holds runs of other settings, or these cannot be run; before any run.
    """
    bands: Bands = {REWARD: {}, HELD_OUT: {}}
    runs_of = {algorithm: [config.run(algorithm, seed) for seed in config.seeds] for algorithm in config.algorithms}
    check(config)  # what cannot be made must not claim the folder
    folder = config.output_dir / config.task
    claim(folder / "settings.json", deciding(config), "comparison")
    for algorithm, runs in runs_of.items():
        for run in runs:
            if not (run.output_dir / "comparison.json").exists():
                ddpo_finetune.main(run)
        per_round = ddpo_finetune.settings_of(runs[0]).samples_per_round
        for tag, found in bands.items():
            found[algorithm] = band_of([points(run.output_dir, tag, per_round) for run in runs])
    count = len(config.seeds)
    for tag, what in ((REWARD, config.task), (HELD_OUT, "held-out reward")):
        print(f"\n{what} on held-out prompts, {count} seeds, {config.queries} reward queries:")
        for name, band in bands[tag].items():
            (_, first), (_, last) = band[0], band[-1]
            print(f"  {name:10}  {first.mean:.3f} -> {last.mean:.3f} ± {last.error:.3f} (standard error over seeds)")
        chart = series_chart(
            bands[tag],
            bands=True,
            title=f"{what} on held-out prompts, {count} seeds",
            x_label="reward queries",
            y_label=what,
        )
        write_text(folder / f"{tag.replace('/', '_')}.svg", svg(chart.spec))
    content = {tag: {name: columns(band) for name, band in found.items()} for tag, found in bands.items()}
    write_text(folder / "curves.json", json.dumps(content, indent=1) + "\n")
    print(f"\nThe curves: {folder}")
    return bands


if __name__ == "__main__":
    main(tyro.cli(Config))
