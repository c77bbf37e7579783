"""Erase a concept from a text-to-image model, then win back its ImageReward while the concept stays gone.

    accelerate launch examples/refl_erase_nudity.py
    accelerate launch examples/refl_erase_nudity.py --method esd
    accelerate launch examples/refl_erase_nudity.py --policy CompVis/stable-diffusion-v1-4

By default this runs on the tiny world, whose harmful concept is stripes, in minutes on a CPU and without a download.
With ``--policy`` it is the same program on a Stable Diffusion: nudity, the official ImageReward, NudeNet. Three
states of the model are compared on the same prompts and seeds: ``before``, ``erased`` (by UCE, or any other method) and
``recovered`` (by ReFL under the constraint).
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import tyro

from erasure import Erasure, ImageConstraint
from erasure.changes import WeightChange
from erasure.registry import MethodName, erase, method_named
from overpaint.evaluation import DrawConfig, Panel
from overpaint.evaluation.experiments.experiment import (
    TINY_WORLD,
    Evaluation,
    Experiment,
    evaluate,
    experiment,
    write_results,
)
from overpaint.policy import DiffusionPolicy, LoRAConfig
from overpaint.settings import AnyPath, Field, settings
from overpaint.tinyworld.presets import PRESETS
from overpaint.training import HeldOut, TrainingConfig, check_output_dir, process_state
from refl import ReFLConfig, ReFLTrainer
from rewards.combine import to_device


@settings
class Config:
    """What is erased from what, and how the reward is won back."""

    policy: str = TINY_WORLD
    """The tiny world, or a folder or hub id of a Stable Diffusion."""

    output_dir: AnyPath = Path("runs/refl_erase_nudity")
    """Where everything is written."""

    method: MethodName = "uce"
    """What erases."""

    strength: float = Field(1.0, ge=0)
    """Strength of the erasure, for methods that have one; 1 is the method's own setting."""

    erasure: AnyPath | None = None
    """A folder of a saved erasure (`Erasure.save`), in place of computing one."""

    iterations: int = Field(80, ge=1)
    """ReFL iterations of the recovery."""

    learning_rate: float | None = Field(None, gt=0)
    """Of the LoRA; None is 1e-3 for the tiny world and 1e-4 for Stable Diffusion."""

    prompts_per_kind: int = Field(200, ge=1)
    """Prompts of each kind in the evaluation."""

    evaluation_steps: int = Field(20, ge=1)
    """Denoising steps of the pictures that are compared."""

    guidance_scale: float = 3.0
    """Classifier-free guidance, in training and in evaluation."""

    prompts_file: AnyPath | None = None
    """JSON with a list of prompts for each kind (explicit, implicit, neighbour, benign, train); None: built in."""

    seed: int = 0
    """Seed of everything."""

    resume: bool = False
    """Go on with an interrupted run in the same folder."""


def refl_config(config: Config) -> ReFLConfig:
    """Returns the settings of the recovery: small for the tiny world, the authors' batch for Stable Diffusion."""
    if config.policy == TINY_WORLD:
        return ReFLConfig(
            batch_size=8,
            micro_batch_size=8,
            erasure_batch_size=8,
            pretraining_batch_size=16,
            steps=20,
            first_reward_step=10,
            last_reward_step=19,
            guidance_scale=config.guidance_scale,
            reward_scale=0.05,
            evaluate_every=20,
        )
    return ReFLConfig(
        batch_size=64,
        micro_batch_size=2,
        erasure_batch_size=16,
        pretraining_batch_size=16,
        guidance_scale=config.guidance_scale,
        checkpoint_steps=True,
    )


def erasure_for(config: Config, policy: DiffusionPolicy, about: Experiment) -> Erasure:
    """Returns the erasure that is asked for: a saved one, or one that is computed now.

    Raises:
        ValueError: There is no such method, or a strength is given to one that has none.
    """
    if config.erasure is not None:
        return Erasure.load(config.erasure)
    preset = PRESETS.get(config.method) if config.policy == TINY_WORLD else None
    return erase(
        method_named(config.method, preset, seed=config.seed),
        policy,
        about.concept,
        strength=config.strength,
        output_dir=config.output_dir / "erasing",
        resume=config.resume,
    )


def recover(config: Config, policy: DiffusionPolicy, about: Experiment, *, progress: bool = True) -> None:
    """Raises the reward of an erased policy under the constraint."""
    held_out = None
    if about.held_out is not None:
        held_out = HeldOut(about.prompts("benign", 48, config.seed + 200), about.held_out)
    trainer = ReFLTrainer(
        policy,
        about.reward,
        about.prompts("train", 1000, config.seed + 300),
        refl_config(config),
        erasure=about.constraint,
        held_out=held_out,
    )
    trainer.train(replace(run_config(config), progress=progress))


def run_config(config: Config) -> TrainingConfig:
    """Returns the settings of the recovery's run."""
    tiny = config.policy == TINY_WORLD
    return TrainingConfig(
        output_dir=config.output_dir,
        iterations=config.iterations,
        learning_rate=config.learning_rate or (1e-3 if tiny else 1e-4),
        mixed_precision="no" if tiny else "bf16",
        checkpoint_every=20,
        resume=config.resume,
        seed=config.seed,
    )


def main(config: Config) -> None:
    """Runs the whole job."""
    check_output_dir(run_config(config))
    about = experiment(config.policy, prompts_file=config.prompts_file)
    policy = about.load(LoRAConfig(rank=8, alpha=8))
    to_device(about.reward, policy.device)
    drawing = DrawConfig(steps=config.evaluation_steps, guidance_scale=config.guidance_scale)
    evaluated = partial(evaluate, policy, about, drawing, prompts_per_kind=config.prompts_per_kind, seed=config.seed)

    erasure = erasure_for(config, policy, about)  # changes nothing yet
    evaluations = [evaluated(model="before")]
    erasure.apply(policy)
    evaluations.append(evaluated(model="erased"))
    recover(config, policy, about)
    evaluations.append(evaluated(model="recovered"))
    write(config, about, policy, erasure, evaluations)


def write(
    config: Config, about: Experiment, policy: DiffusionPolicy, erasure: Erasure, evaluations: Sequence[Evaluation]
) -> None:
    """Prints the table, and saves weights, numbers and the report."""
    if not process_state().is_main_process:
        return
    folder = config.output_dir
    erasure.save(folder / "erasure")
    policy.save_lora(folder / "lora")
    if isinstance(erasure.change, WeightChange):
        policy.save_pipeline(folder / "pipeline")
    on_images = isinstance(about.constraint, ImageConstraint)
    cost = "The detector's score minus its ceiling" if on_images else "The loss over its ceiling, minus 1"
    text = write_results(
        folder,
        evaluations,
        config,
        program="accelerate launch examples/refl_erase_nudity.py",
        title=f"{about.concept.name.capitalize()} erased, reward recovered",
        lead=f"{erasure.method} took {about.concept.name} out of {about.name}; ReFL then raised ImageReward "
        "under the constraint that the concept stays gone.",
        models={
            "before": f"{about.name}, as it came",
            "erased": f"after {erasure.method}",
            "recovered": f"then {config.iterations} iterations of ReFL with a LoRA, under the constraint",
        },
        metrics=folder / "metrics.jsonl",
        panels=(
            Panel(title="Reward of the training batch", tags={"ImageReward": "reward/mean"}),
            Panel(
                title="Held-out prompts",
                tags={"ImageReward": "reward/validation", "true utility": "reward/held_out"},
                caption="Reward hacking would show as the one rising while the other falls.",
            ),
            Panel(
                title="Cost of the constraint",
                tags={"cost": "erasure/cost"},
                references={"bound": 0.0},
                caption=f"{cost}, on prompts of the concept.",
            ),
            Panel(title="Weight of the constraint", tags={"weight": "erasure/weight"}),
        ),
        settings={"refl": asdict(refl_config(config)), "erasure": erasure.config},
    )
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Config))
    process_state().destroy_process_group()
