"""Updates that DDPO needs to bring a concept's rate down, by the critic and by the per-prompt baseline.

    python benchmarks/critic.py
    python benchmarks/critic.py --seeds 0 --rounds 10

The tiny world's stripes, from the model from which UCE has erased them as far as it can: prompts that bring them
unnamed still show some. The reward is 0 for a picture with stripes and 1 for one without, at equal samples. A run has
reached a rate in the first round where the mean rate of the last rounds is no higher. Every run is in a folder of its
own; one that is there and whole is not made again, and one that was interrupted goes on.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Literal, NamedTuple

import tyro

from ddpo import CriticConfig, DDPOConfig, DDPOTrainer
from erasure import UCE
from overpaint.policy import LoRAConfig
from overpaint.policy.types import Images, PerSample
from overpaint.settings import AnyPath, Distinct, Field, Seed, settings
from overpaint.tinyworld.presets import STRIPES
from overpaint.training import TrainingConfig, read_metrics

BaselineName = Literal["prompt", "group", "centred", "round", "critic"]
TARGET = 0.7


@settings
class Config:
    """What is compared."""

    baselines: Distinct[BaselineName] = ("prompt", "critic")
    """The first is what the others are compared with."""

    seeds: Distinct[Seed] = Field((0, 1, 2), min_length=1)
    """One run of each baseline for each."""

    rounds: int = Field(30, ge=1)
    """Rounds of a run."""

    samples_per_round: int = Field(64, ge=4)
    """Images of a round; a multiple of four."""

    prompts: int = Field(16, ge=1)
    """Captions that are drawn for; so few that each has rewards of its own to be compared with."""

    share: float = Field(0.5, gt=0, lt=1)
    """What part of the first round's rate is to be reached."""

    window: int = Field(4, ge=1)
    """Rounds whose rates are averaged."""

    learning_rate: float = Field(1e-3, gt=0)
    """Of the LoRA."""

    critic: CriticConfig = CriticConfig()
    """All about the critic."""

    output_dir: AnyPath = Path("runs/critic")
    """Folder of the folders of the runs."""


class Outcome(NamedTuple):
    """What a run came to."""

    rates: list[float]
    """Of the concept, in each round."""
    explained: list[float]
    """Of the last third of the trajectory, in each round whose rewards varied; empty without a critic."""


class NoStripes:
    """Gives 1 to a picture without stripes, and 0 to one with them."""

    differentiable = False

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Returns a number for each image; nothing here has a gradient."""
        from overpaint import tinyworld

        return 1.0 - tinyworld.concept_shown(images).float()


def run(config: Config, baseline: BaselineName, seed: int) -> Outcome:
    """Makes a run, or what is missing of it, and reads what it measured."""
    from overpaint import tinyworld

    folder = config.output_dir / f"{baseline}-{seed}"
    path = folder / "metrics.jsonl"
    if not path.exists() or len(_column(path, "reward/mean")) < config.rounds:
        policy = tinyworld.load_policy(lora=LoRAConfig(rank=8, alpha=8.0))
        UCE().erase(policy, STRIPES).apply(policy)
        settings = DDPOConfig(
            samples_per_round=config.samples_per_round,
            updates_per_round=1 if config.samples_per_round % 16 else 4,
            sampling_batch_size=config.samples_per_round,
            minibatch_size=config.samples_per_round // 4,
            steps=4,
            guidance_scale=3.0,
            clip_range=5e-3,
            baseline=baseline,
            critic=config.critic,
            images_per_prompt=4 if baseline in ("group", "centred") else 1,
            step_weights="signal",
            timestep_fraction=0.5,
            pictures_every=10,
        )
        trainer = DDPOTrainer(policy, NoStripes(), tinyworld.captions("implicit", config.prompts, seed), settings)
        trainer.train(
            TrainingConfig(
                output_dir=folder,
                iterations=config.rounds,
                learning_rate=config.learning_rate,
                weight_decay=1e-4,
                checkpoint_every=5,
                resume=True,
                seed=seed,
            )
        )
    rewards = _column(path, "reward/mean")[: config.rounds]
    return Outcome([1 - reward for reward in rewards], _column(path, "critic/explained_last"))


def rounds_until(rates: Sequence[float], rate: float, window: int) -> int | None:
    """Returns the rounds after which the mean rate of the last ones was no higher than a rate; None where it never was.

    Args:
        rates: Of each round.
        rate: What is to be reached.
        window: Rounds that are averaged.
    """
    for end in range(window, len(rates) + 1):
        if fmean(rates[end - window : end]) <= rate:
            return end
    return None


def main(config: Config) -> dict[BaselineName, list[Outcome]]:
    """Makes the runs that are missing, and prints the rounds that each needed."""
    outcomes = {name: [run(config, name, seed) for seed in config.seeds] for name in config.baselines}
    print(f"rounds of {config.samples_per_round} samples until {config.share:g} of the first rates of a seed:")
    goals = [
        config.share * fmean(found[place].rates[0] for found in outcomes.values()) for place in range(len(config.seeds))
    ]
    reached = {
        name: [rounds_until(one.rates, goal, config.window) for one, goal in zip(found, goals, strict=True)]
        for name, found in outcomes.items()
    }
    first = config.baselines[0]
    for name, found in outcomes.items():
        line = f"  {name:8} {', '.join('never' if one is None else str(one) for one in reached[name])}"
        ends = fmean(fmean(one.rates[-config.window :]) for one in found)
        line += f"  rate {fmean(one.rates[0] for one in found):.3f} -> {ends:.3f}"
        pairs = [(a, b) for a, b in zip(reached[name], reached[first], strict=True) if a is not None and b is not None]
        if name != first and pairs:
            line += f"  of {first}'s rounds {fmean(a for a, _ in pairs) / fmean(b for _, b in pairs):.2f}"
        if explained := [value for one in found for value in one.explained[-config.window :]]:
            line += f"  explained in the last third {fmean(explained):.2f}"
        print(line)
    print(f"target: the critic's at most {TARGET} of the per-prompt baseline's, more than 0.5 explained")
    content = {name: [one._asdict() for one in found] for name, found in outcomes.items()}
    (config.output_dir / "critic.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return outcomes


def _column(path: Path, tag: str) -> list[float]:
    return [line[tag] for line in read_metrics(path) if tag in line]


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
