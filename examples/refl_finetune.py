"""Raise a reward by ReFL, and watch what becomes of the pictures.

    accelerate launch examples/refl_finetune.py
    accelerate launch examples/refl_finetune.py --policy CompVis/stable-diffusion-v1-4

By default the tiny world's ImageReward is raised, and its true utility is the held-out reward: were the reward hacked,
one would see it.
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path

import tyro

from overpaint.evaluation import DrawConfig, Panel
from overpaint.evaluation.experiments.experiment import TINY_WORLD, draw_and_score, experiment, write_results
from overpaint.policy import LoRAConfig
from overpaint.settings import AnyPath, Field, settings
from overpaint.training import HeldOut, TrainingConfig, check_output_dir, process_state
from refl import ReFLConfig, ReFLTrainer
from rewards.combine import to_device


@settings
class Config:
    """What is tuned, and for how long."""

    policy: str = TINY_WORLD
    """The tiny world, or a folder or hub id of a Stable Diffusion."""

    output_dir: AnyPath = Path("runs/refl_finetune")
    """Where everything is written."""

    iterations: int = Field(100, ge=1)
    """ReFL iterations."""

    learning_rate: float | None = Field(None, gt=0)
    """Of the LoRA; None is 5e-4 for the tiny world and 1e-4 for Stable Diffusion."""

    guidance_scale: float = 3.0
    """Classifier-free guidance, in training and in evaluation."""

    prompts: int = Field(200, ge=1)
    """Benign prompts in the evaluation."""

    evaluation_steps: int = Field(20, ge=1)
    """Denoising steps of the pictures that are compared."""

    seed: int = 0
    """Seed of everything."""

    resume: bool = False
    """Go on with an interrupted run in the same folder."""


def refl_config(config: Config) -> ReFLConfig:
    """Returns ReFL's settings: small for the tiny world, the authors' batch for Stable Diffusion."""
    if config.policy == TINY_WORLD:
        return ReFLConfig(
            batch_size=8,
            micro_batch_size=8,
            pretraining_batch_size=16,
            guidance_scale=config.guidance_scale,
            reward_scale=0.02,
        )
    return ReFLConfig(micro_batch_size=2, pretraining_batch_size=16, guidance_scale=config.guidance_scale)


def main(config: Config) -> None:
    """Trains and compares before and after."""
    run_config = TrainingConfig(
        output_dir=config.output_dir,
        iterations=config.iterations,
        learning_rate=config.learning_rate or (5e-4 if config.policy == TINY_WORLD else 1e-4),
        mixed_precision="no" if config.policy == TINY_WORLD else "bf16",
        checkpoint_every=20,
        resume=config.resume,
        seed=config.seed,
    )
    check_output_dir(run_config)
    about = experiment(config.policy)
    policy = about.load(LoRAConfig(rank=8, alpha=8))
    to_device(about.reward, policy.device)

    prompts = {"benign": about.prompts("benign", config.prompts, config.seed + 100)}
    drawing = DrawConfig(steps=config.evaluation_steps, guidance_scale=config.guidance_scale)
    evaluated = partial(draw_and_score, policy, about.measures, prompts, drawing, seed=config.seed)
    before = evaluated(model="before")
    held_out = None
    if about.held_out is not None:
        held_out = HeldOut(about.prompts("held_out", 48, config.seed + 200), about.held_out)
    trainer = ReFLTrainer(
        policy, about.reward, about.prompts("train", 1000, config.seed + 300), refl_config(config), held_out=held_out
    )
    trainer.train(run_config)
    after = evaluated(model="tuned")
    if not process_state().is_main_process:
        return
    policy.save_lora(config.output_dir / "lora")
    text = write_results(
        config.output_dir,
        [before, after],
        config,
        program="accelerate launch examples/refl_finetune.py",
        title="ImageReward raised by ReFL",
        lead=f"{config.iterations} iterations of ReFL on {about.name}.",
        metrics=config.output_dir / "metrics.jsonl",
        panels=(
            Panel(title="Reward of the training batch", tags={"ImageReward": "reward/mean"}),
            Panel(
                title="Held-out prompts",
                tags={"ImageReward": "reward/validation", "held-out reward": "reward/held_out"},
            ),
        ),
        settings={"refl": asdict(refl_config(config))},
    )
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Config))
    process_state().destroy_process_group()
