"""Raise a reward by ReFL, and watch what becomes of the pictures.

    accelerate launch examples/refl_finetune.py
    accelerate launch examples/refl_finetune.py --policy CompVis/stable-diffusion-v1-4
    accelerate launch examples/refl_finetune.py --policy my-model.safetensors --reward my_reward:score --prompts my.txt

By default the tiny world's ImageReward is raised, and its true utility is the held-out reward: were the reward hacked,
one would see it. Any differentiable reward and any prompts can be brought.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from overpaint.evaluation import Measure, Panel
from overpaint.evaluation.experiments.experiment import draw_and_score, tiny_world, write_results
from overpaint.evaluation.experiments.options import (
    RewardOptions,
    RunOptions,
    SharingOptions,
    TunedOptions,
)
from overpaint.evaluation.experiments.program import check_same, settings_from_command_line, usual_beside
from overpaint.evaluation.experiments.tasks import own_prompts
from overpaint.evaluation.prompts import nudity_prompts
from overpaint.policy import DiffusionPolicy, LoRAConfig
from overpaint.settings import AnyPath, Field, settings
from overpaint.tinyworld import Utility, captions
from overpaint.training import HeldOut, check_output_dir, process_state
from refl import ReFLConfig, ReFLTrainer
from rewards import ImageReward, Reward
from rewards.combine import to_device


@settings
class Config(SharingOptions, RewardOptions, TunedOptions, RunOptions):
    """What is tuned, and for how long."""

    output_dir: AnyPath = Path("runs/refl_finetune")
    """Where everything is written."""

    prompts: str | None = None
    """Prompts to train on: a file, or a named set; of ten or more every fifth is held out for the evaluation. None is
    captions of the tiny world, and else pictures of things."""

    iterations: int = Field(100, ge=1)
    """ReFL iterations."""

    learning_rate: float | None = Field(None, gt=0)
    """Of what is trained; None is 5e-4 for the tiny world and 1e-4 for Stable Diffusion."""

    refl: ReFLConfig | None = None
    """How the reward is raised; None is small for the tiny world, and the authors' batch for Stable Diffusion."""

    prompts_per_split: int = Field(200, ge=1)
    """Prompts in the evaluation."""

    evaluation_steps: int = Field(20, ge=1)
    """Denoising steps of the pictures that are compared."""


def complete(config: Config) -> Config:
    """Fills in what depends on the model."""
    config = replace(config, guidance_scale=config.usual_guidance, **config.tuned(LoRAConfig(rank=8, alpha=8)))
    refl, run = config.refl or refl_config(config), config.run_of(usual_rate(config))
    check_same("refl", refl, **config.training_pictures)
    return replace(config, refl=refl, run=run, learning_rate=run.learning_rate)


def usual_rate(config: Config) -> float:
    """Returns the usual learning rate."""
    return 5e-4 if config.tiny else 1e-4


def refl_config(config: Config) -> ReFLConfig:
    """Returns ReFL's settings: small for the tiny world, the authors' batch for Stable Diffusion."""
    if config.tiny:
        return ReFLConfig(
            batch_size=8,
            micro_batch_size=8,
            pretraining_batch_size=16,
            **config.training_pictures,
            reward_scale=0.02,
        )
    return ReFLConfig(micro_batch_size=2, pretraining_batch_size=16, **config.training_pictures)


def load(config: Config) -> tuple[DiffusionPolicy, Reward, tuple[Measure, ...]]:
    """Loads the policy, the reward and the measures; what is wrong with one of them shows before any work is done."""
    config.check()
    reward = config.own_reward()
    if config.tiny:
        about = tiny_world(reward=reward, reward_name=config.reward_name)
        reward, measures = about.reward, about.measures
    else:
        reward = reward or ImageReward.load()
        measures = (Measure(config.reward_name, reward, note="What was raised."),)
    return config.load(lora=config.lora, train=config.train), reward, measures


def prompts_of(config: Config) -> tuple[Sequence[str], Sequence[str], Sequence[str]]:
    """Returns prompts to train on, to evaluate on, and for early stopping."""
    count, seed = config.prompts_per_split, config.seed
    if config.prompts is not None:
        trained, held_out = own_prompts(config.prompts)
        return trained, held_out[:count], held_out[:48]
    if config.tiny:
        return (
            captions("train", 1000, seed + 300),
            captions("benign", count, seed + 100),
            captions("held_out", 48, seed + 200),
        )
    trained, evaluated, watched = (
        nudity_prompts("benign", number, seed + k) for number, k in ((1000, 300), (count, 100), (48, 200))
    )
    return trained, evaluated, watched


def main(config: Config) -> None:
    """Trains and compares before and after."""
    config = complete(config)
    run, refl = config.run_of(usual_rate(config)), config.refl or refl_config(config)
    check_output_dir(run)
    training, evaluation, watched = prompts_of(config)
    policy, reward, measures = load(config)
    to_device(reward, policy.device)
    config.start(policy)

    drawing = config.drawing(config.evaluation_steps)
    evaluated = partial(draw_and_score, policy, measures, {"benign": evaluation}, drawing, seed=config.seed)
    before = evaluated(model="before")
    held_out = HeldOut(watched, Utility()) if config.tiny else None
    ReFLTrainer(policy, reward, training, refl, held_out=held_out).train(run, notes={"policy": config.policy})
    after = evaluated(model="tuned")
    if not process_state().is_main_process:
        return
    config.save(policy, config.output_dir)
    text = write_results(
        config.output_dir,
        [before, after],
        config,
        program="accelerate launch examples/refl_finetune.py",
        usual=usual_beside(config, complete, ("policy",)),
        told={
            "tuned_by": "ReFL",
            "reward": config.reward_name,
            "held_out": "true utility" if config.tiny else "",
        },
        lead=f"{config.iterations} iterations of ReFL on {'the tiny world' if config.tiny else config.policy}.",
        metrics=config.output_dir / "metrics.jsonl",
        panels=(
            Panel(title="Reward of the training batch", tags={"reward": "reward/mean"}),
            Panel(
                title="Held-out prompts",
                tags={"reward": "reward/validation", "held-out reward": "reward/held_out"},
            ),
        ),
        settings={"refl": asdict(refl)},
    )
    print(text)


if __name__ == "__main__":
    main(settings_from_command_line(Config, complete))
    process_state().destroy_process_group()
